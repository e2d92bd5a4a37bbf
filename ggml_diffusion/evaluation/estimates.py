"""A figure with its uncertainty: a ratio of sums over sequences, and its bootstrap by sequence.

Tokens of one sequence depend on each other, so whole sequences are drawn again, never tokens. The interval is
the percentile interval [Efron & Tibshirani 1993, chapter 13]; it speaks of the choice of sequences, with the
masks (and all that was averaged before) as they fell.

Letters: N sequences.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ggml_diffusion.randomness import Stream, generator_of

LEVEL = 0.95
N_RESAMPLES = 2000
_SEED = 0x626F6F74  # intervals are a function of the figures alone


@dataclass(frozen=True)
class Estimate:
    """A mean with a 95% interval.

    Attributes:
        value: the mean.
        low, high: ends of the interval; NaN where fewer than two sequences have anything to count.
        standard_error: of `value`; NaN likewise.
        n: what the mean is over (tokens, spans, samples).

    """

    value: float
    low: float
    high: float
    standard_error: float
    n: int


def estimate_ratio(totals: ArrayLike, counts: ArrayLike) -> Estimate:
    """The ratio sum(totals) / sum(counts) of sums over sequences.

    Args:
        totals: (N,), e.g. summed cross-entropies.
        counts: (N,), what each was summed over; a sequence with a count of 0 is left out.

    """
    kept = np.asarray(counts) > 0
    totals, counts = np.asarray(totals, dtype=np.float64)[kept], np.asarray(counts)[kept]
    nan = float("nan")
    if len(counts) == 0:
        return Estimate(nan, nan, nan, nan, 0)
    value, n = float(totals.sum() / counts.sum()), int(counts.sum())
    if len(counts) == 1:
        return Estimate(value, nan, nan, nan, n)
    drawn = generator_of(_SEED, 0, Stream.BOOTSTRAP).integers(len(counts), size=(N_RESAMPLES, len(counts)))
    ratios: NDArray[np.float64] = totals[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.quantile(ratios, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(value, float(low), float(high), float(ratios.std()), n)


def exponential(estimate: Estimate) -> Estimate:
    """The perplexity of a mean in nats; its standard error is the first-order one."""
    value = math.exp(estimate.value)
    return Estimate(
        value,
        math.exp(estimate.low),
        math.exp(estimate.high),
        value * estimate.standard_error,
        estimate.n,
    )
