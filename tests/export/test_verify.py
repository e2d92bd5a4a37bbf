"""Exports in the runtimes that load them: what agrees is ok, what does not failed, what is absent skipped."""

from __future__ import annotations

import functools
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from build_diffusion_cli import build_diffusion_cli
from conversions import conversion, refusal

from ggml_diffusion.engine.cpu.q4_model import Q4Model
from ggml_diffusion.errors import UserError
from ggml_diffusion.export import verify
from ggml_diffusion.export.peft import export_peft
from ggml_diffusion.export.standalone import plan_standalone, write_standalone
from ggml_diffusion.export.verify import Check, Runtimes, least_regret, verify_run
from ggml_diffusion.formats.adapter_file import DiffusionCheckpoint
from ggml_diffusion.formats.architectures import ARCHITECTURES
from ggml_diffusion.formats.model_check import read_model
from ggml_diffusion.formats.model_file import ModelFile, file_sha256

TinyModel = Callable[..., Path]
NOWHERE = Runtimes()


def bidirectional(base: ModelFile, seed: int = 0, **options: object) -> DiffusionCheckpoint:
    checkpoint = conversion(base, seed=seed, scale=0.15, **options)  # type: ignore[arg-type]
    checkpoint.metadata = checkpoint.metadata.model_copy(
        update={"final_causal_ratio": 0.0, "base_sha256": file_sha256(base.path)}
    )
    return checkpoint


def export_all(folder: Path, checkpoint: DiffusionCheckpoint, base: ModelFile) -> None:
    folder.mkdir(exist_ok=True)
    checkpoint.save(folder / "adapter.safetensors")
    checkpoint.save_gguf(folder / "adapter.gguf", base)
    write_standalone(
        folder / "standalone.gguf", base, checkpoint, plan_standalone(base, checkpoint, time=0.2)
    )
    export_peft(folder / "peft", checkpoint, base)


def checked(
    folder: Path, checkpoint: DiffusionCheckpoint, base: ModelFile, runtimes: Runtimes = NOWHERE
) -> dict[tuple[str, str], Check]:
    with Q4Model.from_gguf(base.path, 1, compute="f32") as engine:
        return {(one.export, one.runtime): one for one in verify_run(folder, engine, checkpoint, runtimes)}


@pytest.fixture
def nothing_else_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(verify, "has_peft", lambda: False)


@pytest.mark.usefixtures("nothing_else_installed")
def test_every_export_is_compared_where_its_runtime_is_there(tmp_path: Path, tiny_model: TinyModel):
    base = read_model(tiny_model(tied=True))
    checkpoint = bidirectional(base)
    export_all(tmp_path / "run", checkpoint, base)
    (tmp_path / "run" / "notes.txt").write_text("no export")
    (tmp_path / "run" / "checkpoints").mkdir()
    found = checked(tmp_path / "run", checkpoint, base)
    assert {key: one.status for key, one in found.items()} == {
        ("adapter.gguf", "llama-cpp-python"): "ok",
        ("peft", "transformers + peft"): "skipped",
        ("standalone.gguf", "llama-cpp-python"): "ok",
        ("standalone.gguf", "llama-diffusion-cli"): "skipped",
    }
    assert found["adapter.gguf", "llama-cpp-python"].limit == "KL 1e-06"
    assert "--peft-python" in found["peft", "transformers + peft"].found


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_the_adapter_of_every_architecture_does_in_llama_cpp_what_it_does_here(
    tmp_path: Path, tiny_model: TinyModel, arch: str
):
    base = read_model(tiny_model(arch=arch))
    checkpoint = bidirectional(base)
    checkpoint.save_gguf(tmp_path / "adapter.gguf", base)
    (check,) = checked(tmp_path, checkpoint, base).values()
    assert check.status == "ok", check


@pytest.mark.usefixtures("nothing_else_installed")
def test_a_first_token_that_sees_itself_alone_does_so_in_llama_cpp(
    tmp_path: Path, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
):
    base = read_model(tiny_model())
    checkpoint = bidirectional(base)
    checkpoint.metadata = checkpoint.metadata.model_copy(update={"attention_sink": True})
    checkpoint.save_gguf(tmp_path / "adapter.gguf", base)
    plan = plan_standalone(base, checkpoint, arch="same", time=0.2)
    write_standalone(tmp_path / "standalone.gguf", base, checkpoint, plan)
    assert {one.status for one in checked(tmp_path, checkpoint, base).values()} == {"ok"}
    all_see_all = functools.partial(verify.bidirectional_logits, attention_sink=False)
    monkeypatch.setattr(
        verify, "bidirectional_logits", lambda *a, attention_sink, **rest: all_see_all(*a, **rest)
    )
    assert {one.status for one in checked(tmp_path, checkpoint, base).values()} == {"failed"}


@pytest.mark.usefixtures("nothing_else_installed")
def test_exports_of_another_conversion_fail(tmp_path: Path, tiny_model: TinyModel):
    base = read_model(tiny_model())
    export_all(tmp_path / "run", bidirectional(base, seed=1), base)
    found = checked(tmp_path / "run", bidirectional(base, seed=2), base)
    assert found["adapter.gguf", "llama-cpp-python"].status == "failed"
    assert found["standalone.gguf", "llama-cpp-python"].status == "failed"


@pytest.mark.usefixtures("nothing_else_installed")
def test_a_standalone_file_of_a_wrong_time_fails(tmp_path: Path, tiny_model: TinyModel):
    base = read_model(tiny_model())
    checkpoint = bidirectional(base)
    path = tmp_path / "s.gguf"
    write_standalone(path, base, checkpoint, plan_standalone(base, checkpoint, time=0.2))
    assert checked(tmp_path, checkpoint, base)["s.gguf", "llama-cpp-python"].status == "ok"
    wrong = np.float64(0.2).tobytes(), np.float64(0.9).tobytes()
    content = path.read_bytes()
    assert content.count(wrong[0]) == 1
    path.write_bytes(content.replace(*wrong))
    assert checked(tmp_path, checkpoint, base)["s.gguf", "llama-cpp-python"].status == "failed"


def test_a_conversion_that_is_not_bidirectional_yet_is_not_compared_in_llama_cpp(
    tmp_path: Path, tiny_model: TinyModel
):
    base = read_model(tiny_model())
    conversion(base).save_gguf(tmp_path / "adapter.gguf", base)
    (check,) = checked(tmp_path, conversion(base), base).values()
    assert check.status == "skipped"
    assert "causal ratio 0.1" in check.found


def test_what_cannot_be_loaded_is_failed_in_a_line(tmp_path: Path, tiny_model: TinyModel):
    base = read_model(tiny_model())
    checkpoint = bidirectional(base)
    checkpoint.save_gguf(tmp_path / "adapter.gguf", base)
    content = (tmp_path / "adapter.gguf").read_bytes()
    (tmp_path / "adapter.gguf").write_bytes(content[: len(content) // 2])
    (check,) = checked(tmp_path, checkpoint, base).values()
    assert check.status == "failed"
    assert "truncated" in check.found
    assert "\n" not in check.found


def test_a_folder_without_exports_is_one_line(tmp_path: Path, tiny_model: TinyModel):
    base = read_model(tiny_model())
    assert "holds no export" in refusal(lambda: checked(tmp_path, bidirectional(base), base))


# -- llama-diffusion-cli -----------------------------------------------------------------------------


def program(folder: Path, body: str) -> Path:
    """A program that stands for llama-diffusion-cli."""
    path = folder / "llama-diffusion-cli"
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("echo '0.00.001.000 E error: unsupported model for diffusion'; exit 1", "unsupported model"),
        ("echo '0.00.001.000 I Error: diffusion generation failed'", "wrote nothing"),
        ("true", "wrote nothing"),
        ("printf '0.00.001.000 I \\nno such words ever written here\\n'", "not among the 64 likeliest"),
    ],
)
def test_a_program_that_fails_or_writes_something_else_is_failed_in_a_line(
    tmp_path: Path, tiny_model: TinyModel, body: str, words: str
):
    base = read_model(tiny_model())
    checkpoint = bidirectional(base)
    folder = tmp_path / "run"
    folder.mkdir()
    write_standalone(folder / "s.gguf", base, checkpoint, plan_standalone(base, checkpoint))
    runtimes = Runtimes(diffusion_cli=program(tmp_path, body))
    check = checked(folder, checkpoint, base, runtimes)["s.gguf", "llama-diffusion-cli"]
    assert check.status == "failed"
    assert words in check.found
    assert "\n" not in check.found


@pytest.fixture(scope="session")
def real_program() -> Path:
    """As LLAMA_DIFFUSION_CLI or the path have it, else built, which takes some minutes the first time."""
    if found := os.environ.get("LLAMA_DIFFUSION_CLI") or shutil.which("llama-diffusion-cli"):
        return Path(found)
    try:
        return build_diffusion_cli()
    except UserError as error:
        pytest.skip(f"no llama-diffusion-cli, and none could be built: {error}")


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3"])
def test_the_stock_program_writes_what_the_engine_would(
    tmp_path: Path, tiny_model: TinyModel, arch: str, real_program: Path
):
    base = read_model(tiny_model(arch=arch))
    checkpoint = bidirectional(base)
    write_standalone(tmp_path / "s.gguf", base, checkpoint, plan_standalone(base, checkpoint))
    runtimes = Runtimes(diffusion_cli=real_program)
    check = checked(tmp_path, checkpoint, base, runtimes)["s.gguf", "llama-diffusion-cli"]
    assert check.status == "ok", check


@pytest.mark.slow
def test_a_converted_smollm2_runs_in_the_stock_program(
    tmp_path: Path, smollm2_path: Path, real_program: Path
):
    """Every row of `verify` on a conversion of a few steps."""
    folder, sentence = (
        tmp_path / "run",
        "The old mill ground corn for the village, and the miller sang of it. ",
    )
    (tmp_path / "text.txt").write_text(sentence * 400)

    def run(*arguments: object) -> str:
        command = [sys.executable, "-m", "ggml_diffusion", *map(str, arguments)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        return done.stdout

    size = ("--steps", 6, "--batch-size", 2, "--sequence-length", 64, "--preset", "laptop")
    form = ("--no-attention-sink", "--output", folder)
    run("convert", smollm2_path, "--data", tmp_path / "text.txt", *form, *size)
    run("export", "standalone", smollm2_path, folder, folder / "standalone.gguf")
    out = run("verify", smollm2_path, folder, "--diffusion-cli", real_program)
    assert re.search(r"standalone\.gguf .* llama-diffusion-cli .* ok", out), out


class Letters:
    """A vocabulary of a few strings."""

    def __init__(self, *shown: str) -> None:
        self.shown = shown

    def decode(self, tokens: np.ndarray, *, continued: bool = False) -> str:
        return "".join(self.shown[token] for token in tokens)


def test_of_all_ways_to_write_a_text_with_a_token_a_place_the_likeliest_counts():
    letters = Letters("a", "b", "ab", "")
    log_p = np.log(np.array([[0.1, 0.2, 0.3, 0.4], [0.25, 0.5, 0.15, 0.1]]))
    # "ab" is "a" + "b" (0.1 * 0.5), "ab" + "" (0.3 * 0.1) or "" + "ab" (0.4 * 0.15); the best is 0.4 * 0.5
    assert least_regret("ab", log_p, letters) == pytest.approx(math.log(0.4 * 0.5 / (0.4 * 0.15)) / 2)
    assert least_regret("b", log_p, letters) == pytest.approx(0.0)
    assert least_regret("aab", log_p, letters) == pytest.approx(math.log(0.2 / (0.1 * 0.15)) / 2)
    assert least_regret("bbb", log_p, letters) == math.inf
