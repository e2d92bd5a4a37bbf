"""Which devices this installation of llama-cpp-python has, and the choice of one by the name of its kind.

Deliberately not here: running on one (runtime.py), and whether it computes rightly (training/identity.py).
"""

import importlib.metadata
from dataclasses import dataclass
from typing import Any

from ggml_diffusion.engine.ggml_graph import ggml
from ggml_diffusion.engine.ggml_graph.ggml import ffi, lib
from ggml_diffusion.errors import UserError

# How ggml's registries begin their names -> what a person calls the kind.
KINDS = {"CPU": "cpu", "MTL": "metal", "Metal": "metal", "CUDA": "cuda", "Vulkan": "vulkan"}
ACCELERATORS = ("cuda", "metal", "vulkan")
_OPTIONS = {"metal": "-DGGML_METAL=ON", "cuda": "-DGGML_CUDA=ON", "vulkan": "-DGGML_VULKAN=ON"}
_TYPES = {
    ggml.CPU: "CPU",
    ggml.GPU: "GPU",
    ggml.INTEGRATED_GPU: "integrated GPU",
    ggml.ACCELERATOR: "accelerator",
}


@dataclass(frozen=True, eq=False)
class Device:
    """A device of ggml.

    Attributes:
        kind: "cpu", "metal", "cuda", "vulkan", or ggml's own name of another backend in small letters.
        name: ggml's, e.g. "CUDA0".
        description: the maker's name of it.
        type: "CPU", "GPU", "integrated GPU" or "accelerator".
        memory_free: bytes.
        memory_total: bytes.
        maps_host_memory: whether it can compute with weights in the mapped file.
        handle: ggml's.

    """

    kind: str
    name: str
    description: str
    type: str
    memory_free: int
    memory_total: int
    maps_host_memory: bool
    handle: Any


def list_devices() -> list[Device]:
    """All devices of the installation, GGML's CPU backend among them."""
    devices = []
    for index in range(lib.ggml_backend_dev_count()):
        handle = lib.ggml_backend_dev_get(index)
        properties = ffi.new("dev_props *")
        lib.ggml_backend_dev_get_props(handle, properties)
        registry = ffi.string(lib.ggml_backend_reg_name(lib.ggml_backend_dev_backend_reg(handle))).decode()
        devices.append(
            Device(
                KINDS.get(registry, registry.lower()),
                ffi.string(properties.name).decode(),
                ffi.string(properties.description).decode(errors="replace"),
                _TYPES.get(properties.type, f"type {properties.type}"),
                int(properties.memory_free),
                int(properties.memory_total),
                bool(properties.buffer_from_host_ptr),
                handle,
            )
        )
    return devices


def find_device(kind: str) -> Device:
    """The first device of a kind.

    Raises:
        UserError: the installation has none; the message says how to install one that has.

    """
    for device in list_devices():
        if device.kind == kind and device.type != "accelerator":
            return device
    raise UserError(f"this installation of llama-cpp-python has no {kind} device: {how_to_install(kind)}")


def how_to_install(kind: str) -> str:
    """The command that installs llama-cpp-python with a backend."""
    version = importlib.metadata.version("llama-cpp-python")
    option = _OPTIONS.get(kind, "-DGGML_...=ON")
    return (
        f'CMAKE_ARGS="{option}" pip install --force-reinstall --no-deps --no-cache-dir --no-binary '
        f"llama-cpp-python llama-cpp-python=={version}"
    )
