"""Operations with their gradients, composed from forward operations that every GGML device has.

`Operations` writes tensors into a graph. A `Value` is a tensor with the place where its gradient is summed;
each operation on values leaves on the tape how a gradient goes through it, and `backward` follows the tape
from its end. There is no out_prod and none of ggml's *_back operations, which Metal lacks: every derivative
is written here from products, sums and element-wise functions.

ggml names its dimensions from the fastest: (C, M) here is M rows of C numbers. A product `multiply(a, b)` is
over the fastest dimension of both: (k, n), (k, m) -> (n, m). Gradients of frozen weights are not computed.

Deliberately not here: attention (attention.py), and what a network is made of (network.py).
Letters: C hidden size, M rows of a batch, D head size, R LoRA rank.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ggml_diffusion.engine.ggml_graph import ggml
from ggml_diffusion.engine.ggml_graph.ggml import lib
from ggml_diffusion.engine.ggml_graph.runtime import Graph, Tensor

# Packed rows are unpacked to float32 at most so many bytes at a time.
TILE_BYTES = 64 << 20
_GELU = math.sqrt(2.0 / math.pi), 0.044715


@dataclass(eq=False)
class Value:
    """A tensor that a gradient is computed of."""

    tensor: Tensor
    gradient: Tensor | None = None
    transposed: Tensor | None = None  # the same as columns, once somebody needs it


@dataclass(frozen=True, eq=False)
class Weight:
    """Packed rows (in, out) with an optional bias (out)."""

    tensor: Tensor
    bias: Tensor | None = None

    @property
    def n_in(self) -> int:
        """Elements of a row."""
        return int(self.tensor.ne[0])

    @property
    def n_out(self) -> int:
        """Rows."""
        return int(self.tensor.ne[1])

    def tiles(self) -> list[tuple[int, int]]:
        """First row and number of rows of pieces that are unpacked at a time."""
        step = max(1, min(self.n_out, TILE_BYTES // (4 * self.n_in)))
        return [(first, min(step, self.n_out - first)) for first in range(0, self.n_out, step)]


@dataclass(eq=False)
class Pair:
    """LoRA matrices of one projection: A (in, R), B (R, out)."""

    a: Value
    b: Value
    scale: float


@dataclass(frozen=True, eq=False)
class Rotation:
    """One kind of RoPE: positions (M), 1 / frequency of each pair, and the length of cosine and sine."""

    positions: Tensor
    positions_back: Tensor  # their negatives: the inverse rotation
    periods: Tensor
    magnitude: float
    n_rotated: int
    halves: bool


@dataclass(eq=False)
class Operations:
    """Operations that are written into one graph.

    Attributes:
        graph: where they go.
        row_numbers: 0, 1, 2, ... int32, as many as the largest matrix has rows.
        packed: whether packed weights are multiplied as they are, for which most devices round the other
            factor to 8 bits, or are unpacked to float32 before.

    """

    graph: Graph
    row_numbers: Tensor
    packed: bool = False
    _tape: list[Callable[[], None]] = field(default_factory=list)

    # -- the tape --------------------------------------------------------------------------------------------

    def backward(self) -> None:
        """Follow the tape from its end: gradients of all values whose results have one."""
        while self._tape:
            self._tape.pop()()

    def record(self, result: Value, step: Callable[[Tensor], None]) -> Value:
        """Leave on the tape how a result's gradient goes back; returns the result."""

        def follow() -> None:
            if result.gradient is not None:
                step(result.gradient)

        self._tape.append(follow)
        return result

    def add_gradient(self, value: Value, gradient: Tensor) -> None:
        """Add to a value's gradient."""
        value.gradient = gradient if value.gradient is None else self.add(value.gradient, gradient)

    # -- plain tensors ---------------------------------------------------------------------------------------

    def _write(self, function: Any, *arguments: Any) -> Tensor:
        return function(self.graph.context, *arguments)

    def add(self, a: Tensor, b: Tensor) -> Tensor:
        """a + b, b repeated where it is smaller."""
        return self._write(lib.ggml_add, a, b)

    def subtract(self, a: Tensor, b: Tensor) -> Tensor:
        """a - b, b repeated where it is smaller."""
        return self._write(lib.ggml_sub, a, b)

    def times(self, a: Tensor, b: Tensor) -> Tensor:
        """a b, element by element, b repeated where it is smaller."""
        return self._write(lib.ggml_mul, a, b)

    def divide(self, a: Tensor, b: Tensor) -> Tensor:
        """a / b, element by element, b repeated where it is smaller."""
        return self._write(lib.ggml_div, a, b)

    def scale(self, a: Tensor, factor: float, bias: float = 0.0) -> Tensor:
        """factor a + bias."""
        if bias == 0.0:
            return a if factor == 1.0 else self._write(lib.ggml_scale, a, factor)
        return self._write(lib.ggml_scale_bias, a, factor, bias)

    def square(self, a: Tensor) -> Tensor:
        """a^2."""
        return self._write(lib.ggml_sqr, a)

    def tanh(self, a: Tensor) -> Tensor:
        """The hyperbolic tangent."""
        return self._write(lib.ggml_tanh, a)

    def sum_rows(self, a: Tensor) -> Tensor:
        """Sums over the fastest dimension, which becomes 1."""
        return self._write(lib.ggml_sum_rows, a)

    def contiguous(self, a: Tensor) -> Tensor:
        """The same elements without gaps."""
        return a if lib.ggml_is_contiguous(a) else self._write(lib.ggml_cont, a)

    def transpose(self, a: Tensor) -> Tensor:
        """(n, m, ...) -> (m, n, ...), copied."""
        return self._write(lib.ggml_cont, self._write(lib.ggml_transpose, a))

    def reshape(self, a: Tensor, *sizes: int) -> Tensor:
        """The same elements in other dimensions."""
        return self._write(lib.ggml_reshape_4d, a, *sizes, *[1] * (4 - len(sizes)))

    def swap_heads(self, a: Tensor) -> Tensor:
        """(D, heads, T, B) <-> (D, T, heads, B), copied."""
        return self._write(lib.ggml_cont, self._write(lib.ggml_permute, a, 0, 2, 1, 3))

    def multiply(self, a: Tensor, b: Tensor) -> Tensor:
        """(k, n, ...), (k, m, ...) -> (n, m, ...): products over k, summed in float32."""
        product = self._write(lib.ggml_mul_mat, a, b)
        lib.ggml_prec_set_acc(product, ggml.PRECISION_F32)
        return product

    def rows(self, a: Tensor, numbers: Tensor) -> Tensor:
        """Chosen rows of a matrix, unpacked to float32."""
        return self._write(lib.ggml_get_rows, a, numbers)

    def part(self, a: Tensor, first: int, n: int) -> Tensor:
        """Elements [first, first + n) of each row of a float32 matrix, copied."""
        if first == 0 and n == a.ne[0]:
            return a
        return self._write(lib.ggml_cont, self._write(lib.ggml_view_2d, a, n, a.ne[1], a.nb[1], 4 * first))

    def first_rows(self, a: Tensor, n: int) -> Tensor:
        """The first n rows of a matrix, in place."""
        return self._write(lib.ggml_view_2d, a, a.ne[0], n, a.nb[1], 0)

    def output(self, a: Tensor) -> None:
        """Compute now, and keep for the host."""
        lib.ggml_set_output(a)
        self.graph.expand(a)

    def softmax(self, a: Tensor, mask: Tensor, scale: float) -> Tensor:
        """Softmax over the fastest dimension of scale a + mask."""
        return self._write(lib.ggml_soft_max_ext, a, mask, scale, 0.0)

    def largest(self, a: Tensor) -> Tensor:
        """The place of the largest element of each row of a matrix."""
        return self._write(lib.ggml_argmax, a)

    def elements(self, a: Tensor, places: Tensor) -> Tensor:
        """One element of each row of (n, m), by its place: (1, 1, m)."""
        n, m = int(a.ne[0]), int(a.ne[1])
        return self.rows(self.reshape(a, 1, n, m), self.reshape(places, 1, m))

    def set_rows(self, place: Tensor, rows: Tensor, numbers: Tensor) -> None:
        """Write rows to their places in a tensor that stays."""
        self.graph.expand(self._write(lib.ggml_set_rows, place, rows, numbers))

    def heads(self, a: Tensor, first: int, n: int) -> Tensor:
        """Heads [first, first + n) of (D, heads, M), copied where they are not all."""
        if first == 0 and n == a.ne[1]:
            return self.contiguous(a)
        view = self._write(lib.ggml_view_3d, a, a.ne[0], n, a.ne[2], a.nb[1], a.nb[2], first * a.nb[1])
        return self._write(lib.ggml_cont, view)

    def join(self, parts: Sequence[Tensor], dimension: int) -> Tensor:
        """Tensors one after the other along a dimension."""
        whole = parts[0]
        for part in parts[1:]:
            whole = self._write(lib.ggml_concat, whole, part, dimension)
        return whole

    def copy(self, a: Tensor, place: Tensor) -> Tensor:
        """Copy into a tensor that stays; the result is that tensor, computed after the copy."""
        copied = self._write(lib.ggml_cpy, a, place)
        self.graph.expand(copied)
        return copied

    # -- frozen weights --------------------------------------------------------------------------------------

    def unpack(self, weight: Weight, first: int, n: int) -> Tensor:
        """Rows [first, first + n) in float32, (in, n)."""
        packed = weight.tensor
        piece = self._write(lib.ggml_view_2d, packed, packed.ne[0], n, packed.nb[1], first * packed.nb[1])
        if packed.type == ggml.F32:
            return piece
        return self.rows(piece, self._write(lib.ggml_view_1d, self.row_numbers, n, 0))

    def project(self, weight: Weight, x: Tensor) -> Tensor:
        """W x: (in, M) -> (out, M)."""
        if self.packed or weight.tensor.type == ggml.F32:
            return self.multiply(weight.tensor, x)
        pieces = [self.multiply(self.unpack(weight, *tile), x) for tile in weight.tiles()]
        return self.join(pieces, 0)

    def project_back(self, weight: Weight, dy: Tensor) -> Tensor:
        """W^T dy: (out, M) -> (in, M), from unpacked and transposed tiles of W."""
        total = None
        for first, n in weight.tiles():
            tile = self.transpose(self.unpack(weight, first, n))
            product = self.multiply(tile, self.part(dy, first, n))
            total = product if total is None else self.add(total, product)
        return total

    # -- values: each with its gradient ----------------------------------------------------------------------

    def linear(self, weight: Weight, x: Value, pair: Pair | None) -> Value:
        """W x + bias + scale B (A x)."""
        y = self.project(weight, x.tensor)
        if weight.bias is not None:
            y = self.add(y, weight.bias)
        p = None
        if pair is not None:
            p = self.multiply(pair.a.tensor, x.tensor)
            y = self.add(y, self.scale(self.multiply(pair.b.tensor, p), pair.scale))

        def step(dy: Tensor) -> None:
            dx = self.project_back(weight, dy)
            if pair is not None:
                q = self.scale(self.multiply(self.transpose(pair.b.tensor), dy), pair.scale)
                dx = self.add(dx, self.multiply(self.transpose(pair.a.tensor), q))
                if x.transposed is None:
                    x.transposed = self.transpose(x.tensor)
                self.add_gradient(pair.a, self.multiply(x.transposed, self.transpose(q)))
                of_b = self.multiply(self.transpose(p), self.transpose(dy))
                self.add_gradient(pair.b, self.scale(of_b, pair.scale))
            self.add_gradient(x, dx)

        return self.record(Value(y), step)

    def add_block(self, x: Value, block: Value, factor: float) -> Value:
        """X + factor block."""
        y = Value(self.add(x.tensor, self.scale(block.tensor, factor)))

        def step(dy: Tensor) -> None:
            self.add_gradient(x, dy)
            self.add_gradient(block, self.scale(dy, factor))

        return self.record(y, step)

    def norm(self, x: Value, weight: Tensor | None, eps: float) -> Value:
        """RMS norm over the fastest dimension, times a weight; without a weight x itself."""
        if weight is None:
            return x
        unit = self._write(lib.ggml_rms_norm, x.tensor, eps)

        def step(dy: Tensor) -> None:
            n = x.tensor.ne[0]
            g = self.times(dy, weight)
            along = self.scale(self.sum_rows(self.times(unit, g)), 1.0 / n)
            across = self.subtract(g, self.times(unit, along))
            size = self.scale(self.sum_rows(self.square(x.tensor)), 1.0 / n, eps)
            self.add_gradient(x, self.divide(across, self._write(lib.ggml_sqrt, size)))

        return self.record(Value(self.times(unit, weight)), step)

    def head_norm(self, x: Value, weight: Tensor | None, eps: float) -> Value:
        """RMS norm of (heads D, M) in pieces as long as the weight."""
        if weight is None:
            return x
        width, n_rows = int(x.tensor.ne[0]), int(x.tensor.ne[1])
        pieces = self.reshaped(x, int(weight.ne[0]), width // int(weight.ne[0]) * n_rows)
        return self.reshaped(self.norm(pieces, weight, eps), width, n_rows)

    def reshaped(self, x: Value, *sizes: int) -> Value:
        """The same elements in other dimensions."""
        before = [int(x.tensor.ne[i]) for i in range(4)]

        def step(dy: Tensor) -> None:
            self.add_gradient(x, self.reshape(self.contiguous(dy), *before))

        return self.record(Value(self.reshape(x.tensor, *sizes)), step)

    def rotate(self, x: Value, rotation: Rotation) -> Value:
        """RoPE of (D, heads, M)."""

        def step(dy: Tensor) -> None:
            self.add_gradient(x, self._rope(dy, rotation, rotation.positions_back))

        return self.record(Value(self._rope(x.tensor, rotation, rotation.positions)), step)

    def _rope(self, x: Tensor, rotation: Rotation, positions: Tensor) -> Tensor:
        # With base 1 ggml turns pair i by position / factor_i, so that any frequencies are data.
        mode = ggml.ROPE_HALVES if rotation.halves else ggml.ROPE_PAIRS
        settings = (rotation.n_rotated, mode, 0, 1.0, 1.0, 0.0, rotation.magnitude, 0.0, 0.0)
        return self._write(lib.ggml_rope_ext, x, positions, rotation.periods, *settings)

    def scale_rows(self, x: Value, factors: Tensor) -> Value:
        """(D, heads, M) times factors (1, 1, M)."""

        def step(dy: Tensor) -> None:
            self.add_gradient(x, self.times(dy, factors))

        return self.record(Value(self.times(x.tensor, factors)), step)

    def gated(self, gate: Value, up: Value, *, gelu: bool) -> Value:
        """Act(gate) up, with SiLU or GELU by its tanh formula."""
        active, slope = self._gelu(gate.tensor) if gelu else self._silu(gate.tensor)

        def step(dy: Tensor) -> None:
            self.add_gradient(gate, self.times(self.times(dy, up.tensor), slope()))
            self.add_gradient(up, self.times(dy, active))

        return self.record(Value(self.times(active, up.tensor)), step)

    def _silu(self, x: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
        share = self._write(lib.ggml_sigmoid, x)
        active = self.times(x, share)
        return active, lambda: self.add(share, self.times(active, self.scale(share, -1.0, 1.0)))

    def _gelu(self, x: Tensor) -> tuple[Tensor, Callable[[], Tensor]]:
        c, cubic = _GELU
        squares = self.square(x)
        t = self.tanh(self.times(x, self.scale(squares, c * cubic, c)))
        half = self.scale(t, 0.5, 0.5)

        def slope() -> Tensor:
            inner = self.times(x, self.scale(squares, 1.5 * c * cubic, 0.5 * c))
            return self.add(half, self.times(inner, self.scale(self.square(t), -1.0, 1.0)))

        return self.times(x, half), slope
