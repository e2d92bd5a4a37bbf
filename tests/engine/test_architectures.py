"""Every architecture is computed as llama.cpp computes it, and its gradients are the oracle's.

The oracle itself is held against llama.cpp, architecture by architecture, in test_oracle.py: what passes here
agrees with both. Models are those of tools/tiny_architectures.py, whose windows, caps and scales all matter
within the lengths of these texts.
"""

from __future__ import annotations

from typing import Any

import oracle
import pytest
from cases import packed_batch
from conftest import TinyModel
from test_gradients import Case, check
from tiny_architectures import ARCHITECTURES as TINY

from ggml_diffusion.engine.cpu._native import ffi, lib
from ggml_diffusion.formats.architectures import ARCHITECTURES, row

ARCHS = tuple(ARCHITECTURES)
RATIOS = (1.0, 0.7, 0.0)
# Settings that files of an architecture may have beside the usual ones.
VARIANTS: dict[str, dict[str, Any]] = {
    "llama with biases everywhere": {
        "arch": "llama",
        "biases": ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"),
    },
    "llama with fused queries, keys and values": {"arch": "llama", "fused_qkv": True},
    "llama with a fused bias": {
        "arch": "llama",
        "fused_qkv": True,
        "biases": ("attn_q", "attn_k", "attn_v"),
        "H": 3,
        "G": 1,
        "C": 72,
        "D": 24,
    },
    "llama scaled by linear": {
        "arch": "llama",
        "keys": {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0},
    },
    "llama scaled by yarn": {
        "arch": "llama",
        "keys": {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": 4.0,
            "rope.scaling.original_context_length": 128,
        },
    },
    "llama with frequency factors": {"arch": "llama", "rope_freqs": True},
    "llama that turns half of a head": {"arch": "llama", "keys": {"rope.dimension_count": 8}},
    "qwen2 with a tied head": {"arch": "qwen2", "tied": True},
    "gemma3 without windows": {"arch": "gemma3", "keys": {"attention.sliding_window": None}},
    "olmo2 with windows": {"arch": "olmo2", "L": 4, "keys": {"attention.sliding_window": 11}},
    "granite without RoPE": {"arch": "granite", "keys": {"rope.scaling.finetuned": False}},
}


def core_rows() -> list[str]:
    """The core's own table."""
    rows: list[str] = []
    while (text := lib.ggd_arch_row(len(rows))) != ffi.NULL:
        rows.append(ffi.string(text).decode())
    return rows


def test_the_core_and_the_reader_have_the_same_table() -> None:
    assert core_rows() == [row(name) for name in ARCHITECTURES]


def test_there_is_a_tiny_model_of_every_architecture() -> None:
    assert set(TINY) == set(ARCHITECTURES)


def packed(V: int) -> oracle.Batch:
    return packed_batch(V, B=3, T=61)


@pytest.mark.parametrize("causal_ratio", RATIOS)
@pytest.mark.parametrize("compute", ["f32", "fast"])
@pytest.mark.parametrize("arch", ARCHS)
def test_every_gradient_at_every_ratio(
    tiny_model: TinyModel, arch: str, compute: str, causal_ratio: float
) -> None:
    check(tiny_model, Case({"arch": arch}, packed, causal_ratio), compute, "packed 61")


@pytest.mark.parametrize("arch", ARCHS)
def test_the_shifted_prediction(tiny_model: TinyModel, arch: str) -> None:
    case = Case({"arch": arch}, packed, 0.7, prediction="shifted")
    check(tiny_model, case, "f32", "packed 61")


@pytest.mark.parametrize("use_simd", [True, False])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_files_may_have_beside(tiny_model: TinyModel, variant: str, use_simd: bool) -> None:
    check(tiny_model, Case(VARIANTS[variant], packed, 0.4), "f32", "packed 61", use_simd=use_simd)
