"""Holes that a person marked in a text: where they are, and how long they are to be.

Works on bytes, so that what is not a hole stays what it is: line ends, a byte order mark, bytes that are no
UTF-8. Deliberately not here: what comes into a hole (generation/infill.py).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ggml_diffusion.errors import UserError, quoted

MARKERS = "___ (three or more underscores), [[...]], [[…]], or <mask:8> for a hole of 8 tokens"
MAX_LENGTH = 4096  # of a hole, in tokens

_MARKED = re.compile(rb"_{3,}|\[\[(?:\.\.\.|\xe2\x80\xa6)\]\]|<mask:([0-9]{1,18})>")
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_UTF_16 = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class MarkedHole:
    """A marker.

    Attributes:
        start, end: its bytes in the document.
        length: of the hole in tokens, as the marker says; None = to be found.
        line: where it is, from 1.

    """

    start: int
    end: int
    length: int | None
    line: int


def find_holes(document: bytes, marker: str | None = None) -> list[MarkedHole]:
    """The holes of a document, in their order.

    Args:
        document: UTF-8, as far as possible.
        marker: a text that stands for a hole in place of `MARKERS`.

    Raises:
        UserError: none, an impossible length, an empty marker, or a document in UTF-16.

    """
    if document.startswith(_UTF_16):
        raise UserError("the text is UTF-16: save it as UTF-8")
    if marker is not None and not marker.strip():
        raise UserError("--marker is empty: give the text that stands for a hole")
    pattern = _MARKED if marker is None else re.compile(re.escape(marker.encode(errors="surrogateescape")))
    holes = []
    line, counted = 1, 0
    for found in pattern.finditer(document):
        line += document.count(b"\n", counted, found.start())
        counted = found.start()
        number = found[1] if marker is None else None
        length = None if number is None else int(number)
        if length is not None and not 1 <= length <= MAX_LENGTH:
            raise UserError(f"line {line}: <mask:{length}>: a hole has 1 to {MAX_LENGTH} tokens")
        holes.append(MarkedHole(found.start(), found.end(), length, line))
    if not holes:
        wanted = MARKERS if marker is None else quoted(marker)
        raise UserError(f"the text has no hole: mark one with {wanted}")
    return holes


def texts_between(document: bytes, holes: Sequence[MarkedHole]) -> list[str]:
    """What stands before, between and behind the holes, as a model can read it: one more than there are
    holes. A byte order mark is left out, bytes that are no UTF-8 become U+FFFD."""
    starts = [0, *(hole.end for hole in holes)]
    ends = [*(hole.start for hole in holes), len(document)]
    parts = [document[start:end] for start, end in zip(starts, ends, strict=True)]
    parts[0] = parts[0].removeprefix(_BYTE_ORDER_MARK)
    return [part.decode(errors="replace") for part in parts]


def fill_in(document: bytes, holes: Sequence[MarkedHole], texts: Sequence[str]) -> bytes:
    """The document with a text in the place of each marker; all else is copied byte for byte."""
    result, copied = [], 0
    for hole, text in zip(holes, texts, strict=True):
        result += [document[copied : hole.start], text.encode()]
        copied = hole.end
    return b"".join([*result, document[copied:]])
