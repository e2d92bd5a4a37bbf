"""Holes, the three ways to fill them, and the base's own continuations, on planted and tiny models."""

import dataclasses

import numpy as np
import pytest
from planted import PlantedEngine, batch_of, planted_model

from ggml_diffusion.engine.cpu.q4_model import Q4Model
from ggml_diffusion.engine.interface import Batch
from ggml_diffusion.evaluation.continuation import (
    continuation_losses,
    continue_greedily,
    continue_sampled,
)
from ggml_diffusion.evaluation.infilling import (
    MIN_CONTEXT,
    Hole,
    best_by_suffix,
    compare_infilling,
    cut_holes,
    fill_holes,
    infilling_tokens,
)

V, MASK = 40, 0


def counting(tokens, causal_ratio, has_adapter):
    """The conversion counts on from either side; the base, which sees the left, counts down."""
    logits = np.zeros((len(tokens), V))
    for i in range(len(tokens)):
        known = np.flatnonzero(tokens[: i + 1 if causal_ratio == 1.0 else None] != MASK)
        nearest = known[np.abs(known - i - 1).argmin()] if len(known) else 0
        step = 1 if has_adapter else -1
        logits[i, (tokens[nearest] + step * (i + 1 - nearest)) % V] = 9.0
    return logits


def holes_of(texts, start, length):
    return [Hole(b, np.asarray(text, np.int32), start, length) for b, text in enumerate(texts)]


def counted(n, first=1):
    return [np.arange(first, first + n, dtype=np.int32)]


# -- holes --------------------------------------------------------------------------------------------


def test_holes_lie_inside_of_one_document_with_context_on_both_sides():
    rng = np.random.default_rng(0)
    documents = [[0] * 25 + [1] * 35, [0] * 60, [0] * 30 + [1] * 30]
    held_out = batch_of(rng.integers(2, V, (3, 60)), [60, 40, 60], documents)
    for length in (1, 4, 8):
        holes = cut_holes(held_out, length, 5, MASK, seed=0)
        assert len(holes) == 15
        for hole in holes:
            assert hole.length == length == len(hole.answer)
            assert hole.start >= MIN_CONTEXT
            assert hole.start + length <= len(hole.text) - MIN_CONTEXT
            assert len(hole.text) in {25, 35, 40, 30}
            line = held_out.tokens[hole.sequence].tolist()
            assert any(
                line[start : start + len(hole.text)] == hole.text.tolist() for start in range(len(line))
            )
        assert {hole.sequence for hole in holes} == {0, 1, 2}


def test_every_place_can_be_a_hole_and_the_seed_decides():
    held_out = batch_of(np.arange(1, 21)[None])
    starts = [cut_holes(held_out, 1, 1, MASK, seed)[0].start for seed in range(60)]
    assert set(starts) == {8, 9, 10, 11}
    again = [cut_holes(held_out, 1, 1, MASK, seed)[0].start for seed in range(60)]
    assert starts == again


def test_texts_without_room_or_with_a_mask_token_of_their_own_give_no_hole():
    short = batch_of(np.arange(1, 17)[None])
    assert cut_holes(short, 1, 1, MASK, 0) == []
    with_mask = np.arange(1, 31)[None].copy()
    with_mask[0, 3] = MASK
    assert cut_holes(batch_of(with_mask), 1, 1, MASK, 0) == []


def test_no_prompt_is_cut():
    held_out = batch_of(np.arange(1, 31)[None])
    held_out = dataclasses.replace(held_out, maskable=np.arange(30)[None] >= 17)
    starts = {cut_holes(held_out, 4, 1, MASK, seed)[0].start for seed in range(20)}
    assert starts == {17, 18}


def test_a_filled_text_differs_in_the_hole_only():
    hole = Hole(0, np.arange(20, dtype=np.int32), 9, 2)
    assert hole.answer.tolist() == [9, 10]
    assert hole.filled(np.array([33, 34])).tolist() == [*range(9), 33, 34, *range(11, 20)]
    assert hole.text.tolist() == list(range(20))


# -- the base's continuations -----------------------------------------------------------------------------


def test_greedy_continuations_are_those_of_one_forward_pass_a_token(tiny_model):
    rng = np.random.default_rng(3)
    prefixes = [rng.integers(20, 300, n).astype(np.int32) for n in (1, 5, 9)]
    with Q4Model.from_gguf(tiny_model(L=1, C=32, H=2, G=1, F=32), 1, compute="f32") as engine:
        written = continue_greedily(engine, prefixes, 3, never=3)
        for prefix, tokens in zip(prefixes, written, strict=True):
            text = list(prefix)
            for _ in range(3):
                logits = engine.logits(Batch(np.array([text], np.int32)))[0, -1]
                logits[3] = -np.inf
                text.append(int(logits.argmax()))
            assert text[len(prefix) :] == tokens.tolist()


def test_samples_follow_the_bases_own_distribution_and_are_independent():
    probabilities = np.array([[0.0, 0.5, 0.3, 0.2], [0.0, 0.1, 0.1, 0.8]])

    def rows(tokens, causal_ratio, has_adapter):
        with np.errstate(divide="ignore"):
            return np.log(probabilities[(tokens == 3).astype(int)]) + 2.0

    n = 4000
    engine = PlantedEngine(4, rows)
    samples = continue_sampled(engine, [np.array([1])], 2, n, np.random.default_rng(0))[0]
    assert samples.shape == (n, 2)
    for first, p_first in ((1, 0.5), (2, 0.3), (3, 0.2)):
        for second in (1, 2, 3):
            expected = p_first * probabilities[int(first == 3), second]
            share = (samples == (first, second)).all(1).mean()
            assert share == pytest.approx(expected, abs=4.5 * np.sqrt(expected / n))
    # Equal beginnings share a forward pass: one for the first token, one for each of three then.
    assert engine.n_tokens == 1 + 3 * 2


def test_a_token_that_is_never_to_be_drawn_is_not_and_the_seed_decides():
    engine = PlantedEngine(6, lambda tokens, ratio, on: np.zeros((len(tokens), 6)))
    one, same, other = (
        continue_sampled(engine, [np.array([1])] * 2, 4, 50, np.random.default_rng(seed), never=2)
        for seed in (0, 0, 1)
    )
    assert (one == same).all()
    assert (one != other).any()
    assert set(np.unique(one)) == {0, 1, 3, 4, 5}


def test_losses_of_continuations_are_sums_from_their_start_on(tiny_model):
    rng = np.random.default_rng(4)
    texts = [rng.integers(20, 300, n).astype(np.int32) for n in (6, 11, 4)]
    starts = [1, 7, 3]
    with Q4Model.from_gguf(tiny_model(L=1, C=32, H=2, G=1, F=32), 1, compute="f32") as engine:
        losses = continuation_losses(engine, texts, starts, batch_size=2)
        for text, start, loss in zip(texts, starts, losses, strict=True):
            logits = engine.logits(Batch(text[None]))[0].astype(np.float64)
            log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            expected = -sum(log_p[i - 1, text[i]] for i in range(start, len(text)))
            assert loss == pytest.approx(expected, rel=1e-4)  # float32 sums in different orders


# -- the arms ------------------------------------------------------------------------------------------------


def test_the_conversion_fills_what_it_can_see_from_the_right():
    engine = PlantedEngine(V, counting)
    holes = holes_of(counted(24), 10, 4)
    filled = fill_holes(planted_model(engine, MASK), holes)
    assert filled.tolist() == [holes[0].answer.tolist()]


def test_the_best_candidate_is_the_one_after_which_the_right_side_is_likeliest():
    def rows(tokens, causal_ratio, has_adapter):
        """The next token is likely to be the one after the last; only the last token counts."""
        return np.where(np.arange(V) == (tokens[:, None] + 1) % V, 5.0, 0.0)

    holes = holes_of([*counted(24), *counted(24, first=7)], 10, 2)
    wrong, right_end = [1, 1], [30, 0]
    candidates = np.array([[wrong, [30, 12], wrong], [[30, 18], wrong, right_end]], np.int32)
    engine = PlantedEngine(V, rows)
    best = best_by_suffix(engine, holes, candidates, batch_size=2)
    # after 12 comes the right side's 13, after 18 the 19: what stands before that does not matter to it
    assert best.tolist() == [[30, 12], [30, 18]]
    assert engine.n_tokens == 5 * 24  # of the first hole two candidates are the same


def test_all_arms_are_scored_on_the_same_holes():
    engine = PlantedEngine(V, counting)
    holes = holes_of([*counted(24), *counted(24, first=5), *counted(24, first=9)], 10, 4)
    result = compare_infilling(planted_model(engine, MASK), holes, 4, seed=0, batch_size=2)
    assert (result.span_length, result.n_holes) == (4, 3)
    assert result.arms["converted"].exact_match.value == 1.0
    assert result.arms["converted"].token_accuracy.value == 1.0
    assert result.arms["left_only"].exact_match.value == 0.0
    assert result.arms["left_only"].token_accuracy.value == 0.0  # it counts down
    assert result.arms.keys() == {"converted", "left_only", "reranked"}
    assert result.arms["converted"].token_accuracy.n == 12
    assert result.advantage["left_only"].token_accuracy.value == 1.0


def test_the_advantage_is_the_difference_of_the_scores_paired_by_hole():
    rng = np.random.default_rng(0)

    def rows(tokens, causal_ratio, has_adapter):
        """Right about token 11 with the adapter on, about 12 with it off."""
        return np.where(np.arange(V) == (11 if has_adapter else 12), 9.0, 0.0)[None].repeat(len(tokens), 0)

    holes = holes_of(rng.choice([11, 12], (30, 24)), 10, 4)
    result = compare_infilling(planted_model(PlantedEngine(V, rows), MASK), holes, 2, seed=0, batch_size=9)
    for name in ("left_only", "reranked"):
        for figure in ("exact_match", "token_accuracy"):
            ours, theirs, difference = (
                getattr(each, figure)
                for each in (result.arms["converted"], result.arms[name], result.advantage[name])
            )
            assert difference.value == pytest.approx(ours.value - theirs.value)
            assert difference.low <= difference.value <= difference.high


def test_parts_that_are_right_count_as_parts():
    def rows(tokens, causal_ratio, has_adapter):
        return np.where(np.arange(V) == 11, 9.0, 0.0)[None].repeat(len(tokens), 0)

    holes = holes_of(counted(24), 10, 4)  # 11, 12, 13, 14
    result = compare_infilling(planted_model(PlantedEngine(V, rows), MASK), holes, 2, seed=0, batch_size=2)
    assert result.arms["converted"].token_accuracy.value == 0.25
    assert result.arms["converted"].exact_match.value == 0.0


def test_the_cost_is_never_more_than_was_said():
    rng = np.random.default_rng(0)
    engine = PlantedEngine(V, lambda tokens, ratio, on: np.zeros((len(tokens), V)))
    holes = cut_holes(batch_of(rng.integers(1, V, (3, 40))), 4, 2, MASK, 0)
    told = []
    compare_infilling(planted_model(engine, MASK), holes, 3, seed=0, batch_size=2, on_tokens=told.append)
    assert sum(told) == engine.n_tokens <= infilling_tokens(holes, 3)
    assert engine.n_tokens > 0.8 * infilling_tokens(holes, 3)  # few samples of so flat a base are equal
