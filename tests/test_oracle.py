"""The oracle itself is right: against llama.cpp, against finite differences, against known values.

Everything else in tests/ leans on tests/oracle.py, so it is checked against what shares no line with it. The
other architectures are in test_oracle_architectures.py.
"""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import make_tiny_gguf as tiny
import numpy as np
import oracle
import pytest
from cases import MASK, TEXT, mean_kl, random_adapter, random_batch, relative_error
from conftest import TinyModel, sizes_for
from llama_adapter import write_llama_adapter
from llama_reference import Request, llama_logits, llama_tokens

from ggml_diffusion.formats.tensor_types import TENSOR_TYPES

# llama.cpp computes in float32: logits of size 2 after a few sums over C and F are off by some 1e-6 (1.5e-5
# where a small RoPE base makes large angles), and the KL divergence, quadratic in that, is 2e-13 to 8e-13.
KL_FLOAT32 = 1e-11
LOGIT_FLOAT32 = 1e-4

SHAPES: dict[str, dict[str, Any]] = {
    "grouped queries": {},
    "one head": {"H": 1, "G": 1, "C": 32, "L": 1},
    "no grouping": {"H": 2, "G": 2, "C": 32},
    "one key head for three": {"H": 3, "G": 1, "C": 48, "F": 70},
    "heads wider than C": {"H": 2, "G": 1, "C": 40, "D": 32, "F": 33, "V": 311},
    "tied": {"tied": True},
    "RoPE factors": {"rope_freqs": True},
    "other RoPE base": {"rope_base": 137.0},
    "large eps": {"eps": 0.02},
    "SentencePiece": {"tokenizer": "spm", "V": 400},
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_its_logits_are_those_of_llama_cpp_causal_and_bidirectional(
    tiny_model: TinyModel, shape: dict[str, Any]
) -> None:
    path = tiny_model(**shape)
    model = oracle.load_model(path)
    tokens = llama_tokens(path, TEXT)
    requests = [
        Request(tokens),
        Request(tokens, causal=False),
        Request(tokens[:1]),
        Request(tokens[:1], False),
    ]
    expected = llama_logits(path, requests)
    for request, theirs in zip(requests, expected, strict=True):
        ours = oracle.batch_logits(model, request.inputs[None], 1.0 if request.causal else 0.0)[0]
        assert np.abs(ours - theirs).max() < LOGIT_FLOAT32
        assert mean_kl(ours, theirs) < KL_FLOAT32
    # the two masks differ by whole nats, so neither comparison can pass for the other
    assert mean_kl(expected[0], expected[1]) > 0.05


def test_its_adapter_is_that_of_llama_cpp(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = tiny_model(tied=True)
    model = oracle.load_model(path)
    adapter = random_adapter(model, rank=3, B=1)
    tokens = llama_tokens(path, TEXT)
    tokens[::3] = MASK
    write_llama_adapter(tmp_path / "adapter.gguf", adapter)
    x = oracle.embeddings(model, adapter, tokens, adapter.parameters["embedding_offset"][0]).astype(
        np.float32
    )
    theirs = llama_logits(
        path, [Request(x, causal, tmp_path / "adapter.gguf") for causal in (True, False)] + [Request(x)]
    )
    for causal_ratio, reference in ((1.0, theirs[0]), (0.0, theirs[1])):
        ours = oracle.batch_logits(model, tokens[None], causal_ratio, adapter)[0]
        assert mean_kl(ours, reference) < KL_FLOAT32
    assert mean_kl(theirs[0], theirs[2]) > 0.05


class _TypeTraits(ctypes.Structure):
    """`struct ggml_type_traits` of ggml.h up to the function that is used."""

    _fields_ = (
        ("type_name", ctypes.c_char_p),
        ("blck_size", ctypes.c_int64),
        ("blck_size_interleave", ctypes.c_int64),
        ("type_size", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
    )


@pytest.mark.parametrize("type_name", [name for name in tiny.TENSOR_TYPES if name != "F32"])
def test_it_unpacks_every_type_as_ggml_does(tiny_model: TinyModel, type_name: str) -> None:
    model = oracle.load_model(tiny_model(type=type_name, **sizes_for(type_name)))
    original = oracle.load_model(tiny_model(type="F32", **sizes_for(type_name)))
    library = tiny._ggml()
    library.ggml_get_type_traits.restype = ctypes.POINTER(_TypeTraits)
    traits = library.ggml_get_type_traits(int(gguf.GGMLQuantizationType[type_name])).contents
    for name, weight in original.weights.items():
        if weight.ndim == 1:
            continue
        packed = tiny.quantise(weight.astype(np.float32), type_name)
        expected = np.empty(weight.shape, np.float32)
        traits.to_float(packed.ctypes.data, expected.ctypes.data, weight.size)
        # the same sums and products in float32, but for a fused multiply-add
        np.testing.assert_allclose(model.weights[name], expected, rtol=0, atol=1e-6 * np.abs(weight).max())
        # b bits are right to 2^-b of a Gaussian's size or some times that (ternary types waste some), and all
        # are nearer to it than zero is; of floats the eight bits of bfloat16 are the fewest
        bits = min(TENSOR_TYPES[type_name].bits, 8.0)
        assert relative_error(expected, weight) < min(4.0 * 2.0**-bits, 0.9)


@pytest.mark.parametrize("causal_ratio", [1.0, 0.7, 0.0])
@pytest.mark.parametrize("seed", [None, 11], ids=["soft", "bernoulli"])
def test_its_gradients_are_its_finite_differences(
    tiny_model: TinyModel, causal_ratio: float, seed: int | None
) -> None:
    model = oracle.load_model(tiny_model(C=32, F=40, H=4, G=2, L=2))
    batch = random_batch(model.V, B=3, T=7)
    batch = replace(
        batch,
        lengths=np.array([7, 1, 5], np.int32),
        document_ids=np.array([[0, 0, 0, 1, 1, 2, 2]] * 3, np.int32),
        time_features=oracle.time_features([0.0, 0.33, 1.0], 8, 50),
    )
    batch.weights[1, 0] = 0.5
    adapter = random_adapter(model, rank=2, B=3)
    rng = np.random.default_rng(5)
    parameters = dict(adapter.parameters)
    # with a projection of the time in the place of the offset: their gradients are related by the chain rule
    with_time = {k: v for k, v in parameters.items() if k != "embedding_offset"}
    with_time["time_embedding.weight"] = 0.1 * rng.standard_normal((model.C, 8))
    with_time["time_embedding.bias"] = 0.1 * rng.standard_normal(model.C)
    for values in (parameters, with_time):
        result = oracle.loss_and_gradients(
            model, replace(adapter, parameters=values), batch, causal_ratio, seed
        )
        assert result.gradients.keys() == values.keys()
        for name, value in values.items():
            direction = rng.standard_normal(value.shape)
            step = 1e-5
            up, down = (
                oracle.loss(
                    model,
                    replace(adapter, parameters={**values, name: value + sign * step * direction}),
                    batch,
                    causal_ratio,
                    seed,
                )
                for sign in (1, -1)
            )
            slope = np.sum(result.gradients[name] * direction)
            # central differences: the truncation is of order step^2, the rounding of loss * 1e-16 / step
            assert abs((up - down) / (2 * step) - slope) < 1e-7 * (1 + np.linalg.norm(result.gradients[name]))
            assert np.linalg.norm(result.gradients[name]) > 1e-3


def test_the_weight_of_a_future_key_multiplies_its_probability() -> None:
    scores = np.random.default_rng(0).standard_normal((4, 4))
    w = oracle.mask_weights(4, 0.7)
    assert np.array_equal(w[0], [1.0, 1.0 - 0.7, 1.0 - 0.7, 1.0 - 0.7]) and np.array_equal(w[3], np.ones(4))
    odds = oracle._softmax(scores + np.log(w))
    expected = np.exp(scores[0]) * w[0]
    np.testing.assert_allclose(odds[0], expected / expected.sum(), rtol=1e-12)


def test_the_bernoulli_mask_is_drawn_from_splitmix64() -> None:
    # the first two outputs of splitmix64 from state 0 (Vigna's reference implementation)
    assert oracle.bernoulli_uniform(0, 0, 0) == (0xE220A8397B1DCDAF >> 40) / 2**24
    assert oracle.bernoulli_uniform(0, 0, 1) == (0x6E789E6AA1B965F4 >> 40) / 2**24
    w = oracle.mask_weights(60, 0.75, bernoulli_seed=3)
    future = w[np.triu_indices(60, 1)]
    assert set(np.unique(w)) == {0.0, 1.0} and np.all(np.tril(w) == np.tril(np.ones((60, 60))))
    assert abs(future.mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / future.size)  # four standard errors


def test_documents_of_a_sequence_do_not_see_each_other(tiny_model: TinyModel) -> None:
    model = oracle.load_model(tiny_model())
    tokens = np.random.default_rng(1).integers(10, model.V, (1, 9)).astype(np.int32)
    ids = np.array([[0, 0, 0, 0, 1, 1, 1, 1, 1]], np.int32)
    packed = oracle.batch_logits(model, tokens, 0.3, document_ids=ids)[0]
    apart = [oracle.batch_logits(model, part, 0.3)[0] for part in (tokens[:, :4], tokens[:, 4:])]
    # RoPE is relative: that the second document starts at position 4 changes nothing
    np.testing.assert_allclose(packed, np.concatenate(apart), atol=1e-10)


def test_the_mask_token_is_never_predicted_and_has_no_part_in_the_loss(tiny_model: TinyModel) -> None:
    model = oracle.load_model(tiny_model())
    batch = random_batch(model.V, B=1, T=6)
    adapter = oracle.Adapter({}, mask_token_id=MASK)
    result = oracle.loss_and_gradients(model, adapter, batch, 1.0)
    logits = np.delete(oracle.batch_logits(model, batch.tokens, 1.0)[0], MASK, axis=1)
    used = np.flatnonzero(batch.weights[0])
    column = batch.targets[0] - 1  # all targets lie above the removed column
    expected = np.log(np.exp(logits).sum(1)) - logits[np.arange(6), column]
    np.testing.assert_allclose(result.row_loss[0, used], expected[used], rtol=1e-12)
    assert result.loss == pytest.approx(np.sum(batch.weights[0] * expected), rel=1e-12)


def test_adamw_follows_the_published_algorithm_by_hand() -> None:
    start = {"w": np.array([[1.0, -2.0]]), "bias": np.array([0.5])}
    gradient = {"w": np.array([[3.0, 0.0]]), "bias": np.array([-4.0])}
    one = oracle.adamw(
        start, lambda _: gradient, steps=1, learning_rate=0.1, weight_decay=0.01, max_grad_norm=1.0
    )
    # after one step the bias-corrected moments are g and g^2, so each entry moves by the sign of its gradient
    np.testing.assert_allclose(one["w"], [[1.0 - 0.1 - 0.1 * 0.01, -2.0 + 0.1 * 0.01 * 2.0]], rtol=1e-7)
    np.testing.assert_allclose(one["bias"], [0.6], rtol=1e-7)
