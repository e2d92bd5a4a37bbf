"""From documents to tokens: what is encoded at a time, in this process or in another one.

A long document is encoded in pieces, which follow each other; a short one is a piece by itself. A record
becomes an example. What cannot be used is refused with a reason, and whoever asked decides what that means.

Deliberately not here: where pieces come from (files.py), processes (workers.py), where tokens go
(token_store.py).
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from ggml_diffusion.errors import UserError
from ggml_diffusion.text.examples import ExampleReader
from ggml_diffusion.text.files import Document, Position, Record, Refusal
from ggml_diffusion.text.prompts import TextEncoder, with_start
from ggml_diffusion.text.tokenizer import Tokenizer
from ggml_diffusion.text.word_cache import WordCache

TEXT, REFUSED = -1, -2  # in `Encoded.lengths`, in the place of a prompt's length
_BATCH_CHARS = 1 << 19
_BATCH_ITEMS = 1 << 13

NOT_USABLE = 'not an object with a string "text", with strings "prompt" and "completion", or with "messages"'


@dataclass(frozen=True)
class Piece:
    """Text of one document: all of it, or a part.

    Attributes:
        text: what is encoded.
        first: the document begins with it.
        last: the document ends with it.

    """

    text: str
    first: bool = True
    last: bool = True


@dataclass
class Batch:
    """What one process encodes at a time.

    Attributes:
        items: pieces, records and refusals in their order.
        places: of each item, "FILE" or "FILE, line N".
        n_bytes: of the files, read up to its end.

    """

    items: list[Piece | Record | Refusal] = field(default_factory=list)
    places: list[str] = field(default_factory=list)
    n_bytes: int = 0


@dataclass(frozen=True)
class Encoded:
    """The tokens of a batch.

    Attributes:
        tokens: (n,) int32 of all items, end to end.
        lengths: (items, 2) int32. Of a piece: `TEXT`, its tokens. Of an example: tokens of its prompt, of its
            response. Of a refused record: `REFUSED`, its number among the reasons.
        reasons: why records were refused.

    """

    tokens: NDArray[np.int32]
    lengths: NDArray[np.int32]
    reasons: list[str]


def batches(documents: Iterable[Document], position: Position) -> Iterator[Batch]:
    """Documents, in batches that are worth a process's while and small beside its memory."""
    batch, n_chars = Batch(), 0
    for document in documents:
        for item in (document,) if isinstance(document, Record | Refusal) else _pieces(document):
            batch.items.append(item)
            batch.places.append(position.place)
            n_chars += len(item.text) if isinstance(item, Piece) else item.n_chars
            if n_chars >= _BATCH_CHARS or len(batch.items) >= _BATCH_ITEMS:
                batch.n_bytes = position.n_bytes
                yield batch
                batch, n_chars = Batch(), 0
    if batch.items:
        batch.n_bytes = position.n_bytes
        yield batch


def _pieces(blocks: Iterator[str]) -> Iterator[Piece]:
    """The blocks of a document; one without any is a piece without text."""
    text = next(blocks, "")
    first = True
    for following in blocks:
        yield Piece(text, first, last=False)
        text, first = following, False
    yield Piece(text, first, last=True)


class BatchEncoder:
    """Encodes batches with one tokenizer; a context manager, which ends the chat template's process.

    A document that is a piece by itself ends with end-of-text, if it has any token. Of a longer one, whoever
    puts its pieces together knows that.
    """

    def __init__(self, tokenizer: TextEncoder) -> None:
        self._tokenizer = tokenizer
        self._words = WordCache(tokenizer) if isinstance(tokenizer, Tokenizer) else None
        self._reader = ExampleReader(tokenizer)

    def __enter__(self) -> "BatchEncoder":
        return self

    def __exit__(self, *_: object) -> None:
        self._reader.__exit__()

    def encode(self, items: Iterable[Piece | Record | Refusal]) -> Encoded:
        """The tokens of a batch's items."""
        tokens: list[NDArray[np.int32]] = [np.empty(0, dtype=np.int32)]
        lengths: list[tuple[int, int]] = []
        reasons: list[str] = []
        items = list(items)
        of_pieces = iter(self._of_pieces([item for item in items if isinstance(item, Piece)]))
        for item in items:
            if isinstance(item, Piece):
                tokens.append(next(of_pieces))
                lengths.append((TEXT, len(tokens[-1])))
                continue
            try:
                if isinstance(item, Refusal):
                    raise UserError(item.reason)
                example = self._reader.read(item.value)
                if example is None:
                    raise UserError(NOT_USABLE)
            except UserError as error:
                lengths.append((REFUSED, len(reasons)))
                reasons.append(str(error))
                continue
            tokens += [example.prompt, example.response]
            lengths.append((len(example.prompt), len(example.response)))
        return Encoded(
            np.concatenate(tokens).astype(np.int32, copy=False),
            np.array(lengths, dtype=np.int32).reshape(-1, 2),
            reasons,
        )

    def _of_pieces(self, pieces: list[Piece]) -> list[NDArray[np.int32]]:
        if self._words is not None:
            encoded = self._words.encode_each([(piece.text, not piece.first) for piece in pieces])
        else:
            encoded = [self._tokenizer.encode(piece.text, continued=not piece.first) for piece in pieces]
        return [self._framed(*pair) for pair in zip(pieces, encoded, strict=True)]

    def _framed(self, piece: Piece, tokens: NDArray[np.int32]) -> NDArray[np.int32]:
        """A document with the token that stands in front of it, and its end."""
        if len(tokens) == 0 or not piece.first:
            return tokens
        tokens = with_start(tokens, self._tokenizer)
        end = self._tokenizer.eos_id
        return np.append(tokens, np.int32(end)) if piece.last and end is not None else tokens
