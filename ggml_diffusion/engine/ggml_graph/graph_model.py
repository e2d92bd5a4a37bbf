"""The engine on a GGML device: `GraphModel` is the graphs of this folder behind NumPy arrays.

A call copies embeddings, positions, masks and LoRA matrices to the device, runs the graphs of the batch's
shape, which are built once and kept, and reads losses and gradients. The embedding, its offset and the mask
row are the host's: they are a row of additions, and their gradient is the residual stream's.

Deliberately not here: what the calls mean (interface.py), what is in a graph (network.py, head.py).
Letters: B sequences, T tokens a sequence, M = B T rows with padding, C hidden size, V vocabulary, R rank.
"""

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ggml_diffusion.engine.ggml_graph.attention import SCORE_BYTES
from ggml_diffusion.engine.ggml_graph.devices import Device, find_device
from ggml_diffusion.engine.ggml_graph.head import LOGIT_BYTES, Head
from ggml_diffusion.engine.ggml_graph.operations import TILE_BYTES
from ggml_diffusion.engine.ggml_graph.programs import AdapterTensors, Compiler, Rows, Shape
from ggml_diffusion.engine.ggml_graph.row_arrays import document_lengths, sees_everything
from ggml_diffusion.engine.ggml_graph.runtime import Program, Runtime
from ggml_diffusion.engine.ggml_graph.weights import ModelWeights
from ggml_diffusion.engine.interface import (
    Batch,
    Compute,
    Context,
    ContextType,
    Int8,
    LossResult,
    StepDescription,
)
from ggml_diffusion.engine.memory_plan import Keep, plan_step
from ggml_diffusion.engine.segments import rows_before
from ggml_diffusion.errors import UserError
from ggml_diffusion.formats.lora import LoraAdapter, largest_rank, lora_ranks
from ggml_diffusion.formats.model_check import read_model
from ggml_diffusion.formats.model_file import ModelFile
from ggml_diffusion.formats.tensor_names import LORA_A_SUFFIX, LORA_B_SUFFIX, MASK_EMBEDDING
from ggml_diffusion.formats.tensor_values import checked_sha256
from ggml_diffusion.machine import memory_available, memory_limit, processors
from ggml_diffusion.units import in_bytes

Gradients = Mapping[str, NDArray[np.float32]]
# Shapes whose graphs are kept: training's, and those of evaluations between its steps.
KEPT_SHAPES = 3
NO_CONTEXTS = "a frozen context is computed on the processor only: use --device cpu"
# Of a device's free memory, what a step may take: drivers and other programs want some.
SHARE_OF_MEMORY = 0.8


class _Session:
    """The graphs of one shape and one kind of adapter."""

    def __init__(
        self, compiler: Compiler, shape: Shape, adapter: LoraAdapter | None, *, with_teacher: bool
    ) -> None:
        self._compiler = compiler
        runtime, file, weights = compiler.runtime, compiler.file, compiler.weights
        self.adapter = None if adapter is None else AdapterTensors(runtime, adapter)
        self.pairs = {} if self.adapter is None else self.adapter.pairs
        self.rows = Rows(runtime, file, weights, shape)
        self.teacher_rows = None
        if with_teacher:
            self.teacher_rows = Rows(
                runtime,
                file,
                weights,
                Shape(shape.n_sequences, shape.n_tokens, shape.one_mask, shape.has_long, False),
            )

    @cached_property
    def forward(self) -> Program:
        return self._compiler.forward(self.rows, self.pairs)

    @cached_property
    def teacher_forward(self) -> Program:
        assert self.teacher_rows is not None
        return self._compiler.forward(self.teacher_rows, {})

    @cached_property
    def backward(self) -> Program:
        return self._compiler.backward(self.rows, self.pairs)

    @cached_property
    def loss_head(self) -> Head:
        teacher = None if self.teacher_rows is None else self.teacher_rows.stream[-1]
        return Head(self._compiler, self.rows.stream[-1], gradient=self.rows.gradient, teacher=teacher)

    @cached_property
    def logit_head(self) -> Head:
        return Head(self._compiler, self.rows.stream[-1], losses=False)

    def close(self) -> None:
        for name in ("forward", "teacher_forward", "backward", "loss_head", "logit_head"):
            if name in self.__dict__:
                self.__dict__.pop(name).close()
        for store in (self.rows, self.teacher_rows, self.adapter):
            if store is not None:
                store.close()


class GraphModel:
    """A frozen autoregressive model on a GGML device; an `Engine`.

    Not safe for calls from several threads at once.
    """

    def __init__(
        self,
        file: ModelFile,
        device: Device,
        n_threads: int | None = None,
        *,
        compute: Compute = "fast",
        memory_budget: int | None = None,
        sound_sha256: str | None = None,
    ) -> None:
        """Open a model whose header was read by `read_model`; see `from_gguf`."""
        if n_threads is not None and n_threads < 1:
            raise UserError(f"the number of threads must be at least 1, not {n_threads}")
        if compute not in ("fast", "f32"):
            raise UserError(f"compute must be one of fast, f32, not {compute!r}")
        self._file, self._device, self._compute = file, device, compute
        self._sound_sha256 = sound_sha256
        self._n_threads = n_threads or processors()
        self._sessions: OrderedDict[tuple[Shape, object, bool, bool], _Session] = OrderedDict()
        self._weights: ModelWeights | None = None
        cpu = find_device("cpu")
        # A GPU of its own could map the file too, and would read it through the bus at each step.
        maps = device.maps_host_memory and device.kind in ("cpu", "metal")
        self._runtime = Runtime(device.handle, cpu.handle, self._n_threads, maps_host_memory=maps)
        try:
            self._weights = ModelWeights(file, self._runtime)
        except UserError:
            self.close()
            raise
        self._compilers = {
            packed: Compiler(self._runtime, file, self._weights, packed=packed) for packed in (False, True)
        }
        self._memory_budget = memory_budget
        if not self._runtime.on_cpu and device.memory_free:
            free = int(SHARE_OF_MEMORY * (device.memory_free - self._weights.n_bytes))
            self._memory_budget = min(memory_budget or free, free)

    @classmethod
    def from_gguf(
        cls,
        path: str | Path,
        device: str = "cpu",
        n_threads: int | None = None,
        *,
        compute: Compute = "fast",
        memory_budget: int | None = None,
    ) -> "GraphModel":
        """Open a model.

        Args:
            path: a GGUF file of a supported architecture.
            device: the kind of device: "cpu" (GGML's own backend), "metal", "cuda", "vulkan".
            n_threads: of what runs on the processor; None = those that this process may use.
            compute: "f32" has no int8 products; the rest is the device's float32 in both, which is rounder on
                some (TF32 on CUDA).
            memory_budget: bytes that a training step should take beside the weights; None = what is free.

        Raises:
            UserError: there is no such device, or the file is missing, damaged or not supported.

        """
        found = find_device(device)
        return cls(read_model(path), found, n_threads, compute=compute, memory_budget=memory_budget)

    def close(self) -> None:
        """Free the model's memory; every other call is an error afterwards."""
        while self._sessions:
            self._sessions.popitem()[1].close()
        if self._weights is not None:
            self._weights.close()
            self._weights = None
        self._runtime.close()

    def __enter__(self) -> "GraphModel":
        """Close the model at the end of a `with` block."""
        return self

    def __exit__(self, *_: object) -> None:
        """See `close`."""
        self.close()

    def __del__(self) -> None:
        """Free the device's memory with the object."""
        if getattr(self, "_weights", None) is not None:
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
        """Threads of what runs on the processor."""
        return self._n_threads

    @property
    def compute(self) -> Compute:
        """Arithmetic: "fast" or "f32"."""
        return self._compute

    @property
    def has_int8(self) -> bool:
        """Whether the forward can multiply weights as they are packed, which most devices do in int8."""
        return self._compute == "fast" and self._open().n_quantised > 0

    @property
    def device(self) -> Device:
        """What it runs on."""
        return self._device

    @property
    def on_host(self) -> Mapping[str, int]:
        """Matrices that the device cannot compute with, by type; the processor does."""
        return self._open().on_host

    @property
    def description(self) -> str:
        """One line for people."""
        file = self._file
        return (
            f"{file.path.name}: {file.arch}, L {file.L}, C {file.C}, H {file.H}/{file.G}, D {file.D}, "
            f"F {file.F}, V {file.V}; ggml graphs on {self._device.name} ({self._device.description})"
        )

    def describe_step(
        self, n_sequences: int, n_tokens: int, rank: int, *, teacher: bool = False
    ) -> StepDescription:
        """See `Engine`."""
        sequences = self._sequences_of_a_part(n_sequences, n_tokens, rank)
        return StepDescription(
            memory_bytes=self._planned_bytes(sequences, n_tokens, rank),
            sequences=sequences,
            least_bytes=self._planned_bytes(1, n_tokens, rank),
            recomputed="layers",
        )

    def _sequences_of_a_part(self, n_sequences: int, n_tokens: int, rank: int) -> int:
        def planned(_: Keep, sequences: int) -> int:
            return self._planned_bytes(sequences, n_tokens, rank)

        return plan_step(n_sequences, n_tokens, self._memory_budget, planned).sequences

    def _planned_bytes(self, n_sequences: int, n_tokens: int, rank: int) -> int:
        """An estimate: kept layers, one layer with its gradients, unpacked tiles, the head, the adapter."""
        file, n_rows = self._file, n_sequences * n_tokens
        heads = (file.H + 2 * file.G) * file.D
        layer = 4 * n_rows * (16 * file.C + 12 * heads + 10 * file.F)
        scores = 8 * min(4 * n_rows * n_tokens * file.H, SCORE_BYTES)
        adapter = 4 * file.L * rank * (7 * file.C + 2 * heads + 3 * file.F) * 2
        kept = 4 * n_rows * file.C * (file.L + 3)
        head = 4 * min(LOGIT_BYTES, 4 * n_rows * file.V)
        return kept + layer + scores + adapter + head + 3 * TILE_BYTES

    def check_memory(self, n_sequences: int, n_tokens: int, adapter: LoraAdapter | None = None) -> None:
        """See `Engine`. What the device has is asked for when it is taken; this is what the host needs."""
        needed = 4 * n_sequences * n_tokens * (2 * self._file.C + n_tokens)  # embeddings twice, and the mask
        if self._runtime.on_cpu:
            rank = largest_rank(adapter)
            needed += self._planned_bytes(1, n_tokens, rank)
        if needed > memory_available():
            raise UserError(
                f"not enough memory: {n_sequences * n_tokens} tokens at once need {in_bytes(needed)} beside "
                f"the model, and {in_bytes(memory_available())} of {in_bytes(memory_limit())} are available"
            )

    def context(
        self,
        n_rows: int,
        *,
        keys: ContextType | None = None,
        adapter: LoraAdapter | None = None,
        drafts: bool = False,
    ) -> Context:
        """See `Engine`; there are none here yet."""
        raise UserError(NO_CONTEXTS)

    def embed(self, tokens: ArrayLike) -> NDArray[np.float32]:
        """See `Engine`."""
        return self._open().embed(tokens)

    def logits(
        self,
        batch: Batch,
        adapter: LoraAdapter | None = None,
        *,
        select: ArrayLike | None = None,
        int8: Int8 = "none",
    ) -> NDArray[np.float32]:
        """See `Engine`."""
        self._check_int8(int8)
        wanted = batch.valid if select is None else batch.check_by_row(np.asarray(select, bool), "select")
        pieces = []
        for part in self._parts(batch, adapter):
            session = self._start(batch.part(part), adapter, int8, gradients=False)
            numbers = np.flatnonzero((wanted & batch.valid)[part]).astype(np.int32)
            step = session.logit_head.n_rows
            for first in range(0, len(numbers), step):
                pieces.append(session.logit_head.logits(numbers[first : first + step]))
        rows = np.concatenate(pieces) if pieces else np.empty((0, self._file.V), dtype=np.float32)
        if select is not None:
            return rows
        padded = np.zeros((*batch.tokens.shape, self._file.V), dtype=np.float32)
        padded[batch.valid] = rows
        return padded

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
        self._check_int8(int8)
        return self._losses(batch, targets, weights, adapter, None, int8)

    def loss_and_gradients(
        self,
        batch: Batch,
        targets: ArrayLike,
        weights: ArrayLike,
        adapter: LoraAdapter,
        gradients: Gradients,
        *,
        int8: Int8 = "none",
    ) -> LossResult:
        """See `Engine`. The batch goes in parts of whole sequences where the device's memory asks for it."""
        self._check_int8(int8)
        _check_gradients(adapter, gradients)
        return self._losses(batch, targets, weights, adapter, gradients, int8)

    def _losses(
        self,
        batch: Batch,
        targets: ArrayLike,
        weights: ArrayLike,
        adapter: LoraAdapter | None,
        gradients: Gradients | None,
        int8: Int8,
    ) -> LossResult:
        targets, weights = batch.check_by_row(targets, "targets"), batch.check_by_row(weights, "weights")
        results = []
        for part in self._parts(batch, adapter):
            one = batch.part(part)
            session = self._start(one, adapter, int8, gradients=gradients is not None)
            result = self._head_losses(session, one, targets[part], weights[part], adapter)
            if gradients is not None and adapter is not None:
                offset = self._run_backward(session, one, adapter, gradients)
                result = LossResult(
                    result.loss, result.row_loss, result.row_correct, offset, result.distillation_loss
                )
            results.append(result)
        return LossResult.joined(results)

    def _parts(self, batch: Batch, adapter: LoraAdapter | None) -> Iterator[slice]:
        n_sequences, n_tokens = batch.tokens.shape
        rank = largest_rank(adapter)
        step = self._sequences_of_a_part(n_sequences, n_tokens, rank)
        for first in range(0, n_sequences, step):
            yield slice(first, min(first + step, n_sequences))

    def _start(self, batch: Batch, adapter: LoraAdapter | None, int8: Int8, *, gradients: bool) -> _Session:
        """The session of a batch, with the batch and the adapter on the device and the forward done."""
        weights, teacher = self._open(), batch.teacher
        if adapter is not None:
            adapter.check(self._file)
        self._check(batch)
        is_long = document_lengths(batch).max() > weights.network.original_context
        has_long = bool(is_long and weights.periods[2] is not None)
        n_sequences, n_tokens = batch.tokens.shape
        shape = Shape(n_sequences, n_tokens, sees_everything(batch), has_long, gradients)
        session = self._session(shape, adapter, with_teacher=teacher is not None, packed=int8 == "both")
        if session.adapter is not None and adapter is not None:
            session.adapter.set(adapter)
        session.rows.set(batch, self._embeddings(batch, adapter))
        session.forward.run()
        if teacher is not None and session.teacher_rows is not None:
            base = Batch(np.where(batch.valid, teacher.tokens, 0), 1.0, batch.lengths, batch.document_ids)
            session.teacher_rows.set(base, self._embeddings(base, None))
            session.teacher_forward.run()
        return session

    def _session(
        self, shape: Shape, adapter: LoraAdapter | None, *, with_teacher: bool, packed: bool
    ) -> _Session:
        """The graphs of a shape; of those with gradients, which are the large ones, one is kept at a time."""
        key = (shape, AdapterTensors.key(adapter), with_teacher, packed)
        if key not in self._sessions:
            dropped = [one for one in self._sessions if shape.gradients and one[0].gradients]
            dropped = dropped or list(self._sessions)[: max(0, len(self._sessions) + 1 - KEPT_SHAPES)]
            if dropped and self._device.kind == "vulkan":
                # Mesa's lavapipe reads buffers of graphs that are gone, through descriptors of the backend.
                dropped = list(self._sessions)
            for old in dropped:
                self._sessions.pop(old).close()
            if dropped and self._device.kind == "vulkan":
                self._runtime.restart()
            compiler = self._compilers[packed]
            self._sessions[key] = _Session(compiler, shape, adapter, with_teacher=with_teacher)
        self._sessions.move_to_end(key)
        return self._sessions[key]

    def _check(self, batch: Batch) -> None:
        """Refuse what the core refuses too (csrc/api.c), in its words, and what only the core has."""
        if batch.positions is not None or batch.context is not None:
            raise UserError(NO_CONTEXTS)
        longest = int(document_lengths(batch).max())
        if longest > self._file.context_length:
            raise UserError(
                f"a sequence of {longest} tokens is longer than the model's context of "
                f"{self._file.context_length}"
            )
        if not 0.0 <= batch.causal_ratio <= 1.0:
            raise UserError(f"causal ratio {batch.causal_ratio:g} is not between 0 and 1")

    def _embeddings(self, batch: Batch, adapter: LoraAdapter | None) -> NDArray[np.float32]:
        """What the first layer reads, (B, T, C)."""
        rows = self.embed(np.where(batch.valid, batch.tokens, 0))
        offset = batch.embedding_offset
        if offset is not None:
            if offset.shape[1] != self._file.C:
                raise ValueError(f"embedding_offset has the shape {offset.shape}, not (B, {self._file.C})")
            rows += offset[:, None, :]
        if adapter is not None and adapter.mask_embedding is not None:
            rows[batch.tokens == adapter.mask_token_id] += adapter.mask_embedding
        scale = np.float32(self._open().network.embedding_scale)
        return rows if scale == 1.0 else rows * scale

    def _head_losses(
        self,
        session: _Session,
        batch: Batch,
        targets: NDArray[Any],
        weights: NDArray[Any],
        adapter: LoraAdapter | None,
    ) -> LossResult:
        teacher = batch.teacher
        teacher_weights = np.zeros(batch.tokens.size, dtype=np.float32)
        teacher_numbers = np.zeros(batch.tokens.size, dtype=np.int32)
        if teacher is not None:
            teacher_weights = np.where(batch.valid, teacher.weights, 0.0).astype(np.float32).reshape(-1)
            needed = teacher_weights.reshape(batch.valid.shape)[batch.valid] != 0.0
            back = rows_before(batch.segments, teacher.rows_back, needed)
            place = np.flatnonzero(batch.valid).astype(np.int32)
            teacher_numbers[place] = place[back]
        row_weights = np.where(batch.valid, weights, 0.0).astype(np.float32).reshape(-1)
        row_targets = np.asarray(targets).reshape(-1).astype(np.int64)
        numbers = np.flatnonzero((row_weights != 0.0) | (teacher_weights != 0.0)).astype(np.int32)
        self._check_rows(row_weights, row_targets, numbers)
        row_loss = np.zeros(batch.tokens.size, dtype=np.float32)
        taught = np.zeros(batch.tokens.size, dtype=np.float32)
        row_correct = np.zeros(batch.tokens.size, dtype=bool)
        if session.rows.gradient is not None:
            session.rows.clear_gradient()
        head = session.loss_head
        head.hide(None if adapter is None else adapter.mask_token_id)
        for first in range(0, len(numbers), head.n_rows):
            some = numbers[first : first + head.n_rows]
            row_loss[some], row_correct[some], taught[some] = head.losses(
                some,
                row_targets[some].astype(np.int32),
                row_weights[some],
                teacher_numbers[some],
                teacher_weights[some],
            )
        counts = row_weights != 0.0
        row_loss[~counts], row_correct[~counts] = 0.0, False
        loss = float(row_weights[counts].astype(np.float64) @ row_loss[counts].astype(np.float64))
        rows = teacher_weights != 0.0
        distillation = float(teacher_weights[rows].astype(np.float64) @ taught[rows].astype(np.float64))
        shape = batch.tokens.shape
        return LossResult(loss, row_loss.reshape(shape), row_correct.reshape(shape), None, distillation)

    def _check_rows(
        self, weights: NDArray[np.float32], targets: NDArray[np.int64], numbers: NDArray[np.int32]
    ) -> None:
        if not np.isfinite(weights).all():
            raise UserError(f"the weight of row {int(np.argmin(np.isfinite(weights)))} is not finite")
        wrong = (targets[numbers] < 0) | (targets[numbers] >= self._file.V)
        if wrong.any():
            target = int(targets[numbers][wrong][0])
            raise UserError(f"target id {target} is outside the vocabulary of {self._file.V}")

    def _run_backward(
        self, session: _Session, batch: Batch, adapter: LoraAdapter, gradients: Gradients
    ) -> NDArray[np.float32]:
        """Add all gradients to the caller's; returns that of the embedding offset, (B, C)."""
        session.backward.run()
        runtime = self._runtime
        embedding, *halves = session.backward.outputs
        names = [
            name + half for name in lora_ranks(adapter.tensors) for half in (LORA_A_SUFFIX, LORA_B_SUFFIX)
        ]
        for name, tensor in zip(names, halves, strict=True):
            gradients[name].__iadd__(runtime.get(tensor).reshape(gradients[name].shape))
        rows = runtime.get(embedding).reshape(*batch.tokens.shape, self._file.C)
        rows = np.where(batch.valid[..., None], rows, 0.0) * np.float32(self._open().network.embedding_scale)
        if adapter.mask_embedding is not None and MASK_EMBEDDING in gradients:
            masked = batch.valid & (batch.tokens == adapter.mask_token_id)
            gradients[MASK_EMBEDDING].__iadd__(rows[masked].sum(axis=0, dtype=np.float64).astype(np.float32))
        offsets: NDArray[np.float32] = rows.sum(axis=1, dtype=np.float64).astype(np.float32)
        return offsets

    def _check_int8(self, products: Int8) -> None:
        """Only the forward has int8 products here: "backward" alone is none."""
        if products != "none" and not self.has_int8:
            raise UserError('int8 products need compute "fast" and quantised weights')

    def _open(self) -> ModelWeights:
        if self._weights is None:
            raise ValueError("the model is closed")
        return self._weights


def _check_gradients(adapter: LoraAdapter, gradients: Gradients) -> None:
    wanted = dict(adapter.tensors)
    if adapter.mask_embedding is not None and MASK_EMBEDDING in gradients:
        wanted[MASK_EMBEDDING] = adapter.mask_embedding
    for name, tensor in wanted.items():
        target = gradients.get(name)
        if target is None or target.shape != tensor.shape:
            raise ValueError(f"gradients['{name}'] must be an array of the shape {tensor.shape}")
        if target.dtype != np.float32 or not target.flags.c_contiguous or not target.flags.writeable:
            raise ValueError(f"gradients['{name}'] must be a contiguous, writable float32 array")
