"""Every setting of a conversion: name, default, limits and description, each in one place.

The pydantic fields below and in groups.py are the settings. The keys of conversion_config.toml, the flags
of `convert`, their help and the comments in a written config are all derived from them (`SETTINGS`).
Defaults are the seed document's recipe.

Deliberately not here: files (toml.py), recipes (presets.py), and what the settings do. Only app/ and
training/ see this wing; everything else takes plain values.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from pydantic import Field, model_validator

from ggml_diffusion.config.groups import (
    BlockDiffusionConfig,
    HardwareConfig,
    HolesConfig,
    NoiseScheduleConfig,
    QLoraConversionConfig,
    Settings,
)
from ggml_diffusion.objective.corruption import LossWeighting
from ggml_diffusion.objective.optim import LearningRateSchedule


class ConversionTrainingConfig(Settings):
    """A whole conversion run."""

    base_model: str | None = Field(default=None, min_length=1, description="The GGUF file to convert.")
    data: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(),
        strict=False,
        description="Training text: files of text, .jsonl or .parquet, each perhaps as .gz, folders of them, "
        "or - for standard input.",
    )
    include: tuple[Annotated[str, Field(min_length=1)], ...] = Field(
        default=(),
        strict=False,
        description="Names of other files that are read as text in folders, as '*.py'.",
    )
    strict: bool = Field(
        default=False,
        description="Stop at the first document that cannot be used; else up to a tenth are left out.",
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
    norm_damping: float = Field(
        default=0.0,
        ge=0.0,
        description="A step whose gradient's norm is more than so many times the usual gets a learning rate "
        "that is lower in proportion; 0 = none does.",
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
    holes: HolesConfig = Field(default_factory=HolesConfig)
    hardware: HardwareConfig = Field(default_factory=HardwareConfig)

    @property
    def margin(self) -> int:
        """The margin that the run has: none without a frozen context, and none in blocks."""
        has_margin = self.qlora.context == "frozen" and not self.block_diffusion.enabled
        return self.qlora.margin if has_margin else 0

    @property
    def attention_sink(self) -> bool:
        """Whether the run keeps the first token as an attention sink. A frozen context is the base's own and
        has it anyway; an aligned first token may be masked, and would see nothing."""
        qlora = self.qlora
        return qlora.attention_sink and qlora.context == "adapted" and qlora.prediction == "shifted"

    @model_validator(mode="after")
    def _check_blocks(self) -> "ConversionTrainingConfig":
        blocks = self.block_diffusion
        if blocks.enabled and blocks.initial_size >= self.sequence_length:
            raise ValueError(
                f"blocks of initial_size = {blocks.initial_size} are not shorter than the sequences, "
                f"sequence_length = {self.sequence_length}: that is training without blocks"
            )
        return self

    @model_validator(mode="after")
    def _check_what_goes_together(self) -> "ConversionTrainingConfig":
        frozen = self.qlora.context == "frozen"
        if frozen and self.ar_loss_share > 0.0:
            raise ValueError(
                "ar_loss_share trains the adapter on clean text, which a frozen context leaves to the base: "
                "use one of the two"
            )
        if frozen and self.distillation_weight > 0.0:
            raise ValueError(
                "distillation_weight needs the base's prediction from all that is left of a token, which "
                "a frozen context with holes in it does not have: use one of the two"
            )
        if frozen and self.block_diffusion.enabled and self.noise_schedule.masking == "exact":
            raise ValueError(
                "a frozen context trains all blocks of a sequence at once, and masking = 'exact' counts the "
                "masks of one: use masking = 'bernoulli'"
            )
        if self.loss_weighting == "nelbo" and self.holes.share > 0.0:
            raise ValueError(
                "nelbo weighs scattered masks, and holes are none: use loss_weighting = 'uniform' or "
                "holes.share = 0"
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
SECTION_OF_GROUP = {(): "training", ("qlora",): "model"}
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
    "holes",
    "time_embedding",
    "hardware",
)


def _walk(group: type[Settings], path: tuple[str, ...]) -> Iterator[Setting]:
    for name, field in group.model_fields.items():
        here = (*path, name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, Settings):
            yield from _walk(field.annotation, here)
            continue
        section = SECTION_OF_GROUP.get(path, path[-1] if path else "")
        section, key = _PLACE_IN_FILE.get(here, (section, name))
        assert field.description is not None
        yield Setting(section, key, here, field.description, field.default)


SETTINGS: Mapping[str, Setting] = {
    setting.name: setting
    for setting in sorted(
        _walk(ConversionTrainingConfig, ()), key=lambda found: SECTIONS.index(found.section)
    )
}

# Settings that may change when a run is resumed: they change no number of it. (Base, data and
# the pairs that a run starts from are compared by their content.)
_FREE_SETTINGS = {
    "model.base_model",
    "model.start_from",
    "training.data",
    "training.include",
    "training.strict",
    "training.output",
    "training.checkpoint_every",
    "hardware.num_threads",
    "hardware.memory_mib",  # in parts, sums are rounded in another order
}
_MAY_BE_LOWERED = {"training.learning_rate"}  # a run that diverges is gone on with at a lower one


def settings_that_differ(saved: Mapping[str, Any], config: ConversionTrainingConfig) -> list[str]:
    """Why a run with saved settings, as plain JSON values, cannot be resumed under this config.

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
        is_lower = setting.name in _MAY_BE_LOWERED and isinstance(then, float) and now < then
        if now != then and setting.name not in _FREE_SETTINGS and not is_lower:
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
