"""Files that are whole or not there: written beside their place, flushed to the disk, then renamed into it.

After a crash or a loss of power at any moment, the old file or the new one is found, never a part of one.
Deliberately not here: what is written. Source: POSIX rename(2) and fsync(2); a rename lasts only once the
folder that holds the name has been flushed as well.
"""

import contextlib
import errno
import os
from collections.abc import Callable
from pathlib import Path

from ggml_diffusion.errors import UserError

# What network and shared drives answer where they cannot do what is asked of them.
_UNSUPPORTED = {
    *(errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF),
    *(errno.EPERM, errno.EACCES, errno.EISDIR),
}


def fsync_path(path: Path) -> None:
    """Flush a file's content, or a folder's list of names, to the disk.

    A file system that cannot do so for a folder is left to itself.

    Raises:
        OSError: it cannot be opened, or the disk refuses.

    """
    try:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        if error.errno not in _UNSUPPORTED or not path.is_dir():
            raise


def _umask() -> int:
    """The process's file mode mask, which can only be read by setting it."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask


def replace_file(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`, then put it in the place of `path`.

    Raises:
        UserError: writing failed; `path` is as it was, and the temporary file is gone.

    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # what a killed process left; a link is not written through
        write(temporary)
        with contextlib.suppress(OSError):  # not every file system has modes
            os.chmod(temporary, 0o666 & ~_umask())  # some writers make private files; these are for everyone
        fsync_path(temporary)
        os.replace(temporary, path)
        fsync_path(path.parent)
    except OSError as error:
        raise UserError(f"{path}: could not be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def replace_text(path: Path, text: str) -> None:
    """Write a text file anew, whole or not at all; see `replace_file`."""

    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    replace_file(path, write)
