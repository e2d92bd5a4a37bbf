"""The table of architectures: which tensors a file must hold, may hold, and which lie together."""

from dataclasses import dataclass

import pytest

from ggml_diffusion.formats.architectures import ARCHITECTURES, expected_tensors, fused_projections, refusal
from ggml_diffusion.formats.lora import TargetModule


@dataclass(frozen=True)
class Dims:
    """Sizes of a small model."""

    L: int = 2
    C: int = 32
    H: int = 4
    G: int = 2
    D: int = 8
    F: int = 48
    V: int = 100


def expected(arch: str, *present: str, longrope: bool = False) -> dict[str, tuple[int, ...]]:
    return dict(expected_tensors(arch, Dims(), 8, set(present), longrope=longrope))


def test_queries_keys_and_values_lie_together_in_all_layers_or_in_none():
    together = expected("llama", "blk.0.attn_qkv.weight")
    assert {f"blk.{layer}.attn_qkv.weight" for layer in range(2)} <= together.keys()
    assert together["blk.1.attn_qkv.weight"] == (32 + 16 + 16, 32)
    apart = expected("llama", "blk.1.attn_qkv.weight")
    assert {f"blk.{layer}.attn_q.weight" for layer in range(2)} <= apart.keys()
    assert "blk.1.attn_qkv.weight" not in apart


def test_separate_biases_of_a_fused_tensor_count_only_if_all_three_are_there():
    fused, biases = "blk.0.attn_qkv.weight", [f"blk.0.attn_{part}.bias" for part in "qkv"]
    assert set(biases) <= expected("qwen2", fused, *biases).keys()
    assert not set(biases) & expected("qwen2", fused, *biases[:2]).keys()


def test_frequency_factors_are_those_of_the_files_kind_of_scaling():
    factors = ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight")
    names = [name for name in expected("llama", *factors) if name in factors]
    assert names == ["rope_freqs.weight"]
    assert [name for name in expected("llama", *factors, longrope=True) if name in factors] == [*factors[1:]]
    assert [name for name in expected("phi3", *factors) if name in factors] == [*factors[1:]]


def test_the_gate_of_phi_lies_in_the_tensor_of_up():
    tensors = expected("phi3")
    assert tensors["blk.0.ffn_up.weight"] == (2 * 48, 32)
    assert "blk.0.ffn_gate.weight" not in tensors
    parts = fused_projections(0, set(tensors))
    assert parts == {"blk.0.ffn_up.weight": (TargetModule.GATE_PROJ, TargetModule.UP_PROJ)}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_each_architecture_has_its_own_models_and_no_refusal(arch: str):
    assert ARCHITECTURES[arch].models
    assert "supported: llama" in refusal(arch)  # nothing of its name is a reason to refuse it
