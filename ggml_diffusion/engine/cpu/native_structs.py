"""NumPy arrays as the structs of the core: a batch, an objective, an adapter.

Each class owns the arrays that its struct points to. Deliberately no calls of
the core: q4_model.py makes them.
Letters: B sequences, T tokens a sequence, M rows (all tokens that are no padding), C hidden size.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ggml_diffusion.engine.interface import Batch, LossResult
from ggml_diffusion.engine.native import ffi, pointer
from ggml_diffusion.engine.segments import rows_before
from ggml_diffusion.formats.lora import LoraAdapter, TargetModule, lora_ranks
from ggml_diffusion.formats.tensor_names import LORA_A_SUFFIX, LORA_B_SUFFIX, MASK_EMBEDDING

# In the order of the core's GGD_ATTN_Q ... GGD_FFN_DOWN.
_TARGET_IDS = {module.gguf_name: number for number, module in enumerate(TargetModule)}


class Rows:
    """The rows of a padded batch without its padding, as the core's `ggd_batch`.

    Attributes:
        batch: whose rows they are.
        tokens: (M,) int32.
        most_keys: that a segment sees, its own rows and those of its context.
        longest: positions of the longest text.
        struct: the core's `ggd_batch *`; valid while this object lives.

    """

    def __init__(
        self, batch: Batch, hidden_size: int, context: Any = None, n_seen: int | None = None
    ) -> None:
        """Take a batch's rows.

        Args:
            batch: as it was checked.
            hidden_size: C.
            context: the core's `ggd_context *` that the batch's segments see rows of, None = none.
            n_seen: they all see so many of its rows, the first; None = as the batch says.

        """
        offset = batch.embedding_offset
        if offset is not None and offset.shape[1] != hidden_size:
            raise ValueError(
                f"embedding_offset has the shape {offset.shape}, not {(len(batch.tokens), hidden_size)}"
            )
        self.batch = batch
        self.tokens = np.ascontiguousarray(batch.tokens[batch.valid], dtype=np.int32)
        self._segments = batch.segments
        if n_seen is not None:
            self._segments = batch.segments.copy()
            self._segments[:, 6] = n_seen
        self.most_keys = int((self._segments[:, 1] + self._segments[:, 6]).max())
        self.longest = int(self._segments[:, 4].max())
        self.struct = ffi.new("ggd_batch *")
        self.struct.n_rows = len(self.tokens)
        self.struct.tokens = pointer("const int32_t *", self.tokens)
        if batch.positions is not None:
            self._positions = np.ascontiguousarray(batch.positions[batch.valid], dtype=np.int32)
            self.struct.positions = pointer("const int32_t *", self._positions)
        self.struct.context = ffi.NULL if context is None else context
        self.struct.n_segments = len(self._segments)
        self.struct.segments = pointer("const ggd_segment *", self._segments)
        self.struct.n_sequences = len(batch.tokens)
        self.struct.embedding_offset = pointer("const float *", offset)
        self.struct.causal_ratio = batch.causal_ratio
        self.struct.attention_sink = batch.attention_sink
        self.struct.bernoulli = batch.bernoulli_seed is not None
        self.struct.bernoulli_seed = (batch.bernoulli_seed or 0) % 2**64

    def take(self, array: ArrayLike, dtype: type[np.generic], name: str) -> NDArray[Any]:
        """The (M,) rows of a (B, T) array."""
        return np.ascontiguousarray(self.batch.check_by_row(array, name)[self.batch.valid], dtype=dtype)

    def spread(self, rows: NDArray[Any]) -> NDArray[Any]:
        """(M, ...) rows back to (B, T, ...), zero at padding."""
        valid = self.batch.valid
        padded = np.zeros(valid.shape + rows.shape[1:], dtype=rows.dtype)
        padded[valid] = rows
        return padded


class Objective:
    """The core's `ggd_objective` for some rows, and the arrays that it points to."""

    def __init__(self, rows: Rows, targets: ArrayLike, weights: ArrayLike) -> None:
        self.rows, teacher = rows, rows.batch.teacher
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
            self._teacher_rows = rows_before(
                rows.batch.segments, teacher.rows_back, self._teacher_weights != 0.0
            )
            self.struct.teacher_tokens = pointer("const int32_t *", self._teacher_tokens)
            self.struct.teacher_weights = pointer("const float *", self._teacher_weights)
            self.struct.teacher_rows = pointer("const int32_t *", self._teacher_rows)

    def result(self, offset_gradient: NDArray[np.float32] | None) -> LossResult:
        """What the core wrote, in the shape of the batch."""
        row_correct = self.rows.spread(self._row_correct.astype(bool))
        row_loss = self.rows.spread(self._row_loss)
        return LossResult(self.struct.loss, row_loss, row_correct, offset_gradient, self.struct.teacher_loss)


class NativeAdapter:
    """The core's `ggd_adapter` over an adapter's own arrays, and where their gradients go.

    Attributes:
        struct: the core's `ggd_adapter *`, NULL for none; valid while this object lives.
        rank: the largest R, 0 without pairs.

    """

    def __init__(
        self, adapter: LoraAdapter | None, gradients: Mapping[str, NDArray[np.float32]] | None
    ) -> None:
        self.struct = ffi.NULL
        self.rank = 0
        self._parts = _parts_of(adapter)  # the arrays live as long as the struct that points to them
        if adapter is None:
            return
        ranks = lora_ranks(adapter.tensors)
        self.rank = max(ranks.values(), default=0)
        self._pairs = ffi.new("ggd_lora_pair[]", max(len(ranks), 1))
        for pair, (name, rank) in zip(self._pairs, ranks.items(), strict=False):
            _, layer, projection, _ = name.split(".")
            pair.layer, pair.target, pair.rank = int(layer), _TARGET_IDS[projection], rank
            pair.scale = adapter.alpha / rank
            pair.a = pointer("const float *", adapter.tensors[name + LORA_A_SUFFIX])
            pair.b = pointer("const float *", adapter.tensors[name + LORA_B_SUFFIX])
            if gradients is not None:
                pair.grad_a = _gradient(name + LORA_A_SUFFIX, adapter.tensors, gradients)
                pair.grad_b = _gradient(name + LORA_B_SUFFIX, adapter.tensors, gradients)
        self.struct = ffi.new("ggd_adapter *")
        self.struct.n_pairs = len(ranks)
        self.struct.pairs = self._pairs
        self.struct.mask_token_id = -1 if adapter.mask_token_id is None else adapter.mask_token_id
        if adapter.mask_embedding is not None:
            self.struct.mask_embedding = pointer("const float *", adapter.mask_embedding)
            if gradients is not None and MASK_EMBEDDING in gradients:
                shapes = {MASK_EMBEDDING: adapter.mask_embedding}
                self.struct.grad_mask_embedding = _gradient(MASK_EMBEDDING, shapes, gradients)

    def is_of(self, adapter: LoraAdapter | None) -> bool:
        """Whether this is the struct of an adapter: of the same arrays, whatever they hold now."""
        own, others = self._parts, _parts_of(adapter)
        return len(own) == len(others) and all(
            a is b or (not isinstance(a, np.ndarray) and a == b) for a, b in zip(own, others, strict=True)
        )


def _parts_of(adapter: LoraAdapter | None) -> list[Any]:
    if adapter is None:
        return []
    parts = [adapter.alpha, adapter.mask_token_id, adapter.mask_embedding]
    return [*parts, *adapter.tensors, *adapter.tensors.values()]


def _gradient(
    name: str, tensors: Mapping[str, NDArray[np.float32]], gradients: Mapping[str, NDArray[np.float32]]
) -> Any:
    target = gradients.get(name)
    if target is None or target.shape != tensors[name].shape:
        raise ValueError(f"gradients['{name}'] must be an array of the shape {tensors[name].shape}")
    if target.dtype != np.float32 or not target.flags.c_contiguous or not target.flags.writeable:
        raise ValueError(f"gradients['{name}'] must be a contiguous, writable float32 array")
    return pointer("float *", target)
