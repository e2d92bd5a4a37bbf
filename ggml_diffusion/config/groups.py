"""The groups of settings that a conversion has, apart from those of the run itself (settings.py).

Deliberately not here: files, flags and presets (settings.py), and what the settings do.
"""

from itertools import pairwise
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from ggml_diffusion.formats.adapter_file import MAX_ALPHA, MAX_MARGIN, MAX_TIMESTEPS, MIN_ALPHA, ContextKind
from ggml_diffusion.formats.lora import TargetModule
from ggml_diffusion.objective.annealing import AnnealingSchedule, MaskKind
from ggml_diffusion.objective.corruption import Masking, ScheduleType
from ggml_diffusion.objective.output_rows import Prediction

Arithmetic = Literal["fast", "f32"]
DeviceKind = Literal["auto", "cpu", "metal", "cuda", "vulkan"]

Ratio = Annotated[float, Field(ge=0.0, le=1.0)]
# Settings are strict, but TOML has neither enumerations nor tuples.
Schedule = Annotated[AnnealingSchedule, Field(strict=False)]
Target = Annotated[TargetModule, Field(strict=False)]
AnnealingStep = Annotated[tuple[Annotated[int, Field(ge=0)], Ratio], Field(strict=False)]


class Settings(BaseModel):
    """A group of settings: immutable, no unknown names, numbers finite and never read out of strings."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class MaskAnnealingConfig(Settings):
    """How the attention goes from causal to bidirectional (annealing.py)."""

    total_steps: int = Field(
        default=20_000,
        ge=0,
        description="Optimizer steps until the final causal ratio; 0 = it holds at once.",
    )
    schedule: Schedule = Field(
        default=AnnealingSchedule.COSINE,
        description="Curve of the causal ratio: linear, cosine, exponential or stepwise.",
    )
    initial_causal_ratio: Ratio = Field(
        default=1.0, description="Causal ratio at step 0; 1 = fully causal, as the base model."
    )
    final_causal_ratio: Ratio = Field(
        default=0.0, description="Causal ratio after the annealing; 0 = fully bidirectional."
    )
    mask: MaskKind = Field(
        default="soft",
        description="soft = a future token counts in part; bernoulli = it is seen or not, drawn each step.",
    )
    decay: float = Field(
        default=5.0,
        gt=0.0,
        description="How steeply the exponential schedule starts; for that schedule only.",
    )
    steps: tuple[AnnealingStep, ...] = Field(
        default=(),
        strict=False,
        description="Ratios of the stepwise schedule, [[from step, ratio], ...]; for that schedule only.",
    )

    @model_validator(mode="after")
    def _check_schedule(self) -> "MaskAnnealingConfig":
        if (self.schedule is AnnealingSchedule.STEPWISE) != (len(self.steps) > 0):
            raise ValueError(
                "the schedule 'stepwise' needs steps, e.g. [[0, 1.0], [1000, 0.5]], and no other has them"
            )
        first_steps = [step for step, _ in self.steps]
        if any(later <= earlier for earlier, later in pairwise(first_steps)):
            raise ValueError(f"steps must come in rising order, not {first_steps}")
        if first_steps and 0 < self.total_steps <= first_steps[-1]:
            raise ValueError(
                f"step {first_steps[-1]} is never reached: final_causal_ratio holds from total_steps = "
                f"{self.total_steps} on"
            )
        return self


class TimeEmbeddingConfig(Settings):
    """The time embedding (time_embedding.py)."""

    enabled: bool = Field(default=True, description="Whether the model is told the diffusion time.")
    dim: int = Field(default=256, ge=2, multiple_of=2, description="Sinusoidal features of the time; even.")
    max_timesteps: int = Field(
        default=1000,
        ge=2,
        le=MAX_TIMESTEPS,
        description="Rows of the table that times are interpolated from.",
    )
    rate_factor: float | None = Field(
        default=None,
        gt=0.0,
        description="Learning rate of the projection's matrix, relative to its bias; left out, 1 / dim.",
    )
    dropout: Ratio = Field(
        default=0.0,
        description="Chance that a training sequence goes without it: the model learns to do without.",
    )


class NoiseScheduleConfig(Settings):
    """How much is masked at each diffusion time (corruption.py)."""

    type: ScheduleType = Field(
        default="cosine", description="Mask probability over the diffusion time: linear, cosine or geometric."
    )
    num_timesteps: int = Field(
        default=1000, ge=0, description="Training times are drawn from that many equal steps; 0 = continuous."
    )
    min_time: float = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="Training times are drawn from there to 1; few masks teach little.",
    )
    masking: Masking = Field(
        default="bernoulli",
        description="bernoulli = each token by the schedule's chance; exact = any number of them, from 1 up.",
    )
    complementary: bool = Field(
        default=False,
        description="Every sequence twice a step, with the masks turned around: a step costs twice as much.",
    )


class BlockDiffusionConfig(Settings):
    """Block diffusion: clean text, one noisy block, and nothing behind it (objective/blocks.py)."""

    enabled: bool = Field(
        default=False, description="Train to write in blocks from left to right, instead of whole sequences."
    )
    initial_size: int = Field(default=4, ge=1, description="Tokens of a block at the first step.")
    final_size: int | None = Field(
        default=None,
        ge=1,
        description="Tokens of a block after its growth, and in generation; left out, the whole sequence.",
    )
    growth_share: Ratio = Field(
        default=0.5, description="Share of the run in which blocks grow from the initial to the final size."
    )

    @model_validator(mode="after")
    def _check_sizes(self) -> "BlockDiffusionConfig":
        if self.final_size is not None and self.final_size < self.initial_size:
            raise ValueError(
                f"final_size {self.final_size} is smaller than initial_size {self.initial_size}: blocks grow"
            )
        return self


class HolesConfig(Settings):
    """Holes in place of scattered masks: spans of text, all of what is around them in sight (holes.py)."""

    share: Ratio = Field(
        default=0.0, description="Share of the training sequences that have holes instead of scattered masks."
    )
    longest: int = Field(
        default=16, ge=1, description="Tokens of a hole: from 1 to so many, each length as often."
    )
    most: int = Field(
        default=4, ge=1, description="Holes of a sequence: from 1 to so many, each number as often."
    )
    draws: int = Field(
        default=1,
        ge=1,
        le=64,
        description="Sets of masks that a sequence with holes gets in a step; with a frozen context its "
        "text is computed once for all.",
    )


class QLoraConversionConfig(Settings):
    """What is trained, and how the converted model is read."""

    rank: int = Field(default=32, ge=1, description="LoRA rank; 32 to 64 are usual for a conversion.")
    alpha: float = Field(
        default=64.0,
        ge=MIN_ALPHA,
        le=MAX_ALPHA,
        description="LoRA scale is alpha / rank; twice the rank is usual.",
    )
    target_modules: tuple[Target, ...] = Field(
        default=(
            TargetModule.QUERY_PROJ,
            TargetModule.KEY_PROJ,
            TargetModule.VALUE_PROJ,
            TargetModule.OUTPUT_PROJ,
        ),
        strict=False,
        min_length=1,
        description="Projections with an adapter: "
        + ", ".join(module.value for module in TargetModule)
        + ".",
    )
    quantization_bits: int = Field(
        default=4,
        ge=1,
        le=32,
        description="Bits a weight that the base is expected to have; a difference is a warning.",
    )
    prediction: Prediction = Field(
        default="shifted",
        description="Output that predicts a token: shifted = the one before, as the base; aligned = its own.",
    )
    mask_token_id: int | None = Field(
        default=None,
        ge=0,
        description="Token that stands for a masked place; left out, one is chosen.",
    )
    context: ContextKind = Field(
        default="adapted",
        description="Tokens that stand: adapted as all others, from both sides, or frozen = the base's own, "
        "which filling and writing compute once.",
    )
    margin: int = Field(
        default=8,
        ge=0,
        le=MAX_MARGIN,
        description="With a frozen context: tokens on each side of masks that are computed a second time, "
        "with the masks in sight; 0 = none, and none in blocks.",
    )
    attention_sink: bool = Field(
        default=False,
        description="With an adapted context and prediction shifted: the first token of a text sees itself "
        "alone, as in the base, whose heads rest on it.",
    )
    train_mask_embedding: bool = Field(
        default=True, description="Whether the mask token gets a trained embedding, on top of the base's own."
    )
    start_from: str | None = Field(
        default=None,
        min_length=1,
        description="A PEFT folder or GGUF adapter whose LoRA pairs the run starts from; left out, none.",
    )
    mask_annealing: MaskAnnealingConfig = Field(default_factory=MaskAnnealingConfig)
    time_embedding: TimeEmbeddingConfig = Field(default_factory=TimeEmbeddingConfig)

    @field_validator("target_modules")
    @classmethod
    def _check_targets(cls, targets: tuple[TargetModule, ...]) -> tuple[TargetModule, ...]:
        if len(set(targets)) != len(targets):
            raise ValueError("a projection is named twice")
        return targets


class HardwareConfig(Settings):
    """What the conversion runs on."""

    device: DeviceKind = Field(
        default="cpu",
        description="cpu, metal, cuda or vulkan; auto = the first of the others that computes rightly.",
    )
    num_threads: int | None = Field(
        default=None, ge=1, le=1024, description="Threads; left out, as many as the process may use."
    )
    use_simd: bool = Field(default=True, description="Vector instructions; false is slow and for comparison.")
    memory_mib: int | None = Field(
        default=None,
        ge=1,
        description="MiB that a training step may take beside the mapped model; left out, half of all.",
    )
    int8: bool = Field(
        default=True,
        description="Products of the base in int8, as far as a check on the first batch allows.",
    )
    compute: Arithmetic = Field(
        default="fast",
        description="Arithmetic of the matrix products: fast, or f32 = exact products in float32.",
    )
