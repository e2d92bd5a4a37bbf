"""Training text: from files to batches of token sequences.

Documents are tokenised one by one, each followed by end-of-text, and with BOS in front where the base wants
it, and laid end to end in one stream of int32; a sequence is a view of it. A long document continues in the
next sequence, short ones share one, and every batch says which token belongs to which document, so that
attention can stay inside. Part of the sequences is held out, the same ones whatever the seed is.

An example, a prompt with its response, is a sequence by itself: it is never cut in two, and its padding costs
nothing. The prompt is never a target. All text comes first, then all examples.

Deliberately not here: masking (corruption.py), the vocabulary (tokenizer.py), files and lines (files.py), how
a record becomes an example (prompts.py).
Letters: B sequences, T tokens.
"""

import copy
import hashlib
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ggml_diffusion.errors import UserError
from ggml_diffusion.randomness import Stream, generator_of
from ggml_diffusion.text.files import documents
from ggml_diffusion.text.prompts import Example, ExampleReader, TextEncoder, with_start

Split = Literal["train", "held_out", "all"]

_HELD_OUT_SEED = 0x68656C64


@dataclass(frozen=True)
class TokenBatch:
    """Sequences that are trained on together.

    Attributes:
        tokens: (B, T) int32.
        lengths: (B,) int32; positions from there on are padding.
        document_ids: (B, T) int32, counted from 0 in each sequence; padding repeats the last one.
        maskable: (B, T) bool, False where a token is never a target, as in a prompt; None = no such tokens.

    """

    tokens: NDArray[np.int32]
    lengths: NDArray[np.int32]
    document_ids: NDArray[np.int32]
    maskable: NDArray[np.bool_] | None = None

    def __len__(self) -> int:
        """B."""
        return len(self.tokens)


class TextDataLoader:
    """Batches of token sequences in a seeded order, epoch after epoch.

    Each pass over it is one epoch, the next pass the next one; every sequence comes once an epoch, and an
    epoch's last batch may have fewer. `batch_at` finds any batch of that endless stream by its number alone.

    Attributes:
        sequence_length: T.
        batch_size: B.
        n_documents: documents in the text, examples included.
        n_skipped: documents without any token, which are left out.
        n_blank: documents with at most one character that is no white space.
        n_examples: prompts with their responses.
        n_too_long: examples whose prompts alone fill a sequence, which are left out.
        held_out_fraction: share of the sequences that the split "held_out" has.
        n_sequences: sequences of the split.
        n_tokens: tokens of the split, end-of-text included.
        epoch: of the next pass.

    """

    def __init__(
        self,
        paths: str | Path | Sequence[str | Path],
        tokenizer: TextEncoder,
        sequence_length: int,
        batch_size: int,
        seed: int = 0,
        *,
        split: Split = "train",
        held_out_fraction: float = 0.0,
    ) -> None:
        """Read and tokenise all text.

        Args:
            paths: .txt files (one document each), .jsonl files (one document a line, in its "text", or one
                example, in its "prompt" and "completion" or its "messages"), or folders, in which both are
                looked for at any depth, in the order of their names.
            tokenizer: of the model.
            sequence_length: T, at least 2.
            batch_size: B; for the trainer, the sequences of one optimizer step.
            seed: of the order.
            split: the sequences to train on, those held out, or all.
            held_out_fraction: share of the sequences that is held out: none at 0, else at least one.

        Raises:
            UserError: a file or line that cannot be used, named; or no sequence is left.

        """
        if sequence_length < 2 or batch_size < 1:
            raise UserError(
                f"sequence_length must be at least 2 and batch_size at least 1, not {sequence_length} and "
                f"{batch_size}"
            )
        self.sequence_length = sequence_length
        self.batch_size = batch_size
        self.seed = seed
        self.epoch = 0
        self.held_out_fraction = held_out_fraction
        self._paths = [Path(paths)] if isinstance(paths, str | Path) else [Path(path) for path in paths]
        self._read(tokenizer)
        self._select(split)

    def with_split(
        self, split: Split, batch_size: int | None = None, seed: int | None = None
    ) -> "TextDataLoader":
        """A loader of another split of the same text, which is shared and not read again.

        Args:
            split: as for a new loader.
            batch_size: None = the same as here.
            seed: of the order; None = the same as here.

        Raises:
            UserError: the split has no sequences.

        """
        other = copy.copy(self)
        other.epoch = 0
        other.batch_size = batch_size or self.batch_size
        other.seed = self.seed if seed is None else seed
        other._select(split)
        return other

    def _select(self, split: Split) -> None:
        """Take the sequences of one split, in the order of the text."""
        n_all = len(self._starts)
        self._rows = _rows_of_split(n_all, split, self.held_out_fraction)
        if len(self._rows) == 0:
            raise UserError(
                f"{self._names()}: the text makes {n_all} sequences of {self.sequence_length} tokens, "
                f"none of which is left for the split '{split}': add text, or shorten the sequences"
            )
        self.n_sequences = len(self._rows)
        self.n_tokens = int(self._lengths[self._rows].sum())
        self._ordered_epoch = -1
        self._order: NDArray[np.int64] = np.empty(0, dtype=np.int64)

    def _names(self) -> str:
        return ", ".join(str(path) for path in self._paths) or "no data"

    def _read(self, tokenizer: TextEncoder) -> None:
        stream, starts = array("i"), array("q")
        examples: list[Example] = []
        self.n_documents = self.n_skipped = self.n_blank = self.n_too_long = 0
        with ExampleReader(tokenizer) as reader:
            for document in documents(self._paths, reader):
                self.n_documents += 1
                if isinstance(document, Example):
                    if len(document.prompt) < self.sequence_length:
                        examples.append(document)
                    else:
                        self.n_too_long += 1
                    continue
                start, n_letters = len(stream), 0
                for number, text in enumerate(document):
                    n_letters += len(text.strip())
                    tokens = tokenizer.encode(text, continued=number > 0)
                    if number == 0 and len(tokens):
                        tokens = with_start(tokens, tokenizer)
                    stream.frombytes(tokens.astype(np.int32, copy=False).tobytes())
                if len(stream) == start:
                    self.n_skipped += 1
                    continue
                self.n_blank += n_letters < 2
                starts.append(start)
                if tokenizer.eos_id is not None:
                    stream.append(tokenizer.eos_id)
        self.n_examples = len(examples)
        self._lay_out(stream, starts, examples)

    def _lay_out(self, stream: "array[int]", starts: "array[int]", examples: list[Example]) -> None:
        """Cut the text into sequences of T tokens, and put each example after it as one."""
        T, n_text = self.sequence_length, len(stream)
        sequence_starts, lengths = list(range(0, n_text, T)), [T] * (n_text // T)
        if n_text % T == 1:
            sequence_starts.pop()  # a single token has nothing to be predicted from
        elif n_text % T:
            lengths.append(n_text % T)
        prompt_lengths = [0] * len(sequence_starts)
        for example in examples:
            tokens = np.concatenate([example.prompt, example.response])[:T]
            sequence_starts.append(len(stream))
            lengths.append(len(tokens))
            prompt_lengths.append(len(example.prompt))
            starts.append(len(stream))
            stream.frombytes(tokens.astype(np.int32, copy=False).tobytes())
        if not sequence_starts:
            raise UserError(
                f"{self._names()}: no text to train on: {self.n_documents} documents, {self.n_skipped} of "
                f"them empty"
                + (
                    f", and {self.n_too_long} prompts that leave no room for a response in {T} tokens"
                    if self.n_too_long
                    else ""
                )
            )
        self._stream: NDArray[np.int32] = np.frombuffer(stream, dtype=np.int32)
        self._document_starts: NDArray[np.int64] = np.frombuffer(starts, dtype=np.int64)
        self._starts: NDArray[np.int64] = np.array(sequence_starts, dtype=np.int64)
        self._lengths: NDArray[np.int64] = np.array(lengths, dtype=np.int64)
        self._prompt_lengths: NDArray[np.int64] = np.array(prompt_lengths, dtype=np.int64)

    def __len__(self) -> int:
        """Batches an epoch."""
        return -(-self.n_sequences // self.batch_size)

    def __iter__(self) -> Iterator[TokenBatch]:
        """The batches of the next epoch."""
        first = self.epoch * len(self)
        self.epoch += 1
        return (self.batch_at(index) for index in range(first, first + len(self)))

    def batch_at(self, index: int) -> TokenBatch:
        """Batch number `index` of the endless stream, counted from 0."""
        epoch, batch = divmod(index, len(self))
        order = self._order_of(epoch)
        return self._batch(self._rows[order[batch * self.batch_size : (batch + 1) * self.batch_size]])

    @property
    def sequences(self) -> list[NDArray[np.int32]]:
        """The split's sequences in the order of the text: views of the stream, none longer than T."""
        starts, lengths = self._starts[self._rows], self._lengths[self._rows]
        return [self._stream[start : start + length] for start, length in zip(starts, lengths, strict=True)]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the tokens, of where documents start and of how long prompts are, of the whole text, as
        hexadecimal digits."""
        digest = hashlib.sha256(self._stream.astype("<i4", copy=False).data)
        digest.update(self._document_starts.astype("<i8", copy=False).data)
        if self.n_examples:
            digest.update(self._prompt_lengths[-self.n_examples :].astype("<i8", copy=False).data)
        return digest.hexdigest()

    def _order_of(self, epoch: int) -> NDArray[np.int64]:
        """The order of the split's sequences in an epoch; that of the last epoch asked for is kept."""
        if self._ordered_epoch != epoch:
            generator = generator_of(self.seed, epoch, Stream.DATA_ORDER)
            self._order = generator.permutation(self.n_sequences)
            self._ordered_epoch = epoch
        return self._order

    def _batch(self, rows: NDArray[np.int64]) -> TokenBatch:
        starts, lengths = self._starts[rows, None], self._lengths[rows, None]
        positions = np.arange(self.sequence_length)
        # Padding repeats a sequence's last token: it is never looked at.
        places = starts + np.minimum(positions, lengths - 1)
        documents = np.searchsorted(self._document_starts, places, side="right")
        return TokenBatch(
            tokens=self._stream[places],
            lengths=lengths[:, 0].astype(np.int32),
            document_ids=(documents - documents[:, :1]).astype(np.int32),
            maskable=positions >= self._prompt_lengths[rows, None] if self.n_examples else None,
        )


def _rows_of_split(n_sequences: int, split: Split, held_out_fraction: float) -> NDArray[np.int64]:
    """Which sequences belong to a split. It does not depend on the seed, so that runs can be compared."""
    n_held_out = 0
    if held_out_fraction > 0:
        n_held_out = min(n_sequences - 1, max(1, round(n_sequences * held_out_fraction)))
    shuffled = generator_of(_HELD_OUT_SEED, 0, Stream.HELD_OUT_SPLIT).permutation(n_sequences)
    chosen = {"train": shuffled[n_held_out:], "held_out": shuffled[:n_held_out], "all": shuffled}[split]
    return np.sort(chosen)
