"""Fill the holes of a text of any length, and find out how long each is to be.

A text is filled through a window around its holes. Holes that fit into one window with text around them are
denoised together, the surest token first, wherever it is. A hole without a length is filled at every length
up to the most; the one is taken that fits best (`_Judge`).

What a person typed in front of a hole often ends with a blank, which in most vocabularies belongs to the next
word's token: the model sees the text without it, and the hole has to begin with it.

Deliberately not here: what marks a hole, and the bytes around it (text/marked_holes.py); the denoising loop
(denoise.py).
Letters: T tokens, V vocabulary.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from ggml_diffusion.engine.interface import Batch, Context
from ggml_diffusion.errors import UserError
from ggml_diffusion.generation.denoise import (
    DenoisingStep,
    GenerationConfig,
    Probability,
    Seed,
    Temperature,
)
from ggml_diffusion.generation.diffusion_model import DiffusionModel
from ggml_diffusion.generation.frozen_context import StandingText
from ggml_diffusion.generation.sampling import log_softmax

# Text on both sides while lengths are compared. An adapted context is computed anew in every step.
_LEFT, _RIGHT = 256, 48
_LEFT_ADAPTED = 96
_JUDGED = 24  # tokens behind a hole that say how well it fits
# How much a candidate's own likelihood counts beside that of what follows, and what a token of a text costs
# the base on average, so that it counts neither for nor against longer ones (docs/results/frozen_context.md).
_OWN_SHARE, _NATS_A_TOKEN = 0.3, 2.5
_PATIENCE = 4  # so many longer ones than the best are tried, and no more

# A cut of a text so long that no window reaches across.
_GAP = -1
_CHARS_A_TOKEN = 16


class InfillConfig(BaseModel):
    """How holes are filled. The flags of `infill` are derived from the fields."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    length: int | None = Field(
        default=None,
        ge=1,
        le=4096,
        description="Tokens of every hole whose marker says none; left out, found.",
    )
    at_most: int = Field(
        default=16, ge=1, le=256, description="Most tokens of a hole whose length is to be found."
    )
    window: int = Field(default=1024, ge=64, description="Tokens of the text that the model sees at once.")
    temperature: Temperature = Field(
        default=0.0, description="Temperature of the draw; 0 takes the likeliest token."
    )
    top_k: int = Field(default=0, ge=0, description="Draw from the k likeliest tokens only; 0 = from all.")
    top_p: Probability = Field(
        default=0.9, description="Draw from the smallest set of tokens that holds this probability."
    )
    seed: Seed = Field(default=0, description="Seed of the draws; the same seed gives the same text.")
    approximate_cache: bool = Field(
        default=False,
        description="With an adapted context: compute the text around holes once, and not in every step. "
        "Faster, and the text may be another one.",
    )


@dataclass(frozen=True)
class FilledHole:
    """What came into a hole.

    Attributes:
        text: to be put between the texts beside it, as they are.
        tokens: (n,) it was read from.
        probabilities: (n,), the conversion's, of each when it was written.
        tried: lengths that were compared, and how well each fits, in nats; empty where the length was given.

    """

    text: str
    tokens: NDArray[np.int32]
    probabilities: NDArray[np.float64]
    tried: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class InfillStep:
    """What a denoising step left behind.

    Attributes:
        n_done, n_holes: how many holes are filled, of how many.
        denoising: the step, in a window of the text.
        places: first token in the window, and tokens, of each hole that is denoised in it; the same hole
            comes at several lengths while these are compared.

    """

    n_done: int
    n_holes: int
    denoising: DenoisingStep
    places: dict[int, tuple[int, int]]


OnInfill = Callable[[InfillStep], None]


def infill(
    model: DiffusionModel,
    texts: Sequence[str],
    lengths: Sequence[int | None],
    config: InfillConfig | None = None,
    on_step: OnInfill | None = None,
) -> list[FilledHole]:
    """Fill the holes between texts.

    Args:
        model: the conversion.
        texts: what stands before, between and behind the holes, one more than there are.
        lengths: of each hole in tokens; None = as the config says.
        config: None = the defaults.
        on_step: called after every step.

    Raises:
        UserError: a text contains the mask token, holes are longer than the window has room for, or as
            `DiffusionModel.fill`.

    """
    return _Infilling(model, texts, lengths, config or InfillConfig(), on_step).run()


class _Infilling:
    """The text as tokens, and what has been filled of it so far."""

    def __init__(
        self,
        model: DiffusionModel,
        texts: Sequence[str],
        lengths: Sequence[int | None],
        config: InfillConfig,
        on_step: OnInfill | None,
    ) -> None:
        self._model = model
        self._config = config
        self._on_step = on_step
        self._window = min(config.window, model.engine.file.context_length)
        self._lengths = [config.length if length is None else length for length in lengths]
        self._begins_with_blank = [_ends_with_blank(text) for text in texts[:-1]]
        trimmed = [
            text[:-1] if blank else text
            for text, blank in zip(texts, [*self._begins_with_blank, False], strict=True)
        ]
        self._texts = [self._encode(text, continued=index > 0) for index, text in enumerate(trimmed)]
        self._is_hidden = model.tokenizer.sizes == 0
        self._has_no_blank = ~model.tokenizer.begins_with_blank
        self._done: list[FilledHole] = []

    def run(self) -> list[FilledHole]:
        """Fill window by window, from the left."""
        while len(self._done) < len(self._lengths):
            first = len(self._done)
            left = self._left_of(first)
            tried: list[tuple[tuple[int, float], ...]] = []
            lengths: list[int] = []
            while first + len(lengths) < len(self._lengths) and self._has_room(first, lengths):
                length, how_well = self._length_of(first + len(lengths), left, lengths)
                lengths.append(length)
                tried.append(how_well)
            self._done += self._fill(first, left, lengths, tried)
        return self._done

    def _encode(self, text: str, *, continued: bool) -> NDArray[np.int32]:
        """A text's tokens; of a very long one its ends, with a gap between."""
        limit = _CHARS_A_TOKEN * self._window
        encode = self._model.tokenizer.encode
        if len(text) <= 2 * limit:
            tokens = encode(text, continued=continued)
        else:
            ends = encode(text[:limit], continued=continued), encode(text[-limit:], continued=True)
            tokens = np.concatenate([ends[0], [_GAP], ends[1]]).astype(np.int32)
        if (tokens == self._model.mask_token_id).any():
            raise UserError("the text contains the mask token as text: leave that out")
        return tokens

    def _left_of(self, hole: int) -> NDArray[np.int32]:
        """What stands before a hole, half a window of it."""
        parts = [self._texts[0]]
        for filled, text in zip(self._done[:hole], self._texts[1:], strict=False):
            parts += [filled.tokens, text]
        return _after_gap(np.concatenate(parts))[-(self._window // 2) :]

    def _right_of(self, hole: int) -> NDArray[np.int32]:
        """What stands behind a hole, up to the next one."""
        return _before_gap(self._texts[hole + 1])

    def _ends_text(self, hole: int) -> bool:
        """Whether nothing stands behind a hole, and no other one."""
        return hole == len(self._lengths) - 1 and len(self._texts[-1]) == 0

    def _has_room(self, first: int, lengths: list[int]) -> bool:
        """Whether the next hole fits into the window of those from `first` on, with what lies between; the
        first of a window always does."""
        if not lengths:
            return True
        between = self._texts[first + 1 : first + len(lengths) + 1]
        if any((text == _GAP).any() for text in between):
            return False
        next_length = self._lengths[first + len(lengths)] or self._config.at_most
        return sum(lengths) + sum(map(len, between)) + next_length <= self._window // 4

    def _length_of(
        self, hole: int, left: NDArray[np.int32], before: list[int]
    ) -> tuple[int, tuple[tuple[int, float], ...]]:
        """How long a hole is to be; `before` are the lengths of those between `left` and it."""
        given = self._lengths[hole]
        right = self._right_of(hole)[:_RIGHT]
        if given is not None:
            return given, ()
        if len(right) == 0:  # nothing that a length could fit: to the end of the text, or up to the next hole
            return self._config.at_most if self._ends_text(hole) else 1, ()
        start = hole - len(before)
        if before:
            filled = self._fill(start, left, before, [()] * len(before))
            between = [
                part
                for index, one in enumerate(filled)
                for part in (one.tokens, self._texts[start + index + 1])
            ]
            left = np.concatenate([left, *between]).astype(np.int32)
        is_frozen = self._model.rule.context == "frozen"
        left = self._model.start_tokens(left[-(_LEFT if is_frozen else _LEFT_ADAPTED) :])
        tried = self._try_lengths(hole, left, right)
        return max(tried, key=lambda one: one[1])[0], tuple(tried)

    def _try_lengths(
        self, hole: int, left: NDArray[np.int32], right: NDArray[np.int32]
    ) -> list[tuple[int, float]]:
        """Lengths, and how well what comes into a hole of each fits."""
        room = self._model.engine.file.context_length - len(left) - len(right)
        most = max(1, min(self._config.at_most, room))
        tried: list[tuple[int, float]] = []
        with _Judge(self._model, left, right[:_JUDGED], most) as judge:
            standing = self._model.open_standing(len(left) + most + len(right))
            try:
                for length in range(1, most + 1):
                    filled = self._denoise([left, right], [length], [hole], standing)[0][0]
                    tried.append((length, judge.how_well(filled)))
                    if length - max(tried, key=lambda one: one[1])[0] >= _PATIENCE:
                        break
            finally:
                if standing is not None:
                    standing.close()
        return tried

    def _fill(
        self,
        first: int,
        left: NDArray[np.int32],
        lengths: list[int],
        tried: list[tuple[tuple[int, float], ...]],
    ) -> list[FilledHole]:
        """Fill the holes of a window together."""
        holes = list(range(first, first + len(lengths)))
        between = self._texts[first + 1 : first + len(lengths)]
        inner = sum(lengths) + sum(map(len, between))
        if inner + 2 > self._window:
            raise UserError(
                f"holes of {sum(lengths)} tokens do not fit into a window of {self._window}: shorten them"
            )
        right = self._right_of(holes[-1])[: (self._window - inner) // 2]
        room = self._window - inner - len(right) - 1  # a token in front of the text
        left = self._model.start_tokens(left[-room:] if room > 0 else left[:0])
        parts = self._denoise([left, *between, right], lengths, holes)
        result = []
        for index, (tokens, probabilities) in zip(holes, parts, strict=True):
            text = self._text_of(index, tokens)
            result.append(FilledHole(text, tokens, probabilities, tried[index - first]))
        return result

    def _denoise(
        self,
        texts: list[NDArray[np.int32]],
        lengths: list[int],
        holes: list[int],
        standing: StandingText | None = None,
    ) -> list[tuple[NDArray[np.int32], NDArray[np.float64]]]:
        """Tokens and probabilities of holes of these lengths between texts."""
        parts, starts, at = [texts[0]], [], len(texts[0])
        for length, text in zip(lengths, texts[1:], strict=True):
            starts.append(at)
            parts += [np.full(length, self._model.mask_token_id, dtype=np.int32), text]
            at += length + len(text)
        never: dict[int, NDArray[np.bool_]] = {}
        for start, length, hole in zip(starts, lengths, holes, strict=True):
            if not self._ends_text(hole):  # else the text may end in it
                never |= dict.fromkeys(range(start, start + length), self._is_hidden)
            if self._begins_with_blank[hole]:
                never[start] = self._has_no_blank
        config = GenerationConfig(
            block_length=0,
            temperature=self._config.temperature,
            top_k=self._config.top_k,
            top_p=self._config.top_p,
            seed=self._config.seed,
            approximate_cache=self._config.approximate_cache,
        )
        scores = np.zeros(at)
        places = dict(zip(holes, zip(starts, lengths, strict=True), strict=True))

        def on_step(step: DenoisingStep) -> None:
            scores[:] = step.scores
            if self._on_step is not None:
                self._on_step(InfillStep(len(self._done), len(self._lengths), step, places))

        filled = self._model.fill(np.concatenate(parts), config, on_step, never=never, standing=standing)
        return [
            (filled[start : start + length], scores[start : start + length])
            for start, length in zip(starts, lengths, strict=True)
        ]

    def _text_of(self, hole: int, tokens: NDArray[np.int32]) -> str:
        """A hole's text, up to the first end-of-text, without the blank that is there already."""
        tokenizer = self._model.tokenizer
        is_end = np.isin(
            tokens, [*tokenizer.end_ids, *([] if tokenizer.eos_id is None else [tokenizer.eos_id])]
        )
        if is_end.any():
            tokens = tokens[: int(np.argmax(is_end))]
        continued = hole > 0 or len(self._texts[0]) > 0
        text = tokenizer.decode(tokens, continued=continued or self._begins_with_blank[hole])
        return text.removeprefix(" ") if self._begins_with_blank[hole] else text


class _Judge:
    """Says how well texts fit between two others, in nats: the base's log-probability of what follows, and by
    a smaller share of the text itself, less what as many tokens cost on average."""

    def __init__(
        self, model: DiffusionModel, left: NDArray[np.int32], right: NDArray[np.int32], longest: int
    ) -> None:
        self._model, self._left, self._right = model, left, right
        self._context: Context | None = None
        if model.rule.context == "frozen":  # by an engine that has contexts
            self._context = model.engine.context(len(left) + longest + len(right))
            if len(left) > 1:
                self._context.extend(left[:-1], int8=model.int8)

    def __enter__(self) -> "_Judge":
        return self

    def __exit__(self, *_: object) -> None:
        if self._context is not None:
            self._context.close()

    def how_well(self, tokens: NDArray[np.int32]) -> float:
        """Of tokens (n,)."""
        text = np.concatenate([self._left, tokens, self._right])
        start, int8 = len(self._left) - 1, self._model.int8
        if self._context is None:
            select = np.arange(len(text) - 1)[None] >= start
            logits = self._model.engine.logits(Batch(text[None, :-1]), select=select, int8=int8)
        else:
            rows = text[None, start:-1]
            positions = np.arange(start, len(text) - 1, dtype=np.int32)[None]
            select = np.ones(rows.shape, dtype=bool)
            logits = self._context.logits(Batch(rows, positions=positions), select=select, int8=int8)
        said = log_softmax(logits)[np.arange(len(logits)), text[start + 1 :]]
        own, following = said[: len(tokens)], said[len(tokens) :]
        return float(following.sum() + _OWN_SHARE * (own + _NATS_A_TOKEN).sum())


def _ends_with_blank(text: str) -> bool:
    """Whether a text ends with one blank behind a word."""
    return text.endswith(" ") and not text[:-1].endswith((" ", "\t", "\n", "\r")) and len(text) > 1


def _after_gap(tokens: NDArray[np.int32]) -> NDArray[np.int32]:
    gaps = np.flatnonzero(tokens == _GAP)
    return tokens[gaps[-1] + 1 :] if len(gaps) else tokens


def _before_gap(tokens: NDArray[np.int32]) -> NDArray[np.int32]:
    gaps = np.flatnonzero(tokens == _GAP)
    return tokens[: gaps[0]] if len(gaps) else tokens
