"""What is written for each kind of request, on the writer's thread.

Text at an end is written by the denoising loop, `length` or `max_tokens` tokens at most. Text between others
goes through `infill`, which finds how long it is to be; `length` fixes it. Of a text that is too long, what
is nearest to the hole is kept, and the number of tokens that were left out is told.

Deliberately not here: the queue (writer.py), the answers' form (answers.py).
Letters: T tokens.
"""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggml_diffusion.app.server.growing import GrowingText
from ggml_diffusion.app.server.requests import (
    DEFAULT_TOKENS,
    ChatRequest,
    CompletionRequest,
    InfillRequest,
    PageRequest,
    RequestError,
    Sampling,
)
from ggml_diffusion.app.server.writer import Tell
from ggml_diffusion.errors import UserError
from ggml_diffusion.generation.denoise import DenoisingStep, GenerationConfig
from ggml_diffusion.generation.diffusion_model import DiffusionModel
from ggml_diffusion.generation.infill import InfillConfig, InfillStep, infill
from ggml_diffusion.text.marked_holes import fill_in, find_holes, texts_between

DEFAULT_AT_MOST, MOST_FOUND = 16, 32  # tokens of a hole whose length is found; trying longer ones takes long
_MAX_HOLES = 256


@dataclass(frozen=True)
class State:
    """A text while it is written: what stands of it since the last state, and the tokens, None = a mask."""

    piece: str
    step: int
    n_steps: int
    tokens: list[str | None]


@dataclass(frozen=True)
class Written:
    """A text that is done; `piece` is what no state had of it."""

    text: str
    piece: str
    n_prompt: int
    n_written: int
    n_dropped: int
    is_cut: bool  # by the length
    seed: int
    time_s: float


class _Stopped(Exception):
    """A stop string came."""


def complete(model: DiffusionModel, request: CompletionRequest, tell: Tell) -> Written:
    """A text behind a prompt, or between it and a suffix."""
    if request.suffix and request.length is None:
        most = _wanted(request.max_tokens, DEFAULT_AT_MOST)
        return fill_between(model, request.prompt, request.suffix, request, most, tell)
    length = request.length or _wanted(request.max_tokens, DEFAULT_TOKENS)
    room = model.engine.file.context_length - length - 1
    if room < 1:
        raise _too_long(length, model)
    before = model.tokenizer.encode(request.prompt)
    after = model.tokenizer.encode(request.suffix, continued=True)
    kept_after = after[: room // 2 if len(after) else 0]
    kept_before = before[max(0, len(before) - (room - len(kept_after))) :]
    n_dropped = len(before) + len(after) - len(kept_before) - len(kept_after)
    start = model.start_tokens(kept_before)
    return _write(model, start, kept_after, length, request, n_dropped, frozenset(), tell)


def chat(model: DiffusionModel, request: ChatRequest, tell: Tell) -> Written:
    """An answer to messages."""
    asked = (request.max_completion_tokens, request.max_tokens, request.n_predict)
    most = next((value for value in asked if value is not None), None)
    length = request.length or _wanted(most, DEFAULT_TOKENS)
    before = model.chat_tokens(request.messages)
    if len(before) + length > model.engine.file.context_length:
        raise _too_long(len(before) + length, model)
    nothing = np.empty(0, dtype=np.int32)
    return _write(model, before, nothing, length, request, 0, model.tokenizer.end_ids, tell)


def fill_in_editor(model: DiffusionModel, request: InfillRequest, tell: Tell) -> Written:
    """What an editor asks for: `n_predict` tokens at most, between a prefix and a suffix."""
    before = "".join(chunk.text for chunk in request.input_extra) + request.input_prefix + request.prompt
    most = _wanted(request.n_predict, DEFAULT_AT_MOST)
    return fill_between(model, before, request.input_suffix, request, most, tell)


def fill_between(
    model: DiffusionModel, before: str, after: str, request: Sampling, most: int, tell: Tell
) -> Written:
    """A text of up to `most` tokens between two; drawn without temperature unless it is given."""
    _refuse_denoising(request)
    started_s = time.perf_counter()
    seed = _seed(request)
    settings = {**request.drawing(), "seed": seed, "length": request.length}
    config = InfillConfig(at_most=min(most, MOST_FOUND), **settings)

    def on_step(step: InfillStep) -> None:
        tell(State("", step.denoising.step, step.denoising.n_steps, _hole_tokens(model, step, 0)))

    filled = infill(model, [before, after], [None], config, on_step)[0]
    text = GrowingText(request.stop).cut(filled.text)
    n_before, n_after = (
        len(model.tokenizer.encode(before)),
        len(model.tokenizer.encode(after, continued=True)),
    )
    window, n_hole = min(config.window, model.engine.file.context_length), len(filled.tokens)
    kept_after = min(n_after, (window - n_hole) // 2)
    kept_before = min(n_before, window // 2, window - n_hole - kept_after - 1)
    return Written(
        text=text,
        piece=text,
        n_prompt=kept_before + kept_after,
        n_written=n_hole,
        n_dropped=n_before + n_after - kept_before - kept_after,
        is_cut=n_hole >= (request.length or config.at_most) and text == filled.text,
        seed=seed,
        time_s=time.perf_counter() - started_s,
    )


def fill_page(model: DiffusionModel, request: PageRequest, tell: Tell) -> dict[str, Any]:
    """The holes of a text; tells each state as {"hole": {index: tokens}}, returns text and holes."""
    _refuse_denoising(request)
    document = request.text.encode()
    try:
        holes = find_holes(document)
    except UserError as error:
        raise RequestError(str(error), field="text") from None
    if len(holes) > _MAX_HOLES:
        raise RequestError(f"{len(holes)} holes are more than {_MAX_HOLES}", field="text")
    settings = {**request.drawing(), "seed": _seed(request), "length": request.length}
    config = InfillConfig(at_most=request.at_most, **settings)

    texts_beside = texts_between(document, holes)

    def tokens_of(step: InfillStep, index: int) -> list[str | None]:
        tokens = _hole_tokens(model, step, index)
        if tokens and tokens[0] is not None and texts_beside[index].endswith(" "):
            tokens[0] = tokens[0].removeprefix(" ")  # as `infill` does: the blank is there already
        return tokens

    def on_step(step: InfillStep) -> None:
        states = {index: tokens_of(step, index) for index in step.places}
        tell({"done": step.n_done, "of": step.n_holes, "holes": states})

    filled = infill(model, texts_beside, [hole.length for hole in holes], config, on_step)
    texts = [one.text for one in filled]
    return {"text": fill_in(document, holes, texts).decode(errors="replace"), "holes": texts}


def _write(
    model: DiffusionModel,
    before: NDArray[np.int32],
    after: NDArray[np.int32],
    length: int,
    request: Sampling,
    n_dropped: int,
    ends: frozenset[int],
    tell: Tell,
) -> Written:
    """Denoise, telling every step with what stands from the left."""
    started_s = time.perf_counter()
    seed = _seed(request)
    settings = {**request.drawing(), **request.denoising()}
    config = GenerationConfig(length=length, seed=seed, **settings)
    growing, continued = GrowingText(request.stop), model.goes_on(before)
    stopped_at = 0

    def text_of(tokens: NDArray[np.int32]) -> str:
        return model.tokenizer.decode(tokens, continued=continued)

    def on_step(step: DenoisingStep) -> None:
        nonlocal stopped_at
        hole = step.tokens[len(before) : len(before) + length]
        is_mask = hole == model.mask_token_id
        n_stand = int(np.argmax(is_mask)) if is_mask.any() else length
        if config.remasking > 0:  # nothing stands before the end
            n_stand = 0
        text = text_of(model.up_to_end(hole[:n_stand], ends))
        tell(State(growing.piece(text), step.step, step.n_steps, _token_texts(model, hole)))
        if growing.is_stopped:
            stopped_at = n_stand
            raise _Stopped(text)

    try:
        tokens = model.write_between(before, after, config, on_step, ends=ends)
        text, n_written = text_of(tokens), len(tokens)
    except _Stopped as stopped:
        text, n_written = str(stopped), stopped_at
    piece = growing.last_piece(text)
    return Written(
        text=growing.cut(text),
        piece=piece,
        n_prompt=len(before) + len(after),
        n_written=n_written,
        n_dropped=n_dropped,
        is_cut=n_written == length and not growing.is_stopped,
        seed=seed,
        time_s=time.perf_counter() - started_s,
    )


def _wanted(asked: int | None, default: int) -> int:
    """Tokens to write; -1 and None are the default, and 0 is refused where it gets here."""
    if asked == 0:
        raise RequestError("max_tokens: a text of 0 tokens cannot be written", field="max_tokens")
    return default if asked is None or asked < 0 else asked


def _seed(request: Sampling) -> int:
    return secrets.randbelow(1 << 31) if request.seed is None or request.seed < 0 else request.seed


def _refuse_denoising(request: Sampling) -> None:
    for name in request.denoising():
        raise RequestError(
            f"{name} is not supported for text between others whose length is found: leave it out",
            field=name,
            code="unsupported_parameter",
        )


def _too_long(n_tokens: int, model: DiffusionModel) -> RequestError:
    context = model.engine.file.context_length
    return RequestError(
        f"{n_tokens} tokens are more than the model's context of {context}", code="context_length_exceeded"
    )


def _hole_tokens(model: DiffusionModel, step: InfillStep, hole: int) -> list[str | None]:
    if hole not in step.places:
        return []
    start, length = step.places[hole]
    return _token_texts(model, step.denoising.tokens[start : start + length])


def _token_texts(model: DiffusionModel, tokens: Sequence[int] | NDArray[np.int32]) -> list[str | None]:
    """What each token stands for; None = a mask."""
    return [
        None if token == model.mask_token_id else model.tokenizer.token_text(int(token)) for token in tokens
    ]
