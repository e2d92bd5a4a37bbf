"""Masked cross-entropy and accuracy of every arm, and how much of it comes from the right side.

At each share t = .15, .5, .85 every token that may be masked is masked with probability t (the share itself,
so that models with different noise schedules are asked the same question). Arms: the conversion; the
conversion at causal ratio 1; the base before the first step, bidirectional and causal; the base itself on
clean text, scored on the tokens that are masked for the others; a causal control, if there is one.

Future-context gain, in nats: cross-entropy with the right side hidden minus with it visible. Hidden by
(a) evaluating the conversion at causal ratio 1: cheap, but the model was not trained for it;
(b) masking every token to the right of the one that is predicted, one forward pass for each, on a subsample;
(c) training: a control that was trained at causal ratio 1 throughout, on the same tokens, seeds and steps.
Letters: B sequences, T tokens, S mask seeds.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ggml_diffusion.evaluation.estimates import Estimate, estimate_ratio
from ggml_diffusion.evaluation.scoring import (
    OnTokens,
    TokenScores,
    ignore_tokens,
    score_masked,
    score_noisy,
)
from ggml_diffusion.generation.diffusion_model import DiffusionModel
from ggml_diffusion.randomness import Stream, generator_of
from ggml_diffusion.text.loader import TokenBatch

MASKED_SHARES = (0.15, 0.5, 0.85)


@dataclass(frozen=True)
class ArmScore:
    """One arm at one share.

    Attributes:
        cross_entropy: nats a masked token.
        accuracy: share of masked tokens that are the likeliest.
        by_seed: cross-entropy of each mask seed by itself.

    """

    cross_entropy: Estimate
    accuracy: Estimate
    by_seed: list[float]


@dataclass(frozen=True)
class MaskedComparison:
    """All arms at one share t.

    Attributes:
        share: t.
        arms: by name.
        gain: future-context gain in nats by form, "a", and "b" and "c" where they were measured.

    """

    share: float
    arms: dict[str, ArmScore]
    gain: dict[str, Estimate]


def random_masks(may_mask: NDArray[np.bool_], share: float, seed: int, repeat: int) -> NDArray[np.bool_]:
    """Mask each token that may be (B, T) with probability `share`; a higher share masks a superset."""
    draws = generator_of(seed, repeat, Stream.MASKS).random(may_mask.shape)
    result: NDArray[np.bool_] = (draws < share) & may_mask
    return result


def compare_arms(
    arms: Mapping[str, tuple[DiffusionModel, float]],
    base: TokenScores,
    held_out: TokenBatch,
    may_mask: NDArray[np.bool_],
    *,
    n_seeds: int,
    n_one_by_one: int,
    seed: int,
    batch_size: int,
    on_tokens: OnTokens = ignore_tokens,
) -> list[MaskedComparison]:
    """Score all arms on the same masks.

    Args:
        arms: name -> model and causal ratio. "converted" must be among them; "converted_causal" gives form
            (a) of the gain, "control" form (c).
        base: scores of the base itself on every token that may be masked.
        held_out: clean sequences.
        may_mask: (B, T).
        n_seeds: mask seeds.
        n_one_by_one: tokens a share for form (b) of the gain, taken from the masks of the first seed.
        seed: of all draws.
        batch_size: sequences a forward pass.
        on_tokens: told about progress.

    """
    results = []
    for index, share in enumerate(MASKED_SHARES):
        masks = [random_masks(may_mask, share, seed, repeat) for repeat in range(n_seeds)]
        shares = np.full(len(may_mask), share)
        scores = {
            name: [
                score_masked(model, held_out, masked, shares, ratio, batch_size, on_tokens)
                for masked in masks
            ]
            for name, (model, ratio) in arms.items()
        }
        scores["base"] = [
            TokenScores(np.where(masked, base.loss, 0.0), base.correct & masked) for masked in masks
        ]
        gain = {}
        for form, hidden in (("a", "converted_causal"), ("c", "control")):
            if hidden in scores:
                gain[form] = _gain(scores[hidden], scores["converted"], masks)
        if n_one_by_one > 0:
            chosen = _subsample(masks[0], n_one_by_one, generator_of(seed, index, Stream.SUBSAMPLE))
            hidden_loss = right_masked_losses(
                arms["converted"][0], held_out, masks[0], may_mask, chosen, batch_size, on_tokens
            )
            visible_loss = scores["converted"][0].loss[chosen].astype(np.float64)
            gain["b"] = _by_sequence(hidden_loss - visible_loss, chosen[0], len(may_mask))
        arm_scores = {name: _arm_score(several, masks) for name, several in scores.items()}
        results.append(MaskedComparison(share, arm_scores, dict(sorted(gain.items()))))
    return results


def right_masked_losses(
    model: DiffusionModel,
    held_out: TokenBatch,
    masked: NDArray[np.bool_],
    may_mask: NDArray[np.bool_],
    chosen: tuple[NDArray[np.int64], NDArray[np.int64]],
    batch_size: int,
    on_tokens: OnTokens = ignore_tokens,
) -> NDArray[np.float64]:
    """Cross-entropy (N,) of tokens with all to their right masked, and the left as `masked` has it.

    Args:
        model: at its own causal ratio.
        held_out: clean sequences (B, T).
        masked: (B, T).
        may_mask: (B, T), for the share that is masked, whose time the time embedding gets.
        chosen: sequence and position (N,) each of the tokens to predict.
        batch_size: sequences a forward pass.
        on_tokens: told about progress.

    """
    sequence, position = chosen
    clean = TokenBatch(held_out.tokens[sequence], held_out.lengths[sequence], held_out.document_ids[sequence])
    is_right = np.arange(clean.tokens.shape[1]) > position[:, None]
    hidden = masked[sequence] | is_right
    noisy = np.where(hidden, np.int32(model.mask_token_id), clean.tokens)
    scored = np.zeros(noisy.shape, dtype=bool)
    scored[np.arange(len(position)), position] = True
    can = may_mask[sequence]
    shares = (hidden & can).sum(axis=1) / np.maximum(1, can.sum(axis=1))
    scores = score_noisy(model, clean, noisy, scored, shares, model.rule.causal_ratio, batch_size, on_tokens)
    return scores.loss[scored].astype(np.float64)


def _subsample(
    masked: NDArray[np.bool_], n: int, generator: np.random.Generator
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Sequence and position of at most n masked tokens, in order, drawn without replacement."""
    places = np.flatnonzero(masked)
    drawn = np.sort(generator.choice(places, size=min(n, len(places)), replace=False))
    sequence, position = np.unravel_index(drawn, masked.shape)
    return np.asarray(sequence, dtype=np.int64), np.asarray(position, dtype=np.int64)


def _by_sequence(values: NDArray[np.float64], sequence: NDArray[np.int64], n_sequences: int) -> Estimate:
    """The mean of values (N,), each of one of several sequences."""
    return estimate_ratio(
        np.bincount(sequence, values, minlength=n_sequences), np.bincount(sequence, minlength=n_sequences)
    )


def _sums(scores: list[TokenScores]) -> NDArray[np.float64]:
    """Cross-entropies (B,) summed over tokens and seeds."""
    result: NDArray[np.float64] = np.stack([one.loss for one in scores]).sum(axis=(0, 2), dtype=np.float64)
    return result


def _gain(hidden: list[TokenScores], visible: list[TokenScores], masks: list[NDArray[np.bool_]]) -> Estimate:
    """The mean difference; the two are paired by sequence, which is what makes its interval narrow."""
    return estimate_ratio(_sums(hidden) - _sums(visible), np.sum(masks, axis=(0, 2)))


def _arm_score(scores: list[TokenScores], masks: list[NDArray[np.bool_]]) -> ArmScore:
    counts = np.sum(masks, axis=(0, 2))
    n_correct = np.stack([one.correct for one in scores]).sum(axis=(0, 2))
    return ArmScore(
        estimate_ratio(_sums(scores), counts),
        estimate_ratio(n_correct, counts),
        [
            float(one.loss.sum(dtype=np.float64) / max(1, masked.sum()))
            for one, masked in zip(scores, masks, strict=True)
        ],
    )
