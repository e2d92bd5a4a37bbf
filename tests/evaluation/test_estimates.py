"""Ratios of sums over sequences and their bootstrap intervals."""

import numpy as np
import pytest

from ggml_diffusion.evaluation.estimates import estimate_ratio, exponential


def test_the_value_is_the_ratio_of_the_sums_and_not_the_mean_of_the_ratios():
    estimate = estimate_ratio([10.0, 1.0], [5, 1])
    assert estimate.value == pytest.approx(11 / 6)
    assert estimate.n == 6


def test_intervals_cover_the_truth_as_often_as_they_say():
    # Sequences of different length, tokens that share a sequence's difficulty: what the figures look like.
    rng = np.random.default_rng(0)
    n_trials, covered = 400, 0
    for _ in range(n_trials):
        counts = rng.integers(20, 128, 60)
        totals = counts * (3.0 + 0.5 * rng.normal(size=60)) + np.sqrt(counts) * rng.normal(size=60)
        estimate = estimate_ratio(totals, counts)
        covered += estimate.low <= 3.0 <= estimate.high
    # 95% with 60 sequences: a little less for the percentile interval; 3 standard errors are 3.3%
    assert 0.91 <= covered / n_trials <= 0.985


def test_the_standard_error_of_equal_counts_is_that_of_a_mean():
    rng = np.random.default_rng(1)
    totals = rng.normal(size=200)
    estimate = estimate_ratio(totals, np.ones(200, int))
    # 2000 resamples know it to about 1/sqrt(4000) = 1.6%
    assert estimate.standard_error == pytest.approx(totals.std() / np.sqrt(200), rel=0.07)


def test_sequences_with_nothing_to_count_have_no_part():
    assert estimate_ratio([1.0, 7.0, 2.0], [1, 0, 1]) == estimate_ratio([1.0, 2.0], [1, 1])


def test_one_sequence_has_a_value_and_no_interval_and_none_has_nothing():
    one = estimate_ratio([6.0], [3])
    assert one.value == 2.0
    assert np.isnan([one.low, one.high, one.standard_error]).all()
    none = estimate_ratio([0.0], [0])
    assert none.n == 0
    assert np.isnan(none.value)


def test_equal_figures_have_an_interval_of_no_width():
    estimate = estimate_ratio(np.full(5, 2.5), np.ones(5, int))
    assert (estimate.low, estimate.value, estimate.high) == (2.5, 2.5, 2.5)


def test_the_same_figures_give_the_same_interval():
    values = np.random.default_rng(2).normal(size=9)
    assert estimate_ratio(values, np.ones(9, int)) == estimate_ratio(values, np.ones(9, int))


def test_a_perplexity_is_the_exponential_with_its_ends():
    nats = estimate_ratio([1.0, 2.0, 3.0], [1, 1, 1])
    perplexity = exponential(nats)
    assert perplexity.value == pytest.approx(np.exp(2.0))
    assert perplexity.low == pytest.approx(np.exp(nats.low))
    assert perplexity.high == pytest.approx(np.exp(nats.high))
    assert perplexity.standard_error == pytest.approx(np.exp(2.0) * nats.standard_error)
