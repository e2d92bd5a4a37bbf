"""The fuzzer makes its inputs again, finds planted faults of every kind, and a minute of it finds none."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from fuzz import Worker, fuzz
from fuzz_inputs import CUT_EVERY, KINDS, Corpus, Input, parse_gguf

from ggml_diffusion.errors import UserError

TOOL = Path(__file__).resolve().parents[2] / "tools" / "fuzz.py"


@pytest.fixture(scope="module")
def corpus() -> Corpus:
    return Corpus(None)


@pytest.mark.parametrize("kind", KINDS)
def test_an_input_is_a_function_of_its_kind_seed_and_number(corpus: Corpus, kind: str) -> None:
    made = [corpus.make(kind, 7, number) for number in range(40)]
    assert made == [corpus.make(kind, 7, number) for number in range(40)]
    assert len({item.content for item in made}) > 20
    assert {item.content for item in made} != {corpus.make(kind, 8, number).content for number in range(40)}


def test_a_sound_file_is_cut_at_every_boundary_of_its_structure(corpus: Corpus) -> None:
    file = corpus.models[-1]
    again = parse_gguf(file.header + file.data, file.size)
    assert again.boundaries == file.boundaries and len(file.boundaries) > 1000
    cuts = [corpus.make("model", 0, CUT_EVERY * number).size for number in range(len(file.boundaries))]
    assert cuts == file.boundaries


class Planted:
    """A reader with a fault of every kind."""

    vocabularies = deaths = 0

    def read(self, kind: str, path: Path, number: int) -> None:
        if number == 1:
            raise UserError("an escape \x1b in the message")
        if number == 2:
            raise ValueError("a traceback")
        if number == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        if number == 4:
            while True:
                pass
        if number == 5:
            bytearray(8 << 30)  # more than the process of many tests may have freed since
        if number == 6:
            signal.setitimer(signal.ITIMER_REAL, 0.05)  # the limit of what waits, made short
            time.sleep(30)
        if number == 7:
            raise UserError("refused as it should be")


class Numbers:
    def make(self, kind: str, seed: int, number: int) -> Input:
        return Input(str(number).encode(), 1, ".txt")


def test_every_kind_of_fault_is_found_and_kept_and_the_rest_is_read(tmp_path: Path) -> None:
    worker = Worker(Numbers(), Planted(), "toml", 0, tmp_path, tmp_path)  # type: ignore[arg-type]
    assert fuzz(worker, 0, 10, 1e9) == 10
    _, accepted, refused, faults, _, _ = worker.counts.tolist()
    reasons = {path.stem: path.read_text() for path in tmp_path.glob("*.fault")}
    assert sorted(reasons) == [f"toml-0-{number}" for number in (1, 2, 3, 4, 5, 6)] and faults == 6
    assert (accepted, refused) == (3, 2)  # one with an escape is refused, and a fault
    for number, reason in {
        1: "refused by",
        2: "ValueError: a traceback",
        3: "died of signal 9",
        4: "of processor time",
        5: "MemoryError",
        6: "hangs",
    }.items():
        assert reason in reasons[f"toml-0-{number}"]
        assert f"--kinds toml --seed 0 --only {number}" in reasons[f"toml-0-{number}"]
        assert (tmp_path / f"toml-0-{number}.txt").read_text() == str(number)


@pytest.mark.slow
def test_a_minute_of_fuzzing_finds_no_fault(tmp_path: Path) -> None:
    """The recorded runs (docs/results/reliability.md) have other seeds."""
    run = subprocess.run(
        [
            sys.executable,
            str(TOOL),
            "--inputs",
            "100000",
            "--seconds",
            "12",
            "--seed",
            "11",
            "--keep",
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    lines = [json.loads(line) for line in run.stdout.splitlines()]
    assert [line["kind"] for line in lines] == list(KINDS), run.stderr
    kept = {path.name: path.read_text() for path in tmp_path.glob("*.fault")}
    assert (run.returncode, kept) == (0, {}), run.stderr
    assert all(line["inputs"] >= 500 and line["accepted"] and line["refused"] for line in lines)
