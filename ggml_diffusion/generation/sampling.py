"""The sampler of masked diffusion in plain NumPy: how many tokens to reveal, what they say, which go first.

Deliberately not here: the model and the loop over steps (denoise.py).
Sources: reveal counts, MDLM [Sahoo et al. 2024, arXiv:2406.07524]; confidence order, LLaDA [Nie et al. 2025,
arXiv:2502.09992]; margin order [Kim et al. 2025, arXiv:2502.06768]; threshold, Fast-dLLM [Wu et al. 2025,
arXiv:2505.22618]; float64 Gumbel noise, because float32 noise cuts off the tail and lowers the temperature
[Zheng et al. 2024, arXiv:2409.02908].
Letters: N candidate positions, V vocabulary.
"""

from collections.abc import Callable
from enum import Enum

import numpy as np
from numpy.typing import NDArray

ROWS_AT_ONCE = 32  # float64 copies of logits are V * 8 bytes a row, several at a time


class RevealOrder(str, Enum):
    """Which of the masked positions are revealed first."""

    RANDOM = "random"
    CONFIDENCE = "confidence"
    MARGIN = "margin"
    ENTROPY = "entropy"
    THRESHOLD = "threshold"


def reveal_counts(
    n_masks: int, n_steps: int, mask_probability: Callable[[NDArray[np.float64]], NDArray[np.float64]]
) -> NDArray[np.int64]:
    """How many masks each step removes, so that the share left follows the noise schedule from t = 1 to t =
    0.

    Args:
        n_masks: masks at the start.
        n_steps: steps, at least 1; more steps than masks leave some steps with nothing to reveal.
        mask_probability: the schedule p(t), rising from p(0) = 0 to p(1) = 1.

    Returns:
        (n_steps,) counts of at least 0 that add up to `n_masks`.

    """
    if n_steps < 1 or n_masks < 0:
        raise ValueError(f"need at least one step and no negative count, not {n_steps} and {n_masks}")
    time = 1.0 - np.arange(n_steps + 1) / n_steps
    masks_left = np.rint(n_masks * np.asarray(mask_probability(time), dtype=np.float64)).astype(np.int64)
    masks_left[0], masks_left[-1] = n_masks, 0
    return -np.diff(masks_left)


def block_steps(block_sizes: list[int], n_steps: int) -> list[int]:
    """Share `n_steps` out over blocks in proportion to their masks, at least one step for each block.

    The shares add up to `n_steps` wherever there are at least as many steps as blocks.
    """
    total = sum(block_sizes)
    shares: list[int] = []
    masks_before = steps_before = 0
    for index, size in enumerate(block_sizes):
        masks_before += size
        blocks_after = len(block_sizes) - index - 1
        end = min(round(n_steps * masks_before / total), n_steps - blocks_after)
        shares.append(max(1, end - steps_before))
        steps_before += shares[-1]
    return shares


def propose(
    logits: NDArray[np.float32],
    order: RevealOrder,
    generator: np.random.Generator,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> tuple[NDArray[np.int32], NDArray[np.float64]]:
    """Draw a token for each candidate position and say how good a choice it is.

    Args:
        logits: (N, V), -inf for tokens that must never be drawn.
        order: what the score measures.
        generator: the only source of randomness.
        temperature: of the draw; 0 takes the likeliest token.
        top_k: draw from the k likeliest tokens only; 0 = from all.
        top_p: draw from the smallest set of likeliest tokens that holds this much probability; 1 = from all.

    Returns:
        tokens (N,), and scores (N,), higher = reveal sooner. Scores come from the probabilities before
        temperature, truncation and noise, so that noise in the draw does not pass for confidence.

    """
    tokens = np.empty(len(logits), dtype=np.int32)
    scores = np.empty(len(logits), dtype=np.float64)
    for start in range(0, len(logits), ROWS_AT_ONCE):
        rows = slice(start, start + ROWS_AT_ONCE)
        log_probabilities = log_softmax(logits[rows])
        tokens[rows] = draw(log_probabilities, generator, temperature=temperature, top_k=top_k, top_p=top_p)
        scores[rows] = score(log_probabilities, tokens[rows], order, generator)
    return tokens, scores


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    """Log-probabilities (N, V) in float64; logits of -inf stay -inf."""
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return result


def draw(
    log_probabilities: NDArray[np.float64],
    generator: np.random.Generator,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
) -> NDArray[np.int64]:
    """One token for each row (N, V): tempered, cut to top k, then to top p, drawn by the Gumbel trick."""
    if temperature == 0.0:
        return np.asarray(log_probabilities.argmax(axis=-1))
    drawn = []
    for row in log_probabilities:
        kept, values = keep_likely(row, temperature=temperature, top_k=top_k, top_p=top_p)
        drawn.append(kept[(values + generator.gumbel(size=len(kept))).argmax()])
    return np.array(drawn, dtype=np.int64)


def keep_likely(
    log_probabilities: NDArray[np.float64], *, temperature: float, top_k: int, top_p: float
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Of one row (V,) the tokens that are drawn from, and their tempered log-probabilities, not normalised.

    The temperature is above 0; for the rest see `propose`.
    """
    with np.errstate(over="ignore"):
        tempered = log_probabilities / temperature
        if not np.isfinite(tempered.max()):  # so low that only the likeliest is left
            tempered = (log_probabilities - log_probabilities.max()) / temperature
    tempered = _keep_top_k(tempered, top_k)
    kept = _nucleus(tempered, top_p) if top_p < 1.0 else np.arange(len(tempered))
    return kept, tempered[kept]


def _keep_top_k(values: NDArray[np.float64], top_k: int) -> NDArray[np.float64]:
    """Set all but the k largest (V,) to -inf; ties with the k-th are kept."""
    if top_k <= 0 or top_k >= len(values):
        return values
    kth_largest = np.partition(values, len(values) - top_k)[len(values) - top_k]
    return np.where(values >= kth_largest, values, -np.inf)


def _nucleus(values: NDArray[np.float64], top_p: float) -> NDArray[np.int64]:
    """The smallest set of likeliest tokens (V,) that holds `top_p` of the probability; at least one token."""
    probabilities = np.exp(values - values.max())
    probabilities /= probabilities.sum()
    # Few tokens need sorting: the set is among those above a floor if these hold `top_p`; what is below the
    # last floor holds less than the rest.
    for floor in (1e-3, 1e-5, (1.0 - top_p) / len(values)):
        among = np.flatnonzero(probabilities >= floor)
        if probabilities[among].sum() > top_p + 1e-9:  # more than sums in another order may differ by
            break
    descending = among[np.argsort(-probabilities[among], kind="stable")]
    ranked = probabilities[descending]
    mass_before = np.cumsum(ranked) - ranked
    return descending[: max(1, int((mass_before < top_p).sum()))]


def score(
    log_probabilities: NDArray[np.float64],
    tokens: NDArray[np.int32],
    order: RevealOrder,
    generator: np.random.Generator,
) -> NDArray[np.float64]:
    """How soon each position should be revealed (N,), higher = sooner.

    random: a uniform number; confidence and threshold: the probability of the drawn token; margin: of the
    likeliest token over the second; entropy: the distribution's entropy in nats, negated.
    """
    if order is RevealOrder.RANDOM:
        return generator.random(len(tokens))
    if order in (RevealOrder.CONFIDENCE, RevealOrder.THRESHOLD):
        chosen = np.take_along_axis(log_probabilities, tokens[:, None].astype(np.int64), axis=-1)
        return np.exp(chosen[:, 0])
    probabilities = np.exp(log_probabilities)
    if order is RevealOrder.MARGIN:
        two_largest = np.partition(probabilities, -2, axis=-1)[:, -2:]
        margin: NDArray[np.float64] = two_largest[:, 1] - two_largest[:, 0]
        return margin
    finite = np.where(probabilities > 0.0, log_probabilities, 0.0)  # 0 * log 0 counts as 0
    result: NDArray[np.float64] = (probabilities * finite).sum(axis=-1)
    return result


def highest(scores: NDArray[np.float64], count: int) -> NDArray[np.int64]:
    """Indices of the `count` highest scores; of equal ones the first."""
    return np.argsort(-scores, kind="stable")[:count]
