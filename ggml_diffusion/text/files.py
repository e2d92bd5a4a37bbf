"""Training text on disk: .txt and .jsonl files, and folders of them, as documents.

Files are read line by line, so that a fault has a line number. A long document comes in blocks, which bounds
the memory that tokenising takes.
Deliberately not here: tokens (loader.py), how a record becomes an example (prompts.py).
"""

import codecs
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from ggml_diffusion.errors import UserError
from ggml_diffusion.text.prompts import Example, ExampleReader

MAX_LINE_BYTES = 16 << 20
_BLOCK_CHARS = 1 << 20


def documents(paths: list[Path], reader: ExampleReader) -> Iterator[Iterator[str] | Example]:
    """Every document in turn, as the blocks of text that it consists of, or as an example."""
    for path in paths:
        for file in _files(path):
            if file.suffix.lower() == ".jsonl":
                for record in _records(file, reader):
                    if isinstance(record, str):
                        yield _blocks(record.splitlines(keepends=True))
                    else:
                        yield record
            else:
                yield _blocks(_lines(file))


def _files(path: Path) -> list[Path]:
    """The files that a path stands for."""
    if path.is_dir():
        found = sorted(
            file for file in path.rglob("*") if file.suffix.lower() in (".txt", ".jsonl") and file.is_file()
        )
        if not found:
            raise UserError(f"{path}: the folder holds no .txt and no .jsonl file")
        return found
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    if path.suffix.lower() not in (".txt", ".jsonl"):
        raise UserError(f"{path}: only .txt and .jsonl files are read, and folders of them")
    return [path]


def _lines(file: Path) -> Iterator[str]:
    """A file's lines with their line feeds, checked one by one, so that a fault has a line number."""
    try:
        with file.open("rb") as stream:
            number = 0
            while line := stream.readline(MAX_LINE_BYTES + 1):
                number += 1
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


def _records(file: Path, reader: ExampleReader) -> Iterator[str | Example]:
    """The texts and examples of a file of JSON lines; empty lines are passed over."""
    for number, line in enumerate(_lines(file), start=1):
        if not line.strip():
            continue
        try:
            yield _record(_parsed(line), reader)
        except UserError as error:
            raise UserError(f"{file}, line {number}: {error}") from None


def _parsed(line: str) -> dict[str, Any]:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"not valid JSON: {getattr(error, 'msg', error)}") from None
    return record if isinstance(record, dict) else {}


def _record(record: dict[str, Any], reader: ExampleReader) -> str | Example:
    text = record.get("text")
    if isinstance(text, str):
        try:
            text.encode()
        except UnicodeEncodeError:
            raise UserError('"text" holds half of a surrogate pair') from None
        return text
    example = reader.read(record)
    if example is None:
        raise UserError(
            'not an object with a string "text", with strings "prompt" and "completion", or with "messages"'
        )
    return example


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
