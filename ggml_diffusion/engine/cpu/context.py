"""Tokens that stand, on the CPU: `Q4Context` is the core's `ggd_context` behind the calls of `Context`.

Deliberately not here: what the calls mean (interface.py), and how rows see each other (csrc/attention.c).
Letters: B sequences, T tokens a sequence, V vocabulary.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ggml_diffusion.engine.cpu.native_structs import NativeAdapter, Rows
from ggml_diffusion.engine.interface import Batch, ContextType, Int8
from ggml_diffusion.engine.native import check, ffi, lib, pointer
from ggml_diffusion.engine.segments import token_array
from ggml_diffusion.errors import UserError
from ggml_diffusion.formats.lora import LoraAdapter
from ggml_diffusion.formats.model_file import ModelFile
from ggml_diffusion.machine import memory_available
from ggml_diffusion.units import in_bytes

_TYPES: dict[ContextType, int] = {
    "f32": lib.GGD_CONTEXT_F32,
    "bf16": lib.GGD_CONTEXT_BF16,
    "q8_0": lib.GGD_CONTEXT_Q8_0,
}


class CpuModel(Protocol):
    """What a context needs of its model; `Q4Model` is one."""

    @property
    def file(self) -> ModelFile:
        """The model's header."""

    @property
    def element(self) -> str:
        """Element type of the matrix products."""

    @property
    def handle(self) -> Any:
        """The core's `ggd_model *`."""

    @property
    def is_open(self) -> bool:
        """Whether it has not been closed."""

    @property
    def session(self) -> Any:
        """The core's `ggd_session *`."""

    def native_adapter(
        self, adapter: LoraAdapter | None, gradients: Mapping[str, NDArray[np.float32]] | None
    ) -> NativeAdapter:
        """An adapter as the core's struct."""

    def prepare(self, rows: Rows, adapter: NativeAdapter, int8: Int8, *, n_logits: int = 0) -> None:
        """Get ready for a call of the core without gradients."""

    def check_finite(self, logits: NDArray[np.float32], native: NativeAdapter) -> None:
        """Refuse logits that are not finite."""

    def logits_of(
        self, rows: Rows, native: NativeAdapter, select: ArrayLike | None, int8: Int8
    ) -> NDArray[np.float32]:
        """Logits (n_selected, V) of chosen rows."""


class Q4Context:
    """See `Context`; it is of one model, and lives no longer than that."""

    def __init__(
        self,
        model: CpuModel,
        n_rows: int,
        keys: ContextType | None = None,
        adapter: NativeAdapter | None = None,
    ) -> None:
        """Take the memory for `n_rows` tokens, and make an adapter ready; see `Engine.context`."""
        self._model = model
        self._held = adapter
        self.capacity = n_rows
        self.keys: ContextType = keys or ("bf16" if model.element == "bfloat16" else "f32")
        self._positions = np.zeros(n_rows, dtype=np.int32)
        self.struct: Any = ffi.NULL
        if self.keys not in _TYPES:
            raise UserError(f"keys must be one of {', '.join(_TYPES)}, not {self.keys!r}")
        needed = self.memory_bytes(model, n_rows, self.keys)
        if needed > memory_available():
            raise UserError(
                f"not enough memory: a context of {n_rows} tokens needs {in_bytes(needed)}, and "
                f"{in_bytes(memory_available())} are available"
            )
        made = ffi.new("ggd_context **")
        check(lib.ggd_context_create(model.handle, _TYPES[self.keys], n_rows, made))
        self.struct = made[0]
        if adapter is not None:
            check(lib.ggd_session_hold(model.session, adapter.struct))

    @staticmethod
    def memory_bytes(model: CpuModel, n_rows: int, keys: ContextType) -> int:
        """Bytes that a context of `n_rows` tokens takes."""
        n_bytes = ffi.new("size_t *")
        check(lib.ggd_context_plan(model.handle, _TYPES[keys], n_rows, n_bytes))
        return int(n_bytes[0])

    def __del__(self) -> None:
        """Free the core's memory with the object."""
        self.close()

    def close(self) -> None:
        """See `Context`."""
        if getattr(self, "struct", ffi.NULL) != ffi.NULL:
            lib.ggd_context_free(self.struct)
            if self._held is not None and self._model.is_open:
                lib.ggd_session_release(self._model.session, self._held.struct)
        self.struct = ffi.NULL

    @property
    def n_rows(self) -> int:
        """See `Context`."""
        return int(lib.ggd_context_rows(self._open()))

    @property
    def positions(self) -> NDArray[np.int32]:
        """See `Context`."""
        return self._positions[: self.n_rows]

    def extend(
        self,
        tokens: ArrayLike,
        positions: ArrayLike | None = None,
        *,
        select: ArrayLike | None = None,
        int8: Int8 = "none",
    ) -> NDArray[np.float32]:
        """See `Context`."""
        n_rows = self.n_rows
        ids = token_array(np.atleast_2d(np.asarray(tokens)))
        first = int(self._positions[n_rows - 1]) + 1 if n_rows else 0
        places = np.arange(first, first + ids.size) if positions is None else np.asarray(positions)
        batch = Batch(ids, positions=places.astype(np.int32)[None], n_positions=self.capacity)
        wanted = np.zeros(ids.size, dtype=bool) if select is None else np.asarray(select, dtype=bool)
        rows = Rows(batch, self._model.file.C, self._open(), n_rows)
        logits = self.append(rows, np.flatnonzero(wanted).astype(np.int32), int8)
        self._positions[n_rows : n_rows + ids.size] = places
        return logits

    def append(self, rows: Rows, chosen: NDArray[np.int32], int8: Int8) -> NDArray[np.float32]:
        """Compute rows of any sequences and keep them behind the others; logits of the chosen ones."""
        self._model.prepare(rows, self._model.native_adapter(None, None), int8, n_logits=len(chosen))
        logits = np.empty((len(chosen), self._model.file.V), dtype=np.float32)
        chosen_pointer, logits_pointer = pointer("const int32_t *", chosen), pointer("float *", logits)
        check(
            lib.ggd_context_extend(
                self._model.session, self._open(), rows.struct, len(chosen), chosen_pointer, logits_pointer
            )
        )
        return logits

    def refill(
        self,
        batch: Batch,
        adapter: LoraAdapter | None = None,
        *,
        keep: ArrayLike,
        select: ArrayLike | None = None,
        int8: Int8 = "none",
    ) -> NDArray[np.float32]:
        """See `Context`."""
        held = self._held if self._held is not None and self._held.is_of(adapter) else None
        native = held or self._model.native_adapter(adapter, None)
        rows = Rows(replace(batch, n_positions=self.capacity), self._model.file.C)
        n_tokens = np.asarray(batch.tokens).size
        kept = np.flatnonzero(np.asarray(keep, dtype=bool)).astype(np.int32)
        wanted = np.zeros(n_tokens, dtype=bool) if select is None else np.asarray(select, dtype=bool)
        chosen = np.flatnonzero(wanted).astype(np.int32)
        if len(batch.tokens) != 1 or np.size(keep) != n_tokens or wanted.size != n_tokens:
            raise ValueError("a context is refilled with one whole sequence, and a flag for each token")
        self._model.prepare(rows, native, int8, n_logits=len(chosen))
        logits = np.empty((len(chosen), self._model.file.V), dtype=np.float32)
        check(
            lib.ggd_context_refill(
                self._model.session,
                self._open(),
                rows.struct,
                native.struct,
                len(kept),
                pointer("const int32_t *", kept),
                len(chosen),
                pointer("const int32_t *", chosen),
                pointer("float *", logits),
            )
        )
        self._model.check_finite(logits, native)
        self._positions[: len(kept)] = kept if batch.positions is None else np.ravel(batch.positions)[kept]
        return logits

    def truncate(self, n_rows: int) -> None:
        """See `Context`."""
        lib.ggd_context_truncate(self._open(), n_rows)

    def logits(
        self, groups: Batch, adapter: LoraAdapter | None = None, *, select: ArrayLike, int8: Int8 = "none"
    ) -> NDArray[np.float32]:
        """See `Context`."""
        groups = replace(groups, n_positions=self.capacity)
        rows = Rows(groups, self._model.file.C, self._open(), self.n_rows)
        held = self._held if self._held is not None and self._held.is_of(adapter) else None
        return self._model.logits_of(rows, held or self._model.native_adapter(adapter, None), select, int8)

    def _open(self) -> Any:
        if self.struct == ffi.NULL:
            raise ValueError("the context is closed")
        return self.struct


class StandingRows:
    """The context rows of batches, computed for each call anew in one piece of memory."""

    def __init__(self, model: CpuModel) -> None:
        self._model = model
        self._context: Q4Context | None = None

    @contextmanager
    def of(self, batch: Batch, int8: Int8) -> Iterator[Any]:
        """The core's context with the rows that stand beside a batch's, NULL for none.

        They go through the network some sequences at a time, no more rows than the batch itself has, so that
        its memory is enough for them.
        """
        if batch.context is None:
            yield ffi.NULL
            return
        standing = batch.context.batch(batch.n_positions)
        context = self._room_for(int(batch.context.counts.sum()))
        most = max(int(batch.valid.sum()), int(batch.context.counts.max()))
        n_sequences, start = 0 if standing is None else len(standing.tokens), 0
        while standing is not None and start < n_sequences:
            ends = np.cumsum(np.asarray(standing.lengths)[start:])
            count = max(1, int(np.searchsorted(ends, most, side="right")))
            rows = standing.part(slice(start, start + count))
            context.append(Rows(rows, self._model.file.C), np.zeros(0, dtype=np.int32), int8)
            start += count
        yield context.struct

    def close(self) -> None:
        """Free the memory."""
        if self._context is not None:
            self._context.close()
            self._context = None

    def _room_for(self, n_rows: int) -> Q4Context:
        if self._context is None or self._context.capacity < n_rows:
            self.close()
            self._context = Q4Context(self._model, max(n_rows, 1))
        self._context.truncate(0)
        return self._context
