"""Flags that are settings: their help comes from the setting, and which were given becomes settings again."""

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer
from pydantic import BaseModel, ValidationError
from rich.console import Console
from rich.text import Text

from ggml_diffusion.config.settings import SETTINGS
from ggml_diffusion.errors import UserError, one_line


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
Threads = Annotated[int | None, setting("hardware.num_threads", "--threads")]
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
    Console(stderr=True).print(Text(text), soft_wrap=True)
