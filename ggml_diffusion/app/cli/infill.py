"""`infill`: fill the marked holes of a text."""

import difflib
import json
import os
import stat
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from ggml_diffusion.app.cli.open_model import GpuLayers, Runtime, open_model
from ggml_diffusion.app.cli.options import (
    Adapter,
    AllowOtherBase,
    Base,
    Device,
    Threads,
    field_option,
    from_flags,
)
from ggml_diffusion.durable import replace_file
from ggml_diffusion.errors import UserError
from ggml_diffusion.generation.infill import FilledHole, InfillConfig
from ggml_diffusion.regular_file import open_regular
from ggml_diffusion.text.marked_holes import MARKERS, MarkedHole, fill_in, find_holes, texts_between

if TYPE_CHECKING:
    from ggml_diffusion.generation.diffusion_model import DiffusionModel
    from ggml_diffusion.generation.infill import InfillStep

STANDARD_INPUT = "-"
MAX_BYTES = 64 << 20


def infill(
    base: Base,
    adapter: Adapter,
    file: Annotated[
        str, typer.Argument(help=f"The text, or - for standard input. A hole is {MARKERS}.", metavar="FILE")
    ],
    marker: Annotated[str | None, typer.Option(help="The text that stands for a hole instead.")] = None,
    length: Annotated[int | None, field_option(InfillConfig, "length")] = None,
    at_most: Annotated[int | None, field_option(InfillConfig, "at_most")] = None,
    temperature: Annotated[float | None, field_option(InfillConfig, "temperature")] = None,
    top_k: Annotated[int | None, field_option(InfillConfig, "top_k")] = None,
    top_p: Annotated[float | None, field_option(InfillConfig, "top_p")] = None,
    seed: Annotated[int | None, field_option(InfillConfig, "seed")] = None,
    window: Annotated[int | None, field_option(InfillConfig, "window")] = None,
    approximate_cache: Annotated[bool | None, field_option(InfillConfig, "approximate_cache")] = None,
    output: Annotated[Path | None, typer.Option(help="Write the filled text there.")] = None,
    in_place: Annotated[bool, typer.Option("--in-place", help="Write it into FILE.")] = False,
    diff: Annotated[bool, typer.Option("--diff", help="Print what changes, not the text.")] = False,
    as_json: Annotated[
        bool,
        typer.Option(
            "--json", help="Print each hole with its tokens, their probabilities and the lengths tried."
        ),
    ] = False,
    runtime: Runtime = "engine",
    gpu_layers: GpuLayers = 0,
    device: Device = "cpu",
    threads: Threads = None,
    allow_other_base: AllowOtherBase = False,
) -> None:
    """Fill the marked holes of a text, and leave every other byte as it is.

    Several holes are filled together, the surest token first. A hole whose marker gives no length is filled
    at several lengths, and the one that fits best is taken.
    """
    flags = {
        "length": length,
        "at_most": at_most,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
        "window": window,
        "approximate_cache": approximate_cache,
    }
    config = from_flags(InfillConfig, flags)
    if in_place and file == STANDARD_INPUT:
        raise UserError("--in-place needs a file: standard input has no place")
    if in_place and output is not None:
        raise UserError("give --output or --in-place, not both")
    if diff and as_json:
        raise UserError("give --diff or --json, not both")
    if output is not None and output.exists() and any(output.samefile(one) for one in (base, adapter)):
        raise UserError(f"--output {output}: is the model or the adapter: give the text another name")
    document = _read(file)
    name = "standard input" if file == STANDARD_INPUT else file
    try:
        holes = find_holes(document, marker)
    except UserError as error:
        raise UserError(f"{name}: {error}") from None
    model = open_model(
        base,
        adapter,
        threads,
        runtime=runtime,
        gpu_layers=gpu_layers,
        device=device,
        allow_other_base=allow_other_base,
    )
    filled = _fill(model, document, holes, config)
    result = fill_in(document, holes, [one.text for one in filled])
    target = Path(file) if in_place else output
    if target is not None:
        _write(target, result)
    if as_json:
        print(json.dumps({"holes": describe(holes, filled, model)}, indent=2))
    elif diff:
        _print(_diff(document, result, name))
    elif target is None:
        _print(result)


def describe(
    holes: Sequence[MarkedHole], filled: Sequence[FilledHole], model: "DiffusionModel"
) -> list[dict[str, Any]]:
    """What `--json` prints of each hole."""
    return [
        {
            "line": hole.line,
            "start_byte": hole.start,
            "end_byte": hole.end,
            "text": one.text,
            "tokens": [
                {"id": int(token), "text": model.tokenizer.token_text(int(token)), "probability": float(p)}
                for token, p in zip(one.tokens, one.probabilities, strict=True)
            ],
            "lengths_tried": [{"length": length, "nats": nats} for length, nats in one.tried],
        }
        for hole, one in zip(holes, filled, strict=True)
    ]


def _fill(
    model: "DiffusionModel", document: bytes, holes: list[MarkedHole], config: InfillConfig
) -> list[FilledHole]:
    """Fill the holes with a bar on standard error, where that is a terminal."""
    from ggml_diffusion.generation.infill import infill as fill_holes

    texts, lengths = texts_between(document, holes), [hole.length for hole in holes]
    console = Console(stderr=True)
    columns = (TextColumn("holes filled"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        task = progress.add_task("", total=len(holes))

        def on_step(step: "InfillStep") -> None:
            share = step.denoising.step / (step.denoising.n_steps + 1)
            progress.update(task, completed=step.n_done + share)

        return fill_holes(model, texts, lengths, config, on_step)


def _read(file: str) -> bytes:
    if file == STANDARD_INPUT:
        document = sys.stdin.buffer.read(MAX_BYTES + 1)
    else:
        with open_regular(Path(file)) as source:
            document = source.read(MAX_BYTES + 1)
    if len(document) > MAX_BYTES:
        raise UserError(f"the text is longer than {MAX_BYTES >> 20} MiB: cut it")
    return document


def _write(path: Path, data: bytes) -> None:
    """Write a file, whole or not at all; one that was there keeps its mode, and a link stays one."""
    if path.exists() and not path.is_file():  # a pipe, or a device such as /dev/stdout, is not replaced
        try:
            path.write_bytes(data)
        except OSError as error:
            raise UserError(f"{path}: cannot be written: {error.strerror}") from None
        return
    path = Path(os.path.realpath(path))
    mode = stat.S_IMODE(path.stat().st_mode) if path.is_file() else None

    def write(temporary: Path) -> None:
        temporary.write_bytes(data)

    replace_file(path, write)
    if mode is not None:
        os.chmod(path, mode)


def _diff(before: bytes, after: bytes, name: str) -> bytes:
    """A unified diff; lines keep their ends and their bytes."""
    lines = difflib.diff_bytes(
        difflib.unified_diff,
        before.splitlines(keepends=True),
        after.splitlines(keepends=True),
        name.encode(errors="surrogateescape"),
        name.encode(errors="surrogateescape"),
    )
    return b"".join(
        line if line.endswith((b"\n", b"\r")) else line + b"\n\\ No newline at end of file\n"
        for line in lines
    )


def _print(data: bytes) -> None:
    """Bytes as they are, on standard output."""
    sys.stdout.flush()
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
