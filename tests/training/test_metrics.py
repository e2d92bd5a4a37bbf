"""The file of metrics: one object a step, valid after a crash, cut back on resume."""

import json
import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from ggml_diffusion.errors import UserError
from ggml_diffusion.training.metrics import MetricsWriter, TrainMetrics

KEYS = [
    "step", "loss", "masked_accuracy", "causal_ratio", "learning_rate", "grad_norm", "tokens",
    "tokens_per_second",
]  # fmt: skip


def metrics(step: int, loss: float = 2.5) -> TrainMetrics:
    return TrainMetrics(step, loss, 0.25, 1.0, 1e-4, 0.7, step * 1024, 250.0)


def steps_in(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


def write(path: Path, *steps: int, resume_step: int = 0) -> list[str]:
    """Resume and write; returns what was warned of."""
    warnings: list[str] = []
    with MetricsWriter(path, resume_step, warnings.append) as writer:
        for step in steps:
            writer.write(metrics(step))
    return warnings


def test_each_step_is_one_line_with_the_promised_keys(tmp_path):
    write(tmp_path / "metrics.jsonl", 1, 2)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [list(json.loads(line)) for line in lines] == [KEYS, KEYS]
    assert json.loads(lines[1]) == dict(zip(KEYS, [2, 2.5, 0.25, 1.0, 1e-4, 0.7, 2048, 250.0], strict=True))


def test_terms_of_the_loss_that_are_not_in_use_are_left_out(tmp_path):
    with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
        writer.write(replace(metrics(1), ar_loss=3.5))
        writer.write(replace(metrics(2), distillation_loss=math.nan))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[0]["ar_loss"] == 3.5 and "distillation_loss" not in lines[0]
    assert lines[1]["distillation_loss"] is None and "ar_loss" not in lines[1]


def test_a_line_can_be_read_as_soon_as_it_is_written(tmp_path):
    with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
        writer.write(metrics(1))
        assert steps_in(tmp_path / "metrics.jsonl") == [1]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_does_not_have_become_null(tmp_path, value):
    with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
        writer.write(metrics(1, loss=value))
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["loss"] is None


def test_a_new_run_starts_the_file_anew(tmp_path):
    write(tmp_path / "metrics.jsonl", 1, 2, 3)
    write(tmp_path / "metrics.jsonl", 1)
    assert steps_in(tmp_path / "metrics.jsonl") == [1]


def test_resuming_drops_the_steps_after_the_checkpoint(tmp_path):
    write(tmp_path / "metrics.jsonl", 1, 2, 3, 4)
    write(tmp_path / "metrics.jsonl", 3, 4, 5, resume_step=2)
    assert steps_in(tmp_path / "metrics.jsonl") == [1, 2, 3, 4, 5]


def test_resuming_past_the_last_line_keeps_all_and_says_how_many_are_missing(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 2)
    assert write(path, 10, resume_step=9) == [f"{path}: 7 of 9 steps have no line"]
    assert steps_in(path) == [1, 2, 10]


BROKEN = [
    b'{"step": 3, "lo',
    b'{"step": 3}',
    b"\xff\xfe\n",
    b"[]\n",
    b'{"a": 1}\n',
    b'{"step": true}\n',
    b'{"step": 1e400}\n',
    b'{"step": ' + b"9" * 5000 + b"}\n",
    b"[" * 100_000 + b"\n",  # nested deeper than Python's own stack
    b'{"step": 2}\n',  # a step that was there already
    b"\0" * 200_000,
]


@pytest.mark.parametrize("broken", BROKEN)
def test_a_line_that_a_crash_left_broken_is_dropped(tmp_path, broken):
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 2)
    path.write_bytes(path.read_bytes() + broken)
    assert write(path, 3, resume_step=2) == []  # nothing was lost
    assert steps_in(path) == [1, 2, 3]


@pytest.mark.parametrize("broken", [line.rstrip(b"\n") + b"\n" for line in BROKEN[2:]])
def test_whole_lines_behind_nonsense_stay_and_it_is_said(tmp_path, broken):
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 2, 3, 4, 5)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines[:2], broken, *lines[3:]]))
    (warning,) = write(path, 5, resume_step=4)
    assert "that are not of a run are left out; 1 of 4 steps have no line" in warning
    assert steps_in(path) == [1, 2, 4, 5]
    assert write(path, resume_step=2) == []


def test_a_line_of_a_later_step_in_the_middle_costs_nothing_behind_it(tmp_path):
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 99, 2, 3)
    write(path, 4, resume_step=3)
    assert steps_in(path) == [1, 2, 3, 4]


def test_a_run_that_goes_back_writes_over_what_lies_after(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        for step in (1, 2, 3, 4):
            writer.write(metrics(step))
        writer.rewind(2)
        writer.write(metrics(3, loss=1.0))
    assert steps_in(path) == [1, 2, 3]
    assert json.loads(path.read_text().splitlines()[2])["loss"] == 1.0


def test_lines_reach_the_disk_when_they_are_asked_to_and_at_the_end(tmp_path, monkeypatch):
    flushed = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: flushed.append(os.fstat(descriptor).st_size))
    with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
        writer.write(metrics(1))
        assert flushed == []
        writer.sync()
        assert flushed == [(tmp_path / "metrics.jsonl").stat().st_size]
    assert len(flushed) == 2


def test_a_full_disk_is_one_error_while_writing_and_closing(tmp_path, monkeypatch):
    """A small file system in memory needs a privilege; a limit of the file's size is the same to a writer."""
    resource = pytest.importorskip("resource")
    path = tmp_path / "metrics.jsonl"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with (
            pytest.raises(UserError, match="cannot be written: File too large"),
            MetricsWriter(path) as writer,
        ):
            resource.setrlimit(resource.RLIMIT_FSIZE, (500, before[1]))
            for step in range(1, 9):
                writer.write(metrics(step))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert write(path, 2, resume_step=1) == []  # the line that was cut off is gone
    assert steps_in(path) == [1, 2]


def test_a_disk_that_fails_at_the_end_does_not_hide_what_went_wrong_before(tmp_path, monkeypatch):
    def fail(descriptor):
        raise OSError(5, "Input/output error")

    with pytest.raises(KeyError), MetricsWriter(tmp_path / "metrics.jsonl"):
        monkeypatch.setattr(os, "fsync", fail)
        raise KeyError
    with pytest.raises(UserError, match="Input/output error"), MetricsWriter(tmp_path / "metrics.jsonl"):
        pass


def test_a_file_that_cannot_be_written_is_the_users_to_mend(tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        MetricsWriter(tmp_path / "missing" / "metrics.jsonl")


def test_closing_twice_is_harmless(tmp_path):
    writer = MetricsWriter(tmp_path / "metrics.jsonl")
    writer.close()
    writer.close()


def test_a_named_pipe_is_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(UserError, match="a named pipe, not a file"):
        MetricsWriter(tmp_path / "metrics.jsonl")
