"""`verify`: compare what a run exported with the engine, in the programs that will load it."""

from contextlib import closing
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ggml_diffusion.app.cli.options import Base, Threads, note_on_stderr
from ggml_diffusion.errors import UserError

_STYLES = {"ok": "green", "failed": "bold red", "skipped": "yellow"}


def verify(
    base: Base,
    run: Annotated[Path, typer.Argument(help="The output folder, with its exports.", metavar="RUN")],
    diffusion_cli: Annotated[
        Path | None,
        typer.Option(help="The program llama-diffusion-cli. Default: the one on the path, if there is one."),
    ] = None,
    peft_python: Annotated[
        Path | None,
        typer.Option(help="A Python with torch, transformers and peft. Default: this one, if it has them."),
    ] = None,
    threads: Threads = None,
) -> None:
    """Compare what a run exported with the engine, in the programs that will load it.

    Every adapter.gguf, standalone GGUF and PEFT folder in the run's folder is loaded by llama-cpp-python,
    llama-diffusion-cli, or transformers and peft, and predicts the same built-in text. Exits with 1 if one is
    beyond its limit; what is not installed is skipped.
    """
    from ggml_diffusion.engine.open import open_engine
    from ggml_diffusion.export.verify import Runtimes, verify_run
    from ggml_diffusion.formats.adapter_file import DiffusionCheckpoint
    from ggml_diffusion.formats.model_check import read_model
    from ggml_diffusion.training.run import exported_weights

    if not run.is_dir():
        raise UserError(f"{run}: is no folder")
    checkpoint = DiffusionCheckpoint.load(exported_weights(run, note_on_stderr))
    table = Table("export", "runtime", "", "beside the engine", "limit")
    failed = False
    with closing(open_engine(read_model(base), threads, compute="f32")) as engine:
        checkpoint.check_base(engine.sha256)
        for check in verify_run(run, engine, checkpoint, Runtimes(diffusion_cli, peft_python)):
            failed |= check.status == "failed"
            status = Text(check.status, style=_STYLES[check.status])
            table.add_row(Text(check.export), check.runtime, status, Text(check.found), check.limit)
    Console().print(table)
    if failed:
        raise typer.Exit(1)
