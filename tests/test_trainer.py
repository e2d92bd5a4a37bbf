"""One optimizer step and what a run can be gone on from, on tiny models."""

from dataclasses import replace

import numpy as np
import pytest

from ggml_diffusion.adapter_file import DiffusionCheckpoint
from ggml_diffusion.config import load_config
from ggml_diffusion.data import TokenBatch
from ggml_diffusion.diffusion_model import DiffusionModel
from ggml_diffusion.engine import Q4Model
from ggml_diffusion.errors import UserError
from ggml_diffusion.evaluate import masked_scores
from ggml_diffusion.generate import GenerationConfig
from ggml_diffusion.tokenizer import Tokenizer
from ggml_diffusion.trainer import ConversionTrainer

SMALL = {
    "training.batch_size": 2,
    "training.gradient_accumulation": 2,
    "training.sequence_length": 12,
    "training.total_steps": 6,
    "training.warmup_steps": 2,
    "training.learning_rate": 1e-2,
    "model.qlora_rank": 2,
    "mask_annealing.total_steps": 3,
    "time_embedding.dim": 8,
}


@pytest.fixture(scope="module")
def model(tiny_model):
    with Q4Model.from_gguf(tiny_model(L=1, C=32, H=2, G=1, F=32), 1) as opened:
        yield opened


def make_trainer(model, **changes):
    overrides = {**SMALL, **{key.replace("__", "."): value for key, value in changes.items()}}
    return ConversionTrainer(model, load_config(overrides=overrides))


def make_batch(n=4, seed=0, T=12):
    tokens = np.random.default_rng(seed).integers(20, 300, (n, T)).astype(np.int32)
    return TokenBatch(tokens, np.full(n, T, np.int32), np.zeros((n, T), np.int32))


def packed_batch():
    """Four sequences: one padded, one that holds two documents."""
    batch = make_batch()
    batch.lengths[1] = 7
    batch.document_ids[2, 5:] = 1
    return batch


# -- the step ----------------------------------------------------------------------------------------


def test_the_start_values_leave_the_base_as_it_is(model):
    trainer = make_trainer(model)
    tokens = make_batch().tokens
    offset = trainer.time_embedding.forward(
        np.array([0.1, 0.4, 0.7, 1.0]),
        trainer.parameters.views["time_embedding.weight"],
        trainer.parameters.views["time_embedding.bias"],
    )
    plain = model.logits(tokens)
    assert (model.logits(tokens, 1.0, trainer.adapter, offset) == plain).all()
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
        noisy.noisy, 1.0, trainer.adapter, lengths=batch.lengths, document_ids=batch.document_ids
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


# -- other masks ---------------------------------------------------------------------------------------


def test_exact_masks_have_counts_spread_from_1_to_all_and_the_time_at_which_the_schedule_masks_as_many(model):
    """The counts of one step: k / L in as many equal strata as there are sequences, one in each."""
    trainer = make_trainer(model, noise_schedule__masking="exact", noise_schedule__num_timesteps=0)
    noisy = trainer.corrupt(make_batch(n=11))
    counts = (noisy.noisy != noisy.clean).sum(axis=1)
    assert sorted(counts) == list(range(1, 12))  # 11 maskable tokens in each sequence
    assert noisy.weights.sum() == pytest.approx(1.0)
    assert 1.0 - np.cos(0.5 * np.pi * noisy.t) == pytest.approx(counts / 11, abs=1e-6)  # the cosine schedule


def test_exact_masks_under_nelbo_weigh_L_over_k_in_each_sequence(model):
    trainer = make_trainer(
        model, noise_schedule__masking="exact", training__loss_weighting="nelbo", training__nelbo_clip=1e9
    )
    noisy = trainer.corrupt(packed_batch())
    n_maskable = np.array([11, 6, 10, 11])  # of 12 tokens; 7 with padding; two documents
    masked = noisy.noisy != noisy.clean
    expected = masked * (n_maskable / masked.sum(axis=1))[:, None] / n_maskable.sum()
    assert noisy.weights == pytest.approx(expected, rel=1e-6)
    assert noisy.weights.sum() == pytest.approx(1.0)  # whatever k is drawn


@pytest.mark.parametrize("masking", ["bernoulli", "exact"])
@pytest.mark.parametrize("weighting", ["uniform", "nelbo"])
def test_complementary_masks_cover_each_maskable_token_once(model, masking, weighting):
    trainer = make_trainer(
        model,
        noise_schedule__complementary=True,
        noise_schedule__masking=masking,
        training__loss_weighting=weighting,
    )
    batch = packed_batch()
    for step in range(10):
        trainer.step_count = step
        noisy = trainer.corrupt(batch)
        one, other = (noisy.weights[half] != 0 for half in (slice(0, 4), slice(4, 8)))
        may_mask = np.ones((4, 12), dtype=bool)
        may_mask[:, 0] = may_mask[2, 5] = may_mask[1, 7:] = False
        assert np.array_equal(one ^ other, may_mask)
        assert np.array_equal(noisy.noisy, np.where(noisy.weights != 0, trainer.mask_token_id, noisy.clean))
        assert np.array_equal(noisy.clean[:4], noisy.clean[4:])
        assert np.array_equal(noisy.lengths, np.tile(batch.lengths, 2))
        assert len(noisy.t) == len(noisy.keeps_time) == 8
    metrics = trainer.train_step(batch)
    assert np.isfinite(metrics.loss)
    assert metrics.tokens == 2 * batch.lengths.sum()


def test_complementary_masks_have_times_whose_shares_add_up_to_one_and_the_weights_of_their_densities(model):
    trainer = make_trainer(
        model,
        noise_schedule__complementary=True,
        noise_schedule__num_timesteps=0,
        training__loss_weighting="nelbo",
        training__nelbo_clip=1e9,
    )
    noisy = trainer.corrupt(make_batch())
    t = noisy.t.astype(np.float64)
    p = 1.0 - np.cos(0.5 * np.pi * t)
    assert p[:4] + p[4:] == pytest.approx(np.ones(4), abs=1e-6)
    slope = 0.5 * np.pi * np.sin(0.5 * np.pi * t[:4])
    for half, weight in ((slice(0, 4), slope / p[:4]), (slice(4, 8), slope / p[4:])):
        for row, expected in zip(noisy.weights[half], weight / (8 * 11), strict=True):
            assert row[row != 0] == pytest.approx(np.full((row != 0).sum(), expected), rel=1e-4)


def test_a_token_that_the_batch_excludes_is_never_masked_nor_predicted(model):
    batch = packed_batch()
    allowed = np.zeros((4, 12), dtype=bool)
    allowed[:, 6:9] = True
    batch = replace(batch, maskable=allowed)
    trainer = make_trainer(model, training__ar_loss_share=0.5)
    for step in range(10):
        trainer.step_count = step
        assert not trainer.corrupt(batch).weights[~allowed].any()
    ar_loss = trainer.train_step(batch).ar_loss
    assert ar_loss == pytest.approx(mean_next_token_loss(model, batch, allowed), rel=1e-3)


# -- blocks --------------------------------------------------------------------------------------------


def test_blocks_are_cut_and_grow_over_their_share_of_the_run(model):
    trainer = make_trainer(
        model,
        block_diffusion__enabled=True,
        block_diffusion__initial_size=2,
        block_diffusion__growth_share=0.5,
        model__prediction="aligned",
    )
    sizes = []
    for step in range(5):
        trainer.step_count = step
        noisy = trainer.corrupt(make_batch())
        masked = noisy.noisy != noisy.clean
        for row, end in zip(masked, noisy.lengths, strict=True):
            assert row.any() and not row[end:].any()
        sizes.append(trainer.checkpoint().metadata.block_size)
        if sizes[-1] is not None:
            ends = {min(end, 12) for end in range(sizes[-1], 12 + sizes[-1], sizes[-1])}
            assert set(noisy.lengths.tolist()) <= ends
            first = np.argmax(masked, axis=1)
            assert (first >= noisy.lengths - sizes[-1]).all()
        else:
            assert (noisy.lengths == 12).all()
    # 2 * 6^(step / 3), up to the 12 tokens of a sequence after half of 6 steps
    assert sizes == [2, 4, 7, None, None]


@pytest.mark.parametrize("suffix", ["safetensors", "gguf"])
def test_a_conversion_trained_in_blocks_is_loaded_as_one_that_writes_in_blocks(model, tmp_path, suffix):
    trainer = make_trainer(
        model, block_diffusion__enabled=True, block_diffusion__final_size=5, block_diffusion__growth_share=0.0
    )
    trainer.export(tmp_path)
    assert DiffusionModel.load(model.path, tmp_path / f"adapter.{suffix}").block_size == 5
    make_trainer(model).export(tmp_path)
    assert DiffusionModel.load(model.path, tmp_path / f"adapter.{suffix}").block_size is None


def test_the_loss_of_a_block_is_that_of_the_text_without_what_follows(model):
    trainer = make_trainer(
        model, block_diffusion__enabled=True, block_diffusion__initial_size=4, mask_annealing__total_steps=0
    )
    batch = make_batch()
    noisy = trainer.corrupt(batch)
    assert noisy.lengths.min() < 12
    losses = []
    for b in range(4):
        seen = noisy.noisy[b : b + 1, : noisy.lengths[b]]
        logits = model.logits(seen, 0.0, trainer.adapter)[0].astype(np.float64)
        logits[:, trainer.mask_token_id] = -np.inf
        for i in np.flatnonzero(seen[0] != batch.tokens[b, : noisy.lengths[b]]):
            losses.append(np.log(np.exp(logits[i - 1]).sum()) - logits[i - 1, batch.tokens[b, i]])
    metrics = trainer.train_step(batch)
    assert metrics.loss == pytest.approx(np.mean(losses), rel=1e-3)
    assert metrics.tokens == noisy.lengths.sum()


# -- other terms of the loss ---------------------------------------------------------------------------


def mean_next_token_loss(model, batch, allowed=None):
    """Of clean text under the causal base, over tokens with another of their document before them."""
    losses = []
    for b in range(len(batch)):
        for document in np.unique(batch.document_ids[b, : batch.lengths[b]]):
            places = np.flatnonzero(batch.document_ids[b, : batch.lengths[b]] == document)
            logits = model.logits(batch.tokens[b : b + 1, places])[0].astype(np.float64)
            logits[:, 3] = -np.inf  # the mask token
            for row, (i, before) in enumerate(zip(places[1:], places[:-1], strict=True)):
                if allowed is None or allowed[b, i]:
                    assert before == i - 1
                    losses.append(np.log(np.exp(logits[row]).sum()) - logits[row, batch.tokens[b, i]])
    return np.mean(losses)


def gradients_of_a_step(trainer, batch):
    """The accumulated gradient of a step, before it is clipped."""
    trainer.config = trainer.config.model_copy(update={"max_grad_norm": 1e9})
    metrics = trainer.train_step(batch)
    return metrics, trainer._gradients.flat.astype(np.float64)


@pytest.mark.parametrize("prediction", ["shifted", "aligned"])
def test_the_causal_loss_is_that_of_the_base_on_clean_text_whatever_the_prediction(model, prediction):
    trainer = make_trainer(model, training__ar_loss_share=0.25, model__prediction=prediction)
    assert trainer.mask_token_id == 3
    batch = packed_batch()
    metrics = trainer.train_step(batch)
    assert metrics.ar_loss == pytest.approx(mean_next_token_loss(model, batch), rel=1e-3)
    plain = make_trainer(model, model__prediction=prediction).train_step(batch)
    assert metrics.loss == pytest.approx(plain.loss, rel=1e-6)
    assert plain.ar_loss is None and plain.distillation_loss is None


def test_the_gradient_with_a_causal_share_is_the_weighted_mean_of_both_gradients(model):
    """share s: (1 - s) * masked + s * causal, so the gradient is linear in s."""
    batch = packed_batch()
    found = {}
    for share in (0.0, 0.25, 0.75):
        trainer = make_trainer(model, training__ar_loss_share=share, hardware__compute="f32")
        found[share] = gradients_of_a_step(trainer, batch)[1]
    causal = (found[0.75] - 0.25 * found[0.0]) / 0.75
    expected = 0.75 * found[0.0] + 0.25 * causal
    # float32 sums, and bfloat16 products of the engine's own arithmetic
    assert np.linalg.norm(found[0.25] - expected) < 1e-2 * np.linalg.norm(expected)
    assert np.linalg.norm(causal) > 1e-3 * np.linalg.norm(found[0.0])


def test_the_causal_loss_has_no_gradient_for_mask_and_time(model):
    batch = packed_batch()
    found = {}
    for share in (0.0, 0.5):
        trainer = make_trainer(model, training__ar_loss_share=share)
        gradients_of_a_step(trainer, batch)
        found[share] = {name: view.copy() for name, view in trainer._gradients.views.items()}
    for name in ("mask_embedding", "time_embedding.bias"):
        assert found[0.5][name] == pytest.approx(0.5 * found[0.0][name], rel=1e-3, abs=1e-7)


@pytest.mark.parametrize("prediction", ["shifted", "aligned"])
def test_distillation_is_the_cross_entropy_under_the_bases_causal_prediction_of_the_same_token(
    model, prediction
):
    trainer = make_trainer(
        model,
        training__distillation_weight=0.5,
        model__prediction=prediction,
        mask_annealing__total_steps=0,
    )
    batch = make_batch()
    noisy = trainer.corrupt(batch)
    student = model.logits(noisy.noisy, 0.0, trainer.adapter).astype(np.float64)
    teacher = model.logits(batch.tokens, 1.0).astype(np.float64)
    losses = []
    for b, i in zip(*np.nonzero(noisy.weights), strict=True):
        losses.append(0.0)
        if i > 0:  # the base predicts no first token
            teacher_row, row = teacher[b, i - 1], student[b, i - 1 if prediction == "shifted" else i]
            teacher_row[3] = row[3] = -np.inf  # the mask token
            p = np.exp(teacher_row - teacher_row.max())
            p /= p.sum()
            log_q = row - row.max() - np.log(np.exp(row - row.max()).sum())
            losses[-1] = -np.sum(p[p > 0] * log_q[p > 0])
    metrics = trainer.train_step(batch)
    assert metrics.distillation_loss == pytest.approx(np.mean(losses), rel=2e-3)
    plain = make_trainer(model, model__prediction=prediction, mask_annealing__total_steps=0)
    assert metrics.loss == pytest.approx(plain.train_step(batch).loss, rel=1e-6)


def test_the_gradient_is_linear_in_the_distillation_weight(model):
    batch = packed_batch()
    found = {}
    for weight in (0.0, 0.5, 2.0):
        trainer = make_trainer(model, training__distillation_weight=weight)
        found[weight] = gradients_of_a_step(trainer, batch)[1]
    expected = found[0.0] + 0.25 * (found[2.0] - found[0.0])
    assert np.linalg.norm(found[0.5] - expected) < 1e-2 * np.linalg.norm(expected)
    assert np.linalg.norm(found[2.0] - found[0.0]) > 1e-2 * np.linalg.norm(found[0.0])


def test_without_a_trained_mask_embedding_it_stays_zero_and_the_rest_is_trained(model):
    trainer = make_trainer(model, model__train_mask_embedding=False)
    for _ in range(3):
        trainer.train_step(make_batch())
    assert not trainer.parameters.views["mask_embedding"].any()
    assert trainer.parameters.views["blk.0.attn_q.weight.lora_b"].any()
    with_it = make_trainer(model)
    with_it.train_step(make_batch())
    assert with_it.parameters.views["mask_embedding"].any()


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
            args[5]["mask_embedding"][0] = np.nan
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
    first.save_checkpoint(tmp_path / "checkpoints")
    second = make_trainer(model)
    assert second.resume(tmp_path / "checkpoints")
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
    first.save_checkpoint(tmp_path)
    second, _ = spoiled_trainer(model, [])
    assert second.resume(tmp_path)
    for _ in range(2):
        second.train_step(make_batch())
    assert (second.parameters.flat == undisturbed.parameters.flat).all()


def test_a_folder_without_a_checkpoint_is_not_resumed(model, tmp_path):
    assert not make_trainer(model).resume(tmp_path / "nothing")


def test_a_run_with_other_settings_is_not_gone_on_with_and_the_settings_are_named(model, tmp_path):
    make_trainer(model).save_checkpoint(tmp_path)
    other = make_trainer(model, training__learning_rate=2e-2, model__qlora_alpha=5.0)
    with pytest.raises(UserError) as caught:
        other.resume(tmp_path)
    message = str(caught.value)
    assert "training.learning_rate (0.01 there, 0.02 here)" in message
    assert "model.qlora_alpha (64.0 there, 5.0 here)" in message
    assert "seed" not in message
    assert "\n" not in message


def test_settings_that_change_no_number_may_differ(model, tmp_path):
    make_trainer(model).save_checkpoint(tmp_path)
    other = make_trainer(model, hardware__num_threads=1, training__checkpoint_every=1)
    assert other.resume(tmp_path)


def test_a_setting_that_an_older_version_did_not_have_counts_as_its_default(model, tmp_path):
    trainer = make_trainer(model)
    older = trainer.config.model_dump(mode="json")
    del older["loss_weighting"], older["hardware"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(trainer.config), "model_dump", lambda self, mode: older)
        trainer.save_checkpoint(tmp_path)
    assert make_trainer(model).resume(tmp_path)
    with pytest.raises(UserError, match=r"loss_weighting \(uniform there, nelbo here\)"):
        make_trainer(model, training__loss_weighting="nelbo").resume(tmp_path)


def test_another_base_or_other_data_are_not_gone_on_with(model, tiny_model, tmp_path):
    config = load_config(overrides=SMALL)
    ConversionTrainer(model, config, data_fingerprint="a" * 64).save_checkpoint(tmp_path)
    with pytest.raises(UserError, match="training data"):
        ConversionTrainer(model, config, data_fingerprint="b" * 64).resume(tmp_path)
    another = tiny_model(L=1, C=32, H=2, G=1, F=32, seed=1)
    with Q4Model.from_gguf(another, 1) as other, pytest.raises(UserError, match="base model"):
        ConversionTrainer(other, config, data_fingerprint="a" * 64).resume(tmp_path)


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
    in_memory = DiffusionModel.from_checkpoint(model, Tokenizer.from_gguf(model.path), trainer.checkpoint())
    loaded = DiffusionModel.load(model.path, tmp_path / f"adapter.{suffix}")
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
