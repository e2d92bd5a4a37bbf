"""What the engine promises beside its arithmetic: memory policies, bits, plans, profiles."""

import re
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import oracle
import pytest
from cases import engine_batch, lora_adapter, packed_batch, random_adapter, relative_errors
from conftest import INT8_KERNELS, KERNEL_SETS, TinyModel, sizes_for
from numpy.typing import NDArray

from ggml_diffusion.engine.cpu import q4_model
from ggml_diffusion.engine.cpu.q4_model import Q4Model
from ggml_diffusion.engine.interface import Batch, Compute, Int8, LossResult
from ggml_diffusion.engine.memory_plan import Keep, plan_step
from ggml_diffusion.errors import UserError
from ggml_diffusion.formats.tensor_types import TENSOR_TYPES

POLICIES: tuple[Keep, ...] = ("all", "without-ffn", "boundaries")


def step(
    path: str,
    keep: Keep | Literal["auto"],
    n_threads: int = 2,
    *,
    compute: Compute = "fast",
    int8: Int8 = "none",
    memory_budget: int | None = None,
) -> tuple[LossResult, dict[str, NDArray[np.float32]]]:
    reference = oracle.load_model(path)
    batch = packed_batch(reference.V, B=3, T=21)
    adapter = random_adapter(reference, rank=3, B=3)
    lora = lora_adapter(adapter)
    assert lora.mask_embedding is not None
    arrays = {**lora.tensors, "mask_embedding": lora.mask_embedding}
    gradients = {name: np.zeros_like(value) for name, value in arrays.items()}
    with Q4Model.from_gguf(path, n_threads, keep=keep, compute=compute, memory_budget=memory_budget) as model:
        result = model.loss_and_gradients(
            engine_batch(batch, 0.4, adapter),
            batch.targets,
            batch.weights,
            lora,
            gradients,
            int8=int8,
        )
    return result, gradients


@pytest.mark.parametrize("keep", POLICIES[1:])
@pytest.mark.parametrize("n_threads", [1, 3])
def test_what_is_kept_for_the_backward_changes_no_bit(
    tiny_model: TinyModel, keep: Keep, n_threads: int
) -> None:
    path = str(tiny_model(type="Q4_1", L=3))
    expected, expected_gradients = step(path, "all")
    result, gradients = step(path, keep, n_threads)
    assert result.loss == expected.loss
    for name, gradient in expected_gradients.items():
        assert gradient.any()
        np.testing.assert_array_equal(gradients[name], gradient, err_msg=name)
    np.testing.assert_array_equal(result.offset_gradient, expected.offset_gradient)


def test_keeping_less_plans_less_memory(tiny_model: TinyModel) -> None:
    with Q4Model.from_gguf(tiny_model(type="Q4_1", L=3), 1) as model:
        planned = [model.memory_bytes(512, 128, rank=8, keep=keep) for keep in POLICIES]
        assert planned[0] > planned[1] > planned[2]
        assert model.memory_bytes(512, 128, rank=8, gradients=False) < planned[2]


def test_the_plan_keeps_what_fits_and_goes_in_parts_before_it_computes_again() -> None:
    def planned_bytes(keep: Keep, sequences: int) -> int:
        return {"all": 100, "without-ffn": 60, "boundaries": 10}[keep] * sequences

    def plan(budget: int | None, rows: int = 256) -> tuple[str, int]:
        found = plan_step(8, rows, budget, planned_bytes)
        return found.keep, found.sequences

    assert plan(None) == ("all", 8)
    assert plan(800) == ("all", 8)
    assert plan(799) == ("all", 4)
    assert plan(399) == ("all", 3)  # 3 + 3 + 2
    assert plan(250) == ("all", 2)
    assert plan(65) == ("without-ffn", 1)
    # of 16 rows a sequence, unpacking for few of them costs more than computing layers again for all
    assert plan(100, rows=16) == ("boundaries", 8)
    assert plan(5) == ("boundaries", 1)  # nothing fits: the least there is


def test_batches_are_cut_into_as_few_nearly_equal_parts_as_fit() -> None:
    for n_sequences in range(1, 40):
        for most in range(1, n_sequences + 1):
            # `most` sequences fit, one more does not; by definition, one number of parts after the other
            parts = (-(-n_sequences // n_parts) for n_parts in range(1, n_sequences + 1))
            expected = next(sequences for sequences in parts if sequences <= most)
            found = plan_step(n_sequences, 1000, most, lambda keep, sequences: sequences)
            assert found.sequences == expected


def test_a_batch_of_a_billion_sequences_is_planned_at_once(tiny_model: TinyModel) -> None:
    with Q4Model.from_gguf(tiny_model(type="Q4_1"), 1, memory_budget=1 << 24) as model:
        plan = model.describe_step(10**9, 32, rank=2)
        assert 0 < plan.sequences < 10**6
        assert plan.least_bytes <= plan.memory_bytes <= 1 << 24
        # more than the core can count is told in numbers all the same
        assert model.describe_step(1, 2**40, rank=2).memory_bytes > 2**45
        assert model.describe_step(1, 32, rank=2**40).memory_bytes > 2**45


def test_a_call_that_memory_is_too_small_for_is_refused(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_model(type="Q4_1")
    tokens = np.ones((2, 20), dtype=np.int32)
    targets, weights = np.ones_like(tokens), np.ones(tokens.shape, dtype=np.float32)
    with Q4Model.from_gguf(path, 1) as model:
        adapter = lora_adapter(random_adapter(oracle.load_model(str(path)), rank=2, B=2))
        gradients = {name: np.zeros_like(value) for name, value in adapter.tensors.items()}
        available = model.memory_bytes(40, 20, gradients=False) - 1
        monkeypatch.setattr(q4_model, "memory_available", lambda: available)
        for call in (
            lambda: model.logits(Batch(tokens)),
            lambda: model.loss(Batch(tokens), targets, weights),
            lambda: model.loss_and_gradients(Batch(tokens), targets, weights, adapter, gradients),
            lambda: model.check_memory(2, 20),
        ):
            with pytest.raises(UserError, match="not enough memory: 40 tokens at once need"):
                call()
        model.loss(Batch(tokens[:1]), targets[:1], weights[:1])
        # what is returned counts as well, and what the call before took is there
        available = 20 * model.file.V * 4 - 1
        with pytest.raises(UserError, match="not enough memory"):
            model.logits(Batch(tokens[:1]))
        available += 1
        model.logits(Batch(tokens[:1]))
        available = 0  # what was needed once is there
        model.logits(Batch(tokens[:1]))


def test_a_batch_in_parts_has_the_gradients_of_the_whole_one(tiny_model: TinyModel) -> None:
    path = str(tiny_model(type="Q4_1", L=3))
    expected, expected_gradients = step(path, "auto")
    with Q4Model.from_gguf(path, 1) as model:
        budget = model.memory_bytes(21, 21, rank=3)
    result, gradients = step(path, "auto", memory_budget=budget)
    # the same sums in another order, in float32
    assert result.loss == pytest.approx(expected.loss, rel=1e-6)
    np.testing.assert_array_equal(result.row_loss, expected.row_loss)
    np.testing.assert_array_equal(result.row_correct, expected.row_correct)
    np.testing.assert_array_equal(result.offset_gradient, expected.offset_gradient)
    errors = relative_errors(
        gradients, {name: value.astype(np.float64) for name, value in expected_gradients.items()}
    )
    assert max(errors.values()) < 1e-5
    assert any((gradients[name] != value).any() for name, value in expected_gradients.items())


def test_the_profile_counts_parts_of_the_work(tiny_model: TinyModel) -> None:
    tokens = np.full((1, 8), 20, np.int32)
    with Q4Model.from_gguf(tiny_model(type="Q4_1"), 1) as model:
        model.logits(Batch(tokens))
        assert {"frozen forward", "attention forward", "head logits"} <= set(model.profile())
        assert all(time_s > 0 for time_s in model.profile().values())
        model.reset_profile()
        assert model.profile() == {}


def test_a_closed_model_says_so(tiny_model: TinyModel) -> None:
    model = Q4Model.from_gguf(tiny_model(type="Q4_1"), 1)
    model.close()
    model.close()
    with pytest.raises(ValueError, match="closed"):
        model.logits(Batch(np.zeros((1, 2), np.int32)))


def test_a_kernel_set_has_int8_products_as_the_tests_expect(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in KERNEL_SETS:
        monkeypatch.setenv("GGD_KERNELS", name)
        with Q4Model.from_gguf(tiny_model(type="Q4_1"), 1) as model:
            assert model.kernels == name
            assert model.has_int8 == (name in INT8_KERNELS)


# Of x86-64; what the compiler of the oldest supported system knows.
FLAGS_OF_SETS = {
    "avx2": {"avx2", "fma"},
    "avx_vnni": {"avx2", "fma", "avx_vnni"},
    "avx_vnni_evex": {"avx512vl", "avx512bw", "avx512dq", "avx512_vnni"},
    "avx512_bf16": {"avx512vl", "avx512bw", "avx512dq", "avx512_bf16", "avx512_vnni"},
}


@pytest.mark.skipif(not Path("/proc/cpuinfo").exists(), reason="the processor's flags are read from Linux")
def test_every_set_that_the_processor_has_instructions_for_is_there() -> None:
    flags = set(re.findall(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)[:1])
    have = {flag for line in flags for flag in line.split()}
    expected = {name for name, needed in FLAGS_OF_SETS.items() if needed <= have}
    assert expected == set(KERNEL_SETS) & set(FLAGS_OF_SETS)


INT8_PRODUCTS: tuple[Int8, ...] = ("backward", "both")
# Q2_K has no int8 form for the forward, TQ2_0 no own kernels: both have int8 input gradients.
QUANTISED = [name for name, known in TENSOR_TYPES.items() if known.own_kernels and known.block > 1] + [
    "TQ2_0"
]


@pytest.mark.usefixtures("int8_kernels")
@pytest.mark.parametrize("products", INT8_PRODUCTS)
@pytest.mark.parametrize("type_name", QUANTISED)
def test_gradients_in_int8_stay_close_to_those_in_float32(
    tiny_model: TinyModel, type_name: str, products: Int8
) -> None:
    path = str(tiny_model(type=type_name, **sizes_for(type_name)))
    _, exact = step(path, "all", compute="f32")
    _, gradients = step(path, "all", int8=products)
    # each product has a relative error of about 1e-2, from two roundings to 127 steps a block (weights of the
    # backward on AVX2: 63)
    errors = relative_errors(gradients, {name: value.astype(np.float64) for name, value in exact.items()})
    assert not {name: error for name, error in errors.items() if not error < 1e-1}


@pytest.mark.usefixtures("int8_kernels")
@pytest.mark.parametrize("products", INT8_PRODUCTS)
@pytest.mark.parametrize("n_threads", [1, 3])
def test_int8_gives_the_same_bits_for_any_threads_and_policy(
    tiny_model: TinyModel, n_threads: int, products: Int8
) -> None:
    path = str(tiny_model(type="Q4_1", L=3))
    _, expected = step(path, "all", int8=products)
    for keep in POLICIES:
        _, gradients = step(path, keep, n_threads, int8=products)
        for name, gradient in expected.items():
            np.testing.assert_array_equal(gradients[name], gradient, err_msg=name)


@pytest.mark.usefixtures("int8_kernels")
@pytest.mark.parametrize("type_name", QUANTISED)
def test_few_rows_in_int8_have_the_bits_that_they_have_among_many(
    tiny_model: TinyModel, type_name: str
) -> None:
    # no multiples of a strip's rows and of the piece that is unpacked at a time
    sizes = {**sizes_for(type_name), "V": 333, "F": 1280}
    path = tiny_model(type=type_name, **sizes)
    lora = lora_adapter(random_adapter(oracle.load_model(str(path)), rank=3, B=1))
    tokens = np.random.default_rng(5).integers(0, 333, (7, 13), dtype=np.int32)
    lengths = np.array([9, 13, 13, 13, 13, 13, 13])
    for n_threads in (1, 3):
        with Q4Model.from_gguf(path, n_threads) as model:
            many = model.logits(Batch(tokens, 0.4, lengths=lengths), lora, int8="both")
            few = model.logits(Batch(tokens[:1, :9], 0.4), lora, int8="both")
        np.testing.assert_array_equal(few[0], many[0, :9])


def test_an_adapter_that_changed_is_read_anew(tiny_model: TinyModel) -> None:
    path = tiny_model(type="Q4_1")
    lora = lora_adapter(random_adapter(oracle.load_model(str(path)), rank=3, B=1))
    name = next(iter(lora.tensors))
    batch = Batch(np.arange(6, dtype=np.int32)[None])
    with Q4Model.from_gguf(path, 1) as model:

        def logits() -> NDArray[np.float32]:
            return model.logits(batch, lora)

        first = logits()
        np.testing.assert_array_equal(logits(), first)
        lora.tensors[name] *= 2.0  # in place, as training does
        in_place = logits()
        lora.tensors[name] = lora.tensors[name] * np.float32(2.0)
        replaced = logits()
        lora.alpha *= 2.0
        scaled = logits()
        lora.tensors[name] = np.full_like(lora.tensors[name], np.nan)
        with pytest.raises(UserError, match="NaN"):
            logits()
        assert not np.array_equal(model.logits(batch), scaled)
    states = [first, in_place, replaced, scaled]
    assert all(not np.array_equal(a, b) for a, b in pairwise(states))


def test_int8_is_refused_where_the_model_computes_in_float32(tiny_model: TinyModel) -> None:
    with (
        Q4Model.from_gguf(tiny_model(type="Q4_1"), 1, compute="f32") as model,
        pytest.raises(UserError, match="no int8 products"),
    ):
        assert not model.has_int8
        model.logits(Batch(np.zeros((1, 2), np.int32)), int8="both")
