"""Verified writing: a conversion with a frozen context drafts, and the base keeps what it would have written.

A round drafts masks behind the last token in one pass with the adapter, and lets the base read the draft in
the pass that would commit it anyway: each of its logits says what the base itself writes at that place. What
agrees is kept, and the base's own token after it. Draft and base draw with the same noise at each place: the
text is the one that the base writes with that seed, token for token, whatever was drafted; at temperature 0
it is the base's greedy text. Where rounds take longer a token than writing one after the other, that is done
instead, and now and then it is looked at again; the text does not depend on it.

Deliberately not here: denoising without the base's consent (denoise.py).
Sources: speculative decoding [Leviathan et al. 2023, arXiv:2211.17192]; the same noise for both sides, Gumbel
coupling [Daliri et al. 2025, arXiv:2408.07978].
Letters: T tokens, K drafted tokens, N rows, V vocabulary.
"""

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ggml_diffusion.engine.interface import Batch, Context, Engine, Int8
from ggml_diffusion.formats.lora import LoraAdapter
from ggml_diffusion.generation.denoise import GenerationConfig
from ggml_diffusion.generation.reading import ReadingRule
from ggml_diffusion.generation.sampling import keep_likely, log_softmax
from ggml_diffusion.objective.output_rows import rows_of_positions
from ggml_diffusion.randomness import Stream, generator_of

DRAFT_LENGTH = 4
TRIED_FIRST = 4  # rounds, and single tokens, before their times are compared
LOOKED_AT_AGAIN = 32  # tokens


@dataclass
class VerifiedText:
    """What was written, and how.

    Attributes:
        tokens: (T,) those written, up to the first end.
        rounds: drafts that were checked.
        drafted: tokens in them.
        accepted: of these what the base kept.
        singles: tokens that the base wrote one after the other.

    """

    tokens: NDArray[np.int32]
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0
    singles: int = 0

    @property
    def tokens_a_round(self) -> float:
        """What a round writes: the accepted tokens and one of the base's own."""
        return self.accepted / self.rounds + 1.0 if self.rounds else 0.0


class VerifiedWriter:
    """Writes behind a prompt; one text at a time."""

    def __init__(
        self,
        engine: Engine,
        adapter: LoraAdapter,
        rule: ReadingRule,
        config: GenerationConfig,
        int8: Int8,
        *,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        assert adapter.mask_token_id is not None
        self._engine, self._adapter, self._rule, self._config, self._int8 = (
            engine,
            adapter,
            rule,
            config,
            int8,
        )
        self._mask_token_id = adapter.mask_token_id
        self._clock = clock
        self._draft_length = config.block_length or DRAFT_LENGTH

    def write(
        self,
        prompt: NDArray[np.int32],
        ends: Collection[int] = (),
        on_tokens: Callable[[NDArray[np.int32]], None] | None = None,
    ) -> VerifiedText:
        """Write up to `config.length` tokens behind a prompt (T,), or to the first of `ends`.

        `on_tokens` is told all that is written so far.

        Raises:
            UserError: not enough memory, or an engine without contexts.

        """
        n_tokens = len(prompt) + self._config.length + self._draft_length
        context = self._engine.context(n_tokens, adapter=self._adapter, drafts=True)
        try:
            return self._write(context, prompt, ends, on_tokens)
        finally:
            context.close()

    def _write(
        self,
        context: Context,
        prompt: NDArray[np.int32],
        ends: Collection[int],
        on_tokens: Callable[[NDArray[np.int32]], None] | None,
    ) -> VerifiedText:
        result, pace = VerifiedText(np.zeros(0, np.int32)), _Pace()
        is_last = np.arange(len(prompt)) == len(prompt) - 1
        logits = context.extend(prompt, select=is_last, int8=self._int8)
        written = [self._drawn(logits[0], len(prompt))]
        while len(written) < self._config.length and written[-1] not in ends:
            # The last token is not in the context yet: it is read with the draft, or by itself.
            n_draft = min(self._draft_length, self._config.length - len(written))
            drafts, started_s = pace.prefers_drafts and n_draft > 1, self._clock()
            if drafts:
                text = np.concatenate([prompt, np.array(written, dtype=np.int32)])
                new = self._round(context, text, n_draft, result)
            else:
                new = [self._single(context, written[-1])]
                result.singles += 1
            pace.add(self._clock() - started_s, len(new), is_round=drafts)
            first_end = next((i for i, token in enumerate(new) if token in ends), len(new))
            written += new[: first_end + 1]
            if on_tokens is not None:
                on_tokens(np.array(written, dtype=np.int32))
        result.tokens = np.array(written[: self._config.length], dtype=np.int32)
        return result

    def _round(
        self, context: Context, text: NDArray[np.int32], n_draft: int, result: VerifiedText
    ) -> list[int]:
        """Draft behind a text (T,), and keep what the base would have written, with its next token."""
        place = context.n_rows
        drafted = self._draft(context, text, n_draft)
        block = np.array([text[-1], *drafted], dtype=np.int32)
        logits = context.extend(block, select=np.ones(len(block), dtype=bool), int8=self._int8)
        own = [self._drawn(row, place + 1 + i) for i, row in enumerate(logits)]
        n_kept = next((i for i, token in enumerate(drafted) if token != own[i]), n_draft)
        context.truncate(place + 1 + n_kept)
        result.rounds += 1
        result.drafted += n_draft
        result.accepted += n_kept
        return own[: n_kept + 1]

    def _draft(self, context: Context, text: NDArray[np.int32], n_draft: int) -> list[int]:
        """What the conversion puts into `n_draft` masks behind a text (T,), in one pass.

        The last token has a row in any case, since the context does not hold it yet; with a margin more of
        them have.
        """
        place = context.n_rows
        before = text[-max(1, self._rule.margin) :]
        tokens = np.concatenate([before, np.full(n_draft, self._mask_token_id, dtype=np.int32)])[None]
        first = place + 1 - len(before)
        positions = np.arange(first, first + tokens.shape[1], dtype=np.int32)[None]
        offset = self._rule.embedding_offset(np.ones(1, dtype=np.float32))
        rows = Batch(tokens, self._rule.causal_ratio, embedding_offset=offset, positions=positions)
        masks = np.arange(len(before), tokens.shape[1])
        select = np.isin(np.arange(tokens.shape[1]), rows_of_positions(masks, self._rule.prediction))[None]
        logits = context.logits(rows, self._adapter, select=select, int8=self._int8)
        return [self._drawn(row, place + 1 + i) for i, row in enumerate(logits)]

    def _single(self, context: Context, last: int) -> int:
        """The base's next token."""
        logits = context.extend([last], select=[True], int8=self._int8)
        return self._drawn(logits[0], context.n_rows)

    def _drawn(self, logits: NDArray[np.float32], place: int) -> int:
        """The token (V,) that a place gets: the same noise for whoever asks."""
        config = self._config
        logits = logits.copy()
        logits[self._mask_token_id] = -np.inf
        if config.temperature == 0.0:
            return int(logits.argmax())
        kept, values = keep_likely(
            log_softmax(logits[None])[0],
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
        )
        noise = generator_of(config.seed, place, Stream.DENOISING).gumbel(size=len(logits))
        return int(kept[(values + noise[kept]).argmax()])


class _Pace:
    """Seconds a token in rounds and one by one, and which of the two is due."""

    def __init__(self) -> None:
        self._time_s, self._tokens, self._calls = [0.0, 0.0], [0, 0], [0, 0]  # one by one, in rounds
        self._since_other = 0  # tokens since the slower way was looked at

    @property
    def prefers_drafts(self) -> bool:
        """Whether the next tokens are drafted."""
        for is_round in (True, False):
            if self._calls[is_round] < TRIED_FIRST:
                return is_round
        drafts_win = self._time_s[True] * self._tokens[False] <= self._time_s[False] * self._tokens[True]
        return drafts_win != (self._since_other >= LOOKED_AT_AGAIN)

    def add(self, time_s: float, n_tokens: int, *, is_round: bool) -> None:
        """Count what was done."""
        looked = self._since_other >= LOOKED_AT_AGAIN
        self._time_s[is_round] += time_s
        self._tokens[is_round] += n_tokens
        self._calls[is_round] += 1
        self._since_other = 0 if looked else self._since_other + n_tokens
