"""Steps of an adapted context over keys and values that are kept from the first step of a block.

The first step of a block is a whole pass, and exact. The steps that follow compute the block's own rows
again; all others, in front of it and behind, stay as they were in that pass, though with a mask that looks
ahead and an adapter on all rows they would change a little with each token that is written.

Deliberately not here: contexts that are exact (frozen_context.py).
Source: the prefix and suffix cache of Fast-dLLM [Wu et al. 2025, arXiv:2505.22618].
Letters: T tokens, N positions, V vocabulary, C hidden size.
"""

import numpy as np
from numpy.typing import NDArray

from ggml_diffusion.engine.interface import Context, Engine, Int8
from ggml_diffusion.formats.lora import LoraAdapter
from ggml_diffusion.generation.reading import ReadingRule
from ggml_diffusion.objective.output_rows import rows_of_positions


class ApproximateText:
    """What is kept of a text while a block of it is denoised."""

    def __init__(self, engine: Engine, n_tokens: int, adapter: LoraAdapter, rule: ReadingRule) -> None:
        """Make room for a text of `n_tokens`; the adapter does not change meanwhile.

        Raises:
            UserError: not enough memory, or an engine without contexts.

        """
        self._context: Context = engine.context(n_tokens, adapter=adapter)
        self._adapter = adapter
        self._rule = rule
        self._kept = np.zeros(
            0, dtype=np.int32
        )  # the text of the whole pass, with -1 where a row is not kept

    def logits(
        self,
        tokens: NDArray[np.int32],
        block: NDArray[np.int64],
        positions: NDArray[np.int64],
        embedding_offset: NDArray[np.float32] | None,
        int8: Int8,
    ) -> NDArray[np.float32]:
        """Predict masks of a block.

        Args:
            tokens: (T,) with masks.
            block: places that are denoised together.
            positions: (N,) rising, the masks to predict.
            embedding_offset: (1, C); None = nothing.
            int8: products of the frozen weights.

        Returns:
            (N, V) float32.

        """
        fresh = np.zeros(len(tokens), dtype=bool)
        fresh[block] = fresh[rows_of_positions(block, self._rule.prediction)] = True
        wanted = np.zeros(len(tokens), dtype=bool)
        wanted[rows_of_positions(positions, self._rule.prediction)] = True
        outside = np.where(fresh, -1, tokens)
        if not np.array_equal(outside, self._kept):
            self._kept = outside
            whole = self._rule.batch(tokens[None], embedding_offset)
            return self._context.refill(whole, self._adapter, keep=~fresh, select=wanted, int8=int8)
        places = np.flatnonzero(fresh).astype(np.int32)
        rows = self._rule.batch(tokens[None, fresh], embedding_offset, places[None])
        return self._context.logits(rows, self._adapter, select=wanted[None, fresh], int8=int8)

    def close(self) -> None:
        """Free the memory."""
        self._context.close()
