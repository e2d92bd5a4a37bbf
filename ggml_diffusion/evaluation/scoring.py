"""How well each held-out token is predicted: the engine's losses, by token, in every arm.

An arm is a model with a causal ratio: the conversion as it is, the conversion at causal ratio 1, the base
read as a diffusion model before the first step, the base itself. All arms predict the same tokens: those that
have another token of their document to their left, whatever the prediction is, so that their figures compare.

Deliberately not here: which tokens are masked, and means (the measures beside this file). Logits are never
held: the engine returns the cross-entropy of each row.
Letters: B sequences, T tokens.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ggml_diffusion.engine.interface import Batch, Engine, LossResult
from ggml_diffusion.generation.diffusion_model import DiffusionModel
from ggml_diffusion.generation.frozen_context import rows_batch
from ggml_diffusion.objective.corruption import predictable
from ggml_diffusion.objective.output_rows import Prediction, to_output_rows, to_positions
from ggml_diffusion.objective.standing_rows import NOTHING, lay_out_rows
from ggml_diffusion.text.loader import TokenBatch

OnTokens = Callable[[int], None]  # told how many tokens have gone through the model


@dataclass(frozen=True)
class TokenScores:
    """How each scored token was predicted.

    Attributes:
        loss: (B, T) float32, cross-entropy in nats by the token's own position; 0 where it is not scored.
        correct: (B, T) bool, whether it was the likeliest token.

    """

    loss: NDArray[np.float32]
    correct: NDArray[np.bool_]


def ignore_tokens(n_tokens: int) -> None:
    """An `OnTokens` that does nothing."""


def scorable(held_out: TokenBatch, bos_id: int | None, mask_token_id: int | None) -> NDArray[np.bool_]:
    """The tokens (B, T) that every arm can predict: with another token to their left."""
    return predictable(held_out, "shifted", bos_id, mask_token_id)


def score_masked(
    model: DiffusionModel,
    held_out: TokenBatch,
    masked: NDArray[np.bool_],
    shares: NDArray[np.floating],
    causal_ratio: float,
    batch_size: int,
    on_tokens: OnTokens = ignore_tokens,
) -> TokenScores:
    """Predict masked tokens from all others.

    Args:
        model: the arm.
        held_out: clean sequences (B, T).
        masked: (B, T), which tokens are masked, and scored.
        shares: (B,) share of a sequence's tokens that is masked; the time embedding gets the time at which
            the model's own noise schedule masks that share.
        causal_ratio: of the attention mask.
        batch_size: sequences a forward pass.
        on_tokens: told about progress.

    """
    noisy = np.where(masked, np.int32(model.mask_token_id), held_out.tokens)
    return score_noisy(model, held_out, noisy, masked, shares, causal_ratio, batch_size, on_tokens)


def score_noisy(
    model: DiffusionModel,
    clean: TokenBatch,
    noisy: NDArray[np.int32],
    scored: NDArray[np.bool_],
    shares: NDArray[np.floating],
    causal_ratio: float,
    batch_size: int,
    on_tokens: OnTokens = ignore_tokens,
) -> TokenScores:
    """As `score_masked`, where not all that is masked in `noisy` (B, T) is scored."""
    times = model.rule.noise_schedule.times_at(shares)
    if model.rule.context == "frozen":
        return _score_noisy_rows(model, clean, noisy, scored, times, causal_ratio, batch_size, on_tokens)

    def forward(rows: slice, targets: NDArray[np.int32], weights: NDArray[np.float32]) -> LossResult:
        batch = Batch(
            noisy[rows],
            causal_ratio,
            clean.lengths[rows],
            clean.document_ids[rows],
            model.rule.embedding_offset(times[rows]),
            attention_sink=model.rule.attention_sink,
        )
        return model.engine.loss(batch, targets, weights, model.adapter)

    return _score(clean, scored, model.rule.prediction, batch_size, forward, on_tokens)


def _score_noisy_rows(
    model: DiffusionModel,
    clean: TokenBatch,
    noisy: NDArray[np.int32],
    scored: NDArray[np.bool_],
    times: NDArray[np.float64],
    causal_ratio: float,
    batch_size: int,
    on_tokens: OnTokens,
) -> TokenScores:
    """`score_noisy` with a frozen context: the masks of a document see each other and all that stands."""
    n_tokens = clean.tokens.shape[1]
    documents = np.cumsum(np.diff(clean.document_ids, axis=1, prepend=clean.document_ids[:, :1]) != 0, axis=1)
    masked = (noisy == model.mask_token_id) & (noisy != clean.tokens)
    groups = np.where(masked, documents, NOTHING).astype(np.int32)
    loss, correct = np.zeros(noisy.shape, dtype=np.float32), np.zeros(noisy.shape, dtype=bool)
    for part in chunks(len(noisy), batch_size):
        rows = lay_out_rows(
            clean.tokens[part],
            noisy[part],
            masked[part],
            groups[part],
            clean.lengths[part],
            clean.document_ids[part],
            model.rule.prediction,
            margin=model.rule.margin,
        )
        where = np.arange(len(noisy))[part][rows.lengths > 0]  # a sequence without a mask has no row
        if len(where):
            rows = rows.of_sequences(rows.lengths > 0)
            offset = model.rule.embedding_offset(times[where])
            result = model.engine.loss(
                rows_batch(rows, causal_ratio, offset, n_positions=n_tokens),
                rows.of_rows(clean.tokens[where]),
                rows.of_rows(scored[where].astype(np.float32)),
                model.adapter,
            )
            loss[where] = rows.of_tokens(result.row_loss, n_tokens)
            correct[where] = rows.of_tokens(result.row_correct, n_tokens)
        on_tokens(int(clean.lengths[part].sum()))
    return TokenScores(np.where(scored, loss, 0.0).astype(np.float32), correct & scored)


def score_base(
    engine: Engine,
    held_out: TokenBatch,
    scored: NDArray[np.bool_],
    batch_size: int,
    on_tokens: OnTokens = ignore_tokens,
) -> TokenScores:
    """Predict tokens with the base itself: no adapter, causal attention, clean text on the left."""

    def forward(rows: slice, targets: NDArray[np.int32], weights: NDArray[np.float32]) -> LossResult:
        batch = Batch(held_out.tokens[rows], 1.0, held_out.lengths[rows], held_out.document_ids[rows])
        return engine.loss(batch, targets, weights)

    return _score(held_out, scored, "shifted", batch_size, forward, on_tokens)


def _score(
    clean: TokenBatch,
    scored: NDArray[np.bool_],
    prediction: Prediction,
    batch_size: int,
    forward: Callable[[slice, NDArray[np.int32], NDArray[np.float32]], LossResult],
    on_tokens: OnTokens,
) -> TokenScores:
    targets, weights = to_output_rows(clean.tokens, scored.astype(np.float32), clean.document_ids, prediction)
    loss = np.zeros(clean.tokens.shape, dtype=np.float32)
    correct = np.zeros(clean.tokens.shape, dtype=bool)
    for rows in chunks(len(clean.tokens), batch_size):
        result = forward(rows, targets[rows], weights[rows])
        loss[rows] = to_positions(result.row_loss, prediction)
        correct[rows] = to_positions(result.row_correct, prediction)
        on_tokens(int(clean.lengths[rows].sum()))
    return TokenScores(np.where(scored, loss, 0.0).astype(np.float32), correct & scored)


def chunks(n_items: int, size: int) -> list[slice]:
    """Slices of at most `size` that cover `n_items`."""
    return [slice(start, min(start + size, n_items)) for start in range(0, n_items, size)]
