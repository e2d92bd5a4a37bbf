"""The file of metrics: one object a step, valid after a crash, cut back on resume."""

import json
import math
import os
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


def write(path: Path, *steps: int, resume_step: int = 0) -> None:
    with MetricsWriter(path, resume_step) as writer:
        for step in steps:
            writer.write(metrics(step))


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


def test_resuming_past_the_last_line_keeps_all(tmp_path):
    write(tmp_path / "metrics.jsonl", 1, 2)
    write(tmp_path / "metrics.jsonl", 10, resume_step=9)
    assert steps_in(tmp_path / "metrics.jsonl") == [1, 2, 10]


@pytest.mark.parametrize(
    "broken", [b'{"step": 3, "lo', b'{"step": 3}', b"\xff\xfe\n", b"[]\n", b'{"a": 1}\n']
)
def test_a_line_that_a_crash_left_broken_is_dropped(tmp_path, broken):
    path = tmp_path / "metrics.jsonl"
    write(path, 1, 2)
    path.write_bytes(path.read_bytes() + broken)
    write(path, 3, resume_step=5)
    assert steps_in(path) == [1, 2, 3]


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
