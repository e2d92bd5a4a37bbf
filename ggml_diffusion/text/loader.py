"""Training text: from files to batches of token sequences.

Documents are tokenised one by one, each followed by end-of-text, and with BOS in front where the base wants
it, and laid end to end. A long document continues in the next sequence, short ones share one, and every batch
says which token belongs to which document, so that attention can stay inside. Part of the sequences is held
out, the same ones whatever the seed is, unless the text comes with a split of its own.

An example, a prompt with its response, is a sequence by itself: it is never cut in two, and its padding costs
nothing. The prompt is never a target. All text comes first, then all examples.

In memory are the order of the sequences, some 12 bytes each, and the batch that is asked for; tokens stay on
the disk.

Deliberately not here: masking (corruption.py), where tokens come from and are kept (kept_tokens.py), how they
are cut (sequences.py).
Letters: B sequences, T tokens.
"""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, overload

import numpy as np
from numpy.typing import NDArray

from ggml_diffusion.errors import UserError
from ggml_diffusion.randomness import Stream, generator_of
from ggml_diffusion.text.kept_tokens import Reading, keep_only, open_tokens
from ggml_diffusion.text.prompts import TextEncoder
from ggml_diffusion.text.sequences import JoinedSequences, Sequences
from ggml_diffusion.text.sources import Data, find_sources, names_of
from ggml_diffusion.text.token_store import chunks

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
        n_blank: others with at most one character that is no white space.
        n_refused: documents that could not be used, which are left out and not counted by `n_documents`.
        refusals: the first of these, a line each with its place and the reason.
        n_examples: prompts with their responses.
        n_too_long: examples whose prompts alone fill a sequence, which are left out.
        held_out_fraction: share of the sequences that the split "held_out" has, if it is drawn.
        has_own_split: whether the text comes with a split of its own.
        n_sequences: sequences of the split.
        n_tokens: tokens of the split, end-of-text included.
        epoch: of the next pass.

    """

    def __init__(
        self,
        data: Data,
        tokenizer: TextEncoder,
        sequence_length: int,
        batch_size: int,
        seed: int = 0,
        *,
        split: Split = "train",
        held_out_fraction: float = 0.0,
        include: Sequence[str] = (),
        reading: Reading | None = None,
    ) -> None:
        """Read and tokenise all text, or find its tokens where they were kept.

        Args:
            data: a path or a list of paths: text files (one document each), .jsonl files (one document a
                line, in its "text", or one example, in its "prompt" and "completion" or its "messages"),
                .parquet files (one a row), each perhaps as .gz, folders of them, or "-" for standard input;
                or any other iterable of strings (one document each) or of records (mappings, as those
                lines). `Records` makes records of a list of strings.
            tokenizer: of the model.
            sequence_length: T, at least 2.
            batch_size: B; for the trainer, the sequences of one optimizer step.
            seed: of the order.
            split: the sequences to train on, those held out, or all.
            held_out_fraction: share of the sequences that is held out: none at 0, else at least one.
            include: patterns of names, as "*.py", that are read as text in folders too.
            reading: where tokens are kept, who is told of progress; None = they go with this process.

        Raises:
            UserError: a file that cannot be read, or too many documents that cannot be used, named; no room
                for the tokens; or no sequence is left.

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
        self._names = names_of(data)
        self._read(data, include, tokenizer, reading or Reading())
        if len(self._sequences) == 0:
            raise UserError(
                f"{self._names}: no text to train on: {self.n_documents} documents, {self.n_skipped} of "
                f"them empty"
                + (
                    f", and {self.n_too_long} prompts that leave no room for a response in "
                    f"{sequence_length} tokens"
                    if self.n_too_long
                    else ""
                )
            )
        self._select(split)

    def _read(self, data: Data, include: Sequence[str], tokenizer: TextEncoder, reading: Reading) -> None:
        """Open the tokens of all files; held-out files, if there are any, are a text of their own."""
        sources = find_sources(data, include)
        groups = [sources.files, sources.held_out] if sources.held_out else [sources.files]
        self._stores = [open_tokens(group, tokenizer, self.sequence_length, reading) for group in groups]
        several = [Sequences(store, self.sequence_length) for store in self._stores]
        self._n_own_train = len(several[0]) if len(several) == 2 else None
        self._sequences: Sequences | JoinedSequences = (
            several[0] if len(several) == 1 else JoinedSequences(*several)
        )
        texts = [store.manifest for store in self._stores]
        self.n_documents = sum(text.n_documents for text in texts)
        self.n_skipped = sum(text.n_skipped for text in texts)
        self.n_blank = sum(text.n_blank for text in texts)
        self.n_refused = sum(text.n_refused for text in texts)
        self.refusals = [refusal for text in texts for refusal in text.refusals]
        self.n_examples, self.n_too_long = self._sequences.n_examples, self._sequences.n_too_long

    @property
    def has_own_split(self) -> bool:
        """Whether the text comes with held-out files of its own."""
        return self._n_own_train is not None

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

    def keep_only_this_text(self) -> None:
        """Delete the tokens of other texts beside those of this one, if these are kept."""
        keep_only(self._stores)

    def _select(self, split: Split) -> None:
        """Take the sequences of one split, in the order of the text."""
        n_all = len(self._sequences)
        if self._n_own_train is None:
            self._rows = _rows_of_split(n_all, split, self.held_out_fraction)
        else:
            first = self._n_own_train if split == "held_out" else 0
            stop = self._n_own_train if split == "train" else n_all
            self._rows = _compact(np.arange(first, stop, dtype=np.int64))
        if len(self._rows) == 0:
            raise UserError(
                f"{self._names}: the text makes {n_all} sequences of {self.sequence_length} tokens, "
                f"none of which is left for the split '{split}': add text, or shorten the sequences"
            )
        self.n_sequences = len(self._rows)
        self.n_tokens = int(self._sequences.lengths(self._rows).sum(dtype=np.int64))
        self._ordered_epoch = -1
        self._order: NDArray[np.unsignedinteger] = np.empty(0, dtype=np.uint32)

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
    def sequences(self) -> "Sequence[NDArray[np.int32]]":
        """The split's sequences in the order of the text, none longer than T; each is read when asked for."""
        return _SplitSequences(self._sequences, self._rows)

    def token_counts(self, n_tokens: int) -> NDArray[np.int64]:
        """(n_tokens,) how often each token comes in the split's sequences; n_tokens as in the vocabulary."""
        counts = np.zeros(n_tokens, dtype=np.int64)
        for start, stop in chunks(self.n_sequences, 1 << 12):
            several = [self._sequences.tokens(row) for row in self._rows[start:stop].tolist()]
            counts += np.bincount(np.concatenate(several), minlength=n_tokens)
        return counts

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the tokens, of where documents start and of how long prompts are, of the whole text, as
        hexadecimal digits."""
        return self._sequences.fingerprint()

    def _order_of(self, epoch: int) -> NDArray[np.unsignedinteger]:
        """The order of the split's sequences in an epoch; that of the last epoch asked for is kept."""
        if self._ordered_epoch != epoch:
            generator = generator_of(self.seed, epoch, Stream.DATA_ORDER)
            self._order = _compact(generator.permutation(self.n_sequences))
            self._ordered_epoch = epoch
        return self._order

    def _batch(self, rows: NDArray[np.unsignedinteger]) -> TokenBatch:
        tokens = np.empty((len(rows), self.sequence_length), dtype=np.int32)
        document_ids = np.empty_like(tokens)
        lengths = self._sequences.lengths(rows)
        for row, length, its_tokens, its_ids in zip(
            rows.tolist(), lengths.tolist(), tokens, document_ids, strict=True
        ):
            its_tokens[:length] = self._sequences.tokens(row)
            its_ids[:length] = self._sequences.document_ids(row)
            # Padding repeats a sequence's last token: it is never looked at.
            its_tokens[length:], its_ids[length:] = its_tokens[length - 1], its_ids[length - 1]
        maskable = None
        if self.n_examples:
            maskable = np.arange(self.sequence_length) >= self._sequences.prompt_lengths(rows)[:, None]
        return TokenBatch(tokens, lengths, document_ids, maskable)


class _SplitSequences(Sequence[NDArray[np.int32]]):
    """Sequences of one split, read one by one."""

    def __init__(self, sequences: Sequences | JoinedSequences, rows: NDArray[np.unsignedinteger]) -> None:
        self._sequences = sequences
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> NDArray[np.int32]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[NDArray[np.int32]]: ...
    def __getitem__(self, index: int | slice) -> NDArray[np.int32] | Sequence[NDArray[np.int32]]:
        if isinstance(index, slice):
            return _SplitSequences(self._sequences, self._rows[index])
        return self._sequences.tokens(int(self._rows[index]))


def _compact(numbers: NDArray[np.int64]) -> NDArray[np.unsignedinteger]:
    """Numbers of sequences in half of the memory, unless there are more than 2^32."""
    return numbers.astype(np.uint32 if len(numbers) <= 1 << 32 else np.uint64)


def _rows_of_split(n_sequences: int, split: Split, held_out_fraction: float) -> NDArray[np.unsignedinteger]:
    """Which sequences belong to a split. It does not depend on the seed, so that runs can be compared."""
    n_held_out = 0
    if held_out_fraction > 0:
        n_held_out = min(n_sequences - 1, max(1, round(n_sequences * held_out_fraction)))
    shuffled = _compact(generator_of(_HELD_OUT_SEED, 0, Stream.HELD_OUT_SPLIT).permutation(n_sequences))
    chosen = {"train": shuffled[n_held_out:], "held_out": shuffled[:n_held_out], "all": shuffled}[split]
    return np.sort(chosen)
