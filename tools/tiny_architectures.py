"""The weights and keys of tiny random models, one entry for each architecture that llama.cpp calls dense.

Sizes, windows, soft caps and scales are such that each of them changes what a text of two hundred tokens
gives: a test that passes has seen them all at work. The network is neither dead nor chaotic: activations stay
of order one and the logits spread over several nats.

Deliberately not here: the container, the vocabulary and the tensor types (make_tiny_gguf.py).

Sources: llama.cpp `src/models/<architecture>.cpp` for the tensors that each loads, `src/llama-arch.cpp` for
the names of keys and tensors.

Letters: L layers, C hidden size, H query heads, G key/value heads, D head size, F feed-forward size, V
vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]

LLAMA3_ROPE_FACTORS = (1.0, 8.0)  # the range of Llama 3.1's frequency factors, from the highest frequency
SHORT_FACTORS, LONG_FACTORS = (1.0, 1.5), (1.0, 20.0)  # of Phi's, roughly
QKV = ("attn_q", "attn_k", "attn_v")
PROJECTIONS = (*QKV, "attn_output", "ffn_gate", "ffn_up", "ffn_down")


@dataclass(frozen=True)
class Architecture:
    """What a file of an architecture has beside the tensors and keys that all have."""

    L: int = 2  # layers: as many as its pattern needs
    keys: Mapping[str, Any] = field(default_factory=dict)  # without the architecture's prefix
    pre_norms: bool = True
    post_norms: bool = False
    qk_norms: str = ""  # "head": one weight for every head, "row": one for all heads together
    biases: tuple[str, ...] = ()
    fused_qkv: bool = False
    fused_gate: bool = False
    tied: bool = False
    rotated: float = 1.0  # share of the head that RoPE turns


ARCHITECTURES: dict[str, Architecture] = {
    "llama": Architecture(),
    "qwen2": Architecture(biases=QKV),
    "qwen3": Architecture(qk_norms="head"),
    "gemma2": Architecture(
        keys={
            "attention.sliding_window": 24,
            "attn_logit_softcapping": 5.0,
            "final_logit_softcapping": 8.0,
        },
        post_norms=True,
        tied=True,
    ),
    "gemma3": Architecture(
        L=6,
        keys={"attention.sliding_window": 24, "rope.freq_base": 1e6, "rope.freq_base_swa": 1e4},
        post_norms=True,
        qk_norms="head",
        tied=True,
    ),
    "phi3": Architecture(
        # llama.cpp reads the window and does not use it
        keys={
            "attention.sliding_window": 24,
            "rope.scaling.type": "longrope",
            "rope.scaling.attn_factor": 1.19,
            "rope.scaling.original_context_length": 256,
        },
        fused_qkv=True,
        fused_gate=True,
        rotated=0.5,
    ),
    "smollm3": Architecture(L=4),
    "granite": Architecture(
        keys={"embedding_scale": 3.0, "residual_scale": 1.4, "attention.scale": 0.3, "logit_scale": 1.3}
    ),
    "olmo2": Architecture(pre_norms=False, post_norms=True, qk_norms="row"),
    "mistral3": Architecture(
        keys={
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 48,
            "rope.scaling.yarn_beta_fast": 4.0,
            "rope.scaling.yarn_beta_slow": 0.5,
            "rope.scaling.yarn_log_multiplier": 1.0,
            "attention.temperature_scale": 0.3,
        },
    ),
}


@dataclass(frozen=True)
class Shape:
    """The sizes of a tiny model, and whether the output matrix is the embedding."""

    L: int
    C: int
    H: int
    G: int
    D: int
    F: int
    V: int
    tied: bool

    @property
    def residual_gain(self) -> float:
        """What keeps a block's output at about half of the embedding's own root mean square.

        Under a tied head much more, or the network would do no more than repeat its input token.
        """
        return 0.5 if self.tied else 1.0 / float(np.sqrt(self.C))


def random_weights(
    arch: Architecture, shape: Shape, *, seed: int, biases: Collection[str], fused_qkv: bool
) -> dict[str, FloatArray]:
    """Random weights by GGUF name: matrices (out, in), norms and biases as vectors."""
    weights = _plain_weights(np.random.default_rng(seed), arch, shape)
    # a second stream, so that what an architecture has more of leaves the weights of a plain one as they are
    _add_norms(weights, np.random.default_rng((seed, 1)), arch, shape)
    _add_biases(weights, np.random.default_rng((seed, 2)), shape, biases)
    for layer in range(shape.L):
        prefix = f"blk.{layer}."
        if fused_qkv:
            for kind in ("weight", "bias"):
                _fuse(weights, [f"{prefix}{name}.{kind}" for name in QKV], f"{prefix}attn_qkv.{kind}")
        if arch.fused_gate:
            names = [f"{prefix}ffn_gate.weight", f"{prefix}ffn_up.weight"]
            _fuse(weights, names, f"{prefix}ffn_up.weight")
    return weights


def _plain_weights(rng: np.random.Generator, arch: Architecture, shape: Shape) -> dict[str, FloatArray]:
    C, F, q_rows, kv_rows = shape.C, shape.F, shape.H * shape.D, shape.G * shape.D

    def matrix(rows: int, columns: int, gain: float) -> FloatArray:
        scaled: FloatArray = (rng.standard_normal((rows, columns)) * (gain / np.sqrt(columns))).astype(
            np.float32
        )
        return scaled

    def norm() -> FloatArray:
        return (1.0 + 0.2 * rng.standard_normal(C)).astype(np.float32)

    # a tied head reads rows of the embedding: the same rows of length 2 give logits with a spread of about 2
    weights = {"token_embd.weight": matrix(shape.V, C, 2.0), "output_norm.weight": norm()}
    for layer in range(shape.L):
        block = {
            "attn_norm": norm(),
            "attn_q": matrix(q_rows, C, 1.4),
            "attn_k": matrix(kv_rows, C, 1.4),
            "attn_v": matrix(kv_rows, C, 2.0),
            "attn_output": matrix(C, q_rows, shape.residual_gain),
            "ffn_norm": norm(),
            "ffn_gate": matrix(F, C, 1.4),
            "ffn_up": matrix(F, C, 1.4),
            "ffn_down": matrix(C, F, 1.5 * shape.residual_gain),
        }
        if not arch.pre_norms:
            del block["attn_norm"], block["ffn_norm"]
        weights.update({f"blk.{layer}.{name}.weight": value for name, value in block.items()})
    if not shape.tied:
        weights["output.weight"] = matrix(shape.V, C, 2.0)
    return weights


def _add_norms(
    weights: dict[str, FloatArray], rng: np.random.Generator, arch: Architecture, shape: Shape
) -> None:
    """Norms of q and k (scores of spread 2, as without them), and norms of what a block adds."""
    heads = {"": (0, 0), "head": (1, 1), "row": (shape.H, shape.G)}[arch.qk_norms]
    sizes = {"attn_q_norm": (heads[0] * shape.D, 1.4), "attn_k_norm": (heads[1] * shape.D, 1.4)}
    if arch.post_norms:
        sizes.update(post_attention_norm=(shape.C, 1.0), post_ffw_norm=(shape.C, 1.0))
    for layer in range(shape.L):
        for name, (size, gain) in sizes.items():
            if size:
                value = gain * (1.0 + 0.2 * rng.standard_normal(size))
                weights[f"blk.{layer}.{name}.weight"] = value.astype(np.float32)


def _add_biases(
    weights: dict[str, FloatArray], rng: np.random.Generator, shape: Shape, names: Collection[str]
) -> None:
    """Biases of the projections named, in every layer, or of "output"."""
    if unknown := set(names) - {*PROJECTIONS, "output"}:
        raise ValueError(f"there is no bias for {sorted(unknown)}")
    places = [f"blk.{layer}.{name}" for layer in range(shape.L) for name in PROJECTIONS if name in names]
    for place in [*places, *(["output"] if "output" in names else [])]:
        adds_to_residual = place.endswith(("attn_output", "ffn_down"))
        gain = 0.5 * (shape.residual_gain if adds_to_residual else 1.0)
        matrix = weights["token_embd.weight" if place == "output" else place + ".weight"]
        weights[place + ".bias"] = (gain * rng.standard_normal(len(matrix))).astype(np.float32)


def _fuse(weights: dict[str, FloatArray], names: list[str], fused: str) -> None:
    """Put the rows of some tensors on top of each other under one name, if they are all there."""
    if all(name in weights for name in names):
        weights[fused] = np.concatenate([weights.pop(name) for name in names])


def rope_factors(kind: str, n: int) -> dict[str, FloatArray]:
    """Factors (n,) by tensor name: "llama3" are a file's only ones, "longrope" come as two."""
    ranges = {
        "llama3": {"rope_freqs.weight": LLAMA3_ROPE_FACTORS},
        "longrope": {"rope_factors_long.weight": LONG_FACTORS, "rope_factors_short.weight": SHORT_FACTORS},
    }[kind]
    return {name: np.linspace(*ends, n).astype(np.float32) for name, ends in ranges.items()}
