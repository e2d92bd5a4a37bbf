"""The terms of the loss and the draws of a step, against direct computations on the engine's logits."""

from dataclasses import replace

import autograd
import autograd.numpy as anp
import numpy as np
import oracle
import pytest
from cases import relative_errors
from rows_by_definition import expected_rows
from trainers import make_batch, make_trainer, packed_batch

from ggml_diffusion.engine.cpu.q4_model import Q4Model
from ggml_diffusion.engine.interface import Batch
from ggml_diffusion.generation.diffusion_model import DiffusionModel
from ggml_diffusion.objective.standing_rows import NOTHING
from ggml_diffusion.training.resume import resume_run, save_run


@pytest.fixture(scope="module")
def model(tiny_model):
    with Q4Model.from_gguf(tiny_model(L=1, C=32, H=2, G=1, F=32), 1) as opened:
        yield opened


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
    assert DiffusionModel.load(model.file.path, tmp_path / f"adapter.{suffix}").rule.block_size == 5
    make_trainer(model).export(tmp_path)
    assert DiffusionModel.load(model.file.path, tmp_path / f"adapter.{suffix}").rule.block_size is None


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
        logits = model.logits(Batch(seen, 0.0), trainer.adapter)[0].astype(np.float64)
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
            logits = model.logits(Batch(batch.tokens[b : b + 1, places]))[0].astype(np.float64)
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
    student = model.logits(Batch(noisy.noisy, 0.0), trainer.adapter).astype(np.float64)
    teacher = model.logits(Batch(batch.tokens, 1.0)).astype(np.float64)
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


@pytest.mark.parametrize(
    ("setting", "names"),
    [("embedding_rate_factor", ("mask_embedding", "time_embedding")), ("lora_b_rate_factor", (".lora_b",))],
)
def test_embeddings_and_lora_b_may_have_a_learning_rate_of_their_own(model, setting, names):
    """The first step of AdamW is the learning rate, times the gradient's sign, for any gradient."""
    found = {}
    for factor in (1.0, 4.0):
        trainer = make_trainer(model, **{f"training__{setting}": factor}, training__weight_decay=0.0)
        start = trainer.parameters.flat.copy()
        trainer.train_step(make_batch())
        moved = trainer.parameters.flat - start
        found[factor] = {name: moved[part] for name, part in trainer.parameters.slices.items()}
    assert sum(any(part in name for part in names) for name in found[1.0]) > 1
    for name, moved in found[1.0].items():
        is_faster = any(part in name for part in names)
        assert found[4.0][name] == pytest.approx(moved * (4.0 if is_faster else 1.0), rel=1e-4, abs=1e-7)


def test_the_time_projection_moves_its_output_at_the_rate_of_a_vector(model):
    """Its matrix goes at 1 / dim of the rate unless another factor is set; its bias at the full rate."""
    for setting, factor in ((None, 1.0 / 16), (0.25, 0.25)):
        settings = {"time_embedding__dim": 16, "time_embedding__rate_factor": setting}
        trainer = make_trainer(model, **settings, training__weight_decay=0.0)
        metrics = trainer.train_step(make_batch())
        for name, rate in (("weight", factor), ("bias", 1.0)):
            moved = np.abs(trainer.parameters.views[f"time_embedding.{name}"])
            # the first step of AdamW is the rate, but for entries whose gradient is of the size of epsilon
            assert np.median(moved) == pytest.approx(metrics.learning_rate * rate, rel=1e-3)


# -- all together --------------------------------------------------------------------------------------

ALL = {
    "training__ar_loss_share": 0.25,
    "training__distillation_weight": 0.5,
    "training__loss_weighting": "nelbo",
    "noise_schedule__masking": "exact",
    "noise_schedule__complementary": True,
    "block_diffusion__enabled": True,
    "block_diffusion__initial_size": 3,
    "mask_annealing__mask": "bernoulli",
    "time_embedding__dropout": 0.5,
}


def test_with_every_term_the_split_into_micro_batches_changes_only_rounding(model):
    batch = packed_batch()
    whole, parts = (make_trainer(model, **ALL, training__batch_size=size) for size in (8, 1))
    for _ in range(3):
        one, other = whole.train_step(batch), parts.train_step(batch)
        # float32 sums in another order, through three steps of an optimizer that divides by their size
        for name in ("loss", "ar_loss", "distillation_loss"):
            assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-3)
        assert one.grad_norm == pytest.approx(other.grad_norm, rel=1e-2)


def test_with_every_term_a_resumed_run_ends_with_the_same_bits_as_an_undisturbed_one(model, tmp_path):
    batches = [make_batch(seed=step) for step in range(6)]
    undisturbed, first, second = (make_trainer(model, **ALL) for _ in range(3))
    for batch in batches:
        undisturbed.train_step(batch)
    for batch in batches[:4]:
        first.train_step(batch)
    save_run(first, tmp_path)
    assert resume_run(second, tmp_path)
    for batch in batches[4:]:
        second.train_step(batch)
    assert (second.parameters.flat == undisturbed.parameters.flat).all()


# -- a frozen context ----------------------------------------------------------------------------------

FROZEN = {"model__context": "frozen"}


def test_scattered_masks_of_a_document_are_one_group_and_the_rest_stands(model):
    trainer = make_trainer(model, **FROZEN)
    noisy = trainer.corrupt(packed_batch())
    masked = noisy.noisy != noisy.clean
    assert (noisy.groups[masked] == noisy.document_ids[masked]).all()
    assert (noisy.groups[~masked] == NOTHING).all() and not noisy.in_blocks.any()
    plain = make_trainer(model).corrupt(packed_batch())
    assert (plain.noisy == noisy.noisy).all() and (plain.weights == noisy.weights).all()  # the same draw


def test_holes_are_groups_with_what_is_written_in_them(model):
    trainer = make_trainer(model, holes__share=1.0, holes__longest=6, holes__most=1, **FROZEN)
    n_written = 0
    for step in range(20):
        trainer.step_count = step
        noisy = trainer.corrupt(packed_batch())
        masked = noisy.noisy != noisy.clean
        in_hole = noisy.groups != NOTHING
        assert (masked <= in_hole).all() and masked.any(axis=1).all() and (in_hole.sum(axis=1) <= 6).all()
        assert noisy.weights[masked] == pytest.approx(1 / masked.sum())
        n_written += int((in_hole & ~masked).sum())
    assert n_written > 0


def test_several_draws_of_a_sequence_with_holes_have_its_holes_and_other_masks(model):
    more = {"holes__share": 0.5, "holes__longest": 6, "holes__draws": 3, **FROZEN}
    trainer, batch = make_trainer(model, **more), make_batch(n=40)
    noisy = trainer.corrupt(batch)
    n_holes = int(noisy.repeats.sum()) // 2
    assert 5 < n_holes < 35 and len(noisy.clean) == 40 + 2 * n_holes
    assert (noisy.clean[~noisy.repeats] == batch.tokens).all()
    assert noisy.n_tokens == batch.tokens.size
    once = make_trainer(model, **{**more, "holes__draws": 1}).corrupt(batch)
    for again in np.flatnonzero(noisy.repeats):
        assert (noisy.clean[again] == noisy.clean[again - 1]).all()
        assert (noisy.groups[again] == noisy.groups[again - 1]).all()
        assert noisy.t[again] != noisy.t[again - 1]
    masked = noisy.noisy != noisy.clean
    assert any((masked[again] != masked[again - 1]).any() for again in np.flatnonzero(noisy.repeats))
    assert noisy.weights.sum() == pytest.approx(1.0)
    starts = np.flatnonzero(~noisy.repeats)
    is_hole = np.append(noisy.repeats[1:], False)[starts]
    assert (noisy.groups[starts][is_hole] == once.groups[is_hole]).all()  # the same holes as with one draw
    assert once.repeats.sum() == 0 and len(once.clean) == 40


def test_holes_with_an_adapted_context_are_masks_in_a_row(model):
    trainer = make_trainer(
        model, holes__share=1.0, holes__longest=3, holes__most=1, noise_schedule__min_time=0.999
    )
    noisy = trainer.corrupt(make_batch(n=40))
    assert noisy.groups is None
    counts = (noisy.noisy != noisy.clean).sum(axis=1)
    assert set(counts.tolist()) == {1, 2, 3}


def test_all_blocks_of_a_sequence_are_trained_at_once(model):
    trainer = make_trainer(
        model,
        block_diffusion__enabled=True,
        block_diffusion__initial_size=3,
        block_diffusion__final_size=3,
        **FROZEN,
    )
    noisy = trainer.corrupt(make_batch())
    assert noisy.in_blocks.all()
    assert noisy.groups.tolist() == [[NOTHING] + [i // 3 for i in range(11)]] * 4
    assert (noisy.lengths == 12).all()  # nothing is cut off


def test_complementary_masks_of_holes_cover_each_hole_once(model):
    trainer = make_trainer(
        model, holes__share=1.0, holes__most=1, noise_schedule__complementary=True, **FROZEN
    )
    noisy = trainer.corrupt(make_batch())
    one, other = (noisy.weights[half] != 0 for half in (slice(0, 4), slice(4, 8)))
    in_hole = noisy.groups != NOTHING
    assert (in_hole[:4] == in_hole[4:]).all()
    assert (one ^ other)[in_hole[:4]].all() and not (one | other)[~in_hole[:4]].any()


@pytest.mark.parametrize("prediction", ["shifted", "aligned"])
@pytest.mark.parametrize(
    ("kind", "margin"), [("scattered", 0), ("scattered", 2), ("holes", 0), ("holes", 2), ("blocks", 2)]
)
def test_a_step_with_a_frozen_context_has_the_loss_and_gradients_of_the_definition(
    tiny_model, kind, margin, prediction
):
    """Every noisy row as the oracle computes it, with all rows of both kinds in one pass."""
    changes = {
        "scattered": {},
        "holes": {"holes__share": 1.0, "holes__longest": 5, "holes__most": 2},
        "blocks": {
            "block_diffusion__enabled": True,
            "block_diffusion__initial_size": 3,
            "block_diffusion__final_size": 3,
        },
    }[kind]
    path = tiny_model(L=1, C=32, H=2, G=1, F=32)
    reference = oracle.load_model(path)
    with Q4Model.from_gguf(path, 1) as model:
        trainer = make_trainer(model, model__prediction=prediction, model__margin=margin, **changes, **FROZEN)
        rng = np.random.default_rng(4)
        # With twice as much the time offset is so large that float32 loses a digit.
        trainer.parameters.flat[...] = rng.normal(size=trainer.parameters.flat.shape) * 0.05
        noisy = trainer.corrupt(packed_batch())
        loss, gradients = trainer.gradients_of(noisy, 0.3)
    expected, expected_gradients = frozen_oracle(reference, trainer, noisy, 0.3)
    assert loss == pytest.approx(expected, rel=1e-5)
    errors = relative_errors(gradients, expected_gradients)
    assert max(errors.values()) < 1e-4, errors  # float32, as in tests/engine/test_gradients.py


def frozen_oracle(reference, trainer, noisy, ratio):
    """Loss and gradients of a whole draw in float64; sequences share what is trained."""
    rule = trainer.config.qlora
    features = oracle.time_features(noisy.t, 8, rule.time_embedding.max_timesteps)
    parameters = {name: np.asarray(value, np.float64) for name, value in trainer.parameters.views.items()}

    def total(values):
        result = 0.0
        for b, n in enumerate(noisy.lengths):
            in_blocks = bool(noisy.in_blocks[b])
            offset = anp.dot(values["time_embedding.weight"], features[b]) + values["time_embedding.bias"]
            offset = offset * float(noisy.keeps_time[b])
            lists = [
                array[b, :n].tolist()
                for array in (noisy.clean, noisy.noisy, noisy.groups, noisy.document_ids)
            ]
            mask, margin = trainer.mask_token_id, rule.margin
            rows = sorted(expected_rows(*lists, rule.prediction, in_blocks, mask, margin))
            stands = [i for i in range(n) if in_blocks or noisy.groups[b, i] == NOTHING]
            result = result + sequence_loss(values, b, rows, stands, offset)
        return result

    def sequence_loss(values, b, rows, stands, offset):
        documents = noisy.document_ids[b]
        start = {d: int(np.argmax(documents == d)) for d in set(documents.tolist())}
        used = [i for i, row in enumerate(rows) if row[3] != NOTHING]
        at = np.array([i - start[documents[i]] for i in stands] + [row[1] for row in rows])
        n = len(stands)
        w = np.zeros((len(at), len(at)))
        for i, one in enumerate(stands):
            for j, other in enumerate(stands):
                w[i, j] = documents[one] == documents[other] and other <= one
        for i, row in enumerate(rows):
            members = np.flatnonzero(noisy.groups[b] == row[0])
            document, limit = documents[members[0]], members[0] if noisy.in_blocks[b] else 99
            for j, other in enumerate(stands):
                if documents[other] == document and other < limit and at[j] != row[1]:
                    w[n + i, j] = 1.0 - ratio if at[j] > row[1] else 1.0
            for j, other in enumerate(rows):
                if other[0] == row[0]:
                    w[n + i, n + j] = 1.0 - ratio if other[1] > row[1] else 1.0
        adapter = oracle.Adapter(
            values, rule.alpha, trainer.mask_token_id, (np.arange(len(at)) >= n).astype(np.float64)[:, None]
        )
        standing = oracle.embeddings(reference, oracle.EMPTY_ADAPTER, noisy.clean[b, stands])
        own = oracle.embeddings(reference, adapter, np.array([row[2] for row in rows]), offset)
        logits = oracle.sequence_logits(reference, adapter, anp.concatenate([standing, own]), w, at)
        targets = [rows[i][3] for i in used]
        losses = oracle.row_losses(
            logits[[n + i for i in used]], noisy.clean[b, targets], trainer.mask_token_id
        )
        return anp.sum(noisy.weights[b, targets].astype(np.float64) * losses)

    return float(total(parameters)), autograd.grad(total)(parameters)
