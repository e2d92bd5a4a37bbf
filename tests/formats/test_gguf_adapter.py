"""GGUF adapters: what they hold, what is refused, and that llama.cpp computes with them what we mean."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from conversions import ALPHA, MASK_TOKEN, RANK, conversion, refusal
from gguf_bytes import F32, STRING, U32, Tensor, array, scalar, tiny_llama
from llama_reference import Request, llama_logits

from ggml_diffusion.formats.adapter_file import DiffusionCheckpoint, load_adapter
from ggml_diffusion.formats.gguf_adapter import write_gguf_adapter
from ggml_diffusion.formats.lora import LoraAdapter
from ggml_diffusion.formats.model_check import read_model
from ggml_diffusion.formats.model_file import ModelFile, read_gguf


def test_the_gguf_holds_what_llama_cpp_asks_of_an_adapter(tmp_path: Path, base: ModelFile):
    conversion(base).save_gguf(tmp_path / "a.gguf", base)
    file = read_gguf(tmp_path / "a.gguf")
    expected = {
        "general.type": "adapter",
        "general.architecture": "llama",
        "adapter.type": "lora",
        "adapter.lora.alpha": ALPHA,
        "general.base_model.0.name": "Tiny",
        "ggml_diffusion.base_sha256": "ab" * 32,
        "ggml_diffusion.mask_token_id": MASK_TOKEN,
        "ggml_diffusion.prediction": "shifted",
        "ggml_diffusion.final_causal_ratio": 0.1,
        "ggml_diffusion.time_max_timesteps": 1000,
        "ggml_diffusion.noise_schedule": '{"num_timesteps": 1000, "type": "cosine"}',
    }
    assert {key: file.metadata[key] for key in expected} == expected
    assert file.key_types["adapter.lora.alpha"] == "f32"
    assert {info.type_name for info in file.tensors.values()} == {"F32"}


def test_the_mask_embedding_is_a_tensor_only_where_the_head_is_untied(
    tmp_path: Path, base: ModelFile, tied_base: ModelFile
):
    checkpoint = conversion(base)
    checkpoint.save_gguf(tmp_path / "untied.gguf", base)
    checkpoint.save_gguf(tmp_path / "tied.gguf", tied_base)
    pair = {"token_embd.weight.lora_a", "token_embd.weight.lora_b"}
    assert (
        read_gguf(tmp_path / "untied.gguf").tensors.keys() - read_gguf(tmp_path / "tied.gguf").tensors.keys()
        == pair
    )
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(tmp_path / "untied.gguf").tensors}
    one_hot, column = (tensors[f"token_embd.weight.lora_{half}"] for half in "ab")
    assert one_hot.shape == (base.V, 1)
    assert np.flatnonzero(one_hot).tolist() == [MASK_TOKEN]
    # llama.cpp adds alpha / 1 * B @ A[token]
    np.testing.assert_allclose(
        ALPHA * (column @ one_hot[MASK_TOKEN]), checkpoint.tensors["mask_embedding"], rtol=3e-7
    )


def foreign_adapter(path: Path, tensors: dict[str, np.ndarray], **keys: bytes | None) -> Path:
    """An adapter as convert_lora_to_gguf.py writes them; keys change or (None) drop what it says."""
    said = {
        "general.type": scalar(STRING, "adapter"),
        "general.architecture": scalar(STRING, "llama"),
        "adapter.type": scalar(STRING, "lora"),
        "adapter.lora.alpha": scalar(F32, 8.0),
    } | {key.replace("__", "."): value for key, value in keys.items()}
    file = tiny_llama()
    file.keys = [(key, value) for key, value in said.items() if value is not None]
    file.tensors = []
    type_ids = {"float32": 0, "float16": 1, "uint16": 30, "int8": 24}  # uint16 stands for BF16
    for name, values in tensors.items():
        file.tensors.append((name, Tensor(values.shape[::-1], values.tobytes(), type_ids[values.dtype.name])))
    path.write_bytes(file.build())
    return path


A = np.arange(64, dtype=np.float32).reshape(2, 32) / 64
B = np.arange(64, dtype=np.float32).reshape(32, 2) / 64 - 0.5
PAIR = {"blk.0.attn_q.weight.lora_a": A, "blk.0.attn_q.weight.lora_b": B}


def test_a_lora_of_another_program_can_be_loaded_but_is_no_conversion(tmp_path: Path, base: ModelFile):
    path = foreign_adapter(tmp_path / "a.gguf", PAIR)
    adapter = load_adapter(path, arch="llama")
    adapter.check(base)
    assert (adapter.alpha, adapter.mask_token_id, adapter.mask_embedding) == (8.0, None, None)
    assert np.array_equal(adapter.tensors["blk.0.attn_q.weight.lora_a"], A)
    assert "not one written by ggml-diffusion" in refusal(lambda: DiffusionCheckpoint.load(path))


def test_half_precision_becomes_float32(tmp_path: Path):
    bf16 = (A.view(np.uint32) >> 16).astype(np.uint16)
    path = foreign_adapter(
        tmp_path / "a.gguf",
        {"blk.0.attn_q.weight.lora_a": bf16, "blk.0.attn_q.weight.lora_b": B.astype(np.float16)},
    )
    tensors = load_adapter(path).tensors
    assert np.array_equal(tensors["blk.0.attn_q.weight.lora_a"].view(np.uint32), bf16.astype(np.uint32) << 16)
    assert np.array_equal(tensors["blk.0.attn_q.weight.lora_b"], B.astype(np.float16).astype(np.float32))


@pytest.mark.parametrize("alpha", [None, scalar(F32, 0.0)])
def test_without_alpha_the_scale_is_one(tmp_path: Path, alpha: bytes | None):
    adapter = load_adapter(foreign_adapter(tmp_path / "a.gguf", PAIR, adapter__lora__alpha=alpha))
    product = adapter.tensors["blk.0.attn_q.weight.lora_b"] @ adapter.tensors["blk.0.attn_q.weight.lora_a"]
    np.testing.assert_allclose(adapter.alpha / 2 * product, B @ A, rtol=1e-6)


EIGHTH = np.full((32, 1), 1 / 8, np.float32)
ONE_HOT = np.eye(12, dtype=np.float32)[:, MASK_TOKEN : MASK_TOKEN + 1]
MASK_KEYS = {
    "ggml_diffusion__mask_token_id": scalar(U32, MASK_TOKEN),
    "ggml_diffusion__mask_embedding": array(F32, [1.0] * 32),
}


def with_embedding(a: np.ndarray, b: np.ndarray) -> dict[str, np.ndarray]:
    return PAIR | {"token_embd.weight.lora_a": a, "token_embd.weight.lora_b": b}


@pytest.mark.parametrize(
    ("tensors", "keys", "fault"),
    [
        (PAIR, {"general__type": scalar(STRING, "model")}, "holds a 'model', not a LoRA adapter"),
        (PAIR, {"general__type": None}, "holds a 'model', not a LoRA adapter"),
        (PAIR, {"general__type": scalar(U32, 1)}, "'general.type' is of type u32"),
        (PAIR, {"adapter__type": scalar(STRING, "dora")}, "holds a 'dora', not a LoRA adapter"),
        (PAIR, {"general__architecture": None}, "'general.architecture' is missing"),
        (PAIR, {"general__architecture": scalar(STRING, "qwen2")}, "is an adapter for architecture 'qwen2'"),
        (PAIR, {"adapter__lora__alpha": scalar(U32, 8)}, "is of type u32, not f32"),
        (PAIR, {"adapter__lora__alpha": scalar(F32, float("nan"))}, "is nan, not a finite number"),
        (PAIR, {"adapter__alora__invocation_tokens": array(U32, [1])}, "activated LoRA"),
        ({"blk.0.attn_q.weight.lora_a": A}, {}, "has no partner"),
        (PAIR | {"blk.0.attn_norm.weight": A[0]}, {}, "ends neither in .lora_a nor in .lora_b"),
        (PAIR | {"blk.0.attn_q.weight.lora_b": B.T.copy()}, {}, "has a pair of shapes"),
        (
            PAIR | {"blk.0.attn_q.weight.lora_a": np.full((2, 32), np.inf, np.float32)},
            {},
            "holds NaN or infinite",
        ),
        (PAIR | {"blk.0.attn_q.weight.lora_a": A.astype(np.int8)}, {}, "has type I8, which is not supported"),
        (with_embedding(ONE_HOT, B[:, :1].copy()), {}, "adapts the token embedding"),
        (
            with_embedding(ONE_HOT, np.full((32, 1), 1 / 4, np.float32)),
            MASK_KEYS,
            "is not the mask",
        ),
        (
            with_embedding(ONE_HOT * 2, EIGHTH),
            MASK_KEYS,
            "is not the mask",
        ),
        (
            with_embedding(ONE_HOT[::-1].copy(), EIGHTH),
            MASK_KEYS,
            "is not the mask",
        ),
        (
            with_embedding(ONE_HOT, np.full((31, 1), 1 / 8, np.float32)),
            MASK_KEYS,
            "is not the mask",
        ),
        (PAIR, MASK_KEYS | {"ggml_diffusion__mask_token_id": scalar(STRING, "9")}, "expected int"),
        (
            PAIR,
            MASK_KEYS | {"ggml_diffusion__mask_embedding": scalar(F32, 1.0)},
            "an array of float32",
        ),
        (
            PAIR,
            MASK_KEYS | {"ggml_diffusion__mask_embedding": array(F32, [float("inf")])},
            "holds NaN",
        ),
    ],
)
def test_a_gguf_adapter_that_would_mean_something_else_is_refused(
    tmp_path: Path, tensors: dict, keys: dict, fault: str
):
    path = foreign_adapter(tmp_path / "a.gguf", tensors, **keys)
    message = refusal(lambda: load_adapter(path, arch="llama"))
    assert message.startswith(f"{path}: ")
    assert fault in message


def test_a_matching_mask_pair_is_read_as_the_mask_embedding(tmp_path: Path):
    tensors = with_embedding(ONE_HOT, EIGHTH)
    adapter = load_adapter(foreign_adapter(tmp_path / "a.gguf", tensors, **MASK_KEYS))
    assert adapter.tensors.keys() == PAIR.keys()
    assert np.array_equal(adapter.mask_embedding, np.ones(32))


def test_an_adapter_with_alpha_0_is_not_written(tmp_path: Path, base: ModelFile):
    adapter = LoraAdapter(0.0, dict(PAIR))
    assert "with alpha 0" in refusal(lambda: write_gguf_adapter(tmp_path / "a.gguf", adapter, base, {}))


def merged(model: ModelFile, checkpoint: DiffusionCheckpoint, path: Path, *, mask: bool) -> Path:
    """A copy of an F32 model with the adapter added into its weights: what the adapter has to amount to."""
    content = bytearray(model.path.read_bytes())

    def weight(name: str) -> np.ndarray:
        info = model.tensors[name]
        return np.frombuffer(content, np.float32, int(np.prod(info.shape)), info.offset_bytes).reshape(
            info.shape
        )

    for name, a in checkpoint.tensors.items():
        if name.endswith(".lora_a"):
            b = checkpoint.tensors[name[:-1] + "b"].astype(np.float64)
            target = weight(name.removesuffix(".lora_a"))
            target += (ALPHA / RANK * (b @ a)).astype(np.float32)
    if mask:
        weight("token_embd.weight")[MASK_TOKEN] += checkpoint.tensors["mask_embedding"]
    path.write_bytes(content)
    return path


def mean_kl(logits: np.ndarray, reference: np.ndarray) -> float:
    """Mean KL divergence in nats of two (T, V) arrays of logits."""
    p, q = (
        x.astype(np.float64) - np.logaddexp.reduce(x.astype(np.float64), -1, keepdims=True)
        for x in (reference, logits)
    )
    return float((np.exp(p) * (p - q)).sum(-1).mean())


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_llama_cpp_computes_with_the_adapter_as_with_merged_weights(
    tmp_path: Path, tiny_model: Callable[..., Path], tied: bool, causal: bool
):
    model = read_model(tiny_model(tied=tied))
    # Large enough to move the logits by nats, so that a wrong scale or row order cannot hide.
    checkpoint = conversion(model, scale=0.15)
    checkpoint.save_gguf(tmp_path / "adapter.gguf", model)
    load_adapter(tmp_path / "adapter.gguf").check(model)  # libllama aborts on a bad one
    tokens = np.random.default_rng(0).integers(20, model.V, 24).astype(np.int32)
    tokens[::3] = MASK_TOKEN
    plain, adapted = llama_logits(
        model.path, [Request(tokens, causal), Request(tokens, causal, tmp_path / "adapter.gguf")]
    )
    (expected,) = llama_logits(
        merged(model, checkpoint, tmp_path / "merged.gguf", mask=not tied), [Request(tokens, causal)]
    )
    assert mean_kl(adapted, expected) < 1e-6  # float32 sums in another order
    assert mean_kl(plain, expected) > 0.1
