"""A decoder from operations: the layers of every architecture as the core's description says them.

  a = x + s post(O attention(rope(norm(Q pre(x))), rope(norm(K pre(x))), V pre(x)))
  y = a + s post(D (gate(G pre(a)) * U pre(a)))

as in csrc/transformer.c, which is its twin; no architecture is known by name. Rows are (C, M) with M = B T,
in whole sequences with their padding, since a graph has one shape.
Deliberately not here: graphs that run (programs.py) and arrays of the host (graph_model.py).
"""

from dataclasses import dataclass

from ggml_diffusion.engine.ggml_graph.attention import attention
from ggml_diffusion.engine.ggml_graph.operations import Operations, Pair, Rotation, Value
from ggml_diffusion.engine.ggml_graph.runtime import Tensor
from ggml_diffusion.engine.ggml_graph.weights import (
    ATTENTION_NORM,
    ATTENTION_POST,
    FFN_NORM,
    FFN_POST,
    KEY_NORM,
    QUERY_NORM,
    LayerWeights,
    ModelWeights,
)
from ggml_diffusion.formats.lora import TargetModule
from ggml_diffusion.formats.model_file import ModelFile


@dataclass(frozen=True, eq=False)
class RowInputs:
    """What the rows of a batch are, beside their embeddings.

    Attributes:
        n_sequences: B.
        rotations: by kind of RoPE those that are applied one after the other; a row has position 0 in those
            that are not for it.
        mask: (T, T, 1, B or 1) log of each key's weight, key by query.
        window_mask: the same in layers with a window, None where the model has none.
        query_factors: (1, 1, M), None where queries do not grow.

    """

    n_sequences: int
    rotations: dict[int, tuple[Rotation, ...]]
    mask: Tensor
    window_mask: Tensor | None
    query_factors: Tensor | None


Pairs = dict[tuple[int, TargetModule], Pair]


@dataclass(frozen=True, eq=False)
class Network:
    """The layers of a model, for a graph that is being written."""

    file: ModelFile
    weights: ModelWeights
    rows: RowInputs
    pairs: Pairs

    def layer(self, ops: Operations, index: int, x: Value) -> Value:
        """A layer's output (C, M) from its input."""
        one, scale = self.weights.layers[index], float(self.weights.network.residual_scale)
        block = self._norm(ops, self._attention(ops, index, one, x), one.norms[ATTENTION_POST])
        x = ops.add_block(x, block, scale)
        return ops.add_block(x, self._norm(ops, self._ffn(ops, index, one, x), one.norms[FFN_POST]), scale)

    def _norm(self, ops: Operations, x: Value, weight: Tensor | None) -> Value:
        return ops.norm(x, weight, float(self.weights.network.rms_eps))

    def _linear(self, ops: Operations, index: int, target: TargetModule, x: Value) -> Value:
        weight = self.weights.layers[index].projections[target]
        return ops.linear(weight, x, self.pairs.get((index, target)))

    def _attention(self, ops: Operations, index: int, one: LayerWeights, x: Value) -> Value:
        file, network = self.file, self.weights.network
        normed = self._norm(ops, x, one.norms[ATTENTION_NORM])
        q = self._linear(ops, index, TargetModule.QUERY_PROJ, normed)
        k = self._linear(ops, index, TargetModule.KEY_PROJ, normed)
        v = self._linear(ops, index, TargetModule.VALUE_PROJ, normed)
        n_rows, eps = int(x.tensor.ne[1]), float(network.rms_eps)
        q = ops.reshaped(ops.head_norm(q, one.norms[QUERY_NORM], eps), file.D, file.H, n_rows)
        k = ops.reshaped(ops.head_norm(k, one.norms[KEY_NORM], eps), file.D, file.G, n_rows)
        v = ops.reshaped(v, file.D, file.G, n_rows)
        for rotation in self.rows.rotations.get(one.rope, ()):
            q, k = ops.rotate(q, rotation), ops.rotate(k, rotation)
        if self.rows.query_factors is not None:
            q = ops.scale_rows(q, self.rows.query_factors)
        mask = self.rows.window_mask if one.window and self.rows.window_mask is not None else self.rows.mask
        scale, cap = float(network.score_scale), float(network.score_cap)
        out = attention(ops, (q, k, v), mask, self.rows.n_sequences, scale, cap)
        return self._linear(ops, index, TargetModule.OUTPUT_PROJ, out)

    def _ffn(self, ops: Operations, index: int, one: LayerWeights, x: Value) -> Value:
        normed = self._norm(ops, x, one.norms[FFN_NORM])
        gate = self._linear(ops, index, TargetModule.GATE_PROJ, normed)
        up = self._linear(ops, index, TargetModule.UP_PROJ, normed)
        h = ops.gated(gate, up, gelu=bool(self.weights.network.gelu_gate))
        return self._linear(ops, index, TargetModule.DOWN_PROJ, h)


def windows(weights: ModelWeights) -> int:
    """The window of the layers that have one, 0 where none has; a model has one width."""
    return max((one.window for one in weights.layers), default=0)


def ropes(weights: ModelWeights) -> set[int]:
    """The kinds of RoPE that the layers take."""
    return {one.rope for one in weights.layers if one.rope >= 0}
