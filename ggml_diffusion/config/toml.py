"""Settings from presets, TOML files and flags into one config, and a config back into TOML.

Deliberately not here: the settings themselves (settings.py), the command line (app/).
"""

import json
import sys
from collections.abc import Mapping
from difflib import SequenceMatcher
from enum import Enum
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ggml_diffusion.config.presets import PRESETS, preset_for
from ggml_diffusion.config.settings import (
    SECTION_OF_GROUP,
    SECTIONS,
    SETTINGS,
    ConversionTrainingConfig,
    Setting,
)
from ggml_diffusion.errors import UserError, one_line
from ggml_diffusion.regular_file import open_regular

_MAX_TOML_BYTES = 1 << 20
_MAX_SHOWN = 80  # characters of a value in a message

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def load_config(
    path: str | Path | None = None,
    overrides: Mapping[str, Any] | None = None,
    preset: str | None = None,
) -> ConversionTrainingConfig:
    """Put a config together: defaults, then the preset, then the file, then the overrides; the last one
    counts. Where `training.total_steps` is another than the preset's, its annealing and warm-up are scaled.

    Args:
        path: a TOML file in the layout of the seed's conversion_config.toml.
        overrides: "section.key" (see `SETTINGS`) -> value; None = not given.
        preset: a name in `PRESETS`.

    Raises:
        UserError: no such file or preset, not TOML, an unknown key, or a value out of its limits; one line
            that names it.

    """
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    if preset is not None and preset not in PRESETS:
        raise UserError(f"no preset '{preset}', only {', '.join(PRESETS)}")
    if path is not None:
        from_file = _read_toml(Path(path))
        values.update(from_file)
        origins.update(dict.fromkeys(from_file, f"{path}: "))
    for name, value in (overrides or {}).items():
        if value is not None:
            section, _, key = name.rpartition(".")
            values[_known(section, key, "").name] = value
            origins.pop(name, None)
    if preset is not None:
        values = {**preset_for(PRESETS[preset], values.get("training.total_steps")), **values}
    nested: dict[str, Any] = {}
    for name, value in values.items():
        *groups, field = SETTINGS[name].path
        group = nested
        for part in groups:
            group = group.setdefault(part, {})
        group[field] = value
    try:
        return ConversionTrainingConfig.model_validate(nested)
    except ValidationError as error:
        raise UserError(_first_fault(error, origins)) from None


def _read_toml(path: Path) -> dict[str, Any]:
    """A file's values by setting name."""
    try:
        with open_regular(path) as file:
            content = file.read(_MAX_TOML_BYTES + 1)
        if len(content) > _MAX_TOML_BYTES:
            raise UserError(f"{path}: more than {_MAX_TOML_BYTES >> 20} MB")
        tables = tomllib.loads(content.decode("utf-8"))
    except RecursionError:
        raise UserError(f"{path}: not valid TOML: nested too deep") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    except ValueError as error:  # TOMLDecodeError is one, and so is an integer of thousands of digits
        raise UserError(f"{path}: not valid TOML: {one_line(str(error))}") from None
    values: dict[str, Any] = {}
    for section, table in tables.items():
        if not isinstance(table, dict):
            _known("", section, f"{path}: ")
        elif section not in SECTIONS:
            closest = max(SECTIONS, key=lambda known: SequenceMatcher(None, section, known).ratio())
            raise UserError(f"{path}: unknown table [{section}]; did you mean [{closest}]?")
        else:
            for key, value in table.items():
                values[_known(section, key, f"{path}: ").name] = value
    return values


def _known(section: str, key: str, origin: str) -> Setting:
    """The setting of a key, or an error that names the closest one."""
    if found := SETTINGS.get(f"{section}.{key}"):
        return found
    closest = max(
        SETTINGS.values(),
        key=lambda known: SequenceMatcher(None, key, known.key).ratio() + 0.1 * (known.section == section),
    )
    where = f"[{section}] {key}" if section else f"{key} (outside of any table)"
    raise UserError(f"{origin}unknown key {where}; did you mean [{closest.section}] {closest.key}?")


def _first_fault(error: ValidationError, origins: Mapping[str, str]) -> str:
    """A pydantic error as one line: where the value came from, its key in the file, and what is wrong."""
    fault = error.errors(include_url=False, include_context=False)[0]
    reason = fault["msg"].removeprefix("Value error, ")
    place = tuple(str(part) for part in fault["loc"])
    for name, setting in SETTINGS.items():
        if place[: len(setting.path)] == setting.path:
            given = f" = {_shown(fault['input'])}" if isinstance(fault["input"], str | int | float) else ""
            return f"{origins.get(name, '')}[{setting.section}] {setting.key}{given}: {reason}"
    section = SECTION_OF_GROUP.get(place) or place[-1]
    origin = next((origins[name] for name in origins if name.startswith(f"{section}.")), "")
    return f"{origin}[{section}]: {reason}"


def to_toml(config: ConversionTrainingConfig) -> str:
    """A config as the text of a commented TOML file; `load_config` reads the same config from it."""
    lines: list[str] = []
    for section in SECTIONS:
        lines.append(f"[{section}]")
        for setting in SETTINGS.values():
            value = setting.of(config)
            if setting.section == section and value is not None and value != ():
                lines += [f"# {setting.description}", f"{setting.key} = {_toml_value(value)}"]
        lines.append("")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    """A value as it stands in a file, not longer than a message may be."""
    text = _toml_value(value)
    return text if len(text) <= _MAX_SHOWN else f"{text[:_MAX_SHOWN]}..."


def _toml_value(value: Any) -> str:
    if isinstance(value, Enum):
        return _toml_value(value.value)
    if isinstance(value, str):  # a JSON string is a TOML string, except for DEL
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return f"[{', '.join(_toml_value(item) for item in value)}]"
    return repr(value)
