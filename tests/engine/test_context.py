"""Rows beside a context that the base alone computes: against the float64 oracle, and cached against whole.

The oracle knows no cache and no second pass: it computes all rows of both kinds at once, with a factor for
every pair of rows that says whether the one sees the other, and adapts the noisy rows alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import autograd
import autograd.numpy as anp
import numpy as np
import oracle
import pytest
from cases import MASK, lora_adapter, mean_kl, offset_of, random_adapter, relative_errors
from conftest import TinyModel, sizes_for
from numpy.typing import NDArray

from ggml_diffusion.engine.cpu.q4_model import Q4Model
from ggml_diffusion.engine.interface import Batch, ContextRows, ContextType, Int8
from ggml_diffusion.errors import UserError

TOLERANCE = {"f32": 1e-4, "fast": 1e-1}  # as in test_gradients.py
LOSS_TOLERANCE = {"f32": 1e-5, "fast": 2e-2}

Ints = NDArray[np.int32]


@dataclass(frozen=True)
class Rows:
    """Rows of both kinds of one batch, every array (B, ...) and without padding of its own."""

    tokens: Ints
    positions: Ints
    groups: Ints
    lengths: Ints
    context: ContextRows
    targets: Ints
    weights: NDArray[np.float32]

    def batch(
        self, ratio: float, adapter: oracle.Adapter = oracle.EMPTY_ADAPTER, seed: int | None = None
    ) -> Batch:
        return Batch(
            self.tokens,
            ratio,
            self.lengths,
            self.groups,
            offset_of(adapter),
            seed,
            positions=self.positions,
            context=self.context,
        )


def random_rows(V: int, kind: str, seed: int = 0) -> Rows:
    """Three sequences of two documents each, 17 tokens at most; `kind` says how much of it stands.

    Some positions have a standing and a noisy row, as the first row of a hole has.
    """
    rng = np.random.default_rng(seed)
    B = 3
    sequences: list[dict[str, list[Any]]] = []
    for b in range(B):
        rows: dict[str, list[Any]] = {name: [] for name in ("own", "seen", "standing")}
        for document, n in enumerate((9, 8 - 3 * b)):
            stands = {"half": rng.random(n) < 0.5, "one": np.arange(n) < n - 1, "all noisy": np.zeros(n, bool)}[
                "half" if kind == "blocks" else kind
            ]
            if kind == "blocks":
                stands[:] = True
            standing = [(int(p), document) for p in np.flatnonzero(stands)]
            first = len(rows["standing"])
            rows["standing"] += standing
            noisy = np.flatnonzero(~stands | (rng.random(n) < 0.3))
            if kind == "one":
                noisy = np.array([n - 2])
            groups = [(noisy, len(standing))]
            if kind == "blocks":
                groups = [(np.arange(low, min(low + 3, n)), low) for low in range(1, n, 3)]
                groups = [(places - 1, limit) for places, limit in groups]
            for places, limit in groups:
                number = len({group for _, group in rows["own"]})
                rows["own"] += [(int(p), number) for p in places]
                rows["seen"] += [(first, first + limit)] * len(places)
        sequences.append(rows)

    def padded(values: list[list[Any]], shape: tuple[int, ...] = ()) -> Any:
        result = np.zeros((B, max(1, *map(len, values)), *shape), np.int32)
        for target, row in zip(result, values, strict=True):
            if row:
                target[: len(row)] = row
        return result

    own = [rows["own"] for rows in sequences]
    standing = [rows["standing"] for rows in sequences]
    positions = padded([[p for p, _ in one] for one in own])
    tokens = rng.integers(10, V, positions.shape).astype(np.int32)
    tokens[rng.random(positions.shape) < 0.4] = MASK
    lengths = np.array([len(one) for one in own], np.int32)
    is_row = np.arange(positions.shape[1]) < lengths[:, None]
    weights = np.where(is_row & (rng.random(positions.shape) < 0.7), rng.uniform(0.1, 1.0, positions.shape), 0)
    standing_positions = padded([[p for p, _ in one] for one in standing])
    standing_tokens = rng.integers(10, V, standing_positions.shape).astype(np.int32)
    standing_tokens[:, 0] = MASK  # a mask token that stands is a token as any other
    context = ContextRows(
        standing_tokens,
        standing_positions,
        np.array([len(one) for one in standing], np.int32),
        padded([rows["seen"] for rows in sequences], (2,)),
        padded([[d for _, d in one] for one in standing]),
    )
    targets = rng.integers(10, V, positions.shape).astype(np.int32)
    groups = padded([[g for _, g in one] for one in own])
    return Rows(tokens, positions, groups, lengths, context, targets, weights.astype(np.float32))


def visibility(rows: Rows, b: int, ratio: float, seed: int | None) -> oracle.Array:
    """Factor (n, n) of each key of sequence b by query: standing rows, then noisy ones."""
    context, n_standing, n_own = rows.context, int(rows.context.lengths[b]), int(rows.lengths[b])
    assert context.document_ids is not None
    w = np.zeros((n_standing + n_own, n_standing + n_own))

    def future_weight(query: int, key: int) -> float:
        if key <= query:
            return 1.0
        if seed is None:
            return 1.0 - ratio
        return float(oracle.bernoulli_uniform(seed, query, key) < 1.0 - ratio)

    for i in range(n_standing):
        for j in range(n_standing):
            same = context.document_ids[b, i] == context.document_ids[b, j]
            w[i, j] = same and context.positions[b, j] <= context.positions[b, i]
    for i in range(n_own):
        at = int(rows.positions[b, i])
        first, end = context.seen[b, i]
        for j in range(n_standing):
            key = int(context.positions[b, j])
            if first <= j < end and key != at:
                w[n_standing + i, j] = future_weight(at, key)
        for j in range(n_own):
            if rows.groups[b, i] == rows.groups[b, j]:
                w[n_standing + i, n_standing + j] = future_weight(at, int(rows.positions[b, j]))
    return w


def oracle_logits(
    model: oracle.OracleModel, adapter: oracle.Adapter, rows: Rows, b: int, ratio: float, seed: int | None
) -> Any:
    """Logits of the noisy rows of sequence b."""
    context, n_standing, n_own = rows.context, int(rows.context.lengths[b]), int(rows.lengths[b])
    at = np.concatenate([context.positions[b, :n_standing], rows.positions[b, :n_own]])
    offset = adapter.parameters["embedding_offset"][b] if adapter.parameters else 0.0
    standing = oracle.embeddings(model, oracle.EMPTY_ADAPTER, context.tokens[b, :n_standing])
    own = oracle.embeddings(model, adapter, rows.tokens[b, :n_own], offset)
    is_noisy = (np.arange(len(at)) >= n_standing).astype(np.float64)[:, None]
    x = anp.concatenate([standing, own])
    w = visibility(rows, b, ratio, seed)
    return oracle.sequence_logits(model, replace(adapter, rows=is_noisy), x, w, at)[n_standing:]


def oracle_result(
    model: oracle.OracleModel, adapter: oracle.Adapter, rows: Rows, ratio: float, seed: int | None = None
) -> tuple[oracle.Array, dict[str, oracle.Array]]:
    """Cross-entropy (B, R) of the rows with a weight, and the gradient of each parameter."""
    row_loss = np.zeros(rows.weights.shape)

    def total(parameters: Any, keep: bool = False) -> Any:
        result = 0.0
        for b, n in enumerate(rows.lengths):
            used = np.flatnonzero(rows.weights[b, :n])
            logits = oracle_logits(model, replace(adapter, parameters=parameters), rows, b, ratio, seed)[used]
            losses = oracle.row_losses(logits, rows.targets[b, used], adapter.mask_token_id)
            if keep:
                row_loss[b, used] = losses
            result = result + anp.sum(rows.weights[b, used].astype(np.float64) * losses)
        return result

    total(adapter.parameters, keep=True)
    return row_loss, autograd.grad(total)(dict(adapter.parameters))


def engine_result(
    model: Q4Model,
    adapter: oracle.Adapter,
    rows: Rows,
    ratio: float,
    seed: int | None = None,
    int8: Int8 = "none",
) -> tuple[NDArray[np.float32], dict[str, NDArray[np.float32]]]:
    gradients = {
        name: np.zeros(value.shape, np.float32)
        for name, value in adapter.parameters.items()
        if name != "embedding_offset"
    }
    result = model.loss_and_gradients(
        rows.batch(ratio, adapter, seed),
        rows.targets,
        rows.weights,
        lora_adapter(adapter),
        gradients,
        int8=int8,
    )
    assert result.offset_gradient is not None
    return result.row_loss, {**gradients, "embedding_offset": result.offset_gradient}


SHAPES: dict[str, dict[str, Any]] = {
    "llama F32": {"type": "F32"},
    "llama Q4_1": {"type": "Q4_1"},
    "odd heads": {"type": "F32", "H": 6, "G": 2},
}
KINDS = ("half", "one", "all noisy", "blocks")


@pytest.mark.parametrize("ratio", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compute", TOLERANCE)
@pytest.mark.parametrize("shape", SHAPES)
def test_losses_and_gradients_are_the_oracles(
    tiny_model: TinyModel, shape: str, compute: str, kind: str, ratio: float
) -> None:
    path = tiny_model(**SHAPES[shape])
    reference = oracle.load_model(path)
    rows = random_rows(reference.V, kind)
    adapter = random_adapter(reference, rank=3, B=len(rows.tokens))
    expected, expected_gradients = oracle_result(reference, adapter, rows, ratio)
    with Q4Model.from_gguf(path, 2, compute=compute) as model:
        row_loss, gradients = engine_result(model, adapter, rows, ratio)
    np.testing.assert_allclose(row_loss, expected, atol=20 * LOSS_TOLERANCE[compute])
    errors = relative_errors(gradients, expected_gradients)
    assert not {name: error for name, error in errors.items() if not error < TOLERANCE[compute]}
