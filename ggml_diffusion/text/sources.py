"""Where training text comes from: files, folders of them, standard input, and iterables of Python.

What has no file of its own is written to one first, which goes with the process: then all text is read,
counted and found again in the same way.

In a folder, files of known kinds are read at any depth, in the order of their names. Hidden files, and what
conversions have written, are passed over. Links to folders are followed, but no folder is read twice. A
folder with train.jsonl and valid.jsonl, as mlx-lm has them, is those two, the second one held out.

Deliberately not here: what is in the files (files.py).
"""

import json
import shutil
import sys
import tempfile
import weakref
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from ggml_diffusion.errors import UserError
from ggml_diffusion.regular_file import kind_of
from ggml_diffusion.run_folder import OWN_NAMES, is_run_folder

Kind = Literal["text", "lines", "parquet"]

STANDARD_INPUT = "-"
_KINDS: Mapping[str, Kind] = {
    ".txt": "text",
    ".md": "text",
    ".rst": "text",
    ".jsonl": "lines",
    ".ndjson": "lines",
    ".parquet": "parquet",
}
_IN_FOLDERS = ", ".join(_KINDS)
_TRAIN, _VALID = "train", ("valid", "validation")
# What is read of a record; the rest of it stays where it is.
RECORD_KEYS = ("text", "prompt", "completion", "messages", "tools")


@dataclass(frozen=True)
class TextFile:
    """A file of the text.

    Attributes:
        path: where it is.
        kind: text is one document; lines are JSON objects; a row of parquet is such an object.
        is_compressed: by gzip.
        is_kept: whether it holds records of Python, and goes with the process.
        name: what messages call it.
        unit: what messages count in it: a line, row or record.

    """

    path: Path
    kind: Kind
    is_compressed: bool = False
    is_kept: bool = False
    name: str = ""
    unit: str = "line"

    @property
    def form(self) -> str:
        """How its bytes are read, as one word."""
        return f"{self.kind}.gz" if self.is_compressed else self.kind

    def place(self, number: int | None = None) -> str:
        """How messages call a place in it."""
        name = self.name or str(self.path)
        return name if number is None else f"{name}, {self.unit} {number}"


@dataclass(frozen=True)
class TextSources:
    """All files of the text, in the order in which they are read.

    Attributes:
        files: to train on, and to hold a share of out.
        held_out: the text's own held-out files; where there are any, no share of `files` is held out.

    """

    files: tuple[TextFile, ...]
    held_out: tuple[TextFile, ...] = ()


class Records:
    """Texts and records of Python, for `TextDataLoader`: read once, when the loader is made.

    Each is a string, or a mapping with "text", "prompt" and "completion", or "messages".
    """

    def __init__(self, records: Iterable[str | Mapping[str, Any]]) -> None:
        self._records = records

    def write(self, path: Path) -> None:
        """Write them as JSON lines."""
        with path.open("w", encoding="utf-8") as file:
            for record in self._records:
                file.write(json.dumps(_plain(record), default=_as_plain) + "\n")


Data = str | Path | Records | Iterable[str | Path] | Iterable[str | Mapping[str, Any]]


def find_sources(data: Data, include: Sequence[str] = ()) -> TextSources:
    """The files that data stand for.

    Args:
        data: a path, or a list or tuple of paths: files, folders, or "-" for standard input; else records.
        include: patterns of names, as "*.py", that are read in folders too, as text.

    Raises:
        UserError: a path leads nowhere, or to no text; or records cannot be kept.

    """
    if isinstance(data, Records) or not _are_paths(data):
        records = data if isinstance(data, Records) else Records(data)  # type: ignore[arg-type]
        return TextSources((_kept_records(records),))
    paths = [data] if isinstance(data, str | Path) else list(data)
    if sum(str(path) == STANDARD_INPUT for path in paths) > 1:
        raise UserError("standard input can only be read once")
    found = [_of_path(path, include) for path in paths]  # type: ignore[arg-type]
    return TextSources(
        tuple(file for sources in found for file in sources.files),
        tuple(file for sources in found for file in sources.held_out),
    )


def names_of(data: Data) -> str:
    """What messages call data as a whole."""
    if isinstance(data, Records) or not _are_paths(data):
        return "the records"
    paths = [data] if isinstance(data, str | Path) else list(data)
    return (
        ", ".join("standard input" if str(path) == STANDARD_INPUT else str(path) for path in paths)
        or "no data"
    )


def _are_paths(data: Data) -> bool:
    """A list of strings is one of paths: nothing else could be told from a list of texts."""
    return isinstance(data, str | Path) or (
        isinstance(data, list | tuple) and all(isinstance(item, str | Path) for item in data)
    )


def _of_path(given: str | Path, include: Sequence[str]) -> TextSources:
    if str(given) == STANDARD_INPUT:
        return TextSources((_kept_standard_input(),))
    path = Path(given)
    try:
        if path.is_dir():
            return _of_folder(path, include)
        if not path.exists():
            raise UserError(f"{path}: no such file or folder")
        if not path.is_file():
            kind = kind_of(path) or "something else"
            raise UserError(
                f"{path}: {kind}, not a file or folder; what comes through a pipe is given by '-'"
            )
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    return TextSources((_text_file(path),))


def _text_file(path: Path) -> TextFile:
    """A file by its name; one of no known kind is text."""
    inner = _inner(path.name)
    kind = _KINDS.get(Path(inner).suffix.lower(), "text")
    return TextFile(path, kind, inner != path.name, unit="row" if kind == "parquet" else "line")


def _inner(name: str) -> str:
    """A name without its .gz."""
    return name[: -len(".gz")] if name.lower().endswith(".gz") else name


# -- folders -----------------------------------------------------------------------------------------


def _of_folder(folder: Path, include: Sequence[str]) -> TextSources:
    splits = _own_splits(folder)
    if splits is not None:
        return splits
    found = [path for path in _walk(folder) if _is_wanted(path, folder, include)]
    if not found:
        raise UserError(
            f"{folder}: the folder holds no text: none of {_IN_FOLDERS}, or these as .gz; name others by "
            "--include, as '*.py'"
        )
    return TextSources(tuple(_text_file(path) for path in sorted(found)))


def _own_splits(folder: Path) -> TextSources | None:
    """The split that a folder's files are, by their names; None if they are none."""
    by_stem: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        inner = Path(_inner(path.name))
        if _KINDS.get(inner.suffix.lower()) in ("lines", "parquet") and path.is_file():
            by_stem.setdefault(inner.stem, path)
    valid = next((by_stem[stem] for stem in _VALID if stem in by_stem), None)
    if _TRAIN not in by_stem or valid is None:
        return None
    return TextSources((_text_file(by_stem[_TRAIN]),), (_text_file(valid),))


def _is_wanted(path: Path, folder: Path, include: Sequence[str]) -> bool:
    inner = _inner(path.name)
    if Path(inner).suffix.lower() in _KINDS:
        return True
    below = path.relative_to(folder).with_name(inner).as_posix()
    return any(fnmatchcase(below if "/" in pattern else inner, pattern) for pattern in include)


def _walk(top: Path) -> list[Path]:
    """The files of a folder at any depth, but those that are hidden or a conversion's."""
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()
    folders, links = [top], list[Path]()
    while folders or links:
        folder = (
            folders.pop() if folders else links.pop(0)
        )  # a folder rather by its own name than by a link's
        here = folder.stat()
        if (here.st_dev, here.st_ino) in seen:
            continue
        seen.add((here.st_dev, here.st_ino))
        is_run = is_run_folder(folder)
        if is_run and folder != top:
            continue
        for path in sorted(folder.iterdir()):
            if path.name.startswith(".") or (is_run and path.name in OWN_NAMES):
                continue
            if path.is_dir():
                (links if path.is_symlink() else folders).append(path)
            elif path.is_file():
                found.append(path)
    return found


# -- what has no file --------------------------------------------------------------------------------


def _kept_standard_input() -> TextFile:
    if sys.stdin is None:
        raise UserError("there is no standard input")
    path = _place_to_keep("standard input")
    try:
        with path.open("wb") as file:
            shutil.copyfileobj(sys.stdin.buffer, file)
        kind: Kind = "lines" if _has_objects(path) else "text"
    except OSError as error:
        raise UserError(f"standard input could not be kept in {path.parent}: {error.strerror}") from None
    return _going_with_process(TextFile(path, kind, name="standard input"))


def _has_objects(path: Path) -> bool:
    """Whether a file's first line that is not empty is a JSON object."""
    with path.open("rb") as file:
        for line in file:
            if line.strip():
                try:
                    return isinstance(json.loads(line), dict)
                except (ValueError, RecursionError):
                    return False
    return False


def _kept_records(records: Records) -> TextFile:
    path = _place_to_keep("records")
    try:
        records.write(path)
    except OSError as error:
        raise UserError(f"the records could not be kept in {path.parent}: {error.strerror}") from None
    return _going_with_process(TextFile(path, "lines", is_kept=True, name="the records", unit="number"))


def _place_to_keep(name: str) -> Path:
    try:
        return Path(tempfile.mkdtemp(prefix="ggml-diffusion-")) / name
    except OSError as error:
        raise UserError(f"{tempfile.gettempdir()}: cannot be written to: {error.strerror}") from None


def _going_with_process(file: TextFile) -> TextFile:
    """Delete a file as soon as nobody uses it, at the latest when the process ends."""
    weakref.finalize(file, shutil.rmtree, file.path.parent, ignore_errors=True)
    return file


def _plain(record: object) -> object:
    """A record as JSON has it; what is none becomes null, which is refused in its place."""
    if isinstance(record, str):
        return {"text": record}
    if isinstance(record, Mapping):
        return {key: record[key] for key in RECORD_KEYS if key in record}
    return None


def _as_plain(value: Any) -> Any:
    """A value that JSON does not know: an array as a list, the rest by its name."""
    return value.tolist() if hasattr(value, "tolist") else str(value)
