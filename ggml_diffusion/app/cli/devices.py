"""`devices`: show what this installation can compute on."""

from typing import Annotated

import typer
from rich.console import Console


def devices(
    report: Annotated[
        bool, typer.Option("--report", help="Everything that an issue about a device should say.")
    ] = False,
) -> None:
    """Show what this installation can compute on, and how to install more.

    `convert`, `generate` and `evaluate` take the name of a kind with --device.
    """
    from ggml_diffusion.app.devices import describe_devices, device_report

    if report:
        print(device_report(), end="")
    else:
        Console().print(describe_devices(), soft_wrap=True)
