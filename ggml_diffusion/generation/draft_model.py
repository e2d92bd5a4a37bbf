"""A conversion that drafts for llama-cpp-python, whose `Llama` keeps of a draft what it writes itself.

    llama = llama_cpp.Llama("model.gguf", draft_model=DiffusionDraftModel(model))

The text is that of `Llama` alone, as far as llama.cpp computes the same for several tokens as for one: on
quantised models it rounds differently. A draft costs a pass with a frozen context, and a pass over all of the
text with an adapted one, which is rarely worth it.

Deliberately not here: checking the drafts, which llama-cpp-python does.
Source: llama-cpp-python, llama_cpp/llama_speculative.py. Letters: T tokens so far, K drafted ones.
"""

from typing import Any

import numpy as np
from llama_cpp.llama_speculative import LlamaDraftModel
from numpy.typing import NDArray

from ggml_diffusion.generation.denoise import GenerationConfig
from ggml_diffusion.generation.diffusion_model import DiffusionModel
from ggml_diffusion.generation.frozen_context import StandingText
from ggml_diffusion.generation.verified import DRAFT_LENGTH

_FIRST_ROOM = 512  # tokens; doubled when a text outgrows it


class DiffusionDraftModel(LlamaDraftModel):
    """Drafts the next tokens in one pass. Not safe for calls from several threads at once."""

    def __init__(self, model: DiffusionModel, n_tokens: int = DRAFT_LENGTH) -> None:
        """Draft with a conversion of the model that `Llama` runs.

        Args:
            model: the conversion.
            n_tokens: K.

        """
        if n_tokens < 1:
            raise ValueError(f"a draft has at least one token, not {n_tokens}")
        self._model = model
        self._n_tokens = n_tokens
        self._standing: StandingText | None = None
        self._room = 0

    def __call__(self, input_ids: NDArray[np.intc], /, **_: Any) -> NDArray[np.intc]:
        """The likeliest next tokens (K,), or none (0,) where the model has no room for them.

        Args:
            input_ids: (T,), the text so far.

        """
        n_tokens = len(input_ids) + self._n_tokens
        mask = self._model.mask_token_id
        if len(input_ids) == 0 or n_tokens > self._model.engine.file.context_length or mask in input_ids:
            return np.empty(0, dtype=np.intc)
        if n_tokens > self._room:
            self.close()
            self._room = min(max(_FIRST_ROOM, 2 * n_tokens), self._model.engine.file.context_length)
            self._standing = self._model.open_standing(self._room)
        masks = np.full(self._n_tokens, mask, dtype=np.int32)
        config = GenerationConfig(steps=1, temperature=0.0, block_length=0)
        text = np.concatenate([input_ids.astype(np.int32), masks])
        return self._model.fill(text, config, standing=self._standing)[len(input_ids) :].astype(np.intc)

    def close(self) -> None:
        """Free what is kept between drafts."""
        if self._standing is not None:
            self._standing.close()
            self._standing = None
        self._room = 0
