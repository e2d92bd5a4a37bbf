"""Held-out figures of a conversion in short: what `convert --evaluate` measures before and after a run.

Masked cross-entropy and accuracy when a share t = .15, .5, .85 of the tokens is masked, by one mask seed; the
same with the right side hidden by evaluating at causal ratio 1, whose difference is the future-context gain,
form (a); and the base's own next-token cross-entropy.

Deliberately not here: all else, and how sure the figures are (evaluation/).
Letters: B sequences, T tokens.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggml_diffusion.engine.interface import Engine
from ggml_diffusion.evaluation.masked import MASKED_SHARES, random_masks
from ggml_diffusion.evaluation.scoring import TokenScores, scorable, score_base, score_masked
from ggml_diffusion.generation.diffusion_model import DiffusionModel
from ggml_diffusion.text.loader import TokenBatch


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
    may_mask = scorable(held_out, model.tokenizer.bos_id, model.mask_token_id)
    results = []
    for share in MASKED_SHARES:
        masked = random_masks(may_mask, share, seed, 0)
        shares = np.full(len(masked), share)
        visible, right_hidden = (
            _mean(score_masked(model, held_out, masked, shares, causal_ratio, batch_size), masked)
            for causal_ratio in (model.rule.causal_ratio, 1.0)
        )
        results.append(MaskedScore(share, visible, right_hidden))
    return results


def base_score(engine: Engine, held_out: TokenBatch, batch_size: int) -> Score:
    """Next-token score of the base alone: no adapter, causal attention, clean text.

    Every token is scored that has another of its document to its left.
    """
    scored = scorable(held_out, None, None)
    return _mean(score_base(engine, held_out, scored, batch_size), scored)


def as_rows(scores: list[MaskedScore]) -> list[dict[str, Any]]:
    """The scores as plain values for JSON, the future-context gain included."""
    return [{**asdict(one), "future_context_gain": one.future_context_gain} for one in scores]


def _mean(scores: TokenScores, scored: NDArray[np.bool_]) -> Score:
    n_tokens = int(scored.sum())
    if n_tokens == 0:
        return Score(float("nan"), float("nan"), 0)
    loss = float(scores.loss.sum(dtype=np.float64))
    return Score(loss / n_tokens, int(scores.correct.sum()) / n_tokens, n_tokens)
