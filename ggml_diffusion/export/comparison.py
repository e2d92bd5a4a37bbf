"""What another runtime makes of a conversion beside the engine's base + adapter: on one built-in text.

60 tokens of English, every third of them masked, at a fixed time: small enough to be measured whenever a file
is written. In models with windows it is no longer than these, since llama.cpp without a causal mask bounds
the past alone. The engine computes in float32 throughout, without int8, and so is exact up to rounding.

Deliberately not here: the runtimes (llama_runtime.py), tolerances (verify.py).
Letters: T tokens, C hidden size, V vocabulary.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from ggml_diffusion.engine.interface import Batch, Engine
from ggml_diffusion.engine.llama_engine import llama_embedding_scale
from ggml_diffusion.formats.adapter_file import DiffusionCheckpoint
from ggml_diffusion.formats.model_check import window_of
from ggml_diffusion.generation.reading import ReadingRule
from ggml_diffusion.text.prompts import with_start
from ggml_diffusion.text.tokenizer import Tokenizer
from ggml_diffusion.training.identity import mean_kl_divergence

TEXT = (
    "The harbour was quiet before the boats came in. A woman in a blue coat walked along the wall, counting "
    "the lamps, and at the last of them she stopped to read a letter that she had read many times. When the "
    "first engine could be heard behind the rocks she folded the paper, put it into her pocket, and went "
    "down the stairs to help the men with their ropes and baskets, as she did every morning of that summer."
)
N_TOKENS, MASK_EVERY = 60, 3


@dataclass(frozen=True)
class Agreement:
    """How near a runtime's predictions are.

    Attributes:
        mean_kl: KL(engine || runtime) in nats, mean over the positions; the mask token is left out of both.
        top1: share of positions at which both have the same likeliest token.
        n_tokens: positions.

    """

    mean_kl: float
    top1: float
    n_tokens: int


class Reference:
    """The engine's base + adapter on the built-in text.

    Attributes:
        tokens: (T,) int32, masks included.
        time: diffusion time of the time embedding, None without one.

    """

    def __init__(
        self, engine: Engine, tokenizer: Tokenizer, checkpoint: DiffusionCheckpoint, time: float | None = None
    ) -> None:
        """Tokenise and mask the text.

        Args:
            engine: the base.
            tokenizer: of the base.
            checkpoint: the conversion; must fit.
            time: None = where as much is masked as it is here.

        """
        rule = ReadingRule.of_checkpoint(checkpoint)
        self._engine, self._checkpoint, self._rule = engine, checkpoint, rule
        n_tokens = min(N_TOKENS, engine.file.context_length, window_of(engine.file) or N_TOKENS)
        self.tokens = np.array(with_start(tokenizer.encode(TEXT), tokenizer)[:n_tokens], dtype=np.int32)
        self.tokens[MASK_EVERY - 1 :: MASK_EVERY] = checkpoint.metadata.mask_token_id
        if time is None and rule.time_offset is not None:
            time = rule.noise_schedule.time_at(1 / MASK_EVERY)
        self.time = time if rule.time_offset is not None else None

    @property
    def offset(self) -> NDArray[np.float32] | None:
        """The time embedding (1, C), or None."""
        return None if self.time is None else self._rule.embedding_offset(np.array([self.time], np.float32))

    @property
    def embeddings(self) -> NDArray[np.float32]:
        """What goes into the network, (T, C): token, mask and time embeddings."""
        rows: NDArray[np.float32] = self._engine.embed(self.tokens[None])[0]
        adapter = self._checkpoint.adapter()
        if adapter.mask_embedding is not None:
            rows[self.tokens == adapter.mask_token_id] += adapter.mask_embedding
        offset = self.offset
        return rows if offset is None else rows + offset

    @property
    def llama_embeddings(self) -> NDArray[np.float32]:
        """The same as llama.cpp takes it, which scales a Gemma 3's tokens, and nothing given instead."""
        scaled: NDArray[np.float32] = self.embeddings * np.float32(llama_embedding_scale(self._engine.file))
        return scaled

    @cached_property
    def base_logits(self) -> NDArray[np.float32]:
        """The base's on the same tokens, causal and without adapter, (T, V)."""
        logits: NDArray[np.float32] = self._engine.logits(Batch(self.tokens[None]))[0]
        return logits

    @cached_property
    def logits(self) -> NDArray[np.float32]:
        """The engine's own, (T, V)."""
        batch = self._rule.batch(self.tokens[None], self.offset)
        logits: NDArray[np.float32] = self._engine.logits(batch, self._checkpoint.adapter())[0]
        return logits

    def agreement(self, logits: NDArray[np.float32]) -> Agreement:
        """How near another runtime's logits (T, V) on the same input are."""
        mask = self._checkpoint.metadata.mask_token_id
        ours, theirs = (np.delete(one, mask, axis=1) for one in (self.logits, logits))
        same = ours.argmax(axis=1) == theirs.argmax(axis=1)
        return Agreement(mean_kl_divergence(ours, theirs), float(same.mean()), len(same))
