"""One optimizer step and what a run can be resumed from, on tiny models."""

import math

import numpy as np
import pytest
from trainers import SMALL, make_batch, make_trainer, packed_batch

from ggml_diffusion.config.toml import load_config
from ggml_diffusion.engine.cpu.q4_model import Q4Model
from ggml_diffusion.engine.interface import Batch
from ggml_diffusion.errors import UserError
from ggml_diffusion.evaluation.held_out import masked_scores
from ggml_diffusion.formats.adapter_file import DiffusionCheckpoint
from ggml_diffusion.generation.denoise import GenerationConfig
from ggml_diffusion.generation.diffusion_model import DiffusionModel
from ggml_diffusion.text.tokenizer import Tokenizer
from ggml_diffusion.training import trainer as trainer_module
from ggml_diffusion.training.resume import resume_run, save_run
from ggml_diffusion.training.trainer import ConversionTrainer, Diverged


@pytest.fixture(scope="module")
def model(tiny_model):
    with Q4Model.from_gguf(tiny_model(L=1, C=32, H=2, G=1, F=32), 1) as opened:
        yield opened


# -- the step ----------------------------------------------------------------------------------------


def test_the_start_values_leave_the_base_as_it_is(model):
    trainer = make_trainer(model)
    tokens = make_batch().tokens
    offset = trainer.time_embedding.forward(
        np.array([0.1, 0.4, 0.7, 1.0]),
        trainer.parameters.views["time_embedding.weight"],
        trainer.parameters.views["time_embedding.bias"],
    )
    plain = model.logits(Batch(tokens))
    assert (model.logits(Batch(tokens, 1.0, embedding_offset=offset), trainer.adapter) == plain).all()
    assert any(view.any() for name, view in trainer.parameters.views.items() if name.endswith("lora_a"))


def test_weights_are_normalised_once_so_that_the_split_into_micro_batches_changes_only_rounding(model):
    batch = packed_batch()
    whole = make_trainer(model, training__batch_size=4, hardware__compute="f32")
    parts = make_trainer(model, training__batch_size=1, hardware__compute="f32")
    for _ in range(3):
        one, other = whole.train_step(batch), parts.train_step(batch)
        # float32 sums in another order, through three steps of an optimizer that divides by their size
        assert one.loss == pytest.approx(other.loss, rel=1e-3)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-2)


def test_the_loss_of_a_step_is_the_mean_over_all_masked_tokens_of_the_accumulated_batch(model):
    trainer = make_trainer(model)
    batch = packed_batch()
    noisy = trainer.corrupt(batch)
    logits = model.logits(
        Batch(noisy.noisy, 1.0, lengths=batch.lengths, document_ids=batch.document_ids), trainer.adapter
    ).astype(np.float64)
    logits[..., trainer.mask_token_id] = -np.inf
    losses = []
    for b, i in zip(*np.nonzero(noisy.noisy != batch.tokens), strict=True):
        row = logits[b, i - 1]  # shifted: read one to the left
        losses.append(np.log(np.exp(row).sum()) - row[batch.tokens[b, i]])
    assert len(losses) > 4
    # the engine's loss and its logits may come from products in another order
    assert trainer.train_step(batch).loss == pytest.approx(np.mean(losses), rel=1e-3)


@pytest.mark.parametrize("weighting", ["uniform", "nelbo"])
def test_first_tokens_of_documents_and_padding_are_never_masked_under_a_shifted_prediction(model, weighting):
    trainer = make_trainer(model, training__loss_weighting=weighting)
    batch = packed_batch()
    for step in range(40):
        trainer.step_count = step
        noisy = trainer.corrupt(batch)
        assert (noisy.weights[:, 0] == 0).all()
        assert noisy.weights[2, 5] == 0
        assert (noisy.weights[1, 7:] == 0).all()
        assert ((noisy.noisy != batch.tokens) == (noisy.weights != 0)).all()


def test_an_aligned_prediction_may_mask_the_first_token(model):
    trainer = make_trainer(model, model__prediction="aligned")
    masked_first = []
    for step in range(40):
        trainer.step_count = step
        masked_first.append(trainer.corrupt(make_batch()).weights[:, 0].any())
    assert any(masked_first)


def test_a_weight_where_a_shifted_prediction_has_no_row_is_refused(model):
    trainer = make_trainer(model)
    batch = make_batch(n=1)
    weights = np.zeros((1, 12), np.float32)
    weights[0, 0] = 1.0
    with pytest.raises(ValueError, match="first position of a document"):
        trainer.loss_and_gradients(batch.tokens, batch.tokens, weights, np.array([0.5]), 0.5)
    weights = np.zeros((1, 12), np.float32)
    weights[0, 6] = 1.0
    documents = np.repeat([[0, 1]], 6, axis=1).astype(np.int32)
    with pytest.raises(ValueError, match="first position of a document"):
        trainer.loss_and_gradients(
            batch.tokens, batch.tokens, weights, np.array([0.5]), 0.5, document_ids=documents
        )


def test_loss_and_gradients_name_everything_that_is_trained_and_change_nothing(model):
    trainer = make_trainer(model)
    before = trainer.parameters.flat.copy()
    batch = make_batch()
    weights = np.zeros((4, 12), np.float32)
    weights[:, 3:6] = 1.0
    noisy = np.where(weights != 0, trainer.mask_token_id, batch.tokens)
    loss, gradients = trainer.loss_and_gradients(batch.tokens, noisy, weights, np.full(4, 0.5), 0.3)
    assert loss > 0
    assert gradients.keys() == trainer.parameters.views.keys()
    assert {"blk.0.attn_q.weight.lora_a", "mask_embedding", "time_embedding.weight"} <= gradients.keys()
    assert all(g.dtype == np.float32 for g in gradients.values())
    assert (trainer.parameters.flat == before).all()
    # B is zero, so that A has no gradient yet
    assert not gradients["blk.0.attn_q.weight.lora_a"].any()
    assert gradients["blk.0.attn_q.weight.lora_b"].any()


def test_without_a_time_embedding_none_is_trained(model):
    trainer = make_trainer(model, time_embedding__enabled=False)
    assert not any(name.startswith("time_embedding") for name in trainer.parameters.views)
    assert np.isfinite(trainer.train_step(make_batch()).loss)


def test_time_embedding_dropout_trains_without_it(model):
    always = make_trainer(model, time_embedding__dropout=1.0)
    always.train_step(make_batch())
    assert not always.parameters.views["time_embedding.bias"].any()
    never = make_trainer(model)
    never.train_step(make_batch())
    assert never.parameters.views["time_embedding.bias"].any()


def test_the_causal_ratio_and_the_learning_rate_follow_their_schedules(model):
    trainer = make_trainer(model, mask_annealing__schedule="linear")
    steps = [trainer.train_step(make_batch()) for _ in range(6)]
    assert [step.causal_ratio for step in steps] == pytest.approx([1, 2 / 3, 1 / 3, 0, 0, 0])
    assert [step.learning_rate for step in steps[:2]] == pytest.approx([0.005, 0.01])
    assert steps[-1].learning_rate < 0.005
    assert [step.step for step in steps] == [1, 2, 3, 4, 5, 6]
    assert steps[-1].tokens == 6 * 48


def test_a_step_with_a_norm_far_above_the_usual_is_shortened_and_a_resumed_run_knows_what_is_usual(
    model, monkeypatch
):
    norms = iter([2.0, 2.0, 50.0, 2.0, 50.0, 2.0, 50.0])
    monkeypatch.setattr(trainer_module, "clip_by_global_norm", lambda gradients, most: next(norms))
    options = {
        "training__norm_damping": 1.5,
        "training__lr_schedule": "constant",
        "training__warmup_steps": 0,
    }
    first, batch = make_trainer(model, **options), make_batch()
    rates = [first.train_step(batch).learning_rate for _ in range(4)]
    full = first.learning_rate
    assert rates == [full, full, pytest.approx(full * 1.5 * 2.0 / 50.0), full]
    second = make_trainer(model, **options)
    second.restore(first.state())
    usual = first.norm_trend.usual
    assert usual is not None and second.norm_trend.usual == usual
    assert second.train_step(batch).learning_rate == pytest.approx(full * 1.5 * usual / 50.0)
    assert second.train_step(batch).learning_rate == full
    second.restart()
    assert second.norm_trend.usual is None
    plain = make_trainer(model, training__lr_schedule="constant", training__warmup_steps=0)
    assert plain.train_step(batch).learning_rate == full


def test_an_attention_sink_is_for_an_adapted_context_with_a_shifted_prediction(model):
    """Where it is meant it changes the loss, is kept in what is exported, and elsewhere it is none."""
    batch, losses = make_batch(), {}
    for sink in (False, True):
        trainer = make_trainer(
            model, model__attention_sink=sink, model__prediction="shifted", mask_annealing__total_steps=0
        )
        losses[sink] = trainer.gradients_of(trainer.corrupt(batch), 0.0)[0]
        assert trainer.checkpoint().metadata.attention_sink == sink
    assert abs(losses[True] - losses[False]) > 1e-5
    for changes in ({"model__prediction": "aligned"}, {"model__context": "frozen"}):
        trainer = make_trainer(model, model__attention_sink=True, **changes)
        assert not trainer.checkpoint().metadata.attention_sink


def test_a_bernoulli_mask_is_drawn_anew_each_step_and_only_if_asked_for(model):
    soft, bernoulli = make_trainer(model), make_trainer(model, mask_annealing__mask="bernoulli")
    assert soft.corrupt(make_batch()).bernoulli_seed is None
    first = bernoulli.corrupt(make_batch()).bernoulli_seed
    bernoulli.step_count = 1
    assert first != bernoulli.corrupt(make_batch()).bernoulli_seed
    assert np.isfinite(bernoulli.train_step(make_batch()).loss)


def test_equal_seeds_train_equal_bits_with_any_number_of_threads_and_other_seeds_do_not(tiny_model):
    path = tiny_model(L=1, C=32, H=2, G=1, F=32)
    results = []
    for seed, n_threads in ((0, 1), (0, 3), (1, 1)):
        with Q4Model.from_gguf(path, n_threads) as model:
            trainer = make_trainer(model, training__seed=seed)
            for _ in range(3):
                trainer.train_step(packed_batch())
            results.append(trainer.parameters.flat.copy())
    assert (results[0] == results[1]).all()
    assert (results[0] != results[2]).any()


# -- losses that are not finite ----------------------------------------------------------------------


class Broken:
    """Stands before an engine and spoils the loss of chosen calls."""

    def __init__(self, engine, bad_calls):
        self._engine, self._bad_calls, self._n_calls = engine, set(bad_calls), 0

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def loss_and_gradients(self, *args, **kwargs):
        result = self._engine.loss_and_gradients(*args, **kwargs)
        if self._n_calls in self._bad_calls:
            args[4]["mask_embedding"][0] = np.nan
        self._n_calls += 1
        return result


def spoiled_trainer(model, bad_steps):
    warnings = []
    config = load_config(overrides={**SMALL, "training.batch_size": 4})
    trainer = ConversionTrainer(Broken(model, bad_steps), config, warn=warnings.append)
    return trainer, warnings


def test_a_step_that_is_not_finite_is_skipped_with_a_warning_that_names_the_batch(model):
    trainer, warnings = spoiled_trainer(model, [1])
    trainer.train_step(make_batch())
    before = trainer.parameters.flat.copy()
    metrics = trainer.train_step(make_batch())
    assert (trainer.parameters.flat == before).all()
    assert not np.isfinite(metrics.grad_norm)
    assert metrics.step == 2
    assert len(warnings) == 1
    assert "batch 1" in warnings[0]
    trainer.train_step(make_batch())
    assert (trainer.parameters.flat != before).any()
    assert np.isfinite(trainer.parameters.flat).all()


def test_three_bad_steps_in_a_row_stop_the_run(model):
    trainer, warnings = spoiled_trainer(model, [0, 1, 3, 4, 5])
    for _ in range(5):
        trainer.train_step(make_batch())
    assert len(warnings) == 4
    with pytest.raises(UserError, match="3 batches in a row"):
        trainer.train_step(make_batch())


# -- checkpoints and exports ---------------------------------------------------------------------------


def test_a_resumed_run_ends_with_the_same_bits_as_an_undisturbed_one(model, tmp_path):
    batches = [make_batch(seed=step) for step in range(6)]
    undisturbed = make_trainer(model)
    for batch in batches:
        undisturbed.train_step(batch)
    first = make_trainer(model)
    for batch in batches[:4]:
        first.train_step(batch)
    save_run(first, tmp_path / "checkpoints")
    second = make_trainer(model)
    assert resume_run(second, tmp_path / "checkpoints")
    assert second.step_count == 4
    for batch in batches[4:]:
        last = second.train_step(batch)
    assert (second.parameters.flat == undisturbed.parameters.flat).all()
    assert last.tokens == undisturbed.tokens_seen


def test_a_skipped_step_is_remembered_by_a_checkpoint(model, tmp_path):
    undisturbed, _ = spoiled_trainer(model, [1])
    for _ in range(4):
        undisturbed.train_step(make_batch())
    first, _ = spoiled_trainer(model, [1])
    for _ in range(2):
        first.train_step(make_batch())
    save_run(first, tmp_path)
    second, _ = spoiled_trainer(model, [])
    assert resume_run(second, tmp_path)
    for _ in range(2):
        second.train_step(make_batch())
    assert (second.parameters.flat == undisturbed.parameters.flat).all()


def test_a_folder_without_a_checkpoint_is_not_resumed(model, tmp_path):
    assert not resume_run(make_trainer(model), tmp_path / "nothing")


def test_a_run_with_other_settings_is_not_gone_on_with_and_the_settings_are_named(model, tmp_path):
    save_run(make_trainer(model), tmp_path)
    other = make_trainer(model, training__learning_rate=2e-2, model__qlora_alpha=5.0)
    with pytest.raises(UserError) as caught:
        resume_run(other, tmp_path)
    message = str(caught.value)
    assert "training.learning_rate (0.01 there, 0.02 here)" in message
    assert "model.qlora_alpha (64.0 there, 5.0 here)" in message
    assert "seed" not in message
    assert "\n" not in message


def test_settings_that_change_no_number_may_differ(model, tmp_path):
    save_run(make_trainer(model), tmp_path)
    other = make_trainer(model, hardware__num_threads=1, training__checkpoint_every=1)
    assert resume_run(other, tmp_path)


def test_a_setting_that_an_older_version_did_not_have_counts_as_its_default(model, tmp_path):
    trainer = make_trainer(model)
    older = trainer.config.model_dump(mode="json")
    del older["loss_weighting"], older["hardware"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(trainer.config), "model_dump", lambda self, mode: older)
        save_run(trainer, tmp_path)
    assert resume_run(make_trainer(model), tmp_path)
    with pytest.raises(UserError, match=r"loss_weighting \(uniform there, nelbo here\)"):
        resume_run(make_trainer(model, training__loss_weighting="nelbo"), tmp_path)


def test_another_base_or_other_data_are_not_gone_on_with(model, tiny_model, tmp_path):
    config = load_config(overrides=SMALL)
    save_run(ConversionTrainer(model, config, data_fingerprint="a" * 64), tmp_path)
    with pytest.raises(UserError, match="training data"):
        resume_run(ConversionTrainer(model, config, data_fingerprint="b" * 64), tmp_path)
    another = tiny_model(L=1, C=32, H=2, G=1, F=32, seed=1)
    with Q4Model.from_gguf(another, 1) as other, pytest.raises(UserError, match="base model"):
        resume_run(ConversionTrainer(other, config, data_fingerprint="a" * 64), tmp_path)


def test_exports_hold_what_was_trained(model, tmp_path):
    trainer = make_trainer(model)
    for _ in range(5):
        trainer.train_step(make_batch())
    for path in trainer.export(tmp_path):
        loaded = DiffusionCheckpoint.load(path)
        assert loaded.tensors.keys() == trainer.parameters.views.keys()
        for name, view in trainer.parameters.views.items():
            assert (loaded.tensors[name] == view).all()
        assert loaded.metadata.conversion_steps == 5
        assert loaded.metadata.training_tokens == 5 * 48
        assert loaded.metadata.final_causal_ratio == 0.0
        assert loaded.metadata.prediction == "shifted"
        assert loaded.metadata.base_sha256 == model.sha256
        assert loaded.noise_schedule["type"] == "cosine"


def test_a_checkpoint_in_the_middle_of_the_annealing_keeps_its_causal_ratio(model):
    trainer = make_trainer(model, mask_annealing__schedule="linear")
    trainer.train_step(make_batch())
    assert trainer.checkpoint().metadata.final_causal_ratio == pytest.approx(2 / 3)


def test_equal_runs_write_equal_files_if_the_date_is_fixed(model, tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    files = []
    for name in ("one", "two"):
        trainer = make_trainer(model)
        trainer.train_step(make_batch())
        (tmp_path / name).mkdir()
        files.append([path.read_bytes() for path in trainer.export(tmp_path / name)])
    assert files[0] == files[1]


@pytest.mark.parametrize("suffix", ["safetensors", "gguf"])
@pytest.mark.parametrize("prediction", ["shifted", "aligned"])
def test_an_exported_conversion_writes_the_same_text_as_the_trainers_state(
    model, tmp_path, suffix, prediction
):
    trainer = make_trainer(model, model__prediction=prediction)
    for _ in range(3):
        trainer.train_step(make_batch())
    trainer.export(tmp_path)
    config = GenerationConfig(length=20, steps=7, seed=5)
    in_memory = DiffusionModel.from_checkpoint(
        model, Tokenizer.from_gguf(model.file.path), trainer.checkpoint()
    )
    loaded = DiffusionModel.load(model.file.path, tmp_path / f"adapter.{suffix}")
    text = in_memory.generate("the and", config)
    assert text == loaded.generate("the and", config)
    assert text != in_memory.generate("the and", config.model_copy(update={"seed": 6}))


# -- it learns -----------------------------------------------------------------------------------------


def test_32_sequences_are_learned_by_heart(tiny_model):
    """Over 95% of the tokens that are masked at t = .5 are guessed right, after training on nothing else."""
    overrides = {
        "training.batch_size": 32,
        "training.gradient_accumulation": 1,
        "training.total_steps": 360,
        "training.warmup_steps": 10,
        "training.learning_rate": 1.5e-3,
        "training.weight_decay": 0.0,
        "model.qlora_rank": 32,
        "model.target_modules": [
            "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
        ],
        "mask_annealing.total_steps": 72,
        "noise_schedule.type": "linear",
    }  # fmt: skip
    path = tiny_model(L=2, C=128, H=4, G=2, F=256)
    with Q4Model.from_gguf(path, 1) as model:
        trainer = ConversionTrainer(model, load_config(overrides=overrides))
        batch = make_batch(n=32, T=8)
        for _ in range(360):
            trainer.train_step(batch)
        converted = DiffusionModel.from_checkpoint(model, Tokenizer.from_gguf(path), trainer.checkpoint())
        at_half = masked_scores(converted, batch, batch_size=32)[1]
    assert at_half.share == 0.5
    assert at_half.visible.n_tokens > 100
    assert at_half.visible.accuracy > 0.95
    assert at_half.future_context_gain > 0.0


# -- divergence ----------------------------------------------------------------------------------------


def judged(model, start, losses):
    """How many steps of these cross-entropies are taken before the trainer calls it diverging."""
    trainer = make_trainer(model)
    trainer._judge(1.0, 1.0, start)
    for taken, loss in enumerate(losses):
        trainer.step_count += 1
        try:
            trainer._judge(1.0, 1.0, loss)
        except Diverged:
            return taken + 1
    return None


def test_three_steps_in_a_row_far_above_a_guess_and_above_the_start_diverge(model):
    guess = math.log(model.file.V)
    assert judged(model, 0.7 * guess, [1.4 * guess] * 4) == 3
    assert judged(model, 0.7 * guess, [1.2 * guess] * 9) is None  # a random model guesses badly
    assert judged(model, 0.7 * guess, [1.4 * guess, 1.4 * guess, guess] * 3) is None
    # a base that is sure of itself may be worse than a guess at first, and learns
    assert judged(model, 1.5 * guess, [2.0 * guess] * 9) is None
    assert judged(model, 1.5 * guess, [2.4 * guess] * 9) == 3


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_weights_that_overflow_diverge_at_once(model):
    trainer = make_trainer(model, training__learning_rate=1e38, training__lora_b_rate_factor=100.0)
    with pytest.raises(Diverged, match=r"no numbers after a step at a learning rate of 1e\+38"):
        for _ in range(3):
            trainer.train_step(make_batch())


@pytest.mark.parametrize("kind", ["holes", "blocks"])
def test_a_run_with_a_frozen_context_goes_on_bit_for_bit(model, kind):
    changes = {
        "holes": {"holes__share": 0.5, "holes__longest": 4},
        "blocks": {"block_diffusion__enabled": True, "block_diffusion__initial_size": 2},
    }[kind]
    batches = [packed_batch(), make_batch(seed=1), make_batch(seed=2), packed_batch()]
    whole = make_trainer(model, model__context="frozen", **changes)
    losses = [whole.train_step(batch).loss for batch in batches]
    first = make_trainer(model, model__context="frozen", **changes)
    for batch in batches[:2]:
        first.train_step(batch)
    second = make_trainer(model, model__context="frozen", **changes)
    second.restore(first.state())
    assert [second.train_step(batch).loss for batch in batches[2:]] == losses[2:]
    assert np.array_equal(second.parameters.flat, whole.parameters.flat)
    metadata = second.checkpoint().metadata
    assert metadata.context == "frozen" and metadata.margin == (8 if kind == "holes" else 0)
