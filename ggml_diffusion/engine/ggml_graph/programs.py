"""The graphs of a step, built once for each shape of a batch: forward, head and backward.

The forward keeps each layer's input; the backward computes a layer again from it, and then its gradients, so
that the activations of one layer exist at a time. The head takes some rows at a time: logits exist for those
only, and the gradients of the rows go to their places in the residual stream's gradient.
Deliberately not here: what is in the graphs (network.py, operations.py), arrays of the host (graph_model.py).
Letters: B sequences, T tokens a sequence, M = B T rows, C hidden size, V vocabulary, N rows of a head's call.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ggml_diffusion.engine.ggml_graph import ggml
from ggml_diffusion.engine.ggml_graph.attention import heads_of_a_part
from ggml_diffusion.engine.ggml_graph.ggml import lib
from ggml_diffusion.engine.ggml_graph.network import Network, Pairs, RowInputs, ropes, windows
from ggml_diffusion.engine.ggml_graph.operations import Operations, Pair, Rotation, Value
from ggml_diffusion.engine.ggml_graph.row_arrays import document_lengths, log_visibility, place_in_document
from ggml_diffusion.engine.ggml_graph.runtime import Graph, Program, Runtime, Store, Tensor
from ggml_diffusion.engine.ggml_graph.weights import ModelWeights
from ggml_diffusion.engine.interface import Batch
from ggml_diffusion.formats.lora import LoraAdapter, TargetModule, lora_ranks
from ggml_diffusion.formats.model_file import ModelFile
from ggml_diffusion.formats.tensor_names import LORA_A_SUFFIX, LORA_B_SUFFIX

GLOBAL, WINDOW, LONG = range(3)  # the core's GGD_ROPE_*
_TARGETS = {target.gguf_name: target for target in TargetModule}


@dataclass(frozen=True)
class Shape:
    """What a graph is built for."""

    n_sequences: int
    n_tokens: int
    one_mask: bool  # all sequences have the same mask
    has_long: bool  # some documents take the long RoPE
    gradients: bool

    @property
    def n_rows(self) -> int:
        """M."""
        return self.n_sequences * self.n_tokens


class AdapterTensors:
    """LoRA matrices on the device; their values come from the host before each call."""

    def __init__(self, runtime: Runtime, adapter: LoraAdapter) -> None:
        self._runtime = runtime
        ranks = lora_ranks(adapter.tensors)
        self._store = Store(runtime, 2 * len(ranks) + 1)
        self.pairs: Pairs = {}
        self._tensors: dict[str, Tensor] = {}
        for name, rank in ranks.items():
            _, layer, projection, _ = name.split(".")
            a, b = (adapter.tensors[name + suffix] for suffix in (LORA_A_SUFFIX, LORA_B_SUFFIX))
            pair = Pair(
                Value(self._store.new(a.shape[1], rank)),
                Value(self._store.new(rank, b.shape[0])),
                adapter.alpha / rank,
            )
            self.pairs[int(layer), _TARGETS[projection]] = pair
            self._tensors[name + LORA_A_SUFFIX] = pair.a.tensor
            self._tensors[name + LORA_B_SUFFIX] = pair.b.tensor
        if ranks:
            self._store.allocate()

    @staticmethod
    def key(adapter: LoraAdapter | None) -> object:
        """What adapters with the same tensors have in common."""
        return None if adapter is None else (adapter.alpha, tuple(lora_ranks(adapter.tensors).items()))

    def set(self, adapter: LoraAdapter) -> None:
        """Copy an adapter's values."""
        for name, tensor in self._tensors.items():
            self._runtime.set(tensor, adapter.tensors[name])

    def close(self) -> None:
        """Free the memory."""
        self._store.close()


class Rows:
    """The rows of a batch on the device: what goes in, the residual stream, and its gradient."""

    def __init__(self, runtime: Runtime, file: ModelFile, weights: ModelWeights, shape: Shape) -> None:
        self._runtime, self._weights, self.shape = runtime, weights, shape
        self._store = store = Store(runtime, file.L + 32)
        n_rows, t = shape.n_rows, shape.n_tokens
        n_kept = file.L + 1 if shape.gradients else 2
        self.stream = [store.new(file.C, n_rows) for _ in range(n_kept)]
        # One more row takes the gradients of rows that only fill a call of the head.
        self.gradient = store.new(file.C, n_rows + 1) if shape.gradients else None
        masks = 1 if shape.one_mask else shape.n_sequences
        kinds = ropes(weights) | ({LONG} if shape.has_long else set())
        self._positions = {
            kind: (store.new(n_rows, kind=ggml.I32), store.new(n_rows, kind=ggml.I32)) for kind in kinds
        }
        self._window = windows(weights)
        self.inputs = RowInputs(
            shape.n_sequences,
            {kind: self._rotations(kind) for kind in kinds - {LONG}},
            store.new(t, t, 1, masks),
            store.new(t, t, 1, masks) if self._window else None,
            store.new(1, 1, n_rows) if weights.network.temperature != 0.0 else None,
        )
        store.allocate()

    def _rotations(self, kind: int) -> tuple[Rotation, ...]:
        network = self._weights.network
        applied = [(kind, float(network.magnitudes[kind]))]
        if kind == GLOBAL and self.shape.has_long:
            applied.append((LONG, 1.0))  # a row turns in one of the two, and is magnified once
        return tuple(
            Rotation(
                *self._positions[one],
                self._weights.periods[one],
                magnitude,
                int(network.n_rotated),
                bool(network.rope_halves),
            )
            for one, magnitude in applied
        )

    def set(self, batch: Batch, embeddings: NDArray[np.float32]) -> None:
        """Copy a batch's rows: embeddings (B, T, C), positions, masks."""
        runtime, network = self._runtime, self._weights.network
        runtime.set(self.stream[0], embeddings)
        places = place_in_document(batch)
        is_long = document_lengths(batch) > network.original_context
        for kind, (positions, back) in self._positions.items():
            of_kind = places
            if self.shape.has_long and kind != WINDOW:
                of_kind = np.where(is_long == (kind == LONG), places, 0).astype(np.int32)
            runtime.set(positions, of_kind)
            runtime.set(back, -of_kind)
        runtime.set(self.inputs.mask, log_visibility(batch))
        if self.inputs.window_mask is not None:
            runtime.set(self.inputs.window_mask, log_visibility(batch, self._window))
        if self.inputs.query_factors is not None:
            contexts = np.log1p((places // network.original_context).astype(np.float64))
            runtime.set(self.inputs.query_factors, (1.0 + network.temperature * contexts).astype(np.float32))

    def clear_gradient(self) -> None:
        """Set the residual stream's gradient to zero."""
        lib.ggml_backend_tensor_memset(self.gradient, 0, 0, lib.ggml_nbytes(self.gradient))

    @property
    def n_bytes(self) -> int:
        """Memory on the device."""
        return self._store.n_bytes

    def close(self) -> None:
        """Free the memory."""
        self._store.close()


Write = Callable[[Operations], Sequence[Tensor]]


class Compiler:
    """Writes the programs of a model, with products of packed weights or of unpacked ones."""

    def __init__(self, runtime: Runtime, file: ModelFile, weights: ModelWeights, *, packed: bool) -> None:
        self.runtime, self.file, self.weights, self._packed = runtime, file, weights, packed

    def program(self, write: Write, shape: Shape | None = None) -> Program:
        """A program of what a function writes; with a shape for what runs through the layers."""
        weights, file = self.weights, self.file
        n_tiles = sum(len(w.tiles()) for one in weights.layers for w in one.projections.values())
        n_parts = 0
        if shape is not None:
            together = heads_of_a_part(shape.n_sequences, shape.n_tokens, file.H, file.G)
            n_parts = file.L * -(-file.G // together)
        # nodes and leafs
        graph_size = 1024 + 640 * file.L + 128 * n_parts + 16 * (n_tiles + len(weights.head.tiles()))

        def write_all(graph: Graph) -> Sequence[Tensor]:
            return write(Operations(graph, weights.row_numbers, self._packed))

        return Program(self.runtime, graph_size, write_all)

    def forward(self, rows: Rows, pairs: Pairs) -> Program:
        """From the embeddings to the last layer's output, in `rows.stream`."""
        network = Network(self.file, self.weights, rows.inputs, pairs)

        def write(ops: Operations) -> Sequence[Tensor]:
            x = rows.stream[0]
            for index in range(self.file.L):
                x = network.layer(ops, index, Value(x)).tensor
                if rows.shape.gradients or index + 1 == self.file.L:
                    x = ops.copy(x, rows.stream[index + 1 if rows.shape.gradients else 1])
            return []

        return self.program(write, rows.shape)

    def backward(self, rows: Rows, pairs: Pairs) -> Program:
        """From the gradient of the last layer's output to those of the embeddings and of all pairs.

        The outputs are the embeddings' gradient (C, M), then of each pair A's (in, R) and B's (R, out).
        """
        network = Network(self.file, self.weights, rows.inputs, pairs)

        def write(ops: Operations) -> Sequence[Tensor]:
            for pair in pairs.values():
                pair.a.gradient = pair.b.gradient = None
            gradient = ops.first_rows(rows.gradient, rows.shape.n_rows)
            for index in range(self.file.L - 1, -1, -1):
                x = Value(rows.stream[index])
                network.layer(ops, index, x).gradient = gradient
                ops.backward()
                of_layer = [pair for (layer, _), pair in pairs.items() if layer == index]
                for pair in reversed(of_layer):
                    ops.output(pair.b.gradient)
                    ops.output(pair.a.gradient)
                gradient = x.gradient
                ops.graph.expand(gradient)
            return [gradient, *(value.gradient for pair in pairs.values() for value in (pair.a, pair.b))]

        return self.program(write, rows.shape)
