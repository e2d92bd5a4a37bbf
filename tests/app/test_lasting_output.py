"""Training that outlives whoever reads its output, and a closed terminal."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import TinyModel

from ggml_diffusion.formats.adapter_file import DiffusionCheckpoint

TEXT = "the old mill ground corn for the whole village and the miller told his children of it. " * 60


@pytest.fixture
def command(tiny_model: TinyModel, tmp_path: Path) -> list[str]:
    (tmp_path / "text.txt").write_text(TEXT)
    model = tiny_model(L=1, C=32, H=2, G=1, F=32, type="Q4_0")
    given = ("convert", model, "--data", tmp_path / "text.txt", "--output", tmp_path / "run", "--rank", 2)
    size = ("--batch-size", 1, "--gradient-accumulation", 1, "--sequence-length", 24, "--threads", 1)
    return [sys.executable, "-m", "ggml_diffusion", *map(str, (*given, *size))]


def test_a_reader_that_goes_away_loses_nothing(command: list[str], tmp_path: Path) -> None:
    process = subprocess.Popen(
        [*command, "--steps", "30", "--checkpoint-every", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout is not None and process.stderr is not None
    process.stdout.readline()
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(timeout=120) == 0
    assert DiffusionCheckpoint.load(tmp_path / "run" / "adapter.safetensors").metadata.conversion_steps == 30


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_behind_standard_output_is_one_line_and_ends_no_training(command: list[str]) -> None:
    with Path("/dev/full").open("w") as full:
        help_text = [sys.executable, "-m", "ggml_diffusion", "--help"]
        done = subprocess.run(help_text, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert done.returncode == 2
        assert done.stderr.strip() == "error: No space left on device"
        trained = [*command, "--steps", "3"]
        done = subprocess.run(trained, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("ignored", [False, True])
def test_a_terminal_that_closes_stops_a_run_and_saves_it(
    command: list[str], tmp_path: Path, ignored: bool
) -> None:
    """But not where nohup has it ignored."""
    steps = "40" if ignored else "100000"
    process = subprocess.Popen(
        [*command, "--steps", steps, "--checkpoint-every", "0"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN if ignored else signal.SIG_DFL),
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    for _ in range(600):
        if metrics.exists() or process.poll() is not None:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGHUP)
    _, errors = process.communicate(timeout=120)
    assert errors == b""
    assert process.returncode == (0 if ignored else 128 + signal.SIGHUP)
    lines = metrics.read_text().splitlines()
    checkpoint = max((tmp_path / "run" / "checkpoints").glob("step-*"))
    assert json.loads(lines[-1])["step"] == int(checkpoint.name.split("-")[-1])
