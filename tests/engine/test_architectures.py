"""Every architecture is computed as llama.cpp computes it, and its gradients are the oracle's.

The oracle itself is held against llama.cpp, feature by feature, in test_oracle_architectures.py. Here the
engine is held against both: gradients and float32 logits against the oracle, logits of quantised files under
an exported adapter against llama.cpp.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import oracle
import pytest
from architectures import FEATURES, SMALL, Feature
from cases import TEXT, mean_kl, packed_batch
from conftest import TinyModel, sizes_for
from llama_reference import llama_tokens
from test_distillation import check_student
from test_forward import RATIOS as ENDS
from test_forward import make_reference
from test_gradients import Case, check, engine_result
from tiny_architectures import ARCHITECTURES as TINY

from ggml_diffusion.engine.cpu.q4_model import Q4Model
from ggml_diffusion.engine.interface import Batch, Int8
from ggml_diffusion.engine.native import ffi, lib
from ggml_diffusion.errors import UserError
from ggml_diffusion.formats.architectures import ARCHITECTURES, refusal, row
from ggml_diffusion.training.int8_gate import MIN_COSINE

ARCHS = tuple(ARCHITECTURES)
QUANTISED = {"type": "Q4_0", "C": 64, "F": 96}
# float32 products against float64: logits of size 2 are off by some 1e-6 a layer
LOGIT_FLOAT32 = 1e-4
# Files that differ from the usual ones in what the engine does not compute.
NOT_COMPUTED = {"qwen2, output bias"}


def core_rows() -> list[str]:
    """The core's own table."""
    rows: list[str] = []
    while (text := lib.ggd_arch_row(len(rows))) != ffi.NULL:
        rows.append(ffi.string(text).decode())
    return rows


def test_the_core_and_the_reader_have_the_same_table() -> None:
    assert core_rows() == [row(name) for name in ARCHITECTURES]


def test_there_is_a_tiny_model_of_every_architecture() -> None:
    assert set(TINY) == set(SMALL) == set(ARCHITECTURES)


def packed(V: int) -> oracle.Batch:
    return packed_batch(V, B=3, T=13)


def long(V: int) -> oracle.Batch:
    return packed_batch(V, B=2, T=131)


@pytest.mark.parametrize("causal_ratio", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("prediction", ["aligned", "shifted"])
@pytest.mark.parametrize("arch", ARCHS)
def test_every_gradient_is_the_oracles(
    tiny_model: TinyModel, arch: str, prediction: str, causal_ratio: float
) -> None:
    case = Case(dict(SMALL[arch]), packed, causal_ratio, prediction=prediction)
    check(tiny_model, case, "f32", "packed")


@pytest.mark.parametrize("type_name", ["Q8_0", "Q4_0", "Q4_K"])
@pytest.mark.parametrize("arch", ARCHS)
def test_gradients_of_quantised_files_in_fast_products(
    tiny_model: TinyModel, arch: str, type_name: str
) -> None:
    case = Case({"arch": arch, "type": type_name, **sizes_for(type_name)}, packed, 0.7)
    check(tiny_model, case, "fast", "packed")


@pytest.mark.parametrize("arch", ARCHS)
def test_gradients_with_the_portable_kernels(tiny_model: TinyModel, arch: str) -> None:
    check(tiny_model, Case(dict(SMALL[arch]), packed, 0.7), "f32", "packed", use_simd=False)


@pytest.mark.parametrize("causal_ratio", [1.0, 0.4])
@pytest.mark.parametrize("bernoulli_seed", [None, 9])
@pytest.mark.parametrize("arch", ["gemma2", "gemma3", "mistral3"])
def test_windows_and_temperatures_of_texts_of_several_strips(
    tiny_model: TinyModel, arch: str, causal_ratio: float, bernoulli_seed: int | None
) -> None:
    sizes = {"C": 32, "H": 2, "G": 1, "F": 48, "L": 2}
    keys = {"attention.sliding_window": 24, "attention.sliding_window_pattern": 2}
    options = {"arch": arch, **sizes, **({"keys": keys} if arch != "mistral3" else {})}
    case = Case(options, long, causal_ratio, bernoulli_seed=bernoulli_seed)
    check(tiny_model, case, "f32", "long")


@pytest.mark.parametrize("arch", ["gemma2", "gemma3", "granite"])
def test_a_teacher_under_caps_and_scales(tiny_model: TinyModel, arch: str) -> None:
    check_student(tiny_model(**SMALL[arch]), 1, "f32")


@pytest.mark.parametrize("arch", ARCHS)
def test_any_policy_and_number_of_threads_gives_the_same_bits(tiny_model: TinyModel, arch: str) -> None:
    case = Case({"arch": arch, **QUANTISED}, long)
    _, adapter, batch = case.make(tiny_model)
    results = []
    for n_threads, keep in ((1, "all"), (2, "without-ffn"), (3, "boundaries")):
        with Q4Model.from_gguf(tiny_model(**case.options), n_threads, keep=keep) as model:
            results.append(engine_result(model, adapter, batch, case))
    for result, gradients in results[1:]:
        assert result.loss == results[0][0].loss
        for name, value in gradients.items():
            assert np.array_equal(value, results[0][1][name]), name


@pytest.fixture(scope="module")
def text(tiny_model: TinyModel) -> oracle.NDArray[np.int32]:
    return llama_tokens(tiny_model(), TEXT)


@pytest.mark.parametrize("feature", [name for name in FEATURES if name not in NOT_COMPUTED])
def test_float32_logits_are_the_oracles(
    tiny_model: TinyModel, text: oracle.NDArray[np.int32], feature: str
) -> None:
    case: Feature = FEATURES[feature]
    path = tiny_model(**case.options)
    # a context that llama.cpp makes longer than the original one: here the text itself has to be
    tokens = np.resize(text, 300) if case.n_ctx is not None else text[:70]
    exact = oracle.load_model(path, n_ctx=len(tokens))
    with Q4Model.from_gguf(path, 2) as model:
        for ratio in (1.0, 0.6):
            ours = model.logits(Batch(tokens[None], ratio))[0]
            expected = oracle.batch_logits(exact, tokens[None], ratio)[0]
            assert np.abs(ours - expected).max() < LOGIT_FLOAT32 * case.depth


@pytest.mark.parametrize("type_name", ["F32", "Q8_0", "Q4_0", "Q4_K"])
@pytest.mark.parametrize("arch", ARCHS)
def test_its_adapter_moves_llama_cpp_as_it_moves_the_engine(
    tiny_model: TinyModel, tmp_path: Path, arch: str, type_name: str
) -> None:
    path = tiny_model(arch=arch, type=type_name, **sizes_for(type_name))
    exact = oracle.load_model(path)
    for rank in (None, 3):
        reference = make_reference(path, type_name, exact, tmp_path, rank=rank, n_tokens=24, arch=arch)
        for ratio in ENDS:
            reference.check(ratio, reference.engine_logits(ratio, compute="fast"))
    moved = mean_kl(reference.oracle[1.0], oracle.batch_logits(exact, reference.tokens[None], 1.0)[0])
    assert moved > 1e-2  # the adapter is seen


@pytest.mark.parametrize(
    "name, reason",
    {
        "qwen3moe": "mixture of experts",
        "qwen35": "recurrent",
        "falcon-h1": "recurrent",
        "gemma3n": "embeddings into each layer",
        "gemma4": "embeddings into each layer",
        "clip": "vision or audio tower",
        "qwen2vl": "M-RoPE",
        "made-up": "is not supported; supported: llama",
    }.items(),
)
def test_what_cannot_be_converted_is_refused_with_the_reason(name: str, reason: str) -> None:
    assert reason in refusal(name)


def test_a_bias_of_the_output_matrix_is_refused(tiny_model: TinyModel) -> None:
    with pytest.raises(UserError, match=r"output\.bias"):
        Q4Model.from_gguf(tiny_model(**FEATURES["qwen2, output bias"].options))


@pytest.mark.parametrize("arch", ARCHS)
def test_int8_products_leave_the_gradient_where_it_was(tiny_model: TinyModel, arch: str) -> None:
    case = Case({"arch": arch, **QUANTISED}, long)
    _, adapter, batch = case.make(tiny_model)
    whole = []
    with Q4Model.from_gguf(tiny_model(**case.options), 2) as model:
        if not model.has_int8:
            pytest.skip(f"the {model.kernels} kernels have no int8 products")
        precisions: tuple[Int8, ...] = ("none", "both")
        for int8 in precisions:
            _, gradients = engine_result(model, adapter, batch, case, int8=int8)
            whole.append(np.concatenate([value.ravel() for _, value in sorted(gradients.items())]))
    cosine = float(whole[0] @ whole[1] / np.linalg.norm(whole[0]) / np.linalg.norm(whole[1]))
    print(f"{arch}: 1 - cosine {1 - cosine:.1e}")
    assert cosine >= MIN_COSINE  # what the gate of a run asks for
