"""AdamW, clipping by the global norm, and the learning rate of each step.

Clipping a gradient hardly shortens AdamW's step, which moves every parameter by about its rate however large
the gradient is. So where a norm is far above the usual, the rate is what `NormTrend` shortens.

All work in place on one flat float32 vector, in chunks that fit the cache, so that their temporaries cost
next to nothing beside the two moments. The order of every sum is fixed: same input, same bits.

Deliberately not here: which parameters are decayed (the trainer says so), what to do about gradients that are
not finite (the trainer sees the norm).
Sources: AdamW [Loshchilov and Hutter 2019, arXiv:1711.05101], algorithm 2 with the decay scaled by the
learning rate alone, as PyTorch has it.
"""

import math
from collections.abc import Iterable, Iterator
from typing import Literal

import numpy as np
from numpy.typing import NDArray

LearningRateSchedule = Literal["constant", "cosine"]

_CHUNK = 1 << 15  # elements; six float32 arrays of that size fit a 1 MB cache


class AdamW:
    """The optimizer's moments and its step.

    Attributes:
        first_moment, second_moment: float32, of the parameters' size, zero at the start; assign into them to
            resume.
        step_count: steps taken; the bias corrections depend on it.

    """

    def __init__(
        self,
        parameters: NDArray[np.float32],
        decayed: Iterable[slice],
        *,
        rate_factors: Iterable[tuple[slice, float]] = (),
        weight_decay: float = 0.01,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-8,
    ) -> None:
        """Take hold of the parameters.

        Args:
            parameters: (n,) float32, contiguous, changed in place by every step.
            decayed: the parts of it that weight decay applies to; they do not overlap.
            rate_factors: parts whose learning rate is a multiple of that of a step; they do not overlap each
                other, and hold a decayed part whole or not at all.
            weight_decay: decoupled: a decayed parameter shrinks by learning_rate * weight_decay of itself a
                step.
            beta1: memory of the first moment.
            beta2: memory of the second moment.
            epsilon: added to the root of the second moment.

        """
        self.parameters = parameters
        self._parts = _cover(parameters.size, rate_factors)
        self._decayed = [(part, self._factor_at(part.start)) for part in decayed]
        self.weight_decay = weight_decay
        self.beta1, self.beta2, self.epsilon = beta1, beta2, epsilon
        # zeros, not zeros_like, which writes them: these take no memory before the first step
        self.first_moment = np.zeros(parameters.size, dtype=np.float32)
        self.second_moment = np.zeros(parameters.size, dtype=np.float32)
        self.step_count = 0

    def _factor_at(self, index: int) -> float:
        return next(factor for part, factor in self._parts if index < part.stop)

    def step(self, gradients: NDArray[np.float32], learning_rate: float) -> None:
        """Move the parameters by one step against the gradients (n,), which are left as they are."""
        self.step_count += 1
        for part, factor in self._decayed:
            self.parameters[part] *= np.float32(1.0 - learning_rate * factor * self.weight_decay)
        root_correction = np.float32(1.0 / math.sqrt(1.0 - self.beta2**self.step_count))
        new_share1, new_share2 = np.float32(1.0 - self.beta1), np.float32(1.0 - self.beta2)
        scratch = np.empty(min(_CHUNK, self.parameters.size), dtype=np.float32)
        for chunk, factor in _chunks(self._parts):
            step_size = np.float32(learning_rate * factor / (1.0 - self.beta1**self.step_count))
            gradient, work = gradients[chunk], scratch[: chunk.stop - chunk.start]
            first, second = self.first_moment[chunk], self.second_moment[chunk]
            np.multiply(gradient, new_share1, out=work)
            first *= np.float32(self.beta1)
            first += work
            np.multiply(gradient, gradient, out=work)
            work *= new_share2
            second *= np.float32(self.beta2)
            second += work
            np.sqrt(second, out=work)
            work *= root_correction
            work += np.float32(self.epsilon)
            np.divide(first, work, out=work)
            work *= step_size
            self.parameters[chunk] -= work


def _cover(size: int, rate_factors: Iterable[tuple[slice, float]]) -> list[tuple[slice, float]]:
    """Parts that cover all parameters, in order, each with the factor of its learning rate."""
    parts, end = [], 0
    for part, factor in sorted(rate_factors, key=lambda item: int(item[0].start)):
        parts += [(slice(end, part.start), 1.0), (part, factor)]
        end = part.stop
    return [*parts, (slice(end, size), 1.0)]


def _chunks(parts: list[tuple[slice, float]]) -> Iterator[tuple[slice, float]]:
    """The parts in pieces that fit the cache."""
    for part, factor in parts:
        for start in range(part.start, part.stop, _CHUNK):
            yield slice(start, min(start + _CHUNK, part.stop)), factor


def clip_by_global_norm(gradients: NDArray[np.float32], max_norm: float) -> float:
    """Scale gradients (n,) in place so that their Euclidean norm is at most `max_norm`.

    Returns:
        The norm before clipping; if it is NaN or infinite the gradients are left as they are.

    """
    squares = 0.0
    for start in range(0, gradients.size, _CHUNK):
        chunk = gradients[start : start + _CHUNK].astype(np.float64)
        squares += float(np.square(chunk, out=chunk).sum())
    norm = math.sqrt(squares)
    if math.isfinite(norm) and norm > max_norm:
        gradients *= np.float32(max_norm / norm)
    return norm


class NormTrend:
    """What a gradient's norm usually is, and what share of its rate a step gets whose norm is far above that.

    Attributes:
        limit: times the usual norm that a step may have at its full rate.
        usual: a mean of the logarithms; None before the first step. It falls fast, since norms are large
            at the start, and rises slowly, since a run that goes wrong has large norms for many steps.

    """

    _RISE, _FALL = 0.1, 0.5  # shares of a step's norm in the mean
    _HIGHEST, _LOWEST = 2.0, 0.25  # of a norm, times the usual, as it counts there

    def __init__(self, limit: float) -> None:
        self.limit = limit
        self.usual: float | None = None

    def share_of_rate(self, norm: float) -> float:
        """The share, in (0, 1], of a step whose gradient has this norm; the norm then counts as seen."""
        if norm == 0.0:
            return 1.0
        usual = norm if self.usual is None else self.usual
        counted = min(max(norm, self._LOWEST * usual), self._HIGHEST * usual)
        weight = self._FALL if counted < usual else self._RISE
        self.usual = usual ** (1.0 - weight) * counted**weight
        return min(1.0, self.limit * usual / norm)


def learning_rate_at(
    step: int,
    *,
    peak: float,
    warmup_steps: int,
    total_steps: int,
    schedule: LearningRateSchedule = "cosine",
) -> float:
    """The learning rate of optimizer step `step`, counted from 0.

    It rises linearly over the warm-up, whose last step has the peak. Then it stays there (constant), or falls
    on half a cosine that would be 0 at `total_steps` (cosine).
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if schedule == "constant":
        return peak
    share = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
    return peak * 0.5 * (1.0 + math.cos(math.pi * share))
