"""`demo`: convert a small model on a text that is always there."""

import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from ggml_diffusion.app import demo as demo_parts
from ggml_diffusion.app.cli.convert import run_and_show
from ggml_diffusion.app.cli.generate import show_generation
from ggml_diffusion.app.cli.options import Threads
from ggml_diffusion.config.toml import load_config

if TYPE_CHECKING:
    from ggml_diffusion.generation.diffusion_model import DiffusionModel


def demo(
    output: Annotated[
        Path, typer.Option(help="Folder for the run; an earlier demo in it is deleted.")
    ] = Path("demo-run"),
    threads: Threads = None,
) -> None:
    """Convert SmolLM2-135M on Python's own help texts, show figures before and after, and write a sample."""
    from ggml_diffusion.generation.diffusion_model import DiffusionModel

    base = demo_parts.demo_model()
    overrides = {
        "model.base_model": str(base),
        "training.data": [str(demo_parts.write_demo_text(output))],
        "training.output": str(output),
        "hardware.num_threads": threads,
    }
    weights = run_and_show(
        load_config(overrides=overrides, preset="demo"), fresh=True, evaluate_on=demo_parts.EVALUATE_ON
    )
    model = DiffusionModel.load(base, weights, threads)
    show_generation(Console(), model, demo_parts.PROMPT, "", demo_parts.GENERATION)
    show_hole(Console(), model)


def show_hole(console: Console, model: "DiffusionModel") -> None:
    """Fill a hole in a page that the conversion has not seen, and show the lines around it."""
    from ggml_diffusion.app.display import printable
    from ggml_diffusion.generation.infill import infill

    before, behind = demo_parts.page_around_the_hole()
    started_s = time.perf_counter()
    (hole,) = infill(model, [before, behind], [None])
    time_s = time.perf_counter() - started_s
    lines = "\n".join(before.splitlines()[-2:]), "\n".join(behind.splitlines()[:2])
    console.print(Text("\nA hole in a page that it has not seen, its length found:\n", style="dim"))
    console.print(Text.assemble(lines[0], (printable(hole.text), "bold underline"), lines[1]), soft_wrap=True)
    console.print(
        Text(f"\nwritten: {hole.text!r}; the page has {demo_parts.WORD!r}; {time_s:.1f} s", style="dim"),
        soft_wrap=True,
    )
