"""How a converted model is to be read: what its outputs mean and what it was trained to see.

Made from a checkpoint, and handed as one value to all that generate with the model or measure it.
Deliberately not here: the trained arrays themselves (formats/adapter_file.py).
Letters: B sequences, C hidden size.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from ggml_diffusion.engine.interface import Batch
from ggml_diffusion.errors import UserError, one_line
from ggml_diffusion.formats.adapter_file import ContextKind, DiffusionCheckpoint
from ggml_diffusion.formats.tensor_names import TIME_BIAS, TIME_WEIGHT
from ggml_diffusion.objective.corruption import NoiseSchedule
from ggml_diffusion.objective.output_rows import Prediction
from ggml_diffusion.objective.time_embedding import TimeEmbedding

TimeOffset = Callable[[NDArray[np.float32]], NDArray[np.float32]]  # t (B,) -> (B, C)


@dataclass(frozen=True)
class ReadingRule:
    """The rule of one conversion.

    Attributes:
        prediction: which output row predicts a token (output_rows.py).
        causal_ratio: of the attention mask that the conversion was saved at.
        noise_schedule: p(t), the same one as in training.
        block_size: tokens of a block if the conversion writes in blocks, one after the other with nothing
            behind it; None = it was trained on whole sequences.
        context: whether tokens that stand are the base's own, "frozen", or "adapted" as all others.
        margin: with a frozen context, tokens on each side of masks that have a noisy row as well.
        attention_sink: whether the first token of a text sees itself alone, at any causal ratio.
        prompts: whether it was trained on prompts with responses: the time then tells how much of what is to
            be written is masked, else how much of the whole text.
        time_offset: the time embedding as a function, or None if the conversion has none.

    """

    prediction: Prediction
    causal_ratio: float
    noise_schedule: NoiseSchedule
    block_size: int | None = None
    prompts: bool = False
    context: ContextKind = "adapted"
    margin: int = 0
    attention_sink: bool = False
    time_offset: TimeOffset | None = None

    @classmethod
    def of_checkpoint(cls, checkpoint: DiffusionCheckpoint) -> "ReadingRule":
        """The rule that a checkpoint states; the arrays of its time embedding are not copied.

        Raises:
            UserError: it says something impossible.

        """
        metadata, time_offset = checkpoint.metadata, None
        try:
            schedule = NoiseSchedule(checkpoint.schedule.type)  # type: ignore[arg-type]  # which it checks
            if metadata.time_max_timesteps is not None:
                weight, bias = checkpoint.tensors[TIME_WEIGHT], checkpoint.tensors[TIME_BIAS]
                embedding = TimeEmbedding(weight.shape[1], len(weight), metadata.time_max_timesteps)
                time_offset = partial(embedding.forward, weight=weight, bias=bias)
        except ValueError as error:
            raise UserError(f"adapter: {one_line(str(error))}") from None
        return cls(
            prediction=metadata.prediction,
            causal_ratio=metadata.final_causal_ratio,
            noise_schedule=schedule,
            block_size=metadata.block_size,
            prompts=metadata.prompts,
            context=metadata.context,
            margin=metadata.margin,
            attention_sink=metadata.attention_sink,
            time_offset=time_offset,
        )

    def batch(
        self,
        tokens: NDArray[np.int32],
        embedding_offset: NDArray[np.float32] | None,
        positions: NDArray[np.int32] | None = None,
    ) -> Batch:
        """Texts (B, T) with masks, as the conversion sees them where their context is adapted.

        Args:
            tokens: (B, T).
            embedding_offset: (B, C); None = nothing.
            positions: (B, T) of the rows in their texts; None = the texts are whole.

        """
        return Batch(
            tokens,
            self.causal_ratio,
            embedding_offset=embedding_offset,
            positions=positions,
            attention_sink=self.attention_sink,
        )

    def embedding_offset(self, t: NDArray[np.floating]) -> NDArray[np.float32] | None:
        """The time embedding (B, C) of times (B,), or None if the conversion has none."""
        if self.time_offset is None:
            return None
        return self.time_offset(np.ascontiguousarray(t, dtype=np.float32))
