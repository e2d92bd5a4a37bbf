"""The forward process of masked diffusion: how much is masked at time t, what is masked, and what each mask
weighs.

Time t runs over [0, 1], 0 = clean, 1 = all masked. A token that may be masked is masked with probability
p(t), each on its own. With t uniform the negative evidence lower bound (NELBO) weighs the cross-entropy of a
masked token by p'(t) / p(t); the bound itself does not depend on the schedule. Instead, an exact count k of L
maskable tokens can be masked, k uniform on 1..L: then the weight is L / k, and the bound is the same one. A
mask can be used twice, as it is and turned around, so that each token is predicted once.

Deliberately not here: the network, the cross-entropy, the shift between a token and the row that predicts it
(output_rows.py), and how a step puts these parts together (noisy_batch.py).
Source: MDLM [Sahoo et al. 2024, arXiv:2406.07524], equation 10; the geometric schedule is that of SEDD
[Lou et al. 2024, arXiv:2310.16834], made to start at p(0) = 0 and to end at p(1) = 1; exact counts, LLaDA
[Nie et al. 2025, arXiv:2502.09992]; complementary masks, LaViDa [Li et al. 2025,
arXiv:2505.16839].
Letters: B sequences, T tokens.
"""

import math
from typing import Literal, Protocol, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ggml_diffusion.objective.output_rows import Prediction

ScheduleType = Literal["linear", "cosine", "geometric"]
LossWeighting = Literal["uniform", "nelbo"]
Masking = Literal["bernoulli", "exact"]

# Total noise of the geometric schedule at t = 0 and t = 1 (SEDD's).
_SIGMA_MIN, _SIGMA_MAX = 1e-4, 20.0
_LOG_SIGMA_RATIO = math.log(_SIGMA_MAX / _SIGMA_MIN)


class NoiseSchedule:
    """The probability p(t) that a token is masked at time t; one schedule serves training, evaluation,
    sampling.

    - linear: p = t
    - cosine: p = 1 - cos(pi t / 2)
    - geometric: p = (1 - exp(-(s(t) - s(0)))) / (1 - exp(-(s(1) - s(0)))), s(t) = 1e-4^(1 - t) * 20^t

    Attributes:
        type: which of them.

    """

    def __init__(self, type: ScheduleType = "cosine") -> None:
        if type not in get_args(ScheduleType):
            raise ValueError(f"no noise schedule '{type}', only {', '.join(get_args(ScheduleType))}")
        self.type: ScheduleType = type

    def mask_probability(self, t: ArrayLike) -> NDArray[np.float64]:
        """p(t), for times in [0, 1] of any shape, in their shape; exactly 0 at t = 0 and 1 at t = 1."""
        t = np.asarray(t, dtype=np.float64)
        if self.type == "linear":
            return t.copy()
        if self.type == "cosine":
            return np.asarray(1.0 - np.sin(0.5 * np.pi * (1.0 - t)))  # the cosine, exact at both ends
        noise = _SIGMA_MIN * np.expm1(_LOG_SIGMA_RATIO * t)  # s(t) - s(0)
        return np.asarray(np.expm1(-noise) / math.expm1(-_SIGMA_MIN * math.expm1(_LOG_SIGMA_RATIO)))

    def nelbo_weight(self, t: ArrayLike) -> NDArray[np.float64]:
        """p'(t) / p(t), not clipped, for times in [0, 1] of any shape; inf at t = 0."""
        t = np.asarray(t, dtype=np.float64)
        with np.errstate(divide="ignore"):
            if self.type == "linear":
                return np.asarray(1.0 / t)
            if self.type == "cosine":
                return np.asarray(0.5 * np.pi / np.tan(0.25 * np.pi * t))  # sin 2x / (1 - cos 2x) = 1 / tan x
            noise = _SIGMA_MIN * np.expm1(_LOG_SIGMA_RATIO * t)
            slope = _LOG_SIGMA_RATIO * (noise + _SIGMA_MIN)  # s'(t)
            return np.asarray(slope / np.expm1(noise))  # s' e^-x / (1 - e^-x)

    def time_at(self, share_masked: float) -> float:
        """The time t with p(t) = share: the inverse, by bisection to float64 precision."""
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = 0.5 * (low + high)
            if float(self.mask_probability(np.array(middle))) < share_masked:
                low = middle
            else:
                high = middle
        return high

    def times_at(self, shares_masked: NDArray[np.floating]) -> NDArray[np.float64]:
        """The times (B,) at which these shares (B,) are masked."""
        known = {share: self.time_at(float(share)) for share in np.unique(shares_masked)}
        return np.array([known[share] for share in shares_masked], dtype=np.float64)


def stratified_times(
    n: int, generator: np.random.Generator, num_timesteps: int = 0, min_time: float = 0.0
) -> NDArray[np.float64]:
    """Draw n diffusion times, uniform each and spread evenly together, for all sequences of an optimizer
    step.

    One time falls into each n-th of [0, 1], all with the same offset, which lowers the variance of the loss;
    their order is random. Source: the low-discrepancy sampler of VDM [Kingma et al. 2021, arXiv:2107.00630],
    appendix I.1.

    Args:
        n: sequences of the whole accumulated batch.
        generator: the step's own.
        num_timesteps: > 0 rounds up to one of that many equal steps, 1/N to N/N; 0 leaves t continuous.
        min_time: times are spread over (min_time, 1] instead of (0, 1].

    Returns:
        (n,) float64, none of them 0.

    """
    share = (np.arange(n) + 1.0 - generator.random()) / n  # (0, 1]
    if num_timesteps > 0:
        share = np.clip(np.ceil(share * num_timesteps), 1, num_timesteps) / num_timesteps
    return generator.permutation(min_time + (1.0 - min_time) * share)


def maskable(
    tokens: NDArray[np.int32],
    document_ids: NDArray[np.int32] | None,
    lengths: NDArray[np.int32] | None,
    prediction: Prediction,
    bos_id: int | None,
    mask_token_id: int | None = None,
) -> NDArray[np.bool_]:
    """Which tokens may be masked: not padding, not BOS, and none that the model has no way to predict.

    Args:
        tokens: (B, T), clean.
        document_ids: (B, T), runs of equal numbers are documents; None = one document a sequence.
        lengths: (B,), positions from there on are padding; None = no padding.
        prediction: with "shifted", the first position of every document is read from no row, so it stays
            clean.
        bos_id: of the vocabulary, None if it has none.
        mask_token_id: a text that contains the mask token itself cannot have it as a target.

    Returns:
        (B, T) bool.

    """
    result = np.ones(tokens.shape, dtype=bool)
    if lengths is not None:
        result &= np.arange(tokens.shape[1]) < lengths[:, None]
    if prediction == "shifted":
        result[:, :1] = False
        if document_ids is not None:
            result[:, 1:] &= document_ids[:, 1:] == document_ids[:, :-1]
    for never_masked in (bos_id, mask_token_id):
        if never_masked is not None:
            result &= tokens != never_masked
    return result


class Sequences(Protocol):
    """A batch of token sequences; `TokenBatch` is one."""

    @property
    def tokens(self) -> NDArray[np.int32]:
        """(B, T)."""

    @property
    def lengths(self) -> NDArray[np.int32]:
        """(B,)."""

    @property
    def document_ids(self) -> NDArray[np.int32]:
        """(B, T)."""

    @property
    def maskable(self) -> NDArray[np.bool_] | None:
        """(B, T), False where a token is never a target, as in a prompt; None = no such tokens."""


def predictable(
    batch: Sequences, prediction: Prediction, bos_id: int | None, mask_token_id: int | None
) -> NDArray[np.bool_]:
    """Which tokens (B, T) of a batch may be targets: `maskable`, and no prompt."""
    result = maskable(batch.tokens, batch.document_ids, batch.lengths, prediction, bos_id, mask_token_id)
    return result if batch.maskable is None else result & batch.maskable


def corrupt(
    tokens: NDArray[np.int32],
    maskable: NDArray[np.bool_],
    mask_probability: NDArray[np.float64],
    mask_token_id: int,
    generator: np.random.Generator,
    *,
    at_least_one: bool,
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Mask each maskable token of a sequence with the sequence's own probability.

    Args:
        tokens: (B, T) int32, clean.
        maskable: (B, T), see `maskable`.
        mask_probability: (B,), p(t) of each sequence.
        mask_token_id: what stands in a masked place.
        generator: the step's own; B * T numbers are drawn whatever is maskable.
        at_least_one: mask one token, any with equal chance, where a sequence would have none (for the
            `uniform` weighting; forced masks would make the NELBO diverge). A sequence without maskable
            tokens has none still.

    Returns:
        noisy tokens (B, T) int32 and masked (B, T) bool.

    """
    draws = np.where(maskable, generator.random(tokens.shape), np.inf)
    masked = draws < mask_probability[:, None]
    if at_least_one:
        forced = maskable.any(axis=1) & ~masked.any(axis=1)
        masked[forced, draws[forced].argmin(axis=1)] = True
    return with_masks(tokens, masked, mask_token_id), masked


def exact_counts(
    n_maskable: NDArray[np.int64], share: NDArray[np.float64], *, from_none: bool = False
) -> NDArray[np.int64]:
    """How many tokens of each sequence are masked: uniform shares give uniform counts.

    Args:
        n_maskable: (B,), L of each sequence.
        share: (B,) in (0, 1].
        from_none: False: counts are 1..L. True: 0..L, for pairs of complementary masks: there L - k must have
            the distribution of k, or the second sides would never be all masked.

    Returns:
        (B,) int64, k; 0 where there is nothing to mask.

    """
    n_choices = n_maskable + from_none
    return np.clip(np.ceil(share * n_choices).astype(np.int64) - from_none, 0, n_maskable)


def exact_weight(
    counts: NDArray[np.int64], n_maskable: NDArray[np.int64], *, from_none: bool = False
) -> NDArray[np.float64]:
    """The NELBO weight (B,) of k masks: L / k, or (L + 1) / k if k comes from 0..L; inf at k = 0."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(counts > 0, (n_maskable + from_none) / counts, np.inf)


def corrupt_exactly(
    tokens: NDArray[np.int32],
    maskable: NDArray[np.bool_],
    counts: NDArray[np.int64],
    mask_token_id: int,
    generator: np.random.Generator,
) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
    """Mask a given number of each sequence's maskable tokens, each choice with equal chance.

    Args:
        tokens: (B, T) int32, clean.
        maskable: (B, T), see `maskable`.
        counts: (B,), at most the maskable tokens of the sequence.
        mask_token_id: what stands in a masked place.
        generator: the step's own; B * T numbers are drawn whatever is maskable.

    Returns:
        noisy tokens (B, T) int32 and masked (B, T) bool.

    """
    draws = np.where(maskable, generator.random(tokens.shape), np.inf)
    masked = np.zeros(tokens.shape, dtype=bool)
    in_turn = np.argsort(draws, axis=1, kind="stable")
    np.put_along_axis(masked, in_turn, np.arange(tokens.shape[1]) < counts[:, None], axis=1)
    return with_masks(tokens, masked, mask_token_id), masked


def with_masks(tokens: NDArray[np.int32], masked: NDArray[np.bool_], mask_token_id: int) -> NDArray[np.int32]:
    """Tokens (B, T) int32 with the mask token wherever `masked` (B, T) says so."""
    return np.where(masked, np.int32(mask_token_id), tokens).astype(np.int32, copy=False)


def complement_weight(
    nelbo_weight: NDArray[np.float64], mask_probability: NDArray[np.float64]
) -> NDArray[np.float64]:
    """The NELBO weight of the other side of a mask that was drawn with probability p(t): p'(t) / (1 - p(t)).

    The other side masks a share of 1 - p(t), as a mask of the time t' with p(t') = 1 - p(t) does; but t' is
    not uniform unless the schedule is linear, so that its weight is not p'(t') / p(t'). (In terms of the
    share s the bound is the integral of its cross-entropies over ds / s, and |d(1 - p)| = p' dt.)

    Args:
        nelbo_weight: (B,), p'(t) / p(t) at the drawn times.
        mask_probability: (B,), p(t) at the drawn times.

    Returns:
        (B,), inf where p(t) is 1: nothing is masked there.

    """
    with np.errstate(divide="ignore"):
        return np.asarray(nelbo_weight * mask_probability / (1.0 - mask_probability))


def loss_weights(
    masked: NDArray[np.bool_],
    maskable: NDArray[np.bool_],
    nelbo_weight: NDArray[np.float64],
    weighting: LossWeighting,
    nelbo_clip: float = math.inf,
) -> NDArray[np.float32]:
    """The weight of each token's cross-entropy, so that the loss of an optimizer step is their plain weighted
    sum.

    `uniform`: the mean over the masked tokens. `nelbo`: the bound's weight on the masked tokens over the
    number of maskable ones, an estimate of the NELBO in nats a token. Both divide by one count over the whole
    accumulated batch, which is why all of it is passed at once: an average of averages would weigh short
    sequences more.

    Args:
        masked: (B, T).
        maskable: (B, T).
        nelbo_weight: (B,), of each sequence: p'(t) / p(t), L / k, or that of a complement; `uniform` does not
            look at it.
        weighting: which of the two.
        nelbo_clip: the largest of them that is used. Training only: a clipped sum is not a bound.

    Returns:
        (B, T) float32, by the target's own position, 0 where not masked.

    """
    if weighting == "uniform":
        return (masked / max(1, int(masked.sum()))).astype(np.float32)
    per_token = np.minimum(nelbo_weight, nelbo_clip) / max(1, int(maskable.sum()))
    return np.where(masked, per_token[:, None], 0.0).astype(np.float32)
