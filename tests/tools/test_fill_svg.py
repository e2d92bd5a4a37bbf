"""The picture of a text that is filled: all of the text, and each token with the step that wrote it."""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import make_fill_svg
import numpy as np
import pytest
from make_fill_svg import COLUMNS, Part, drawing, parts_of

from ggml_diffusion.generation.denoise import DenoisingStep
from ggml_diffusion.generation.infill import FilledHole, InfillStep

MASK = 9
WORDS = {1: "the", 2: " <sand>", 3: " &", 4: " sea", 5: " goes"}


def words_of(tokens: Any, **_: Any) -> str:
    return "".join(WORDS[int(token)] for token in tokens)


def fake_infill(
    model: Any, texts: list[str], lengths: list[int | None], on_step: Any = None
) -> list[FilledHole]:
    """Holes of two tokens and one: the second hole first, then the first from its end."""
    assert lengths == ([2, 1] if on_step else [None, None])
    for number, tokens in enumerate(([1, 9, 9, 1, 4], [1, 9, 3, 1, 4], [1, 2, 3, 1, 4]), 1):
        scores = np.array([0, number == 3, number == 2, 0, number == 1], np.float64)
        if on_step is not None:
            step = DenoisingStep(number, 3, np.array(tokens, np.int32), scores)
            on_step(InfillStep(0, 2, step, {0: (1, 2), 1: (4, 1)}))
    one = FilledHole("<sand> &", np.array([2, 3], np.int32), np.ones(2))
    return [one, FilledHole(" sea", np.array([4], np.int32), np.ones(1))]


def test_each_token_has_the_step_that_wrote_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(make_fill_svg, "infill", fake_infill)
    model: Any = SimpleNamespace(mask_token_id=MASK, tokenizer=SimpleNamespace(decode=words_of))
    assert parts_of(model, ["the ", " the", ""], [None, None]) == [
        *(Part("the "), Part("<sand>", 3), Part(" &", 2)),
        *(Part(" the"), Part(" sea", 1)),
    ]


def test_the_drawing_holds_all_of_the_text_in_lines_and_moves_every_token() -> None:
    long = "and the sand goes to the sea " * 8
    parts = [
        Part("the "),
        Part("<sand>", 2),
        Part(" &", 1),
        Part(f" {long}\n\n"),
        Part("a" * 100, 3),
        Part("."),
    ]
    text = drawing(parts, "A <title>", "and & more")
    root = ElementTree.fromstring(text)
    shown = [element for element in root.iter() if element.tag.endswith("}text")]
    words = "".join("".join(element.itertext()) for element in shown)
    assert words.replace(" ", "") == "".join(part.text for part in parts).replace(" ", "").replace("\n", "")
    rows: dict[str, int] = {}
    for element in shown:
        rows[element.attrib["y"]] = rows.get(element.attrib["y"], 0) + len("".join(element.itertext()))
    assert len(rows) > 5 and max(rows.values()) <= COLUMNS
    for step in (1, 2, 3):
        assert f'class="new s{step}"' in text and f'class="mask m{step}"' in text
        starts = re.search(rf"@keyframes s{step} {{ 0%, ([\d.]+)% {{ opacity: 0", text)
        assert starts is not None
    # Without motion nothing is hidden: what hides stands where motion is wanted.
    still = text.partition("@media (prefers-reduced-motion")[0]
    assert "animation" not in still and ".mask { fill: #c4ccd5; opacity: 0 }" in still
