"""Standard output that may go away, as a closed pipe or a full disk does, without ending what writes to it.

For what is worth more than its display, such as hours of training. Deliberately not here: what is shown.
"""

import contextlib
import io
import os
from typing import IO, Any, cast


def lasting(stream: IO[str]) -> IO[str]:
    """A stream that writes to another one until that fails, and from then on to nowhere."""
    return cast(IO[str], _Lasting(stream))


def discard(stream: IO[str]) -> None:
    """Let all that is and will be written to a stream go nowhere.

    What is buffered has to go somewhere, or the interpreter fails over it at its end.
    """
    with contextlib.suppress(OSError, io.UnsupportedOperation):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


class _Lasting:
    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._is_gone = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        if not self._is_gone:
            try:
                self._stream.write(text)
            except OSError:
                self._give_up()
        return len(text)

    def flush(self) -> None:
        if not self._is_gone:
            try:
                self._stream.flush()
            except OSError:
                self._give_up()

    def _give_up(self) -> None:
        self._is_gone = True
        discard(self._stream)
