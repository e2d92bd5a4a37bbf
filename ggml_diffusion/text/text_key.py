"""Whether a text is the one that was read before, without reading all of it again.

A file whose size, inode and both times of change are those that were recorded is taken to be what it was: a
content that changes changes the second time as well, which no program sets. Otherwise its content counts. A
file that was written less than a few seconds before it was read gets no such record, since a later change
could fall into the same tick of the clock.

Deliberately not here: what is kept of a text (token_store.py).
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

from ggml_diffusion.errors import UserError
from ggml_diffusion.text.sources import TextFile
from ggml_diffusion.text.token_store import SourceFile, sums_of_parts

READING = 1  # of the rules in files.py, prompts.py and encoding.py; other rules may give other tokens
_SETTLED_NS = 3 * 10**9  # the coarsest clock of a file system in use, FAT's, has ticks of 2 s
UNKNOWN = (-1, -1, -1, -1)


def stamp_of(path: Path) -> tuple[int, int, int, int]:
    """Size, the times of change of content and inode, and the inode's number.

    Raises:
        UserError: the file cannot be found.

    """
    try:
        found = path.stat()
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino


def is_as_recorded(files: Sequence[TextFile], sources: Sequence[SourceFile]) -> bool:
    """Whether files are, by name and stamp, those of a record."""
    return len(files) == len(sources) and all(
        str(file.path.absolute()) == source.path
        and file.form == source.form
        and stamp_of(file.path) == source.stamp
        for file, source in zip(files, sources, strict=True)
    )


def describe_sources(files: Sequence[TextFile], now_ns: int) -> list[SourceFile]:
    """Read files to the end, for what they hold.

    Args:
        files: of a text, in their order.
        now_ns: the time of day; a file that changed shortly before is not to be known by its stamp.

    Raises:
        UserError: one cannot be read.

    """
    found = []
    for file in files:
        stamp = stamp_of(file.path)
        try:
            sums = sums_of_parts(file.path)
        except OSError as error:
            raise UserError(f"{file.place()}: cannot be read: {error.strerror}") from None
        is_settled = now_ns - max(stamp[1], stamp[2]) > _SETTLED_NS
        digest = hashlib.sha256("\n".join(sums.sha256_of_parts).encode()).hexdigest()
        found.append(
            SourceFile(
                path=str(file.path.absolute()),
                form=file.form,
                stamp=stamp if is_settled else UNKNOWN,
                sha256=digest,
            )
        )
    return found


def key_of(sources: Sequence[SourceFile], vocabulary: str) -> str:
    """SHA-256 of what decides on tokens: contents, in their order and in which form they are read; the rules;
    the vocabulary."""
    digest = hashlib.sha256(f"{READING}\n{vocabulary}\n".encode())
    for source in sources:
        digest.update(f"{source.form} {source.sha256}\n".encode())
    return digest.hexdigest()
