"""Where a long text may be cut without a change of its tokens.

llama.cpp splits a text into words by the regular expressions of its vocabulary, and tokenises each word by
itself. `BOUNDARIES` are places that no such word reaches across, whatever the vocabulary is, the best ones
first. Two vocabularies have words of several words: those of `exaone-moe` hold up to the next punctuation or
line feed, so blanks are looked for last, and those of `superbpe` are whole lines and more: there a token may
differ at a cut.

Deliberately not here: tokens (tokenizer.py), files (files.py).
Source: the expressions in llama.cpp, src/llama-vocab.cpp (llm_tokenizer_bpe) and src/unicode.cpp.
"""

import re
from collections.abc import Iterable, Iterator

_LETTER = r"[^\W\d_]"
_LINE_FEED = re.compile(r"(?<=\S\n)(?=[^\W_])")  # a slash or full stop belongs to it in some
_PUNCTUATION = re.compile(rf"(?<={_LETTER})(?=[.,!?…。，、])")
_BLANK = re.compile(rf"(?<={_LETTER})(?= {_LETTER})")
BOUNDARIES = (_LINE_FEED, _PUNCTUATION, _BLANK)
# Where there is none, a token may differ: where letters, blanks and the rest meet, or anywhere.
_CLASSES = re.compile(r"(?<=\w)(?=\W)|(?<=\s)(?=\S)|(?<=[^\w\s])(?=[\w\s])")
_LOOKAHEAD = 2  # characters behind a boundary that it depends on
_NEAR = 4096  # most texts have a boundary within so many characters
_LONG_NUMBER = re.compile(r"[0-9]{601,}")
_DIGITS = 300  # a multiple of three


def cut(pieces: Iterable[str], size: int) -> Iterator[str]:
    """Join the pieces of a text, and cut it into parts of more than half of `size` characters.

    Only the last part may be shorter, and none is longer than `size`. Where it is cut does not depend on the
    pieces.
    """
    waiting: list[str] = []
    n_chars = 0
    for piece in pieces:
        waiting.append(piece)
        n_chars += len(piece)
        if n_chars >= size + _LOOKAHEAD:
            text, start = "".join(waiting), 0
            while len(text) - start >= size + _LOOKAHEAD:
                end = _place(text, start + size // 2 + 1, start + size)
                yield text[start:end]
                start = end
            waiting, n_chars = [text[start:]], len(text) - start
    rest = "".join(waiting)
    if len(rest) > size:
        end = _place(rest, size // 2 + 1, size)
        yield rest[:end]
        rest = rest[end:]
    if rest:
        yield rest


def cut_numbers(text: str) -> Iterator[str]:
    """Cut long numbers where a vocabulary groups their digits in threes from the right, as `superbpe` does.

    llama.cpp takes a time that grows with the square of such a number's length.
    """
    start = 0
    for number in _LONG_NUMBER.finditer(text):
        first = number.end() - (len(number[0]) - 1) // _DIGITS * _DIGITS
        for end in range(first, number.end(), _DIGITS):
            yield text[start:end]
            start = end
    yield text[start:]


def _place(text: str, first: int, last: int) -> int:
    """The last of the best places to cut, from `first` to `last`."""
    for boundary in (*BOUNDARIES, _CLASSES):
        for begin in (max(first, last - _NEAR), first):
            places = [match.start() for match in boundary.finditer(text, begin, last + _LOOKAHEAD)]
            if places and min(places) <= last:
                return max(place for place in places if place <= last)
    return last
