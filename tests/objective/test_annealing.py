"""The causal ratio at each step, against the formulas written out, and the mask that follows from it."""

import math

import numpy as np
import pytest

from ggml_diffusion.config.groups import MaskAnnealingConfig
from ggml_diffusion.objective.annealing import AnnealingSchedule, AttentionMaskAnnealer

SCHEDULES = {
    "linear": {"schedule": "linear"},
    "cosine": {"schedule": "cosine"},
    "exponential": {"schedule": "exponential", "decay": 3.0},
    "stepwise": {"schedule": "stepwise", "steps": [[10, 0.8], [30, 0.3]]},
}


def annealer(**settings) -> AttentionMaskAnnealer:
    return AttentionMaskAnnealer(MaskAnnealingConfig(**settings))


def splitmix_uniform(seed: int, i: int, j: int) -> float:
    """The engine's Bernoulli draw of entry (i, j), in plain integers."""
    x = (seed + 0x9E3779B97F4A7C15 * ((i << 32 | j) + 1)) % 2**64
    x ^= x >> 30
    x = x * 0xBF58476D1CE4E5B9 % 2**64
    x ^= x >> 27
    x = x * 0x94D049BB133111EB % 2**64
    x ^= x >> 31
    return (x >> 40) / 2**24


@pytest.mark.parametrize("settings", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize(("initial", "final"), [(1.0, 0.0), (0.9, 0.2), (0.0, 1.0)])
def test_every_schedule_starts_at_the_initial_and_ends_at_the_final_ratio(settings, initial, final):
    a = annealer(total_steps=40, initial_causal_ratio=initial, final_causal_ratio=final, **settings)
    assert a.causal_ratio_at(0) == initial
    assert [a.causal_ratio_at(step) for step in (40, 41, 10**9)] == [final] * 3


@pytest.mark.parametrize("initial, final", [(1.0, 0.0), (0.9, 0.2)])
def test_the_curves_are_those_of_their_formulas(initial, final):
    progress = {
        "linear": lambda p: p,
        "cosine": lambda p: 0.5 * (1 - math.cos(math.pi * p)),
        "exponential": lambda p: (1 - math.exp(-3.0 * p)) / (1 - math.exp(-3.0)),
    }
    for name, g in progress.items():
        a = annealer(
            total_steps=40, initial_causal_ratio=initial, final_causal_ratio=final, **SCHEDULES[name]
        )
        for step in range(40):
            expected = initial + g(step / 40) * (final - initial)
            assert a.causal_ratio_at(step) == pytest.approx(expected, abs=1e-14), (name, step)


def test_the_exponential_schedule_is_near_the_linear_one_for_a_tiny_decay():
    a = annealer(total_steps=40, schedule="exponential", decay=1e-12)
    # g differs from p by at most decay / 8.
    assert a.causal_ratio_at(10) == pytest.approx(0.75, abs=1e-12)


def test_the_exponential_schedule_falls_faster_at_first():
    a = annealer(total_steps=40, schedule="exponential", decay=3.0)
    drops = np.diff([a.causal_ratio_at(step) for step in range(41)])
    assert (drops < 0).all()
    assert (np.diff(drops) > 0).all()


def test_stepwise_ratios_are_absolute_and_not_interpolated_again():
    a = annealer(total_steps=40, initial_causal_ratio=0.9, final_causal_ratio=0.2, **SCHEDULES["stepwise"])
    assert [a.causal_ratio_at(step) for step in (0, 9, 10, 29, 30, 39, 40)] == [
        0.9, 0.9, 0.8, 0.8, 0.3, 0.3, 0.2,
    ]  # fmt: skip


@pytest.mark.parametrize("settings", SCHEDULES.values(), ids=SCHEDULES)
def test_with_no_steps_the_final_ratio_holds_at_once(settings):
    a = annealer(total_steps=0, final_causal_ratio=0.25, **settings)
    assert a.get_causal_ratio() == 0.25
    assert a.is_complete()


def test_steps_are_counted_and_the_last_one_completes_the_annealing():
    a = annealer(total_steps=2, schedule="linear")
    seen = []
    for _ in range(3):
        seen.append((a.get_causal_ratio(), a.is_complete()))
        a.step()
    assert seen == [(1.0, False), (0.5, False), (0.0, True)]


def test_an_annealer_resumes_at_the_step_it_is_given():
    settings = MaskAnnealingConfig(total_steps=10, schedule=AnnealingSchedule.COSINE)
    fresh, resumed = AttentionMaskAnnealer(settings), AttentionMaskAnnealer(settings, current_step=7)
    for _ in range(7):
        fresh.step()
    assert resumed.get_causal_ratio() == fresh.get_causal_ratio()


@pytest.mark.parametrize("seq_len", [1, 2, 7])
def test_the_soft_mask_weighs_the_future_by_one_minus_the_ratio(seq_len):
    a = AttentionMaskAnnealer(MaskAnnealingConfig(total_steps=10, schedule="linear"), current_step=3)
    mask = a.get_mask(seq_len)
    assert mask.shape == (seq_len, seq_len)
    assert mask.dtype == np.float32
    for i in range(seq_len):
        for j in range(seq_len):
            assert mask[i, j] == np.float32(1.0 if j <= i else 1 - 0.7)


def test_the_mask_is_causal_before_and_full_after_the_annealing():
    a = annealer(total_steps=10)
    assert np.array_equal(a.get_mask(5), np.tril(np.ones((5, 5))))
    a.current_step = 10
    assert np.array_equal(a.get_mask(5), np.ones((5, 5)))


@pytest.mark.parametrize("seed", [0, 1, 2**63 + 12345, 2**64 - 1])
def test_the_bernoulli_mask_is_the_stated_hash_of_seed_and_place(seed):
    a = annealer(total_steps=10, schedule="linear", initial_causal_ratio=0.6)
    expected = [[float(j <= i or splitmix_uniform(seed, i, j) < 0.4) for j in range(9)] for i in range(9)]
    assert np.array_equal(a.get_mask(9, bernoulli_seed=seed), expected)


def test_the_bernoulli_mask_shows_the_stated_share_of_the_future():
    a = annealer(total_steps=10, schedule="linear", initial_causal_ratio=0.7)
    future = np.triu(np.ones((600, 600), dtype=bool), k=1)
    share = a.get_mask(600, bernoulli_seed=42)[future].mean()
    # 179 700 draws: one standard error is sqrt(0.3 * 0.7 / 179700) = 0.0011; 5 of them are allowed.
    assert share == pytest.approx(0.3, abs=0.0055)


def test_another_seed_gives_another_bernoulli_mask():
    a = annealer(total_steps=10, initial_causal_ratio=0.5)
    assert not np.array_equal(a.get_mask(20, bernoulli_seed=1), a.get_mask(20, bernoulli_seed=2))


def test_the_bernoulli_mask_is_all_causal_or_all_visible_at_the_ends():
    a = annealer(total_steps=10)
    assert np.array_equal(a.get_mask(30, bernoulli_seed=3), np.tril(np.ones((30, 30))))
    a.current_step = 10
    assert np.array_equal(a.get_mask(30, bernoulli_seed=3), np.ones((30, 30)))
