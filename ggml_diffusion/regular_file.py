"""Opening files that a name of somebody else's stands for: regular ones only, and at once.

To open a named pipe waits until somebody writes to it, a terminal until somebody types, and some devices
never end. Deliberately not here: what is in the file, and writing (durable.py).
"""

import os
import stat
from pathlib import Path
from typing import BinaryIO

from ggml_diffusion.errors import UserError

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a named pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading.

    Raises:
        UserError: there is none, it may not be read, or it is a folder, a named pipe, a socket or a device.

    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        kind = kind_of(path)
        reason = f"cannot be read: {getattr(error, 'strerror', None) or error}"
        raise UserError(f"{path}: {f'{kind}, not a file' if kind else reason}") from None
    try:
        kind = _kind(os.fstat(descriptor).st_mode)
        if kind is not None:
            raise UserError(f"{path}: {kind}, not a file")
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def kind_of(path: Path) -> str | None:
    """What a name stands for, "a named pipe"; None if that is a file, or nothing."""
    try:
        return _kind(path.stat().st_mode)
    except (OSError, ValueError):
        return None


def _kind(mode: int) -> str | None:
    return next((name for is_kind, name in _KINDS if is_kind(mode)), None)
