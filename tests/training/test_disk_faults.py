"""Runs of the command line on a disk that is full or broken, and killed in their file operations.

A library that is preloaded (tools/faults.c) lets the calls of the C library fail, whoever makes them.
"""

import errno
import os
import shutil
import signal
import subprocess
import sys
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest

from ggml_diffusion.training.checkpoint import load_latest

ROOT = Path(__file__).resolve().parents[2]
TEXT = "the old mill ground corn for the whole village and the miller told his children of it. " * 40
# llama.cpp takes a second to start, and has tests of its own.
PROGRAM = """
from ggml_diffusion.training import run
run.check_identity = lambda *_: "gate"
from ggml_diffusion.app.cli.main import main
main()
"""
SETTINGS = {
    "--data": "text.txt",
    "--output": "run",
    "--steps": "7",
    "--batch-size": "1",
    "--gradient-accumulation": "1",
    "--sequence-length": "24",
    "--rank": "2",
    "--threads": "1",
    "--checkpoint-every": "2",
}
EXPORTS = ("adapter.safetensors", "adapter.gguf")
# Every so many of a run's file operations; each takes two runs, and all of them the better part of an hour.
EVERY = int(os.environ.get("GGD_FAULT_EVERY", "13"))


@pytest.fixture(scope="module")
def faults(tmp_path_factory):
    """The library, compiled."""
    compiler = shutil.which("cc")
    if sys.platform != "linux" or compiler is None:
        pytest.skip("needs Linux and a C compiler")
    library = tmp_path_factory.mktemp("faults") / "faults.so"
    source = ROOT / "tools" / "faults.c"
    flags = ["-std=c11", "-Wall", "-Wextra", "-Werror", "-O1", "-shared", "-fPIC"]
    subprocess.run([compiler, *flags, "-o", str(library), str(source), "-ldl"], check=True)
    return library


@pytest.fixture(scope="module")
def convert(faults, tiny_model, tmp_path_factory):
    """A function (folder, fault...) -> the finished process of a conversion in it."""
    base = tiny_model(L=1, C=32, H=2, G=1, F=32, type="Q4_0")

    def run(folder, fault=None, *, at=0, path="", calls=None, log=None):
        (folder / "text.txt").write_text(TEXT)
        environment = {**os.environ, "SOURCE_DATE_EPOCH": "1700000000"}
        if fault is not None or log is not None:
            # behind what is preloaded already: a sanitizer wants to be the first
            preloaded = f"{os.environ.get('LD_PRELOAD', '')} {faults}".strip()
            environment |= {"LD_PRELOAD": preloaded, "GGD_FAULT_PATH": path}
            environment |= {"GGD_FAULT": str(fault), "GGD_FAULT_AT": str(at)} if fault is not None else {}
            environment |= {"GGD_FAULT_CALLS": calls} if calls else {}
            environment |= {"GGD_FAULT_LOG": str(log)} if log else {}
        arguments = [sys.executable, "-c", PROGRAM, "convert", str(base), *chain(*SETTINGS.items())]
        return subprocess.run(
            arguments, cwd=folder, env=environment, capture_output=True, text=True, check=False
        )

    folder = tmp_path_factory.mktemp("undisturbed")
    done = run(folder, log=folder / "log", path="run")
    assert done.returncode == 0, done.stderr
    calls = (folder / "log").read_text().splitlines()
    return SimpleNamespace(run=run, n_calls=len(calls), exports=exports_in(folder))


def exports_in(folder):
    return [(folder / "run" / name).read_bytes() for name in EXPORTS]


def check_refused(done, word):
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1, done.stderr
    assert word in done.stderr


@pytest.mark.parametrize(
    ("calls", "path", "at", "number", "step"),
    [
        ("fsync", "run/checkpoints", 7, errno.EIO, 2),
        ("write", "run/metrics.jsonl", 5, errno.ENOSPC, 4),
        # the checkpoint is saved all the same
        pytest.param("fsync", "run/metrics.jsonl", 2, errno.EIO, 6, marks=pytest.mark.slow),
        pytest.param("write", "run/checkpoints", 5, errno.ENOSPC, 2, marks=pytest.mark.slow),
        pytest.param("rename", "run/.adapter.gguf.tmp", 0, errno.EIO, 7, marks=pytest.mark.slow),
    ],
)
def test_a_disk_that_fails_is_one_line_and_loses_nothing_that_was_saved(
    convert, tmp_path, calls, path, at, number, step
):
    check_refused(convert.run(tmp_path, number, at=at, path=path, calls=calls), os.strerror(number))
    loaded = load_latest(tmp_path / "run" / "checkpoints")
    assert loaded.state.step == step
    assert loaded.warnings == []
    done = convert.run(tmp_path)
    assert done.returncode == 0, done.stderr
    assert exports_in(tmp_path) == convert.exports


@pytest.mark.slow
@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_disk_that_fails_from_any_operation_on_loses_nothing_that_was_saved(convert, tmp_path, number):
    refused = 0
    for at in range(0, convert.n_calls, EVERY):
        folder = tmp_path / str(at)
        folder.mkdir()
        done = convert.run(folder, number, at=at, path="run")
        if done.returncode != 0:  # what only cleans up may fail
            check_refused(done, os.strerror(number))
            refused += 1
        assert convert.run(folder).returncode == 0
        assert exports_in(folder) == convert.exports
    assert refused > convert.n_calls // EVERY // 2


@pytest.mark.parametrize(
    "number",
    [errno.EIO, pytest.param(errno.EACCES, marks=pytest.mark.slow)],
)
@pytest.mark.parametrize(
    ("path", "every"),
    [
        ("run/", 31),
        ("text.txt", 1),
        pytest.param("run/", 7, marks=pytest.mark.slow),
    ],
)
def test_a_disk_that_cannot_be_read_is_one_line_and_begins_nothing_anew(
    convert, tmp_path, path, every, number
):
    """What cannot be read now may be sound: the run goes on from it once it can."""
    half = tmp_path / "half"
    half.mkdir()
    # Its disk was full after the checkpoint of step 4.
    check_refused(convert.run(half, errno.ENOSPC, at=5, path="run/metrics.jsonl", calls="write"), "space")
    assert load_latest(half / "run" / "checkpoints").state.step == 4
    shutil.copytree(half, tmp_path / "logged")
    done = convert.run(tmp_path / "logged", log=tmp_path / "log", path=path, calls="look,read")
    assert done.returncode == 0, done.stderr
    n_calls = len((tmp_path / "log").read_text().splitlines())
    assert n_calls > 0
    n_refused = 0
    for at in range(0, n_calls, every):
        folder = tmp_path / str(at)
        shutil.copytree(half, folder)
        done = convert.run(folder, number, at=at, path=path, calls="look,read")
        if done.returncode != 0:
            check_refused(done, os.strerror(number))
            n_refused += 1
        assert [each.name for each in (folder / "run" / "checkpoints").glob(".damaged*")] == []
        done = convert.run(folder)
        assert done.returncode == 0, done.stderr
        assert exports_in(folder) == convert.exports
    assert n_refused > 0


@pytest.mark.slow
def test_a_run_killed_in_any_operation_ends_with_the_same_bytes(convert, tmp_path):
    for at in range(0, convert.n_calls, EVERY):
        folder = tmp_path / str(at)
        folder.mkdir()
        assert convert.run(folder, "kill", at=at, path="run").returncode == -signal.SIGKILL
        assert convert.run(folder).returncode == 0
        assert exports_in(folder) == convert.exports
        left = [path.name for path in (folder / "run").rglob("*") if ".tmp" in path.name]
        assert left == []
