"""The NELBO against enumeration of all masks, and what stands beside it against direct formulas."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
from planted import PlantedEngine, batch_of, planted_model

from ggml_diffusion.engine.cpu.q4_model import Q4Model
from ggml_diffusion.engine.interface import Batch
from ggml_diffusion.evaluation.likelihood import (
    exact_count_masks,
    likelihood,
    nelbo_totals,
    unigram_losses,
)
from ggml_diffusion.evaluation.scoring import scorable, score_base

V = 12


def planted_rows(tokens, causal_ratio, has_adapter):
    """Logits that depend on everything in sight, in no simple way."""
    position = np.arange(len(tokens))[:, None]
    seen = np.sum(np.cos(tokens * (1 + np.arange(len(tokens)))))
    return np.sin(position * 1.7 + np.arange(V) * (2.3 + seen))


def losses_of_masks(engine, model, sequence):
    """mask (as a tuple of positions) -> sum of cross-entropies of its tokens, for every mask of 1..T-1."""
    result = {}
    positions = range(1, len(sequence))
    for k in range(1, len(sequence)):
        for mask in itertools.combinations(positions, k):
            noisy = sequence.copy()
            noisy[list(mask)] = model.mask_token_id
            logits = engine.logits(Batch(noisy[None], model.rule.causal_ratio), model.adapter)[0].astype(
                np.float64
            )
            logits[:, model.mask_token_id] = -np.inf
            log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            result[mask] = -sum(log_p[i - 1, sequence[i]] for i in mask)
    return result


def exact_nelbo(losses, n_maskable):
    """L * mean over k of the mean over masks of k tokens of (sum of cross-entropies) / k."""
    by_count = {k: [] for k in range(1, n_maskable + 1)}
    for mask, loss in losses.items():
        by_count[len(mask)].append(loss / len(mask))
    return n_maskable * np.mean([np.mean(values) for values in by_count.values()])


def continuous_nelbo(losses, n_maskable):
    """The integral over t of the sum over masks of p(mask) * loss / t: a polynomial, exact by Gauss."""
    nodes, weights = np.polynomial.legendre.leggauss(12)
    t = 0.5 * (nodes + 1)
    return sum(
        float((0.5 * weights * t ** (len(mask) - 1) * (1 - t) ** (n_maskable - len(mask))).sum()) * loss
        for mask, loss in losses.items()
    )


@pytest.mark.parametrize("kind", ["planted", "tiny"])
def test_the_mean_estimate_is_the_nelbo_by_enumeration_of_all_masks(kind, tiny_model):
    sequence = np.array([5, 7, 2, 9, 4], np.int32)
    if kind == "planted":
        engine = PlantedEngine(V, planted_rows)
    else:
        engine = Q4Model.from_gguf(tiny_model(L=1, C=32, H=2, G=1, F=32), 1, compute="f32")
        sequence = sequence + 100
    model = planted_model(engine, mask_token_id=3 if kind == "tiny" else 0)
    losses = losses_of_masks(engine, model, sequence)
    expected = exact_nelbo(losses, 4)
    # exact counts and continuous time are the same bound
    assert continuous_nelbo(losses, 4) == pytest.approx(expected, rel=1e-10)
    held_out = batch_of(np.tile(sequence, (1500, 1)))
    may_mask = scorable(held_out, None, model.mask_token_id)
    totals = nelbo_totals(model, held_out, may_mask, n_seeds=2, seed=0, batch_size=500)
    assert totals.shape == (2, 1500)
    # Independent draws would have this standard error; spread counts have less of it.
    error = totals.std() / math.sqrt(totals.size)
    assert abs(totals.mean() - expected) < 4 * error
    assert error < 0.02 * expected  # or the comparison would say nothing


def test_a_model_that_is_equally_unsure_of_all_has_its_exact_likelihood_in_every_draw():
    engine = PlantedEngine(V, lambda tokens, ratio, has_adapter: np.zeros((len(tokens), V)))
    held_out = batch_of(np.full((6, 9), 4))
    may_mask = scorable(held_out, None, 0)
    totals = nelbo_totals(planted_model(engine), held_out, may_mask, n_seeds=3, seed=1, batch_size=4)
    # V - 1 tokens: the mask token cannot be drawn
    assert totals == pytest.approx(np.full((3, 6), 8 * math.log(V - 1)), rel=1e-6)


def test_counts_are_uniform_and_every_choice_is_equally_likely():
    may_mask = np.zeros((9000, 6), bool)
    may_mask[:, [1, 2, 4]] = True
    masked, n_masked = exact_count_masks(batch_of(np.ones((9000, 6))), may_mask, 0, np.random.default_rng(0))
    assert (masked.sum(1) == n_masked).all()
    assert not (masked & ~may_mask).any()
    counts = np.bincount(n_masked, minlength=4)
    assert counts[0] == 0
    assert np.abs(counts[1:] - 3000).max() <= 1  # spread evenly, not drawn
    singles = masked[n_masked == 1].sum(0)[[1, 2, 4]]
    assert np.abs(singles - 1000).max() < 5 * math.sqrt(1000 * 2 / 3)


def test_a_sequence_with_nothing_to_mask_has_no_part_in_the_bound():
    engine = PlantedEngine(V, planted_rows)
    held_out = batch_of([[5, 6, 7], [5, 6, 7]], lengths=[3, 1])
    may_mask = scorable(held_out, None, 0)
    totals = nelbo_totals(planted_model(engine), held_out, may_mask, n_seeds=1, seed=0, batch_size=2)
    assert totals[0, 1] == 0.0
    assert totals[0, 0] > 0.0


def test_the_batch_size_changes_nothing():
    engine = PlantedEngine(V, planted_rows)
    held_out = batch_of(np.random.default_rng(0).integers(1, V, (7, 6)))
    may_mask = scorable(held_out, None, 0)
    one, other = (
        nelbo_totals(planted_model(engine), held_out, may_mask, n_seeds=2, seed=3, batch_size=size)
        for size in (1, 7)
    )
    assert (one == other).all()


def test_the_unigram_loss_is_minus_the_log_of_the_smoothed_frequency():
    counts = np.array([3, 0, 5, 0])
    tokens = np.array([[0, 1, 2]])
    losses = unigram_losses(counts, tokens, np.array([[True, True, False]]))
    assert losses[0] == pytest.approx([-math.log(3.5 / 10), -math.log(0.5 / 10), 0.0])


def test_prompts_are_not_predicted():
    held_out = batch_of([[5, 6, 7, 8]])
    held_out = dataclasses.replace(held_out, maskable=np.array([[False, False, True, True]]))
    assert scorable(held_out, None, 0).tolist() == [[False, False, True, True]]


def test_likelihood_counts_tokens_bytes_and_seeds():
    figures = likelihood(np.array([[2.0, 4.0], [4.0, 6.0]]), np.array([2, 2]), np.array([4, 6]))
    assert figures.nats_per_token.value == pytest.approx(8.0 / 4)
    assert figures.bits_per_byte.value == pytest.approx(8.0 / math.log(2) / 10)
    assert figures.perplexity.value == pytest.approx(math.exp(2.0))
    assert figures.by_seed == pytest.approx([6 / 4, 10 / 4])
    assert np.mean(figures.by_seed) == pytest.approx(figures.nats_per_token.value)
    assert likelihood(np.array([2.0, 4.0]), np.array([2, 2]), np.array([4, 6])).by_seed == []


def test_the_base_is_scored_causally_without_the_adapter_on_the_same_tokens():
    def rows(tokens, causal_ratio, has_adapter):
        assert causal_ratio == 1.0
        assert not has_adapter
        return planted_rows(tokens, causal_ratio, has_adapter)

    engine = PlantedEngine(V, rows)
    held_out = batch_of([[5, 6, 7, 8, 2]], document_ids=[[0, 0, 0, 1, 1]])
    scored = scorable(held_out, None, 0)
    assert scored.tolist() == [[False, True, True, False, True]]
    scores = score_base(engine, held_out, scored, 1)
    for i in (1, 2, 4):
        start = 0 if i < 3 else 3
        logits = planted_rows(held_out.tokens[0, start : 3 if i < 3 else 5], 1.0, False)[i - 1 - start]
        log_p = logits - np.log(np.exp(logits).sum())
        assert scores.loss[0, i] == pytest.approx(-log_p[held_out.tokens[0, i]], rel=1e-5)
        assert scores.correct[0, i] == (logits.argmax() == held_out.tokens[0, i])
    assert (scores.loss[0, [0, 3]] == 0).all()
