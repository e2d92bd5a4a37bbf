"""Training text on disk: .txt and .jsonl files, and folders of them, as documents.

Files are read line by line, so that a fault has a line number. A long document comes in blocks, which bounds
the memory that tokenising takes.
Deliberately not here: tokens (encoding.py), how a record becomes an example (prompts.py).
"""

import codecs
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ggml_diffusion.errors import UserError
from ggml_diffusion.regular_file import kind_of, open_regular

MAX_LINE_BYTES = 16 << 20
_BLOCK_CHARS = 1 << 20


@dataclass(frozen=True)
class Record:
    """A JSON object without a string "text", which is to become an example.

    Attributes:
        value: the object.
        n_chars: about how long it is, as text.

    """

    value: dict[str, Any]
    n_chars: int = 1024


@dataclass
class Position:
    """How far the reading has come.

    Attributes:
        place: what was read last, "FILE" or "FILE, line N".
        n_bytes: of all files so far.

    """

    place: str = ""
    n_bytes: int = 0


def documents(files: Sequence[Path], position: Position) -> Iterator[Iterator[str] | Record]:
    """Every document in turn, as the blocks of text that it consists of, or as a record.

    Args:
        files: as `text_files` gives them.
        position: kept up to date.

    Raises:
        UserError: a file that cannot be read, or a line that cannot be used, named.

    """
    for file in files:
        position.place = str(file)
        if file.suffix.lower() == ".jsonl":
            for document in _records(file, position):
                yield _blocks(document.splitlines(keepends=True)) if isinstance(document, str) else document
        else:
            yield _blocks(_lines(file, position))


def text_files(paths: Iterable[Path]) -> list[Path]:
    """The files that paths stand for, in the order in which they are read.

    Raises:
        UserError: a path leads nowhere or to no text.

    """
    return [file for path in paths for file in _files(path)]


def _files(path: Path) -> list[Path]:
    """The files that a path stands for."""
    if path.is_dir():
        found = sorted(
            file for file in path.rglob("*") if file.suffix.lower() in (".txt", ".jsonl") and file.is_file()
        )
        if not found:
            raise UserError(f"{path}: the folder holds no .txt and no .jsonl file")
        return found
    kind = kind_of(path)
    if kind is not None:
        raise UserError(f"{path}: {kind}, not a file or folder")
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.suffix.lower() not in (".txt", ".jsonl"):
        raise UserError(f"{path}: only .txt and .jsonl files are read, and folders of them")
    return [path]


def _lines(file: Path, position: Position) -> Iterator[str]:
    """A file's lines with their line feeds, checked one by one, so that a fault has a line number."""
    try:
        with open_regular(file) as stream:
            number = 0
            while line := stream.readline(MAX_LINE_BYTES + 1):
                number += 1
                position.n_bytes += len(line)
                yield _decoded(line, file, number)
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from None


def _decoded(line: bytes, file: Path, number: int) -> str:
    if len(line) > MAX_LINE_BYTES:
        raise UserError(f"{file}, line {number}: longer than {MAX_LINE_BYTES >> 20} MB")
    if number == 1:
        line = line.removeprefix(codecs.BOM_UTF8)
    try:
        text = line.decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{file}, line {number}: not UTF-8 text at byte {error.start + 1}") from None
    return text[:-2] + "\n" if text.endswith("\r\n") else text


def _records(file: Path, position: Position) -> Iterator[str | Record]:
    """The texts and records of a file of JSON lines; empty lines are passed over."""
    for number, line in enumerate(_lines(file, position), start=1):
        if not line.strip():
            continue
        position.place = f"{file}, line {number}"
        try:
            yield _text_or_record(_parsed(line), len(line))
        except UserError as error:
            raise UserError(f"{position.place}: {error}") from None


def _parsed(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not valid JSON: {getattr(error, 'msg', error)}") from None
    return record if isinstance(record, dict) else {}


def _text_or_record(record: dict[str, Any], n_chars: int) -> str | Record:
    text = record.get("text")
    if not isinstance(text, str):
        return Record(record, n_chars)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError('"text" holds half of a surrogate pair') from None
    return text


def _blocks(lines: Iterable[str]) -> Iterator[str]:
    """Join lines to blocks, cut where a single line feed separates two words: no token spans it."""
    block: list[str] = []
    n_chars = 0
    for line in lines:
        if n_chars >= _BLOCK_CHARS:
            between_words = not (line[0].isspace() or block[-1][-2:-1].isspace() or block[-1] == "\n")
            if between_words or n_chars >= 8 * _BLOCK_CHARS:
                yield "".join(block)
                block, n_chars = [], 0
        block.append(line)
        n_chars += len(line)
    if block:
        yield "".join(block)
