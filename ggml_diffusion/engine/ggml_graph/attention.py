"""Softmax attention with grouped queries under a mask, and its gradient, some key heads at a time.

  P = softmax(cap(scale Q K^T) + mask),  O = P V
  dV = P^T dO,  dP = dO V^T,  dS = scale P (dP - sum(P dP)),  dQ = dS K,  dK = dS^T Q

The queries of all heads that share a key head are rows of one product, so that sums over the group are part
of the products for dK and dV. Scores are (T, T) numbers a head and sequence: where those of all heads are too
many, the key heads go in parts, whose scores are computed again in the backward.
Letters: B sequences, T tokens a sequence, M = B T rows, H query heads, G key/value heads, D head size.
"""

from dataclasses import dataclass

from ggml_diffusion.engine.ggml_graph.operations import Operations, Value
from ggml_diffusion.engine.ggml_graph.runtime import Tensor

# Scores of the heads that are computed together take at most so many bytes.
SCORE_BYTES = 256 << 20


def heads_of_a_part(n_sequences: int, n_tokens: int, heads: int, groups: int) -> int:
    """Key heads that are computed together."""
    scores_bytes = 4 * n_tokens * n_tokens * (heads // groups) * n_sequences
    return max(1, min(groups, SCORE_BYTES // scores_bytes))


def attention(
    ops: Operations,
    inputs: tuple[Value, Value, Value],
    mask: Tensor,
    n_sequences: int,
    scale: float,
    cap: float,
) -> Value:
    """Attention of queries (D, H, M) over keys and values (D, G, M) -> (D H, M).

    Args:
        ops: where it is written.
        inputs: queries, keys, values; H / G neighbouring query heads share a key head.
        mask: (T, T, 1, B or 1), added to the scores, key by query.
        n_sequences: B.
        scale: of the scores.
        cap: their soft cap, 0 = none.

    """
    queries, keys, _ = inputs
    d, heads, n_rows = (int(queries.tensor.ne[i]) for i in range(3))
    groups, t = int(keys.tensor.ne[1]), n_rows // n_sequences
    shared = heads // groups
    step = heads_of_a_part(n_sequences, t, heads, groups)
    ranges = [(first, min(step, groups - first)) for first in range(0, groups, step)]
    parts = [_Part(ops, mask, (d, t, n, n_sequences, shared), scale, cap) for _, n in ranges]
    outputs = [
        part.forward(*_heads(ops, inputs, *here, shared)) for part, here in zip(parts, ranges, strict=True)
    ]
    kept = len(parts) == 1

    def back(dy: Tensor) -> None:
        whole = ops.reshape(ops.contiguous(dy), d, heads, n_rows)
        found: list[tuple[Tensor, ...]] = []
        for part, (first, n) in zip(parts, ranges, strict=True):
            if not kept:
                part.forward(*_heads(ops, inputs, first, n, shared))
            found.append(part.backward(ops.heads(whole, first * shared, n * shared)))
        for value, gradients in zip(inputs, zip(*found, strict=True), strict=True):
            ops.add_gradient(value, ops.join(gradients, 1))

    return ops.record(Value(ops.reshape(ops.join(outputs, 1), d * heads, n_rows)), back)


def _heads(
    ops: Operations, inputs: tuple[Value, Value, Value], first: int, n: int, shared: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The key heads [first, first + n) with their values and queries."""
    q, k, v = (value.tensor for value in inputs)
    return ops.heads(q, first * shared, n * shared), ops.heads(k, first, n), ops.heads(v, first, n)


@dataclass(eq=False)
class _Part:
    """Some key heads: sizes (D, T, their number, B, query heads of each)."""

    ops: Operations
    mask: Tensor
    sizes: tuple[int, int, int, int, int]
    scale: float
    cap: float

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Outputs (D, heads, M); scores and weights are kept for `backward`."""
        ops = self.ops
        d, t, n, n_sequences, shared = self.sizes
        self.queries, self.keys, self.values = (
            self._by_head(q, n * shared),
            self._by_head(k, n),
            self._by_head(v, n),
        )
        scores = ops.reshape(
            ops.multiply(self.keys, self._grouped(self.queries)), t, t, n * shared, n_sequences
        )
        self.capped = None
        if self.cap > 0.0:
            self.capped = ops.tanh(ops.scale(scores, self.scale / self.cap))
            scores = ops.scale(self.capped, self.cap)
        self.weights = ops.softmax(scores, self.mask, 1.0 if self.cap > 0.0 else self.scale)
        out = ops.multiply(ops.transpose(self.values), self._grouped(self.weights))
        return self._by_row(ops.reshape(out, d, t, n * shared, n_sequences))

    def backward(self, dy: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of queries, keys and values from that of the outputs, all (D, heads, M)."""
        ops = self.ops
        d, t, n, n_sequences, shared = self.sizes
        heads = n * shared
        d_out = self._by_head(dy, heads)
        d_weights = ops.reshape(ops.multiply(self.values, self._grouped(d_out)), t, t, heads, n_sequences)
        mean = ops.sum_rows(ops.times(self.weights, d_weights))
        d_scores = ops.times(self.weights, ops.subtract(d_weights, mean))
        if self.capped is not None:
            d_scores = ops.times(d_scores, ops.scale(ops.square(self.capped), -1.0, 1.0))
        d_scores = self._grouped(ops.scale(d_scores, self.scale))
        d_queries = ops.multiply(ops.transpose(self.keys), d_scores)
        d_keys = ops.multiply(ops.transpose(self._grouped(self.queries)), ops.transpose(d_scores))
        weights = ops.transpose(self._grouped(self.weights))
        d_values = ops.multiply(ops.transpose(self._grouped(d_out)), weights)
        return (
            self._by_row(ops.reshape(d_queries, d, t, heads, n_sequences)),
            self._by_row(d_keys),
            self._by_row(d_values),
        )

    def _by_head(self, x: Tensor, n: int) -> Tensor:
        """(D, n, M) -> (D, T, n, B)."""
        d, t, _, n_sequences, _ = self.sizes
        return self.ops.swap_heads(self.ops.reshape(x, d, n, t, n_sequences))

    def _by_row(self, x: Tensor) -> Tensor:
        """(D, T, n, B) -> (D, n, M)."""
        d, t, _, n_sequences, _ = self.sizes
        return self.ops.reshape(self.ops.swap_heads(x), d, int(x.ne[2]), t * n_sequences)

    def _grouped(self, x: Tensor) -> Tensor:
        """(k, T, heads, B) -> (k, T of all heads of a key head, key heads, B)."""
        _, t, n, n_sequences, shared = self.sizes
        return self.ops.reshape(x, int(x.ne[0]), t * shared, n, n_sequences)
