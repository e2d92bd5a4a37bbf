"""What one optimizer step reports, and the file of JSON lines that keeps it.

Deliberately not here: showing progress (app/display.py), evaluation (evaluation/).
"""

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from ggml_diffusion.errors import UserError
from ggml_diffusion.regular_file import kind_of


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

    def __init__(self, path: str | Path, resume_step: int = 0) -> None:
        """Open the file and drop what lies after the step that is resumed from.

        Args:
            path: the file; created if it is missing, its folder is not.
            resume_step: lines up to this step are kept: 0 starts a new file.

        Raises:
            UserError: the file cannot be written.

        """
        self.path = Path(path)
        if (kind := kind_of(self.path)) is not None:
            raise UserError(f"{self.path}: {kind}, not a file")
        try:
            self._file = self.path.open("ab")
            self._file.truncate(_end_of_step(self.path, resume_step))
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror}") from None

    def write(self, metrics: TrainMetrics) -> None:
        """Append one line and flush it; a value that is NaN or infinite becomes null, as JSON has neither,
        and one that is None is left out.

        Raises:
            UserError: the disk is full, or the file cannot be written any more.

        """
        values = {
            name: None if isinstance(value, float) and not math.isfinite(value) else value
            for name, value in asdict(metrics).items()
            if value is not None
        }
        try:
            self._file.write(json.dumps(values, allow_nan=False).encode() + b"\n")
            self._file.flush()
        except OSError as error:
            raise UserError(f"{self.path}: cannot be written: {error.strerror}") from None

    def close(self) -> None:
        """Close the file; it is on the disk after that."""
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _end_of_step(path: Path, last_step: int) -> int:
    """Bytes up to the first line that is after `last_step`, broken or cut off by a crash."""
    end = 0
    with path.open("rb") as lines:
        for line in lines:
            try:
                step = json.loads(line)["step"]
            except (ValueError, TypeError, KeyError):
                break
            if not line.endswith(b"\n") or not isinstance(step, int) or step > last_step:
                break
            end += len(line)
    return end
