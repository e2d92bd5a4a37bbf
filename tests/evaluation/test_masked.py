"""Arms on the same masks, and the three forms of future-context gain, against direct computations."""

from dataclasses import replace

import numpy as np
import pytest
from planted import PlantedEngine, batch_of, planted_model

from ggml_diffusion.engine.cpu.q4_model import Q4Model
from ggml_diffusion.engine.interface import Batch
from ggml_diffusion.evaluation.masked import (
    MASKED_SHARES,
    compare_arms,
    random_masks,
    right_masked_losses,
)
from ggml_diffusion.evaluation.scoring import scorable, score_base, score_masked
from ggml_diffusion.formats.lora import LoraAdapter
from ggml_diffusion.generation.diffusion_model import DiffusionModel

V, MASK = 11, 0


def two_sided(tokens, causal_ratio, has_adapter):
    """Each place predicts the next token; it is surer the more unmasked tokens it sees, right ones too."""
    n_visible = np.array(
        [
            (tokens[: i + 1] != MASK).sum() + (0 if causal_ratio == 1.0 else (tokens[i + 1 :] != MASK).sum())
            for i in range(len(tokens))
        ]
    )
    return np.where(np.arange(V) == 5, 0.3 * n_visible[:, None], 0.0)


def loss_with(n_visible):
    """Cross-entropy of token 5 under `two_sided`, the mask token being out of the question."""
    return -np.log(np.exp(0.3 * n_visible) / (np.exp(0.3 * n_visible) + V - 2))


def compare(held_out, control=None, **more):
    engine = PlantedEngine(V, two_sided)
    model = planted_model(engine, MASK)
    may_mask = scorable(held_out, None, MASK)
    arms = {"converted": (model, 0.0), "converted_causal": (model, 1.0), "step_0": (model.untrained(), 0.0)}
    if control is not None:
        arms["control"] = (control, 1.0)
    base = score_base(engine, held_out, may_mask, 4)
    options = {"n_seeds": 3, "n_one_by_one": 5, "seed": 0, "batch_size": 3, **more}
    return compare_arms(arms, base, held_out, may_mask, **options), may_mask


def test_every_figure_is_the_mean_over_the_masks_of_all_seeds():
    held_out = batch_of(np.full((5, 12), 5))
    comparisons, may_mask = compare(held_out)
    assert [one.share for one in comparisons] == list(MASKED_SHARES)
    for one in comparisons:
        visible, hidden, base = [], [], []
        for repeat in range(3):
            masked = random_masks(may_mask, one.share, 0, repeat)
            for b, i in zip(*np.nonzero(masked), strict=True):
                noisy = np.where(masked[b], MASK, 5)
                visible.append(loss_with((noisy != MASK).sum()))
                hidden.append(loss_with((noisy[:i] != MASK).sum()))
                # the base is not told that the mask token is no text
                base.append(-np.log(np.exp(0.3 * i) / (np.exp(0.3 * i) + V - 1)))
        assert one.arms["converted"].cross_entropy.n == len(visible)
        assert one.arms["converted"].cross_entropy.value == pytest.approx(np.mean(visible), rel=1e-5)
        assert one.arms["converted_causal"].cross_entropy.value == pytest.approx(np.mean(hidden), rel=1e-5)
        assert one.arms["base"].cross_entropy.value == pytest.approx(np.mean(base), rel=1e-5)
        assert one.gain["a"].value == pytest.approx(np.mean(hidden) - np.mean(visible), rel=1e-4)
        assert one.gain["a"].low > 0
        assert one.arms["converted"].accuracy.value == 1.0
        assert len(one.arms["converted"].by_seed) == 3


def test_form_b_masks_every_token_to_the_right_and_leaves_the_left_as_it_was():
    held_out = batch_of(np.full((2, 9), 5), document_ids=[[0] * 9, [0] * 5 + [1] * 4])
    may_mask = scorable(held_out, None, MASK)
    masked = random_masks(may_mask, 0.5, 1, 0)
    sequence, position = np.nonzero(masked)
    model = planted_model(PlantedEngine(V, two_sided), MASK)
    losses = right_masked_losses(model, held_out, masked, may_mask, (sequence, position), 2)
    for loss, b, i in zip(losses, sequence, position, strict=True):
        start = 5 if b == 1 and i >= 5 else 0
        n_left = int((~masked[b, start:i]).sum())
        assert loss == pytest.approx(loss_with(n_left), rel=1e-5)


def test_form_b_is_measured_on_a_subsample_against_the_same_tokens():
    held_out = batch_of(np.full((4, 20), 5))
    whole, _ = compare(held_out, n_one_by_one=1000, n_seeds=1)
    some, _ = compare(held_out, n_one_by_one=7, n_seeds=1)
    for all_of_them, few in zip(whole, some, strict=True):
        assert few.gain["b"].n == 7
        assert all_of_them.gain["b"].n == all_of_them.arms["converted"].cross_entropy.n
        # The planted model counts tokens: hiding right ones by either means is the same to it.
        assert all_of_them.gain["b"].value == pytest.approx(all_of_them.gain["a"].value, rel=1e-4)
    none, _ = compare(held_out, n_one_by_one=0)
    assert "b" not in none[0].gain


def test_form_c_is_the_control_at_causal_ratio_1_minus_the_conversion():
    held_out = batch_of(np.full((5, 12), 5))
    constant = PlantedEngine(V, lambda tokens, ratio, on: np.full((len(tokens), V), 1.0 * (ratio == 1.0)))
    comparisons, _ = compare(held_out, control=planted_model(constant, MASK, causal_ratio=1.0))
    for one in comparisons:
        assert one.arms["control"].cross_entropy.value == pytest.approx(np.log(V - 1), rel=1e-6)
        assert one.gain["c"].value == pytest.approx(
            np.log(V - 1) - one.arms["converted"].cross_entropy.value, rel=1e-5
        )


def test_masks_depend_on_the_seed_only_and_grow_with_the_share():
    may_mask = np.ones((3, 200), bool)
    few, many = (random_masks(may_mask, share, 4, 0) for share in (0.15, 0.85))
    assert (few <= many).all()
    assert few.mean() == pytest.approx(0.15, abs=5 * np.sqrt(0.15 * 0.85 / 600))
    assert (few == random_masks(may_mask, 0.15, 4, 0)).all()
    assert (few != random_masks(may_mask, 0.15, 4, 1)).any()
    assert (few != random_masks(may_mask, 0.15, 5, 0)).any()


def test_both_predictions_are_asked_for_the_same_tokens():
    held_out = batch_of([[5, 6, 7, 8]], document_ids=[[0, 0, 1, 1]])
    seen = []

    def rows(tokens, causal_ratio, has_adapter):
        seen.append(tokens.tolist())
        return np.zeros((len(tokens), V))

    for prediction in ("shifted", "aligned"):
        model = planted_model(PlantedEngine(V, rows), MASK, prediction)
        masked = np.array([[False, True, False, True]])
        scores = score_masked(model, held_out, masked, np.array([1.0]), 0.0, 1)
        assert (scores.loss > 0).tolist() == masked.tolist()
    assert seen == [[5, MASK], [7, MASK]] * 2


@pytest.mark.parametrize("prediction", ["shifted", "aligned"])
def test_losses_by_token_are_what_full_logits_of_the_engine_say(tiny_model, prediction):
    rng = np.random.default_rng(0)
    held_out = batch_of(rng.integers(20, 300, (3, 10)), [10, 7, 10], [[0] * 10, [0] * 10, [0] * 4 + [1] * 6])
    with Q4Model.from_gguf(tiny_model(L=1, C=32, H=2, G=1, F=32), 1, compute="f32") as engine:
        model = planted_model(engine, 3, prediction)
        model.adapter = LoraAdapter(
            4.0,
            {
                "blk.0.attn_q.weight.lora_a": rng.normal(size=(2, 32)).astype(np.float32),
                "blk.0.attn_q.weight.lora_b": rng.normal(size=(32, 2)).astype(np.float32),
            },
            3,
            rng.normal(size=32).astype(np.float32),
        )
        masked = random_masks(scorable(held_out, None, 3), 0.5, 0, 0)
        scores = score_masked(model, held_out, masked, np.full(3, 0.5), 0.25, 2)
        logits = engine.logits(
            Batch(
                np.where(masked, 3, held_out.tokens),
                0.25,
                lengths=held_out.lengths,
                document_ids=held_out.document_ids,
            ),
            model.adapter,
        ).astype(np.float64)
    logits[..., 3] = -np.inf
    for b, i in zip(*np.nonzero(masked), strict=True):
        row = logits[b, i - 1 if prediction == "shifted" else i]
        expected = np.log(np.exp(row).sum()) - row[held_out.tokens[b, i]]
        # the engine's row losses and its logits are float32 sums in different orders
        assert scores.loss[b, i] == pytest.approx(expected, rel=1e-4)
        assert scores.correct[b, i] == (row.argmax() == held_out.tokens[b, i])
    assert (scores.loss[~masked] == 0).all()


def test_step_0_has_no_pair_and_no_mask_embedding():
    model = planted_model(PlantedEngine(V, two_sided), MASK, causal_ratio=0.25)
    before = model.untrained()
    assert isinstance(before, DiffusionModel)
    assert before.adapter.tensors == {}
    assert before.adapter.mask_embedding is None
    assert before.adapter.mask_token_id == MASK
    assert before.rule.causal_ratio == 0.25


@pytest.mark.parametrize("prediction", ["aligned", "shifted"])
def test_with_a_frozen_context_the_masks_of_a_document_are_predicted_together(tiny_model, prediction):
    """Document by document, as `DiffusionModel.logits` has it."""
    rng = np.random.default_rng(0)
    held_out = batch_of(rng.integers(20, 300, (3, 10)), [10, 7, 10], [[0] * 10, [0] * 10, [0] * 4 + [1] * 6])
    with Q4Model.from_gguf(tiny_model(L=1, C=32, H=2, G=1, F=32), 1, compute="f32") as engine:
        model = planted_model(engine, 3, prediction)
        model.rule = replace(model.rule, context="frozen", causal_ratio=0.25)
        model.adapter = LoraAdapter(
            4.0,
            {
                "blk.0.attn_q.weight.lora_a": rng.normal(size=(2, 32)).astype(np.float32),
                "blk.0.attn_q.weight.lora_b": rng.normal(size=(32, 2)).astype(np.float32),
            },
            3,
            rng.normal(size=32).astype(np.float32),
        )
        masked = random_masks(scorable(held_out, None, 3), 0.5, 0, 0)
        masked[1] = False  # a sequence without a row
        scores = score_masked(model, held_out, masked, np.full(3, 0.5), 0.25, 2)
        noisy = np.where(masked, 3, held_out.tokens)
        for b, start, end in ((0, 0, 10), (2, 0, 4), (2, 4, 10)):
            logits = model.logits(noisy[b, start:end], 0.5).astype(np.float64)
            for i in np.flatnonzero(masked[b, start:end]):
                row = logits[i - 1 if prediction == "shifted" else i]
                target = held_out.tokens[b, start + i]
                expected = np.log(np.exp(row).sum()) - row[target]
                assert scores.loss[b, start + i] == pytest.approx(expected, rel=1e-4)
                assert scores.correct[b, start + i] == (row.argmax() == target)
    assert (scores.loss[~masked] == 0).all()
