"""Verified writing gives the base's own text, whatever is drafted and however long it takes."""

from __future__ import annotations

from dataclasses import replace
from itertools import count
from typing import Any

import numpy as np
import pytest
from conftest import TinyModel
from numpy.typing import NDArray
from test_denoise import MASK, converted
from test_frozen_context import frozen

from ggml_diffusion.engine.cpu.q4_model import Q4Model
from ggml_diffusion.engine.interface import Batch
from ggml_diffusion.errors import UserError
from ggml_diffusion.generation.denoise import GenerationConfig
from ggml_diffusion.generation.diffusion_model import DiffusionModel
from ggml_diffusion.generation.sampling import keep_likely, log_softmax
from ggml_diffusion.generation.verified import VerifiedText, VerifiedWriter
from ggml_diffusion.randomness import Stream, generator_of

PROMPT = np.array([30, 31, 32, 40], np.int32)
SETTINGS = {
    "greedy": GenerationConfig(temperature=0.0, length=24),
    "drawn": GenerationConfig(temperature=0.9, top_p=0.95, length=24, seed=5),
    "top k": GenerationConfig(temperature=1.3, top_p=1.0, top_k=12, length=24, seed=6),
}


@pytest.fixture(scope="module")
def engine(tiny_model: TinyModel) -> Any:
    with Q4Model.from_gguf(tiny_model(L=1, C=32, H=2, G=1, F=32), 1) as opened:
        yield opened


def base_text(engine: Q4Model, config: GenerationConfig) -> list[int]:
    """The base's own text, one whole pass a token."""
    text = PROMPT.tolist()
    while len(text) < len(PROMPT) + config.length:
        logits = engine.logits(Batch(np.array([text], np.int32)))[0, -1]
        logits[MASK] = -np.inf
        if config.temperature == 0.0:
            text.append(int(logits.argmax()))
            continue
        noise = generator_of(config.seed, len(text), Stream.DENOISING).gumbel(size=len(logits))
        kept, values = keep_likely(
            log_softmax(logits[None])[0],
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
        )
        text.append(int(kept[(values + noise[kept]).argmax()]))
    return text[len(PROMPT) :]


def clock_of(seconds: list[float]) -> Any:
    """A clock on which the calls take these times in turn."""
    times, now = count(), [0.0]

    def clock() -> float:
        index = next(times)
        if index % 2 == 1:
            now[0] += seconds[index // 2 % len(seconds)]
        return now[0]

    return clock


def write(model: DiffusionModel, config: GenerationConfig, **more: Any) -> VerifiedText:
    return VerifiedWriter(model.engine, model.adapter, model.rule, config, "none", **more).write(PROMPT)


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("prediction", ["shifted", "aligned"])
@pytest.mark.parametrize("seconds", [[1.0], [5.0, 0.1], [0.1, 5.0, 1.0]])
def test_the_text_is_the_bases_own(engine: Q4Model, name: str, prediction: Any, seconds: list[float]) -> None:
    """The random adapter drafts something else nearly always, and the clock makes it change its way."""
    config = SETTINGS[name]
    written = write(frozen(engine, prediction), config, clock=clock_of(seconds))
    assert written.tokens.tolist() == base_text(engine, config)
    assert written.accepted <= written.drafted and written.rounds > 0
    assert 1 + written.rounds + written.accepted + written.singles >= config.length


@pytest.mark.parametrize("name", SETTINGS)
def test_a_conversion_that_says_what_the_base_says_is_believed(engine: Q4Model, name: str) -> None:
    """Nothing trained and a causal mask: the first drafted token of each round is the base's own."""
    model = frozen(engine, trained=False, causal_ratio=1.0)
    config = SETTINGS[name].model_copy(update={"block_length": 2})
    written = write(model, config, clock=clock_of([1.0]))
    assert written.tokens.tolist() == base_text(engine, config)
    assert written.accepted >= written.rounds  # one of two at least


@pytest.mark.parametrize("seconds", [[1.0], [5.0, 0.1]])
def test_a_quantised_base_in_int8_keeps_its_text(
    tiny_model: TinyModel, int8_kernels: str, seconds: list[float]
) -> None:
    """Drafts are checked in passes of several rows, and the base writes in passes of one."""
    path = tiny_model(type="Q4_0", L=1, C=32, H=2, G=1, F=32)
    config = SETTINGS["greedy"].model_copy(update={"length": 60})
    with Q4Model.from_gguf(path, 1) as engine:
        model = frozen(engine)
        writer = VerifiedWriter(engine, model.adapter, model.rule, config, "both", clock=clock_of(seconds))
        written = writer.write(PROMPT)
        context, tokens, expected = engine.context(len(PROMPT) + config.length), PROMPT, list[int]()
        while len(expected) < config.length:
            is_last = np.arange(len(tokens)) == len(tokens) - 1
            logits = context.extend(tokens, select=is_last, int8="both")[0]
            logits[MASK] = -np.inf
            expected.append(int(logits.argmax()))
            tokens = np.array(expected[-1:], np.int32)
    assert written.rounds > 0 and written.tokens.tolist() == expected


def test_the_slower_way_is_left_and_looked_at_again(engine: Q4Model) -> None:
    model = frozen(engine)
    config = SETTINGS["greedy"].model_copy(update={"length": 100})
    slow_drafts = write(model, config, clock=ClockByKind(10.0, 1.0))
    fast_drafts = write(model, config, clock=ClockByKind(0.1, 1.0))
    assert slow_drafts.tokens.tolist() == fast_drafts.tokens.tolist()
    assert slow_drafts.singles > 80 and 4 < slow_drafts.rounds < 10
    assert fast_drafts.singles < 10


class ClockByKind:
    """Drafts take one time and single tokens another; the writer tells by its calls of the core."""

    def __init__(self, round_s: float, single_s: float) -> None:
        self._round_s, self._single_s, self._now = round_s, single_s, 0.0
        self._starts = True

    def __call__(self) -> float:
        if not self._starts:
            self._now += self._round_s if _drafted[0] else self._single_s
        self._starts = not self._starts
        _drafted[0] = False
        return self._now


_drafted = [False]


@pytest.fixture(autouse=True)
def _watch_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    draft = VerifiedWriter._draft

    def watched(self: VerifiedWriter, *arguments: Any) -> Any:
        _drafted[0] = True
        return draft(self, *arguments)

    monkeypatch.setattr(VerifiedWriter, "_draft", watched)


def test_writing_stops_at_an_end_in_the_midst_of_a_draft(engine: Q4Model) -> None:
    model = frozen(engine, trained=False, causal_ratio=1.0)
    text = base_text(engine, SETTINGS["greedy"])
    end = text[5]
    writer = VerifiedWriter(model.engine, model.adapter, model.rule, SETTINGS["greedy"], "none")
    told: list[NDArray[np.int32]] = []
    written = writer.write(PROMPT, {end}, told.append)
    assert written.tokens.tolist() == text[: text.index(end) + 1]
    assert told[-1].tolist() == written.tokens.tolist()


def test_an_adapted_context_is_refused_with_what_to_do(engine: Q4Model) -> None:
    model = converted(engine)
    with pytest.raises(UserError, match="--context frozen"):
        model.write_verified("the ")
    model.rule = replace(model.rule, context="frozen")
    text, written = model.write_verified("the ", GenerationConfig(length=6, temperature=0.0))
    assert isinstance(text, str) and len(written.tokens) <= 6
