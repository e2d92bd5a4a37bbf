"""What is in the files of the text, as documents.

A text file is one document, which comes in blocks: that bounds the memory that tokenising takes. A file of
JSON lines has a document a line, a file of parquet one a row. What cannot be used comes as a `Refusal`, with
its place, and whoever asked decides what that means; a file that cannot be read at all is an error.

Deliberately not here: which files these are (sources.py), tokens (encoding.py), how a record becomes an
example (prompts.py).
"""

import codecs
import contextlib
import gzip
import json
import sys
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any, cast

from ggml_diffusion.errors import UserError, one_line
from ggml_diffusion.regular_file import open_regular
from ggml_diffusion.text.cutting import cut
from ggml_diffusion.text.sources import RECORD_KEYS, TextFile

MAX_LINE_BYTES = 16 << 20
_BLOCK_CHARS = 1 << 20
_READ_BYTES = 1 << 20
_ROWS = 256
# Text becomes a third or a tenth by gzip, a log a thirtieth; a thousandth is the most that there is.
_MOST_COMPRESSED, _UNPACKED_FREE = 100, 16 << 20


@dataclass(frozen=True)
class Record:
    """A JSON object without a string "text", which is to become an example.

    Attributes:
        value: the object.
        n_chars: about how long it is, as text.

    """

    value: dict[str, Any]
    n_chars: int = 1024


@dataclass(frozen=True)
class Refusal:
    """A document that cannot be used, and why."""

    reason: str
    n_chars: int = 128


@dataclass
class Position:
    """How far the reading has come.

    Attributes:
        place: what was read last, "FILE" or "FILE, line N".
        n_bytes: of all files so far, as they are on the disk.

    """

    place: str = ""
    n_bytes: int = 0


Document = Iterator[str] | Record | Refusal


def documents(files: Sequence[TextFile], position: Position) -> Iterator[Document]:
    """Every document in turn, as the blocks of text that it consists of, a record or a refusal.

    Args:
        files: in their order.
        position: kept up to date.

    Raises:
        UserError: a file that cannot be read, named.

    """
    for file in files:
        position.place = file.place()
        before = position.n_bytes
        if file.kind == "text":
            yield _text(file, position)
        else:
            yield from _records(file, position) if file.kind == "lines" else _rows(file, position)
        position.n_bytes = before + file.path.stat().st_size


@contextlib.contextmanager
def _opened(file: TextFile) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """A file's content, unpacked, and the file on the disk; what fails in the block is one line."""
    try:
        with open_regular(file.path) as raw:
            if not file.is_compressed:
                yield raw, raw
                return
            with _Unpacked(file, raw) as content:
                yield cast(IO[bytes], content), raw
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise UserError(f"{file.place()}: cannot be unpacked: no gzip, or cut short") from None
    except OSError as error:
        raise UserError(f"{file.place()}: cannot be read: {error.strerror or error}") from None


class _Unpacked(gzip.GzipFile):
    """What is in a gzip file, as far as it could be text: of some files no disk would hold all of it."""

    def __init__(self, file: TextFile, raw: IO[bytes]) -> None:
        super().__init__(fileobj=raw)
        self._file, self._raw, self._n_bytes = file, raw, 0

    def read(self, size: int | None = -1) -> bytes:
        return self._counted(super().read(size))

    def readline(self, size: int | None = -1) -> bytes:
        return self._counted(super().readline(size))

    def _counted(self, data: bytes) -> bytes:
        self._n_bytes += len(data)
        if self._n_bytes > max(_UNPACKED_FREE, _MOST_COMPRESSED * self._raw.tell()):
            raise UserError(
                f"{self._file.place()}: unpacks to more than {_MOST_COMPRESSED} times its size, "
                f"as no text does: unpack it first, if it is one"
            )
        return data


# -- text ----------------------------------------------------------------------------------------------


def _text(file: TextFile, position: Position) -> Iterator[str] | Refusal:
    fault = _fault_of_text(file)
    if fault is None:
        return cut(_decoded(file, position), _BLOCK_CHARS)
    position.place, reason = fault
    return Refusal(reason)


def _decoded(file: TextFile, position: Position) -> Iterator[str]:
    """The text of a file in pieces, with line feeds at the ends of its lines."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    before, waiting = position.n_bytes, ""
    with _opened(file) as (content, raw):
        while data := content.read(_READ_BYTES):
            position.n_bytes = before + raw.tell()
            text = waiting + decoder.decode(data)
            waiting = "\r" if text.endswith("\r") else ""  # perhaps half of an end of line
            yield text[: len(text) - len(waiting)].replace("\r\n", "\n")
    yield waiting + decoder.decode(b"", final=True)


def _fault_of_text(file: TextFile) -> tuple[str, str] | None:
    """Where and why a file is no text, found before any of it is used."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    n_lines = n_bytes = line_start = 0  # of what is decoded; where its last line starts
    with _opened(file) as (content, _):
        data = content.read(_READ_BYTES)
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            return file.place(1), "UTF-16, not UTF-8 text: save it as UTF-8"
        while True:
            try:
                decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                good = error.object[: error.start]
                n_lines += good.count(b"\n")
                first = n_bytes + len(data) - len(error.object)
                line_start = first + good.rfind(b"\n") + 1 if b"\n" in good else line_start
                return file.place(n_lines + 1), _not_utf8(first + error.start - line_start)
            if not data:
                return None
            n_lines += data.count(b"\n")
            line_start = n_bytes + data.rfind(b"\n") + 1 if b"\n" in data else line_start
            n_bytes += len(data)
            data = content.read(_READ_BYTES)


def _not_utf8(n_bytes_before: int) -> str:
    return f"not UTF-8 text at byte {n_bytes_before + 1}"


# -- records -------------------------------------------------------------------------------------------


def _records(file: TextFile, position: Position) -> Iterator[Document]:
    """The documents of a file of JSON lines; empty lines are passed over."""
    for number, line in enumerate(_lines(file, position), start=1):
        if line is None or line.strip():
            position.place = file.place(number)
            try:
                yield _document(_parsed(line, number == 1), len(line or b""))
            except UserError as error:
                yield Refusal(str(error))


def _lines(file: TextFile, position: Position) -> Iterator[bytes | None]:
    """The lines of a file, None for one that is too long to be held in memory."""
    before = position.n_bytes
    limit = sys.maxsize - 1 if file.is_kept else MAX_LINE_BYTES  # what was in memory before may be so again
    with _opened(file) as (content, raw):
        while line := content.readline(limit + 1):
            is_too_long = len(line) > limit
            while len(line) > limit and not line.endswith(b"\n"):
                line = content.readline(limit + 1) or b"\n"
            position.n_bytes = before + raw.tell()
            yield None if is_too_long else line


def _parsed(line: bytes | None, is_first: bool) -> dict[str, Any]:
    if line is None:
        raise UserError(f"longer than {MAX_LINE_BYTES >> 20} MB")
    if is_first:
        line = line.removeprefix(codecs.BOM_UTF8)
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise UserError(_not_utf8(error.start)) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"not valid JSON: {getattr(error, 'msg', error)}") from None
    return record if isinstance(record, dict) else {}


def _document(record: dict[str, Any], n_chars: int) -> Iterator[str] | Record:
    text = record.get("text")
    if not isinstance(text, str):
        return Record({key: record[key] for key in RECORD_KEYS if key in record}, n_chars)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError('"text" holds half of a surrogate pair') from None
    return cut([text], _BLOCK_CHARS)


def _rows(file: TextFile, position: Position) -> Iterator[Document]:
    """The documents of a file of parquet."""
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise UserError(
            f"{file.place()}: parquet needs pyarrow: pip install 'ggml-diffusion[data]'"
        ) from None
    before, n_file_bytes = position.n_bytes, file.path.stat().st_size
    number = 0
    try:
        with _opened(file) as (content, _), parquet.ParquetFile(content) as table:
            columns = [name for name in table.schema_arrow.names if name in RECORD_KEYS]
            n_rows = max(1, table.metadata.num_rows)
            for batch in table.iter_batches(_ROWS, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    position.n_bytes = before + n_file_bytes * number // n_rows
                    position.place = file.place(number)
                    try:
                        yield _document(_without_nulls(row), len(str(row)))
                    except UserError as error:
                        yield Refusal(str(error))
    except pyarrow.ArrowException as error:
        raise UserError(f"{file.place()}: cannot be read as parquet: {one_line(str(error))}") from None


def _without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """A row without the keys that other rows have: every message has the keys of all messages there."""

    def cleaned(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: cleaned(item) for key, item in value.items() if item is not None or key == "content"}
        return [cleaned(item) for item in value] if isinstance(value, list) else value

    return {key: cleaned(value) for key, value in row.items() if value is not None}
