"""How well text is predicted as a whole: the NELBO of the conversion, and what to hold beside it.

The negative evidence lower bound is estimated with exact counts: of the L tokens of a sequence that may be
masked, k are masked, k uniform on 1..L, and the sum of their cross-entropies counts L / k times. Its mean
over masks is the bound on -log p(text | first tokens of its documents), the same as the integral over
continuous time of p'/p [RADD, Ou et al. 2024, arXiv:2406.03736; LLaDA, Nie et al. 2025,
arXiv:2502.09992, appendix A].
Nothing is clipped, so it may be exponentiated. k is drawn with low discrepancy over the sequences.

Beside it: ln V, the unigram distribution of the training text, and the base's own next-token loss; all on the
same tokens.
Letters: B sequences, T tokens, S mask seeds, V vocabulary, L tokens of a sequence that may be masked.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ggml_diffusion.evaluation.estimates import Estimate, estimate_ratio, exponential
from ggml_diffusion.evaluation.scoring import (
    OnTokens,
    ignore_tokens,
    score_masked,
)
from ggml_diffusion.generation.diffusion_model import DiffusionModel
from ggml_diffusion.objective.corruption import corrupt_exactly, exact_counts, stratified_times
from ggml_diffusion.randomness import Stream, generator_of
from ggml_diffusion.text.loader import TokenBatch


@dataclass(frozen=True)
class Likelihood:
    """Negative log-likelihood, or a bound on it.

    Attributes:
        nats_per_token: over the tokens predicted.
        bits_per_byte: the same sum over the bytes of their text; a control token has none.
        perplexity: exp of nats a token; of a NELBO it is an upper bound.
        by_seed: nats a token of each mask seed by itself; empty where there are no masks.

    """

    nats_per_token: Estimate
    bits_per_byte: Estimate
    perplexity: Estimate
    by_seed: list[float]


def exact_count_masks(
    held_out: TokenBatch, may_mask: NDArray[np.bool_], mask_token_id: int, generator: np.random.Generator
) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Mask exactly k of the L maskable tokens of each sequence, k uniform on 1..L.

    Args:
        held_out: clean sequences (B, T).
        may_mask: (B, T).
        mask_token_id: of the model; the choice does not depend on it.
        generator: of this seed.

    Returns:
        masked (B, T) and k (B,); 0 where a sequence has no token that may be masked.

    """
    shares = stratified_times(len(may_mask), generator)  # uniform on (0, 1], spread over the sequences
    counts = exact_counts(may_mask.sum(axis=1), shares)
    _, masked = corrupt_exactly(held_out.tokens, may_mask, counts, mask_token_id, generator)
    return masked, counts


def nelbo_totals(
    model: DiffusionModel,
    held_out: TokenBatch,
    may_mask: NDArray[np.bool_],
    *,
    n_seeds: int,
    seed: int,
    batch_size: int,
    on_tokens: OnTokens = ignore_tokens,
) -> NDArray[np.float64]:
    """Estimates (S, B) of the NELBO of each sequence in nats, one for each mask seed."""
    n_maskable = may_mask.sum(axis=1)
    totals = np.zeros((n_seeds, len(may_mask)))
    for repeat in range(n_seeds):
        masked, n_masked = exact_count_masks(
            held_out, may_mask, model.mask_token_id, generator_of(seed, repeat, Stream.NELBO)
        )
        shares = n_masked / np.maximum(n_maskable, 1)
        scores = score_masked(model, held_out, masked, shares, model.rule.causal_ratio, batch_size, on_tokens)
        sums = scores.loss.sum(axis=1, dtype=np.float64)
        totals[repeat] = sums * n_maskable / np.maximum(n_masked, 1)
    return totals


def unigram_losses(
    counts: NDArray[np.int64], tokens: NDArray[np.int32], scored: NDArray[np.bool_]
) -> NDArray[np.float64]:
    """Cross-entropy in nats (B, T) under the training text's token frequencies; 0 where not scored.

    Half a count is added to every token of the vocabulary, so that none is impossible [Krichevsky & Trofimov
    1981].

    Args:
        counts: (V,), of the training split.
        tokens: (B, T).
        scored: (B, T).

    """
    probability = (counts + 0.5) / (counts.sum() + 0.5 * len(counts))
    return np.where(scored, -np.log(probability[tokens]), 0.0)


def likelihood(
    sequence_nats: NDArray[np.float64], n_tokens: NDArray[np.integer], n_bytes: NDArray[np.integer]
) -> Likelihood:
    """Means over sequences.

    Args:
        sequence_nats: (S, B) by mask seed, or (B,).
        n_tokens: (B,) tokens that were predicted.
        n_bytes: (B,) bytes of their text.

    """
    by_seed = np.atleast_2d(sequence_nats)
    mean = by_seed.mean(axis=0)
    nats = estimate_ratio(mean, n_tokens)
    seeds = by_seed.sum(axis=1) / max(1, int(n_tokens.sum()))
    return Likelihood(
        nats,
        estimate_ratio(mean / math.log(2), n_bytes),
        exponential(nats),
        [float(value) for value in seeds] if sequence_nats.ndim == 2 else [],
    )
