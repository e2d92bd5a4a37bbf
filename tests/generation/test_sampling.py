"""The sampler's arithmetic against direct computations: counts, draws, scores."""

import warnings

import numpy as np
import pytest

from ggml_diffusion.generation.sampling import (
    RevealOrder,
    block_steps,
    draw,
    highest,
    log_softmax,
    propose,
    reveal_counts,
    score,
)


def linear(t):
    return np.asarray(t, dtype=np.float64)


def cosine(t):
    return 1.0 - np.cos(0.5 * np.pi * np.asarray(t, dtype=np.float64))


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("schedule", [linear, cosine])
@pytest.mark.parametrize("n_masks", [0, 1, 2, 7, 64, 1000])
@pytest.mark.parametrize("n_steps", [1, 2, 3, 64, 999])
def test_reveal_counts_are_never_negative_and_add_up_to_the_masks(schedule, n_masks, n_steps):
    counts = reveal_counts(n_masks, n_steps, schedule)
    assert len(counts) == n_steps
    assert (counts >= 0).all()
    assert counts.sum() == n_masks


def test_one_step_reveals_everything():
    assert reveal_counts(17, 1, cosine).tolist() == [17]


def test_a_linear_schedule_reveals_the_same_count_in_every_step():
    assert reveal_counts(64, 16, linear).tolist() == [4] * 16


def test_masks_left_after_each_step_follow_the_schedule_to_within_half_a_token():
    n_masks, n_steps = 500, 40
    left = n_masks - np.cumsum(reveal_counts(n_masks, n_steps, cosine))
    expected = [n_masks * (1 - np.cos(np.pi / 2 * (1 - (k + 1) / n_steps))) for k in range(n_steps)]
    assert np.abs(left - expected).max() <= 0.5


def test_no_step_at_all_is_refused():
    with pytest.raises(ValueError, match="at least one step"):
        reveal_counts(3, 0, linear)


def test_steps_are_shared_out_by_masks_and_every_block_gets_one():
    assert block_steps([8, 8, 8, 8], 16) == [4, 4, 4, 4]
    assert block_steps([30, 2], 16) == [15, 1]
    assert block_steps([1, 1, 1], 1) == [1, 1, 1]
    for sizes in ([1, 100, 1], [5] * 7, [3]):
        for n_steps in (len(sizes), 10, 33):
            shares = block_steps(sizes, n_steps)
            assert min(shares) >= 1
            assert sum(shares) == n_steps


def test_log_softmax_keeps_impossible_tokens_impossible():
    result = log_softmax(np.array([[0.0, np.log(3.0), -np.inf]], dtype=np.float32))
    assert np.exp(result)[0] == pytest.approx([0.25, 0.75, 0.0], abs=1e-7)  # float32 input


def test_temperature_zero_takes_the_likeliest_token():
    log_p = log_softmax(rng().normal(size=(20, 50)).astype(np.float32))
    drawn = draw(log_p, rng(), temperature=0.0, top_k=0, top_p=1.0)
    assert (drawn == log_p.argmax(axis=1)).all()


@pytest.mark.parametrize("temperature", [1e-300, 1e-310, 5e-324])
@pytest.mark.parametrize("top_p", [0.9, 1.0])
def test_a_temperature_at_the_edge_of_numbers_takes_the_likeliest_token(temperature, top_p):
    log_p = np.log(np.array([[0.2, 0.5, 0.3], [0.1, 0.1, 0.8]]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        drawn = draw(log_p, rng(), temperature=temperature, top_k=0, top_p=top_p)
    assert drawn.tolist() == [1, 2]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_tempered_distribution(temperature):
    log_p = np.log(np.array([0.5, 0.3, 0.15, 0.05]))
    expected = np.exp(log_p / temperature) / np.exp(log_p / temperature).sum()
    n = 40_000
    drawn = draw(np.tile(log_p, (n, 1)), rng(), temperature=temperature, top_k=0, top_p=1.0)
    share = np.bincount(drawn, minlength=4) / n
    assert np.abs(share - expected).max() < 5 * 0.5 / np.sqrt(n)  # five standard errors of a share


def test_top_k_draws_from_the_k_likeliest_only():
    log_p = np.tile(log_softmax(rng().normal(size=(1, 30)).astype(np.float32)), (2000, 1))
    drawn = draw(log_p, rng(), temperature=1.0, top_k=3, top_p=1.0)
    assert set(drawn) == set(np.argsort(-log_p[0])[:3])


def test_top_p_draws_from_the_smallest_set_that_holds_the_mass():
    log_p = np.tile(np.log([0.1, 0.4, 0.05, 0.3, 0.15]), (3000, 1))
    assert set(draw(log_p, rng(), temperature=1.0, top_k=0, top_p=0.6)) == {1, 3}
    assert set(draw(log_p, rng(), temperature=1.0, top_k=0, top_p=0.75)) == {1, 3, 4}
    assert set(draw(log_p, rng(), temperature=1.0, top_k=0, top_p=1e-6)) == {1}


def test_an_impossible_token_is_never_drawn_whatever_the_temperature():
    log_p = log_softmax(np.tile(np.array([0.0, -np.inf, 0.0], dtype=np.float32), (5000, 1)))
    for temperature in (0.0, 1.0, 100.0):
        assert 1 not in draw(log_p, rng(), temperature=temperature, top_k=0, top_p=1.0)


def test_scores_are_what_their_names_say():
    p = np.array([[0.5, 0.3, 0.2, 0.0], [0.1, 0.1, 0.7, 0.1]])
    with np.errstate(divide="ignore"):
        log_p = np.log(p)
    tokens = np.array([1, 2], dtype=np.int32)
    assert score(log_p, tokens, RevealOrder.CONFIDENCE, rng()) == pytest.approx([0.3, 0.7])
    assert score(log_p, tokens, RevealOrder.THRESHOLD, rng()) == pytest.approx([0.3, 0.7])
    assert score(log_p, tokens, RevealOrder.MARGIN, rng()) == pytest.approx([0.2, 0.6])
    entropies = [-sum(q * np.log(q) for q in row if q > 0) for row in p]
    assert score(log_p, tokens, RevealOrder.ENTROPY, rng()) == pytest.approx([-e for e in entropies])


def test_confidence_does_not_see_temperature_truncation_or_noise():
    logits = rng().normal(size=(40, 25)).astype(np.float32)
    tokens, scores = propose(logits, RevealOrder.CONFIDENCE, rng(1), temperature=3.0, top_k=10, top_p=0.9)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(axis=1, keepdims=True)
    assert scores == pytest.approx(p[np.arange(40), tokens])


def test_the_same_seed_proposes_the_same_tokens():
    logits = rng().normal(size=(70, 25)).astype(np.float32)
    first, _ = propose(logits, RevealOrder.RANDOM, rng(3))
    second, _ = propose(logits, RevealOrder.RANDOM, rng(3))
    other, _ = propose(logits, RevealOrder.RANDOM, rng(4))
    assert (first == second).all()
    assert (first != other).any()


def test_of_equal_scores_the_first_come_first():
    assert highest(np.array([1.0, 2.0, 2.0, 0.0]), 2).tolist() == [1, 2]
