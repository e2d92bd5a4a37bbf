"""Flags that are settings: their help comes from the setting, and which were given becomes settings again."""

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer
from pydantic import BaseModel, ValidationError
from rich.console import Console
from rich.text import Text

from ggml_diffusion.config.presets import PRESETS
from ggml_diffusion.config.settings import SETTINGS, ConversionTrainingConfig
from ggml_diffusion.config.toml import load_config
from ggml_diffusion.errors import UserError, escaped, one_line


def setting(name: str, flag: str) -> Any:
    """A flag for a setting of the config; help and default come from the setting."""
    found = SETTINGS[name]
    default = found.default
    if isinstance(default, tuple):
        default = ",".join(str(getattr(item, "value", item)) for item in default)
    return typer.Option(flag, help=_with_default(found.description, default))


def field_option(model: type[BaseModel], name: str) -> Any:
    """A flag for a field of other settings; help and default come from the field."""
    field = model.model_fields[name]
    flag = "--" + name.replace("_", "-")
    return typer.Option(flag, help=_with_default(field.description or "", field.default))


def _with_default(description: str, default: Any) -> str:
    """Flags have no default of their own, or they would override the config file."""
    if default is None or default == "" or default is False:
        return description
    return f"{description} Default: {getattr(default, 'value', default)}."


Settings = TypeVar("Settings", bound=BaseModel)

# The flags of a conversion, which `convert` and `estimate` share: parameter -> setting.
RUN_FLAGS = {
    "model": "model.base_model",
    "data": "training.data",
    "include": "training.include",
    "strict": "training.strict",
    "output": "training.output",
    "steps": "training.total_steps",
    "batch_size": "training.batch_size",
    "gradient_accumulation": "training.gradient_accumulation",
    "sequence_length": "training.sequence_length",
    "learning_rate": "training.learning_rate",
    "rank": "model.qlora_rank",
    "alpha": "model.qlora_alpha",
    "target_modules": "model.target_modules",
    "start_from": "model.start_from",
    "prediction": "model.prediction",
    "context": "model.context",
    "attention_sink": "model.attention_sink",
    "holes": "holes.share",
    "mask_token_id": "model.mask_token_id",
    "seed": "training.seed",
    "checkpoint_every": "training.checkpoint_every",
    "device": "hardware.device",
    "threads": "hardware.num_threads",
    "memory_mib": "hardware.memory_mib",
}
Model = Annotated[
    Path | None, typer.Argument(help=SETTINGS["model.base_model"].description, metavar="MODEL.gguf")
]
ConfigFile = Annotated[
    Path | None,
    typer.Option(help="A conversion_config.toml; flags count more, and a preset less, than the file."),
]
Data = Annotated[list[str] | None, setting("training.data", "--data")]
Include = Annotated[list[str] | None, setting("training.include", "--include")]
Strict = Annotated[bool | None, setting("training.strict", "--strict")]
Output = Annotated[str | None, setting("training.output", "--output")]
Preset = Annotated[str | None, typer.Option(help=f"A recipe to start from: {', '.join(PRESETS)}.")]
Steps = Annotated[int | None, setting("training.total_steps", "--steps")]
BatchSize = Annotated[int | None, setting("training.batch_size", "--batch-size")]
Accumulation = Annotated[int | None, setting("training.gradient_accumulation", "--gradient-accumulation")]
SequenceLength = Annotated[int | None, setting("training.sequence_length", "--sequence-length")]
LearningRate = Annotated[float | None, setting("training.learning_rate", "--learning-rate")]
Rank = Annotated[int | None, setting("model.qlora_rank", "--rank")]
Alpha = Annotated[float | None, setting("model.qlora_alpha", "--alpha")]
StartFrom = Annotated[str | None, setting("model.start_from", "--start-from")]
TargetModules = Annotated[str | None, setting("model.target_modules", "--target-modules")]
Prediction = Annotated[str | None, setting("model.prediction", "--prediction")]
ContextKind = Annotated[str | None, setting("model.context", "--context")]
AttentionSink = Annotated[
    bool | None, setting("model.attention_sink", "--attention-sink/--no-attention-sink")
]
Holes = Annotated[float | None, setting("holes.share", "--holes")]
MaskTokenId = Annotated[int | None, setting("model.mask_token_id", "--mask-token-id")]
Seed = Annotated[int | None, setting("training.seed", "--seed")]
MemoryMib = Annotated[int | None, setting("hardware.memory_mib", "--memory-mib")]
CheckpointEvery = Annotated[int | None, setting("training.checkpoint_every", "--checkpoint-every")]
Threads = Annotated[int | None, setting("hardware.num_threads", "--threads")]
RunDevice = Annotated[str | None, setting("hardware.device", "--device")]
Device = Annotated[
    Literal["cpu", "metal", "cuda", "vulkan"],
    typer.Option(help="What computes: cpu, metal, cuda or vulkan. Default: cpu."),
]
AllowOtherBase = Annotated[
    bool, typer.Option("--allow-other-base", help="Use an adapter that was trained on another file.")
]
Base = Annotated[Path, typer.Argument(help="The GGUF that was converted.", metavar="MODEL.gguf")]
Adapter = Annotated[
    Path, typer.Argument(help="An output folder, adapter.safetensors or adapter.gguf.", metavar="ADAPTER")
]


def config_from(arguments: dict[str, Any]) -> ConversionTrainingConfig:
    """The config of a conversion from the arguments of a command, those of `RUN_FLAGS` and two more."""
    overrides = {setting: arguments[name] for name, setting in RUN_FLAGS.items()}
    for name, convert in (("model.base_model", str), ("model.target_modules", lambda text: text.split(","))):
        if overrides[name] is not None:
            overrides[name] = convert(overrides[name])
    for name in ("training.data", "training.include"):
        overrides[name] = overrides[name] or None
    return load_config(arguments["config"], overrides, arguments["preset"])


def from_flags(kind: type[Settings], flags: dict[str, Any]) -> Settings:
    """Settings from the flags that were given; None = not given."""
    try:
        return kind(**{name: value for name, value in flags.items() if value is not None})
    except ValidationError as error:
        fault = error.errors(include_url=False, include_context=False)[0]
        flag = "--" + str(fault["loc"][0]).replace("_", "-")
        raise UserError(f"{flag} {fault['input']}: {one_line(fault['msg'])}") from None


def note_on_stderr(text: str) -> None:
    """Say something beside a command's output."""
    Console(stderr=True).print(Text(escaped(text)), soft_wrap=True)
