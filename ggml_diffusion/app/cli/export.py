"""`export`: write a conversion as another file."""

import os
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from ggml_diffusion.app.cli.options import note_on_stderr
from ggml_diffusion.errors import UserError, quoted
from ggml_diffusion.formats.adapter_file import DiffusionCheckpoint
from ggml_diffusion.formats.model_check import read_model
from ggml_diffusion.formats.model_file import file_sha256


def export(
    source: Annotated[
        Path, typer.Argument(help="An output folder, adapter.safetensors or adapter.gguf.", metavar="SOURCE")
    ],
    target: Annotated[
        Path, typer.Argument(help="File to write; .safetensors or .gguf says which it is.", metavar="TARGET")
    ],
    base: Annotated[
        Path | None,
        typer.Option(help="The base GGUF, for a .gguf target; left out, where it was for the conversion."),
    ] = None,
) -> None:
    """Write a conversion as another file. An output folder of an unfinished run gives its last checkpoint."""
    if target.suffix not in (".safetensors", ".gguf"):
        raise UserError(f"{target}: the name must end in .safetensors or .gguf")
    checkpoint = _conversion_in(source)
    if target.suffix == ".safetensors":
        checkpoint.save(target)
    else:
        base_path = Path(checkpoint.settings.base_model or "") if base is None else base
        if base is None and not os.path.isfile(base_path):
            name = quoted(checkpoint.metadata.base_model)
            raise UserError(f"where is the base model {name}? give it by --base")
        checkpoint.check_base(file_sha256(base_path))
        checkpoint.save_gguf(target, read_model(base_path))
    Console().print(Text(f"written: {target}"), soft_wrap=True)


def _conversion_in(source: Path) -> DiffusionCheckpoint:
    from ggml_diffusion.training.run import exported_weights

    return DiffusionCheckpoint.load(exported_weights(source, note_on_stderr))
