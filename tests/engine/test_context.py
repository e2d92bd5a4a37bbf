"""Rows beside a context that the base alone computes: against the float64 oracle, and cached against whole.

The oracle knows no cache and no second pass: it computes all rows of both kinds at once, with a factor for
every pair of rows that says whether the one sees the other, and adapts the noisy rows alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import autograd
import autograd.numpy as anp
import numpy as np
import oracle
import pytest
from architectures import ARCHITECTURES, SMALL
from cases import MASK, TEXT, lora_adapter, offset_of, random_adapter, relative_error, relative_errors
from conftest import TinyModel, sizes_for
from llama_reference import llama_tokens
from numpy.typing import NDArray
from test_forward import INT8_SAMPLING, make_reference

from ggml_diffusion.engine.cpu.q4_model import Q4Model
from ggml_diffusion.engine.interface import Batch, Compute, ContextRows, ContextType, Int8
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
            stands = {
                "half": rng.random(n) < 0.5,
                "one": np.arange(n) < n - 1,
                "all noisy": np.zeros(n, bool),
            }["half" if kind == "blocks" else kind]
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
    weights = np.where(
        is_row & (rng.random(positions.shape) < 0.7), rng.uniform(0.1, 1.0, positions.shape), 0
    )
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


def repeated(rows: Rows, times: list[int]) -> Rows:
    """Sequences several times in a row, with other noisy tokens each time."""
    source = np.repeat(np.arange(len(times)), times)
    context = rows.context
    documents = None if context.document_ids is None else context.document_ids[source]
    again = ContextRows(
        context.tokens[source],
        context.positions[source],
        context.lengths[source],
        context.seen[source],
        documents,
    )
    rng = np.random.default_rng(5)
    tokens = rows.tokens[source]
    tokens = np.where(rng.random(tokens.shape) < 0.3, MASK, tokens).astype(np.int32)
    fields = (rows.positions, rows.groups, rows.lengths)
    return Rows(
        tokens, *(field[source] for field in fields), again, rows.targets[source], rows.weights[source]
    )


def test_rows_that_differ_in_anything_are_not_shared() -> None:
    tokens = np.array([[1, 2, 3]] * 5, np.int32)
    positions = np.array([[0, 1, 2]] * 5, np.int32)
    documents = np.zeros((5, 3), np.int32)
    tokens[1, 1], positions[2, 2], documents[3, 2] = 9, 3, 1
    lengths = np.array([3, 3, 3, 3, 2], np.int32)
    rows = ContextRows(tokens, positions, lengths, np.zeros((5, 1, 2), np.int32), documents)
    assert rows.counts.tolist() == [3, 3, 3, 3, 2]
    lengths = np.full(5, 2, np.int32)
    same = ContextRows(
        np.array([[1, 2, n] for n in range(5)]),
        np.array([[0, 1, 9 - n] for n in range(5)]),
        lengths,
        rows.seen,
    )
    assert same.counts.tolist() == [2, 0, 0, 0, 0] and same.first_rows.tolist() == [0] * 5


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


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_has_two_kinds_of_rows(tiny_model: TinyModel, arch: str) -> None:
    path = tiny_model(**SMALL[arch])
    reference = oracle.load_model(path)
    rows = random_rows(reference.V, "half", seed=1)
    adapter = random_adapter(reference, rank=3, B=len(rows.tokens))
    expected, expected_gradients = oracle_result(reference, adapter, rows, 0.7)
    with Q4Model.from_gguf(path, 2, compute="f32") as model:
        row_loss, gradients = engine_result(model, adapter, rows, 0.7)
    np.testing.assert_allclose(row_loss, expected, atol=20 * LOSS_TOLERANCE["f32"])
    errors = relative_errors(gradients, expected_gradients)
    assert not {name: error for name, error in errors.items() if not error < TOLERANCE["f32"]}


@pytest.mark.parametrize("kind", ["half", "blocks", "all noisy"])
def test_sequences_with_the_same_standing_rows_share_them(tiny_model: TinyModel, kind: str) -> None:
    path = tiny_model(type="F32")
    reference = oracle.load_model(path)
    rows = repeated(random_rows(reference.V, kind), [3, 1, 2])
    lengths = rows.context.lengths.tolist()
    if kind != "all noisy":
        assert rows.context.counts.tolist() == [lengths[0], 0, 0, lengths[3], lengths[4], 0]
    adapter = random_adapter(reference, rank=3, B=6)
    expected, expected_gradients = oracle_result(reference, adapter, rows, 0.3)
    with Q4Model.from_gguf(path, 2, compute="f32") as model:
        row_loss, gradients = engine_result(model, adapter, rows, 0.3)
    np.testing.assert_allclose(row_loss, expected, atol=20 * LOSS_TOLERANCE["f32"])
    errors = relative_errors(gradients, expected_gradients)
    assert not {name: error for name, error in errors.items() if not error < TOLERANCE["f32"]}


@pytest.mark.parametrize("kind", KINDS)
def test_the_bernoulli_mask_is_on_what_is_future(tiny_model: TinyModel, kind: str) -> None:
    path = tiny_model(type="F32")
    reference = oracle.load_model(path)
    rows = random_rows(reference.V, kind)
    adapter = random_adapter(reference, rank=3, B=len(rows.tokens))
    expected, expected_gradients = oracle_result(reference, adapter, rows, 0.4, seed=11)
    with Q4Model.from_gguf(path, 2, compute="f32") as model:
        row_loss, gradients = engine_result(model, adapter, rows, 0.4, seed=11)
    np.testing.assert_allclose(row_loss, expected, atol=20 * LOSS_TOLERANCE["f32"])
    errors = relative_errors(gradients, expected_gradients)
    assert not {name: error for name, error in errors.items() if not error < TOLERANCE["f32"]}


def test_threads_and_what_is_kept_change_no_bit(tiny_model: TinyModel) -> None:
    path = tiny_model(type="Q4_1", L=3)
    reference = oracle.load_model(path)
    rows = random_rows(reference.V, "half")
    adapter = random_adapter(reference, rank=3, B=len(rows.tokens))
    results = []
    for n_threads, keep in ((1, "all"), (2, "without-ffn"), (4, "boundaries")):
        with Q4Model.from_gguf(path, n_threads, keep=keep) as model:  # type: ignore[arg-type]  # of them
            results.append(engine_result(model, adapter, rows, 0.7))
    for row_loss, gradients in results[1:]:
        np.testing.assert_array_equal(row_loss, results[0][0])
        for name, gradient in gradients.items():
            np.testing.assert_array_equal(gradient, results[0][1][name], err_msg=name)


def test_a_batch_in_parts_has_the_same_gradients(tiny_model: TinyModel) -> None:
    """Within a budget of one sequence; sums are rounded in another order."""
    path = tiny_model(type="F32")
    reference = oracle.load_model(path)
    rows = random_rows(reference.V, "half")
    adapter = random_adapter(reference, rank=3, B=len(rows.tokens))
    with Q4Model.from_gguf(path, 2) as model:
        budget = model.memory_bytes(int(rows.lengths.max()), 17, rank=3)
        whole_loss, whole = engine_result(model, adapter, rows, 0.7)
    with Q4Model.from_gguf(path, 2, memory_budget=budget) as model:
        assert model.describe_step(3, rows.tokens.shape[1], 3).sequences == 1
        parts_loss, parts = engine_result(model, adapter, rows, 0.7)
    np.testing.assert_array_equal(parts_loss, whole_loss)
    errors = relative_errors(parts, {name: value.astype(np.float64) for name, value in whole.items()})
    assert max(errors.values()) < 1e-5


@pytest.mark.parametrize("type_name", ["Q4_0", "Q4_K"])
def test_int8_products_go_the_same_way(tiny_model: TinyModel, int8_kernels: str, type_name: str) -> None:
    path = tiny_model(type=type_name, **sizes_for(type_name))
    reference = oracle.load_model(path)
    rows = random_rows(reference.V, "half")
    adapter = random_adapter(reference, rank=3, B=len(rows.tokens))
    _, expected = oracle_result(reference, adapter, rows, 0.7)
    with Q4Model.from_gguf(path, 2) as model:
        _, gradients = engine_result(model, adapter, rows, 0.7, int8="both")
    names = list(expected)
    ours, exact = (np.concatenate([np.ravel(of[name]) for name in names]) for of in (gradients, expected))
    cosine = float(ours @ exact / np.linalg.norm(ours) / np.linalg.norm(exact))
    assert cosine >= 0.99  # int8 activations of a tiny model; a row in another's place leaves .9 and less


# -- cached -------------------------------------------------------------------------------------


def text_of(V: int, n: int, seed: int = 5) -> Ints:
    return np.random.default_rng(seed).integers(10, V, n).astype(np.int32)


def two_holes(tokens: Ints) -> tuple[Ints, Ints, Batch]:
    """A text (T,) with holes at 5 to 8 and 15 to 17: what stands, where, and the rows of the holes."""
    places = np.arange(len(tokens))
    is_hole = ((places >= 5) & (places < 9)) | ((places >= 15) & (places < 18))
    rows = np.flatnonzero(np.append(is_hole[1:], False))  # shifted: from the place before
    held = np.where(is_hole, MASK, tokens)[rows].astype(np.int32)
    return tokens[~is_hole], places[~is_hole], Batch(held[None], 0.3, positions=rows[None].astype(np.int32))


# Relative to the logits' size. Rounding of a key: float32's, 2^-9, and 1/254 of a block's largest, which is
# some three times its usual one; a key of another row leaves 0.5 and more.
KV_TOLERANCE: dict[ContextType, float] = {"f32": 1e-6, "bf16": 1e-2, "q8_0": 2e-2}


@pytest.mark.parametrize("keys", KV_TOLERANCE)
def test_cached_logits_are_those_of_a_whole_pass(tiny_model: TinyModel, keys: ContextType) -> None:
    path = tiny_model(type="F32", C=128, H=2, G=1)  # heads of 64, for blocks of 32
    reference = oracle.load_model(path)
    tokens, adapter = text_of(reference.V, 24), random_adapter(reference, rank=3, B=1)
    standing, places, holes = two_holes(tokens)
    holes = replace(holes, embedding_offset=offset_of(adapter))
    n = len(standing)
    whole = replace(
        holes,
        context=ContextRows(
            standing[None],
            places[None].astype(np.int32),
            np.array([n]),
            np.tile(np.array([0, n], np.int32), (1, holes.tokens.shape[1], 1)),
        ),
    )
    with Q4Model.from_gguf(path, 2) as model:
        expected = model.logits(whole, lora_adapter(adapter))[0]
        context = model.context(32, keys=keys)
        for part in np.array_split(np.arange(n), 4):
            context.extend(standing[part], places[part])
        assert context.n_rows == n and context.positions.tolist() == places.tolist()
        everything = np.ones(holes.tokens.shape, bool)
        logits = context.logits(holes, lora_adapter(adapter), select=everything)
        again = context.logits(holes, lora_adapter(adapter), select=everything)
    np.testing.assert_array_equal(logits, again)
    error = relative_error(logits, expected.astype(np.float64))
    print(f"{keys}: {error:.1e}")
    assert error <= KV_TOLERANCE[keys]
    assert keys != "f32" or np.abs(logits - expected).max() <= 1e-5


IN_PIECES: dict[str, dict[str, Any]] = {
    "llama": {"C": 128, "H": 2, "G": 1},  # heads of 64, for blocks of 32
    "gemma3": {  # a window that begins beyond the first panel of keys
        "arch": "gemma3",
        **{"C": 64, "H": 2, "G": 1, "F": 64, "V": 300, "L": 2},
        "keys": {"attention.sliding_window": 40, "attention.sliding_window_pattern": 2},
    },
}


@pytest.mark.parametrize("keys", KV_TOLERANCE)
@pytest.mark.parametrize("arch", IN_PIECES)
@pytest.mark.parametrize(("compute", "int8"), [("f32", "none"), ("fast", "none"), ("fast", "both")])
def test_a_text_has_the_same_bits_in_whatever_pieces_it_is_read(
    tiny_model: TinyModel, int8_kernels: str, compute: Compute, int8: Int8, arch: str, keys: ContextType
) -> None:
    """What verified writing rests on: a row's logits do not tell whether others came with it."""
    path = tiny_model(type="Q8_0", **IN_PIECES[arch])
    rng = np.random.default_rng(3)
    with Q4Model.from_gguf(path, 2, compute=compute) as model:
        tokens = text_of(300, 90)

        def read(pieces: list[int]) -> NDArray[np.float32]:
            context, first, rows = model.context(len(tokens), keys=keys), 0, []
            for n in pieces:
                piece = tokens[first : first + n]
                rows.append(context.extend(piece, select=np.ones(n, bool), int8=int8))
                first += n
            context.close()
            return np.concatenate(rows)

        expected = read([1] * len(tokens))
        for most in (2, 5, 9, 17):
            pieces: list[int] = []
            while (rest := len(tokens) - sum(pieces)) > 0:
                pieces.append(min(rest, int(rng.integers(1, most + 1))))
            np.testing.assert_array_equal(read(pieces), expected, err_msg=str(pieces))


def test_text_that_is_taken_back_leaves_nothing(tiny_model: TinyModel) -> None:
    path = tiny_model(type="F32")
    reference = oracle.load_model(path)
    tokens, wrong = text_of(reference.V, 20), text_of(reference.V, 6, seed=6)
    with Q4Model.from_gguf(path, 2) as model:
        expected = model.logits(Batch(tokens[None]))[0]
        context = model.context(20)
        context.extend(tokens[:11])
        context.extend(wrong)
        context.truncate(11)
        logits = context.extend(tokens[11:], select=np.ones(9, bool))
    assert np.abs(logits - expected[11:]).max() <= 1e-5


def test_several_candidates_over_one_context_do_not_see_each_other(tiny_model: TinyModel) -> None:
    path = tiny_model(type="F32")
    reference = oracle.load_model(path)
    tokens, adapter = text_of(reference.V, 12), lora_adapter(random_adapter(reference, rank=3, B=1))
    candidates = np.random.default_rng(8).integers(10, reference.V, (3, 4)).astype(np.int32)
    places = np.arange(11, 15, dtype=np.int32)
    with Q4Model.from_gguf(path, 2) as model:
        context = model.context(16)
        context.extend(tokens)
        together = Batch(candidates, 0.0, positions=np.tile(places, (3, 1)))
        logits = context.logits(together, adapter, select=np.ones((3, 4), bool)).reshape(3, 4, -1)
        for one, expected in zip(candidates, logits, strict=True):
            alone = Batch(one[None], 0.0, positions=places[None])
            found = context.logits(alone, adapter, select=np.ones((1, 4), bool))
            np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("int8", ["none", "both"])
def test_cached_calls_have_the_same_bits_on_any_number_of_threads(
    tiny_model: TinyModel, int8_kernels: str, int8: Int8
) -> None:
    path = tiny_model(type="Q4_0", C=128, H=4, G=2)
    reference = oracle.load_model(path)
    tokens, adapter = text_of(reference.V, 24), lora_adapter(random_adapter(reference, rank=3, B=1))
    standing, places, holes = two_holes(tokens)
    found = []
    for n_threads in (1, 2, 4):
        with Q4Model.from_gguf(path, n_threads) as model:
            context = model.context(32)
            context.extend(standing, places, int8=int8)
            found.append(context.logits(holes, adapter, select=np.ones(holes.tokens.shape, bool), int8=int8))
    np.testing.assert_array_equal(found[0], found[1])
    np.testing.assert_array_equal(found[0], found[2])


@pytest.mark.parametrize("type_name", ["F32", "Q4_0"])
def test_an_adapter_that_is_made_ready_gives_the_same_bits(tiny_model: TinyModel, type_name: str) -> None:
    """In calls of few rows and of many, and its context's end or another's changes nothing."""
    path = tiny_model(type=type_name)
    reference = oracle.load_model(path)
    adapter, other = (lora_adapter(random_adapter(reference, rank=3, B=1, seed=seed)) for seed in (0, 1))
    tokens = text_of(reference.V, 60)
    with Q4Model.from_gguf(path, 2) as model:
        int8: Int8 = "both" if model.has_int8 else "none"
        for n_rows in (3, 40):
            places = np.arange(60, 60 + n_rows, dtype=np.int32)[None]
            rows, everything = Batch(tokens[None, :n_rows], 0.3, positions=places), np.ones((1, n_rows), bool)
            plain = model.context(128)
            plain.extend(tokens)
            expected = [plain.logits(rows, one, select=everything, int8=int8) for one in (adapter, other)]
            ready, second = model.context(128, adapter=adapter), model.context(128, adapter=other)
            for context in (ready, second):
                context.extend(tokens)
            for _ in range(2):
                found = [
                    context.logits(rows, one, select=everything, int8=int8)
                    for context, one in ((ready, adapter), (second, other))
                ]
                np.testing.assert_array_equal(found, expected)
            second.close()
            found = [ready.logits(rows, one, select=everything, int8=int8) for one in (adapter, other)]
            np.testing.assert_array_equal(found, expected)


def test_before_training_the_first_row_of_a_hole_is_the_base(tiny_model: TinyModel) -> None:
    """At causal ratio 1 and with a zero adapter: the same sums, in another order."""
    path = tiny_model(type="F32")
    tokens = text_of(oracle.load_model(path).V, 24)
    standing, places, holes = two_holes(tokens)
    with Q4Model.from_gguf(path, 2) as model:
        expected = model.logits(Batch(tokens[None]))[0]
        context = model.context(24)
        context.extend(standing, places)
        first = context.logits(replace(holes, causal_ratio=1.0), select=np.arange(7)[None] == 0)
    assert np.abs(first[0] - expected[4]).max() <= 1e-5


WRONG_EXTENSIONS: dict[str, tuple[dict[str, Any], str]] = {
    "no room": ({"tokens": np.full(9, 20)}, "room"),
    "beyond the vocabulary": ({"tokens": np.array([10**6])}, "vocabulary"),
    "positions that fall": ({"tokens": np.array([20, 21]), "positions": [7, 6]}, "rise"),
    "a position that is taken": ({"tokens": np.array([20]), "positions": [3]}, "rise"),
    "a position beyond the room": ({"tokens": np.array([20]), "positions": [8]}, "rise"),
}


@pytest.mark.parametrize(("wrong", "message"), WRONG_EXTENSIONS.values(), ids=WRONG_EXTENSIONS)
def test_a_context_refuses_what_it_cannot_hold(
    tiny_model: TinyModel, wrong: dict[str, Any], message: str
) -> None:
    path = tiny_model(type="F32")
    with Q4Model.from_gguf(path, 1) as model:
        context = model.context(8)
        before = context.extend(np.arange(20, 24), select=np.arange(4) == 3)
        with pytest.raises(UserError, match=message):
            context.extend(**wrong)
        assert context.n_rows == 4  # and is as it was
        context.truncate(3)
        np.testing.assert_allclose(context.extend([23], select=[True]), before, atol=1e-5)


def test_a_context_of_another_model_or_a_closed_one_is_refused(tiny_model: TinyModel) -> None:
    path = tiny_model(type="F32")
    with Q4Model.from_gguf(path, 1) as model:
        context = model.context(8)
        context.close()
        with pytest.raises(ValueError, match="closed"):
            context.extend([20])
    with Q4Model.from_gguf(path, 1) as model, pytest.raises(UserError, match="q8_0 needs heads"):
        model.context(8, keys="q8_0")  # heads of 16


@pytest.mark.parametrize("int8", ["none", "both"])
def test_smollm2_in_pieces_is_no_further_from_exact_than_llama_cpp(
    smollm2_path: Path, int8: Int8, tmp_path: Path
) -> None:
    """The whole text, cached in pieces of several lengths; what a piece gives is what the whole gives."""
    exact_model = oracle.load_model(smollm2_path)
    reference = make_reference(smollm2_path, "Q4_1", exact_model, tmp_path, rank=None)
    tokens = llama_tokens(smollm2_path, TEXT)
    logits = []
    with Q4Model.from_gguf(smollm2_path, 2) as model:
        context = model.context(len(tokens))
        if int8 == "both" and not model.has_int8:
            pytest.skip("these kernels have no int8 products")
        for part in np.split(tokens, [1, 2, 9, 30]):
            logits.append(context.extend(part, select=np.ones(len(part), bool), int8=int8))
    # in int8 both round activations in the same blocks: two draws of one size, see test_forward.py
    margin = INT8_SAMPLING if int8 == "both" else 1.0
    reference.check(1.0, np.concatenate(logits), margin=margin)
