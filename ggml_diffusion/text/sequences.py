"""The tokens of a text as sequences of up to T tokens.

Documents lie end to end, and are cut every T tokens: a long document goes on in the next sequence, short ones
share one. An example, a prompt with its response, is a sequence by itself: it is never cut in two, and one
that is too long loses its end. All text comes first, then all examples.

Deliberately not here: their order, and which are held out (loader.py), where the tokens lie (token_store.py).
"""

import hashlib
from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from ggml_diffusion.text.token_store import TokenStore, chunks

_CHUNK_TOKENS = 1 << 20


class Sequences:
    """Sequences of the tokens in a store.

    Attributes:
        T: tokens a sequence at most.
        lengths: (n,) tokens of each.
        n_examples: of these, the last ones; those that fit.
        n_too_long: examples whose prompts alone fill a sequence, which are left out.

    """

    def __init__(self, store: TokenStore, T: int) -> None:
        self.T = T
        self._store = store
        self._n_text_tokens = store.manifest.n_text_tokens
        # A single token that is left over has nothing to be predicted from.
        self._n_text = self._n_text_tokens // T + (self._n_text_tokens % T > 1)
        both = store.example_lengths()
        fits = both[:, 0] < T
        whole = both.sum(axis=1, dtype=np.int64)
        self._example_starts = (np.cumsum(whole) - whole)[fits]
        self._prompt_lengths = both[fits, 0]
        self._example_lengths = np.minimum(whole[fits], T).astype(np.int32)
        self.n_examples = len(self._prompt_lengths)
        self.n_too_long = len(both) - self.n_examples

    def __len__(self) -> int:
        """How many there are."""
        return self._n_text + self.n_examples

    def lengths(self, rows: NDArray[np.integer]) -> NDArray[np.int32]:
        """Tokens (n,) of sequences (n,)."""
        found = np.full(len(rows), self.T, dtype=np.int32)
        found[rows == self._n_text - 1] = self._n_text_tokens - self.T * (self._n_text - 1)
        np.minimum(found, self.T, out=found)
        is_example = rows >= self._n_text
        found[is_example] = self._example_lengths[rows[is_example] - self._n_text]
        return found

    def tokens(self, row: int) -> NDArray[np.int32]:
        """The tokens (n,) of a sequence, n <= T."""
        if row >= self._n_text:
            start = int(self._example_starts[row - self._n_text])
            return self._store.examples(start, start + int(self._example_lengths[row - self._n_text]))
        return self._store.text(row * self.T, min((row + 1) * self.T, self._n_text_tokens))

    def document_ids(self, row: int) -> NDArray[np.int32]:
        """(n,) which document of the sequence each of its tokens belongs to, counted from 0."""
        if row >= self._n_text:
            return np.zeros(self._example_lengths[row - self._n_text], dtype=np.int32)
        starts = self._store.starts(row * self.T, min((row + 1) * self.T, self._n_text_tokens))
        starts[0] = False
        return np.cumsum(starts, dtype=np.int32)

    def prompt_lengths(self, rows: NDArray[np.integer]) -> NDArray[np.int32]:
        """Tokens (n,) that are never a target, at the beginning of sequences (n,)."""
        found = np.zeros(len(rows), dtype=np.int32)
        is_example = rows >= self._n_text
        found[is_example] = self._prompt_lengths[rows[is_example] - self._n_text]
        return found

    def fingerprint(self) -> str:
        """SHA-256 of the tokens, of where documents start and of how long prompts are, in hexadecimal."""
        known = self._store.manifest
        if known.fingerprint and known.fingerprint_length == self.T:
            return known.fingerprint
        digest = hashlib.sha256()
        for start, stop in chunks(self._n_text_tokens, _CHUNK_TOKENS):
            digest.update(self._store.text(start, stop).astype("<i4", copy=False).data)
        for tokens in self._tokens_of_examples():
            digest.update(tokens.astype("<i4", copy=False).data)
        for start, stop in chunks(self._n_text_tokens, _CHUNK_TOKENS):
            starts = start + np.flatnonzero(self._store.starts(start, stop))
            digest.update(starts.astype("<i8", copy=False).data)
        if self.n_examples:
            whole = np.cumsum(self._example_lengths, dtype=np.int64)
            starts = self._n_text_tokens + whole - self._example_lengths
            digest.update(starts.astype("<i8", copy=False).data)
            digest.update(self._prompt_lengths.astype("<i8").data)
        return digest.hexdigest()

    def _tokens_of_examples(self) -> Iterator[NDArray[np.int32]]:
        """The examples' tokens, a few thousand examples at a time."""
        for first, stop in chunks(self.n_examples, 1 << 12):
            starts, lengths = self._example_starts[first:stop], self._example_lengths[first:stop]
            begin = int(starts[0])
            tokens = self._store.examples(begin, int(starts[-1] + lengths[-1]))
            shifts = starts - begin - (np.cumsum(lengths) - lengths)  # by what was cut off before
            yield tokens[np.repeat(shifts, lengths) + np.arange(lengths.sum())]


class JoinedSequences:
    """Sequences of two texts, one behind the other; for the attributes, see `Sequences`."""

    def __init__(self, first: Sequences, second: Sequences) -> None:
        self._parts = (first, second)
        self._n_first = len(first)
        self.n_examples = first.n_examples + second.n_examples
        self.n_too_long = first.n_too_long + second.n_too_long

    def __len__(self) -> int:
        """How many there are."""
        return sum(len(part) for part in self._parts)

    def lengths(self, rows: NDArray[np.integer]) -> NDArray[np.int32]:
        """Tokens (n,) of sequences (n,)."""
        return self._of_both(rows, Sequences.lengths)

    def prompt_lengths(self, rows: NDArray[np.integer]) -> NDArray[np.int32]:
        """Tokens (n,) that are never a target, at the beginning of sequences (n,)."""
        return self._of_both(rows, Sequences.prompt_lengths)

    def tokens(self, row: int) -> NDArray[np.int32]:
        """The tokens (n,) of a sequence, n <= T."""
        part, row = self._part_of(row)
        return part.tokens(row)

    def document_ids(self, row: int) -> NDArray[np.int32]:
        """(n,) which document of the sequence each of its tokens belongs to, counted from 0."""
        part, row = self._part_of(row)
        return part.document_ids(row)

    def fingerprint(self) -> str:
        """SHA-256 of both fingerprints, in hexadecimal."""
        return hashlib.sha256(" ".join(part.fingerprint() for part in self._parts).encode()).hexdigest()

    def _part_of(self, row: int) -> tuple[Sequences, int]:
        return (self._parts[0], row) if row < self._n_first else (self._parts[1], row - self._n_first)

    def _of_both(
        self,
        rows: NDArray[np.integer],
        values: Callable[[Sequences, NDArray[np.integer]], NDArray[np.int32]],
    ) -> NDArray[np.int32]:
        rows = np.asarray(rows, dtype=np.int64)
        is_first = rows < self._n_first
        found = np.empty(len(rows), dtype=np.int32)
        found[is_first] = values(self._parts[0], rows[is_first])
        found[~is_first] = values(self._parts[1], rows[~is_first] - self._n_first)
        return found
