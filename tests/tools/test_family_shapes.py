"""Shapes that people have, cut to a few layers: converted, loaded by llama.cpp, and within their memory."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import family_shapes
import numpy as np
import pytest
from family_shapes import N_TOKENS, Compared, Memory, compare, main, table_of
from large_architectures import SHAPES
from make_large_gguf import make_large_gguf
from numpy.typing import NDArray

from ggml_diffusion.engine.cpu.q4_model import Q4Model
from ggml_diffusion.errors import UserError
from ggml_diffusion.formats.gguf_adapter import write_gguf_adapter
from ggml_diffusion.formats.lora import LoraAdapter, TargetModule

LAYERS = {"qwen3-0.6b": 2, "gemma3-1b": 6, "phi3-mini": 2}  # gemma3: five with a window and one without
SMALL = {"L": 2, "C": 256, "H": 4, "G": 2, "F": 512, "V": 600}
# Of B where A x is of order one: moves predictions by tenths of a nat, as the tool's own adapters do.
B_RMS = 0.12


def random_adapter(model: Q4Model, rank: int = 2) -> LoraAdapter:
    """Pairs on every projection."""
    rng, tensors = np.random.default_rng(3), {}
    for layer in range(model.file.L):
        for module in TargetModule:
            out_size, in_size = module.weight_shape(model.file)
            name = f"blk.{layer}.{module.gguf_name}.weight.lora_"
            tensors[name + "a"] = (rng.standard_normal((rank, in_size)) / np.sqrt(in_size)).astype(np.float32)
            tensors[name + "b"] = (B_RMS * rng.standard_normal((out_size, rank))).astype(np.float32)
    mask_row = np.zeros(model.file.C, dtype=np.float32)
    return LoraAdapter(float(rank), tensors, mask_token_id=3, mask_embedding=mask_row)


def swapped(
    tensors: Mapping[str, NDArray[np.float32]], one: str, other: str
) -> dict[str, NDArray[np.float32]]:
    """The pairs of two projections of one shape in each other's place."""
    result = dict(tensors)
    for name in tensors:
        if f".{one}." in name:
            twin = name.replace(one, other)
            result[name], result[twin] = tensors[twin], tensors[name]
    return result


@pytest.mark.parametrize("arch", ["qwen3", "gemma3", "phi3"])
def test_an_adapter_has_the_same_effect_and_one_with_swapped_parts_has_not(
    tmp_path: Path, arch: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = np.random.default_rng(0).integers(3, SMALL["V"], 20).astype(np.int32)
    path = tmp_path / "adapter.gguf"
    with Q4Model.from_gguf(make_large_gguf(tmp_path / "base.gguf", arch=arch, **SMALL), 1) as model:
        adapter = random_adapter(model)
        write_gguf_adapter(path, adapter, model.file, {})
        found = compare(model, path, tokens)
        assert list(found) == ["causal", "bidirectional"]
        assert all(one.same_effect for one in found.values())
        # what an exporter that took keys for values, or gate for up, would make of it
        for one, other in (("attn_k", "attn_v"), ("ffn_gate", "ffn_up")):
            wrong = replace(adapter, tensors=swapped(adapter.tensors, one, other))
            monkeypatch.setattr(family_shapes, "load_adapter", lambda *_, wrong=wrong: wrong)
            assert not any(one.same_effect for one in compare(model, path, tokens).values())


def test_an_effect_is_the_same_where_the_adapter_adds_no_more_than_rounding() -> None:
    good = Compared(base=1e-3, adapted=2e-3, moved=0.3, llama_moved=0.3)
    assert good.same_effect
    assert not replace(good, adapted=0.02).same_effect
    assert not replace(good, adapted=float("nan")).same_effect
    assert not replace(good, moved=2e-3).same_effect  # too small to tell


def test_memory_is_judged_by_the_plan() -> None:
    found = {
        "planned": 100 << 20,
        "gate_peak": 9 << 30,
        "before": 60 << 20,
        "model": 200 << 20,
    }
    memory = Memory.of({**found, "training_peak": 367 << 20}, n_trained=0)
    assert memory.bound == (60 + 200 + 100 << 20) + family_shapes.BYTES_OF_PYTHON
    assert memory.as_planned
    assert not replace(memory, training_peak=369 << 20).as_planned
    assert Memory.of({"planned": 1}, 5).as_planned  # where the system tells nothing


def test_a_child_that_fails_says_why_in_one_line(tmp_path: Path) -> None:
    arguments = (tmp_path / "missing.gguf", "--data", tmp_path, "--output", tmp_path / "run")
    with pytest.raises(UserError, match=r"convert ended with 2: .*missing\.gguf"):
        family_shapes.convert(arguments, n_sequences=1, n_tokens=8, rank=1)


@pytest.mark.slow
@pytest.mark.parametrize("shape", LAYERS)
def test_a_real_shape_converts_within_its_memory_and_llama_computes_the_same(
    tmp_path: Path, shape: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--shapes", shape, "--layers", LAYERS[shape], "--json", tmp_path / "figures.json"]
    arguments += ["--folder", tmp_path, "--threads", 2]
    monkeypatch.setattr(sys, "argv", ["family_shapes.py", *map(str, arguments)])
    main()  # ends with 1 where an effect is another one, or memory is not as planned
    (result,) = json.loads((tmp_path / "figures.json").read_text())
    assert "as it should be" in capsys.readouterr().out
    assert result["layers"] == LAYERS[shape]
    check_that_logits_would_show(result, SHAPES[shape].sizes["V"])


def check_that_logits_would_show(result: dict[str, Any], V: int) -> None:
    """The bound is so near that logits of all rows (T, V) in float32 would break it, where V is large."""
    memory = result["memory"]
    if V > 100_000 and memory["bound"] is not None:
        assert memory["training_peak"] + 4 * N_TOKENS * V > memory["bound"]


def test_results_are_shown_as_a_table() -> None:
    memory = Memory.of({"planned": 3 << 20}, 1 << 18)
    compared = {name: Compared(1e-3, 2e-3, 0.3, 0.3) for name in family_shapes.RATIOS}
    result = family_shapes.Result("some-shape", 2, 5 << 20, memory, 32.0, compared, 1.0, 2.0)
    assert result.passed
    table = table_of([result])
    assert [column.header for column in table.columns] == ["", "some-shape, 2 layers"]
    assert list(table.columns[1].cells)[:6] == ["5", "3", "1", "?", "?", "?"]
    worse = replace(result, compared={**compared, "causal": Compared(1e-3, 0.3, 0.3, 0.0)})
    assert list(table_of([worse]).columns[1].cells)[-1] == "NO"
