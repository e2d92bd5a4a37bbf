"""What one optimizer step reports, and the file of JSON lines that keeps it.

Deliberately not here: showing progress (app/display.py), evaluation (evaluation/).
"""

import contextlib
import json
import logging
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from io import FileIO
from pathlib import Path
from types import TracebackType

from ggml_diffusion.durable import replace_file
from ggml_diffusion.errors import UserError
from ggml_diffusion.regular_file import kind_of

_LONGEST_LINE = 1 << 16  # bytes; a line of ours has some 300

_log = logging.getLogger("ggml_diffusion")


@dataclass(frozen=True)
class TrainMetrics:
    """One optimizer step, over its whole accumulated batch.

    Attributes:
        step: optimizer steps taken, this one included.
        loss: the masked tokens' weighted cross-entropy in nats, normalised as corruption.loss_weights says.
        masked_accuracy: share of the masked tokens whose likeliest prediction was right.
        causal_ratio: of the attention mask in this step.
        learning_rate: of this step.
        grad_norm: global norm before clipping.
        tokens: tokens seen since the run began, this step included, padding not.
        tokens_per_second: of this step.
        ar_loss: the causal next-token loss in nats, None if it has no share.
        distillation_loss: the masked tokens' weighted cross-entropy under the base's prediction in nats, None
            if it has no weight.

    """

    step: int
    loss: float
    masked_accuracy: float
    causal_ratio: float
    learning_rate: float
    grad_norm: float
    tokens: int
    tokens_per_second: float
    ar_loss: float | None = None
    distillation_loss: float | None = None


class MetricsWriter:
    """Appends one JSON object a step to a file; a context manager."""

    def __init__(
        self, path: str | Path, resume_step: int = 0, warn: Callable[[str], None] = _log.warning
    ) -> None:
        """Open the file and drop what lies after the step that is resumed from.

        Args:
            path: the file; created if it is missing, its folder is not.
            resume_step: lines up to this step are kept: 0 starts a new file.
            warn: told of lines that are missing or broken.

        Raises:
            UserError: the file cannot be written.

        """
        self.path = Path(path)
        if (kind := kind_of(self.path)) is not None:
            raise UserError(f"{self.path}: {kind}, not a file")
        self._warn = warn
        self._file = self._open(resume_step)

    def rewind(self, step: int) -> None:
        """Drop what lies after a step: the run has gone back to it.

        Raises:
            UserError: the file cannot be written.

        """
        self.close()
        self._file = self._open(step)

    def _open(self, last_step: int) -> FileIO:
        """The file, ready for the line after `last_step`; without a buffer: closing writes nothing."""
        try:
            self.path.touch()
            kept = _lines_up_to(self.path, last_step)
            if kept.n_broken or kept.n_bytes < kept.end:
                # A broken line among whole ones, which stay: the file is written anew.
                replace_file(self.path, kept.copy_to)
            file = self.path.open("ab", buffering=0)
            file.truncate(kept.n_bytes)
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror}") from None
        if sentence := kept.sentence(last_step):
            self._warn(f"{self.path}: {sentence}")
        return file

    def write(self, metrics: TrainMetrics) -> None:
        """Append one line, where others can read it; a value that is NaN or infinite becomes null, as JSON
        has neither, and one that is None is left out.

        Raises:
            UserError: the disk is full, or the file cannot be written any more.

        """
        values = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(metrics).items()
            if value is not None
        }
        line = memoryview(json.dumps(values, allow_nan=False).encode() + b"\n")
        try:
            while line:
                line = line[self._file.write(line) :]
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror}") from None

    def sync(self) -> None:
        """See to it that all lines are on the disk.

        Raises:
            UserError: the disk refuses.

        """
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror}") from None

    def close(self) -> None:
        """Close the file; it is on the disk after that.

        Raises:
            UserError: the disk refuses.

        """
        if not self._file.closed:
            try:
                self.sync()
            finally:
                with contextlib.suppress(OSError):  # said by sync, if anything was lost
                    self._file.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except UserError:
            if error is None:  # else that is the news
                raise


@dataclass
class _Lines:
    """Which lines of a file belong to a run that stands after some step.

    Attributes:
        places: (start, end) of whole lines of rising steps, in bytes, neighbours joined.
        n_broken: lines before the last of them that are none.
        n_missing: steps before the last of them that have no line.
        last_step: of the last whole line.

    """

    path: Path
    places: list[list[int]] = field(default_factory=list)
    n_broken: int = 0
    n_missing: int = 0
    last_step: int = 0

    @property
    def n_bytes(self) -> int:
        """Bytes of all that is kept."""
        return sum(end - start for start, end in self.places)

    @property
    def end(self) -> int:
        """Bytes up to the last line that is kept."""
        return self.places[-1][1] if self.places else 0

    def add(self, start: int, end: int, step: int) -> None:
        """Keep a line."""
        self.n_missing += step - self.last_step - 1
        self.last_step = step
        if self.places and self.places[-1][1] == start:
            self.places[-1][1] = end
        else:
            self.places.append([start, end])

    def copy_to(self, target: Path) -> None:
        """Write what is kept to another file."""
        with self.path.open("rb") as lines, target.open("wb") as kept:
            for start, end in self.places:
                lines.seek(start)
                kept.write(lines.read(end - start))

    def sentence(self, last_step: int) -> str:
        """What the user should know about the lines up to `last_step`; empty = all are there."""
        n_missing = self.n_missing + last_step - self.last_step
        broken = f"{self.n_broken} lines that are not of a run are left out" if self.n_broken else ""
        missing = f"{n_missing} of {last_step} steps have no line" if n_missing else ""
        return "; ".join(filter(None, (broken, missing)))


def _lines_up_to(path: Path, last_step: int) -> _Lines:
    """The whole lines of steps up to `last_step`, each step once."""
    found, start, n_broken = _Lines(path), 0, 0
    if last_step == 0:
        return found
    with path.open("rb") as lines:
        while line := lines.readline(_LONGEST_LINE):
            end = start + len(line)
            step = _step_of(line)
            if step is None or step <= found.last_step:
                n_broken += 1
            elif step <= last_step:  # else it is of before the run went back
                found.add(start, end, step)
                found.n_broken = n_broken
            start = end
    return found


def _step_of(line: bytes) -> int | None:
    """The step of a whole line; None where it is broken, or cut off by a crash."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return step if line.endswith(b"\n") and type(step) is int else None
