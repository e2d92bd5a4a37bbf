"""LoRA adapters as PEFT folders, as transformers loads them: adapter_config.json and a safetensors file.

Names are Hugging Face's. Where the base's RoPE turns neighbours (llama, mistral3, granite, smollm3), a GGUF
holds the rows of queries and keys in another order than Hugging Face does: only B is touched by that. Phi's
projections lie together in both, so its pairs are stacked as for llama.cpp (fused_lora.py).

Deliberately not here: mask and time embeddings and how to denoise (export/peft.py); DoRA, LoRA of embeddings,
trained biases and other kinds of PEFT, which are refused.
Source: peft, `LoraConfig` and `PeftModel.save_pretrained`; llama.cpp, conversion/llama.py (`permute`).
Letters: H query heads, G key/value heads, D head size, R rank.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from ggml_diffusion.durable import replace_file, replace_text
from ggml_diffusion.errors import UserError, quoted
from ggml_diffusion.formats.architectures import ARCHITECTURES, Feature, Rope, fused_projections
from ggml_diffusion.formats.fused_lora import (
    Layout,
    layout_of,
    read_layout,
    stack_pairs,
    unstack_pairs,
    write_layout,
)
from ggml_diffusion.formats.lora import LoraAdapter, TargetModule, lora_ranks
from ggml_diffusion.formats.model_file import ModelFile
from ggml_diffusion.formats.safetensors_file import parse_object, read_unmapped
from ggml_diffusion.formats.tensor_names import LORA_A_SUFFIX, LORA_B_SUFFIX, layer_tensor
from ggml_diffusion.regular_file import open_regular

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
_MAX_CONFIG_BYTES = 1 << 20
_PREFIX = "base_model.model."
_FLOATS = {"F64": "<f8", "F32": "<f4", "F16": "<f2"}
_FUSED_KEY = "ggml_diffusion.fused"
_ATTENTION = frozenset(
    (TargetModule.QUERY_PROJ, TargetModule.KEY_PROJ, TargetModule.VALUE_PROJ, TargetModule.OUTPUT_PROJ)
)
# Phi's tensors that hold several projections, by their part of the GGUF's name.
_FUSED_MODULES = {"attn_qkv": "qkv_proj", "ffn_up": "gate_up_proj"}
_KEY = re.compile(
    r"(?:base_model\.model\.)?(?:model\.)*(?:language_model\.)?(?:model\.)?"
    r"layers\.(?P<module>\d+\.(?:self_attn|mlp)\.\w+)\.lora_(?P<half>[AB])(?:\.default)?\.weight"
)
# Settings under which a folder means more than W + (alpha / R) B A, and the value with which it does not.
_NEUTRAL: Mapping[str, tuple[object, ...]] = {
    "use_dora": (False, None),
    "use_rslora": (False, None),
    "fan_in_fan_out": (False, None),
    "bias": ("none", None),
    "alpha_pattern": ({}, None),
    "modules_to_save": ([], None),
    "lora_bias": (False, None),
    "layer_replication": ([], None),
    "trainable_token_indices": ([], {}, None),
    "alora_invocation_tokens": ([], None),
}


def write_peft_folder(folder: Path, adapter: LoraAdapter, base: ModelFile, base_name: str | None) -> None:
    """Write the two files, each whole or not there, into a folder that is there.

    Args:
        folder: where to.
        adapter: LoRA pairs; what else it holds is not written.
        base: the model that it fits.
        base_name: of the base in Hugging Face, for the reader.

    Raises:
        UserError: the adapter does not fit, has no pairs, or writing failed.

    """
    adapter.check(base)
    layout = _layout(base, adapter.tensors)
    pairs = stack_pairs(adapter.tensors, layout)
    ranks = lora_ranks(pairs)
    if not ranks:
        raise UserError(f"{folder}: not written: the adapter has no LoRA pairs")
    common = Counter(ranks.values()).most_common(1)[0][0]
    modules = {place.weight: module for module, place in _places(base).items()}
    tensors: dict[str, NDArray[np.float32]] = {}
    for weight in ranks:
        key = f"{_PREFIX}{modules[weight]}"
        b = _reordered(pairs[weight + LORA_B_SUFFIX], weight, base, to_hugging_face=True)
        tensors[f"{key}.lora_A.weight"] = np.ascontiguousarray(pairs[weight + LORA_A_SUFFIX])
        tensors[f"{key}.lora_B.weight"] = np.ascontiguousarray(b)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "r": common,
        "lora_alpha": adapter.alpha if adapter.alpha % 1 else int(adapter.alpha),
        "rank_pattern": {modules[weight]: rank for weight, rank in ranks.items() if rank != common},
        "target_modules": sorted({modules[weight].split(".")[-1] for weight in ranks}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_dropout": 0.0,
    }
    # One key only: the library writes several in random order, and equal exports must make equal files.
    metadata = {_FUSED_KEY: write_layout(layout)} if layout else {"format": "pt"}

    def write(temporary: Path) -> None:
        temporary.write_bytes(save(tensors, metadata))

    replace_file(folder / WEIGHTS_NAME, write)
    replace_text(folder / CONFIG_NAME, json.dumps(config, indent=2, sort_keys=True) + "\n")


def read_peft_folder(folder: Path, base: ModelFile) -> LoraAdapter:
    """Read a PEFT folder of LoRA pairs, ours or another's, in GGUF's names and order of rows.

    Raises:
        UserError: it is no such folder, or holds something that LoRA pairs of this base cannot say.

    """
    alpha, weights = _read_alpha(folder), folder / WEIGHTS_NAME
    arrays, layout = _read_tensors(weights)
    places = _places(base)
    tensors: dict[str, NDArray[np.float32]] = {}
    for name, array in arrays.items():
        match = _KEY.fullmatch(name)
        place = places.get(f"model.layers.{match['module']}") if match else None
        if match is None or place is None:
            raise UserError(
                f"{weights}: tensor {quoted(name)} is no LoRA of a projection of {quoted(base.arch)}"
            )
        if match["half"] == "B":
            if array.ndim != 2 or len(array) != place.n_rows:
                raise UserError(
                    f"{weights}: tensor {quoted(name)} has shape {array.shape}, not ({place.n_rows}, R)"
                )
            array = _reordered(array, place.weight, base, to_hugging_face=False)
        tensors[f"{place.weight}.lora_{match['half'].lower()}"] = np.ascontiguousarray(array)
    try:
        tensors = unstack_pairs(tensors, layout)
        adapter = LoraAdapter(alpha, tensors)
        adapter.check(base)
    except UserError as error:
        raise UserError(f"{weights}: {str(error).removeprefix('adapter: ')}") from None
    return adapter


# -- names and rows ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Place:
    """The GGUF tensor of one of Hugging Face's modules, and its rows."""

    weight: str
    n_rows: int


def _is_fused(base: ModelFile) -> bool:
    """Whether Hugging Face too has one module for several projections."""
    return Feature.GATE_IN_UP in ARCHITECTURES[base.arch].features


def _places(base: ModelFile) -> dict[str, _Place]:
    """Hugging Face's modules that can carry a pair: "model.layers.3.self_attn.q_proj" -> their place."""
    places = {}
    if _is_fused(base) and layer_tensor(0, "attn_qkv.weight") not in base.tensors:
        base.fail("has queries, keys and values apart, which this model has not in Hugging Face")
    for layer in range(base.L):
        fused = fused_projections(layer, base.tensors) if _is_fused(base) else {}
        held = {part for parts in fused.values() for part in parts}
        weights = {**fused, **{m.weight_name(layer): (m,) for m in TargetModule if m not in held}}
        for weight, parts in weights.items():
            module = _FUSED_MODULES[weight.split(".")[2]] if len(parts) > 1 else parts[0].value
            block = "self_attn" if parts[0] in _ATTENTION else "mlp"
            n_rows = sum(part.weight_shape(base)[0] for part in parts)
            places[f"model.layers.{layer}.{block}.{module}"] = _Place(weight, n_rows)
    return places


def _layout(base: ModelFile, tensors: Mapping[str, NDArray[np.float32]]) -> Layout:
    """What has to be stacked."""
    return layout_of(base, tensors) if _is_fused(base) else {}


def _reordered(
    b: NDArray[np.float32], weight: str, base: ModelFile, *, to_hugging_face: bool
) -> NDArray[np.float32]:
    """Rows of B (out, R) in the other order, if it is of queries or keys that are stored in pairs."""
    heads = {"attn_q": base.H, "attn_k": base.G}.get(weight.split(".")[2])
    if heads is None or ARCHITECTURES[base.arch].rope is not Rope.PAIRS:
        return b
    half = len(b) // heads // 2
    inner = (half, 2) if to_hugging_face else (2, half)
    return b.reshape(heads, *inner, b.shape[1]).swapaxes(1, 2).reshape(b.shape)


# -- reading -----------------------------------------------------------------------------------------


def _read_alpha(folder: Path) -> float:
    """Alpha, out of a config that says nothing which would mean more than pairs and it."""
    path = folder / CONFIG_NAME
    with open_regular(path) as file:
        try:
            config = parse_object(path, file.read(_MAX_CONFIG_BYTES), "its content")
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    if config.get("peft_type") != "LORA":
        raise UserError(
            f"{path}: peft_type is {quoted(str(config.get('peft_type')))}; only LORA is supported"
        )
    for key, neutral in _NEUTRAL.items():
        if key in config and config[key] not in neutral:
            raise UserError(f"{path}: {key} is {quoted(str(config[key]))}, which is not supported")
    alpha = config.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
        raise UserError(f"{path}: lora_alpha is {quoted(str(alpha))}, no number above zero")
    return float(alpha)


def _read_tensors(path: Path) -> tuple[dict[str, NDArray[np.float32]], Layout]:
    """All tensors as float32, and what of them is stacked."""
    metadata, held = read_unmapped(path)
    arrays = {name: _as_float32(path, name, kind, data) for name, kind, data in held}
    fused = metadata.get(_FUSED_KEY)
    try:
        return arrays, read_layout(fused) if fused is not None else {}
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def _as_float32(path: Path, name: str, kind: str, data: NDArray[np.uint8]) -> NDArray[np.float32]:
    shape = data.shape[:-1]
    if kind == "BF16":  # which NumPy does not have: the upper half of a float32
        return (data.view("<u2").astype("<u4") << 16).view(np.float32).reshape(shape)
    if kind not in _FLOATS:
        raise UserError(f"{path}: tensor {quoted(name)} has type {quoted(kind)}, no floating-point type")
    return data.view(_FLOATS[kind]).reshape(shape).astype(np.float32)
