"""NumPy arrays as the structs of the core: a batch, an objective, an adapter.

Each class owns the arrays that its struct points to, and checks their shapes first. Deliberately no calls of
the core: q4_model.py makes them.
Letters: B sequences, T tokens a sequence, M rows (all tokens that are no padding), C hidden size.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ggml_diffusion.engine.cpu._native import ffi, lib
from ggml_diffusion.engine.segments import document_array, find_segments, token_array, valid_positions
from ggml_diffusion.errors import UserError
from ggml_diffusion.formats.lora import LoraAdapter, TargetModule, lora_ranks

MASK_EMBEDDING = "mask_embedding"
# In the order of the core's GGD_ATTN_Q ... GGD_FFN_DOWN.
_TARGET_IDS = {module.gguf_name: number for number, module in enumerate(TargetModule)}


@dataclass(frozen=True)
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


def check(status: int) -> None:
    """Raise the core's message as a UserError unless a call succeeded."""
    if status != 0:
        raise UserError(ffi.string(lib.ggd_last_error()).decode(errors="replace"))


def pointer(kind: str, array: NDArray[Any] | None) -> Any:
    """An array's memory as a C pointer of a type, NULL for None; the caller keeps the array."""
    return ffi.NULL if array is None else ffi.cast(kind, array.ctypes.data)


@dataclass(frozen=True)
class Teacher:
    """The base itself, adapter off and causal, as the teacher of a distillation loss.

    Attributes:
        tokens: (B, T) integers, the clean text that the teacher reads.
        weights: (B, T) float32 by output row of the student; 0 = the row has no teacher.
        rows_back: the teacher's distribution for the same token is this many rows before the student's: 0
            where the student predicts the next token as the base does, 1 where it predicts its own.

    """

    tokens: ArrayLike
    weights: ArrayLike
    rows_back: int = 0

    def part(self, sequences: slice) -> "Teacher":
        """The same for some of the sequences."""
        return Teacher(
            np.asarray(self.tokens)[sequences], np.asarray(self.weights)[sequences], self.rows_back
        )


@overload
def cut(array: ArrayLike, sequences: slice) -> NDArray[Any]: ...
@overload
def cut(array: None, sequences: slice) -> None: ...
def cut(array: ArrayLike | None, sequences: slice) -> NDArray[Any] | None:
    """Some of the sequences of an array (B, ...)."""
    return None if array is None else np.asarray(array)[sequences]


class Rows:
    """The rows of a padded batch without its padding, cut into segments that attend to each other only.

    Attributes:
        valid: (B, T) bool, False at padding.
        tokens: (M,) int32.
        batch: the core's `ggd_batch *`; valid while this object lives.

    """

    def __init__(
        self,
        hidden_size: int,
        tokens: ArrayLike,
        causal_ratio: float,
        embedding_offset: ArrayLike | None,
        lengths: ArrayLike | None,
        document_ids: ArrayLike | None,
        bernoulli_seed: int | None,
    ) -> None:
        ids = token_array(tokens)
        n_sequences = ids.shape[0]
        self.valid = valid_positions(ids.shape, lengths)
        self.tokens = np.ascontiguousarray(ids[self.valid], dtype=np.int32)
        self._segments = find_segments(self.valid, document_array(ids.shape, document_ids))
        self._offset = None
        if embedding_offset is not None:
            self._offset = np.ascontiguousarray(embedding_offset, dtype=np.float32)
            if self._offset.shape != (n_sequences, hidden_size):
                raise ValueError(
                    f"embedding_offset has the shape {self._offset.shape}, not {(n_sequences, hidden_size)}"
                )
        self.batch = ffi.new("ggd_batch *")
        self.batch.n_rows = len(self.tokens)
        self.batch.tokens = pointer("const int32_t *", self.tokens)
        self.batch.n_segments = len(self._segments)
        self.batch.segments = pointer("const ggd_segment *", self._segments)
        self.batch.n_sequences = n_sequences
        self.batch.embedding_offset = pointer("const float *", self._offset)
        self.batch.causal_ratio = causal_ratio
        self.batch.bernoulli = bernoulli_seed is not None
        self.batch.bernoulli_seed = (bernoulli_seed or 0) % 2**64

    def take(self, array: ArrayLike, dtype: type[np.generic], name: str) -> NDArray[Any]:
        """The (M,) rows of a (B, T) array."""
        values = np.asarray(array)
        if values.shape != self.valid.shape:
            raise ValueError(f"{name} has the shape {values.shape}, not {self.valid.shape}")
        return np.ascontiguousarray(values[self.valid], dtype=dtype)

    def rows_before(self, n: int, needed: NDArray[np.bool_]) -> NDArray[np.int32]:
        """For each row the one `n` before it in its segment, itself where there is none; (M,) int32."""
        rows = np.arange(len(self.tokens), dtype=np.int32)
        first_rows = np.repeat(self._segments[:, 0], self._segments[:, 1])
        has_none = rows - n < first_rows
        if (has_none & needed).any():
            raise ValueError(
                "the first position of a document has a weight, but its teacher has no row for it"
            )
        return np.where(has_none, rows, rows - np.int32(n)).astype(np.int32)

    def spread(self, rows: NDArray[Any]) -> NDArray[Any]:
        """(M, ...) rows back to (B, T, ...), zero at padding."""
        padded = np.zeros(self.valid.shape + rows.shape[1:], dtype=rows.dtype)
        padded[self.valid] = rows
        return padded


class Objective:
    """The core's `ggd_objective` and the arrays that it points to."""

    def __init__(
        self, rows: Rows, targets: ArrayLike, weights: ArrayLike, teacher: Teacher | None = None
    ) -> None:
        self._rows = rows
        self._targets = rows.take(targets, np.int32, "targets")
        self._weights = rows.take(weights, np.float32, "weights")
        self._row_loss = np.empty(len(rows.tokens), dtype=np.float32)
        self._row_correct = np.empty(len(rows.tokens), dtype=np.uint8)
        self.struct = ffi.new("ggd_objective *")
        self.struct.targets = pointer("const int32_t *", self._targets)
        self.struct.weights = pointer("const float *", self._weights)
        self.struct.row_loss = pointer("float *", self._row_loss)
        self.struct.row_correct = pointer("uint8_t *", self._row_correct)
        if teacher is not None:
            self._teacher_tokens = rows.take(teacher.tokens, np.int32, "teacher tokens")
            self._teacher_weights = rows.take(teacher.weights, np.float32, "teacher weights")
            self._teacher_rows = rows.rows_before(teacher.rows_back, self._teacher_weights != 0.0)
            self.struct.teacher_tokens = pointer("const int32_t *", self._teacher_tokens)
            self.struct.teacher_weights = pointer("const float *", self._teacher_weights)
            self.struct.teacher_rows = pointer("const int32_t *", self._teacher_rows)

    def result(self, offset_gradient: NDArray[np.float32] | None) -> LossResult:
        """What the core wrote, in the shape of the batch."""
        row_correct = self._rows.spread(self._row_correct.astype(bool))
        row_loss = self._rows.spread(self._row_loss)
        return LossResult(self.struct.loss, row_loss, row_correct, offset_gradient, self.struct.teacher_loss)


class NativeAdapter:
    """The core's `ggd_adapter` over an adapter's own arrays, and where their gradients go."""

    def __init__(
        self, adapter: LoraAdapter | None, gradients: Mapping[str, NDArray[np.float32]] | None
    ) -> None:
        self.struct = ffi.NULL
        if adapter is None:
            return
        self._adapter = adapter
        ranks = lora_ranks(adapter.tensors)
        self._pairs = ffi.new("ggd_lora_pair[]", max(len(ranks), 1))
        for pair, (name, rank) in zip(self._pairs, ranks.items(), strict=False):
            _, layer, projection, _ = name.split(".")
            pair.layer, pair.target, pair.rank = int(layer), _TARGET_IDS[projection], rank
            pair.scale = adapter.alpha / rank
            pair.a = pointer("const float *", adapter.tensors[name + ".lora_a"])
            pair.b = pointer("const float *", adapter.tensors[name + ".lora_b"])
            if gradients is not None:
                pair.grad_a = _gradient(name + ".lora_a", adapter.tensors, gradients)
                pair.grad_b = _gradient(name + ".lora_b", adapter.tensors, gradients)
        self.struct = ffi.new("ggd_adapter *")
        self.struct.n_pairs = len(ranks)
        self.struct.pairs = self._pairs
        self.struct.mask_token_id = -1 if adapter.mask_token_id is None else adapter.mask_token_id
        if adapter.mask_embedding is not None:
            self.struct.mask_embedding = pointer("const float *", adapter.mask_embedding)
            if gradients is not None and MASK_EMBEDDING in gradients:
                shapes = {MASK_EMBEDDING: adapter.mask_embedding}
                self.struct.grad_mask_embedding = _gradient(MASK_EMBEDDING, shapes, gradients)


def _gradient(
    name: str, tensors: Mapping[str, NDArray[np.float32]], gradients: Mapping[str, NDArray[np.float32]]
) -> Any:
    target = gradients.get(name)
    if target is None or target.shape != tensors[name].shape:
        raise ValueError(f"gradients['{name}'] must be an array of the shape {tensors[name].shape}")
    if target.dtype != np.float32 or not target.flags.c_contiguous or not target.flags.writeable:
        raise ValueError(f"gradients['{name}'] must be a contiguous, writable float32 array")
    return pointer("float *", target)
