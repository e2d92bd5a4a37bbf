"""The engine of ggml graphs is right on every device that is here: against the float64 oracle and the core.

GGML's own CPU backend is always here. Another device (CUDA, Metal, Vulkan) is tested where the installed
llama-cpp-python has one: in CI a software Vulkan, in an environment of its own (test_vulkan.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from architectures import FEATURES, SMALL, Feature
from cases import engine_batch, lora_adapter, packed_batch, random_adapter, random_batch, relative_errors
from conftest import TinyModel, sizes_for
from test_architectures import LOGIT_FLOAT32, NOT_COMPUTED
from test_distillation import check_student
from test_gradients import BATCHES, SHAPES, Case, check, engine_result, make_trainer, packed, whole

from ggml_diffusion.engine.cpu.q4_model import Q4Model
from ggml_diffusion.engine.ggml_graph import graph_model, weights
from ggml_diffusion.engine.ggml_graph.devices import find_device, how_to_install, list_devices
from ggml_diffusion.engine.ggml_graph.ggml import F32
from ggml_diffusion.engine.ggml_graph.graph_model import GraphModel
from ggml_diffusion.engine.ggml_graph.operations import Weight
from ggml_diffusion.engine.ggml_graph.probe import missing_operations, types_taken
from ggml_diffusion.engine.interface import Batch
from ggml_diffusion.engine.open import open_engine
from ggml_diffusion.errors import UserError
from ggml_diffusion.formats.model_check import read_model
from ggml_diffusion.formats.tensor_types import TENSOR_TYPES

KINDS = sorted({device.kind for device in list_devices() if device.type != "accelerator"})
# How close to the oracle, in the words of test_gradients.py: GGML's CPU backend multiplies in float32. Other
# devices may round the factors of a product to TF32 or float16 (2^-11) and are held to the rule for bfloat16.
CLOSENESS = {kind: "f32" if kind == "cpu" else "fast" for kind in KINDS}
MIN_COSINE = 0.999


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    """Every kind of device that is here, in turn."""
    name: str = request.param
    return name


Check = Callable[..., None]


@pytest.fixture
def check_here(tiny_model: TinyModel, kind: str) -> Check:
    """`check` of test_gradients.py on a device."""

    def run(case: Case, name: str) -> None:
        check(tiny_model, case, CLOSENESS[kind], name, open_engine=opener(kind))

    return run


def opener(kind: str, **options: Any) -> Callable[[Path], GraphModel]:
    # one thread: the barriers between threads of GGML's CPU backend cost more than these models' work
    return partial(GraphModel.from_gguf, device=kind, n_threads=1, **options)


@pytest.mark.parametrize("causal_ratio", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("arch", SMALL)
def test_every_gradient_of_every_architecture_is_the_oracles(
    check_here: Check, arch: str, causal_ratio: float
) -> None:
    check_here(Case(dict(SMALL[arch]), packed, causal_ratio, prediction="shifted"), "packed")


def test_every_type_of_weights(check_here: Check, each_type: str) -> None:
    check_here(Case({"type": each_type, **sizes_for(each_type)}, packed, 0.7), "packed")


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape(check_here: Check, shape: str) -> None:
    check_here(Case(SHAPES[shape], whole, 0.4, 5), "whole")


@pytest.mark.parametrize("seed", [None, 77], ids=["soft", "bernoulli"])
@pytest.mark.parametrize("name", BATCHES)
def test_every_kind_of_batch(check_here: Check, name: str, seed: int | None) -> None:
    check_here(Case({"type": "Q4_1"}, BATCHES[name], 0.6, bernoulli_seed=seed), name)


@pytest.mark.parametrize("arch", ["gemma2", "gemma3", "mistral3"])
def test_windows_and_temperatures_of_longer_texts(check_here: Check, arch: str) -> None:
    keys = {"attention.sliding_window": 24, "attention.sliding_window_pattern": 2}
    sizes = {"C": 32, "H": 2, "G": 1, "F": 48, "L": 2}
    options = {"arch": arch, **sizes, **({"keys": keys} if arch != "mistral3" else {})}
    case = Case(options, lambda V: packed_batch(V, B=2, T=131), 0.4, bernoulli_seed=9)
    check_here(case, "long")


@pytest.mark.parametrize("rows_back", [0, 1])
@pytest.mark.parametrize("arch", ["llama", "gemma2", "granite"])
def test_a_teacher(tiny_model: TinyModel, kind: str, arch: str, rows_back: int) -> None:
    closeness: Any = CLOSENESS[kind]
    check_student(tiny_model(**SMALL[arch]), rows_back, closeness, open_engine=opener(kind))


@pytest.mark.parametrize("feature", [name for name in FEATURES if name not in NOT_COMPUTED])
def test_logits_of_every_feature_of_a_file_are_the_oracles(tiny_model: TinyModel, feature: str) -> None:
    # on the CPU backend alone: what differs from file to file is the graph, not the device
    case: Feature = FEATURES[feature]
    path = tiny_model(**case.options)
    tokens = (
        np.random.default_rng(3).integers(10, 256, 300 if case.n_ctx is not None else 40).astype(np.int32)
    )
    exact = oracle.load_model(path, n_ctx=len(tokens))
    expected = oracle.batch_logits(exact, tokens[None], 0.6)[0]
    with GraphModel.from_gguf(path, n_threads=1) as model:
        ours = model.logits(Batch(tokens[None], 0.6))[0]
    assert np.abs(ours - expected).max() < LOGIT_FLOAT32 * case.depth


def test_documents_of_a_batch_may_be_longer_and_shorter_than_the_original_context(
    tiny_model: TinyModel,
) -> None:
    path = tiny_model(arch="phi3", keys={"rope.scaling.original_context_length": 8})
    ids = np.array([[0] * 12 + [1] * 4, [0] * 8 + [1] * 8], np.int32)
    tokens = np.random.default_rng(4).integers(10, 200, ids.shape)
    batch = Batch(tokens, 0.5, np.array([16, 14]), ids)
    with Q4Model.from_gguf(path, 1, compute="f32") as core, GraphModel.from_gguf(path, n_threads=1) as model:
        expected, ours = core.logits(batch), model.logits(batch)
    np.testing.assert_allclose(ours, expected, atol=1e-4)


def test_weights_in_tiles_give_the_same_gradients(check_here: Check, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ggml_diffusion.engine.ggml_graph.operations.TILE_BYTES", 4 * 64 * 7)
    monkeypatch.setattr("ggml_diffusion.engine.ggml_graph.head.LOGIT_BYTES", 4 * 300 * 5)
    check_here(Case({"type": "Q4_0", "tied": True}, packed, 0.3), "packed")


@pytest.mark.parametrize("arch", ["llama", "gemma2"])
def test_attention_in_parts_gives_the_same_gradients(
    check_here: Check, monkeypatch: pytest.MonkeyPatch, arch: str
) -> None:
    # a key head at a time, and at last the one that is left over
    monkeypatch.setattr("ggml_diffusion.engine.ggml_graph.attention.SCORE_BYTES", 4 * 13 * 13 * 2 * 3 * 2)
    check_here(Case({**SMALL[arch], "H": 6, "G": 3, "C": 48}, packed, 0.3), "packed")


@pytest.mark.parametrize("on_host", [True, False])
def test_weights_that_are_uploaded_or_stay_on_the_host_give_the_same_gradients(
    check_here: Check, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, kind: str, on_host: bool
) -> None:
    # as on a device that maps nothing, which GGML's CPU backend does; or that takes no quantised type
    if on_host:
        takes = weights.device_takes
        monkeypatch.setattr(weights, "device_takes", lambda *a: a[1] == F32 and takes(*a))
    else:
        found = find_device(kind)
        cpu = find_device("cpu")
        uploading = {
            "cpu": replace(cpu, maps_host_memory=False),
            kind: replace(found, maps_host_memory=False),
        }
        monkeypatch.setattr(graph_model, "find_device", uploading.__getitem__)
    path = tiny_model(type="Q5_0")
    with opener(kind)(path) as model:
        assert dict(model.on_host) == ({"q5_0": 2 * 7 + 1} if on_host else {})
        assert (model._weights.n_bytes > path.stat().st_size / 2) == (not on_host)  # type: ignore[union-attr]
    check_here(Case({"type": "Q5_0"}, packed, 0.7), "packed")


def test_a_batch_in_parts_has_the_loss_and_the_gradients_of_the_whole(
    tiny_model: TinyModel, kind: str
) -> None:
    path = tiny_model(type="Q4_1")
    reference = oracle.load_model(path)
    batch = packed_batch(reference.V, B=3, T=13)
    adapter = random_adapter(reference, rank=3, B=3)
    results = []
    for budget in (None, 1):
        with opener(kind, memory_budget=budget)(path) as model:
            assert model.describe_step(3, 13, 3).sequences == (3 if budget is None else 1)
            results.append(engine_result(model, adapter, batch, Case({}, packed)))
            logits = model.logits(engine_batch(batch, 0.3, adapter), lora_adapter(adapter))
    (whole_result, whole_gradients), (result, gradients) = results
    # sums in another order; and in half precision products of another size go by other kernels
    exact = CLOSENESS[kind] == "f32"
    assert result.loss == pytest.approx(whole_result.loss, rel=1e-5 if exact else 5e-3)
    assert max(relative_errors(gradients, whole_gradients).values()) < (1e-4 if exact else 5e-2)
    with opener(kind)(path) as model:
        at_once = model.logits(engine_batch(batch, 0.3, adapter), lora_adapter(adapter))
    np.testing.assert_allclose(logits, at_once, atol=1e-4 if exact else 5e-2)


def test_the_same_call_gives_the_same_bits_and_adds_to_what_is_there(
    tiny_model: TinyModel, kind: str
) -> None:
    path = tiny_model(type="Q4_0")
    reference = oracle.load_model(path)
    batch, adapter = packed_batch(reference.V, B=3, T=13), random_adapter(reference, rank=3, B=3)
    lora, into = lora_adapter(adapter), engine_batch(batch, 0.3, adapter)
    with opener(kind)(path) as model:
        first, gradients = engine_result(model, adapter, batch, Case({}, packed))
        other = random_batch(reference.V, B=2, T=9)
        for length in range(5, 9):  # so many shapes that the first one's graphs are gone
            model.loss(Batch(other.tokens[:, :length]), other.targets[:, :length], other.weights[:, :length])
        second, again = engine_result(model, adapter, batch, Case({}, packed))
        twice = {name: value.copy() for name, value in gradients.items() if name != "embedding_offset"}
        model.loss_and_gradients(into, batch.targets, batch.weights, lora, twice)
        alone = model.loss(into, batch.targets, batch.weights, lora)
    assert first.loss == second.loss == alone.loss and alone.offset_gradient is None
    for name, value in gradients.items():
        assert np.array_equal(value, again[name]), name
    for name, value in twice.items():
        np.testing.assert_allclose(value, 2 * gradients[name], rtol=1e-5, atol=1e-6 * np.abs(value).max())


def test_nothing_masked_gives_no_loss_and_zero_gradients(tiny_model: TinyModel, kind: str) -> None:
    path = tiny_model()
    reference = oracle.load_model(path)
    batch, adapter = random_batch(reference.V, B=2, T=6), random_adapter(reference, rank=3, B=2)
    batch.weights[...] = 0.0
    with opener(kind)(path) as model:
        result, gradients = engine_result(model, adapter, batch, Case({}, packed))
    assert result.loss == 0.0 and not result.row_loss.any() and not result.row_correct.any()
    assert all(not value.any() for value in gradients.values())


@pytest.mark.parametrize("arch", SMALL)
def test_products_of_packed_weights_leave_the_gradient_where_it_was(
    tiny_model: TinyModel, kind: str, arch: str
) -> None:
    path = tiny_model(arch=arch, type="Q8_0", **{"C": 128, "F": 192, "H": 4})
    case = Case({}, lambda V: random_batch(V, B=2, T=64))
    reference = oracle.load_model(path)
    batch, adapter = case.batch(reference.V), random_adapter(reference, rank=3, B=2, gain=0.3)
    gradients = []
    with opener(kind)(path) as model:
        assert model.has_int8
        for products in ("none", "both"):
            _, found = engine_result(model, adapter, batch, case, int8=products)  # type: ignore[arg-type]
            gradients.append(np.concatenate([found[name].ravel() for name in sorted(found)]))
    a, b = gradients
    cosine = float(a @ b / np.linalg.norm(a) / np.linalg.norm(b))
    print(f"{arch} on {kind}: 1 - cosine {1 - cosine:.1e}")
    assert cosine >= MIN_COSINE


def test_float_weights_have_no_int8_products(tiny_model: TinyModel) -> None:
    tokens = np.full((1, 4), 20, np.int32)
    for options, compute in (({}, "fast"), ({"type": "Q4_0"}, "f32")):
        with GraphModel.from_gguf(tiny_model(**options), n_threads=1, compute=compute) as model:  # type: ignore[arg-type]
            assert not model.has_int8
            with pytest.raises(UserError, match="int8 products need"):
                model.logits(Batch(tokens), int8="both")


def test_ten_adamw_steps_end_where_the_cores_do(tiny_model: TinyModel, kind: str) -> None:
    path = tiny_model(type="Q4_0")
    reference = oracle.load_model(path)
    batch = random_batch(reference.V, B=3, T=11)
    batch.weights[:, 0] = 0.0
    adapter = random_adapter(reference, rank=4, B=3)
    rng = np.random.default_rng(8)
    values = {name: value for name, value in adapter.parameters.items() if name != "embedding_offset"}
    values["time_embedding.weight"] = 0.03 * rng.standard_normal((reference.C, 16))
    values["time_embedding.bias"] = 0.03 * rng.standard_normal(reference.C)
    adapter = oracle.Adapter(values, adapter.alpha, adapter.mask_token_id)
    times = np.array([0.031, 0.5, 1.0], np.float32)
    losses: list[list[float]] = []
    for model in (Q4Model.from_gguf(path, 1, compute="f32"), opener(kind)(path)):
        with model:
            trainer = make_trainer(model, adapter, "shifted")
            losses.append([])
            for _ in range(10):
                loss, gradients = trainer.loss_and_gradients(
                    batch.targets, batch.tokens, batch.weights, times, 0.4, None
                )
                flat = np.zeros_like(trainer.parameters.flat)
                for name, gradient in gradients.items():
                    flat[trainer.parameters.slices[name]] = gradient.ravel()
                trainer.optimizer.step(flat, 3e-3)
                losses[-1].append(loss)
    # AdamW's first steps go by signs, so that rounding moves single entries; the losses stay together
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3 if CLOSENESS[kind] == "f32" else 2e-2)


def test_the_cpu_backend_has_every_operation_and_every_type() -> None:
    device = find_device("cpu")
    assert missing_operations(device) == []
    assert types_taken(device) == (list(TENSOR_TYPES), [])


def test_a_device_that_is_missing_is_one_line_that_says_how_to_install_it(tiny_model: TinyModel) -> None:
    missing = next(kind for kind in ("metal", "cuda", "vulkan") if kind not in KINDS)
    with pytest.raises(UserError, match=f"no {missing} device: CMAKE_ARGS=") as caught:
        open_engine(read_model(tiny_model()), device=missing)
    assert "\n" not in str(caught.value) and how_to_install(missing) in str(caught.value)


def test_what_the_core_refuses_is_refused_in_the_same_words(tiny_model: TinyModel) -> None:
    path = tiny_model()
    tokens = np.full((1, 4), 20, np.int32)
    ones = np.ones((1, 4), np.float32)
    n_context = read_model(path).context_length
    calls: list[Callable[[Any], object]] = [
        lambda model: model.logits(Batch(np.full((1, 4), 10**6))),
        lambda model: model.logits(Batch(np.full((1, n_context + 1), 20))),
        lambda model: model.logits(Batch(tokens, 1.5)),
        lambda model: model.loss(Batch(tokens), np.full((1, 4), 10**6), ones),
        lambda model: model.loss(Batch(tokens), tokens, ones * np.nan),
    ]
    with Q4Model.from_gguf(path, 1) as core, GraphModel.from_gguf(path, n_threads=1) as model:
        for call in calls:
            with pytest.raises(UserError) as expected:
                call(core)
            with pytest.raises(UserError) as ours:
                call(model)
            assert str(ours.value) == str(expected.value)


def test_a_closed_model_says_so(tiny_model: TinyModel) -> None:
    model = GraphModel.from_gguf(tiny_model(), n_threads=1)
    model.close()
    model.close()
    with pytest.raises(ValueError, match="closed"):
        model.logits(Batch(np.full((1, 4), 20, np.int32)))


def test_graphs_of_few_shapes_are_kept(tiny_model: TinyModel) -> None:
    with GraphModel.from_gguf(tiny_model(), n_threads=1) as model:
        for n_tokens in range(3, 12):
            model.logits(Batch(np.full((1, n_tokens), 20, np.int32)))
        assert len(model._sessions) == graph_model.KEPT_SHAPES


def test_a_tile_is_at_least_one_row() -> None:
    class Tensor:
        ne = (1 << 30, 3)

    assert Weight(Tensor()).tiles() == [(0, 1), (1, 1), (2, 1)]
