"""The table of architectures: what a file of each holds, and what its network does.

The C core has the same table for the network (csrc/arch.c); `row` says an entry as the core does, and a test
compares the two. Names and shapes of tensors, and what llama.cpp refuses to load, are here alone.

Deliberately not here: reading files (model_file.py) and the arithmetic (the core).
Source: llama.cpp, src/models/NAME.cpp for the tensors and keys of each, src/llama-model.cpp for the rest.
Letters: C hidden size, H query heads, G key/value heads, D head size, F feed-forward size, V vocabulary,
L layers.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum, IntFlag
from typing import Protocol

from ggml_diffusion.formats.lora import ModelDims, TargetModule
from ggml_diffusion.formats.tensor_names import TOKEN_EMBEDDING, layer_tensor


class Rope(IntEnum):
    """Which elements of a head RoPE turns together: neighbours, or one of each half."""

    PAIRS = 0
    HALVES = 1


class Gate(IntEnum):
    """What the gate of the feed-forward block goes through."""

    SILU = 0
    GELU = 1


class WindowRope(IntEnum):
    """RoPE of the layers that have a window."""

    SAME = 0  # the others', with a base of its own where the file has one
    OWN_BASE = 1  # another base, positions never scaled
    UNSCALED = 2  # the others' base, neither scaled nor magnified


class Feature(IntFlag):
    """What an architecture has beyond attention and a gated feed-forward block; the core's own numbers."""

    PRE_NORMS = 1 << 0
    POST_NORMS = 1 << 1
    HEAD_NORMS = 1 << 2
    WIDE_HEAD_NORMS = 1 << 3
    GATE_IN_UP = 1 << 4
    EMBEDDING_BY_WIDTH = 1 << 5
    SCALE_KEYS = 1 << 6
    SCORE_CAP = 1 << 7
    LOGIT_CAP = 1 << 8
    ROPE_FACTORS = 1 << 9
    LONG_FACTORS = 1 << 10
    YARN_KEYS = 1 << 11


_ATTENTION = (TargetModule.QUERY_PROJ, TargetModule.KEY_PROJ, TargetModule.VALUE_PROJ)
_EVERY_BIAS = tuple(TargetModule)
_FUSED_ATTENTION = "attn_qkv"


@dataclass(frozen=True)
class Architecture:
    """One entry of the table.

    Attributes:
        models: the model families that come as this architecture, for people.
        rope: which elements turn together.
        gate: of the feed-forward block.
        features: see `Feature`.
        window: tokens that a layer with a window sees, where the file does not say; 0 = no windows.
        window_period: each n-th layer has no window, where the file has no pattern; 0 = no layer has one.
        window_rope: RoPE of layers with a window.
        no_rope_period: each n-th layer goes without RoPE; 0 = none does.
        wide_query_layers: a model of so many layers divides scores by sqrt(C / H) instead of sqrt(D).
        score_cap: soft cap of attention scores where the file does not say.
        logit_cap: soft cap of logits where the file does not say.
        biases: the projections that may have one.
        head: whether output.weight is "optional", "required" or "absent".
        square_queries: whether llama.cpp asks for H * D = C.
        partial_rope: whether llama.cpp takes rope.dimension_count below D.

    """

    models: str
    rope: Rope = Rope.HALVES
    gate: Gate = Gate.SILU
    features: Feature = Feature.PRE_NORMS
    window: int = 0
    window_period: int = 0
    window_rope: WindowRope = WindowRope.SAME
    no_rope_period: int = 0
    wide_query_layers: int = 0
    score_cap: float = 0.0
    logit_cap: float = 0.0
    biases: tuple[TargetModule, ...] = _ATTENTION
    head: str = "optional"
    square_queries: bool = False
    partial_rope: bool = False


_PRE = Feature.PRE_NORMS
_FACTORS = Feature.ROPE_FACTORS | Feature.LONG_FACTORS

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture(
        "Llama 1 to 3.3, Mistral, TinyLlama, SmolLM and SmolLM2, and others of their shape",
        rope=Rope.PAIRS,
        features=_PRE | _FACTORS,
        biases=_EVERY_BIAS,
    ),
    "mistral3": Architecture(
        "Ministral 3", rope=Rope.PAIRS, features=_PRE | _FACTORS | Feature.YARN_KEYS, biases=_EVERY_BIAS
    ),
    "smollm3": Architecture("SmolLM3", rope=Rope.PAIRS, no_rope_period=4),
    "granite": Architecture(
        "Granite 3, dense",
        rope=Rope.PAIRS,
        features=_PRE | _FACTORS | Feature.SCALE_KEYS,
        biases=_EVERY_BIAS,
    ),
    "qwen2": Architecture("Qwen 1.5 to 2.5, dense", square_queries=True),
    "qwen3": Architecture("Qwen 3, dense", features=_PRE | Feature.HEAD_NORMS),
    "phi3": Architecture(
        "Phi 3, 3.5 and 4",
        features=_PRE | Feature.GATE_IN_UP | Feature.LONG_FACTORS,
        square_queries=True,
        partial_rope=True,
    ),
    "olmo2": Architecture(
        "OLMo 2 and 3",
        features=Feature.POST_NORMS | Feature.HEAD_NORMS | Feature.WIDE_HEAD_NORMS,
        window_period=4,
        window_rope=WindowRope.UNSCALED,
        head="required",
        square_queries=True,
    ),
    "gemma2": Architecture(
        "Gemma 2",
        gate=Gate.GELU,
        features=_PRE
        | Feature.POST_NORMS
        | Feature.EMBEDDING_BY_WIDTH
        | Feature.SCORE_CAP
        | Feature.LOGIT_CAP,
        window=4096,
        window_period=2,
        wide_query_layers=46,
        score_cap=50.0,
        logit_cap=30.0,
        head="absent",
        partial_rope=True,
    ),
    "gemma3": Architecture(
        "Gemma 3, its text model",
        gate=Gate.GELU,
        features=_PRE
        | Feature.POST_NORMS
        | Feature.HEAD_NORMS
        | Feature.EMBEDDING_BY_WIDTH
        | Feature.LOGIT_CAP,
        window_period=6,
        window_rope=WindowRope.OWN_BASE,
        wide_query_layers=62,
        partial_rope=True,
    ),
}

_EXPERTS = "is a mixture of experts, in which each token takes weights of its own"
_RECURRENT = "has recurrent layers, which cannot see what lies to their right"
_PER_LAYER = (
    "feeds embeddings into each layer and shares keys among layers, which the engine does not compute"
)
_TOWER = "is the vision or audio tower of a model, not a language model"
_POSITIONS = "has positions in several dimensions (M-RoPE), for pictures"
_ENCODER = "is an encoder, which has never written text"

# Why an architecture that people try is not in the table; the first whose name is part of it counts.
_REFUSALS: Mapping[str, str] = {
    "moe": _EXPERTS,
    "mixtral": _EXPERTS,
    "gpt-oss": _EXPERTS,
    "llama4": _EXPERTS,
    "deepseek": _EXPERTS,
    "qwen3next": _RECURRENT,
    "qwen35": _RECURRENT,
    "falcon-h1": _RECURRENT,
    "mamba": _RECURRENT,
    "jamba": _RECURRENT,
    "rwkv": _RECURRENT,
    "granitehybrid": _RECURRENT,
    "nemotron_h": _RECURRENT,
    "lfm2": _RECURRENT,
    "plamo2": _RECURRENT,
    "kimi-linear": _RECURRENT,
    "gemma3n": _PER_LAYER,
    "gemma4": _PER_LAYER,
    "clip": _TOWER,
    "mmproj": _TOWER,
    "qwen2vl": _POSITIONS,
    "qwen3vl": _POSITIONS,
    "bert": _ENCODER,
    "t5": _ENCODER,
    "embedding": _ENCODER,
}


def refusals() -> Mapping[str, str]:
    """Parts of names of architectures that are refused, and why, as the end of a sentence."""
    return _REFUSALS


def refusal(name: str) -> str:
    """Why an architecture that is not in the table cannot be converted, as the end of a sentence."""
    for part, reason in _REFUSALS.items():
        if part in name:
            return reason
    return f"is not supported; supported: {', '.join(ARCHITECTURES)}"


def row(name: str) -> str:
    """An entry as the core writes it (`ggd_arch_row`)."""
    entry = ARCHITECTURES[name]
    return (
        f"{name} rope={entry.rope:d} gate={entry.gate:d} features={entry.features:d} window={entry.window} "
        f"window_period={entry.window_period} window_rope={entry.window_rope:d} "
        f"no_rope_period={entry.no_rope_period} wide_query_layers={entry.wide_query_layers} "
        f"score_cap={entry.score_cap:g} logit_cap={entry.logit_cap:g}"
    )


class TensorNames(Protocol):
    """What is asked of a file to tell which tensors it should have."""

    def __contains__(self, name: str) -> bool:
        """Whether the file has a tensor."""


def expected_tensors(
    name: str, dims: ModelDims, n_rotated: int, present: TensorNames, *, longrope: bool
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor that a model must have, and of those it may have only if it does.

    Args:
        name: of the architecture.
        dims: the model's sizes.
        n_rotated: elements of a head that RoPE turns.
        present: the tensors of the file.
        longrope: whether that is the file's kind of RoPE scaling.

    """
    entry = ARCHITECTURES[name]
    yield TOKEN_EMBEDDING, (dims.V, dims.C)
    yield "output_norm.weight", (dims.C,)
    if entry.head == "required" or (entry.head == "optional" and "output.weight" in present):
        yield "output.weight", (dims.V, dims.C)
    for factors in _factor_names(entry, longrope):
        if factors in present:
            yield factors, (n_rotated // 2,)
    for layer in range(dims.L):
        for tensor, shape in _layer_tensors(entry, dims, f"blk.{layer}.", present):
            yield layer_tensor(layer, tensor), shape


def fused_projections(layer: int, present: TensorNames) -> dict[str, tuple[TargetModule, ...]]:
    """The tensors of a layer that hold more than one projection: name -> its parts, from the first row on."""
    fused: dict[str, tuple[TargetModule, ...]] = {}
    if (qkv := layer_tensor(layer, f"{_FUSED_ATTENTION}.weight")) in present:
        fused[qkv] = _ATTENTION
    if layer_tensor(layer, "ffn_gate.weight") not in present:
        fused[layer_tensor(layer, "ffn_up.weight")] = (TargetModule.GATE_PROJ, TargetModule.UP_PROJ)
    return fused


def _factor_names(entry: Architecture, longrope: bool) -> Iterator[str]:
    """All but phi3, which has no other factors, name the kind of theirs in the file."""
    if longrope or Feature.ROPE_FACTORS not in entry.features:
        if Feature.LONG_FACTORS in entry.features:
            yield "rope_factors_long.weight"
            yield "rope_factors_short.weight"
    else:
        yield "rope_freqs.weight"


def _norms(entry: Architecture, dims: ModelDims) -> Iterator[tuple[str, int]]:
    if Feature.PRE_NORMS in entry.features:
        yield "attn_norm.weight", dims.C
        yield "ffn_norm.weight", dims.C
    if Feature.POST_NORMS in entry.features:
        yield "post_attention_norm.weight", dims.C
        yield "post_ffw_norm.weight", dims.C
    if Feature.HEAD_NORMS in entry.features:
        wide = Feature.WIDE_HEAD_NORMS in entry.features
        yield "attn_q_norm.weight", dims.D * (dims.H if wide else 1)
        yield "attn_k_norm.weight", dims.D * (dims.G if wide else 1)


def _layer_tensors(
    entry: Architecture, dims: ModelDims, prefix: str, present: TensorNames
) -> Iterator[tuple[str, tuple[int, ...]]]:
    for tensor, size in _norms(entry, dims):
        yield tensor, (size,)
    shapes: dict[str, tuple[int, int]] = {}
    fused = layer_tensor(0, f"{_FUSED_ATTENTION}.weight") in present  # in all layers or in none
    biases = set(entry.biases)
    if fused and not all(f"{prefix}{part.gguf_name}.bias" in present for part in _ATTENTION):
        biases -= set(_ATTENTION)  # llama.cpp takes all three beside a fused weight, or drops them
    for module in TargetModule:
        out_size, in_size = module.weight_shape(dims)
        tensor = module.gguf_name
        if fused and module in _ATTENTION:
            tensor = _FUSED_ATTENTION
        elif Feature.GATE_IN_UP in entry.features and module is TargetModule.GATE_PROJ:
            tensor = TargetModule.UP_PROJ.gguf_name
        shapes[tensor] = (shapes.get(tensor, (0, 0))[0] + out_size, in_size)
        if module in biases and f"{prefix}{module.gguf_name}.bias" in present:
            yield f"{module.gguf_name}.bias", (out_size,)
    for tensor, shape in shapes.items():
        yield f"{tensor}.weight", shape
    if fused and f"{prefix}{_FUSED_ATTENTION}.bias" in present:
        yield f"{_FUSED_ATTENTION}.bias", shapes[_FUSED_ATTENTION][:1]
