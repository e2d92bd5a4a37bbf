"""Held-out figures of a conversion, with the same masks in every arm.

Masked cross-entropy and accuracy when a share t = .15, .5, .85 of the tokens is masked (the share itself, so
that models with different noise schedules are asked the same question; the time embedding gets the time at
which the model's own schedule masks that share); the same with the right side hidden by evaluating at causal
ratio 1, whose difference is the future-context gain, form (a); and the base's own next-token cross-entropy.

Deliberately not here: perplexity bounds, infilling, generation quality. Logits are never held: the engine
returns the cross-entropy of each row.
Letters: B sequences, T tokens.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggml_diffusion.corruption import maskable
from ggml_diffusion.data import TokenBatch
from ggml_diffusion.diffusion_model import DiffusionModel
from ggml_diffusion.engine import Q4Model
from ggml_diffusion.output_rows import to_output_rows
from ggml_diffusion.sampling import time_at_share

MASKED_SHARES = (0.15, 0.5, 0.85)
_MASK_STREAM = 8  # the trainer and the data use lower streams of the same seed


@dataclass(frozen=True)
class Score:
    """Mean cross-entropy in nats and share of right first guesses over `n_tokens` predicted tokens."""

    cross_entropy: float
    accuracy: float
    n_tokens: int


@dataclass(frozen=True)
class MaskedScore:
    """A score at one masked share, and the same with the right side hidden (causal ratio 1)."""

    share: float
    visible: Score
    right_hidden: Score

    @property
    def future_context_gain(self) -> float:
        """Form (a), in nats: cross-entropy at causal ratio 1 minus cross-entropy at the model's own ratio."""
        return self.right_hidden.cross_entropy - self.visible.cross_entropy


def masked_scores(
    model: DiffusionModel, held_out: TokenBatch, batch_size: int, seed: int = 0
) -> list[MaskedScore]:
    """Score a model on held-out sequences at every share of `MASKED_SHARES`.

    Args:
        model: the conversion; one with no LoRA pairs gives the figures before the first step.
        held_out: sequences (B, T).
        batch_size: sequences a forward pass.
        seed: of the masks; the same seed and sequences give the same masks whatever the model is.

    """
    results = []
    for index, share in enumerate(MASKED_SHARES):
        masked = held_out_masks(model, held_out, share, seed, index)
        results.append(
            MaskedScore(
                share,
                visible=_score_masked(model, held_out, masked, share, model.causal_ratio, batch_size),
                right_hidden=_score_masked(model, held_out, masked, share, 1.0, batch_size),
            )
        )
    return results


def held_out_masks(
    model: DiffusionModel, held_out: TokenBatch, share: float, seed: int, stream: int
) -> NDArray[np.bool_]:
    """Which positions (B, T) are masked: each maskable one with probability `share`."""
    generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, _MASK_STREAM + stream]))
    may_mask = maskable(
        held_out.tokens,
        held_out.document_ids,
        held_out.lengths,
        model.prediction,
        model.tokenizer.bos_id,
        model.mask_token_id,
    )
    result: NDArray[np.bool_] = (generator.random(held_out.tokens.shape) < share) & may_mask
    return result


def base_score(engine: Q4Model, held_out: TokenBatch, batch_size: int) -> Score:
    """Next-token score of the base alone: no adapter, causal attention, clean text.

    Every token is scored that has another of its document to its left.
    """
    predicted = maskable(held_out.tokens, held_out.document_ids, held_out.lengths, "shifted", None)
    targets, weights = to_output_rows(
        held_out.tokens, predicted.astype(np.float32), held_out.document_ids, "shifted"
    )
    totals = _Totals()
    for rows in _chunks(len(held_out.tokens), batch_size):
        result = engine.loss(
            held_out.tokens[rows],
            targets[rows],
            weights[rows],
            1.0,
            None,
            lengths=held_out.lengths[rows],
            document_ids=held_out.document_ids[rows],
        )
        totals.add(result.row_loss, result.row_correct, weights[rows] != 0.0)
    return totals.score()


def _score_masked(
    model: DiffusionModel,
    held_out: TokenBatch,
    masked: NDArray[np.bool_],
    share: float,
    causal_ratio: float,
    batch_size: int,
) -> Score:
    noisy = np.where(masked, np.int32(model.mask_token_id), held_out.tokens)
    targets, weights = to_output_rows(
        held_out.tokens, masked.astype(np.float32), held_out.document_ids, model.prediction
    )
    t = time_at_share(share, model.noise_schedule.mask_probability)
    totals = _Totals()
    for rows in _chunks(len(noisy), batch_size):
        result = model.engine.loss(
            noisy[rows],
            targets[rows],
            weights[rows],
            causal_ratio,
            model.adapter,
            model.embedding_offset(np.full(len(noisy[rows]), t, dtype=np.float32)),
            lengths=held_out.lengths[rows],
            document_ids=held_out.document_ids[rows],
        )
        totals.add(result.row_loss, result.row_correct, weights[rows] != 0.0)
    return totals.score()


class _Totals:
    """Sums over the counted rows of several batches."""

    def __init__(self) -> None:
        self.loss = 0.0
        self.n_correct = 0
        self.n_tokens = 0

    def add(
        self, row_loss: NDArray[np.float32], row_correct: NDArray[np.bool_], counted: NDArray[np.bool_]
    ) -> None:
        self.loss += float(row_loss[counted].sum(dtype=np.float64))
        self.n_correct += int(row_correct[counted].sum())
        self.n_tokens += int(counted.sum())

    def score(self) -> Score:
        if self.n_tokens == 0:
            return Score(float("nan"), float("nan"), 0)
        return Score(self.loss / self.n_tokens, self.n_correct / self.n_tokens, self.n_tokens)


def _chunks(n_items: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, n_items)) for start in range(0, n_items, size)]


def as_rows(scores: list[MaskedScore]) -> list[dict[str, Any]]:
    """The scores as plain values for JSON, the future-context gain included."""
    return [{**asdict(one), "future_context_gain": one.future_context_gain} for one in scores]
