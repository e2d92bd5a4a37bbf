"""Runs on other engines: what `auto` chooses, what is refused, and that they train as the core does.

GGML's CPU backend stands in for an accelerator: the run sees an engine, and not what it computes with.
"""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import runs
from runs import Recorder

from ggml_diffusion.config.toml import load_config
from ggml_diffusion.engine.ggml_graph import devices
from ggml_diffusion.errors import UserError
from ggml_diffusion.training import run as convert
from ggml_diffusion.training.run import run_conversion

run_base, settings, quick_gate = runs.run_base, runs.settings, runs.quick_gate  # fixtures
pytestmark = pytest.mark.usefixtures("quick_gate")


@pytest.fixture
def with_vulkan(monkeypatch):
    """An installation whose GGML has a device that calls itself Vulkan."""
    cpu = devices.find_device("cpu")
    monkeypatch.setattr(devices, "list_devices", lambda: [replace(cpu, kind="vulkan", name="Vulkan0"), cpu])


def run(settings, device, **changes):
    listener = Recorder()
    output = Path(f"{settings['training.output']}-{device}")
    changes = {**settings, "hardware.device": device, "training.output": str(output), **changes}
    run_conversion(load_config(None, changes), listener)
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return listener, [json.loads(line)["loss"] for line in lines]


def test_a_run_on_a_device_lowers_the_loss_as_the_core_does(with_vulkan, settings):
    # in float32: at this rate the core's own fast products move a tiny model's losses by 0.05
    changes = {"training.total_steps": 20, "mask_annealing.total_steps": 10, "hardware.compute": "f32"}
    listener, losses = run(settings, "vulkan", **changes)
    _, expected = run(settings, "cpu", **changes)
    assert any("ggml graphs on Vulkan0" in note for note in listener.notes)
    assert losses[-1] < losses[0] and len(losses) == 20
    assert max(abs(a - b) for a, b in zip(losses, expected, strict=True)) < 2e-3


def test_auto_takes_an_accelerator_that_computes_the_base_rightly(with_vulkan, settings):
    listener, _ = run(settings, "auto")
    assert "device: vulkan" in listener.notes
    assert any("ggml graphs" in note for note in listener.notes)


def test_auto_leaves_out_a_device_that_fails_the_check(with_vulkan, settings, monkeypatch):
    def check(model, tokenizer):
        if "ggml graphs" in model.description:
            raise UserError("computes differently")
        return "gate"

    monkeypatch.setattr(convert, "check_identity", check)
    listener, _ = run(settings, "auto")
    assert "device vulkan is left out: computes differently" in listener.warnings
    assert "device: cpu" in listener.notes


def test_auto_is_the_processor_where_there_is_nothing_else(settings, monkeypatch):
    cpu = devices.find_device("cpu")
    monkeypatch.setattr(devices, "list_devices", lambda: [cpu])
    listener, _ = run(settings, "auto")
    assert "device: cpu" in listener.notes


def test_a_run_goes_on_only_on_the_kind_of_device_that_it_began_on(with_vulkan, settings):
    run(settings, "cpu")
    with pytest.raises(UserError, match=r"hardware\.device \(cpu there, vulkan here\)"):
        run(settings, "vulkan", **{"training.output": f"{settings['training.output']}-cpu"})


def test_a_device_that_is_missing_is_named_before_anything_is_written(settings, monkeypatch, tmp_path):
    cpu = devices.find_device("cpu")
    monkeypatch.setattr(devices, "list_devices", lambda: [cpu])
    with pytest.raises(UserError, match=r"no metal device: CMAKE_ARGS="):
        run(settings, "metal")


def test_the_naive_kernels_are_for_the_processor(with_vulkan, settings):
    with pytest.raises(UserError, match="use_simd = false is for the device cpu, not vulkan"):
        run(settings, "vulkan", **{"hardware.use_simd": False})
