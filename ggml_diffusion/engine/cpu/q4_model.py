"""The engine on the CPU: `Q4Model` is the C core of csrc/ behind NumPy arrays.

Deliberately not here: what the calls mean (interface.py), how arrays become structs (native_structs.py).
Letters: B sequences, T tokens a sequence, M rows (all tokens that are no padding), C hidden size,
V vocabulary, R rank.
"""

import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ggml_diffusion.engine.cpu.context import Q4Context, StandingRows
from ggml_diffusion.engine.cpu.native_structs import NativeAdapter, Objective, Rows
from ggml_diffusion.engine.interface import (
    Batch,
    Compute,
    ContextType,
    Int8,
    LossResult,
    StepDescription,
)
from ggml_diffusion.engine.memory_plan import Keep, StepPlan, plan_step
from ggml_diffusion.engine.native import check, ffi, lib, pointer
from ggml_diffusion.engine.segments import token_array
from ggml_diffusion.errors import UserError
from ggml_diffusion.formats.lora import LoraAdapter, largest_rank
from ggml_diffusion.formats.model_check import read_model
from ggml_diffusion.formats.model_file import ModelFile
from ggml_diffusion.formats.tensor_values import checked_sha256
from ggml_diffusion.machine import memory_available, memory_limit, processors
from ggml_diffusion.units import in_bytes

_COMPUTE = {"fast": lib.GGD_COMPUTE_FAST, "f32": lib.GGD_COMPUTE_F32}
_INT8: dict[Int8, int] = {
    "none": lib.GGD_INT8_NONE,
    "backward": lib.GGD_INT8_BACKWARD,
    "both": lib.GGD_INT8_BOTH,
}
_KEEP = {
    "all": lib.GGD_KEEP_ALL,
    "without-ffn": lib.GGD_KEEP_WITHOUT_FFN,
    "boundaries": lib.GGD_KEEP_BOUNDARIES,
}
_RECOMPUTED: dict[Keep, str] = {"all": "", "without-ffn": "gate and up", "boundaries": "layers"}

_MOST = 2**31 - 1  # rows, or ranks, that the core counts


class Q4Model:
    """A frozen autoregressive model whose packed weights stay mapped in its GGUF file; an `Engine`.

    Not safe for calls from several threads at once; one call runs on `n_threads` of its own. The same input
    gives the same bits for any number of threads.
    """

    def __init__(
        self,
        file: ModelFile,
        n_threads: int | None = None,
        *,
        compute: Compute = "fast",
        use_simd: bool = True,
        keep: Keep | Literal["auto"] = "auto",
        memory_budget: int | None = None,
        sound_sha256: str | None = None,
    ) -> None:
        """Open a model whose header was read by `read_model`; see `from_gguf`."""
        if n_threads is not None and n_threads < 1:
            raise UserError(f"the number of threads must be at least 1, not {n_threads}")
        for name, value, known in (("compute", compute, _COMPUTE), ("keep", keep, ("auto", *_KEEP))):
            if value not in known:
                raise UserError(f"{name} must be one of {', '.join(known)}, not {value!r}")
        self._keep = keep
        self._memory_budget = memory_budget
        self._sound_sha256 = sound_sha256
        self._checked_bytes = self._arena_bytes = 0  # of the largest call so far, with its logits and without
        self._file = file
        self._n_threads = n_threads or processors()
        self._compute = compute
        self._model: Any = ffi.NULL
        self._session: Any = ffi.NULL
        self._standing = StandingRows(self)
        self._nothing = self._adapter = NativeAdapter(
            None, None
        )  # and that of the last call without gradients
        model = ffi.new("ggd_model **")
        paths = [ffi.new("char[]", os.fsencode(part)) for part in file.parts]
        try:
            check(lib.ggd_model_load(ffi.new("char *[]", paths), len(paths), model))
        except UserError as error:
            file.fail(str(error))
        self._model = model[0]
        options = ffi.new("ggd_session_options *")
        options.n_threads = self._n_threads
        options.compute = _COMPUTE[compute]
        options.use_simd = use_simd
        session = ffi.new("ggd_session **")
        try:
            check(lib.ggd_session_create(self._model, options, session))
        except UserError:
            self.close()
            raise
        self._session = session[0]

    @classmethod
    def from_gguf(
        cls,
        path: str | Path,
        n_threads: int | None = None,
        *,
        compute: Compute = "fast",
        use_simd: bool = True,
        keep: Keep | Literal["auto"] = "auto",
        memory_budget: int | None = None,
    ) -> "Q4Model":
        """Open a model.

        Args:
            path: a GGUF file of a supported architecture.
            n_threads: worker threads; None = the processors that this process may use.
            compute: "fast" multiplies in bfloat16 where the processor can and the weights are quantised (sums
                and the residual stream are float32), "f32" always in float32.
            use_simd: False selects the naive reference kernels.
            keep: what a training step keeps for its backward: "all", "without-ffn" (gate and up are computed
                again) or "boundaries" (each layer is). The gradients are the same. "auto" takes what fits
                the budget, in parts of whole sequences if need be.
            memory_budget: bytes that a training step should take beside the mapped file; None = no limit.

        Raises:
            UserError: the file is missing, damaged or not supported; the message says why in one line.

        """
        return cls(
            read_model(path),
            n_threads,
            compute=compute,
            use_simd=use_simd,
            keep=keep,
            memory_budget=memory_budget,
        )

    def close(self) -> None:
        """Free the model's memory; every other call is an error afterwards."""
        self._standing.close()
        lib.ggd_session_free(self._session)
        lib.ggd_model_free(self._model)
        self._session = self._model = ffi.NULL

    def __enter__(self) -> "Q4Model":
        """Close the model at the end of a `with` block."""
        return self

    def __exit__(self, *_: object) -> None:
        """See `close`."""
        self.close()

    def __del__(self) -> None:
        """Free the core's memory with the object."""
        if getattr(self, "_model", ffi.NULL) != ffi.NULL:
            self.close()

    @property
    def file(self) -> ModelFile:
        """The file's header."""
        return self._file

    @cached_property
    def sha256(self) -> str:
        """Of the whole file, hexadecimal; read on first use, and with it whether all numbers are finite."""
        return checked_sha256(self._file, self._sound_sha256)

    @property
    def n_threads(self) -> int:
        """Worker threads."""
        return self._n_threads

    @property
    def compute(self) -> Compute:
        """Arithmetic: "fast" or "f32"."""
        return self._compute

    @property
    def kernels(self) -> str:
        """Name of the kernel set in use."""
        return str(ffi.string(lib.ggd_session_kernels(self._open())).decode())

    @property
    def element(self) -> str:
        """Element type of the matrix products: "bfloat16" or "float32"."""
        return str(ffi.string(lib.ggd_session_element(self._open())).decode())

    @property
    def has_int8(self) -> bool:
        """Whether products of the frozen weights can go in int8: not with compute "f32" or float weights."""
        return bool(lib.ggd_session_set_int8(self._open(), _INT8["both"]) == 0)

    @property
    def description(self) -> str:
        """One line for people."""
        file = self._file
        return (
            f"{file.path.name}: {file.arch}, L {file.L}, C {file.C}, H {file.H}/{file.G}, D {file.D}, "
            f"F {file.F}, V {file.V}; {self.element} products, {self.kernels} kernels, "
            f"{self.n_threads} threads"
        )

    def memory_bytes(
        self,
        n_rows: int,
        longest: int,
        rank: int = 0,
        gradients: bool = True,
        *,
        keep: Keep = "all",
        teacher: bool = False,
        most_keys: int | None = None,
    ) -> int:
        """Bytes that a call takes beside the mapped file.

        Args:
            n_rows: M, tokens of the batch.
            longest: tokens of its longest document.
            rank: largest R of the adapter.
            gradients: for `loss_and_gradients` or for the other calls.
            keep: what is kept for the backward.
            teacher: whether there is one.
            most_keys: that a row sees, where they are not just its document's.

        """
        n_bytes, size = ffi.new("size_t *"), ffi.new("ggd_call_size *")
        size.n_rows, size.max_positions, size.max_rank = (
            min(count, _MOST) for count in (n_rows, longest, rank)
        )
        size.max_keys = min(most_keys or longest, _MOST)
        check(lib.ggd_session_plan(self._open(), size, gradients, teacher, _KEEP[keep], n_bytes))
        # More than the core can count would be refused by it: to be told in numbers, it is scaled up.
        return int(n_bytes[0]) * max(1, -(-n_rows // _MOST), -(-rank // _MOST))

    def describe_step(
        self, n_sequences: int, n_tokens: int, rank: int, *, teacher: bool = False
    ) -> StepDescription:
        """See `Engine`."""
        plan = self._plan(n_sequences, n_tokens, rank, teacher)
        planned = self.memory_bytes(
            plan.sequences * n_tokens, n_tokens, rank, keep=plan.keep, teacher=teacher
        )
        least = self.memory_bytes(n_tokens, n_tokens, rank, keep="boundaries", teacher=teacher)
        return StepDescription(planned, plan.sequences, min(planned, least), _RECOMPUTED[plan.keep])

    def _plan(self, n_sequences: int, n_tokens: int, rank: int, teacher: bool) -> StepPlan:
        """What a training step keeps, and how many sequences go together."""
        if self._keep != "auto":
            return StepPlan(self._keep, n_sequences)

        def planned_bytes(keep: Keep, sequences: int) -> int:
            return self.memory_bytes(sequences * n_tokens, n_tokens, rank, keep=keep, teacher=teacher)

        return plan_step(n_sequences, n_tokens, self._memory_budget, planned_bytes)

    def check_memory(self, n_sequences: int, n_tokens: int, adapter: LoraAdapter | None = None) -> None:
        """See `Engine`."""
        self._check_memory(n_sequences * n_tokens, n_tokens, largest_rank(adapter), is_call=False)

    def _check_memory(
        self,
        n_rows: int,
        longest: int,
        rank: int,
        *,
        keep: Keep | None = None,
        teacher: bool = False,
        n_logits: int = 0,
        most_keys: int | None = None,
        is_call: bool = True,
    ) -> None:
        """Refuse a call for which the machine's memory is too small, before the system ends the process.

        `keep` is of a call with gradients, None = without; `n_logits` are the rows of logits that it returns;
        `is_call` is False where the call may never come.
        """
        gradients, keep = keep is not None, keep or "boundaries"
        arena = self.memory_bytes(
            max(n_rows, 1), longest, rank, gradients, keep=keep, teacher=teacher, most_keys=most_keys
        )
        needed = arena + n_logits * self._file.V * 4
        if needed <= self._checked_bytes:
            return
        # The arena of the call before is given back first.
        if needed > memory_available() + self._arena_bytes:
            raise UserError(
                f"not enough memory: {n_rows} tokens at once need {in_bytes(needed)} beside the model, and "
                f"{in_bytes(memory_available())} of {in_bytes(memory_limit())} are available"
            )
        if is_call:
            self._checked_bytes, self._arena_bytes = needed, max(arena, self._arena_bytes)

    def reset_profile(self) -> None:
        """Start counting `profile` from zero."""
        lib.ggd_session_reset_parts(self._open())

    def profile(self) -> dict[str, float]:
        """Seconds in each part of the parallel work since the start or `reset_profile`."""
        parts: dict[str, float] = {}
        time_s = ffi.new("double *")
        while (name := lib.ggd_session_part(self._open(), len(parts), time_s)) != ffi.NULL:
            parts[ffi.string(name).decode()] = time_s[0]
        return parts

    def peak_gflops(self, time_s: float = 0.5) -> float:
        """Billions of operations a second that the kernels reach on cached operands with all threads."""
        return float(lib.ggd_session_peak(self._open(), time_s))

    def packing_rate(self, *, backward: bool, time_s: float = 0.5) -> float:
        """Billions of frozen weights a second that are packed for products, forward or input gradients."""
        return float(lib.ggd_session_packing(self._open(), int(backward), time_s))

    def embed(self, tokens: ArrayLike) -> NDArray[np.float32]:
        """See `Engine`."""
        self._open()
        ids = np.ascontiguousarray(token_array(tokens), dtype=np.int32)
        rows = np.empty((*ids.shape, self._file.C), dtype=np.float32)
        ids_pointer, rows_pointer = pointer("const int32_t *", ids), pointer("float *", rows)
        check(lib.ggd_model_embed(self._model, ids.size, ids_pointer, rows_pointer))
        return rows

    def logits(
        self,
        batch: Batch,
        adapter: LoraAdapter | None = None,
        *,
        select: ArrayLike | None = None,
        int8: Int8 = "none",
    ) -> NDArray[np.float32]:
        """See `Engine`."""
        with self._standing.of(batch, int8) as context:
            rows = Rows(batch, self._file.C, context)
            logits = self.logits_of(rows, self.native_adapter(adapter, None), select, int8)
        return Rows(batch, self._file.C).spread(logits) if select is None else logits

    def context(
        self,
        n_rows: int,
        *,
        keys: ContextType | None = None,
        adapter: LoraAdapter | None = None,
        drafts: bool = False,
    ) -> Q4Context:
        """See `Engine`."""
        return Q4Context(self, n_rows, keys, None if adapter is None else self.native_adapter(adapter, None))

    def prepare(self, rows: Rows, adapter: NativeAdapter, int8: Int8, *, n_logits: int = 0) -> None:
        """Get ready for a call of the core without gradients: arithmetic and memory."""
        self._use_int8(int8)
        self._check_memory(
            len(rows.tokens), rows.longest, adapter.rank, n_logits=n_logits, most_keys=rows.most_keys
        )

    def logits_of(
        self, rows: Rows, native: NativeAdapter, select: ArrayLike | None, int8: Int8
    ) -> NDArray[np.float32]:
        """Logits (n_selected, V) of chosen rows, None = of all."""
        wanted = rows.batch.valid if select is None else np.asarray(select, dtype=bool)
        chosen = np.flatnonzero(rows.take(wanted, np.bool_, "select")).astype(np.int32)
        self.prepare(rows, native, int8, n_logits=len(chosen))
        logits = np.empty((len(chosen), self._file.V), dtype=np.float32)
        row_pointer, logits_pointer = pointer("const int32_t *", chosen), pointer("float *", logits)
        check(
            lib.ggd_logits(
                self._session, rows.struct, native.struct, len(chosen), row_pointer, logits_pointer
            )
        )
        self.check_finite(logits, native)
        return logits

    def check_finite(self, logits: NDArray[np.float32], native: NativeAdapter) -> None:
        """Refuse logits (n, V) that are not finite, row by row: a copy of all of them may be large.

        Raises:
            UserError: it says whose numbers are at fault.

        """
        self._require_finite(all(np.isfinite(row).all() for row in logits), native)

    def loss(
        self,
        batch: Batch,
        targets: ArrayLike,
        weights: ArrayLike,
        adapter: LoraAdapter | None = None,
        *,
        int8: Int8 = "none",
    ) -> LossResult:
        """See `Engine`."""
        with self._standing.of(batch, int8) as context:
            rows = Rows(batch, self._file.C, context)
            objective = Objective(rows, targets, weights)
            native = self.native_adapter(adapter, None)
            self.prepare(rows, native, int8)
            check(lib.ggd_loss(self._session, rows.struct, native.struct, objective.struct))
        result = objective.result(None)
        self._require_finite(np.isfinite(result.row_loss).all(), native)
        return result

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
        """See `Engine`. The batch goes in parts of whole sequences where the memory budget asks for it."""
        native = self.native_adapter(adapter, gradients)
        targets = batch.check_by_row(targets, "targets")
        weights = batch.check_by_row(weights, "weights")
        n_sequences, n_tokens = batch.tokens.shape
        has_teacher, most_keys = batch.teacher is not None, int(batch.segments[:, [1, 6]].sum(axis=1).max())
        plan = self._plan(n_sequences, n_tokens, native.rank, has_teacher)
        lib.ggd_session_set_keep(self._session, _KEEP[plan.keep])
        rows_a_part, longest = plan.sequences * n_tokens, int(batch.segments[:, 4].max())
        self._check_memory(
            rows_a_part, longest, native.rank, keep=plan.keep, teacher=has_teacher, most_keys=most_keys
        )
        results = []
        for start in range(0, n_sequences, plan.sequences):
            part = slice(start, start + plan.sequences)
            one = batch if plan.sequences == n_sequences else batch.part(part)
            with self._standing.of(one, int8) as context:
                rows = Rows(one, self._file.C, context)
                objective = Objective(rows, targets[part], weights[part])
                offset_gradient = np.zeros((len(one.tokens), self._file.C), dtype=np.float32)
                offset_pointer = pointer("float *", offset_gradient)
                self._use_int8(int8)
                check(
                    lib.ggd_loss_and_gradients(
                        self._session, rows.struct, native.struct, objective.struct, offset_pointer
                    )
                )
            results.append(objective.result(offset_gradient))
        return LossResult.joined(results)

    @property
    def is_open(self) -> bool:
        """Whether `close` has not been called."""
        return bool(self._session != ffi.NULL)

    @property
    def handle(self) -> Any:
        """The core's `ggd_model *`."""
        self._open()
        return self._model

    @property
    def session(self) -> Any:
        """The core's `ggd_session *`."""
        return self._open()

    def _open(self) -> Any:
        if self._session == ffi.NULL:
            raise ValueError("the model is closed")
        return self._session

    def _use_int8(self, products: Int8) -> None:
        """Let the next call use int8 products; a session keeps no precision from call to call.

        Raises:
            UserError: the kernels have no int8 products, or the model computes in float32.

        """
        check(lib.ggd_session_set_int8(self._open(), _INT8[products]))

    def _require_finite(self, holds: object, adapter: NativeAdapter) -> None:
        """Refuse what only damaged numbers give: no text and no figure can be made of it."""
        if not holds:
            at_fault = "the adapter or its weights are damaged" if adapter.rank else "its weights are damaged"
            self._file.fail(f"the model computes NaN or infinite logits: {at_fault}")

    def native_adapter(
        self, adapter: LoraAdapter | None, gradients: Mapping[str, NDArray[np.float32]] | None
    ) -> NativeAdapter:
        """An adapter as a struct, kept by calls without gradients: its checks take as long as a few rows."""
        if adapter is None:
            return self._nothing
        if gradients is None and self._adapter.is_of(adapter):
            return self._adapter
        adapter.check(self._file)
        native = NativeAdapter(adapter, gradients)
        if gradients is None:
            self._adapter = native
        return native
