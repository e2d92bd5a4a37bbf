"""The one place that chooses an engine for a model file.

Deliberately not here: what an engine computes (interface.py), and how (cpu/, ggml_graph/).
"""

from ggml_diffusion.engine.cpu.q4_model import Q4Model
from ggml_diffusion.engine.interface import Compute, Engine
from ggml_diffusion.errors import UserError
from ggml_diffusion.formats.model_file import ModelFile


def open_engine(
    file: ModelFile,
    n_threads: int | None = None,
    *,
    device: str = "cpu",
    compute: Compute = "fast",
    use_simd: bool = True,
    memory_budget: int | None = None,
    sound_sha256: str | None = None,
) -> Engine:
    """Open the engine of a model; the caller closes it.

    Args:
        file: from `read_model`.
        n_threads: None = the processors that this process may use.
        device: "cpu" is the core of this package; "metal", "cuda" and "vulkan" are GGML's.
        compute: see `Engine.compute`.
        use_simd: False selects the core's naive reference kernels.
        memory_budget: bytes that a training step should take beside the mapped file; None = no limit, or what
            the device has free.
        sound_sha256: of a file whose numbers were found to be finite before; None = none was.

    Raises:
        UserError: the file is damaged, an option is out of its limits, or there is no such device.

    """
    if device == "cpu":
        return Q4Model(
            file,
            n_threads,
            compute=compute,
            use_simd=use_simd,
            memory_budget=memory_budget,
            sound_sha256=sound_sha256,
        )
    if not use_simd:
        raise UserError(f"use_simd = false is for the device cpu, not {device}")
    # Loading GGML's backends starts their drivers, so that only those do who ask for one.
    from ggml_diffusion.engine.ggml_graph import devices
    from ggml_diffusion.engine.ggml_graph.graph_model import GraphModel

    return GraphModel(
        file,
        devices.find_device(device),
        n_threads,
        compute=compute,
        memory_budget=memory_budget,
        sound_sha256=sound_sha256,
    )


def accelerators() -> list[str]:
    """The kinds of devices beside the processor that this installation has, the first one first."""
    from ggml_diffusion.engine.ggml_graph.devices import ACCELERATORS, list_devices

    present = {device.kind for device in list_devices() if device.type != "accelerator"}
    return [kind for kind in ACCELERATORS if kind in present]
