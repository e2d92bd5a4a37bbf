"""What a person sees while a conversion runs or a text is denoised; nothing else prints.

On a terminal: a live panel (rich). Elsewhere: plain lines, one every few seconds, so that a log stays
readable.

Deliberately not here: what happens (training/run.py, generation/), the record of every step
(training/metrics.py).
"""

import time
import unicodedata
from collections import deque
from collections.abc import Callable, Sequence
from types import TracebackType

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from ggml_diffusion.errors import escaped
from ggml_diffusion.evaluation.tables import TokenisingProgress
from ggml_diffusion.generation.denoise import DenoisingStep
from ggml_diffusion.text.tokenizer import Tokenizer
from ggml_diffusion.training.metrics import TrainMetrics
from ggml_diffusion.training.run import Evidence
from ggml_diffusion.units import duration

SPARK_LEVELS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 60
PLAIN_LINE_EVERY_S = 10.0
SPEED_WINDOW_STEPS = 20
MASK_SYMBOL = "░"


def sparkline(values: Sequence[float], width: int = SPARK_WIDTH) -> str:
    """A line of block characters, at most `width` long: each shows the mean of its share of the values.

    Values that are not finite are left out; equal values are drawn at the lowest level.
    """
    finite = np.array([value for value in values if np.isfinite(value)])
    if len(finite) == 0:
        return ""
    means = np.array([part.mean() for part in np.array_split(finite, min(width, len(finite)))])
    spread = means.max() - means.min()
    shares = (means - means.min()) / spread if spread > 0 else np.zeros(len(means))
    return "".join(SPARK_LEVELS[round(share * (len(SPARK_LEVELS) - 1))] for share in shares)


def printable(text: str) -> str:
    """Text that a model wrote, safe for a terminal: control characters but newline and tab become U+FFFD."""
    return "".join(
        letter if letter in "\n\t" or unicodedata.category(letter) != "Cc" else "\ufffd" for letter in text
    )


class TrainingDisplay:
    """Shows the steps of a run; a context manager.

    `note` and `warn` may be called at any time, `step` inside the context.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._losses: list[float] = []
        self._recent: deque[tuple[float, int, int]] = deque(
            maxlen=SPEED_WINDOW_STEPS + 1
        )  # time, tokens, step
        self._total_steps = 0
        self._started_s = clock()
        self._last_line_s = -np.inf
        self._live: Live | None = None
        self._reading = TokenisingProgress(console, clock)

    def note(self, text: str) -> None:
        """A line of what is going on."""
        self._console.print(Text(escaped(text)), soft_wrap=True)

    def warn(self, text: str) -> None:
        """A line of what the user should know."""
        self._console.print(Text(f"warning: {escaped(text)}", style="yellow"), soft_wrap=True)

    def tokenise(self, done_bytes: int, total_bytes: int) -> None:
        """Show how much of the text has been tokenised."""
        self._reading.show(done_bytes, total_bytes)

    def start(self, first_step: int, tokens_seen: int, total_steps: int) -> None:
        """Begin the loop: steps are counted to `total_steps`, speed from here on."""
        self._total_steps = total_steps
        self._started_s = self._clock()
        self._recent.clear()
        self._recent.append((self._started_s, tokens_seen, first_step))
        if self._console.is_terminal:
            self._live = Live(console=self._console, auto_refresh=False, transient=False)
            self._live.start()

    def step(self, metrics: TrainMetrics) -> None:
        """Show a step that was just taken."""
        now_s = self._clock()
        self._losses.append(metrics.loss)
        self._recent.append((now_s, metrics.tokens, metrics.step))
        if self._live is not None:
            self._live.update(self._panel(metrics, now_s), refresh=True)
        elif now_s - self._last_line_s >= PLAIN_LINE_EVERY_S or metrics.step == self._total_steps:
            self._last_line_s = now_s
            self._console.print(Text(self._line(metrics, now_s)), soft_wrap=True)

    def stop(self) -> None:
        """End the loop; the last state stays on the screen."""
        self._reading.stop()
        if self._live is not None:
            self._live.stop()
            self._live = None

    def __enter__(self) -> "TrainingDisplay":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _speed(self) -> tuple[float, float]:
        """Tokens a second and seconds a step, over the last steps, all that happens between them included."""
        (first_s, first_tokens, first_step), (last_s, last_tokens, last_step) = (
            self._recent[0],
            self._recent[-1],
        )
        elapsed_s = max(last_s - first_s, 1e-9)
        return (last_tokens - first_tokens) / elapsed_s, elapsed_s / max(1, last_step - first_step)

    def _fields(self, metrics: TrainMetrics, now_s: float) -> list[tuple[str, str]]:
        tokens_per_second, seconds_per_step = self._speed()
        remaining_s = seconds_per_step * (self._total_steps - metrics.step)
        return [
            ("step", f"{metrics.step}/{self._total_steps}"),
            ("loss", f"{metrics.loss:.4f}"),
            ("masked accuracy", f"{metrics.masked_accuracy:.3f}"),
            ("causal ratio", f"{metrics.causal_ratio:.3f}"),
            ("learning rate", f"{metrics.learning_rate:.2e}"),
            ("tokens/s", f"{tokens_per_second:.0f}"),
            ("elapsed", duration(now_s - self._started_s)),
            ("remaining", duration(remaining_s)),
        ]

    def _line(self, metrics: TrainMetrics, now_s: float) -> str:
        return "  ".join(f"{name} {value}" for name, value in self._fields(metrics, now_s))

    def _panel(self, metrics: TrainMetrics, now_s: float) -> Table:
        table = Table.grid(padding=(0, 2))  # 80 columns are enough for a run of months
        fields = self._fields(metrics, now_s)
        for row in (fields[:3], fields[3:6], fields[6:]):
            table.add_row(*(Text.assemble((f"{name} ", "dim"), (value, "bold")) for name, value in row))
        panel = Table.grid()  # a bar alone would not end its line
        panel.add_row(ProgressBar(total=self._total_steps, completed=metrics.step, width=SPARK_WIDTH))
        panel.add_row(table)
        panel.add_row(Text.assemble(("loss ", "dim"), (sparkline(self._losses), "cyan")))
        return panel


def show_evidence(console: Console, evidence: Evidence) -> None:
    """Held-out figures before and after as a table, and how to read them."""
    table = Table(title=f"{evidence.n_sequences} held-out sequences, the same masks in both")
    table.add_column("")
    table.add_column("before", justify="right")
    table.add_column("after", justify="right")
    pairs = list(zip(evidence.before, evidence.after, strict=True))
    for before, after in pairs:
        table.add_row(
            f"masked cross-entropy, nats, t = {before.share:g}",
            f"{before.visible.cross_entropy:.3f}",
            f"{after.visible.cross_entropy:.3f}",
        )
    for before, after in pairs:
        table.add_row(
            f"masked accuracy, t = {before.share:g}",
            f"{before.visible.accuracy:.3f}",
            f"{after.visible.accuracy:.3f}",
        )
    for before, after in pairs:
        table.add_row(
            f"future-context gain (a), nats, t = {before.share:g}",
            f"{before.future_context_gain:+.3f}",
            f"{after.future_context_gain:+.3f}",
        )
    console.print(table)
    console.print(
        Text(
            f"The base itself, next token from clean text on the left: cross-entropy "
            f"{evidence.base.cross_entropy:.3f} nats, accuracy {evidence.base.accuracy:.3f}.\n"
            f"Future-context gain (a): cross-entropy with the right side hidden minus with it visible; "
            f"above zero, the model uses what stands to the right."
        )
    )


class DenoisingDisplay:
    """The text as it appears out of the masks, redrawn in place; on a terminal only."""

    def __init__(self, console: Console, tokenizer: Tokenizer, mask_token_id: int) -> None:
        self._tokenizer = tokenizer
        self._mask_token_id = mask_token_id
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def __enter__(self) -> "DenoisingDisplay":
        self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._live.stop()

    def step(self, step: DenoisingStep) -> None:
        """Show the state after a denoising step."""
        text = masked_text(step.tokens, self._tokenizer, self._mask_token_id)
        text.append(f"\n\nstep {step.step}/{step.n_steps}", style="dim")
        self._live.update(text, refresh=True)


def masked_text(tokens: NDArray[np.int32], tokenizer: Tokenizer, mask_token_id: int) -> Text:
    """Tokens (T,) as text, each mask as one dim block; words around a mask are decoded run by run."""
    text = Text()
    is_mask = tokens == mask_token_id
    edges = np.flatnonzero(np.diff(is_mask)) + 1
    for run in np.split(np.arange(len(tokens)), edges):
        if len(run) == 0:
            continue
        if is_mask[run[0]]:
            text.append(MASK_SYMBOL * len(run), style="dim")
        else:
            text.append(printable(tokenizer.decode(tokens[run], continued=bool(run[0]))))
    return text
