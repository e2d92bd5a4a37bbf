"""What is said about devices: the command, its report for an issue, and a model on a device."""

import io
from dataclasses import replace

import pytest
from conftest import TinyModel
from rich.console import Console

from ggml_diffusion.app import devices as page
from ggml_diffusion.app.devices import describe_devices, device_report
from ggml_diffusion.app.inspect import describe_file
from ggml_diffusion.engine.ggml_graph import devices
from ggml_diffusion.errors import UserError


def shown(thing: object) -> str:
    console = Console(width=200, file=io.StringIO())
    console.print(thing, soft_wrap=True)
    text = console.file.getvalue()  # type: ignore[attr-defined]
    return str(text)


@pytest.fixture
def with_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation whose GGML has a device that calls itself CUDA."""
    cpu = devices.find_device("cpu")
    cuda = replace(cpu, kind="cuda", name="CUDA0", description="Some GPU", type="GPU")
    for module in (devices, page):
        monkeypatch.setattr(module, "list_devices", lambda: [cuda, cpu])


@pytest.mark.usefixtures("with_cuda")
def test_the_devices_are_shown_and_how_to_install_those_that_are_missing() -> None:
    text = shown(describe_devices())
    assert "CUDA0" in text and "Some GPU" in text
    assert 'CMAKE_ARGS="-DGGML_VULKAN=ON" pip install' in text
    assert 'CMAKE_ARGS="-DGGML_METAL=ON" pip install' in text
    assert "GGML_CUDA" not in text


@pytest.mark.usefixtures("with_cuda")
def test_a_report_has_versions_operations_and_types_of_each_device() -> None:
    report = device_report()
    for part in ("llama-cpp-python 0.", "CUDA0 (cuda, GPU): Some GPU", "operations: 21 of 21", "Q4_K"):
        assert part in report


@pytest.mark.usefixtures("with_cuda")
def test_a_model_on_a_device_says_what_the_device_leaves_to_the_cpu(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tiny_model(type="Q4_0")
    assert "on the device" in shown(describe_file(path, "cuda"))
    monkeypatch.setattr(page, "device_takes", lambda device, kind, n_cols: False)
    assert "left to the CPU" in shown(describe_file(path, "cuda"))
    assert "On the device" not in shown(describe_file(path))
    assert "everything" in shown(describe_file(path, "cpu"))


def test_a_model_on_a_device_that_is_missing_is_an_error(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = devices.find_device("cpu")
    monkeypatch.setattr(devices, "list_devices", lambda: [cpu])
    with pytest.raises(UserError, match="no metal device"):
        describe_file(tiny_model(), "metal")
