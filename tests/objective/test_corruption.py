"""The forward process: schedules against finite differences, rates and weights against their expectation."""

import math

import numpy as np
import pytest

from ggml_diffusion.objective.corruption import (
    NoiseSchedule,
    complement_weight,
    corrupt,
    corrupt_exactly,
    exact_counts,
    exact_weight,
    loss_weights,
    maskable,
    stratified_times,
)

SCHEDULES = ("linear", "cosine", "geometric")
MASK = 99


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, 0]))


def formula(name: str, t: float) -> float:
    """p(t) written out once more."""
    if name == "linear":
        return t
    if name == "cosine":
        return 1 - math.cos(math.pi * t / 2)
    noise = 1e-4 ** (1 - t) * 20**t - 1e-4
    return (1 - math.exp(-noise)) / (1 - math.exp(-(20 - 1e-4)))


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_mask_probability_is_that_of_its_formula(name):
    for t in np.linspace(0, 1, 101):
        assert float(NoiseSchedule(name).mask_probability(t)) == pytest.approx(formula(name, t), abs=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_nothing_is_masked_at_time_0_and_all_at_time_1_and_more_in_between(name):
    schedule = NoiseSchedule(name)
    p = schedule.mask_probability(np.linspace(0, 1, 1001))
    assert p[0] == 0.0
    assert p[-1] == 1.0
    # The geometric schedule is flat at its end: exp(-20) of a change is left.
    assert (np.diff(p) >= 0).all()
    assert (np.diff(p)[:800] > 0).all()


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_nelbo_weight_is_the_slope_of_p_over_p(name):
    schedule, h = NoiseSchedule(name), 1e-6
    for t in (1e-3, 0.01, 0.15, 0.5, 0.77, 0.85, 1 - 2e-6):
        slope = (formula(name, t + h) - formula(name, t - h)) / (2 * h)
        # The quotient is off by float64 rounding of p / h = 1e-10 absolutely, and by (h / t)^2 relatively.
        expected = pytest.approx(slope / formula(name, t), rel=1e-5, abs=5e-10 / formula(name, t))
        assert float(schedule.nelbo_weight(t)) == expected


def test_the_nelbo_weight_of_the_linear_schedule_is_one_over_t():
    t = np.array([0.001, 0.3, 1.0])
    assert np.array_equal(NoiseSchedule("linear").nelbo_weight(t), 1 / t)


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_nelbo_weight_is_infinite_at_time_0_without_a_warning(name):
    assert float(NoiseSchedule(name).nelbo_weight(0.0)) == math.inf


def test_schedules_keep_the_shape_of_their_times_and_do_not_hand_them_back():
    t = np.full((2, 3), 0.5)
    for name in SCHEDULES:
        p = NoiseSchedule(name).mask_probability(t)
        assert p.shape == (2, 3)
        p[...] = 7.0
    assert (t == 0.5).all()


def test_an_unknown_schedule_is_refused():
    with pytest.raises(ValueError, match="no noise schedule 'square'"):
        NoiseSchedule("square")


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_bound_does_not_depend_on_the_schedule(name):
    """The integral of (p'/p) * E[sum over masked] = p' * f(p) over t is the integral of f over p."""
    t = (np.arange(200_000) + 0.5) / 200_000
    schedule = NoiseSchedule(name)
    p, weight = schedule.mask_probability(t), schedule.nelbo_weight(t)
    bound = np.mean(weight * p * (1 + 3 * p**2))  # a model whose cross-entropy is 1 + 3 p^2
    assert bound == pytest.approx(2.0, rel=1e-6)  # midpoint rule


@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_one_time_falls_into_each_stratum(n):
    times = stratified_times(n, generator())
    assert sorted(np.ceil(times * n).astype(int)) == list(range(1, n + 1))
    assert (times > 0).all() and (times <= 1).all()


def test_times_are_uniform_over_many_draws():
    rng = generator(1)
    times = np.concatenate([stratified_times(3, rng) for _ in range(4000)])
    counts, _ = np.histogram(times, bins=10, range=(0, 1))
    # 12 000 draws: at most sqrt(1200) = 35 standard deviation a bin, less for stratified ones; 5 are allowed.
    assert np.abs(counts - 1200).max() < 175


def test_the_order_of_times_says_nothing_about_their_size():
    rng = generator(2)
    first = np.array([stratified_times(4, rng)[0] for _ in range(4000)])
    # Uniform: standard error of the mean is 0.289 / sqrt(4000) = 0.0046.
    assert first.mean() == pytest.approx(0.5, abs=0.023)


def test_times_are_less_scattered_than_independent_ones():
    rng = generator(3)
    means = np.array([stratified_times(8, rng).mean() for _ in range(500)])
    assert means.std() < 0.5 * np.sqrt(1 / 12 / 8)


@pytest.mark.parametrize("n, num_timesteps", [(8, 1), (5, 10), (64, 1000), (1000, 10)])
def test_discrete_times_lie_on_equal_steps_above_0(n, num_timesteps):
    steps = stratified_times(n, generator(), num_timesteps) * num_timesteps
    assert np.abs(steps - np.rint(steps)).max() < 1e-9
    assert steps.min() >= 1 and steps.max() <= num_timesteps


def test_every_discrete_time_is_equally_likely():
    rng = generator(4)
    steps = np.rint(np.concatenate([stratified_times(3, rng, 6) for _ in range(4000)]) * 6).astype(int)
    counts = np.bincount(steps, minlength=7)
    assert counts[0] == 0
    assert np.abs(counts[1:] - 2000).max() < 205  # 5 * sqrt(12000 * 1/6 * 5/6)


def test_times_keep_above_the_least_one():
    times = stratified_times(1000, generator(), min_time=0.05)
    assert times.min() >= 0.05 and times.max() <= 1.0
    # 1000 strata of width 0.00095
    assert times.min() < 0.052 and times.max() > 0.998
    # Two equal steps above 0.5 end at 0.75 and 1.
    assert sorted(stratified_times(4, generator(), num_timesteps=2, min_time=0.5)) == [0.75, 0.75, 1.0, 1.0]


def test_the_same_generator_state_gives_the_same_times():
    assert np.array_equal(stratified_times(9, generator(5)), stratified_times(9, generator(5)))


def test_the_first_token_of_each_document_and_padding_are_never_masked_when_shifted():
    tokens = np.arange(12, dtype=np.int32).reshape(2, 6)
    documents = np.array([[0, 0, 1, 1, 1, 2], [0, 1, 2, 2, 2, 2]], dtype=np.int32)
    lengths = np.array([6, 4], dtype=np.int32)
    expected = np.array([[0, 1, 0, 1, 1, 0], [0, 0, 0, 1, 0, 0]], dtype=bool)
    assert np.array_equal(maskable(tokens, documents, lengths, "shifted", None), expected)


def test_all_but_padding_may_be_masked_when_aligned():
    tokens = np.zeros((2, 3), dtype=np.int32)
    expected = [[True, True, True], [True, False, False]]
    assert np.array_equal(maskable(tokens, None, np.array([3, 1]), "aligned", None), expected)


def test_bos_and_the_mask_token_itself_are_never_masked():
    tokens = np.array([[5, 1, 7, 1, MASK, 8]], dtype=np.int32)
    assert maskable(tokens, None, None, "aligned", 1, MASK).tolist() == [
        [True, False, True, False, False, True]
    ]
    assert maskable(tokens, None, None, "shifted", 1, MASK).tolist() == [
        [False, False, True, False, False, True]
    ]


def test_a_sequence_of_one_token_has_nothing_to_mask_when_shifted():
    assert not maskable(np.zeros((1, 1), dtype=np.int32), None, None, "shifted", None).any()


@pytest.mark.parametrize("name", SCHEDULES)
def test_each_maskable_token_is_masked_with_the_probability_of_its_time(name):
    p = NoiseSchedule(name).mask_probability(np.array([0.15, 0.5, 0.85, 1.0]))
    tokens = np.zeros((4, 50_000), dtype=np.int32)
    may = np.zeros_like(tokens, dtype=bool)
    may[:, ::2] = True
    noisy, masked = corrupt(tokens, may, p, MASK, generator(6), at_least_one=False)
    assert not masked[:, 1::2].any()
    rates = masked[:, ::2].mean(axis=1)
    # 25 000 draws a row: 5 standard errors.
    assert (np.abs(rates - p) <= 5 * np.sqrt(p * (1 - p) / 25_000)).all()
    assert np.array_equal(noisy, np.where(masked, MASK, 0))


def test_tokens_are_masked_independently_of_each_other():
    tokens = np.zeros((20_000, 2), dtype=np.int32)
    _, masked = corrupt(
        tokens, np.ones_like(tokens, dtype=bool), np.full(20_000, 0.5), MASK, generator(7), at_least_one=False
    )
    both = (masked[:, 0] & masked[:, 1]).mean()
    assert both == pytest.approx(0.25, abs=5 * math.sqrt(0.25 * 0.75 / 20_000))


def test_all_or_nothing_is_masked_at_the_ends_of_time():
    tokens = np.arange(10, dtype=np.int32).reshape(2, 5)
    may = np.ones_like(tokens, dtype=bool)
    noisy, masked = corrupt(tokens, may, np.array([0.0, 1.0]), MASK, generator(), at_least_one=False)
    assert np.array_equal(noisy, [[0, 1, 2, 3, 4], [MASK] * 5])
    assert np.array_equal(masked.sum(axis=1), [0, 5])
    assert noisy.dtype == np.int32
    assert np.array_equal(tokens, np.arange(10).reshape(2, 5))


def test_one_token_is_forced_where_a_sequence_would_have_none_and_each_is_equally_likely():
    may = np.tile(np.array([True, False, True, True, False]), (9000, 1))
    tokens = np.zeros_like(may, dtype=np.int32)
    _, masked = corrupt(tokens, may, np.zeros(9000), MASK, generator(8), at_least_one=True)
    assert (masked.sum(axis=1) == 1).all()
    counts = masked.sum(axis=0)
    assert counts[1] == counts[4] == 0
    assert np.abs(counts[[0, 2, 3]] - 3000).max() < 5 * math.sqrt(9000 * 2 / 9)


def test_a_sequence_without_maskable_tokens_stays_clean_even_when_one_is_forced():
    may = np.array([[False, False], [False, True]])
    _, masked = corrupt(np.zeros((2, 2), np.int32), may, np.zeros(2), MASK, generator(), at_least_one=True)
    assert masked.tolist() == [[False, False], [False, True]]


def test_none_is_forced_for_the_bound():
    may = np.ones((3, 4), dtype=bool)
    _, masked = corrupt(np.zeros((3, 4), np.int32), may, np.zeros(3), MASK, generator(), at_least_one=False)
    assert not masked.any()


def test_what_is_maskable_does_not_shift_the_draws_of_other_tokens():
    tokens = np.zeros((2, 100), dtype=np.int32)
    may = np.ones_like(tokens, dtype=bool)
    _, all_maskable = corrupt(tokens, may, np.full(2, 0.5), MASK, generator(9), at_least_one=False)
    may[0, :50] = False
    _, some_maskable = corrupt(tokens, may, np.full(2, 0.5), MASK, generator(9), at_least_one=False)
    assert np.array_equal(some_maskable, all_maskable & may)


def test_uniform_weights_are_the_mean_over_the_masked_tokens_of_the_whole_batch():
    masked = np.array([[1, 0, 1, 1], [0, 0, 1, 0]], dtype=bool)
    weights = loss_weights(masked, np.ones_like(masked), np.array([3.0, 8.0]), "uniform")
    assert weights.dtype == np.float32
    assert np.array_equal(weights, masked * np.float32(0.25))


def test_nelbo_weights_are_clipped_and_divided_by_the_maskable_tokens_of_the_whole_batch():
    masked = np.array([[1, 0, 0], [0, 1, 1]], dtype=bool)
    may = np.array([[1, 1, 0], [1, 1, 1]], dtype=bool)
    weights = loss_weights(masked, may, np.array([16.0, 3.0]), "nelbo", nelbo_clip=10.0)
    expected = np.array([[10 / 5, 0, 0], [0, 3 / 5, 3 / 5]], dtype=np.float32)
    assert np.array_equal(weights, expected)
    unclipped = loss_weights(masked, may, np.array([16.0, 3.0]), "nelbo")
    assert unclipped[0, 0] == np.float32(16 / 5)


@pytest.mark.parametrize("weighting", ["uniform", "nelbo"])
def test_a_batch_in_which_nothing_is_masked_weighs_nothing(weighting):
    nothing = np.zeros((2, 3), dtype=bool)
    weights = loss_weights(nothing, nothing, np.array([np.inf, 1.0]), weighting)
    assert np.array_equal(weights, np.zeros((2, 3)))


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_nelbo_estimate_of_a_constant_loss_is_that_constant(name):
    """E[sum of weights] = integral of p'/p * p dt = p(1) - p(0) = 1, by Monte Carlo over times and masks."""
    rng, schedule = generator(10), NoiseSchedule(name)
    tokens = np.zeros((16, 64), dtype=np.int32)
    may = maskable(tokens, None, None, "shifted", None)
    sums = []
    for _ in range(1500):
        t = stratified_times(16, rng)
        _, masked = corrupt(tokens, may, schedule.mask_probability(t), MASK, rng, at_least_one=False)
        sums.append(loss_weights(masked, may, schedule.nelbo_weight(t), "nelbo").sum(dtype=np.float64))
    standard_error = np.std(sums) / math.sqrt(len(sums))
    assert standard_error < 0.02
    assert np.mean(sums) == pytest.approx(1.0, abs=5 * standard_error)


# -- exact counts and complements ----------------------------------------------------------------------


def cross_entropy_given(n_masked: np.ndarray) -> np.ndarray:
    """Of a masked token where that many are masked: a model that knows only the count."""
    return 1.0 + 0.3 * np.sqrt(n_masked)


def bound_by_the_integral(L: int) -> float:
    """NELBO of L such tokens: the integral over t of 1/t * E[k f(k)], k binomial, by a midpoint rule."""
    t = (np.arange(200_000) + 0.5) / 200_000
    total = np.zeros_like(t)
    for k in range(1, L + 1):
        chance = math.comb(L, k) * t**k * (1 - t) ** (L - k)
        total += chance * k * cross_entropy_given(np.float64(k))
    return float(np.mean(total / t))


@pytest.mark.parametrize("L", [1, 2, 7])
def test_exact_counts_with_the_weight_L_over_k_have_the_bound_of_the_integral_over_time(L):
    k = np.arange(1, L + 1)
    weights = exact_weight(k, np.full(L, L))
    assert np.mean(weights * k * cross_entropy_given(k)) == pytest.approx(bound_by_the_integral(L), rel=1e-6)


@pytest.mark.parametrize("L", [1, 2, 7])
def test_both_sides_of_complementary_exact_counts_have_the_bound(L):
    k = np.arange(L + 1)
    for counts in (k, L - k):
        weights = exact_weight(counts, np.full(L + 1, L), from_none=True)
        assert np.isinf(weights[counts == 0]).all()
        losses = np.where(counts > 0, weights, 0.0) * counts * cross_entropy_given(counts)
        assert losses.mean() == pytest.approx(bound_by_the_integral(L), rel=1e-6)


@pytest.mark.parametrize("from_none", [False, True])
def test_uniform_shares_give_uniform_counts(from_none):
    first = 0 if from_none else 1
    share = (np.arange(6000) + 1) / 6000
    counts = exact_counts(np.full(6000, 5), share, from_none=from_none)
    expected = [0] * first + [6000 // (6 - first)] * (6 - first)
    assert np.bincount(counts, minlength=6).tolist() == expected
    assert exact_counts(np.array([0, 0]), np.array([0.5, 1.0]), from_none=from_none).tolist() == [0, 0]


def test_just_so_many_tokens_are_masked_and_each_choice_is_equally_likely():
    may = np.tile(np.array([True, False, True, True, True]), (12_000, 1))
    tokens = np.arange(5, dtype=np.int32) + np.zeros((12_000, 1), dtype=np.int32)
    noisy, masked = corrupt_exactly(tokens, may, np.full(12_000, 2), MASK, generator(11))
    assert (masked.sum(axis=1) == 2).all()
    assert not masked[:, 1].any()
    assert np.array_equal(noisy, np.where(masked, MASK, tokens)) and noisy.dtype == np.int32
    pairs, counts = np.unique(masked, axis=0, return_counts=True)
    assert len(pairs) == 6
    assert np.abs(counts - 2000).max() < 5 * math.sqrt(12_000 * 5 / 36)


def test_exact_counts_of_none_and_all():
    may = np.array([[True, False, True], [True, True, True]])
    _, masked = corrupt_exactly(np.zeros((2, 3), np.int32), may, np.array([0, 3]), MASK, generator())
    assert masked.tolist() == [[False] * 3, [True] * 3]


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_complement_of_a_mask_with_its_weight_has_the_bound_under_every_schedule(name):
    """The integral over t of p'/(1 - p) * (1 - p) f(1 - p), f a function of the share that is masked."""
    t = (np.arange(200_000) + 0.5) / 200_000
    schedule = NoiseSchedule(name)
    p = schedule.mask_probability(t)
    weight = complement_weight(schedule.nelbo_weight(t), p)
    masked_share = 1.0 - p
    # Where all is masked to float64 precision (the end of the geometric schedule) the complement is empty.
    seen = masked_share > 0
    bound = np.sum((weight * masked_share * (1 + 3 * masked_share**2))[seen]) / len(t)
    assert bound == pytest.approx(2.0, rel=1e-4)  # midpoint rule; geometric ends at 1 - p = 2e-9


def test_the_complement_weight_of_the_linear_schedule_is_one_over_what_is_left():
    t = np.array([0.25, 0.8, 1.0])
    weights = complement_weight(NoiseSchedule("linear").nelbo_weight(t), t)
    assert weights[:2] == pytest.approx([1 / 0.75, 1 / 0.2])
    assert weights[2] == np.inf


@pytest.mark.parametrize("t", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("kind", ["linear", "cosine", "geometric"])
def test_the_time_at_a_share_is_the_inverse_of_the_schedule(kind, t):
    schedule = NoiseSchedule(kind)
    # cosine and geometric are flat at 0: an error of 1e-16 in p is 1e-8 in t
    share = schedule.mask_probability(t)
    assert schedule.time_at(float(share)) == pytest.approx(t, abs=1e-7)
    np.testing.assert_array_equal(
        schedule.times_at(np.array([share, 0.5, share]))[[0, 2]], schedule.time_at(share)
    )
