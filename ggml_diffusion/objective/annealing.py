"""Attention-mask annealing: how causal the attention still is at each optimizer step, and the mask that
follows.

`causal_ratio` is 1 where the model is fully causal, as the autoregressive base, and 0 where it is fully
bidirectional. A future key gets the weight a = 1 - causal_ratio in the softmax (soft mask), or is visible
with probability a (Bernoulli mask). A schedule is a progress curve g with g(0) = 0 and g(end) = 1, and the
ratio is initial + g * (final - initial); step-wise gives its ratios outright.

Deliberately not here: padding and document boundaries, which stay hidden whatever the ratio is, and the
attention itself; both are the engine's, which computes the mask in its tiles and never stores it.
Source: DiffuLLaMA [Gong et al. 2024, arXiv:2410.17891], with a soft mask beside its Bernoulli one.
Letters: T tokens.
"""

import math
from collections.abc import Sequence
from enum import Enum
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

MaskKind = Literal["soft", "bernoulli"]


class AnnealingSchedule(str, Enum):
    """The curve on which the causal ratio goes from its initial to its final value."""

    LINEAR = "linear"
    COSINE = "cosine"
    EXPONENTIAL = "exponential"
    STEPWISE = "stepwise"


class AnnealingSettings(Protocol):
    """What the annealer reads; `MaskAnnealingConfig` has it."""

    @property
    def total_steps(self) -> int:
        """Optimizer steps until the final ratio; 0 = it holds at once."""

    @property
    def schedule(self) -> AnnealingSchedule:
        """The curve."""

    @property
    def initial_causal_ratio(self) -> float:
        """The ratio at step 0."""

    @property
    def final_causal_ratio(self) -> float:
        """The ratio from `total_steps` on."""

    @property
    def decay(self) -> float:
        """Exponential only: k > 0 of g(p) = (1 - e^(-k p)) / (1 - e^(-k))."""

    @property
    def steps(self) -> Sequence[tuple[int, float]]:
        """Step-wise only: (first step, ratio from there on), in rising order."""


class AttentionMaskAnnealer:
    """Counts optimizer steps and knows the causal ratio at each.

    Attributes:
        settings: the schedule.
        current_step: optimizer steps taken so far; set it to resume.

    """

    def __init__(self, settings: AnnealingSettings, current_step: int = 0) -> None:
        self.settings = settings
        self.current_step = current_step

    def get_causal_ratio(self) -> float:
        """The ratio of the step that comes next."""
        return self.causal_ratio_at(self.current_step)

    def causal_ratio_at(self, step: int) -> float:
        """The ratio after `step` optimizer steps; from `total_steps` on it is the final one."""
        settings = self.settings
        if step >= settings.total_steps:
            return settings.final_causal_ratio
        if settings.schedule is AnnealingSchedule.STEPWISE:
            ratio = settings.initial_causal_ratio
            for first_step, ratio_from_there in settings.steps:
                if step >= first_step:
                    ratio = ratio_from_there
            return ratio
        g = self._progress(step / settings.total_steps)
        return settings.initial_causal_ratio + g * (
            settings.final_causal_ratio - settings.initial_causal_ratio
        )

    def _progress(self, share: float) -> float:
        """g of the share of the annealing that is done, both in [0, 1]."""
        if self.settings.schedule is AnnealingSchedule.LINEAR:
            return share
        if self.settings.schedule is AnnealingSchedule.COSINE:
            return 0.5 * (1.0 - math.cos(math.pi * share))
        # The division makes it arrive: e^(-k p) alone would stop at e^(-k).
        return math.expm1(-self.settings.decay * share) / math.expm1(-self.settings.decay)

    def get_mask(self, seq_len: int, bernoulli_seed: int | None = None) -> NDArray[np.float32]:
        """The weights w of the attention mask, p_ij proportional to w_ij * exp(score_ij).

        They are no additive bias. This is the definition that the engine's tiles are tested against.

        Args:
            seq_len: T.
            bernoulli_seed: None for the soft mask, whose future weights are all a; else the step's seed, and
                each future weight is 1 with probability a, and 0 otherwise.

        Returns:
            (T, T) float32, row = query, column = key: 1 for the past and the token itself.

        """
        future_weight = 1.0 - self.get_causal_ratio()
        mask = np.ones((seq_len, seq_len), dtype=np.float32)
        rows, columns = np.triu_indices(seq_len, k=1)
        if bernoulli_seed is None:
            mask[rows, columns] = future_weight
        else:
            mask[rows, columns] = _uniform_of_entry(bernoulli_seed, rows, columns) < future_weight
        return mask

    def step(self) -> None:
        """Count one optimizer step."""
        self.current_step += 1

    def is_complete(self) -> bool:
        """Whether the final ratio is reached."""
        return self.current_step >= self.settings.total_steps


def _uniform_of_entry(seed: int, rows: NDArray[np.int64], columns: NDArray[np.int64]) -> NDArray[np.float64]:
    """A number in [0, 1) of 24 bits for each entry (row, column), by the finaliser of splitmix64.

    Counter-based, so that the engine can draw any entry in its tile without storing the pattern.
    Source: Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators".
    """
    counter = (rows.astype(np.uint64) << np.uint64(32)) | columns.astype(np.uint64)
    x = np.uint64(seed % 2**64) + np.uint64(0x9E3779B97F4A7C15) * (counter + np.uint64(1))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return (x >> np.uint64(40)).astype(np.float64) / 2**24
