"""`inspect`: show what a file holds."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console


def inspect(
    file: Annotated[
        Path,
        typer.Argument(
            help="A GGUF model, a GGUF adapter, adapter.safetensors or the folder of a run.", metavar="FILE"
        ),
    ],
    device: Annotated[
        Literal["cpu", "metal", "cuda", "vulkan"] | None,
        typer.Option(help="Also show which of a model's matrices that kind of device computes with."),
    ] = None,
) -> None:
    """Show what a file holds: sizes, types, settings, and whether it can be converted."""
    from ggml_diffusion.app.inspect import describe_file

    Console().print(describe_file(file, device))
