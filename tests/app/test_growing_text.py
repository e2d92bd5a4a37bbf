"""Pieces of a text that grows byte by byte."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("starlette")

from ggml_diffusion.app.server.growing import GrowingText

# Few letters, so that stop strings and their beginnings are frequent; of one to four bytes, and bytes that
# are no UTF-8.
LETTERS = st.sampled_from([b"a", b"b", "é".encode(), "€".encode(), "😀".encode(), b"\xff", b"\xe2\x82"])
STOPS = st.lists(st.text("abé€😀", min_size=1, max_size=3), max_size=3)


@given(st.lists(LETTERS, max_size=12).map(b"".join), STOPS, st.data())
def test_the_pieces_are_the_text_up_to_the_first_stop_string(
    data: bytes, stops: list[str], draw: st.DataObject
) -> None:
    cuts = sorted(draw.draw(st.lists(st.integers(0, len(data)), max_size=6)))
    growing, pieces = GrowingText(stops), []
    for cut in cuts:
        pieces.append(growing.piece(data[:cut].decode(errors="replace")))
        if growing.is_stopped:
            break
    text = data.decode(errors="replace")
    pieces.append(growing.last_piece(text))
    ends = [text.index(stop) for stop in stops if stop in text]
    assert "".join(pieces) == text[: min(ends, default=len(text))]


def test_a_piece_is_given_as_soon_as_it_stands() -> None:
    growing = GrowingText(["stop"])
    assert [growing.piece(text) for text in ("ab", "abcde", "abcdest", "abcdestop")] == ["", "ab", "cd", "e"]
    assert growing.is_stopped
