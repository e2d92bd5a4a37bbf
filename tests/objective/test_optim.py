"""AdamW, clipping and the learning rate against textbook loops in float64."""

import math

import numpy as np
import pytest

from ggml_diffusion.objective import optim
from ggml_diffusion.objective.optim import AdamW, NormTrend, clip_by_global_norm, learning_rate_at


def textbook_adamw(
    parameters: np.ndarray, gradients: list[np.ndarray], rates: list[float], decays: np.ndarray
) -> np.ndarray:
    """AdamW in float64, element by element; `decays` is each element's own weight decay."""
    theta, m, v = parameters.astype(np.float64), np.zeros(len(parameters)), np.zeros(len(parameters))
    for step, (gradient, rate) in enumerate(zip(gradients, rates, strict=True), start=1):
        for i, g in enumerate(gradient.astype(np.float64)):
            m[i] = 0.9 * m[i] + 0.1 * g
            v[i] = 0.999 * v[i] + 0.001 * g * g
            m_hat = m[i] / (1 - 0.9**step)
            v_hat = v[i] / (1 - 0.999**step)
            theta[i] = theta[i] - rate * decays[i] * theta[i]
            theta[i] = theta[i] - rate * m_hat / (math.sqrt(v_hat) + 1e-8)
    return theta


def random_run(n: int, steps: int) -> tuple[np.ndarray, list[np.ndarray], list[float]]:
    rng = np.random.default_rng(n)
    scales = 10.0 ** rng.uniform(-6, 1, n)  # gradients of very different sizes
    gradients = [(rng.standard_normal(n) * scales).astype(np.float32) for _ in range(steps)]
    return rng.standard_normal(n).astype(np.float32), gradients, [1e-2 / (step + 1) for step in range(steps)]


@pytest.mark.parametrize("n", [1, 7, 300])
@pytest.mark.parametrize("chunk", [1, 64, 1 << 15])
def test_ten_steps_are_those_of_the_textbook(n, chunk, monkeypatch):
    monkeypatch.setattr(optim, "_CHUNK", chunk)
    start, gradients, rates = random_run(n, 10)
    decayed = slice(0, n // 2)
    decays = np.zeros(n)
    decays[decayed] = 0.1
    parameters = start.copy()
    optimizer = AdamW(parameters, [decayed], weight_decay=0.1)
    for gradient, rate in zip(gradients, rates, strict=True):
        optimizer.step(gradient, rate)
    expected = textbook_adamw(start, gradients, rates, decays)
    # Steps add up to 0.03; each is right to a few float32 roundings, and so is the parameter (about 1).
    assert np.abs(parameters - expected).max() < 1e-6
    assert np.abs(expected - start).max() > 1e-3


@pytest.mark.parametrize("chunk", [3, 1 << 15])
def test_parts_with_a_rate_of_their_own_take_the_textbooks_steps_at_that_rate(chunk, monkeypatch):
    monkeypatch.setattr(optim, "_CHUNK", chunk)
    start, gradients, rates = random_run(40, 5)
    decays = np.zeros(40)
    decays[:15] = decays[20:25] = 0.1
    parameters = start.copy()
    factors = [(slice(20, 25), 0.25), (slice(25, 30), 4.0)]
    optimizer = AdamW(parameters, [slice(0, 15), slice(20, 25)], rate_factors=factors[::-1], weight_decay=0.1)
    for gradient, rate in zip(gradients, rates, strict=True):
        optimizer.step(gradient, rate)
    expected = textbook_adamw(start, gradients, rates, decays)
    for part, factor in factors:
        own = [rate * factor for rate in rates]
        expected[part] = textbook_adamw(start[part], [g[part] for g in gradients], own, decays[part])
    # as above, with steps that add up to 0.1 at four times the rate
    assert np.abs(parameters - expected).max() < 4e-6


def test_only_the_named_parts_decay():
    parameters = np.ones(10, dtype=np.float32)
    optimizer = AdamW(parameters, [slice(1, 3), slice(7, 8)], weight_decay=0.5)
    optimizer.step(np.zeros(10, dtype=np.float32), 0.1)
    assert np.array_equal(np.flatnonzero(parameters != 1), [1, 2, 7])
    assert parameters[1] == pytest.approx(0.95, rel=1e-7)


def test_a_step_changes_the_parameters_in_place_and_leaves_the_gradients():
    store = np.zeros(20, dtype=np.float32)
    optimizer = AdamW(store[:20], [])
    gradient = np.full(20, 2.0, dtype=np.float32)
    optimizer.step(gradient, 1e-3)
    # The first step is the learning rate times the sign of the gradient.
    assert store == pytest.approx(np.full(20, -1e-3), rel=1e-6)
    assert (gradient == 2.0).all()


def test_a_run_resumed_from_its_moments_continues_exactly():
    start, gradients, rates = random_run(100, 6)
    whole, first_half = start.copy(), start.copy()
    optimizer = AdamW(whole, [slice(0, 50)])
    for gradient, rate in zip(gradients, rates, strict=True):
        optimizer.step(gradient, rate)
    early = AdamW(first_half, [slice(0, 50)])
    for gradient, rate in zip(gradients[:3], rates[:3], strict=True):
        early.step(gradient, rate)
    late = AdamW(first_half, [slice(0, 50)])
    late.first_moment[:] = early.first_moment
    late.second_moment[:] = early.second_moment
    late.step_count = early.step_count
    for gradient, rate in zip(gradients[3:], rates[3:], strict=True):
        late.step(gradient, rate)
    assert np.array_equal(first_half, whole)


def test_zero_gradients_without_decay_change_nothing():
    parameters = np.ones(5, dtype=np.float32)
    AdamW(parameters, []).step(np.zeros(5, dtype=np.float32), 1.0)
    assert (parameters == 1).all()


@pytest.mark.parametrize("n", [1, 5, 100_000])
def test_gradients_above_the_norm_are_scaled_onto_it(n):
    gradients = np.random.default_rng(0).standard_normal(n).astype(np.float32) * 10
    norm = float(np.linalg.norm(gradients.astype(np.float64)))
    clipped = gradients.copy()
    assert clip_by_global_norm(clipped, 1.0) == pytest.approx(norm, rel=1e-12)
    assert clipped == pytest.approx(gradients / norm, rel=1e-6, abs=0)
    assert float(np.linalg.norm(clipped.astype(np.float64))) == pytest.approx(1.0, rel=1e-6)


def test_gradients_within_the_norm_are_left_alone():
    gradients = np.array([0.6, -0.8], dtype=np.float32)
    clipped = gradients.copy()
    assert clip_by_global_norm(clipped, 1.5) == pytest.approx(1.0, rel=1e-7)
    assert np.array_equal(clipped, gradients)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_norm_that_is_not_finite_is_reported_and_nothing_is_scaled(bad):
    gradients = np.array([3.0, bad, 4.0], dtype=np.float32)
    assert not math.isfinite(clip_by_global_norm(gradients, 1.0))
    assert gradients[0] == 3.0 and gradients[2] == 4.0


def test_large_gradients_do_not_overflow_the_norm():
    gradients = np.full(4, 1e30, dtype=np.float32)
    assert clip_by_global_norm(gradients, 1.0) == pytest.approx(2e30, rel=1e-6)
    assert gradients == pytest.approx(np.full(4, 0.5), rel=1e-6)


def test_the_learning_rate_rises_over_the_warm_up_and_falls_on_a_cosine():
    rates = [learning_rate_at(step, peak=2.0, warmup_steps=4, total_steps=10) for step in range(10)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0]
    expected = [1 + math.cos(math.pi * k / 6) for k in range(6)]
    assert rates[4:] == pytest.approx(expected, abs=1e-15)


def test_a_constant_learning_rate_stays_after_the_warm_up():
    rates = [
        learning_rate_at(step, peak=2.0, warmup_steps=2, total_steps=4, schedule="constant")
        for step in range(6)
    ]
    assert rates == [1.0, 2.0, 2.0, 2.0, 2.0, 2.0]


def test_without_a_warm_up_the_first_step_has_the_peak():
    assert learning_rate_at(0, peak=3.0, warmup_steps=0, total_steps=5) == 3.0


def test_the_cosine_stays_at_zero_after_the_last_step():
    assert learning_rate_at(12, peak=3.0, warmup_steps=2, total_steps=10) == 0.0


def test_a_run_that_is_all_warm_up_has_a_learning_rate_in_every_step():
    assert [learning_rate_at(step, peak=1.0, warmup_steps=3, total_steps=3) for step in range(4)] == [
        pytest.approx(1 / 3), pytest.approx(2 / 3), 1.0, 1.0,
    ]  # fmt: skip


def test_a_step_whose_norm_is_far_above_the_usual_gets_less_of_its_rate():
    trend = NormTrend(limit=1.5)
    assert [trend.share_of_rate(2.0) for _ in range(4)] == [1.0] * 4
    assert trend.usual == pytest.approx(2.0)
    assert trend.share_of_rate(2.9) == 1.0
    usual = trend.usual
    assert trend.share_of_rate(60.0) == pytest.approx(1.5 * usual / 60)


def test_the_usual_norm_rises_slowly_and_falls_fast():
    trend = NormTrend(limit=1.5)
    trend.share_of_rate(2.0)
    for step in range(1, 6):  # a norm counts as at most twice the usual, and by a tenth
        trend.share_of_rate(1000.0)
        assert trend.usual == pytest.approx(2.0 * 2.0 ** (0.1 * step))
    trend.usual = 40.0
    trend.share_of_rate(10.0)
    assert trend.usual == pytest.approx(20.0)
    trend.share_of_rate(1e-9)  # a batch that says next to nothing does not stop the run
    assert trend.usual == pytest.approx(10.0)
    assert trend.share_of_rate(0.0) == 1.0 and trend.usual == pytest.approx(10.0)
    shares = [trend.share_of_rate(20.0) for _ in range(10)]
    assert shares[0] == pytest.approx(0.75) and shares[-1] == 1.0
