"""`evaluate`: measure a conversion on held-out text."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from ggml_diffusion.app.cli.options import (
    Adapter,
    AllowOtherBase,
    Base,
    Device,
    Threads,
    field_option,
    from_flags,
    note_on_stderr,
)
from ggml_diffusion.evaluation.settings import EvaluationSettings


def evaluate(
    base: Base,
    adapter: Adapter,
    data: Annotated[
        list[str] | None,
        typer.Option(help="The text of the training, whose held-out part is measured on. Default: the same."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option(help="Folder for evaluation.json and the page of plots, evaluation.png.")
    ] = None,
    control: Annotated[
        Path | None,
        typer.Option(help="A conversion trained at causal ratio 1, for form (c) of the future-context gain."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the figures as JSON, not as tables.")] = False,
    sequences: Annotated[int | None, field_option(EvaluationSettings, "sequences")] = None,
    seeds: Annotated[int | None, field_option(EvaluationSettings, "seeds")] = None,
    one_by_one: Annotated[int | None, field_option(EvaluationSettings, "one_by_one")] = None,
    spans: Annotated[int | None, field_option(EvaluationSettings, "spans")] = None,
    candidates: Annotated[int | None, field_option(EvaluationSettings, "candidates")] = None,
    samples: Annotated[int | None, field_option(EvaluationSettings, "samples")] = None,
    length: Annotated[int | None, field_option(EvaluationSettings, "length")] = None,
    prompt_length: Annotated[int | None, field_option(EvaluationSettings, "prompt_length")] = None,
    order: Annotated[str | None, field_option(EvaluationSettings, "order")] = None,
    temperature: Annotated[float | None, field_option(EvaluationSettings, "temperature")] = None,
    top_p: Annotated[float | None, field_option(EvaluationSettings, "top_p")] = None,
    threshold: Annotated[float | None, field_option(EvaluationSettings, "threshold")] = None,
    block_length: Annotated[int | None, field_option(EvaluationSettings, "block_length")] = None,
    remasking: Annotated[float | None, field_option(EvaluationSettings, "remasking")] = None,
    seed: Annotated[int | None, field_option(EvaluationSettings, "seed")] = None,
    batch_size: Annotated[int | None, field_option(EvaluationSettings, "batch_size")] = None,
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens a sequence. Default: as in the training.")
    ] = None,
    held_out_fraction: Annotated[
        float | None, typer.Option(help="Share of the text that is held out. Default: as in the training.")
    ] = None,
    device: Device = "cpu",
    threads: Threads = None,
    allow_other_base: AllowOtherBase = False,
) -> None:
    """Measure a conversion on held-out text, beside the base and the base before the first step.

    Likelihood bound, masked tokens, future-context gain, infilling, written text, and that the base is
    unchanged. What it costs is said before it begins; --spans 0, --samples 0 and --one-by-one 0 leave parts
    out.
    """
    flags = {name: value for name, value in locals().items() if name in EvaluationSettings.model_fields}
    settings = from_flags(EvaluationSettings, flags)
    from ggml_diffusion.evaluation.plots import save_evaluation
    from ggml_diffusion.evaluation.suite import EvaluationInputs, run_evaluation
    from ggml_diffusion.evaluation.tables import EvaluationProgress, evaluation_tables
    from ggml_diffusion.training.run import exported_weights

    inputs = EvaluationInputs(
        base,
        exported_weights(adapter, note_on_stderr),
        control=None if control is None else exported_weights(control, note_on_stderr),
        data=tuple(data or ()),
        sequence_length=sequence_length,
        held_out_fraction=held_out_fraction,
        n_threads=threads,
        device=device,
        allow_other_base=allow_other_base,
    )
    with EvaluationProgress(Console(stderr=json)) as progress:
        evaluation = run_evaluation(inputs, settings, progress)
    if json:
        print(evaluation.as_json(), end="")
    else:
        Console().print(evaluation_tables(evaluation))
    if output is not None:
        for path in save_evaluation(evaluation, output, progress.note):
            progress.note(f"written: {path}")
