"""The oracle is llama.cpp for every architecture: logits, adapters, windows; and its gradients are right.

What one architecture has no part in (masks, losses, the optimizer) is in test_oracle.py.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from functools import partial
from math import erf
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import oracle
import pytest
from architectures import FEATURES, FUSED, SIZES, SMALL, YARN, Feature
from cases import MASK, TEXT, log_softmax, mean_kl, random_adapter, random_batch
from conftest import TinyModel, sizes_for
from llama_adapter import write_llama_adapter
from llama_reference import Request, llama_logits, llama_tokens
from numpy.typing import NDArray
from oracle_model import GELU_GATE, Layer, OracleModel

# llama.cpp computes in float32: logits of size 2 are off by 1e-6 to 4e-5, most where RoPE's angles are large
# or YaRN steep, and the KL divergence, quadratic in that, is 1e-14 to 6e-12. A wrong piece is another world:
# test_each_piece_of_an_architecture_can_be_seen holds each against ten thousand times the bound.
KL_FLOAT32 = 1e-10
LOGIT_FLOAT32 = 2e-4
# ggml's CPU reads GELU from a table of float16, 5e-4 of its value off; after six layers the logits are off by
# up to 9e-3 and the divergence is 1e-8 to 4e-7.
KL_GELU_TABLE = 2e-6

# models this small are quicker on one thread than on two that wait for each other
reference_logits = partial(llama_logits, n_threads=1)


@pytest.fixture(scope="module")
def text(tiny_model: TinyModel) -> NDArray[np.int32]:
    """The tokens of the text, the same for all tiny models; longer than every window."""
    tokens = llama_tokens(tiny_model(), TEXT)
    assert len(tokens) > 200
    return tokens


def _saturated(path: Path, folder: Path) -> Path:
    """A copy whose gates are so large that GELU is x or 0, which ggml computes without its table."""
    copy = Path(shutil.copy(path, folder / "saturated.gguf"))
    reader = gguf.GGUFReader(str(copy), "r+")
    for tensor in reader.tensors:
        if tensor.name.endswith("ffn_gate.weight"):
            tensor.data[:] = tensor.data * 1000.0
    reader.data.flush()
    return copy


@pytest.mark.parametrize("feature", FEATURES.values(), ids=FEATURES)
def test_its_logits_are_those_of_llama_cpp(
    tiny_model: TinyModel, tmp_path: Path, text: NDArray[np.int32], feature: Feature
) -> None:
    path = tiny_model(**feature.options)
    if feature.options.get("arch") in GELU_GATE:
        path = _saturated(path, tmp_path)
    short, long = text[: feature.window], text[:60] if feature.depth > 1 else text
    requests = [Request(long), Request(short), Request(short, causal=False), Request(text[:1])]
    expected = reference_logits(path, requests, n_ctx=feature.n_ctx)
    model = oracle.load_model(path, n_ctx=feature.n_ctx)
    for request, theirs in zip(requests, expected, strict=True):
        ours = oracle.batch_logits(model, request.inputs[None], 1.0 if request.causal else 0.0)[0]
        assert np.abs(ours - theirs).max() < LOGIT_FLOAT32 * feature.depth
        assert mean_kl(ours, theirs) < KL_FLOAT32 * feature.depth**2
    # several nats apart, and by the mask too: neither comparison can pass for the other
    assert 1.0 < expected[0].std() < 4.0
    assert mean_kl(expected[1], expected[2]) > 0.02


@pytest.mark.parametrize("arch", sorted(GELU_GATE))
def test_its_gelu_is_that_of_llama_cpp_but_for_the_table(
    tiny_model: TinyModel, text: NDArray[np.int32], arch: str
) -> None:
    path = tiny_model(arch=arch)
    theirs = reference_logits(path, [Request(text)])[0]
    assert mean_kl(oracle.batch_logits(oracle.load_model(path), text[None])[0], theirs) < KL_GELU_TABLE


def _rows_apart_with(gelu: Any, model: OracleModel, tokens: Any, theirs: Any) -> float:
    """The median over rows of the KL divergence from llama.cpp, with GELU read from a table of float16."""

    def table(x: Any) -> Any:
        y = gelu(np.asarray(x, np.float16).astype(np.float64)).astype(np.float16).astype(np.float64)
        return np.where(x <= -10.0, 0.0, np.where(x >= 10.0, x, y))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(oracle, "_gelu", table)
        p, q = log_softmax(oracle.batch_logits(model, tokens[None])[0]), log_softmax(theirs)
    return float(np.median(np.sum(np.exp(p) * (p - q), axis=1)))


def test_its_gelu_is_the_tanh_form(tiny_model: TinyModel, text: NDArray[np.int32]) -> None:
    path = tiny_model(arch="gemma2")
    tokens = text[:24]
    model, theirs = oracle.load_model(path), reference_logits(path, [Request(tokens)])[0]
    # the median leaves out the rows where a gate rounds to the neighbouring entry of the table
    assert _rows_apart_with(oracle._gelu, model, tokens, theirs) < KL_FLOAT32
    by_erf = np.vectorize(lambda x: 0.5 * x * (1.0 + erf(x / 2.0**0.5)))
    assert _rows_apart_with(by_erf, model, tokens, theirs) > 10 * KL_FLOAT32


def _without(model: OracleModel, *names: str) -> OracleModel:
    kept = {k: v for k, v in model.weights.items() if not any(name in k for name in names)}
    assert len(kept) < len(model.weights)
    return replace(model, weights=kept)


def _layers(model: OracleModel, change: Any) -> OracleModel:
    return replace(model, layers=tuple(change(layer) for layer in model.layers))


def _wider(layer: Layer) -> Layer:
    return layer if layer.window is None else replace(layer, window=layer.window + 1)


def _unmagnified(layer: Layer) -> Layer:
    assert layer.rope is not None
    return replace(layer, rope=replace(layer.rope, magnitude=1.0))


def _faster(layer: Layer) -> Layer:
    assert layer.rope is not None
    return replace(layer, rope=replace(layer.rope, frequencies=layer.rope.frequencies * 1.01))


PIECES: dict[str, tuple[str, Any]] = {
    "biases": ("qwen2", lambda m: _without(m, ".bias")),
    "norms of q and k, a head": ("qwen3", lambda m: _without(m, "attn_q_norm", "attn_k_norm")),
    "norms of q and k, a row": ("olmo2", lambda m: _without(m, "attn_q_norm", "attn_k_norm")),
    "norm after attention": ("gemma2", lambda m: _without(m, "post_attention_norm")),
    "norm after feed-forward": ("gemma3", lambda m: _without(m, "post_ffw_norm")),
    "window, by one token": ("gemma2", lambda m: _layers(m, _wider)),
    "window in most layers": ("gemma3", lambda m: _layers(m, _wider)),
    "cap of scores": ("gemma2", lambda m: replace(m, attention_cap=50.0)),
    "cap of logits": ("gemma2", lambda m: replace(m, logit_cap=30.0)),
    "gate": ("gemma2", lambda m: replace(m, gelu=False)),
    "embedding scale": ("gemma3", lambda m: replace(m, embedding_scale=1.0)),
    "base of the windows": ("gemma3", lambda m: _layers(m, lambda _: m.layers[-1])),
    "pairs": ("phi3", lambda m: replace(m, rope_pairs=True)),
    "magnitude": ("phi3", lambda m: _layers(m, _unmagnified)),
    "layers without RoPE": ("smollm3", lambda m: replace(m, layers=(m.layers[0],) * m.L)),
    "residual scale": ("granite", lambda m: replace(m, residual_scale=1.0)),
    "attention scale": ("granite", lambda m: replace(m, attention_scale=m.D**-0.5)),
    "logit scale": ("granite", lambda m: replace(m, logit_scale=1.0)),
    "temperature": ("mistral3", lambda m: replace(m, temperature=None)),
    "temperature, by one token": ("mistral3", lambda m: replace(m, temperature=(m.temperature[0], 49))),
    "frequencies": ("mistral3", lambda m: _layers(m, _faster)),
}


@pytest.mark.parametrize("arch, change", PIECES.values(), ids=PIECES)
def test_each_piece_of_an_architecture_can_be_seen(
    tiny_model: TinyModel, text: NDArray[np.int32], arch: str, change: Any
) -> None:
    model = oracle.load_model(tiny_model(arch=arch))
    right, wrong = (oracle.batch_logits(m, text[None])[0] for m in (model, change(model)))
    assert mean_kl(right, wrong) > 1e4 * KL_FLOAT32


@pytest.mark.parametrize("arch", SMALL)
def test_a_quantised_file_of_each_architecture_is_loaded(
    tiny_model: TinyModel, text: NDArray[np.int32], arch: str
) -> None:
    path = tiny_model(arch=arch, type="Q4_K", **sizes_for("Q4_K"))
    tokens = text[:24]
    theirs = reference_logits(path, [Request(tokens)])[0]
    # llama.cpp rounds activations to 8 bits a block, about 1e-2 of their size in each of ten products
    assert mean_kl(oracle.batch_logits(oracle.load_model(path), tokens[None])[0], theirs) < 0.02


def test_llama_cpp_bounds_a_window_in_the_past_only(
    tiny_model: TinyModel, text: NDArray[np.int32], tmp_path: Path
) -> None:
    keys = {"attention.sliding_window": 9, "attention.sliding_window_pattern": 0}  # windows in all layers
    path = _saturated(tiny_model(arch="gemma2", keys=keys), tmp_path)
    tokens = text[:40]
    theirs = reference_logits(path, [Request(tokens, causal=False), Request(tokens[:9], causal=False)])
    model = oracle.load_model(path)
    assert [layer.window for layer in model.layers] == [9, 9]
    ours = oracle.batch_logits(model, tokens[None], 0.0)[0]
    assert mean_kl(ours, theirs[0]) > 1e-3  # a window has two sides here
    assert mean_kl(oracle.batch_logits(model, tokens[None, :9], 0.0)[0], theirs[1]) < KL_FLOAT32
    distance = np.arange(40)[:, None] - np.arange(40)
    open_future = _layers(model, lambda layer: replace(layer, window=None))
    x = oracle.embeddings(model, oracle.EMPTY_ADAPTER, tokens)
    as_theirs = oracle.sequence_logits(open_future, oracle.EMPTY_ADAPTER, x, np.where(distance < 9, 1.0, 0.0))
    assert mean_kl(as_theirs, theirs[0]) < KL_FLOAT32


def test_a_window_is_as_wide_to_the_right_as_to_the_left(tiny_model: TinyModel) -> None:
    keys = {"attention.sliding_window": 3, "attention.sliding_window_pattern": 0}
    model = oracle.load_model(tiny_model(**SMALL["gemma2"] | {"L": 1, "keys": keys}))
    tokens = np.random.default_rng(2).integers(10, model.V, (1, 9)).astype(np.int32)
    seen = oracle.batch_logits(model, tokens, 0.3)[0]
    for place in range(9):
        other = tokens.copy()
        other[0, place] += 1 if other[0, place] < model.V - 1 else -1
        moved = np.abs(oracle.batch_logits(model, other, 0.3)[0] - seen).max(axis=1) > 1e-9
        assert np.flatnonzero(moved).tolist() == [i for i in range(9) if abs(i - place) < 3]


@pytest.mark.parametrize("arch", SMALL)
def test_its_adapter_is_that_of_llama_cpp(
    tiny_model: TinyModel, text: NDArray[np.int32], tmp_path: Path, arch: str
) -> None:
    path = tiny_model(arch=arch)
    if arch in GELU_GATE:
        path = _saturated(path, tmp_path)
    model = oracle.load_model(path)
    adapter = random_adapter(model, rank=3, B=1, gain=0.5)
    names = {name.split(".", 2)[2] for name in adapter.parameters if name.startswith("blk.")}
    assert len(names) == 14  # pairs for all seven projections, fused or not
    tokens = text[:20].copy()
    tokens[::3] = MASK
    x = oracle.embeddings(model, adapter, tokens, adapter.parameters["embedding_offset"][0])
    # gemma3 alone scales the embeddings of tokens only: what is fed in their place comes scaled
    fed = (x * (model.embedding_scale if arch == "gemma3" else 1.0)).astype(np.float32)
    file = write_llama_adapter(tmp_path / "adapter.gguf", adapter, arch, FUSED[arch])
    theirs = reference_logits(path, [Request(fed, causal, file) for causal in (True, False)] + [Request(fed)])
    for causal_ratio, reference in ((1.0, theirs[0]), (0.0, theirs[1])):
        ours = oracle.batch_logits(model, tokens[None], causal_ratio, adapter)[0]
        assert mean_kl(ours, reference) < KL_FLOAT32
    assert mean_kl(theirs[0], theirs[2]) > 0.05


@pytest.mark.parametrize("arch", ["llama", "gemma3", "granite"])
def test_the_mask_row_is_a_pair_of_the_embedding_to_llama_cpp(
    tiny_model: TinyModel, text: NDArray[np.int32], tmp_path: Path, arch: str
) -> None:
    path = tiny_model(arch=arch, tied=False)
    if arch in GELU_GATE:
        path = _saturated(path, tmp_path)
    model = oracle.load_model(path)
    rows = {"mask_embedding": np.random.default_rng(4).standard_normal(model.C) * 0.3}
    adapter = oracle.Adapter(rows, alpha=2.0, mask_token_id=MASK)
    tokens = text[:20].copy()
    tokens[::3] = MASK
    file = write_llama_adapter(tmp_path / "adapter.gguf", adapter, arch, mask_row_of=model.V)
    theirs = reference_logits(path, [Request(tokens, False, file), Request(tokens, False)])
    ours = oracle.batch_logits(model, tokens[None], 0.0, adapter)[0]
    assert mean_kl(ours, theirs[0]) < KL_FLOAT32
    assert mean_kl(ours, theirs[1]) > 0.01


@pytest.mark.parametrize("arch", SMALL)
def test_packed_documents_are_computed_as_if_each_were_alone(tiny_model: TinyModel, arch: str) -> None:
    model = oracle.load_model(tiny_model(**SMALL[arch]))
    tokens = np.random.default_rng(1).integers(10, model.V, (1, 11)).astype(np.int32)
    ids = np.array([[0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1]], np.int32)
    packed = oracle.batch_logits(model, tokens, 0.3, document_ids=ids)[0]
    apart = [oracle.batch_logits(model, part, 0.3)[0] for part in (tokens[:, :5], tokens[:, 5:])]
    np.testing.assert_allclose(packed, np.concatenate(apart), atol=1e-9)


GRADIENTS: dict[str, Any] = {
    **SMALL,
    "llama, all biases": {**SIZES, **FEATURES["llama, all biases"].options},
    "llama, yarn": {**SIZES, "keys": YARN},
    "gemma3, untied with a cap": SMALL["gemma3"]
    | {"tied": False, "keys": {**SMALL["gemma3"]["keys"], "final_logit_softcapping": 6.0}},
}


@pytest.mark.parametrize("options", GRADIENTS.values(), ids=GRADIENTS)
def test_its_gradients_are_its_finite_differences(tiny_model: TinyModel, options: dict[str, Any]) -> None:
    model = oracle.load_model(tiny_model(**options))
    batch = random_batch(model.V, B=2, T=7)
    batch = replace(batch, lengths=np.array([7, 5], np.int32))
    batch.weights[1, 5:] = 0.0
    adapter = random_adapter(model, rank=2, B=2)
    rng = np.random.default_rng(5)
    gradients = oracle.loss_and_gradients(model, adapter, batch, 0.7).gradients
    assert gradients.keys() == adapter.parameters.keys()
    for name, value in adapter.parameters.items():
        direction = rng.standard_normal(value.shape)
        step = 1e-5
        up, down = (
            oracle.loss(
                model,
                replace(adapter, parameters={**adapter.parameters, name: value + sign * step * direction}),
                batch,
                0.7,
            )
            for sign in (1, -1)
        )
        size = np.linalg.norm(gradients[name])
        # central differences: the truncation is of order step^2, the rounding of loss * 1e-16 / step
        assert abs((up - down) / (2 * step) - np.sum(gradients[name] * direction)) < 1e-7 * (1 + size)
        assert size > 1e-3
