"""`convert`: train an adapter on text and export it."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from ggml_diffusion.app.cli.options import Threads, setting
from ggml_diffusion.config.presets import PRESETS
from ggml_diffusion.config.settings import SETTINGS, ConversionTrainingConfig
from ggml_diffusion.config.toml import load_config


def convert(
    model: Annotated[
        Path | None, typer.Argument(help=SETTINGS["model.base_model"].description, metavar="MODEL.gguf")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="A conversion_config.toml; flags count more, and a preset less, than the file."),
    ] = None,
    data: Annotated[list[str] | None, setting("training.data", "--data")] = None,
    include: Annotated[list[str] | None, setting("training.include", "--include")] = None,
    strict: Annotated[bool | None, setting("training.strict", "--strict")] = None,
    output: Annotated[str | None, setting("training.output", "--output")] = None,
    preset: Annotated[str | None, typer.Option(help=f"A recipe to start from: {', '.join(PRESETS)}.")] = None,
    steps: Annotated[int | None, setting("training.total_steps", "--steps")] = None,
    batch_size: Annotated[int | None, setting("training.batch_size", "--batch-size")] = None,
    gradient_accumulation: Annotated[
        int | None, setting("training.gradient_accumulation", "--gradient-accumulation")
    ] = None,
    sequence_length: Annotated[int | None, setting("training.sequence_length", "--sequence-length")] = None,
    learning_rate: Annotated[float | None, setting("training.learning_rate", "--learning-rate")] = None,
    rank: Annotated[int | None, setting("model.qlora_rank", "--rank")] = None,
    target_modules: Annotated[str | None, setting("model.target_modules", "--target-modules")] = None,
    prediction: Annotated[str | None, setting("model.prediction", "--prediction")] = None,
    mask_token_id: Annotated[int | None, setting("model.mask_token_id", "--mask-token-id")] = None,
    seed: Annotated[int | None, setting("training.seed", "--seed")] = None,
    checkpoint_every: Annotated[
        int | None, setting("training.checkpoint_every", "--checkpoint-every")
    ] = None,
    device: Annotated[str | None, setting("hardware.device", "--device")] = None,
    threads: Threads = None,
    evaluate: Annotated[
        int,
        typer.Option(min=0, help="Held-out sequences to measure before and after; 0 = measure nothing."),
    ] = 0,
    fresh: Annotated[
        bool,
        typer.Option("--fresh", help="Delete the run that the output folder holds, instead of resuming it."),
    ] = False,
) -> None:
    """Convert a GGUF model: train its adapter on text and export it.

    The same command again resumes a run that was interrupted.
    """
    overrides: dict[str, Any] = {
        "model.base_model": None if model is None else str(model),
        "training.data": data or None,
        "training.include": include or None,
        "training.strict": strict,
        "training.output": output,
        "training.total_steps": steps,
        "training.batch_size": batch_size,
        "training.gradient_accumulation": gradient_accumulation,
        "training.sequence_length": sequence_length,
        "training.learning_rate": learning_rate,
        "model.qlora_rank": rank,
        "model.target_modules": None if target_modules is None else target_modules.split(","),
        "model.prediction": prediction,
        "model.mask_token_id": mask_token_id,
        "training.seed": seed,
        "training.checkpoint_every": checkpoint_every,
        "hardware.device": device,
        "hardware.num_threads": threads,
    }
    run_and_show(load_config(config, overrides, preset), fresh=fresh, evaluate_on=evaluate)


def run_and_show(config: ConversionTrainingConfig, *, fresh: bool, evaluate_on: int) -> Path:
    """Run a conversion and show its end; returns the safetensors file, or exits if it was interrupted."""
    from ggml_diffusion.app.display import TrainingDisplay, show_evidence
    from ggml_diffusion.training.run import run_conversion

    console = Console()
    with TrainingDisplay(console) as display:
        conversion = run_conversion(config, display, fresh=fresh, evaluate_on=evaluate_on)
    if conversion.interrupted_by is not None or conversion.safetensors is None:
        console.print(
            Text(
                f"stopped and saved after step {conversion.step} of {conversion.total_steps}; "
                f"the same command resumes it"
            ),
            soft_wrap=True,
        )
        raise typer.Exit(128 + (conversion.interrupted_by or 0))
    if conversion.evidence is not None:
        show_evidence(console, conversion.evidence)
    for path in (conversion.safetensors, conversion.gguf):
        console.print(Text(f"written: {path}"), soft_wrap=True)
    return conversion.safetensors
