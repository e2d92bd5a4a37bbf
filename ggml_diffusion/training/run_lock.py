"""One process a run: the lock of an output folder, which the operating system lifts whatever ends its holder.

Deliberately not here: the names in the folder (run_folder.py).
"""

import errno
import fcntl
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from ggml_diffusion.durable import replace_text
from ggml_diffusion.errors import UserError
from ggml_diffusion.regular_file import kind_of, open_regular
from ggml_diffusion.run_folder import LOCK, PID

# What systems answer where a file system has no locks, as some network and shared drives.
_NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}


@contextmanager
def exclusive(output: Path, warn: Callable[[str], None]) -> Iterator[None]:
    """Make the output folder and keep other processes out of it; the operating system lifts the lock."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        if kind := kind_of(output / LOCK):  # to open a named pipe waits
            raise UserError(f"{output / LOCK}: {kind}, not a file: delete it")
        lock = (output / LOCK).open("ab")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
            warn(f"{output}: its file system has no locks: no other process may convert into it meanwhile")
    except BlockingIOError:
        raise UserError(f"{output}: process {_read_pid(output)} is converting into this folder") from None
    except OSError as error:
        raise UserError(f"{output}: cannot be used as output folder: {error.strerror or error}") from None
    try:
        replace_text(output / PID, f"{os.getpid()}\n")
        yield
    finally:
        lock.close()


def _read_pid(output: Path) -> str:
    try:
        with open_regular(output / PID) as file:
            return str(int(file.read(20)))
    except (UserError, OSError, ValueError):
        return "of unknown number"
