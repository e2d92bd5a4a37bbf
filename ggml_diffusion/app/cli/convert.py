"""`convert`: train an adapter on text and export it."""

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.text import Text

from ggml_diffusion.app.cli import options
from ggml_diffusion.app.lasting_output import lasting
from ggml_diffusion.config.settings import ConversionTrainingConfig
from ggml_diffusion.errors import escaped


def convert(
    model: options.Model = None,
    config: options.ConfigFile = None,
    data: options.Data = None,
    include: options.Include = None,
    strict: options.Strict = None,
    output: options.Output = None,
    preset: options.Preset = None,
    steps: options.Steps = None,
    batch_size: options.BatchSize = None,
    gradient_accumulation: options.Accumulation = None,
    sequence_length: options.SequenceLength = None,
    learning_rate: options.LearningRate = None,
    rank: options.Rank = None,
    alpha: options.Alpha = None,
    target_modules: options.TargetModules = None,
    start_from: options.StartFrom = None,
    prediction: options.Prediction = None,
    context: options.ContextKind = None,
    attention_sink: options.AttentionSink = None,
    holes: options.Holes = None,
    mask_token_id: options.MaskTokenId = None,
    seed: options.Seed = None,
    checkpoint_every: options.CheckpointEvery = None,
    device: options.RunDevice = None,
    threads: options.Threads = None,
    memory_mib: options.MemoryMib = None,
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
    run_and_show(options.config_from(locals()), fresh=fresh, evaluate_on=evaluate)


def run_and_show(config: ConversionTrainingConfig, *, fresh: bool, evaluate_on: int) -> Path:
    """Run a conversion and show its end; returns the safetensors file, or exits if it was interrupted."""
    from ggml_diffusion.app.display import TrainingDisplay, show_evidence
    from ggml_diffusion.training.run import run_conversion

    console = Console(file=lasting(sys.stdout))
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
        console.print(Text(escaped(f"written: {path}")), soft_wrap=True)
    return conversion.safetensors
