"""The engine: a frozen GGUF model that computes logits, losses and gradients.

`Q4Model` is the C core behind NumPy arrays. It knows tokens, rows, masks and LoRA arrays; it deliberately
knows no text, no noise, no time, no optimizer. An engine is `from_gguf`, `logits`, `embed`, `loss`,
`loss_and_gradients`, `close`; nothing above this file may know more of it. The only user of the extension.

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

from ggml_diffusion.engine.cpu._native import ffi, lib
from ggml_diffusion.engine.cpu.native_structs import (
    LossResult,
    NativeAdapter,
    Objective,
    Rows,
    Teacher,
    check,
    cut,
    pointer,
)
from ggml_diffusion.engine.memory_plan import Keep, StepPlan, plan_step
from ggml_diffusion.engine.segments import token_array
from ggml_diffusion.errors import UserError
from ggml_diffusion.formats.adapter_file import load_adapter
from ggml_diffusion.formats.lora import LoraAdapter, lora_ranks
from ggml_diffusion.formats.model_file import ModelFile, file_sha256, read_model

__all__ = ["Compute", "Int8", "Keep", "LossResult", "Q4Model", "Teacher", "default_threads"]

Compute = Literal["fast", "f32"]
Int8 = Literal["none", "backward", "both"]

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


def default_threads() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


class Q4Model:
    """A frozen autoregressive model whose packed weights stay mapped in its GGUF file.

    Not safe for calls from several threads at once; one call runs on `n_threads` of its own. The same input
    gives the same bits for any number of threads.
    """

    def __init__(
        self,
        file: ModelFile,
        n_threads: int,
        compute: Compute,
        use_simd: bool,
        keep: Keep | Literal["auto"],
        memory_budget: int | None,
    ) -> None:
        """Use `from_gguf`."""
        self._keep = keep
        self._memory_budget = memory_budget
        self._file = file
        self._n_threads = n_threads
        self._compute = compute
        self._model: Any = ffi.NULL
        self._session: Any = ffi.NULL
        model = ffi.new("ggd_model **")
        paths = [ffi.new("char[]", os.fsencode(part)) for part in file.parts]
        check(lib.ggd_model_load(ffi.new("char *[]", paths), len(paths), model))
        self._model = model[0]
        options = ffi.new("ggd_session_options *")
        options.n_threads = n_threads
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
        if n_threads is not None and n_threads < 1:
            raise UserError(f"the number of threads must be at least 1, not {n_threads}")
        for name, value, known in (("compute", compute, _COMPUTE), ("keep", keep, ("auto", *_KEEP))):
            if value not in known:
                raise UserError(f"{name} must be one of {', '.join(known)}, not {value!r}")
        return cls(read_model(path), n_threads or default_threads(), compute, use_simd, keep, memory_budget)

    def close(self) -> None:
        """Free the model's memory; every other call is an error afterwards."""
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
    def L(self) -> int:
        """Layers."""
        return self._file.L

    @property
    def C(self) -> int:
        """Hidden size."""
        return self._file.C

    @property
    def H(self) -> int:
        """Query heads."""
        return self._file.H

    @property
    def G(self) -> int:
        """Key/value heads."""
        return self._file.G

    @property
    def D(self) -> int:
        """Head size."""
        return self._file.D

    @property
    def F(self) -> int:
        """Feed-forward size."""
        return self._file.F

    @property
    def V(self) -> int:
        """Vocabulary size."""
        return self._file.V

    @property
    def context_length(self) -> int:
        """Longest sequence that the base was trained for, tokens."""
        return self._file.context_length

    @property
    def tied_head(self) -> bool:
        """Whether the head reads the token embedding's rows."""
        return self._file.tied_head

    @property
    def file(self) -> ModelFile:
        """The file's header."""
        return self._file

    @property
    def path(self) -> Path:
        """The GGUF file."""
        return Path(self._file.path)

    @cached_property
    def sha256(self) -> str:
        """Of the whole file, hexadecimal; read on first use."""
        return file_sha256(self._file.path)

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
    def int8(self) -> Int8:
        """Products of the frozen weights that go in int8: "none", "backward" (input gradients) or "both".

        Setting it raises UserError where the kernels have no int8 products or the model computes in float32.
        """
        number = lib.ggd_session_int8(self._open())
        return next(name for name, value in _INT8.items() if value == number)

    @int8.setter
    def int8(self, products: Int8) -> None:
        check(lib.ggd_session_set_int8(self._open(), _INT8[products]))

    @property
    def description(self) -> str:
        """One line for people."""
        return (
            f"{self.path.name}: {self._file.arch}, L {self.L}, C {self.C}, H {self.H}/{self.G}, D {self.D}, "
            f"F {self.F}, V {self.V}; {self.element} products, {self.kernels} kernels, "
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
    ) -> int:
        """Bytes that a call takes beside the mapped file.

        Args:
            n_rows: M, tokens of the batch.
            longest: tokens of its longest document.
            rank: largest R of the adapter.
            gradients: for `loss_and_gradients` or for the other calls.
            keep: what is kept for the backward.
            teacher: whether there is one.

        """
        n_bytes = ffi.new("size_t *")
        check(
            lib.ggd_session_plan(
                self._open(), n_rows, longest, rank, gradients, teacher, _KEEP[keep], n_bytes
            )
        )
        return int(n_bytes[0])

    def step_plan(self, n_sequences: int, n_tokens: int, rank: int, teacher: bool = False) -> StepPlan:
        """What a training step of n_sequences of n_tokens each keeps, and how many go together."""
        if self._keep != "auto":
            return StepPlan(self._keep, n_sequences)

        def planned_bytes(keep: Keep, sequences: int) -> int:
            return self.memory_bytes(sequences * n_tokens, n_tokens, rank, keep=keep, teacher=teacher)

        return plan_step(n_sequences, n_tokens, self._memory_budget, planned_bytes)

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
        """Token embeddings, (B, T) -> (B, T, C) float32, without offset and mask row.

        Raises:
            UserError: a token id outside the vocabulary.

        """
        self._open()
        ids = np.ascontiguousarray(token_array(tokens), dtype=np.int32)
        rows = np.empty((*ids.shape, self.C), dtype=np.float32)
        ids_pointer, rows_pointer = pointer("const int32_t *", ids), pointer("float *", rows)
        check(lib.ggd_model_embed(self._model, ids.size, ids_pointer, rows_pointer))
        return rows

    def logits(
        self,
        tokens: ArrayLike,
        causal_ratio: float = 1.0,
        adapter: LoraAdapter | str | Path | None = None,
        embedding_offset: ArrayLike | None = None,
        *,
        lengths: ArrayLike | None = None,
        document_ids: ArrayLike | None = None,
        select: ArrayLike | None = None,
    ) -> NDArray[np.float32]:
        """Raw logits; the mask token's is not suppressed.

        Args:
            tokens: (B, T) integers.
            causal_ratio: 1 = fully causal, 0 = fully bidirectional; a future key has the weight
                1 - causal_ratio.
            adapter: LoRA arrays, or the path of a .safetensors or .gguf adapter.
            embedding_offset: (B, C), added to every input embedding of a sequence.
            lengths: (B,), tokens of each sequence that are no padding; None = T.
            document_ids: (B, T), attention stays within runs of the same number.
            select: (B, T) bool, rows whose logits are wanted, in row order.

        Returns:
            (B, T, V) float32, zero at padding; with `select` (n_selected, V).

        Raises:
            UserError: a token outside the vocabulary, a sequence longer than the context, an adapter that
                does not fit.
            ValueError: arrays of wrong shape.

        """
        self._open()
        rows = Rows(self.C, tokens, causal_ratio, embedding_offset, lengths, document_ids, None)
        wanted = rows.valid if select is None else np.asarray(select, dtype=bool)
        chosen = np.flatnonzero(rows.take(wanted, np.bool_, "select")).astype(np.int32)
        logits = np.empty((len(chosen), self.V), dtype=np.float32)
        native = self._native_adapter(adapter, None)
        row_pointer, logits_pointer = pointer("const int32_t *", chosen), pointer("float *", logits)
        check(
            lib.ggd_logits(self._session, rows.batch, native.struct, len(chosen), row_pointer, logits_pointer)
        )
        return rows.spread(logits) if select is None else logits

    def loss(
        self,
        tokens: ArrayLike,
        targets: ArrayLike,
        weights: ArrayLike,
        causal_ratio: float = 1.0,
        adapter: LoraAdapter | str | Path | None = None,
        embedding_offset: ArrayLike | None = None,
        *,
        lengths: ArrayLike | None = None,
        document_ids: ArrayLike | None = None,
        bernoulli_seed: int | None = None,
        teacher: Teacher | None = None,
    ) -> LossResult:
        """Weighted cross-entropy without gradients; see `loss_and_gradients`."""
        self._open()
        rows = Rows(self.C, tokens, causal_ratio, embedding_offset, lengths, document_ids, bernoulli_seed)
        objective = Objective(rows, targets, weights, teacher)
        native = self._native_adapter(adapter, None)
        check(lib.ggd_loss(self._session, rows.batch, native.struct, objective.struct))
        return objective.result(None)

    def loss_and_gradients(
        self,
        tokens: ArrayLike,
        targets: ArrayLike,
        weights: ArrayLike,
        causal_ratio: float,
        adapter: LoraAdapter,
        gradients: Mapping[str, NDArray[np.float32]],
        embedding_offset: ArrayLike | None = None,
        *,
        lengths: ArrayLike | None = None,
        document_ids: ArrayLike | None = None,
        bernoulli_seed: int | None = None,
        teacher: Teacher | None = None,
    ) -> LossResult:
        """Weighted cross-entropy and its gradients.

        The mask token's logit is -inf where the adapter names one. Arrays beyond those of `logits`:

        Args:
            tokens: (B, T) integers, what the network sees (masked).
            targets: (B, T) integers by output row: the token that the row's hidden state predicts.
            weights: (B, T) float32 by output row, 0 where a row predicts nothing.
            causal_ratio: see `logits`.
            adapter: LoRA arrays and mask row.
            gradients: an array for each LoRA tensor of the adapter, and optionally for "mask_embedding";
                C-contiguous float32. The gradients are added to them.
            embedding_offset: see `logits`; its gradient is in the result.
            lengths: see `logits`.
            document_ids: see `logits`.
            bernoulli_seed: future keys are visible with probability 1 - causal_ratio by this seed's pattern,
                instead of being weighted by it; None = weighted.
            teacher: adds a second loss, the cross-entropy to the base's own distribution, and its gradients.

        Raises:
            UserError: as `logits`.
            ValueError: arrays of wrong shape or type.

        """
        self._open()
        native = self._native_adapter(adapter, gradients)
        n_sequences, n_tokens = token_array(tokens).shape
        rank = max(lora_ranks(adapter.tensors).values(), default=0)
        plan = self.step_plan(n_sequences, n_tokens, rank, teacher is not None)
        lib.ggd_session_set_keep(self._session, _KEEP[plan.keep])
        results = []
        for start in range(0, n_sequences, plan.sequences):
            part = slice(start, start + plan.sequences)
            rows = Rows(
                self.C,
                cut(tokens, part),
                causal_ratio,
                cut(embedding_offset, part),
                cut(lengths, part),
                cut(document_ids, part),
                bernoulli_seed,
            )
            taught = None if teacher is None else teacher.part(part)
            objective = Objective(rows, cut(targets, part), cut(weights, part), taught)
            offset_gradient = np.zeros((len(rows.valid), self.C), dtype=np.float32)
            offset_pointer = pointer("float *", offset_gradient)
            check(
                lib.ggd_loss_and_gradients(
                    self._session, rows.batch, native.struct, objective.struct, offset_pointer
                )
            )
            results.append(objective.result(offset_gradient))
        return LossResult.joined(results)

    def _open(self) -> Any:
        if self._session == ffi.NULL:
            raise ValueError("the model is closed")
        return self._session

    def _native_adapter(
        self,
        adapter: LoraAdapter | str | Path | None,
        gradients: Mapping[str, NDArray[np.float32]] | None,
    ) -> "NativeAdapter":
        if isinstance(adapter, str | Path):
            adapter = load_adapter(adapter, self._file.arch)
        if adapter is not None:
            adapter.check(self._file)
        return NativeAdapter(adapter, gradients)
