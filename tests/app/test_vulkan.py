"""The engine of ggml graphs on Vulkan, from file to adapter, in the environment that `make vulkan` makes.

Mesa's lavapipe will do as driver, which computes on the processor: slow, and float32 throughout. Where
there is no such environment, or no driver, the tests are skipped and say so.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest
from conftest import TinyModel

ROOT = Path(__file__).resolve().parents[2]
PYTHON = ROOT / ".venv-vulkan" / "bin" / "python"
PROGRAM = PYTHON.with_name("ggml-diffusion")
TEXT = "the old mill ground corn for the whole village and the miller told his children of it. " * 60

pytestmark = pytest.mark.slow


def run(*command: object, timeout_s: float) -> str:
    # ggml leaves out drivers that compute on the processor unless a device is named
    environment = {**os.environ, "OMP_WAIT_POLICY": "passive", "GGML_VK_VISIBLE_DEVICES": "0"}
    done = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=timeout_s,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def vulkan() -> None:
    """Skip where nothing computes on Vulkan."""
    if not PROGRAM.exists():
        pytest.skip("no environment with ggml's Vulkan backend (make vulkan)")
    if "vulkan" not in run(PROGRAM, "devices", "--report", timeout_s=120):
        pytest.skip("ggml's Vulkan backend finds no driver (Debian: mesa-vulkan-drivers)")


@pytest.mark.usefixtures("vulkan")
def test_the_engines_tests_pass_on_vulkan() -> None:
    tests = ROOT / "tests" / "engine" / "test_graph_engine.py"
    # lavapipe compiles shaders for seconds a test: those that are about types, architectures and what is kept
    some = "vulkan and (0.7 or type or teacher or same_call or in_parts or ten_adamw)"
    out = run(PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", tests, "-k", some, timeout_s=3000)
    assert " passed" in out


@pytest.mark.usefixtures("vulkan")
def test_gradients_of_smollm2_are_the_cores(smollm2_path: Path) -> None:
    tool = ROOT / "tools" / "gradient_cosine.py"
    shape = ("--sequences", 1, "--tokens", 64, "--repeats", 0)
    found = json.loads(run(PYTHON, tool, smollm2_path, "--device", "vulkan", *shape, timeout_s=1200))
    print(found)
    assert found["cosine"] >= 0.999


@pytest.mark.usefixtures("vulkan")
def test_a_conversion_goes_from_a_file_to_an_adapter(tiny_model: TinyModel, tmp_path: Path) -> None:
    # a tiny model: a step of SmolLM2 takes the better part of a minute on lavapipe
    model = tiny_model(type="Q4_1")
    (tmp_path / "text.txt").write_text(TEXT, encoding="utf-8")
    # float32 on the processor, so that the differences are Vulkan's alone
    (tmp_path / "f32.toml").write_text('[hardware]\ncompute = "f32"\n', encoding="utf-8")
    losses = {}
    for device in ("vulkan", "cpu"):
        output = tmp_path / device
        flags = ["--batch-size", 2, "--gradient-accumulation", 1, "--sequence-length", 32, "--rank", 4]
        flags += ["--data", tmp_path / "text.txt", "--output", output, "--steps", 20, "--device", device]
        flags += ["--config", tmp_path / "f32.toml"]
        said = run(PROGRAM, "convert", model, *flags, timeout_s=1200)
        assert "identity gate passed" in said and "adapter.gguf" in said
        lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses[device] = [json.loads(line)["loss"] for line in lines]
    differences = [abs(a - b) for a, b in zip(losses["vulkan"], losses["cpu"], strict=True)]
    print(f"largest difference of a step's loss {max(differences):.4f} nats")
    assert len(differences) == 20 and max(differences) < 0.02
    flags = ["--prompt", "the", "--length", 4, "--device", "vulkan"]
    assert run(PROGRAM, "generate", model, tmp_path / "vulkan", *flags, timeout_s=600).strip()
