"""Holes of a text are filled through windows, together, at a length that is found."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import TinyModel
from test_denoise import MASK, converted
from test_frozen_context import frozen

from ggml_diffusion.engine.cpu.q4_model import Q4Model
from ggml_diffusion.engine.interface import Batch
from ggml_diffusion.errors import UserError
from ggml_diffusion.generation import infill as infill_module
from ggml_diffusion.generation.denoise import GenerationConfig
from ggml_diffusion.generation.infill import InfillConfig, infill
from ggml_diffusion.generation.sampling import log_softmax

KINDS = {"frozen": frozen, "adapted": converted}


@pytest.fixture(scope="module")
def engine(tiny_model: TinyModel) -> Any:
    with Q4Model.from_gguf(tiny_model(L=1, C=32, H=2, G=1, F=32), 1) as opened:
        yield opened


@pytest.fixture(params=KINDS)
def model(request: pytest.FixtureRequest, engine: Q4Model) -> Any:
    return KINDS[request.param](engine)


def texts_seen(model: Any, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Every text that is given to the denoising loop from now on."""
    seen: list[list[int]] = []
    fill = model.fill

    def spy(tokens: Any, *arguments: Any, **more: Any) -> Any:
        seen.append(np.asarray(tokens).tolist())
        return fill(tokens, *arguments, **more)

    monkeypatch.setattr(model, "fill", spy)
    return seen


def test_a_hole_of_a_given_length_is_what_fill_writes(model):
    tokenizer = model.tokenizer
    left, right = tokenizer.encode("the old"), tokenizer.encode("village", continued=True)
    text = np.concatenate([left, np.full(3, MASK), right]).astype(np.int32)
    config = GenerationConfig(temperature=0.0, block_length=0)
    never = np.array([tokenizer.n_bytes(token) == 0 for token in range(tokenizer.vocab_size)])
    places = dict.fromkeys(range(len(left), len(left) + 3), never)
    expected = model.fill(text, config, never=places)[len(left) : len(left) + 3]
    (hole,) = infill(model, ["the old", "village"], [3])
    assert hole.tokens.tolist() == expected.tolist()
    assert hole.text == tokenizer.decode(expected, continued=True)
    assert hole.tried == ()


def test_probabilities_are_those_of_the_step_that_wrote_each_token(model):
    (hole,) = infill(model, ["the old", "village"], [1])
    left = model.tokenizer.encode("the old")
    text = np.concatenate([left, [MASK], model.tokenizer.encode("village", continued=True)]).astype(np.int32)
    row = len(left) - 1  # a shifted prediction
    logits = model.logits(text, 1.0)[row].astype(np.float64)
    logits[[model.tokenizer.n_bytes(token) == 0 for token in range(len(logits))]] = -np.inf
    p = np.exp(log_softmax(logits[None].astype(np.float32)))[0]
    assert hole.probabilities[0] == pytest.approx(p[hole.tokens[0]], rel=1e-4)


def test_the_length_found_is_the_best_of_those_tried(model, monkeypatch):
    monkeypatch.setattr(infill_module, "_PATIENCE", 100)
    (hole,) = infill(model, ["the old mill", " ground corn for"], [None], InfillConfig(at_most=5))
    assert [length for length, _ in hole.tried] == [1, 2, 3, 4, 5]
    assert len(hole.tokens) == max(hole.tried, key=lambda one: one[1])[0]
    for length, nats in hole.tried:
        (given,) = infill(model, ["the old mill", " ground corn for"], [length])
        left = model.tokenizer.encode("the old mill")
        right = model.tokenizer.encode(" ground corn for", continued=True)
        text = np.concatenate([left, given.tokens, right])
        logits = model.engine.logits(Batch(text[None].astype(np.int32)))[0, len(left) - 1 : -1]
        said = log_softmax(logits)[np.arange(len(logits)), text[len(left) :]]
        own, following = said[:length], said[length:]
        expected = following.sum() + 0.3 * (own.sum() + 2.5 * length)
        assert nats == pytest.approx(expected, abs=2e-2)  # keys of the context are in bfloat16


def test_longer_ones_are_not_tried_for_ever(model, monkeypatch):
    monkeypatch.setattr(infill_module, "_PATIENCE", 2)
    monkeypatch.setattr(infill_module, "_NATS_A_TOKEN", -100.0)
    (hole,) = infill(model, ["the old", " corn"], [None])
    assert [length for length, _ in hole.tried] == [1, 2, 3]
    monkeypatch.setattr(infill_module, "_NATS_A_TOKEN", 100.0)
    (hole,) = infill(model, ["the old", " corn"], [None])
    assert len(hole.tokens) == InfillConfig().at_most


def test_holes_of_a_window_are_filled_together_and_those_far_apart_one_after_the_other(model, monkeypatch):
    seen = texts_seen(model, monkeypatch)
    infill(model, ["the old", "mill", "corn"], [2, 3])
    assert [text.count(MASK) for text in seen] == [5]
    seen.clear()
    far = " the old mill ground corn for the whole village" * 10
    holes = infill(model, ["the old", far, "corn"], [2, 3], InfillConfig(window=64))
    assert [text.count(MASK) for text in seen] == [2, 3]
    assert max(map(len, seen)) <= 64
    assert len(holes) == 2


def test_what_has_been_filled_is_read_by_what_comes_after(model, monkeypatch):
    seen = texts_seen(model, monkeypatch)
    far = " the old mill" * 2
    first, _ = infill(model, ["the", far, "corn"], [2, 1], InfillConfig(window=64))
    assert MASK not in seen[1][: seen[1].index(MASK)]
    written = seen[1][: seen[1].index(MASK)]
    assert " ".join(map(str, first.tokens)) in " ".join(map(str, written))


def test_a_blank_before_a_hole_begins_it_and_is_written_once(model):
    with_blank, without = infill(model, ["the old ", " x the old", " corn"], [2, 2])
    pieces = model.tokenizer.pieces
    assert pieces[with_blank.tokens[0]].startswith(b" ")
    whole = model.tokenizer.decode(with_blank.tokens, continued=True)
    assert whole == " " + with_blank.text
    assert without.text == model.tokenizer.decode(without.tokens, continued=True)


@pytest.mark.parametrize("texts", [["", " corn"], ["the old", ""], ["", ""], ["\n", "\n"]])
def test_holes_at_the_ends_of_a_text(model, texts):
    (hole,) = infill(model, texts, [2])
    assert len(hole.tokens) == 2
    (hole,) = infill(model, texts, [None], InfillConfig(at_most=3))
    assert 1 <= len(hole.tokens) <= 3


def test_a_hole_with_text_behind_it_holds_no_control_token(engine):
    model = frozen(engine)
    eos = model.tokenizer.eos_id
    assert eos is not None
    for config in (InfillConfig(seed=seed, temperature=50.0, top_p=1.0) for seed in range(20)):
        (hole,) = infill(model, ["the old", " corn"], [8], config)
        assert not np.isin(hole.tokens, [eos, MASK]).any()


def test_a_very_long_text_is_read_near_the_hole_alone(model, monkeypatch):
    encode = model.tokenizer.encode
    read: list[int] = []

    def spy(text: str, **more: Any) -> Any:
        read.append(len(text))
        return encode(text, **more)

    monkeypatch.setattr(model.tokenizer, "encode", spy)
    long = "the old mill ground corn for the whole village. " * 2000
    seen = texts_seen(model, monkeypatch)
    holes = infill(model, [long, long, long], [2, 2], InfillConfig(window=64))
    assert len(holes) == 2
    assert max(read) <= 16 * 64
    assert all(-1 not in text and len(text) <= 64 for text in seen)


def test_every_window_begins_with_the_token_that_the_base_wants_there(model, monkeypatch):
    monkeypatch.setattr(model.tokenizer, "start_id", 1)
    seen = texts_seen(model, monkeypatch)
    far = " the old mill ground corn for the whole village" * 10
    infill(model, [far, far, far], [2, None], InfillConfig(window=64, at_most=3))
    assert len(seen) == 5  # the first, the second at three lengths, and at the best
    assert all(text[0] == 1 and text.count(1) == 1 and len(text) <= 300 for text in seen)
    assert len(seen[0]) <= 64 and len(seen[-1]) <= 64


def test_holes_side_by_side(model):
    holes = infill(model, ["the old", "", "corn"], [None, None], InfillConfig(at_most=4))
    assert [len(hole.tried) > 0 for hole in holes] == [False, True]
    assert len(holes[0].tokens) == 1
    assert not np.isin(np.concatenate([hole.tokens for hole in holes]), [model.tokenizer.eos_id]).any()


def test_too_many_tokens_for_the_window_are_refused(model):
    with pytest.raises(UserError, match="holes of 70 tokens do not fit into a window of 64"):
        infill(model, ["the", "old"], [70], InfillConfig(window=64))


def test_the_mask_token_as_text_is_refused(model, monkeypatch):
    monkeypatch.setattr(model, "mask_token_id", int(model.tokenizer.encode("the")[0]))
    with pytest.raises(UserError, match="the text contains the mask token"):
        infill(model, ["the", "old"], [1])


def test_the_same_seed_gives_the_same_text(model):
    def filled(seed: int) -> list[int]:
        config = InfillConfig(seed=seed, temperature=1.0)
        return infill(model, ["the old", " corn"], [6], config)[0].tokens.tolist()

    assert filled(1) == filled(1)
    assert filled(1) != filled(2)


def test_the_approximate_cache_fills_alike_where_it_is_exact(
    engine: Q4Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one layer nothing is approximated (test_approximate_cache.py), and whole passes are few."""
    model = converted(engine)
    texts, found, passes = ["the old ", " of the village and ", " sea"], [], []
    logits, n_passes = Q4Model.logits, 0

    def counted(self: Q4Model, *arguments: Any, **more: Any) -> Any:
        nonlocal n_passes
        n_passes += 1
        return logits(self, *arguments, **more)

    monkeypatch.setattr(Q4Model, "logits", counted)
    for approximate in (False, True):
        n_passes = 0
        holes = infill(model, texts, [None, 3], InfillConfig(at_most=5, approximate_cache=approximate))
        found.append([hole.text for hole in holes])
        passes.append(n_passes)
    assert found[0] == found[1]
    assert passes[1] < passes[0]  # what is left judges the lengths
