"""Whether the mapped base is still the file that the run began with, asked before anything is saved.

A file that is overwritten in place changes under the run, which would train on with other weights. One that
is replaced by another file of its name does not: what is mapped is the old one.
"""

import os
from pathlib import Path

from ggml_diffusion.errors import UserError
from ggml_diffusion.formats.model_file import ModelFile, file_sha256

_Stamp = tuple[int, int, int, int]  # device, inode, size, time of the last change


class BaseWatch:
    """Looks at a base's files by their stamps, and reads them only where one has changed.

    Attributes:
        sha256: of the files as they were when this was made, to be set before `check`.

    """

    def __init__(self, file: ModelFile) -> None:
        self.sha256 = ""
        self._file = file
        self._stamps = [_stamp(path) for path in file.parts]

    def check(self) -> None:
        """Compare with what the files were when this was made.

        Raises:
            UserError: the base was overwritten.

        """
        stamps = [_stamp(path) for path in self._file.parts]
        pairs = list(zip(self._stamps, stamps, strict=True))
        is_written = any(
            old is not None and new is not None and old[:2] == new[:2] and old != new for old, new in pairs
        )
        if is_written and file_sha256(self._file.path) != self.sha256:
            raise UserError(
                f"{self._file.path}: was overwritten while the run used it; nothing was saved since, and the "
                "same command goes on from the last checkpoint once the file is what it was"
            )
        self._stamps = [old if old is None else new for old, new in pairs]


def _stamp(path: Path) -> _Stamp | None:
    """None: it cannot be asked, or is gone, which changes nothing of what is mapped."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
