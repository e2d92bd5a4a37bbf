"""Every setting of a conversion: name, default, limits and description, each in one place.

The pydantic fields below and in groups.py are the settings. The keys of conversion_config.toml, the
flags of `convert`, their help and the comments in a written config are all derived from them (`SETTINGS`).
Defaults are the seed document's recipe.

Deliberately not here: reading the command line (cli.py), and what the settings do. Only cli, convert and
trainer see this module; everything else takes plain values.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import SequenceMatcher
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, ValidationError, model_validator

from ggml_diffusion.config.groups import (
    BlockDiffusionConfig,
    HardwareConfig,
    MaskAnnealingConfig,
    NoiseScheduleConfig,
    QLoraConversionConfig,
    Settings,
    TimeEmbeddingConfig,
)
from ggml_diffusion.errors import UserError, one_line
from ggml_diffusion.formats.lora import TargetModule
from ggml_diffusion.objective.corruption import LossWeighting
from ggml_diffusion.objective.optim import LearningRateSchedule

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = [
    "PRESETS",
    "SECTIONS",
    "SETTINGS",
    "BlockDiffusionConfig",
    "ConversionTrainingConfig",
    "HardwareConfig",
    "MaskAnnealingConfig",
    "NoiseScheduleConfig",
    "QLoraConversionConfig",
    "Setting",
    "TimeEmbeddingConfig",
    "load_config",
    "scaled_to_run",
    "settings_that_differ",
    "to_toml",
]


class ConversionTrainingConfig(Settings):
    """A whole conversion run."""

    base_model: str | None = Field(default=None, min_length=1, description="The GGUF file to convert.")
    data: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(), strict=False, description="Training text: .txt or .jsonl files, or folders of them."
    )
    output: str | None = Field(
        default=None, min_length=1, description="Output folder; one that holds a run resumes it."
    )
    batch_size: int = Field(default=8, ge=1, description="Sequences that go through the model together.")
    gradient_accumulation: int = Field(
        default=4, ge=1, description="Batches whose gradients make one optimizer step."
    )
    sequence_length: int = Field(default=256, ge=2, description="Tokens a sequence.")
    learning_rate: float = Field(default=1e-4, gt=0.0, description="Learning rate after the warm-up.")
    lora_b_rate_factor: float = Field(
        default=1.0,
        gt=0.0,
        description="Learning rate of the LoRA matrices B, as a multiple of that of A; above 1 is LoRA+.",
    )
    embedding_rate_factor: float = Field(
        default=1.0,
        gt=0.0,
        description="Learning rate of the mask and time embeddings, as a multiple of that of A.",
    )
    lr_schedule: LearningRateSchedule = Field(
        default="cosine", description="Learning rate after the warm-up: constant, or cosine = falling to 0."
    )
    warmup_steps: int = Field(default=1000, ge=0, description="Steps in which the learning rate rises.")
    total_steps: int = Field(default=50_000, ge=1, description="Optimizer steps of the run.")
    weight_decay: float = Field(
        default=0.01, ge=0.0, description="Decoupled weight decay on the LoRA and projection matrices."
    )
    max_grad_norm: float = Field(
        default=1.0, gt=0.0, description="The gradient's global norm is clipped to this."
    )
    loss_weighting: LossWeighting = Field(
        default="uniform",
        description="uniform = mean over the masked tokens; nelbo = each weighed as in the bound.",
    )
    nelbo_clip: float = Field(
        default=10.0, gt=0.0, description="Largest weight that nelbo weighting uses in training."
    )
    ar_loss_share: float = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="Share of the loss that is the causal next-token loss on clean text, in its own pass.",
    )
    distillation_weight: float = Field(
        default=0.0,
        ge=0.0,
        description="Weight of the cross-entropy under the frozen base's own causal prediction, beside that "
        "of the text.",
    )
    held_out_fraction: float = Field(
        default=0.05,
        ge=0.0,
        lt=1.0,
        description="Share of the sequences kept for evaluation, never trained on.",
    )
    checkpoint_every: int = Field(
        default=500, ge=0, description="Steps between checkpoints; 0 = only at the end."
    )
    seed: int = Field(default=0, ge=0, lt=2**63, description="Seed of all randomness of the run.")
    qlora: QLoraConversionConfig = Field(default_factory=QLoraConversionConfig)
    noise_schedule: NoiseScheduleConfig = Field(default_factory=NoiseScheduleConfig)
    block_diffusion: BlockDiffusionConfig = Field(default_factory=BlockDiffusionConfig)
    hardware: HardwareConfig = Field(default_factory=HardwareConfig)

    @model_validator(mode="after")
    def _check_blocks(self) -> "ConversionTrainingConfig":
        blocks = self.block_diffusion
        if blocks.enabled and blocks.initial_size >= self.sequence_length:
            raise ValueError(
                f"blocks of initial_size = {blocks.initial_size} are not shorter than the sequences, "
                f"sequence_length = {self.sequence_length}: that is training without blocks"
            )
        return self


@dataclass(frozen=True)
class Setting:
    """One setting, as the file and the command line see it.

    Attributes:
        section: its table in the TOML file.
        key: its name there.
        path: the fields that lead to it from a ConversionTrainingConfig.
        description: one sentence, for help and comments.
        default: its value if nobody says otherwise; None = left out.

    """

    section: str
    key: str
    path: tuple[str, ...]
    description: str
    default: Any

    @property
    def name(self) -> str:
        """Section and key, e.g. "training.batch_size": how `SETTINGS` and `load_config` call it."""
        return f"{self.section}.{self.key}"

    def of(self, config: ConversionTrainingConfig) -> Any:
        """Its value in a config."""
        value: Any = config
        for field in self.path:
            value = getattr(value, field)
        return value


# The seed's TOML layout where it differs from the fields: every group of fields is a table of its own name,
# but these keys of [model] are fields elsewhere, and fields of the run itself are [training].
_SECTION_OF_GROUP = {(): "training", ("qlora",): "model"}
_PLACE_IN_FILE = {
    ("base_model",): ("model", "base_model"),
    ("qlora", "rank"): ("model", "qlora_rank"),
    ("qlora", "alpha"): ("model", "qlora_alpha"),
}
SECTIONS = (
    "model",
    "training",
    "mask_annealing",
    "noise_schedule",
    "block_diffusion",
    "time_embedding",
    "hardware",
)


def _walk(group: type[Settings], path: tuple[str, ...]) -> Iterator[Setting]:
    for name, field in group.model_fields.items():
        here = (*path, name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            yield from _walk(field.annotation, here)
            continue
        section = _SECTION_OF_GROUP.get(path, path[-1] if path else "")
        section, key = _PLACE_IN_FILE.get(here, (section, name))
        assert field.description is not None
        yield Setting(section, key, here, field.description, field.default)


SETTINGS: Mapping[str, Setting] = {
    setting.name: setting
    for setting in sorted(
        _walk(ConversionTrainingConfig, ()), key=lambda found: SECTIONS.index(found.section)
    )
}

MIN_WARMUP_STEPS = 10

# What the ablations (docs/results/ablations.md) leave of the PyTorch conversion's recipe.
_SHORT_RECIPE: Mapping[str, Any] = {
    "model.target_modules": [module.value for module in TargetModule],
    "training.batch_size": 8,
    "training.gradient_accumulation": 1,
    "training.sequence_length": 128,
    "training.learning_rate": 5e-4,
    "training.lora_b_rate_factor": 8.0,
    "training.held_out_fraction": 0.07,
    "training.checkpoint_every": 50,
    "mask_annealing.schedule": "linear",
    "noise_schedule.type": "linear",
    "noise_schedule.num_timesteps": 0,
    "noise_schedule.min_time": 0.05,
    # In so few steps at this learning rate the projection's output outgrows the token embeddings.
    "time_embedding.enabled": False,
}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # The defaults are the seed's recipe; its base_model and num_threads belong to one machine.
    "seed": {},
    # SmolLM2-135M in an hour on two cores; longer with more --steps.
    "laptop": {
        **_SHORT_RECIPE,
        "training.total_steps": 2000,
        "training.warmup_steps": 100,
        "mask_annealing.total_steps": 400,
    },
    # SmolLM2-135M on the text of `ggml-diffusion demo`, in about ten minutes on two cores.
    "demo": {
        **_SHORT_RECIPE,
        "training.total_steps": 200,
        "training.warmup_steps": 10,
        "mask_annealing.total_steps": 40,
    },
}


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
        values = {**_preset_for(PRESETS[preset], values.get("training.total_steps")), **values}
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


def _preset_for(preset: Mapping[str, Any], total_steps: Any) -> dict[str, Any]:
    """A preset's values in a run of another length: annealing and warm-up keep their share of the run.

    But a warm-up is not cut below a few steps: Adam knows too little of its gradients by then, and at the
    full rate of the LoRA matrices B the model would lose what the base knows.
    """
    values = dict(preset)
    of_run = preset.get("training.total_steps")
    if of_run is not None and isinstance(total_steps, int):
        for name, least in (("training.warmup_steps", MIN_WARMUP_STEPS), ("mask_annealing.total_steps", 1)):
            values[name] = max(least, round(preset[name] * total_steps / of_run))
    return values


def _read_toml(path: Path) -> dict[str, Any]:
    """A file's values by setting name."""
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    except tomllib.TOMLDecodeError as error:
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
    """The setting of a key, or a refusal that names the closest one."""
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
            given = (
                f" = {_toml_value(fault['input'])}" if isinstance(fault["input"], str | int | float) else ""
            )
            return f"{origins.get(name, '')}[{setting.section}] {setting.key}{given}: {reason}"
    section = _SECTION_OF_GROUP.get(place) or place[-1]
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


def _toml_value(value: Any) -> str:
    if isinstance(value, Enum):
        return _toml_value(value.value)
    if isinstance(value, str):  # a JSON string is a TOML one, but for DEL
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return f"[{', '.join(_toml_value(item) for item in value)}]"
    return repr(value)


# Share of its steps that the seed's recipe anneals for: 20K of 50K.
_ANNEALING_SHARE = 0.4


def scaled_to_run(config: ConversionTrainingConfig) -> tuple[ConversionTrainingConfig, str | None]:
    """Fit annealing and warm-up to a run that is shorter than one of them.

    Both are scaled by one factor, such that the longer one takes two fifths of the run, as in the seed's
    recipe; else a short run would train a causal model, or never reach its learning rate.

    Returns:
        The config to run with, and one sentence for the user that says what changed; None if nothing did.

    """
    annealing = config.qlora.mask_annealing
    longest = max(annealing.total_steps, config.warmup_steps)
    if config.total_steps >= longest:
        return config, None
    factor = _ANNEALING_SHARE * config.total_steps / longest

    def scaled(steps: int) -> int:
        return max(1, round(steps * factor)) if steps else 0

    annealing_steps = scaled(annealing.total_steps)
    # Of several ratios that would now start at one step only the last is left.
    stepwise = {
        min(round(step * factor), max(0, annealing_steps - 1)): ratio for step, ratio in annealing.steps
    }
    fitted_annealing = annealing.model_copy(
        update={"total_steps": annealing_steps, "steps": tuple(stepwise.items())}
    )
    fitted = config.model_copy(
        update={
            "warmup_steps": scaled(config.warmup_steps),
            "qlora": config.qlora.model_copy(update={"mask_annealing": fitted_annealing}),
        }
    )
    return fitted, (
        f"The run of {config.total_steps} steps is shorter than its annealing ({annealing.total_steps}) or "
        f"warm-up ({config.warmup_steps}): they are scaled to {annealing_steps} and {fitted.warmup_steps}."
    )


# Settings that may change when a run goes on: they change no number of it. (Base and data are compared by
# their content.)
_FREE_SETTINGS = {
    "model.base_model",
    "training.data",
    "training.output",
    "training.checkpoint_every",
    "hardware.num_threads",
    "hardware.memory_mib",  # in parts, sums are rounded in another order
}


def settings_that_differ(saved: Mapping[str, Any], config: ConversionTrainingConfig) -> list[str]:
    """Why a run with saved settings, as plain JSON values, cannot be gone on with under this config.

    Returns:
        A phrase for each difference that changes numbers; "there" is the saved one.

    """
    here = config.model_dump(mode="json")
    defaults = ConversionTrainingConfig().model_dump(mode="json")
    found = []
    for setting in SETTINGS.values():
        now = _value_at(here, setting.path)
        # A version that did not have the setting yet did what is its default now.
        then = _value_at(saved, setting.path, _value_at(defaults, setting.path))
        if now != then and setting.name not in _FREE_SETTINGS:
            found.append(f"{setting.name} ({then} there, {now} here)")
    return found


def _value_at(config: Mapping[str, Any], path: tuple[str, ...], missing: Any = None) -> Any:
    """A setting in a config of plain JSON values, or `missing` where there is no such key."""
    value: Any = config
    for name in path:
        if not isinstance(value, Mapping) or name not in value:
            return missing
        value = value[name]
    return value
