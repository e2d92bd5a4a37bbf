"""`export`: write a conversion as another file."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from ggml_diffusion.errors import UserError
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
        base_path = Path(checkpoint.config.get("base_model") or "") if base is None else base
        if not base_path.is_file():
            raise UserError(f"where is the base model {checkpoint.metadata.base_model}? give it by --base")
        checkpoint.check_base(file_sha256(base_path))
        checkpoint.save_gguf(target, read_model(base_path))
    Console().print(Text(f"written: {target}"), soft_wrap=True)


def _conversion_in(source: Path) -> DiffusionCheckpoint:
    from ggml_diffusion.run_folder import CHECKPOINTS, EXPORTS
    from ggml_diffusion.training.checkpoint import load_latest
    from ggml_diffusion.training.run import exported_weights

    if not source.is_dir() or (source / EXPORTS[0]).exists():
        return DiffusionCheckpoint.load(exported_weights(source))
    loaded = load_latest(source / CHECKPOINTS)
    if loaded is None:
        raise UserError(f"{source}: holds neither {EXPORTS[0]} nor a checkpoint")
    return loaded.checkpoint
