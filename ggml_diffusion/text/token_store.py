"""The tokens of a text on disk: written once, in order, and read a sequence at a time.

A store is a folder of four files and what they hold, `manifest.json`, which has the sums of their parts. It
is written under a temporary name, flushed and renamed, so that it is whole or not there. It is read by
position and never mapped: so memory does not grow with it, and a disk that fails, or a file that someone cuts
short, is an error in one line.

Deliberately not here: which text it is of (text_key.py), sequences and their order (sequences.py, loader.py).
docs/formats.md describes the files.
"""

import contextlib
import hashlib
import json
import os
import shutil
import weakref
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, ValidationError

from ggml_diffusion.durable import fsync_path, replace_file
from ggml_diffusion.errors import UserError
from ggml_diffusion.machine import processors
from ggml_diffusion.regular_file import open_regular

FORMAT = 1
_SMALL_VOCABULARY = 1 << 16  # token numbers of two bytes
MANIFEST = "manifest.json"
UNFINISHED_PREFIX = ".unfinished-"
# Tokens of text, where documents begin in it (a bit a token), tokens of examples, their two lengths (int32).
TEXT, STARTS, EXAMPLES, LENGTHS = FILES = ("text.bin", "starts.bin", "examples.bin", "lengths.bin")
PART_BYTES = 16 << 20  # a sum each
_READ_BYTES = 1 << 20


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class SourceFile(_Strict):
    """A file of the text, as it was when it was read.

    Attributes:
        path: absolute.
        form: how its bytes are read, see `TextFile.form`.
        stamp: size in bytes, times of change of its content and of its inode in nanoseconds, inode.
        sha256: of its content, see `content_sha256`.

    """

    path: str
    form: str
    stamp: tuple[int, int, int, int]
    sha256: str


class StoredFile(_Strict):
    """Size and sums of one of a store's files."""

    n_bytes: int
    sha256_of_parts: list[str]


class Manifest(_Strict):
    """What a store holds.

    Attributes:
        format: of the store.
        key: of the text and how it is read.
        vocabulary: the tokenizer's fingerprint.
        sources: the files of the text in their order.
        token_bytes: 2 or 4.
        n_documents: of the text, examples included.
        n_skipped: documents without any token.
        n_blank: others with at most one character that is no white space.
        n_refused: documents that could not be used, beside these.
        refusals: the first of them, with place and reason.
        n_text_tokens: end-of-text included.
        n_examples: all, those too long for a sequence included.
        n_example_tokens: of these.
        fingerprint: SHA-256 of the tokens, as `TextDataLoader.fingerprint`, for `fingerprint_length`.
        fingerprint_length: the sequence length T that it was taken for; others may leave out other examples.
        files: by name.

    """

    format: int
    key: str
    vocabulary: str
    sources: list[SourceFile]
    token_bytes: int
    n_documents: int
    n_skipped: int
    n_blank: int
    n_refused: int
    refusals: list[str]
    n_text_tokens: int
    n_examples: int
    n_example_tokens: int
    fingerprint: str = ""
    fingerprint_length: int = 0
    files: dict[str, StoredFile] = {}


def token_bytes(vocab_size: int) -> int:
    """Bytes of a token's number in a store: 2 or 4."""
    return 2 if vocab_size <= _SMALL_VOCABULARY else 4


def sums_of_parts(path: Path) -> StoredFile:
    """Size and sums of a file, by all cores, in memory that does not depend on its size.

    Raises:
        OSError: it cannot be read.
        UserError: it cannot be opened, or is no file.

    """
    descriptor = _opened(path)
    try:
        n_bytes = os.fstat(descriptor).st_size

        def of_part(start: int) -> str:
            digest = hashlib.sha256()
            place, end = start, min(start + PART_BYTES, n_bytes)
            while place < end and (data := os.pread(descriptor, min(_READ_BYTES, end - place), place)):
                digest.update(data)
                place += len(data)
            return digest.hexdigest()

        with ThreadPoolExecutor(processors()) as pool:
            return StoredFile(
                n_bytes=n_bytes, sha256_of_parts=list(pool.map(of_part, range(0, n_bytes, PART_BYTES)))
            )
    finally:
        os.close(descriptor)


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a store, None if it is missing, damaged or of another format."""
    try:
        with open_regular(folder / MANIFEST) as file:
            body, _, digest = file.read().rpartition(b"\n")
        if hashlib.sha256(body).hexdigest().encode() != digest:
            return None
        manifest = Manifest.model_validate_json(body)
    except (OSError, UserError, ValidationError):
        return None
    return manifest if manifest.format == FORMAT else None


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write or replace the manifest of a store.

    Raises:
        UserError: it could not be written.

    """
    body = json.dumps(manifest.model_dump(mode="json"), indent=1).encode()

    def write(temporary: Path) -> None:
        temporary.write_bytes(body + b"\n" + hashlib.sha256(body).hexdigest().encode())

    replace_file(folder / MANIFEST, write)


def fault_of(folder: Path, manifest: Manifest) -> str | None:
    """Which file of a store is not what was written, None if all are."""
    for name in FILES:
        try:
            if manifest.files.get(name) != sums_of_parts(folder / name):
                return name
        except OSError as error:
            return f"{name}: {error.strerror}"
        except UserError as error:
            return str(error)
    return None


def _opened(path: Path) -> int:
    """A descriptor of a file; UserError where there is none, or something that waits."""
    with open_regular(path) as file:
        return os.dup(file.fileno())


class TokenStore:
    """The tokens of a text, read from their files when they are asked for.

    Attributes:
        folder: where they lie.
        manifest: what they are.

    """

    def __init__(self, folder: Path, manifest: Manifest, descriptors: dict[str, int]) -> None:
        """Take over the open files of a store that is whole; see `open`."""
        self.folder = folder
        self.manifest = manifest
        self._dtype = np.dtype("<u2" if manifest.token_bytes == 2 else "<i4")
        self._descriptors = descriptors
        weakref.finalize(self, _close_all, descriptors)

    @classmethod
    def open(cls, folder: Path, manifest: Manifest) -> "TokenStore":
        """Open a store that is whole.

        Raises:
            UserError: one of its files cannot be opened.

        """
        descriptors: dict[str, int] = {}
        for name in FILES:
            try:
                descriptors[name] = _opened(folder / name)
            except UserError:
                _close_all(descriptors)
                raise
        return cls(folder, manifest, descriptors)

    def text(self, start: int, stop: int) -> NDArray[np.int32]:
        """Tokens (stop - start,) of the documents, laid end to end."""
        return self._tokens(TEXT, start, stop)

    def starts(self, start: int, stop: int) -> NDArray[np.bool_]:
        """(stop - start,) where in `text` a document begins."""
        first = start // 8
        bits = np.frombuffer(self._read(STARTS, first, -(-stop // 8) - first), dtype=np.uint8)
        return np.unpackbits(bits)[start - 8 * first : stop - 8 * first].astype(np.bool_)

    def examples(self, start: int, stop: int) -> NDArray[np.int32]:
        """Tokens (stop - start,) of the examples, laid end to end, each prompt before its response."""
        return self._tokens(EXAMPLES, start, stop)

    def example_lengths(self) -> NDArray[np.int32]:
        """(examples, 2) tokens of each prompt and of its response."""
        data = self._read(LENGTHS, 0, 8 * self.manifest.n_examples)
        return np.frombuffer(data, dtype="<i4").reshape(-1, 2).astype(np.int32, copy=False)

    def _tokens(self, name: str, start: int, stop: int) -> NDArray[np.int32]:
        size = self._dtype.itemsize
        data = self._read(name, start * size, (stop - start) * size)
        return np.frombuffer(data, dtype=self._dtype).astype(np.int32, copy=False)

    def _read(self, name: str, start: int, n_bytes: int) -> bytes:
        data = b""
        try:
            while len(data) < n_bytes:
                more = os.pread(self._descriptors[name], n_bytes - len(data), start + len(data))
                if not more:
                    raise UserError(f"{self.folder / name}: cut short while it was in use")
                data = data + more if data else more
        except OSError as error:
            raise UserError(f"{self.folder / name}: cannot be read: {error.strerror}") from error
        return data


def _close_all(descriptors: dict[str, int]) -> None:
    for descriptor in descriptors.values():
        os.close(descriptor)
    descriptors.clear()


class TokenWriter:
    """Writes the files of a store; a context manager, which deletes them unless `finish` was called.

    Attributes:
        folder: of the files.
        token_bytes: of a token, 2 or 4.
        n_text_tokens, n_examples, n_example_tokens: written so far.

    """

    def __init__(self, folder: Path, token_bytes: int, *, nameless: bool = False) -> None:
        """Make a folder and its files.

        Args:
            folder: must not be there.
            token_bytes: 2 or 4.
            nameless: take the names away at once, so that the files go with this process.

        Raises:
            OSError: they cannot be made.

        """
        self.folder = folder
        self.token_bytes = token_bytes
        self._nameless = nameless
        self._dtype = np.dtype("<u2" if token_bytes == 2 else "<i4")
        self.n_text_tokens = self.n_examples = self.n_example_tokens = 0
        self._starts_left: NDArray[np.bool_] = np.empty(0, dtype=np.bool_)
        self._open: dict[str, BinaryIO] = {}
        folder.mkdir(parents=True)
        for name in FILES:
            self._open[name] = (folder / name).open("x+b")
        if nameless:
            shutil.rmtree(folder)

    @property
    def n_bytes(self) -> int:
        """All that was written."""
        return (
            (self.n_text_tokens + self.n_example_tokens) * self.token_bytes
            + self.n_text_tokens // 8
            + 8 * self.n_examples
        )

    def add_text(self, tokens: NDArray[np.int32], starts: Sequence[int]) -> None:
        """Append tokens (n,); documents begin at `starts` among them.

        Raises:
            OSError: the disk refuses.

        """
        self._write(TEXT, tokens.astype(self._dtype))
        is_start = np.zeros(len(tokens), dtype=np.bool_)
        is_start[np.asarray(starts, dtype=np.int64)] = True
        bits = np.concatenate([self._starts_left, is_start])
        whole = len(bits) // 8 * 8
        self._write(STARTS, np.packbits(bits[:whole]))
        self._starts_left = bits[whole:]
        self.n_text_tokens += len(tokens)

    def add_examples(self, tokens: NDArray[np.int32], lengths: NDArray[np.int32]) -> None:
        """Append examples: all their tokens (n,), and the lengths (examples, 2) of prompts and responses.

        Raises:
            OSError: the disk refuses.

        """
        self._write(EXAMPLES, tokens.astype(self._dtype))
        self._write(LENGTHS, lengths.astype("<i4"))
        self.n_examples += len(lengths)
        self.n_example_tokens += len(tokens)

    def _write(self, name: str, values: NDArray[np.generic]) -> None:
        self._open[name].write(np.ascontiguousarray(values).data)

    def finish(self) -> dict[str, int]:
        """Write what is left, and flush it to the disk unless it is to go with the process.

        Returns:
            The files' descriptors by name, for a `TokenStore`.

        Raises:
            OSError: the disk refuses.

        """
        self._write(STARTS, np.packbits(self._starts_left))
        for file in self._open.values():
            file.flush()
            if not self._nameless:
                os.fsync(file.fileno())
        descriptors = {name: os.dup(file.fileno()) for name, file in self._open.items()}
        self._close()
        return descriptors

    def _close(self) -> None:
        while self._open:
            with contextlib.suppress(OSError):  # what a full disk did not take
                self._open.popitem()[1].close()

    def __enter__(self) -> "TokenWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None or self._open:
            self._close()
            shutil.rmtree(self.folder, ignore_errors=True)


def put_in_place(unfinished: Path, place: Path) -> None:
    """Rename a finished store, over a damaged one if there is one.

    Raises:
        OSError: the file system refuses.

    """
    fsync_path(unfinished)
    if place.exists():
        shutil.rmtree(place)
    os.rename(unfinished, place)
    fsync_path(place.parent)


def chunks(stop: int, size: int) -> Iterator[tuple[int, int]]:
    """Bounds of pieces of `size`, from 0 to `stop`."""
    return ((start, min(start + size, stop)) for start in range(0, stop, size))
