"""The conversion that `generate`, `infill` and `serve` write with, over the engine or over llama.cpp."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ggml_diffusion.app.cli.options import note_on_stderr
from ggml_diffusion.errors import UserError

if TYPE_CHECKING:
    from ggml_diffusion.generation.diffusion_model import DiffusionModel

Runtime = Annotated[
    Literal["engine", "llama.cpp"],
    typer.Option(
        "--runtime",
        help="engine = this package's own; llama.cpp = llama-cpp-python, for builds of it with Metal, "
        "CUDA or Vulkan.",
    ),
]
GpuLayers = Annotated[
    int,
    typer.Option("--gpu-layers", min=-1, help="With --runtime llama.cpp: layers on its device, -1 = all."),
]


def open_model(
    base: Path,
    adapter: Path,
    threads: int | None,
    *,
    runtime: str,
    gpu_layers: int,
    device: str,
    allow_other_base: bool,
) -> "DiffusionModel":
    """Open a conversion.

    Args:
        base: the GGUF that was converted.
        adapter: a run's folder, or one of its exports.
        threads: None = as many as there are cores.
        runtime: engine or llama.cpp.
        gpu_layers: with llama.cpp, on its device; -1 = all.
        device: with the engine, what computes.
        allow_other_base: use the conversion although it was trained on another file.

    Raises:
        UserError: flags of one runtime with the other, or what loading says.

    """
    from ggml_diffusion.training.run import exported_weights

    if runtime == "llama.cpp" and device != "cpu":
        raise UserError("--device is the engine's: with --runtime llama.cpp give --gpu-layers")
    if runtime == "engine" and gpu_layers != 0:
        raise UserError("--gpu-layers is for --runtime llama.cpp")
    weights = exported_weights(adapter, note_on_stderr)
    if runtime == "llama.cpp":
        from ggml_diffusion.generation.llama_model import load_in_llama_cpp

        return load_in_llama_cpp(
            base, weights, threads, n_gpu_layers=gpu_layers, allow_other_base=allow_other_base
        )
    from ggml_diffusion.generation.diffusion_model import DiffusionModel

    return DiffusionModel.load(base, weights, threads, device=device, allow_other_base=allow_other_base)
