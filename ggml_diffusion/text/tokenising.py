"""A text, read and tokenised once, into the files of a token store.

A large text is tokenised by processes side by side, and written in order. A disk that the tokens would not
fit on is refused as soon as a hundredth of the text shows how many there will be.

Deliberately not here: how text becomes tokens (encoding.py), processes (workers.py), whether the tokens are
there already (kept_tokens.py).
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack

import numpy as np

from ggml_diffusion.errors import UserError
from ggml_diffusion.machine import disk_free, memory_available, processors
from ggml_diffusion.text.encoding import REFUSED, Batch, BatchEncoder, Encoded, Piece, batches
from ggml_diffusion.text.files import Position, documents
from ggml_diffusion.text.prompts import TextEncoder
from ggml_diffusion.text.sources import TextFile
from ggml_diffusion.text.text_key import stamp_of
from ggml_diffusion.text.token_store import TokenWriter
from ggml_diffusion.text.tokenizer import Tokenizer
from ggml_diffusion.text.workers import EncodingPool
from ggml_diffusion.units import in_bytes

OnProgress = Callable[[int, int], None]  # bytes of text that are done, of how many

IN_PROCESS_BYTES = 8 << 20  # processes take a second to start, in which this one does as much
_BYTES_A_PROCESS = 512 << 20  # of memory, with a vocabulary of 262,144 tokens
_TEXT_BYTES_A_PROCESS = 2 << 20
_NAMED_REFUSALS = 5


class TextWriter:
    """Puts the tokens of batches, in order, into the files of a store.

    Attributes:
        n_documents: so far, examples included.
        n_skipped: documents without any token.
        n_blank: others with at most one character that is no white space.
        n_refused: documents that could not be used, which `n_documents` does not count.
        refusals: the first of them, with place and reason.

    """

    def __init__(self, files: TokenWriter, eos_id: int | None, *, strict: bool = False) -> None:
        self._files = files
        self._eos_id = eos_id
        self._strict = strict
        self._is_empty, self._n_letters = True, 0  # of the document that was begun last
        self.n_documents = self.n_skipped = self.n_blank = self.n_refused = 0
        self.refusals: list[str] = []

    def add(self, batch: Batch, encoded: Encoded) -> None:
        """Append a batch.

        Raises:
            UserError: a document was refused, with its place, and the reading is strict.
            OSError: the disk refuses.

        """
        lengths = encoded.lengths
        self._note_refusals(batch, encoded)
        is_example = lengths[:, 0] >= 0
        if is_example.any():
            n_tokens_of = np.where(lengths[:, 0] == REFUSED, 0, np.maximum(lengths[:, 0], 0) + lengths[:, 1])
            of_examples = np.repeat(is_example, n_tokens_of)
            self._files.add_examples(encoded.tokens[of_examples], lengths[is_example])
            self.n_documents += int(is_example.sum())
            text = encoded.tokens[~of_examples]
        else:
            text = encoded.tokens
        starts: list[int] = []
        ends: list[int] = []
        n_tokens = 0
        for item, count in zip(batch.items, lengths[:, 1].tolist(), strict=True):
            if not isinstance(item, Piece):
                continue
            if item.first:
                self.n_documents += 1
                self._is_empty, self._n_letters = True, 0
            self._n_letters += len(item.text.strip())
            if count and self._is_empty:
                starts.append(n_tokens + len(ends))
                self._is_empty = False
            n_tokens += count
            self.n_blank += item.last and not self._is_empty and self._n_letters < 2
            if item.last and self._is_empty:
                self.n_skipped += 1
            elif item.last and not item.first and self._eos_id is not None:
                ends.append(n_tokens)  # a document in pieces; others have their end already
        if ends:
            text = np.insert(text, ends, self._eos_id or 0)
        self._files.add_text(text, starts)

    def _note_refusals(self, batch: Batch, encoded: Encoded) -> None:
        refused = np.flatnonzero(encoded.lengths[:, 0] == REFUSED)
        self.n_refused += len(refused)
        for item in refused[: _NAMED_REFUSALS - len(self.refusals)].tolist():
            self.refusals.append(f"{batch.places[item]}: {encoded.reasons[encoded.lengths[item, 1]]}")
        check_refusals(self.n_documents, self.n_refused, self.refusals, self._strict, is_all=False)


def check_refusals(
    n_documents: int, n_refused: int, refusals: Sequence[str], strict: bool, *, is_all: bool = True
) -> None:
    """Refuse a text that has documents that cannot be used: more than a tenth, or any if `strict`.

    Raises:
        UserError: names the first one.

    """
    n_all = n_documents + n_refused
    if n_refused and strict:
        raise UserError(refusals[0])
    if is_all and 10 * n_refused > n_all:
        more = f" ({n_refused} of {n_all} documents cannot be used)" if n_refused > 1 else ""
        raise UserError(refusals[0] + more)


def tokenise(
    files: Sequence[TextFile],
    tokenizer: TextEncoder,
    writer: TokenWriter,
    n_processes: int | None,
    on_progress: OnProgress,
    *,
    strict: bool = False,
) -> TextWriter:
    """Write all tokens of a text.

    Args:
        files: of the text, in their order.
        tokenizer: a `Tokenizer` can be read again by other processes; another one works in this one.
        writer: not finished here.
        n_processes: at most; None = as many as there are processors.
        on_progress: called with (0, total) first, and (total, total) last.
        strict: stop at the first document that cannot be used.

    Returns:
        With the counts of documents.

    Raises:
        UserError: a file that cannot be used, or with `strict` a document, named; or too little room on the
            disk.
        OSError: the disk refuses.

    """
    total = max(1, sum(stamp_of(file.path)[0] for file in files))
    on_progress(0, total)
    text = TextWriter(writer, tokenizer.eos_id, strict=strict)
    position = Position()
    source = batches(documents(files, position), position)
    with ExitStack() as stack:
        if isinstance(tokenizer, Tokenizer) and total >= IN_PROCESS_BYTES:
            pool = stack.enter_context(EncodingPool(tokenizer, _n_processes(n_processes, total)))
            encoded = pool.encode(source)
        else:
            encoded = _encoded_here(source, stack.enter_context(BatchEncoder(tokenizer)))
        checked_bytes = 0
        for batch, tokens in encoded:
            text.add(batch, tokens)
            done = min(batch.n_bytes, total)
            if done - checked_bytes >= max(1 << 20, total // 100):
                checked_bytes = done
                _check_room(writer, total / done)
            on_progress(done, total)
    on_progress(total, total)
    return text


def _encoded_here(source: Iterable[Batch], encoder: BatchEncoder) -> Iterator[tuple[Batch, Encoded]]:
    return ((batch, encoder.encode(batch.items)) for batch in source)


def _n_processes(at_most: int | None, text_bytes: int) -> int:
    """Processes that are worth their start, and have room in memory."""
    wanted = min(at_most or processors(), text_bytes // _TEXT_BYTES_A_PROCESS)
    return max(1, min(wanted, memory_available() // _BYTES_A_PROCESS))


def _check_room(writer: TokenWriter, whole: float) -> None:
    """Refuse to go on where the rest, at `whole` times what is written in all, will not fit on the disk."""
    folder = writer.folder.parent
    while not folder.exists():  # files without a name
        folder = folder.parent
    needed = int(writer.n_bytes * (whole - 1))
    free = disk_free(folder)
    if needed > free:
        raise UserError(
            f"{folder}: the tokens of this text take about "
            f"{in_bytes(int(writer.n_bytes * whole))}, of which {in_bytes(needed)} are not written, but the "
            f"disk has {in_bytes(free)} left: make room, or train on less text"
        )
