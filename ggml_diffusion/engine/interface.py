"""What an engine is: the calls that the rest of the package makes, and the values that go in and come out.

An engine holds a frozen GGUF model and knows tokens, rows, masks and LoRA arrays. It deliberately knows no
text, no noise, no time and no optimizer. Callers are typed against `Engine`; only open.py names an
implementation, so that another one can stand beside cpu/. Nothing here computes.

Letters: B sequences, T tokens a sequence, C hidden size, V vocabulary, R rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ggml_diffusion.engine.segments import document_array, find_segments, token_array, valid_positions
from ggml_diffusion.formats.lora import LoraAdapter
from ggml_diffusion.formats.model_file import ModelFile

Compute = Literal["fast", "f32"]
Int8 = Literal["none", "backward", "both"]
ContextType = Literal["f32", "bf16", "q8_0"]


@dataclass(frozen=True, eq=False)
class Teacher:
    """The base itself, adapter off and causal, as the teacher of a distillation loss.

    Attributes:
        tokens: (B, T) integers, the clean text that the teacher reads.
        weights: (B, T) float32 by output row of the student; 0 = the row has no teacher.
        rows_back: the teacher's distribution for the same token is this many rows before the student's: 0
            where the student predicts the next token as the base does, 1 where it predicts its own.

    """

    tokens: NDArray[np.int32]
    weights: NDArray[np.float32]
    rows_back: int = 0

    def part(self, sequences: slice) -> "Teacher":
        """The same for some of the sequences."""
        return Teacher(self.tokens[sequences], self.weights[sequences], self.rows_back)


@dataclass(frozen=True, eq=False)
class ContextRows:
    """Rows that stand beside those of a batch: the base alone computes them, each from itself and from those
    before it in its document, and they get no gradients.

    Sequences next to each other with the same rows share them: they are computed once.

    Letters: S rows of a sequence, at most.

    Attributes:
        tokens: (B, S) integers.
        positions: (B, S) int32, of each row in its document; they rise.
        lengths: (B,), rows from there on are padding; 0 = the sequence has none.
        seen: (B, T, 2) int32, for each row of the batch the first and the end of the rows of its sequence
            that it sees; all rows of a document of the batch see the same.
        document_ids: (B, S), as a batch's; None = one document a sequence.

    """

    tokens: NDArray[np.integer[Any]]
    positions: NDArray[np.int32]
    lengths: NDArray[np.integer[Any]]
    seen: NDArray[np.int32]
    document_ids: NDArray[np.int32] | None = None

    @cached_property
    def counts(self) -> NDArray[np.int64]:
        """Rows to compute for each sequence, (B,): 0 where they are those of the sequence before."""
        rows = [self.tokens, self.positions] + ([] if self.document_ids is None else [self.document_ids])
        is_row = np.arange(self.tokens.shape[1]) < self.lengths[1:, None]
        same = np.all([(row[1:] == row[:-1]) | ~is_row for row in rows], axis=(0, 2))
        repeated = np.append(False, same & (self.lengths[1:] == self.lengths[:-1]))
        return np.where(repeated, 0, self.lengths).astype(np.int64)

    @cached_property
    def first_rows(self) -> NDArray[np.int64]:
        """The first row of each sequence, (B,), among all that are computed."""
        starts = np.cumsum(self.counts) - self.counts
        owner = np.maximum.accumulate(np.where(self.counts > 0, np.arange(len(starts)), 0))
        return np.asarray(starts[owner])

    def batch(self, n_positions: int | None = None) -> "Batch | None":
        """What is to be computed, as a batch; None = there is no row."""
        has_rows = self.counts > 0
        if not has_rows.any():
            return None
        documents = None if self.document_ids is None else self.document_ids[has_rows]
        return Batch(
            self.tokens[has_rows],
            1.0,
            self.lengths[has_rows],
            documents,
            positions=self.positions[has_rows],
            n_positions=n_positions,
        )

    def part(self, sequences: slice) -> "ContextRows":
        """The same for some of the sequences."""
        documents = None if self.document_ids is None else self.document_ids[sequences]
        return ContextRows(
            self.tokens[sequences],
            self.positions[sequences],
            self.lengths[sequences],
            self.seen[sequences],
            documents,
        )


@dataclass(frozen=True, eq=False)
class Batch:
    """What the network sees in one call. Checked when it is made, and by nobody after that.

    Attributes:
        tokens: (B, T) integers.
        causal_ratio: 1 = fully causal, 0 = fully bidirectional; a future key has the weight 1 - causal_ratio.
        lengths: (B,), positions from there on are padding; None = no padding.
        document_ids: (B, T), attention stays within runs of the same number; None = one document a sequence.
        embedding_offset: (B, C) float32, added to every input embedding of a sequence; None = nothing is.
        bernoulli_seed: future keys are visible with probability 1 - causal_ratio by this seed's pattern,
            instead of being weighted by it; None = weighted. Only for losses.
        teacher: adds a second loss, the cross-entropy to the base's own distribution. Only for losses.
        positions: (B, T) int32, of each row in its text, where rows are not simply all of it; they rise in a
            document, and what is future to a row is what has a greater position.
        n_positions: length of that text, for models whose RoPE depends on it; None = up to the last row.
        context: rows of the same text that stand, and that these rows see beside each other, but for one at a
            row's own position: the row stands in its place.
        attention_sink: a document's first row sees itself alone whatever the causal ratio is, as in the base.

    Raises:
        ValueError: an array of the wrong shape or type, or a document that appears in two parts.
        UserError: a token id that no vocabulary holds.

    """

    tokens: NDArray[np.integer[Any]]
    causal_ratio: float = 1.0
    lengths: NDArray[np.integer[Any]] | None = None
    document_ids: NDArray[np.int32] | None = None
    embedding_offset: NDArray[np.float32] | None = None
    bernoulli_seed: int | None = None
    teacher: Teacher | None = None
    positions: NDArray[np.int32] | None = None
    n_positions: int | None = None
    context: ContextRows | None = None
    attention_sink: bool = False

    def __post_init__(self) -> None:
        """Check the arrays; what depends on the model (V, C, context) the engine checks."""
        object.__setattr__(self, "tokens", token_array(self.tokens))
        if self.embedding_offset is not None:
            offset = np.ascontiguousarray(self.embedding_offset, dtype=np.float32)
            if offset.ndim != 2 or len(offset) != len(self.tokens):
                raise ValueError(
                    f"embedding_offset has the shape {offset.shape}, not ({len(self.tokens)}, C)"
                )
            object.__setattr__(self, "embedding_offset", offset)
        if self.teacher is not None:
            self.check_by_row(self.teacher.tokens, "teacher tokens")
            self.check_by_row(self.teacher.weights, "teacher weights")
        if self.positions is not None:
            self.check_by_row(self.positions, "positions")
        _ = self.segments  # raises for lengths and documents that are not possible

    def check_by_row(self, array: ArrayLike, name: str) -> NDArray[Any]:
        """An array that has one value a position, (B, T).

        Raises:
            ValueError: another shape.

        """
        values = np.asarray(array)
        if values.shape != self.tokens.shape:
            raise ValueError(f"{name} has the shape {values.shape}, not {self.tokens.shape}")
        return values

    @cached_property
    def valid(self) -> NDArray[np.bool_]:
        """Which positions are not padding, (B, T)."""
        return valid_positions(self.tokens.shape, self.lengths)

    @cached_property
    def segments(self) -> NDArray[np.int32]:
        """Rows that attend to each other, (n, 7), and what they see of the context; see `find_segments`."""
        documents = document_array(self.tokens.shape, self.document_ids)
        segments = find_segments(self.valid, documents, self.positions, self.n_positions)
        if self.context is not None:
            seen = self.context.seen[self.valid][segments[:, 0]]
            segments[:, 5] = self.context.first_rows[segments[:, 2]] + seen[:, 0]
            segments[:, 6] = seen[:, 1] - seen[:, 0]
            self._lengthen(segments, self.context)
        return segments

    def _lengthen(self, segments: NDArray[np.int32], context: ContextRows) -> None:
        """Let each segment's text reach to the last row that it sees."""
        for segment in segments if self.n_positions is None else []:
            end = segment[5] + segment[6] - context.first_rows[segment[2]]
            if segment[6] > 0:
                segment[4] = max(segment[4], context.positions[segment[2], end - 1] + 1)

    def part(self, sequences: slice) -> "Batch":
        """The same for some of the sequences."""
        return replace(
            self,
            tokens=self.tokens[sequences],
            lengths=None if self.lengths is None else np.asarray(self.lengths)[sequences],
            document_ids=None if self.document_ids is None else np.asarray(self.document_ids)[sequences],
            embedding_offset=None if self.embedding_offset is None else self.embedding_offset[sequences],
            teacher=None if self.teacher is None else self.teacher.part(sequences),
            positions=None if self.positions is None else self.positions[sequences],
            context=None if self.context is None else self.context.part(sequences),
        )


@dataclass(frozen=True, eq=False)
class LossResult:
    """Loss of a batch.

    Attributes:
        loss: sum of weights * cross-entropy, nats, not normalised.
        row_loss: (B, T) float32, cross-entropy in nats of the rows with a weight, else 0.
        row_correct: (B, T) bool, whether the target is the most probable token of a row with a weight.
        offset_gradient: (B, C) float32, d loss / d embedding_offset; None where no gradients were asked for.
        distillation_loss: sum of teacher weights * cross-entropy to the teacher's distribution, nats.

    """

    loss: float
    row_loss: NDArray[np.float32]
    row_correct: NDArray[np.bool_]
    offset_gradient: NDArray[np.float32] | None = None
    distillation_loss: float = 0.0

    @staticmethod
    def joined(parts: list["LossResult"]) -> "LossResult":
        """The result of a batch from those of its parts, in order."""
        if len(parts) == 1:
            return parts[0]
        gradients = [part.offset_gradient for part in parts if part.offset_gradient is not None]
        return LossResult(
            sum(part.loss for part in parts),
            np.concatenate([part.row_loss for part in parts]),
            np.concatenate([part.row_correct for part in parts]),
            np.concatenate(gradients) if gradients else None,
            sum(part.distillation_loss for part in parts),
        )


@dataclass(frozen=True)
class StepDescription:
    """What a training step will take.

    Attributes:
        memory_bytes: beside the mapped file; more than the budget where nothing fits it.
        sequences: that go through the network together; the gradients of the parts add up.
        least_bytes: what the smallest plan takes, one sequence at a time with all computed again.
        recomputed: what the backward computes again instead of keeping it, in words; empty = nothing.

    """

    memory_bytes: int
    sequences: int
    least_bytes: int
    recomputed: str = ""


class Context(Protocol):
    """Keys and values of tokens that stand, so that what comes after or between them need not compute them
    again. The base alone computes them, each from itself and from those before it."""

    @property
    def n_rows(self) -> int:
        """Tokens that it holds."""

    @property
    def positions(self) -> NDArray[np.int32]:
        """Of each of them, (n_rows,); they rise."""

    def extend(
        self,
        tokens: ArrayLike,
        positions: ArrayLike | None = None,
        *,
        select: ArrayLike | None = None,
        int8: Int8 = "none",
    ) -> NDArray[np.float32]:
        """Compute tokens (n,) and append them.

        Args:
            tokens: integers.
            positions: (n,), rising and greater than those that are there; None = right behind them.
            select: (n,) bool, rows whose logits are wanted; None = none.
            int8: see `Engine.loss_and_gradients`.

        Returns:
            The base's logits (n_selected, V).

        Raises:
            UserError: a token outside the vocabulary, or no room for them.

        """

    def refill(
        self,
        batch: Batch,
        adapter: LoraAdapter | None = None,
        *,
        keep: ArrayLike,
        select: ArrayLike | None = None,
        int8: Int8 = "none",
    ) -> NDArray[np.float32]:
        """Compute one whole sequence (1, T) as `Engine.logits` does, and hold some of its rows alone.

        Rows that come later see the others as they were in this pass: with an adapter or a mask that looks
        ahead that is an approximation, since these would change with what is written since.

        Args:
            batch: without context.
            adapter: of all rows.
            keep: (T,) bool, rows to hold in the place of what is there.
            select: (T,) bool, rows whose logits are wanted; None = none.
            int8: see `Engine.loss_and_gradients`.

        Returns:
            (n_selected, V).

        Raises:
            UserError: a token outside the vocabulary, an adapter that does not fit, no room, or logits that
                are not finite.
            ValueError: arrays of wrong shape, or more than one sequence.

        """

    def truncate(self, n_rows: int) -> None:
        """Forget all but the first `n_rows` tokens."""

    def logits(
        self, groups: Batch, adapter: LoraAdapter | None = None, *, select: ArrayLike, int8: Int8 = "none"
    ) -> NDArray[np.float32]:
        """Logits of rows that see the context, and each other within a document; it stays as it is.

        Args:
            groups: each of its documents is a group: a block, the holes of a text, a candidate. It has
                positions.
            adapter: of these rows.
            select: (B, T) bool, rows whose logits are wanted.
            int8: see `Engine.loss_and_gradients`.

        Returns:
            (n_selected, V) float32.

        Raises:
            UserError, ValueError: as `Engine.logits`.

        """

    def close(self) -> None:
        """Free its memory."""


class Engine(Protocol):
    """A frozen autoregressive model that computes logits, losses and gradients.

    The same input gives the same bits for any number of threads. Not safe for calls from several threads at
    once.
    """

    @property
    def file(self) -> ModelFile:
        """The model's header: its path, sizes, tensors and vocabulary."""

    @property
    def sha256(self) -> str:
        """Of the whole file, hexadecimal; read on first use.

        Raises:
            UserError: a number of the file is NaN or infinite; tensor and row are named.

        """

    @property
    def description(self) -> str:
        """One line for people."""

    @property
    def n_threads(self) -> int:
        """Worker threads."""

    @property
    def compute(self) -> Compute:
        """Arithmetic: "fast", or "f32" = exact products in float32."""

    @property
    def has_int8(self) -> bool:
        """Whether products of the frozen weights can go in int8."""

    def describe_step(
        self, n_sequences: int, n_tokens: int, rank: int, *, teacher: bool = False
    ) -> StepDescription:
        """What `loss_and_gradients` will take for so many sequences of so many tokens."""

    def check_memory(self, n_sequences: int, n_tokens: int, adapter: LoraAdapter | None = None) -> None:
        """Refuse a call of `logits` or `loss` that is too large for the machine, before its arrays are made.

        Raises:
            UserError: how much it needs, and how much there is.

        """

    def context(
        self,
        n_rows: int,
        *,
        keys: ContextType | None = None,
        adapter: LoraAdapter | None = None,
        drafts: bool = False,
    ) -> Context:
        """Room for `n_rows` tokens that stand.

        Args:
            n_rows: most that it will hold; positions are below that, too.
            adapter: one that `logits` will get, and whose arrays do not change meanwhile: it is made ready
                once.
            drafts: what `logits` gives is checked afterwards, so that an engine may be near instead of exact.
            keys: type of the keys and values that are kept, "f32", "bf16" or "q8_0"; None = that of the
                products.

        Raises:
            UserError: not enough memory for it, a type that does not go with the model's heads, or an engine
                without contexts.

        """

    def embed(self, tokens: ArrayLike) -> NDArray[np.float32]:
        """Token embeddings, (B, T) -> (B, T, C) float32, without offset and mask row.

        Raises:
            UserError: a token id outside the vocabulary.

        """

    def logits(
        self,
        batch: Batch,
        adapter: LoraAdapter | None = None,
        *,
        select: ArrayLike | None = None,
        int8: Int8 = "none",
    ) -> NDArray[np.float32]:
        """Raw logits; the mask token's is not suppressed.

        Args:
            batch: what the network sees.
            adapter: LoRA arrays and mask row; None = the base.
            select: (B, T) bool, rows whose logits are wanted, in row order.
            int8: see `loss_and_gradients`.

        Returns:
            (B, T, V) float32, zero at padding; with `select` (n_selected, V).

        Raises:
            UserError: a token outside the vocabulary, a sequence longer than the context, an adapter that
                does not fit, or logits that are not finite.
            ValueError: arrays of wrong shape.

        """

    def loss(
        self,
        batch: Batch,
        targets: ArrayLike,
        weights: ArrayLike,
        adapter: LoraAdapter | None = None,
        *,
        int8: Int8 = "none",
    ) -> LossResult:
        """Weighted cross-entropy without gradients; see `loss_and_gradients`.

        Raises:
            UserError: as there, or a loss that is not finite.

        """

    def loss_and_gradients(
        self,
        batch: Batch,
        targets: ArrayLike,
        weights: ArrayLike,
        adapter: LoraAdapter,
        gradients: Mapping[str, NDArray[np.float32]],
        *,
        int8: Int8 = "none",
    ) -> LossResult:
        """Weighted cross-entropy and its gradients.

        The mask token's logit is -inf where the adapter names one.

        Args:
            batch: what the network sees (masked).
            targets: (B, T) integers by output row: the token that the row's hidden state predicts.
            weights: (B, T) float32 by output row, 0 where a row predicts nothing.
            adapter: LoRA arrays and mask row.
            gradients: an array for each LoRA tensor of the adapter, and optionally for "mask_embedding";
                C-contiguous float32. The gradients are added to them; that of the offset is in the result.
            int8: products of the frozen weights that go in int8: "none", "backward" (input gradients) or
                "both".

        Raises:
            UserError: as `logits`; or int8 products where `has_int8` is False.
            ValueError: arrays of wrong shape or type.

        """

    def close(self) -> None:
        """Free the model's memory; every other call is an error afterwards."""
