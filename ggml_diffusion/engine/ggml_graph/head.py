"""The head's graph: logits, losses, and the gradient of the residual stream, of N rows at a time.

  loss = sum_i weight_i (log sum_v exp(z_iv) - z_i,target),  z = cap(head norm(x))

The logarithm of the denominator is z_a - log p_a for any token a; the most probable one loses no digits. The
gradient of the logits goes back through unpacked and transposed tiles of the head. A teacher's distribution
is the same head's over another residual stream: it adds -sum_v p_teacher(v) log p(v).

Deliberately not here: which rows, and the sums over them (graph_model.py).
Letters: N rows of a call, M rows of the batch, C hidden size, V vocabulary.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from ggml_diffusion.engine.ggml_graph import ggml
from ggml_diffusion.engine.ggml_graph.operations import Operations, Value
from ggml_diffusion.engine.ggml_graph.programs import Compiler
from ggml_diffusion.engine.ggml_graph.runtime import Store, Tensor

# Logits of one call take at most so many bytes.
LOGIT_BYTES = 128 << 20


def rows_of_a_call(n_rows: int, vocabulary: int) -> int:
    """N for a batch of M rows."""
    return max(1, min(n_rows, LOGIT_BYTES // (4 * vocabulary)))


class Head:
    """The head over a residual stream (C, M); `gradient` (C, M + 1) takes the stream's gradient.

    Its inputs and outputs are arrays of the host. Rows that only fill a call have the number M.
    """

    def __init__(
        self,
        compiler: Compiler,
        stream: Tensor,
        *,
        gradient: Tensor | None = None,
        teacher: Tensor | None = None,
        losses: bool = True,
    ) -> None:
        file = compiler.file
        self.n_rows = rows_of_a_call(int(stream.ne[1]), file.V)
        self._compiler, self._runtime = compiler, compiler.runtime
        self._last_row = int(stream.ne[1])
        self._store = store = Store(compiler.runtime, 16)
        n = self.n_rows
        self._numbers, self._places, self._targets, self._teacher_numbers = (
            store.new(n, kind=ggml.I32) for _ in range(4)
        )
        self._weights, self._teacher_weights = store.new(1, n), store.new(1, n)
        self._hidden = store.new(file.V)  # -inf at the mask token, else 0
        store.allocate()
        self._hidden_token: int | None = None
        self._runtime.set(self._hidden, np.zeros(file.V, dtype=np.float32))

        def write(ops: Operations) -> Sequence[Tensor]:
            logits, back = self._logits(ops, stream, self._numbers)
            if not losses:
                return [logits]
            return self._losses(ops, logits, back, gradient, teacher)

        self._program = compiler.program(write)

    def _logits(self, ops: Operations, stream: Tensor, numbers: Tensor) -> tuple[Tensor, "_Back"]:
        weights = self._compiler.weights
        x = Value(ops.rows(stream, numbers))
        normed = ops.norm(x, weights.output_norm, float(weights.network.rms_eps))
        logits, cap = ops.project(weights.head, normed.tensor), float(weights.network.logit_cap)
        capped = None
        if cap > 0.0:
            capped = ops.tanh(ops.scale(logits, 1.0 / cap))
            logits = ops.scale(capped, cap)
        return logits, _Back(x, normed, capped)

    def _probabilities(self, ops: Operations, logits: Tensor) -> Tensor:
        rows = ops.reshape(logits, int(logits.ne[0]), 1, self.n_rows)
        return ops.reshape(ops.softmax(rows, self._hidden, 1.0), int(logits.ne[0]), self.n_rows)

    def _losses(
        self, ops: Operations, logits: Tensor, back: "_Back", gradient: Tensor | None, teacher: Tensor | None
    ) -> list[Tensor]:
        p = self._probabilities(ops, logits)
        best = ops.largest(p)
        outputs = [ops.elements(logits, self._targets), ops.elements(logits, best), ops.elements(p, best)]
        of_teacher = None
        if teacher is not None:
            of_teacher = self._probabilities(ops, self._logits(ops, teacher, self._teacher_numbers)[0])
            outputs.append(ops.sum_rows(ops.times(of_teacher, logits)))
        for output in outputs:
            ops.output(output)
        if gradient is not None:
            self._gradient(ops, p, of_teacher, back, gradient)
        return outputs

    def _gradient(
        self, ops: Operations, p: Tensor, of_teacher: Tensor | None, back: "_Back", gradient: Tensor
    ) -> None:
        head = self._compiler.weights.head
        if of_teacher is None:
            d_logits = ops.times(p, self._weights)
        else:
            both = ops.times(p, ops.add(self._weights, self._teacher_weights))
            d_logits = ops.subtract(both, ops.times(of_teacher, self._teacher_weights))
        of_target = self._weights
        if back.capped is not None:
            slope = ops.scale(ops.square(back.capped), -1.0, 1.0)
            d_logits = ops.times(d_logits, slope)
            at_target = ops.reshape(ops.elements(slope, self._targets), 1, self.n_rows)
            of_target = ops.times(of_target, at_target)
        d_normed = ops.project_back(head, d_logits)
        target_rows = ops.rows(head.tensor, self._targets)
        back.normed.gradient = ops.subtract(d_normed, ops.times(target_rows, of_target))
        ops.backward()
        ops.set_rows(gradient, back.x.gradient, self._places)

    def hide(self, token: int | None) -> None:
        """Set a token's logit to -inf in all losses; None = no token's."""
        if token != self._hidden_token:
            hidden = np.zeros(self._compiler.file.V, dtype=np.float32)
            if token is not None:
                hidden[token] = -np.inf
            self._runtime.set(self._hidden, hidden)
            self._hidden_token = token

    def logits(self, numbers: NDArray[np.int32]) -> NDArray[np.float32]:
        """Logits (n, V) of up to N rows."""
        self._runtime.set(self._numbers, self._filled(numbers, 0))
        self._program.run()
        (logits,) = self._program.outputs
        values: NDArray[np.float32] = self._runtime.get(logits)
        return values.reshape(self.n_rows, -1)[: len(numbers)]

    def losses(
        self,
        numbers: NDArray[np.int32],
        targets: NDArray[np.int32],
        weights: NDArray[np.float32],
        teacher_numbers: NDArray[np.int32] | None = None,
        teacher_weights: NDArray[np.float32] | None = None,
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_], NDArray[np.float32]]:
        """Of up to N rows: cross-entropies, whether the target is the likeliest token, teacher's losses."""
        n, runtime = len(numbers), self._runtime
        runtime.set(self._numbers, self._filled(numbers, 0))
        runtime.set(self._places, self._filled(numbers, self._last_row))
        runtime.set(self._targets, self._filled(targets, 0))
        runtime.set(self._weights, self._filled(weights, 0))
        if teacher_numbers is not None and teacher_weights is not None:
            runtime.set(self._teacher_numbers, self._filled(teacher_numbers, 0))
            runtime.set(self._teacher_weights, self._filled(teacher_weights, 0))
        self._program.run()
        of_target, largest, probability, *cross = (
            runtime.get(output).reshape(-1)[:n] for output in self._program.outputs
        )
        if self._hidden_token is not None:
            of_target = np.where(targets == self._hidden_token, np.float32(-np.inf), of_target)
        denominator = largest - np.log(probability)
        taught = denominator - cross[0] if cross else np.zeros(n, dtype=np.float32)
        return denominator - of_target, of_target >= largest, taught

    def _filled(self, values: NDArray[np.generic], filling: int) -> NDArray[np.generic]:
        filled = np.full(self.n_rows, filling, dtype=values.dtype)
        filled[: len(values)] = values
        return filled

    @property
    def n_bytes(self) -> int:
        """Memory on the device."""
        return self._store.n_bytes + self._program.n_bytes

    def close(self) -> None:
        """Free the memory."""
        self._program.close()
        self._store.close()


class _Back:
    """What the gradient of logits goes back through."""

    def __init__(self, x: Value, normed: Value, capped: Tensor | None) -> None:
        self.x, self.normed, self.capped = x, normed, capped
