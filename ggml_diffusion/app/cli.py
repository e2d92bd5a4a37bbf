"""The command line. Thin: it turns flags into settings, calls the library, shows what comes back.

Exit codes: 0 done; 2 something the user can mend, in one line on stderr; 130 or 143 stopped by SIGINT or
SIGTERM with everything saved. The help of a flag that is a setting comes from the setting. Deliberately not
here: any work.
"""

import contextlib
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import typer
from pydantic import BaseModel, ValidationError
from rich.console import Console
from rich.text import Text

from ggml_diffusion.app import demo as demo_parts
from ggml_diffusion.app.display import DenoisingDisplay, TrainingDisplay, printable, show_evidence
from ggml_diffusion.app.inspect import describe_file
from ggml_diffusion.config.settings import PRESETS, SETTINGS, ConversionTrainingConfig, load_config
from ggml_diffusion.errors import UserError, one_line
from ggml_diffusion.evaluation.plots import save_evaluation
from ggml_diffusion.evaluation.results import EvaluationSettings
from ggml_diffusion.evaluation.suite import EvaluationInputs, run_evaluation
from ggml_diffusion.evaluation.tables import EvaluationProgress, evaluation_tables
from ggml_diffusion.formats.adapter_file import DiffusionCheckpoint
from ggml_diffusion.formats.model_file import file_sha256, read_model
from ggml_diffusion.generation.denoise import GenerationConfig
from ggml_diffusion.generation.diffusion_model import DiffusionModel
from ggml_diffusion.training.checkpoint import load_latest
from ggml_diffusion.training.run import CHECKPOINTS, EXPORTS, exported_weights, run_conversion

app = typer.Typer(
    name="ggml-diffusion",
    help="Turn an autoregressive GGUF language model into a masked-diffusion one, on the CPU.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command line and exit the process; None = this process's own arguments."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(AttributeError):  # a stream that a test put there
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]
    try:
        app(args=None if arguments is None else list(arguments))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    sys.exit(0)


def click_group() -> Any:
    """The commands as click sees them, with their parameters; docs/cli.md is made from them."""
    return typer.main.get_command(app)


def _setting(name: str, flag: str) -> Any:
    """A flag for a setting of the config; help and default come from the setting."""
    setting = SETTINGS[name]
    default = setting.default
    if isinstance(default, tuple):
        default = ",".join(str(getattr(item, "value", item)) for item in default)
    return typer.Option(flag, help=_with_default(setting.description, default))


def _generation(name: str, flag: str) -> Any:
    """A flag for a field of GenerationConfig."""
    return _field(GenerationConfig, name, flag)


def _evaluation(name: str) -> Any:
    """A flag for a field of EvaluationSettings."""
    return _field(EvaluationSettings, name, "--" + name.replace("_", "-"))


def _field(model: type[BaseModel], name: str, flag: str) -> Any:
    field = model.model_fields[name]
    return typer.Option(flag, help=_with_default(field.description or "", field.default))


def _with_default(description: str, default: Any) -> str:
    """Flags have no default of their own, or they would override the config file."""
    if default is None or default == "":
        return description
    return f"{description} Default: {getattr(default, 'value', default)}."


Settings = TypeVar("Settings", bound=BaseModel)
Threads = Annotated[int | None, _setting("hardware.num_threads", "--threads")]
AllowOtherBase = Annotated[
    bool, typer.Option("--allow-other-base", help="Use an adapter that was trained on another file.")
]


# -- convert -----------------------------------------------------------------------------------------


@app.command(epilog="Example: ggml-diffusion convert model.gguf --data books/ --output run --preset laptop")
def convert(
    model: Annotated[
        Path | None, typer.Argument(help=SETTINGS["model.base_model"].description, metavar="MODEL.gguf")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="A conversion_config.toml; flags count more, and a preset less, than the file."),
    ] = None,
    data: Annotated[list[str] | None, _setting("training.data", "--data")] = None,
    output: Annotated[str | None, _setting("training.output", "--output")] = None,
    preset: Annotated[str | None, typer.Option(help=f"A recipe to start from: {', '.join(PRESETS)}.")] = None,
    steps: Annotated[int | None, _setting("training.total_steps", "--steps")] = None,
    batch_size: Annotated[int | None, _setting("training.batch_size", "--batch-size")] = None,
    gradient_accumulation: Annotated[
        int | None, _setting("training.gradient_accumulation", "--gradient-accumulation")
    ] = None,
    sequence_length: Annotated[int | None, _setting("training.sequence_length", "--sequence-length")] = None,
    learning_rate: Annotated[float | None, _setting("training.learning_rate", "--learning-rate")] = None,
    rank: Annotated[int | None, _setting("model.qlora_rank", "--rank")] = None,
    target_modules: Annotated[str | None, _setting("model.target_modules", "--target-modules")] = None,
    prediction: Annotated[str | None, _setting("model.prediction", "--prediction")] = None,
    mask_token_id: Annotated[int | None, _setting("model.mask_token_id", "--mask-token-id")] = None,
    seed: Annotated[int | None, _setting("training.seed", "--seed")] = None,
    checkpoint_every: Annotated[
        int | None, _setting("training.checkpoint_every", "--checkpoint-every")
    ] = None,
    threads: Threads = None,
    evaluate: Annotated[
        int,
        typer.Option(min=0, help="Held-out sequences to measure before and after; 0 = measure nothing."),
    ] = 0,
    fresh: Annotated[
        bool,
        typer.Option(
            "--fresh", help="Delete the run that the output folder holds, instead of going on with it."
        ),
    ] = False,
) -> None:
    """Convert a GGUF model: train its adapter on text and export it.

    The same command again goes on with a run that was interrupted.
    """
    overrides: dict[str, Any] = {
        "model.base_model": None if model is None else str(model),
        "training.data": data or None,
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
        "hardware.num_threads": threads,
    }
    _convert(load_config(config, overrides, preset), fresh=fresh, evaluate_on=evaluate)


def _convert(config: ConversionTrainingConfig, *, fresh: bool, evaluate_on: int) -> Path:
    """Run a conversion and show its end; returns the safetensors file, or exits if it was interrupted."""
    console = Console()
    conversion = run_conversion(config, TrainingDisplay(console), fresh=fresh, evaluate_on=evaluate_on)
    if conversion.interrupted_by is not None or conversion.safetensors is None:
        console.print(
            Text(
                f"stopped and saved after step {conversion.step} of {conversion.total_steps}; "
                f"the same command goes on from there"
            ),
            soft_wrap=True,
        )
        raise typer.Exit(128 + (conversion.interrupted_by or 0))
    if conversion.evidence is not None:
        show_evidence(console, conversion.evidence)
    for path in (conversion.safetensors, conversion.gguf):
        console.print(Text(f"written: {path}"), soft_wrap=True)
    return conversion.safetensors


# -- generate ----------------------------------------------------------------------------------------


@app.command(epilog='Example: ggml-diffusion generate model.gguf run --prompt "Once upon a time" --length 32')
def generate(
    base: Annotated[Path, typer.Argument(help="The GGUF that was converted.", metavar="MODEL.gguf")],
    adapter: Annotated[
        Path, typer.Argument(help="An output folder, adapter.safetensors or adapter.gguf.", metavar="ADAPTER")
    ],
    prompt: Annotated[str, typer.Option(help="Text that comes before; may be empty.")] = "",
    suffix: Annotated[str, typer.Option(help="Text that comes after: fills the hole between the two.")] = "",
    chat: Annotated[
        bool,
        typer.Option(
            "--chat",
            help="Put the prompt into the model's chat template, as a message to be answered; for "
            "conversions that were trained on messages.",
        ),
    ] = False,
    steps: Annotated[int | None, _generation("steps", "--steps")] = None,
    order: Annotated[str | None, _generation("order", "--order")] = None,
    temperature: Annotated[float | None, _generation("temperature", "--temperature")] = None,
    top_k: Annotated[int | None, _generation("top_k", "--top-k")] = None,
    top_p: Annotated[float | None, _generation("top_p", "--top-p")] = None,
    length: Annotated[int | None, _generation("length", "--length")] = None,
    seed: Annotated[int | None, _generation("seed", "--seed")] = None,
    threshold: Annotated[float | None, _generation("threshold", "--threshold")] = None,
    block_length: Annotated[int | None, _generation("block_length", "--block-length")] = None,
    remasking: Annotated[float | None, _generation("remasking", "--remasking")] = None,
    threads: Threads = None,
    allow_other_base: AllowOtherBase = False,
) -> None:
    """Write text by denoising.

    On a terminal it appears out of the masks; elsewhere only its end is printed.
    """
    settings = {
        "steps": steps,
        "order": order,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "length": length,
        "seed": seed,
        "threshold": threshold,
        "block_length": block_length,
        "remasking": remasking,
    }
    config = _from_flags(GenerationConfig, settings)
    model = DiffusionModel.load(base, exported_weights(adapter), threads, allow_other_base=allow_other_base)
    _show_generation(Console(), model, prompt, suffix, config, chat=chat)


def _from_flags(kind: type[Settings], flags: dict[str, Any]) -> Settings:
    """Settings from the flags that were given; None = not given."""
    try:
        return kind(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False)[0]
        flag = "--" + str(fault["loc"][0]).replace("_", "-")
        raise UserError(f"{flag} {fault['input']}: {one_line(fault['msg'])}") from None


def _show_generation(
    console: Console,
    model: DiffusionModel,
    prompt: str,
    suffix: str,
    config: GenerationConfig,
    *,
    chat: bool = False,
) -> None:
    if console.is_terminal:
        with DenoisingDisplay(console, model.tokenizer, model.mask_token_id) as display:
            written = model.generate(prompt, config, display.step, suffix=suffix, chat=chat)
    else:
        written = model.generate(prompt, config, suffix=suffix, chat=chat)
    before = f"{prompt}\n" if chat else prompt
    console.print(Text.assemble(before, (printable(written), "bold"), suffix), soft_wrap=True)


# -- evaluate ----------------------------------------------------------------------------------------


@app.command(epilog="Example: ggml-diffusion evaluate model.gguf run --output run/evaluation")
def evaluate(
    base: Annotated[Path, typer.Argument(help="The GGUF that was converted.", metavar="MODEL.gguf")],
    adapter: Annotated[
        Path, typer.Argument(help="An output folder, adapter.safetensors or adapter.gguf.", metavar="ADAPTER")
    ],
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
    sequences: Annotated[int | None, _evaluation("sequences")] = None,
    seeds: Annotated[int | None, _evaluation("seeds")] = None,
    one_by_one: Annotated[int | None, _evaluation("one_by_one")] = None,
    spans: Annotated[int | None, _evaluation("spans")] = None,
    candidates: Annotated[int | None, _evaluation("candidates")] = None,
    samples: Annotated[int | None, _evaluation("samples")] = None,
    length: Annotated[int | None, _evaluation("length")] = None,
    prompt_length: Annotated[int | None, _evaluation("prompt_length")] = None,
    order: Annotated[str | None, _evaluation("order")] = None,
    temperature: Annotated[float | None, _evaluation("temperature")] = None,
    top_p: Annotated[float | None, _evaluation("top_p")] = None,
    threshold: Annotated[float | None, _evaluation("threshold")] = None,
    block_length: Annotated[int | None, _evaluation("block_length")] = None,
    remasking: Annotated[float | None, _evaluation("remasking")] = None,
    seed: Annotated[int | None, _evaluation("seed")] = None,
    batch_size: Annotated[int | None, _evaluation("batch_size")] = None,
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens a sequence. Default: as in the training.")
    ] = None,
    held_out_fraction: Annotated[
        float | None, typer.Option(help="Share of the text that is held out. Default: as in the training.")
    ] = None,
    threads: Threads = None,
    allow_other_base: AllowOtherBase = False,
) -> None:
    """Measure a conversion on held-out text, beside the base and the base before the first step.

    Likelihood bound, masked tokens, future-context gain, infilling, written text, and that the base is
    unchanged. What it costs is said before it begins; --spans 0, --samples 0 and --one-by-one 0 leave parts
    out.
    """
    flags = {name: value for name, value in locals().items() if name in EvaluationSettings.model_fields}
    settings = _from_flags(EvaluationSettings, flags)
    progress = EvaluationProgress(Console(stderr=json))
    evaluation = run_evaluation(
        EvaluationInputs(
            base,
            exported_weights(adapter),
            control=None if control is None else exported_weights(control),
            data=tuple(data or ()),
            sequence_length=sequence_length,
            held_out_fraction=held_out_fraction,
            n_threads=threads,
            allow_other_base=allow_other_base,
        ),
        settings,
        progress,
    )
    if json:
        print(evaluation.as_json(), end="")
    else:
        Console().print(evaluation_tables(evaluation))
    if output is not None:
        for path in save_evaluation(evaluation, output, progress.note):
            progress.note(f"written: {path}")


# -- export, inspect, demo ---------------------------------------------------------------------------


@app.command(epilog="Example: ggml-diffusion export run my-adapter.gguf")
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
    if not source.is_dir() or (source / EXPORTS[0]).exists():
        return DiffusionCheckpoint.load(exported_weights(source))
    loaded = load_latest(source / CHECKPOINTS)
    if loaded is None:
        raise UserError(f"{source}: holds neither {EXPORTS[0]} nor a checkpoint")
    return loaded.checkpoint


@app.command(epilog="Example: ggml-diffusion inspect model.gguf")
def inspect(
    file: Annotated[Path, typer.Argument(help="A GGUF model, a GGUF adapter or adapter.safetensors.")],
) -> None:
    """Show what a file holds: sizes, types, settings, and whether it can be converted."""
    Console().print(describe_file(file))


@app.command(epilog="Example: ggml-diffusion demo --output demo-run")
def demo(
    output: Annotated[
        Path, typer.Option(help="Folder for the run; an earlier demo in it is deleted.")
    ] = Path("demo-run"),
    threads: Threads = None,
) -> None:
    """Convert SmolLM2-135M on Python's own help texts, show figures before and after, and write a sample."""
    base = demo_parts.demo_model()
    overrides = {
        "model.base_model": str(base),
        "training.data": [str(demo_parts.write_demo_text(output))],
        "training.output": str(output),
        "hardware.num_threads": threads,
    }
    weights = _convert(
        load_config(overrides=overrides, preset="demo"), fresh=True, evaluate_on=demo_parts.EVALUATE_ON
    )
    model = DiffusionModel.load(base, weights, threads)
    _show_generation(Console(), model, demo_parts.PROMPT, "", demo_parts.GENERATION)
