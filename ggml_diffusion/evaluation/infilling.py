"""Spans of 1, 4 and 8 tokens cut out of held-out text, and put back by those who can and cannot look ahead.

Arms, on the same holes: the conversion, which sees both sides (one token a step, the most certain place
first, the most probable token); the base's greedy continuation of the left side; and the best of n
continuations that the base samples (the greedy one is added to them), chosen by how likely they make the true
right side. The last one has both sides too, and costs n times as much.

Scores: exact match of the whole span, and share of its tokens that are right.
Letters: N holes, S candidates, K tokens of a hole.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ggml_diffusion.engine.interface import Engine
from ggml_diffusion.evaluation.continuation import (
    continuation_losses,
    continue_greedily,
    continue_sampled,
)
from ggml_diffusion.evaluation.estimates import Estimate, estimate_ratio
from ggml_diffusion.evaluation.scoring import (
    OnTokens,
    ignore_tokens,
)
from ggml_diffusion.generation.denoise import GenerationConfig
from ggml_diffusion.generation.diffusion_model import DiffusionModel
from ggml_diffusion.generation.sampling import RevealOrder
from ggml_diffusion.randomness import Stream, generator_of
from ggml_diffusion.text.loader import TokenBatch

SPAN_LENGTHS = (1, 4, 8)
MIN_CONTEXT = 8  # tokens on each side of a hole, at least


@dataclass(frozen=True)
class Hole:
    """A span of a text.

    Attributes:
        sequence: which held-out sequence it is from.
        text: (T,) its document, as far as the sequence has it.
        start: first position of the span in it.
        length: K.

    """

    sequence: int
    text: NDArray[np.int32]
    start: int
    length: int

    @property
    def answer(self) -> NDArray[np.int32]:
        """The true tokens (K,)."""
        return self.text[self.start : self.start + self.length]

    def filled(self, tokens: NDArray[np.int32]) -> NDArray[np.int32]:
        """The text (T,) with other tokens (K,) in the hole."""
        text = self.text.copy()
        text[self.start : self.start + self.length] = tokens
        return text


@dataclass(frozen=True)
class InfillScore:
    """One arm on spans of one length."""

    exact_match: Estimate
    token_accuracy: Estimate


@dataclass(frozen=True)
class InfillComparison:
    """All arms on spans of one length.

    Attributes:
        span_length: K.
        n_holes: N.
        arms: "converted", "left_only", "reranked".
        advantage: the conversion's scores minus those of "left_only" and of "reranked", paired by hole: its
            intervals are narrower than those of the two scores.

    """

    span_length: int
    n_holes: int
    arms: dict[str, InfillScore]
    advantage: dict[str, InfillScore]


def cut_holes(
    held_out: TokenBatch, length: int, per_sequence: int, mask_token_id: int, seed: int
) -> list[Hole]:
    """Holes at random places, `per_sequence` of each sequence, with `MIN_CONTEXT` tokens on both sides.

    A hole and its context are of one document, and no prompt is cut. Sequences without room for one give
    none; holes of a sequence may overlap.
    """
    may_cut = np.ones(held_out.tokens.shape, dtype=bool) if held_out.maskable is None else held_out.maskable
    generator = generator_of(seed, length, Stream.HOLES)
    holes = []
    for sequence, (tokens, n_tokens, documents) in enumerate(
        zip(held_out.tokens, held_out.lengths, held_out.document_ids, strict=True)
    ):
        places, offset = [], 0
        for text in document_parts(tokens[:n_tokens], documents[:n_tokens]):
            cut = may_cut[sequence, offset : offset + len(text)]
            offset += len(text)
            if not (text == mask_token_id).any():  # as context it would be taken for a hole
                starts = range(MIN_CONTEXT, len(text) - length - MIN_CONTEXT + 1)
                places += [(text, start) for start in starts if cut[start : start + length].all()]
        for place in generator.permutation(len(places))[:per_sequence]:
            holes.append(Hole(sequence, places[place][0], places[place][1], length))
    return holes


def document_parts(tokens: NDArray[np.int32], document_ids: NDArray[np.int32]) -> list[NDArray[np.int32]]:
    """A sequence (T,) cut where its documents end."""
    return np.split(tokens, np.flatnonzero(np.diff(document_ids)) + 1)


def compare_infilling(
    model: DiffusionModel,
    holes: list[Hole],
    n_candidates: int,
    *,
    seed: int,
    batch_size: int,
    on_tokens: OnTokens = ignore_tokens,
) -> InfillComparison:
    """Fill holes of one length in every arm.

    Args:
        model: the conversion; its engine is the base.
        holes: at least one, all of one length.
        n_candidates: samples of the base for the re-ranked arm.
        seed: of the samples.
        batch_size: texts a forward pass where suffixes are scored.
        on_tokens: told about progress.

    """
    length, engine = holes[0].length, model.engine
    prefixes = [hole.text[: hole.start] for hole in holes]
    left_only = continue_greedily(engine, prefixes, length, model.mask_token_id, on_tokens)
    samples = continue_sampled(
        engine,
        prefixes,
        length,
        n_candidates,
        generator_of(seed, length, Stream.CANDIDATES),
        model.mask_token_id,
        on_tokens,
    )
    candidates = np.concatenate([left_only[:, None], samples], axis=1)
    filled = {
        "converted": fill_holes(model, holes, on_tokens),
        "left_only": left_only,
        "reranked": best_by_suffix(engine, holes, candidates, batch_size, on_tokens),
    }
    answers = np.array([hole.answer for hole in holes])
    right = {name: (tokens == answers).astype(np.float64) for name, tokens in filled.items()}
    nothing = np.zeros_like(right["converted"])
    return InfillComparison(
        length,
        len(holes),
        {name: _score(holes, each, nothing) for name, each in right.items()},
        {name: _score(holes, right["converted"], right[name]) for name in ("left_only", "reranked")},
    )


def fill_holes(
    model: DiffusionModel, holes: list[Hole], on_tokens: OnTokens = ignore_tokens
) -> NDArray[np.int32]:
    """What the conversion writes into each hole (N, K): the most certain place first, without chance."""
    filled = []
    for hole in holes:
        text = hole.filled(np.full(hole.length, model.mask_token_id, dtype=np.int32))
        config = GenerationConfig(
            steps=hole.length, length=hole.length, order=RevealOrder.CONFIDENCE, temperature=0.0
        )
        filled.append(model.fill(text, config)[hole.start : hole.start + hole.length])
        on_tokens(hole.length * len(text))
    return np.array(filled)


def best_by_suffix(
    engine: Engine,
    holes: list[Hole],
    candidates: NDArray[np.int32],
    batch_size: int,
    on_tokens: OnTokens = ignore_tokens,
) -> NDArray[np.int32]:
    """Of candidates (N, S, K), the one (N, K) after which the base finds the true right side likeliest.

    Equal candidates are scored once; of equally good ones the first wins.
    """
    distinct = []
    for hole, several in zip(holes, candidates, strict=True):
        _, first = np.unique(several, axis=0, return_index=True)
        distinct.append([(hole, several[index]) for index in sorted(first)])
    flat = [pair for pairs in distinct for pair in pairs]
    losses = continuation_losses(
        engine,
        [hole.filled(tokens) for hole, tokens in flat],
        [hole.start + hole.length for hole, _ in flat],
        batch_size,
        on_tokens,
    )
    best, offset = [], 0
    for pairs in distinct:
        best.append(pairs[int(losses[offset : offset + len(pairs)].argmin())][1])
        offset += len(pairs)
    return np.array(best)


def infilling_tokens(holes: list[Hole], n_candidates: int) -> int:
    """At most how many tokens go through the model in `compare_infilling`."""
    total = 0
    for hole in holes:
        k, left = hole.length, hole.start
        greedy = sum(left + step for step in range(k))
        sampled = left + n_candidates * sum(left + step for step in range(1, k))
        total += greedy + sampled + (k + n_candidates + 1) * len(hole.text)
    return total


def _score(holes: list[Hole], right: NDArray[np.float64], minus: NDArray[np.float64]) -> InfillScore:
    """Means over holes of what is right (N, K) less what is in another arm, with intervals by sequence."""
    sequence = np.array([hole.sequence for hole in holes])
    n_holes = np.bincount(sequence)
    whole = right.prod(axis=1) - minus.prod(axis=1)
    parts = right.sum(axis=1) - minus.sum(axis=1)
    return InfillScore(
        estimate_ratio(np.bincount(sequence, whole), n_holes),
        estimate_ratio(np.bincount(sequence, parts), n_holes * holes[0].length),
    )
