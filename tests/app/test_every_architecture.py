"""A tiny file of every architecture goes the whole way, from convert to inspect."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from architectures import SMALL
from conftest import TinyModel

from ggml_diffusion.app.cli.main import main
from ggml_diffusion.formats.adapter_file import load_adapter
from ggml_diffusion.formats.architectures import ARCHITECTURES

TEXT = "the old mill ground corn for the whole village and the miller told his children of it. " * 40
EXPORTS = ("adapter.safetensors", "adapter.gguf")
SIZES = ("--batch-size", 2, "--gradient-accumulation", 1, "--sequence-length", 24, "--rank", 2)


def run(*arguments: object) -> int:
    """Run a command line in this process; returns its exit code."""
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    return int(exit_.value.code or 0)


def options(arch: str) -> dict[str, Any]:
    """Sizes that 4-bit blocks allow, and a vocabulary that holds the bytes of a text."""
    return {**SMALL[arch], "F": 64, "V": 384, "type": "Q4_0"}


def _undo_the_end(folder: Path) -> None:
    """Leave a run as one that was killed between its two checkpoints."""
    checkpoints = sorted(path for path in (folder / "checkpoints").iterdir() if path.is_dir())
    assert len(checkpoints) == 2
    shutil.rmtree(checkpoints[-1])
    for name in EXPORTS:
        (folder / name).unlink()


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_whole_way(
    tiny_model: TinyModel,
    tmp_path: Path,
    arch: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")  # the exports say when they were made
    base, folder = tiny_model(**options(arch)), tmp_path / "run"
    (tmp_path / "text.txt").write_text(TEXT)
    convert = ("convert", base, "--data", tmp_path / "text.txt", "--output", folder, *SIZES)
    modules = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"
    convert += ("--target-modules", modules, "--steps", 4, "--checkpoint-every", 2, "--threads", 1)
    assert run(*convert) == 0
    out = capsys.readouterr().out
    assert "identity gate passed" in out and "step 1/4" in out and "step 4/4" in out
    finished = [(folder / name).read_bytes() for name in EXPORTS]
    _undo_the_end(folder)
    assert run(*convert) == 0
    out = capsys.readouterr().out
    assert "step 2/4" not in out and "step 4/4" in out
    assert [(folder / name).read_bytes() for name in EXPORTS] == finished

    prompt = ("--prompt", "the mill ", "--suffix", " of corn", "--length", 4, "--seed", 1)
    assert run("generate", base, folder / "adapter.gguf", *prompt) == 0
    by_gguf = capsys.readouterr().out
    assert run("generate", base, folder, *prompt) == 0
    assert capsys.readouterr().out == by_gguf
    assert by_gguf.startswith("the mill ") and by_gguf.endswith(" of corn\n")

    assert run("export", "adapter", folder, tmp_path / "copy.gguf", "--base", base) == 0
    exported, trained = (
        load_adapter(path).tensors for path in (tmp_path / "copy.gguf", folder / "adapter.safetensors")
    )
    assert exported.keys() == trained.keys()
    assert all(np.array_equal(exported[name], trained[name]) for name in trained)
    for path in (base, folder / "adapter.gguf"):
        assert run("inspect", path) == 0
    assert arch in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_it_is_evaluated(
    tiny_model: TinyModel, tmp_path: Path, arch: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base, folder = tiny_model(**options(arch)), tmp_path / "run"
    (tmp_path / "text.txt").write_text(TEXT * 4)
    assert (
        run("convert", base, "--data", tmp_path / "text.txt", "--output", folder, *SIZES, "--steps", 2) == 0
    )
    evaluate = ("--sequences", 2, "--spans", 1, "--output", tmp_path / "evaluation")
    assert run("evaluate", base, folder, *evaluate) == 0
    assert "bit for bit" in capsys.readouterr().out
