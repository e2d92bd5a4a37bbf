"""The fast mode's gradient on SmolLM2 is no worse than that of PyTorch in bf16; run with `pytest -m peer`.

The same batch, adapter and mask go through PyTorch + transformers + PEFT, which are no dependencies: without
them the test is skipped. Arch `llama` stores Q and K rows permuted in GGUF against Hugging Face; this touches
the rows of lora_b alone (llama.cpp `conversion/llama.py`, permute).
"""

from __future__ import annotations

import math
import pydoc_data.topics
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cases import relative_error
from llama_reference import llama_tokens
from numpy.typing import NDArray

from ggml_diffusion.engine.cpu.q4_model import Q4Model
from ggml_diffusion.engine.interface import Batch
from ggml_diffusion.formats.lora import LoraAdapter, TargetModule, init_lora, lora_shapes

pytestmark = pytest.mark.peer

B, T, RANK, ALPHA, MASK = 4, 128, 32, 64.0, 7
# Only at the causal end is an unconverted model well conditioned: at a ratio of 0.3 its gradient is that of a
# chaotic function (the cosine between bf16 and f32 falls to -0.5, in PyTorch and here alike), which compares
# nothing.
CAUSAL_RATIO = 1.0
TARGETS = {
    TargetModule.QUERY_PROJ: "self_attn.q_proj",
    TargetModule.KEY_PROJ: "self_attn.k_proj",
    TargetModule.VALUE_PROJ: "self_attn.v_proj",
    TargetModule.OUTPUT_PROJ: "self_attn.o_proj",
}
Gradients = dict[str, NDArray[np.float32]]


def to_hugging_face(lora_b: Any, heads: int) -> Any:
    """Rows of a Q or K lora_b (heads * D, R) from GGUF's order (interleaved pairs) to halves."""
    pairs = lora_b.reshape(heads, lora_b.shape[0] // heads // 2, 2, lora_b.shape[1])
    return pairs.swapaxes(1, 2).reshape(lora_b.shape)


def to_gguf(lora_b: Any, heads: int) -> Any:
    """The way back."""
    halves = lora_b.reshape(heads, 2, lora_b.shape[0] // heads // 2, lora_b.shape[1])
    return halves.swapaxes(1, 2).reshape(lora_b.shape)


def cosine(a: Gradients, b: Gradients) -> float:
    """Cosine between two whole gradients, in float64."""
    x, y = (np.concatenate([g[name].ravel() for name in sorted(g)]).astype(np.float64) for g in (a, b))
    return float(x @ y / np.linalg.norm(x) / np.linalg.norm(y))


@pytest.fixture(scope="module")
def batch(smollm2_path: Path) -> dict[str, Any]:
    """English of Python's manual, half of it masked; shifted prediction, mean over the masked tokens."""
    text = pydoc_data.topics.topics["specialnames"][: 8 * B * T]
    clean = llama_tokens(smollm2_path, text)[: B * T].reshape(B, T)
    masked = np.random.default_rng(0).random((B, T)) < 0.5
    masked[:, 0] = False
    targets, weights = np.zeros((B, T), np.int32), np.zeros((B, T), np.float32)
    targets[:, :-1] = clean[:, 1:]
    weights[:, :-1] = masked[:, 1:] / masked.sum()
    return {"tokens": np.where(masked, MASK, clean).astype(np.int32), "targets": targets, "weights": weights}


@pytest.fixture(scope="module")
def adapter(smollm2_path: Path) -> LoraAdapter:
    """Kaiming A, and B of the size that some hundred steps of training give it."""
    rng = np.random.default_rng(1)
    with Q4Model.from_gguf(smollm2_path, 1) as model:
        tensors = {
            name: np.zeros(shape, np.float32)
            for name, shape in lora_shapes(model.file, TARGETS, RANK).items()
        }
        init_lora(tensors, rng)
        for name, value in tensors.items():
            if name.endswith(".lora_b"):
                value[...] = 0.01 * rng.standard_normal(value.shape)
        mask_embedding = (0.02 * rng.standard_normal(model.file.C)).astype(np.float32)
    return LoraAdapter(ALPHA, tensors, MASK, mask_embedding)


def engine_gradients(
    path: Path, batch: dict[str, Any], adapter: LoraAdapter, causal_ratio: float, compute: str
) -> Gradients:
    gradients = {name: np.zeros_like(value) for name, value in adapter.tensors.items()}
    gradients["mask_embedding"] = np.zeros_like(adapter.mask_embedding)
    with Q4Model.from_gguf(path, 2, compute=compute) as model:
        seen = Batch(batch["tokens"], causal_ratio)
        model.loss_and_gradients(seen, batch["targets"], batch["weights"], adapter, gradients)
    return gradients


def torch_gradients(
    path: Path,
    batch: dict[str, Any],
    adapter: LoraAdapter,
    causal_ratio: float,
    *,
    bf16: bool = False,
    bf16_adapter: bool = False,
) -> Gradients:
    """The same gradients from PyTorch, in GGUF's names and row order."""
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    peft = pytest.importorskip("peft", reason="PEFT is not installed")
    dtype = torch.bfloat16 if bf16 else torch.float32
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        str(path.parent), gguf_file=path.name, dtype=torch.float32
    )
    # a plain model with unpacked weights: transformers' own bf16 path for GGUF gives no true gradients
    known = {"quantization_config", "model_type", "architectures"}
    settings = {key: value for key, value in loaded.config.to_dict().items() if key not in known}
    base = transformers.LlamaForCausalLM(transformers.LlamaConfig(**settings))
    base.load_state_dict(loaded.state_dict())
    base = base.to(dtype)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=[n.split(".")[1] for n in TARGETS.values()]
    )
    model = peft.get_peft_model(base, config, autocast_adapter_dtype=not bf16_adapter)
    heads = {"attn_q": base.config.num_attention_heads, "attn_k": base.config.num_key_value_heads}
    parameters = dict(model.named_parameters())
    ours: dict[str, Any] = {}
    for layer in range(base.config.num_hidden_layers):
        for target, theirs in TARGETS.items():
            for half in ("A", "B"):
                name = f"{target.weight_name(layer)}.lora_{half.lower()}"
                ours[name] = parameters[
                    f"base_model.model.model.layers.{layer}.{theirs}.lora_{half}.default.weight"
                ]
                value = adapter.tensors[name]
                if half == "B" and target.gguf_name in heads:
                    value = to_hugging_face(value, heads[target.gguf_name])
                ours[name].data.copy_(torch.from_numpy(np.ascontiguousarray(value)))
    assert adapter.mask_embedding is not None
    mask_row = torch.nn.Parameter(torch.from_numpy(adapter.mask_embedding.copy()))
    ours["mask_embedding"] = mask_row
    tokens = torch.from_numpy(batch["tokens"]).long()
    inputs = base.model.embed_tokens(tokens)
    inputs = inputs + (tokens == MASK).unsqueeze(-1) * mask_row.to(inputs.dtype)
    log_weight = math.log(1.0 - causal_ratio) if causal_ratio < 1.0 else -math.inf
    bias = torch.triu(torch.full((T, T), log_weight), 1).to(dtype).expand(B, 1, T, T)
    hidden = base.model(inputs_embeds=inputs, attention_mask=bias).last_hidden_state
    used = torch.from_numpy(batch["weights"]) > 0
    logits = base.lm_head(hidden[used]).float()
    logits[:, MASK] = -math.inf
    losses = torch.nn.functional.cross_entropy(
        logits, torch.from_numpy(batch["targets"]).long()[used], reduction="none"
    )
    (losses * torch.from_numpy(batch["weights"])[used]).sum().backward()
    gradients: Gradients = {}
    for name, parameter in ours.items():
        value = parameter.grad.float().numpy()
        projection = name.split(".")[2] if name.endswith(".lora_b") else ""
        gradients[name] = to_gguf(value, heads[projection]) if projection in heads else value
    return gradients


def test_the_fast_gradient_is_no_worse_than_pytorch_in_bf16(
    smollm2_path: Path, batch: dict[str, Any], adapter: LoraAdapter
) -> None:
    case = (smollm2_path, batch, adapter, CAUSAL_RATIO)
    exact_torch = torch_gradients(*case)
    exact = engine_gradients(*case, "f32")
    errors = {name: relative_error(g, exact_torch[name]) for name, g in exact.items()}
    print(f"f32 against PyTorch f32: worst tensor {max(errors.values()):.1e}")
    # two float32 implementations of one network of 30 layers
    assert all(error < 1e-2 for error in errors.values())
    ours = cosine(engine_gradients(*case, "fast"), exact)
    mixed = cosine(torch_gradients(*case, bf16=True), exact_torch)
    all_bf16 = cosine(torch_gradients(*case, bf16=True, bf16_adapter=True), exact_torch)
    print(
        f"1 - cosine to the f32 gradient: fast mode {1 - ours:.1e}, PyTorch bf16 {1 - mixed:.1e}, "
        f"with bf16 adapters too {1 - all_bf16:.1e}"
    )
    assert ours >= mixed
