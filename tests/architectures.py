"""Tiny models of every architecture, as keywords of make_tiny_gguf: for tests that go through all of them.

`SMALL` has one for each architecture, for gradients on a handful of tokens: windows are 3 tokens wide and the
temperature changes every 3, so that seven tokens see all of it. `FEATURES` has one for each thing that a file
of an architecture may have, for comparisons with llama.cpp on a text of two hundred tokens.

It holds no expected values and compares nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from tiny_architectures import ARCHITECTURES, PROJECTIONS, QKV

Options = Mapping[str, Any]

SIZES = {"C": 32, "H": 4, "G": 2, "F": 48, "V": 300}
YARN = {
    "rope.scaling.type": "yarn",
    "rope.scaling.factor": 4.0,
    "rope.scaling.original_context_length": 64,
}
EVERY_SECOND = {"attention.sliding_window": 3, "attention.sliding_window_pattern": 2}

SMALL: dict[str, Options] = {
    "llama": {},
    "qwen2": {},
    "qwen3": {},
    "gemma2": {"keys": EVERY_SECOND},
    "gemma3": {"L": 2, "keys": EVERY_SECOND},
    "phi3": {},
    "smollm3": {},
    "granite": {},
    "olmo2": {"keys": {**EVERY_SECOND, **YARN}},
    "mistral3": {"keys": {"rope.scaling.original_context_length": 3}},
}
SMALL = {arch: {"arch": arch, **SIZES, **SMALL[arch]} for arch in ARCHITECTURES}

FUSED: dict[str, dict[str, tuple[str, ...]]] = {
    arch: {
        **({"attn_qkv": QKV} if entry.fused_qkv else {}),
        **({"ffn_up": ("ffn_gate", "ffn_up")} if entry.fused_gate else {}),
    }
    for arch, entry in ARCHITECTURES.items()
}


@dataclass(frozen=True)
class Feature:
    """A file to write, and what it takes to compare it with llama.cpp.

    window: the longest text on which a bidirectional llama.cpp sees what we see.
    n_ctx: tokens of llama.cpp's context, None: as many as the text needs.
    depth: how far rounding is carried, in layers of the usual models.
    """

    options: Options
    window: int = 20
    n_ctx: int | None = None
    depth: int = 1


def _keys(arch: str, keys: Options, **others: Any) -> Options:
    return {"arch": arch, "keys": keys, **others}


FEATURES: dict[str, Feature] = {
    **{arch: Feature({"arch": arch}) for arch in ARCHITECTURES},
    "llama, linear": Feature(_keys("llama", {"rope.scaling.type": "linear", "rope.scaling.factor": 3.0})),
    "llama, linear by its old key": Feature(_keys("llama", {"rope.scale_linear": 3.0})),
    "llama, scaling none": Feature(_keys("llama", {"rope.scaling.type": "none", "rope.scaling.factor": 3.0})),
    "llama, yarn": Feature(_keys("llama", YARN)),
    # the loader of llama reads attn_factor of these, and no other
    "llama, yarn with further keys": Feature(
        _keys(
            "llama",
            {
                **YARN,
                "rope.scaling.attn_factor": 0.8,
                "rope.scaling.yarn_beta_fast": 3.0,
                "rope.scaling.yarn_log_multiplier": 0.5,
                "rope.scaling.yarn_attn_factor": 2.0,
                "rope.scaling.yarn_ext_factor": 0.0,
            },
        )
    ),
    "llama, yarn that shrinks": Feature(_keys("llama", {**YARN, "rope.scaling.factor": 0.5})),
    "llama, yarn and factors": Feature(_keys("llama", YARN, rope_freqs=True)),
    "llama, longrope short": Feature(
        _keys("llama", {"rope.scaling.type": "longrope", "rope.scaling.original_context_length": 256})
    ),
    "llama, longrope long": Feature(
        _keys("llama", {"rope.scaling.type": "longrope", "rope.scaling.original_context_length": 256}),
        n_ctx=257,
    ),
    "llama, all biases": Feature({"biases": PROJECTIONS}),
    "llama, fused with biases": Feature({"fused_qkv": True, "biases": QKV}),
    "llama, counts as arrays": Feature(
        _keys(
            "llama",
            {
                "attention.head_count": [4, 4],
                "attention.head_count_kv": [2, 2],
                "feed_forward_length": [96, 96],
            },
        )
    ),
    "llama, keys it ignores": Feature(
        _keys("llama", {"attention.scale": 0.9, "attention.sliding_window": 8})
    ),
    "qwen2, tied": Feature({"arch": "qwen2", "tied": True}),
    "qwen2, output bias": Feature({"arch": "qwen2", "biases": ("attn_q", "output")}),
    "qwen3, one head": Feature({"arch": "qwen3", "H": 1, "G": 1, "D": 32}),
    "qwen3, fused with biases": Feature({"arch": "qwen3", "biases": QKV, "fused_qkv": True, "D": 32}),
    "qwen3, yarn": Feature(_keys("qwen3", YARN)),
    "gemma2, pattern of 3": Feature(
        _keys(
            "gemma2",
            {
                "attention.sliding_window": 9,
                "attention.sliding_window_pattern": 3,
                "rope.freq_base_swa": 100.0,
            },
            L=4,
        ),
        window=9,
    ),
    "gemma2, pattern as an array": Feature(
        _keys("gemma2", {"attention.sliding_window_pattern": [False, True, False]}, L=3)
    ),
    "gemma2, pattern as a short array": Feature(
        _keys("gemma2", {"attention.sliding_window_pattern": [True]}, L=2)
    ),
    "gemma2, scaling none": Feature(
        _keys("gemma2", {"rope.scaling.type": "none", "rope.scaling.factor": 3.0})
    ),
    "gemma2, yarn": Feature(_keys("gemma2", YARN)),
    "gemma2, partial rotation": Feature(_keys("gemma2", {"rope.dimension_count": 6})),
    "gemma2, wide heads": Feature({"arch": "gemma2", "D": 32}),
    "gemma2, without its keys": Feature(
        _keys(
            "gemma2",
            {
                "attn_logit_softcapping": None,
                "final_logit_softcapping": None,
                "attention.sliding_window": None,
            },
        ),
    ),
    "gemma2, 27B": Feature({"arch": "gemma2", "L": 46, "C": 32, "H": 2, "G": 1, "D": 32}, depth=10),
    "gemma3, untied with a cap": Feature(_keys("gemma3", {"final_logit_softcapping": 6.0}, tied=False)),
    "gemma3, linear": Feature(_keys("gemma3", {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0})),
    "gemma3, yarn": Feature(_keys("gemma3", {**YARN, "rope.scaling.attn_factor": 1.3})),
    "gemma3, partial rotation": Feature(_keys("gemma3", {"rope.dimension_count": 6})),
    "gemma3, no window": Feature(_keys("gemma3", {"attention.sliding_window": None})),
    "gemma3, no base of its windows": Feature(_keys("gemma3", {"rope.freq_base_swa": None})),
    "gemma3, 27B": Feature({"arch": "gemma3", "L": 62, "C": 32, "H": 2, "G": 1, "D": 32}, depth=10),
    "phi3, long": Feature({"arch": "phi3"}, n_ctx=257),
    "phi3, biases": Feature({"arch": "phi3", "biases": QKV}),
    "phi3, without factors": Feature(
        _keys("phi3", {"rope.scaling.type": None, "rope.scaling.attn_factor": None}, fused_qkv=False)
    ),
    "smollm3, yarn": Feature(_keys("smollm3", YARN, L=5)),
    "granite, biases and factors": Feature({"arch": "granite", "biases": PROJECTIONS, "rope_freqs": True}),
    "granite, no RoPE": Feature(_keys("granite", {"rope.scaling.finetuned": False})),
    "granite, no scales": Feature(
        _keys(
            "granite",
            {"embedding_scale": None, "residual_scale": None, "attention.scale": None, "logit_scale": 0.7},
            biases=("attn_output", "ffn_down"),
        )
    ),
    "olmo2, windows and yarn": Feature(
        _keys(
            "olmo2",
            {
                **YARN,
                "attention.sliding_window": 20,
                "rope.freq_base_swa": 55.0,
                "rope.scaling.attn_factor": 1.2,
            },
            L=4,
        )
    ),
    "olmo2, fused": Feature({"arch": "olmo2", "fused_qkv": True}),
    "mistral3, biases and factors": Feature({"arch": "mistral3", "biases": PROJECTIONS, "rope_freqs": True}),
    "mistral3, no temperature": Feature(
        _keys("mistral3", {"attention.temperature_scale": None, "rope.scaling.yarn_log_multiplier": 0.0})
    ),
    "mistral3, half a multiplier": Feature(_keys("mistral3", {"rope.scaling.yarn_log_multiplier": 0.5})),
}
