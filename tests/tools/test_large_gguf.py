"""Large random models: every architecture is alive, and llama.cpp loads what is written of it.

The benchmark's own use of them is in test_bench.py.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import make_large_gguf as large
import numpy as np
import pytest
from large_architectures import SHAPES
from llama_reference import Request, llama_logits
from make_large_gguf import make_large_gguf
from tiny_architectures import ARCHITECTURES

from ggml_diffusion.engine.cpu.q4_model import Q4Model
from ggml_diffusion.engine.interface import Batch
from ggml_diffusion.formats.model_check import read_model
from ggml_diffusion.training.identity import mean_kl_divergence

SMALL = {"C": 256, "H": 4, "G": 2, "F": 512, "V": 600}
N_TOKENS = 48
# What an engine in float32 and one that quantises activations to 8 bits differ by, with room: a wrong tensor,
# scale or norm gives tenths of a nat at least where logits spread over two.
MEAN_KL_LIMIT = 0.05


def small(arch: str) -> dict[str, Any]:
    return {"arch": arch, "L": ARCHITECTURES[arch].L, **SMALL}


def random_tokens(n_tokens: int = N_TOKENS) -> np.ndarray[Any, np.dtype[np.int32]]:
    return np.random.default_rng(0).integers(0, SMALL["V"], n_tokens).astype(np.int32)


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_architecture_is_alive_and_llama_computes_it_as_we_do(tmp_path: Path, arch: str) -> None:
    path = make_large_gguf(tmp_path / "made.gguf", **small(arch))
    tokens = random_tokens()
    with Q4Model.from_gguf(path, 1, compute="f32") as model:
        logits = model.logits(Batch(tokens[None]))[0]
    assert 1.0 < logits.std() < 4.0  # as of llama: normed rows and a head with the gain 2
    # the output does not just repeat its input: where the head is tied that would be the only likely token
    repeated = np.mean(logits.argmax(axis=-1) == tokens)
    assert repeated < 0.5
    (reference,) = llama_logits(path, [Request(tokens)], n_threads=1)
    assert mean_kl_divergence(reference, logits) < MEAN_KL_LIMIT


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_token_before_it_matters_to_a_prediction(tmp_path: Path, arch: str) -> None:
    """Attention is alive as well: another first token moves the last prediction."""
    path = make_large_gguf(tmp_path / "made.gguf", **small(arch))
    tokens = random_tokens(16)
    others = tokens.copy()
    others[0] += 1
    with Q4Model.from_gguf(path, 1, compute="f32") as model:
        last = [model.logits(Batch(ids[None]))[0, -1:] for ids in (tokens, others)]
    assert mean_kl_divergence(last[0], last[1]) > 1e-3  # one of sixteen keys; rounding is below 1e-9


@pytest.mark.parametrize("shape", SHAPES)
def test_a_named_shape_has_its_sizes_and_can_be_cut(tmp_path: Path, shape: str) -> None:
    named = SHAPES[shape]
    file = read_model(make_large_gguf(tmp_path / "made.gguf", shape=shape, L=1, V=600, F=256))
    assert file.arch == named.arch and file.tied_head == named.tied
    for letter in "CHGD":
        assert getattr(file, letter) == named.sizes[letter]
    assert (file.L, file.V, file.F) == (1, 600, 256)
    assert file.context_length == named.context


def test_a_shape_in_another_architecture_takes_its_keys_and_not_those_of_the_shape(tmp_path: Path) -> None:
    cut = {"L": 1, "V": 600, "F": 256}
    file = read_model(make_large_gguf(tmp_path / "made.gguf", shape="qwen3-0.6b", arch="gemma3", **cut))
    assert file.arch == "gemma3" and SHAPES["qwen3-0.6b"].sizes["C"] == file.C
    assert file.metadata["gemma3.attention.sliding_window"] == 512
    assert file.metadata["gemma3.attention.layer_norm_rms_epsilon"] == pytest.approx(1e-5)


def test_its_command_line_writes_what_its_function_writes(tmp_path: Path) -> None:
    command = [sys.executable, large.__file__, str(tmp_path / "out.gguf"), "--shape", "qwen3-0.6b"]
    command += ["--layers", "1", "--C", "64", "--H", "2", "--G", "1", "--F", "96", "--V", "600"]
    subprocess.run([*command, "--keys", '{"rope.freq_base": 5e5}'], check=True)
    sizes = {"L": 1, "C": 64, "H": 2, "G": 1, "F": 96, "V": 600}
    same = make_large_gguf(tmp_path / "same.gguf", shape="qwen3-0.6b", keys={"rope.freq_base": 5e5}, **sizes)
    assert (tmp_path / "out.gguf").read_bytes() == same.read_bytes()
    assert read_model(same).D == 32


def test_the_planned_memory_does_not_depend_on_the_vocabulary(tmp_path: Path) -> None:
    """The head goes through the vocabulary in tiles, so nothing that is planned has its size."""
    planned = []
    for V in (4096, 262144):
        path = make_large_gguf(tmp_path / f"{V}.gguf", arch="gemma3", L=1, C=64, H=2, G=1, F=64, V=V)
        with Q4Model.from_gguf(path, 2) as model:
            planned.append([model.memory_bytes(2048, 256, 4), model.memory_bytes(64, 64, gradients=False)])
    assert planned[0] == planned[1]
