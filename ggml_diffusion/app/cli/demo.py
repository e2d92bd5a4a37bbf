"""`demo`: convert a small model on a text that is always there."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ggml_diffusion.app import demo as demo_parts
from ggml_diffusion.app.cli.convert import run_and_show
from ggml_diffusion.app.cli.generate import show_generation
from ggml_diffusion.app.cli.options import Threads
from ggml_diffusion.config.toml import load_config


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
