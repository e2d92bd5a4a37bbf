"""The tools behind docs/results: their arithmetic, and that they run end to end on a tiny model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import ablations
import learning_curve
import numpy as np
import pytest
import residual_norms
import sampler_table
import short_runs
from conftest import TinyModel

from ggml_diffusion.config.toml import load_config
from ggml_diffusion.training.run import run_conversion


def result(variation: str, seed: int, cross_entropy: float) -> dict[str, Any]:
    after = [{"visible": {"cross_entropy": cross_entropy + t}, "future_context_gain": 0.5} for t in range(3)]
    return {"variation": variation, "seed": seed, "after": after}


def test_variations_are_compared_with_the_base_seed_by_seed() -> None:
    rows = [
        result("base", 0, 3.0),
        result("base", 1, 4.0),
        result("rank-8", 0, 3.1),
        result("rank-8", 1, 4.3),
    ]
    _, _, base, rank_8 = ablations.as_markdown(rows).splitlines()
    assert base == "| base | 2 | 3.500 | 4.500 | 5.500 |  | +0.500 |"
    # 0.1 and 0.3: their mean, and half of their distance as its standard error
    assert rank_8 == "| rank-8 | 2 | 3.700 | 4.700 | 5.700 | +0.200 ± 0.100 | +0.500 |"
    only_one = ablations.as_markdown(rows[:1] + rows[2:3]).splitlines()[-1]
    assert "| +0.100 |" in only_one


@pytest.mark.parametrize("name", ablations.VARIATIONS)
def test_every_variation_is_a_config_of_as_many_tokens_a_step(name: str) -> None:
    settings = ablations.settings_of(name, 100, "base")
    config = load_config(overrides=settings, preset=ablations.BASE_PRESET)
    twice = 2 if config.noise_schedule.complementary else 1
    assert twice * config.batch_size * config.gradient_accumulation * config.sequence_length == 1024
    assert config.total_steps == 100
    assert (name == "base") == (
        config == load_config(overrides=ablations.settings_of("base", 100, "base"), preset="demo")
    )


def tiny_run(tiny_model: TinyModel, folder: Path, evaluate_on: int = 0) -> Path:
    """A conversion of two steps in folder / "run"; returns its base."""
    base = tiny_model(L=1, C=32, H=2, G=1, F=32)
    text = folder / "text.txt"
    text.write_text("the cat sat on the mat and the dog ran to the mill of corn. " * 60)
    overrides = {
        "model.base_model": str(base),
        "training.data": [str(text)],
        "training.output": str(folder / "run"),
        "training.total_steps": 2,
        "training.sequence_length": 32,
        "training.held_out_fraction": 0.3,
        "hardware.num_threads": 1,
    }
    config = load_config(overrides=overrides, preset="demo")
    run_conversion(config, ablations.Quiet(), evaluate_on=evaluate_on)
    return base


def test_a_run_is_measured_as_convert_measures_it(tiny_model: TinyModel, tmp_path: Path) -> None:
    base = tiny_run(tiny_model, tmp_path, evaluate_on=ablations.HELD_OUT_SEQUENCES)
    evaluation = tmp_path / "run" / "evaluation.json"
    by_convert = json.loads(evaluation.read_text())
    ablations.measure(tmp_path / "run", base, 1)
    measured = json.loads(evaluation.read_text())
    assert measured == {name: by_convert[name] for name in ("n_sequences", "after")}


def test_the_table_of_samplers_has_a_row_for_each_sampler_and_number_of_steps(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = tiny_run(tiny_model, tmp_path)
    table = tmp_path / "table.md"
    figures = tmp_path / "figures.json"
    arguments = ["sampler_table.py", base, tmp_path / "run", "--samples", 2, "--prompt-length", 4]
    arguments += ["--length", 8, "--json", figures, "--markdown", table]
    monkeypatch.setattr(sys, "argv", [str(argument) for argument in arguments])
    sampler_table.main()
    # held-out text and the base, then for each sampler 2, 4 and 8 steps
    assert len(table.read_text().splitlines()) == 2 + 2 + 3 * len(sampler_table.SAMPLERS)
    assert list(json.loads(figures.read_text())) == ["reference", *sampler_table.SAMPLERS]
    assert table.read_text() in capsys.readouterr().out


def test_a_trailing_mean_begins_with_what_there_is() -> None:
    means = learning_curve.trailing_mean(np.array([1.0, 3.0, 5.0, 7.0]), 2)
    assert means.tolist() == [1.0, 2.0, 4.0, 6.0]


def test_the_learning_curve_draws_every_step_of_each_run_against_its_tokens(tmp_path: Path) -> None:
    for name, losses in {"one": [8.0, 6.0, 5.0], "other": [7.0, 6.5]}.items():
        (tmp_path / name).mkdir()
        steps = [
            {
                "step": i + 1,
                "tokens": 2e6 * (i + 1),
                "loss": loss,
                "masked_accuracy": 0.1 * i,
                "causal_ratio": max(0, 1 - i),
            }
            for i, loss in enumerate(losses)
        ]
        (tmp_path / name / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    runs = {name: learning_curve.read_metrics(tmp_path / name) for name in ("one", "other")}
    loss, accuracy = learning_curve.draw(runs, window=2).axes
    raw, mean, annealed = loss.lines[:3]
    assert raw.get_xdata().tolist() == [2.0, 4.0, 6.0]
    assert raw.get_ydata().tolist() == [8.0, 6.0, 5.0]
    assert mean.get_ydata().tolist() == [8.0, 7.0, 5.5]
    assert annealed.get_xdata() == [4.0, 4.0]  # bidirectional from the second step on
    assert [text.get_text() for text in accuracy.get_legend().get_texts()] == ["one", "other"]


@pytest.mark.parametrize(
    "command",
    [
        ["learning_curve.py", "no_run", "--plot", "curve.png"],
        ["sampler_table.py", "no_model.gguf", "no_run"],
        ["ablations.py", "a_file/runs", "--only", "base"],
        ["make_large_gguf.py", "no_folder/model.gguf"],
        ["make_english_text.py", "text.txt"],
    ],
)
def test_wrong_input_gets_one_line_and_exit_code_2(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "a_file").touch()
    tool = Path(ablations.__file__).with_name(command[0])
    result = subprocess.run(
        [sys.executable, tool, *command[1:]], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["a_file"]


def test_a_short_run_is_judged_by_its_last_steps_and_by_its_norms_behind_the_warm_up() -> None:
    metrics = [{"loss": 8.0 - 0.2 * step, "grad_norm": 40.0 if step < 3 else 2.0} for step in range(15)]
    metrics[7]["grad_norm"] = 31.0
    found = short_runs.judge(metrics, warmup=3)
    assert found == {"steps": 15, "loss": 6.1, "greatest_norm": 31.0, "at_step": 8, "failed": True}
    better = [{**line, "loss": line["loss"] - 1.0} for line in metrics]
    assert not short_runs.judge(better, warmup=3)["failed"]


def test_a_short_run_is_left_where_it_is_asked_to_be_and_done_once(
    tiny_model: TinyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_model(L=1, C=32, H=2, G=1, F=32)
    monkeypatch.setattr(short_runs, "demo_model", lambda: base)
    (tmp_path / "text.txt").write_text("the cat sat on the mat and the dog ran to the mill of corn. " * 60)
    settings = {
        "training.data": [str(tmp_path / "text.txt")],
        "training.sequence_length": 32,
        "training.held_out_fraction": 0.3,
        "hardware.num_threads": 1,
    }
    for until in (2, 2, 3):
        short_runs.run(tmp_path / "run", 30, until, settings)
        assert len(short_runs.read(tmp_path / "run")) == until


def test_the_norms_of_a_conversions_layers_are_the_bases_before_it_is_trained(
    tiny_model: TinyModel, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = tiny_run(tiny_model, tmp_path)
    monkeypatch.setattr("sys.argv", ["residual_norms.py", str(base), str(tmp_path / "run"), "--layers", "0"])
    residual_norms.main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("base, causal, clean: cross-entropy of the masked tokens ")
    assert lines[1].split(",")[0] == lines[3].split(",")[0]  # the first token's embedding
