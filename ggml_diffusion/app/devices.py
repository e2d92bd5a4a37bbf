"""What this installation computes on, for people: a table, a report for an issue, and a model on a device.

Deliberately not here: the choice of a device (engine/open.py), and what one does with a model (inspect.py).
"""

import platform
from collections.abc import Iterator
from importlib import metadata

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from ggml_diffusion.engine.ggml_graph.devices import (
    ACCELERATORS,
    Device,
    find_device,
    how_to_install,
    list_devices,
)
from ggml_diffusion.engine.ggml_graph.probe import OPERATIONS, missing_operations, types_taken
from ggml_diffusion.engine.ggml_graph.weights import device_takes
from ggml_diffusion.formats.model_file import ModelFile
from ggml_diffusion.formats.tensor_types import TENSOR_TYPES

_OWN = "cpu is this program's own core; the others are computed by ggml inside llama-cpp-python"


def describe_devices() -> RenderableType:
    """The devices of this installation, and how to install the kinds that it lacks."""
    found = [device for device in list_devices() if device.kind != "cpu"]
    table = Table(box=None, padding=(0, 2, 0, 0))
    for title in ("--device", "device", "what it is", "memory"):
        table.add_column(title)
    table.add_row("cpu", "CPU", platform.processor() or platform.machine(), "")
    for device in found:
        memory = f"{device.memory_free >> 20} of {device.memory_total >> 20} MiB free"
        table.add_row(device.kind, device.name, Text(device.description), memory)
    parts: list[RenderableType] = [table, Text(""), Text(_OWN)]
    missing = [kind for kind in ACCELERATORS if kind not in {device.kind for device in found}]
    if missing:
        parts += [Text(""), Text("To install one that is missing, with its SDK at hand:")]
        parts += [Text(f"  {kind:7} {how_to_install(kind)}") for kind in missing]
    return Group(*parts)


def model_on_device(file: ModelFile, kind: str) -> Iterator[tuple[str, str]]:
    """Which of a model's matrices a device computes with, by type, and which it leaves to the CPU.

    Raises:
        UserError: there is no such device.

    """
    if kind == "cpu":
        yield "cpu", "everything that can be converted"
        return
    device = find_device(kind)
    yield "device", f"{device.name}: {device.description}"
    counts: dict[tuple[str, bool], int] = {}
    for info in file.tensors.values():
        if len(info.shape) == 2 and info.type_name in TENSOR_TYPES:
            takes = device_takes(device.handle, TENSOR_TYPES[info.type_name].id, info.shape[1])
            counts[info.type_name, takes] = counts.get((info.type_name, takes), 0) + 1
    for (name, takes), count in counts.items():
        yield name, f"{count:,} matrices, " + ("on the device" if takes else "left to the CPU, which is slow")


def device_report() -> str:
    """Versions, devices, and what each device cannot compute, as plain text."""
    return "\n".join(_report_lines()) + "\n"


def _report_lines() -> Iterator[str]:
    for name in ("ggml-diffusion", "llama-cpp-python", "numpy"):
        yield f"{name} {metadata.version(name)}"
    yield f"Python {platform.python_version()} on {platform.platform()}"
    for device in list_devices():
        yield ""
        yield from _device_lines(device)


def _device_lines(device: Device) -> Iterator[str]:
    yield f"{device.name} ({device.kind}, {device.type}): {device.description}"
    yield f"  memory: {device.memory_free >> 20} of {device.memory_total >> 20} MiB free"
    yield f"  computes in the mapped file: {'yes' if device.maps_host_memory else 'no'}"
    missing = missing_operations(device)
    yield f"  operations: {len(OPERATIONS) - len(missing)} of {len(OPERATIONS)}" + (
        f"; left to the CPU: {', '.join(missing)}" if missing else ""
    )
    taken, left = types_taken(device)
    yield f"  types: {', '.join(taken)}"
    if left:
        yield f"  types left to the CPU: {', '.join(left)}"
