"""The tensors, gains and keys of large random models: any architecture, and the shapes that people have.

What an architecture has is said by tiny_architectures.py. Here are the sizes and keys of real models, and how
large the weights must be for the network to stay alive at any width: normed activations and attention scores
are of order one, logits spread over about two nats, and a tied head does not just repeat its input token.

Deliberately not here: the container and the types (make_large_gguf.py).

Sources: the published configurations of Llama 2 7B, Qwen3 0.6B, Gemma 3 1B, Phi-3 mini (4k), Gemma 2, Granite
3 and Ministral 3 for sizes and keys.

Letters: L layers, C hidden size, H query heads, G key/value heads, D head size, F feed-forward size, V
vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tiny_architectures import ARCHITECTURES, Architecture, FloatArray, Shape, rope_factors

from ggml_diffusion.formats.architectures import ARCHITECTURES as NETWORKS
from ggml_diffusion.formats.architectures import Feature

EPS = "attention.layer_norm_rms_epsilon"


@dataclass(frozen=True)
class LargeShape:
    """A model that people have, without its weights.

    Attributes:
        arch: one of ARCHITECTURES.
        sizes: L, C, H, G, D, F, V.
        tied: whether the head reads the embedding.
        context: tokens that it was trained for.
        keys: without the architecture's prefix, over those of the architecture; None takes one away.
        tokenizer: "bpe" or "spm".

    """

    arch: str
    sizes: Mapping[str, int]
    tied: bool
    context: int
    keys: Mapping[str, Any] = field(default_factory=dict)
    tokenizer: str = "bpe"


SHAPES: dict[str, LargeShape] = {
    "7b": LargeShape(
        "llama", {"L": 32, "C": 4096, "H": 32, "G": 32, "D": 128, "F": 11008, "V": 32000}, False, 4096
    ),
    "qwen3-0.6b": LargeShape(
        "qwen3",
        {"L": 28, "C": 1024, "H": 16, "G": 8, "D": 128, "F": 3072, "V": 151936},
        True,
        40960,
        {"rope.freq_base": 1e6, EPS: 1e-6},
    ),
    "gemma3-1b": LargeShape(
        "gemma3",
        {"L": 26, "C": 1152, "H": 4, "G": 1, "D": 256, "F": 6912, "V": 262144},
        True,
        32768,
        {EPS: 1e-6},
        "spm",
    ),
    "phi3-mini": LargeShape(
        "phi3",
        {"L": 32, "C": 3072, "H": 32, "G": 32, "D": 96, "F": 8192, "V": 32064},
        False,
        4096,
        # the one of 4k turns whole heads and has no long form
        {
            "rope.dimension_count": 96,
            "rope.scaling.type": None,
            "rope.scaling.attn_factor": None,
            "rope.scaling.original_context_length": 4096,
        },
        "spm",
    ),
}

# Keys of real models where the tiny ones have others, to show their effect on short texts.
_KEYS: Mapping[str, Mapping[str, Any]] = {
    "gemma2": {
        "attention.sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
    },
    "gemma3": {"attention.sliding_window": 512},
    "phi3": {"attention.sliding_window": 2047, "rope.scaling.original_context_length": 4096},
    "granite": {
        "embedding_scale": 12.0,
        "residual_scale": 0.22,
        "attention.scale": 0.015625,
        "logit_scale": 8.0,
    },
    "mistral3": {
        "rope.scaling.factor": 16.0,
        "rope.scaling.original_context_length": 16384,
        "rope.scaling.yarn_beta_fast": 32.0,
        "rope.scaling.yarn_beta_slow": 1.0,
        "attention.temperature_scale": 0.1,
    },
}

# Root mean square of silu(g) * u for independent standard normal g and u; GELU's is hardly larger, and the
# architectures that have it norm what comes of it.
GATED_RMS = 0.6
NORM_SPREAD, BIAS_RMS = 0.2, 0.5
LOGITS_RMS = 2.0


@dataclass(frozen=True)
class Tensor:
    """What a tensor holds: values of a normal distribution, or some that are fixed.

    Attributes:
        name: in the file.
        shape: (out, in) of a matrix, (n,) of a vector.
        rms: standard deviation of the values.
        mean: their mean.
        fixed: the values themselves.

    """

    name: str
    shape: tuple[int, ...]
    rms: float
    mean: float = 0.0
    fixed: FloatArray | None = None


def keys_of(arch: str, shape: Shape, keys: Mapping[str, Any]) -> dict[str, Any]:
    """All keys of a model beyond its sizes: the architecture's, those of real models, then the ones given."""
    entry = ARCHITECTURES[arch]
    rotated = {"rope.dimension_count": int(shape.D * entry.rotated)}
    return {**rotated, **entry.keys, **_KEYS.get(arch, {}), **keys}


@dataclass(frozen=True)
class _Gains:
    """Root mean squares.

    embedding: of the stored embedding. head: of the head's rows. scores: what q and k are each multiplied by.
    added: of what a block adds to the residual stream, before the residual scale.
    """

    embedding: float
    head: float
    scores: float
    added: float


def _gains(arch: str, shape: Shape, keys: Mapping[str, Any]) -> _Gains:
    head = LOGITS_RMS / math.sqrt(shape.C) * (keys.get("logit_scale") or 1.0)
    # A tied head reads rows of the embedding, which must then be of the size that the head needs.
    embedding = head if shape.tied else 1.0
    by_width = Feature.EMBEDDING_BY_WIDTH in NETWORKS[arch].features
    scale = math.sqrt(shape.C) if by_width else keys.get("embedding_scale") or 1.0
    # 2 L additions together have the power of the embedding. Under a tied head that repeats the input token:
    # its logit is 2 sqrt(C) times its share of the stream. Files of llama are those of the recorded figures.
    growth = math.sqrt(shape.C) if shape.tied and arch != "llama" else 1.0
    added = embedding * scale * growth / math.sqrt(2 * shape.L) / (keys.get("residual_scale") or 1.0)
    score_scale = keys.get("attention.scale") if Feature.SCALE_KEYS in NETWORKS[arch].features else None
    scores = 1.0 if not score_scale else 1.0 / math.sqrt(score_scale * math.sqrt(shape.D))
    return _Gains(embedding, head, scores, added)


def tensors_of(arch: str, shape: Shape, keys: Mapping[str, Any]) -> Iterator[Tensor]:
    """Every tensor of a model, in file order.

    Args:
        arch: one of ARCHITECTURES.
        shape: its sizes.
        keys: as `keys_of` gives them.

    """
    entry, gains = ARCHITECTURES[arch], _gains(arch, shape, keys)
    yield Tensor("token_embd.weight", (shape.V, shape.C), gains.embedding)
    if keys.get("rope.scaling.type") == "longrope":
        for name, factors in rope_factors("longrope", keys["rope.dimension_count"] // 2).items():
            yield Tensor(name, factors.shape, 0.0, fixed=factors)
    for layer in range(shape.L):
        prefix = f"blk.{layer}."
        for part in (_attention(entry, shape, gains, prefix), _feed_forward(entry, shape, gains, prefix)):
            yield from part
    yield _norm("output_norm", shape.C)
    if not shape.tied:
        yield Tensor("output.weight", (shape.V, shape.C), gains.head)


def _norm(name: str, size: int, mean: float = 1.0) -> Tensor:
    return Tensor(name + ".weight", (size,), NORM_SPREAD * mean, mean)


def _added(entry: Architecture, shape: Shape, gains: _Gains, name: str, n_in: int, in_rms: float) -> Tensor:
    """A block's last projection; where what it adds is normed, the norm has the gain."""
    added = 1.0 if entry.post_norms else gains.added
    return Tensor(name, (shape.C, n_in), added / in_rms / math.sqrt(n_in))


def _attention(entry: Architecture, shape: Shape, gains: _Gains, prefix: str) -> Iterator[Tensor]:
    C, rows = shape.C, {"attn_q": shape.H * shape.D, "attn_k": shape.G * shape.D, "attn_v": shape.G * shape.D}
    if entry.pre_norms:
        yield _norm(prefix + "attn_norm", C)
    if entry.fused_qkv:
        yield Tensor(prefix + "attn_qkv.weight", (sum(rows.values()), C), 1.0 / math.sqrt(C))
    for name, n_rows in rows.items():
        gain = 1.0 if name == "attn_v" else gains.scores
        if not entry.fused_qkv:
            yield Tensor(f"{prefix}{name}.weight", (n_rows, C), gain / math.sqrt(C))
        if name in entry.biases:
            yield Tensor(f"{prefix}{name}.bias", (n_rows,), BIAS_RMS * gain)
    if entry.qk_norms:
        heads = (shape.H, shape.G) if entry.qk_norms == "row" else (1, 1)
        yield _norm(prefix + "attn_q_norm", heads[0] * shape.D)
        yield _norm(prefix + "attn_k_norm", heads[1] * shape.D)
    yield _added(entry, shape, gains, prefix + "attn_output.weight", shape.H * shape.D, 1.0)
    if entry.post_norms:
        yield _norm(prefix + "post_attention_norm", C, gains.added)


def _feed_forward(entry: Architecture, shape: Shape, gains: _Gains, prefix: str) -> Iterator[Tensor]:
    C, F = shape.C, shape.F
    if entry.pre_norms:
        yield _norm(prefix + "ffn_norm", C)
    if not entry.fused_gate:
        yield Tensor(prefix + "ffn_gate.weight", (F, C), 1.0 / math.sqrt(C))
    yield Tensor(prefix + "ffn_up.weight", (2 * F if entry.fused_gate else F, C), 1.0 / math.sqrt(C))
    yield _added(entry, shape, gains, prefix + "ffn_down.weight", F, GATED_RMS)
    if entry.post_norms:
        yield _norm(prefix + "post_ffw_norm", C, gains.added)
