"""Denoising over a context that stands: the tokens of whole passes, at the cost of the noisy rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from conftest import TinyModel
from numpy.typing import NDArray
from test_denoise import MASK, converted

from ggml_diffusion.engine.cpu.context import Q4Context
from ggml_diffusion.engine.cpu.q4_model import Q4Model
from ggml_diffusion.engine.interface import Batch
from ggml_diffusion.generation.denoise import GenerationConfig, denoise
from ggml_diffusion.generation.diffusion_model import DiffusionModel
from ggml_diffusion.generation.frozen_context import rows_batch
from ggml_diffusion.objective.output_rows import Prediction
from ggml_diffusion.objective.standing_rows import NOTHING, lay_out_rows

Ints = NDArray[np.int32]


@pytest.fixture(scope="module")
def engine(tiny_model: TinyModel) -> Any:
    with Q4Model.from_gguf(tiny_model(L=1, C=32, H=2, G=1, F=32), 1) as opened:
        yield opened


def frozen(
    engine: Q4Model, prediction: Prediction = "shifted", margin: int = 2, **changes: Any
) -> DiffusionModel:
    model = converted(engine, prediction, **changes)
    model.rule = replace(model.rule, context="frozen", margin=margin)
    return model


def whole_passes(model: DiffusionModel, tokens: Ints, config: GenerationConfig, group_of: Any) -> Ints:
    """The same denoising with every step a pass over all rows; `group_of(seen, block)` says what is noisy."""

    def predict(seen: Ints, positions: NDArray[np.int64], block: NDArray[np.int64]) -> NDArray[np.float32]:
        groups = np.full((1, len(seen)), NOTHING, np.int32)
        groups[0, group_of(seen, block)] = 0
        masked = (seen == MASK)[None]
        rule, text = model.rule, seen[None]
        rows = lay_out_rows(text, text, masked, groups, None, None, rule.prediction, margin=rule.margin)
        batch = rows_batch(rows, model.rule.causal_ratio, n_positions=len(tokens))
        logits = model.engine.logits(batch, model.adapter, select=np.isin(rows.targets, positions))
        logits[:, MASK] = -np.inf
        return logits

    schedule = model.rule.noise_schedule.mask_probability
    return denoise(tokens, MASK, predict, schedule, config, hide_later_blocks=True)


HOLES = np.array([30, 31, MASK, MASK, MASK, 40, 41, 42, MASK, MASK, 50, 51], np.int32)
OPEN = np.array([30, 31, 32, *[MASK] * 7], np.int32)
SETTINGS = GenerationConfig(temperature=0.0, block_length=4)


@pytest.mark.parametrize("margin", [0, 2])
@pytest.mark.parametrize("prediction", ["shifted", "aligned"])
def test_holes_are_filled_as_in_whole_passes(engine: Q4Model, prediction: Prediction, margin: int) -> None:
    """All holes are one group, and stay noisy when they are filled: the text behind them never sees them."""
    model = frozen(engine, prediction, margin)
    filled = model.fill(HOLES, SETTINGS)
    holes = np.flatnonzero(HOLES == MASK)
    assert filled.tolist() == whole_passes(model, HOLES, SETTINGS, lambda seen, block: holes).tolist()
    assert (filled[HOLES != MASK] == HOLES[HOLES != MASK]).all() and not (filled == MASK).any()


@pytest.mark.parametrize("margin", [0, 2])
@pytest.mark.parametrize("prediction", ["shifted", "aligned"])
def test_text_is_written_in_blocks_that_stand_when_they_are_done(
    engine: Q4Model, prediction: Prediction, margin: int
) -> None:
    model = frozen(engine, prediction, margin)
    written = model.fill(OPEN, SETTINGS)
    assert written.tolist() == whole_passes(model, OPEN, SETTINGS, lambda seen, block: block).tolist()
    assert not (written == MASK).any()


@pytest.mark.parametrize("margin", [0, 2])
def test_a_step_computes_its_noisy_rows_alone(
    engine: Q4Model, margin: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, int]] = []
    extend, logits = Q4Context.extend, Q4Context.logits

    def counted_extend(self: Q4Context, tokens: Any, *args: Any, **more: Any) -> Any:
        calls.append(("stands", len(tokens)))
        return extend(self, tokens, *args, **more)

    def counted_logits(self: Q4Context, groups: Any, *args: Any, **more: Any) -> Any:
        calls.append(("noisy", groups.tokens.size))
        return logits(self, groups, *args, **more)

    monkeypatch.setattr(Q4Context, "extend", counted_extend)
    monkeypatch.setattr(Q4Context, "logits", counted_logits)
    model = frozen(engine, margin=margin)
    model.fill(OPEN, SETTINGS)
    # a row for each mask, at the place before, and for the last token that was written; and the margin
    assert [kind for kind, _ in calls].count("stands") == 2
    assert [n for kind, n in calls if kind == "stands"] == [3, 4]
    assert max(n for kind, n in calls if kind == "noisy") == 5 + max(0, margin - 1)
    calls.clear()
    model.fill(HOLES, SETTINGS)
    assert [n for kind, n in calls if kind == "stands"] == [7]


def test_logits_of_masks_are_those_that_filling_draws_from(engine: Q4Model) -> None:
    model = frozen(engine)
    logits = model.logits(HOLES, 0.5)
    first = model.fill(HOLES, SETTINGS.model_copy(update={"steps": 1, "block_length": 0}))
    holes = np.flatnonzero(HOLES == MASK)
    assert first[holes].tolist() == logits[holes - 1].argmax(axis=-1).tolist()
    assert np.isneginf(logits[:, MASK]).all()
    others = np.setdiff1d(np.arange(len(HOLES)), holes - 1)
    assert (np.delete(logits[others], MASK, axis=1) == 0).all()


@pytest.mark.parametrize("prediction", ["shifted", "aligned"])
@pytest.mark.parametrize(("prompt", "suffix"), [("", ""), ("the ", ""), ("", " and"), ("the ", " of it")])
def test_prompt_and_suffix_never_change(
    engine: Q4Model, prediction: Prediction, prompt: str, suffix: str
) -> None:
    model, last = frozen(engine, prediction), []
    config = GenerationConfig(length=9, steps=3, top_p=1.0)
    model.generate(prompt, config, last.append, suffix=suffix)
    tokens = last[-1].tokens
    before, after = model.tokenizer.encode(prompt), model.tokenizer.encode(suffix)
    start = len(tokens) - 9 - len(after)
    assert tokens[start - len(before) : start].tolist() == before.tolist() or not prompt
    assert tokens[len(tokens) - len(after) :].tolist() == after.tolist()


def test_with_nothing_trained_and_a_causal_mask_text_is_the_bases_greedy_one(engine: Q4Model) -> None:
    """A block of one token: each is the base's own next one."""
    model = frozen(engine, margin=0, trained=False, causal_ratio=1.0)
    written = model.fill(OPEN, GenerationConfig(temperature=0.0, block_length=1))
    text = OPEN[:3].tolist()
    for _ in range(7):
        logits = engine.logits(Batch(np.array([text], np.int32)))[0, -1]
        logits[MASK] = -np.inf
        text.append(int(logits.argmax()))
    assert written.tolist() == text
