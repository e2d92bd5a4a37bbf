"""Two kinds of rows as the engine takes them: the wiring of objective/standing_rows.py to an engine.

Training and evaluation make a batch of them; generation keeps what stands, so that a step costs its noisy
rows.
Letters: B sequences, T tokens, C hidden size, N positions, V vocabulary.
"""

import numpy as np
from numpy.typing import NDArray

from ggml_diffusion.engine.interface import Batch, Context, ContextRows, Engine, Int8
from ggml_diffusion.formats.lora import LoraAdapter
from ggml_diffusion.generation.reading import ReadingRule
from ggml_diffusion.objective.standing_rows import NOTHING, NoisyRows, lay_out_rows


def rows_batch(
    rows: NoisyRows,
    causal_ratio: float,
    embedding_offset: NDArray[np.float32] | None = None,
    bernoulli_seed: int | None = None,
    *,
    n_positions: int,
) -> Batch:
    """The noisy rows with what stands beside them.

    Args:
        rows: every sequence has a noisy row at least.
        causal_ratio: of the attention mask.
        embedding_offset: (B, C), on noisy rows.
        bernoulli_seed: see `Batch`.
        n_positions: length of the texts, for models whose RoPE depends on it.

    """
    standing = rows.standing
    context = ContextRows(
        standing.tokens, standing.positions, standing.lengths, rows.seen, standing.document_ids
    )
    return Batch(
        rows.tokens,
        causal_ratio,
        rows.lengths,
        rows.groups,
        embedding_offset,
        bernoulli_seed,
        positions=rows.positions,
        n_positions=n_positions,
        context=context,
    )


class StandingText:
    """What stands of a text that is being denoised, computed once.

    Every call says anew what stands; what begins as before is not computed again.
    """

    def __init__(self, engine: Engine, n_tokens: int, adapter: LoraAdapter, rule: ReadingRule) -> None:
        """Make room for a text of `n_tokens`; the adapter of the noisy rows does not change meanwhile.

        Raises:
            UserError: not enough memory, or an engine without contexts.

        """
        self._context: Context = engine.context(n_tokens, adapter=adapter)
        self._adapter = adapter
        self._tokens = np.zeros(0, dtype=np.int32)  # that the context holds
        assert adapter.mask_token_id is not None
        self._mask_token_id = adapter.mask_token_id
        self._rule = rule

    def logits(
        self,
        tokens: NDArray[np.int32],
        group: NDArray[np.int64],
        positions: NDArray[np.int64],
        causal_ratio: float,
        embedding_offset: NDArray[np.float32] | None,
        int8: Int8,
    ) -> NDArray[np.float32]:
        """Predict masks of a group; the rest of the text stands.

        Args:
            tokens: (T,) with masks.
            group: places that are denoised together; all masks are among them.
            positions: (N,) rising, the masks to predict.
            causal_ratio: of the attention mask.
            embedding_offset: (1, C), of the noisy rows; None = nothing.
            int8: products of the frozen weights.

        Returns:
            (N, V) float32.

        """
        groups = np.full((1, len(tokens)), NOTHING, dtype=np.int32)
        groups[0, group] = 0
        masked = (tokens == self._mask_token_id)[None] & (groups != NOTHING)
        rule, text = self._rule, tokens[None]
        rows = lay_out_rows(text, text, masked, groups, None, None, rule.prediction, margin=rule.margin)
        self._stand(rows.standing.tokens[0, : rows.standing.lengths[0]], rows.standing.positions[0], int8)
        noisy = Batch(rows.tokens, causal_ratio, embedding_offset=embedding_offset, positions=rows.positions)
        return self._context.logits(noisy, self._adapter, select=np.isin(rows.targets, positions), int8=int8)

    def close(self) -> None:
        """Free the memory."""
        self._context.close()

    def _stand(self, tokens: NDArray[np.int32], positions: NDArray[np.int32], int8: Int8) -> None:
        """Let the context hold these tokens at these positions."""
        positions = positions[: len(tokens)]
        n = min(len(tokens), self._context.n_rows)
        same = (tokens[:n] == self._tokens[:n]) & (positions[:n] == self._context.positions[:n])
        n_same = n if same.all() else int(np.argmin(same))
        self._context.truncate(n_same)
        if n_same < len(tokens):
            self._context.extend(tokens[n_same:], positions[n_same:], int8=int8)
        self._tokens = tokens
