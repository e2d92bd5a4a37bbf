"""Holes are found where a person marked them, and nothing else of the document changes."""

from __future__ import annotations

import pytest

from ggml_diffusion.errors import UserError
from ggml_diffusion.text.marked_holes import fill_in, find_holes, texts_between


@pytest.mark.parametrize(
    ("document", "spans"),
    [
        (b"a ___ b", [(2, 5, None)]),
        (b"a ________ b", [(2, 10, None)]),
        (b"___", [(0, 3, None)]),
        (b"[[...]] and [[\xe2\x80\xa6]]", [(0, 7, None), (12, 19, None)]),
        (b"<mask:8>", [(0, 8, 8)]),
        (b"<mask:1><mask:4096>", [(0, 8, 1), (8, 19, 4096)]),
        (b"\xff___\x00\xfe", [(1, 4, None)]),
    ],
)
def test_markers(document, spans):
    assert [(hole.start, hole.end, hole.length) for hole in find_holes(document)] == spans


@pytest.mark.parametrize(
    "document",
    [
        b"",
        b"__init__ and _ and __",
        b"[[link]] [...] [[..]] [[....]]",
        b"<mask> <mask:> <mask:-1> <mask:x> <MASK:3>",
        "＿＿＿ and ‗‗‗".encode(),  # full-width and double low lines
        b"[[\xe2\x80\xa5]]",  # two dots
    ],
)
def test_lookalikes_are_text(document):
    with pytest.raises(UserError, match="the text has no hole: mark one with ___"):
        find_holes(document)


@pytest.mark.parametrize("number", ["0", "4097", "999999999999999999"])
def test_impossible_lengths_are_refused_with_their_line(number):
    with pytest.raises(UserError, match=rf"line 3: <mask:{number}>: a hole has 1 to 4096 tokens"):
        find_holes(b"one\n___\n" + f"<mask:{number}>".encode())


def test_lines_are_counted_from_one():
    assert [hole.line for hole in find_holes(b"___ ___\r\n\r\n___\n___")] == [1, 1, 3, 4]


def test_a_marker_of_ones_own_is_the_only_one():
    assert [hole.start for hole in find_holes(b"___ ?? [[...]] ??", "??")] == [4, 15]
    assert [hole.end for hole in find_holes("a ⟨⟩ b".encode(), "⟨⟩")] == [8]
    with pytest.raises(UserError, match="the text has no hole: mark one with 'TODO'"):
        find_holes(b"___", "TODO")
    with pytest.raises(UserError, match="--marker is empty"):
        find_holes(b"___", " ")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_utf_16_is_refused_and_says_what_to_do(encoding):
    document = "a ___".encode(encoding)
    with pytest.raises(UserError, match="the text is UTF-16: save it as UTF-8"):
        find_holes(document if encoding == "utf-16" else b"\xfe\xff" + document)


def test_what_a_model_reads_is_the_text_without_its_byte_order_mark_and_bad_bytes():
    document = b"\xef\xbb\xbfone\r\n___ \xff two \xe2\x82___"
    assert texts_between(document, find_holes(document)) == ["one\r\n", " \ufffd two \ufffd", ""]


def test_every_other_byte_stays():
    document = b"\xef\xbb\xbfone\r\n___ \xff\x00\ttwo\r <mask:2>\xf0\x9f\x98"
    holes = find_holes(document)
    filled = fill_in(document, holes, ["\U0001f600 é", ""])
    assert filled == b"\xef\xbb\xbfone\r\n\xf0\x9f\x98\x80 \xc3\xa9 \xff\x00\ttwo\r \xf0\x9f\x98"
    assert fill_in(document, holes, ["___", "<mask:2>"]) == document
