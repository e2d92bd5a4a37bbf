"""What an evaluation is asked for: how much is measured, and how text is written for it.

Deliberately not here: which files (suite.py).
"""

from pydantic import BaseModel, ConfigDict, Field

from ggml_diffusion.generation.denoise import (
    GenerationConfig,
    Probability,
    Seed,
    ShareBelowOne,
    Temperature,
)
from ggml_diffusion.generation.sampling import RevealOrder


class EvaluationSettings(BaseModel):
    """How much is measured. One field = one setting; the flags of `evaluate` are derived from the fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sequences: int = Field(default=24, ge=1, description="Held-out sequences to measure on.")
    seeds: int = Field(default=3, ge=1, le=10_000, description="Mask seeds; the figures are means over them.")
    one_by_one: int = Field(
        default=64,
        ge=0,
        description="Tokens at each share for form (b) of the future-context gain; 0 leaves it out.",
    )
    spans: int = Field(
        default=1, ge=0, description="Spans of each length cut out of each sequence; 0 = no infilling."
    )
    candidates: int = Field(
        default=4, ge=1, le=10_000, description="Samples of the base for the re-ranked arm of infilling."
    )
    samples: int = Field(default=4, ge=0, description="Texts to write for each number of steps; 0 = none.")
    length: int = Field(default=64, ge=1, description="Tokens of such a text.")
    prompt_length: int = Field(
        default=32, ge=0, description="Tokens of held-out text that it continues; 0 = none."
    )
    order: RevealOrder = Field(
        default=RevealOrder.RANDOM, description="Which masks of such a text are revealed first."
    )
    temperature: Temperature = Field(default=1.0, description="Temperature of its draws.")
    top_p: Probability = Field(default=1.0, description="Probability that its draws are cut to.")
    threshold: Probability = Field(
        default=0.9,
        description="Probability that its tokens must reach; for the order threshold only.",
    )
    block_length: int | None = Field(
        default=None,
        ge=0,
        description="Tokens of the blocks that it is written in; 0 = all at once; left out, as the "
        "conversion was trained.",
    )
    remasking: ShareBelowOne = Field(
        default=0.0, description="Share of its tokens that each step masks again."
    )
    seed: Seed = Field(default=0, description="Seed of masks, spans, samples and texts.")
    batch_size: int = Field(default=8, ge=1, description="Sequences a forward pass; changes no figure.")

    def generation_config(self, block_size: int | None) -> GenerationConfig:
        """How text is denoised: by the settings of these names, in blocks as the conversion was trained.

        Args:
            block_size: of the conversion; None = it was trained on whole sequences.

        """
        names = (EvaluationSettings.model_fields.keys() & GenerationConfig.model_fields.keys()) - {"length"}
        shared = {name: getattr(self, name) for name in names}
        if self.block_length is None:
            shared["block_length"] = block_size or 0
        return GenerationConfig(**shared)
