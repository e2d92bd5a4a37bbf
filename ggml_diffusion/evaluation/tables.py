"""What a person sees of an evaluation: its progress, and its figures as tables.

Deliberately not here: the figures (results.py), the page of plots (plots.py).
"""

import time
from collections.abc import Callable
from types import TracebackType

import numpy as np
from rich.box import SIMPLE_HEAD
from rich.console import Console, Group, RenderableType
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table
from rich.text import Text

from ggml_diffusion.evaluation.estimates import Estimate
from ggml_diffusion.evaluation.results import Evaluation
from ggml_diffusion.units import duration

PLAIN_LINE_EVERY_S = 10.0
BAR_AFTER_S = 1.0
ARM_NAMES = {
    "converted": "converted",
    "converted_causal": "converted, causal",
    "control": "causal control",
    "step_0": "step 0",
    "step_0_causal": "step 0, causal",
    "base": "AR base, clean left",
    "left_only": "AR base, left only",
    "reranked": "AR base, best of n",
}
LIKELIHOOD_NAMES = {
    "converted": "converted, NELBO",
    "step_0": "step 0, NELBO",
    "base": "AR base, exact",
    "unigram": "unigram",
}
ORIGIN_NAMES = {"held-out text": "held-out text", "base": "AR base, sampled", "converted": "converted"}
GAIN_NAMES = {
    "a": "(a) causal ratio 1",
    "b": "(b) right side masked",
    "c": "(c) causal control",
}


class TokenisingProgress:
    """Shows how much of a text has been tokenised, if that takes a while: a bar, or a line now and then."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._started_s = self._last_s = 0.0
        self._bar: Progress | None = None

    def show(self, done_bytes: int, total_bytes: int) -> None:
        """So much is done: 0 first, all of it last."""
        now_s = self._clock()
        if done_bytes == 0:
            self._started_s = self._last_s = now_s
        elif done_bytes >= total_bytes:
            self.stop()
        elif self._bar is not None:
            self._bar.update(self._bar.task_ids[0], completed=done_bytes)
        elif self._console.is_terminal and now_s - self._started_s >= BAR_AFTER_S:
            self._bar = Progress(
                TextColumn("tokenising the text"),
                BarColumn(),
                DownloadColumn(binary_units=False),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
                console=self._console,
                transient=True,
            )
            self._bar.add_task("", total=total_bytes, completed=done_bytes)
            self._bar.start()
        elif not self._console.is_terminal and now_s - self._last_s >= PLAIN_LINE_EVERY_S:
            self._last_s = now_s
            speed = done_bytes / max(now_s - self._started_s, 1e-9)
            self._console.print(
                Text(
                    f"tokenising the text: {done_bytes / 1e6:,.0f} of {total_bytes / 1e6:,.0f} MB, "
                    f"{speed / 1e6:.1f} MB/s, {duration((total_bytes - done_bytes) / speed)} left"
                ),
                soft_wrap=True,
            )

    def stop(self) -> None:
        """The bar goes."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None


class EvaluationProgress:
    """Shows how much of an evaluation is done; a context manager.

    On a terminal a bar with the time that is left, elsewhere plain lines, one every few seconds.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console = console
        self._clock = clock
        self._total = self._done = 0
        self._started_s = self._last_line_s = clock()
        self._bar: Progress | None = None
        self._reading = TokenisingProgress(console, clock)

    def note(self, text: str) -> None:
        """A line of what is going on."""
        self._console.print(Text(text), soft_wrap=True)

    def tokenise(self, done_bytes: int, total_bytes: int) -> None:
        """Show how much of the text has been tokenised."""
        self._reading.show(done_bytes, total_bytes)

    def start(self, n_tokens: int) -> None:
        """Begin: at most so many tokens are to go through the model."""
        self._total = n_tokens
        self._started_s = self._last_line_s = self._clock()
        self.note(f"at most {n_tokens:,} tokens are to go through the model")
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("{task.description:15}"),
                BarColumn(),
                TextColumn("{task.percentage:3.0f}%"),
                TimeRemainingColumn(),
                TextColumn("{task.fields[speed]}"),
                console=self._console,
                transient=True,
            )
            self._bar.add_task("base", total=n_tokens, speed="")
            self._bar.start()

    def advance(self, part: str, n_tokens: int) -> None:
        """So many more tokens of a part are done."""
        self._done += n_tokens
        now_s = self._clock()
        speed = self._done / max(now_s - self._started_s, 1e-9)
        if self._bar is not None:
            task = self._bar.task_ids[0]
            self._bar.update(task, completed=self._done, description=part, speed=f"{speed:.0f} tokens/s")
        elif now_s - self._last_line_s >= PLAIN_LINE_EVERY_S:
            self._last_line_s = now_s
            left_s = (self._total - self._done) / speed
            self.note(
                f"{part:13}  {self._done / self._total:4.0%}  {speed:.0f} tokens/s  "
                f"at most {left_s / 60:.1f} min left"
            )

    def stop(self) -> None:
        """End: the bar goes."""
        self._reading.stop()
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def __enter__(self) -> "EvaluationProgress":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def evaluation_tables(evaluation: Evaluation) -> RenderableType:
    """All figures as tables of at most 80 columns, with a sentence on how to read each."""
    shares = [f"t = {one.share:g}" for one in evaluation.masked]
    arms = {
        ARM_NAMES[name]: [one.arms[name] for one in evaluation.masked] for name in evaluation.masked[0].arms
    }
    gains = {
        GAIN_NAMES[form]: [one.gain[form] for one in evaluation.masked] for form in evaluation.masked[0].gain
    }
    parts: list[RenderableType] = [
        _likelihood_table(evaluation),
        _figures(
            "Cross-entropy of masked tokens, nats",
            shares,
            {name: [one.cross_entropy for one in several] for name, several in arms.items()},
            "The same masks in every arm; t is the share of tokens that is masked.",
        ),
        _figures(
            "Accuracy on masked tokens",
            shares,
            {name: [one.accuracy for one in several] for name, several in arms.items()},
        ),
        _figures(
            "Future-context gain, nats a token",
            shares,
            gains,
            "Cross-entropy with the right side hidden minus with it visible; above zero, the model reads it."
            + _subsample_sentence(evaluation),
        ),
    ]
    if evaluation.infilling:
        parts += _infilling_tables(evaluation)
    if evaluation.texts:
        parts.append(_texts_table(evaluation))
    parts.append(_base_sentence(evaluation))
    return Group(*parts)


def with_interval(estimate: Estimate, digits: int = 3) -> Text:
    """A figure above its interval."""
    if np.isnan(estimate.value):
        return Text("-")
    text = Text(f"{estimate.value:.{digits}f}", style="bold")
    if not np.isnan(estimate.low):
        text.append(f"\n[{estimate.low:.{digits}f}, {estimate.high:.{digits}f}]", style="not bold dim")
    return text


def _perplexity(estimate: Estimate) -> Text:
    return with_interval(estimate, 1 if estimate.value < 100 else 0)


def _table(title: str, columns: list[str], caption: str = "") -> Table:
    table = Table(
        title=f"\n{title}",
        caption=caption or None,
        box=SIMPLE_HEAD,
        pad_edge=False,
        title_style="bold",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _figures(title: str, columns: list[str], rows: dict[str, list[Estimate]], caption: str = "") -> Table:
    """A table of estimates."""
    table = _table(title, columns, caption)
    for name, estimates in rows.items():
        table.add_row(name, *(with_interval(one) for one in estimates))
    return table


def _likelihood_table(evaluation: Evaluation) -> Table:
    about = evaluation.about
    table = _table(
        f"Likelihood of {about['n_tokens_predicted']:,} tokens in {about['n_sequences']} held-out sequences",
        ["nats a token", "bits a byte", "perplexity", "s.e."],
        f"Everywhere: 95% intervals, by sequence. NELBOs are upper bounds, means over "
        f"{about['settings']['seeds']} mask seeds; their perplexities are bounds too. s.e. is the "
        f"standard error of the nats.",
    )
    for name, figures in evaluation.likelihoods.items():
        table.add_row(
            LIKELIHOOD_NAMES[name],
            with_interval(figures.nats_per_token),
            with_interval(figures.bits_per_byte),
            _perplexity(figures.perplexity),
            f"{figures.nats_per_token.standard_error:.3f}",
        )
    table.add_row("ln V", Text(f"{evaluation.ln_vocabulary:.3f}", style="bold"))
    return table


def _subsample_sentence(evaluation: Evaluation) -> str:
    if "b" not in evaluation.masked[0].gain:
        return ""
    counts = ", ".join(str(one.gain["b"].n) for one in evaluation.masked)
    return f" Form (b) is measured on {counts} tokens."


def _infilling_tables(evaluation: Evaluation) -> list[Table]:
    settings = evaluation.about["settings"]
    columns = [f"{one.span_length} token{'s' * (one.span_length > 1)}" for one in evaluation.infilling]
    n_holes = ", ".join(str(one.n_holes) for one in evaluation.infilling)
    first = evaluation.infilling[0]
    scores = {ARM_NAMES[name]: [one.arms[name] for one in evaluation.infilling] for name in first.arms}
    for name, label in (("left_only", "more than left only"), ("reranked", "more than best of n")):
        scores[label] = [one.advantage[name] for one in evaluation.infilling]
    return [
        _figures(
            f"Infilling: share of spans that are right as a whole ({n_holes} spans)",
            columns,
            {name: [one.exact_match for one in several] for name, several in scores.items()},
        ),
        _figures(
            "Infilling: share of tokens that are right",
            columns,
            {name: [one.token_accuracy for one in several] for name, several in scores.items()},
            f"Best of n: {settings['candidates']} samples at temperature 1 (seed {settings['seed']}) and the "
            f"greedy one, by the likelihood of the true right side under the base.",
        ),
    ]


def _texts_table(evaluation: Evaluation) -> Table:
    settings = evaluation.about["settings"]
    first = evaluation.texts[0].fluency
    table = _table(
        f"Written text: {first.n_samples} texts of {first.sample_length} tokens after prompts of "
        f"{settings['prompt_length']}",
        ["perplexity", "entropy", "distinct-2", "repetition", "tokens/s"],
        f"{settings['order']} order, temperature {settings['temperature']:g}, top-p {settings['top_p']:g}. "
        f"Perplexity is the base's, and can be gamed: read it with the entropy (nats) of a text's tokens, "
        f"the share of its pairs that are distinct and of its groups of four that it repeats.",
    )
    for text in evaluation.texts:
        steps = f", {text.steps} steps" if text.steps is not None else ""
        if text.steps is not None and text.forward_passes != text.steps:
            steps += f", {text.forward_passes:.1f} taken"
        table.add_row(
            f"{ORIGIN_NAMES[text.origin]}{steps}",
            _perplexity(text.fluency.perplexity),
            f"{text.fluency.entropy.value:.2f}",
            f"{text.fluency.distinct_2.value:.3f}",
            f"{text.fluency.repetition.value:.3f}",
            "" if text.tokens_per_second is None else f"{text.tokens_per_second:.1f}",
        )
    return table


def _base_sentence(evaluation: Evaluation) -> Text:
    check = evaluation.base_check
    if check.unchanged:
        text = f"With the adapter off the base is unchanged, bit for bit (sha256 {check.sha256[:12]}...)."
    else:
        text = "THE BASE HAS CHANGED: its logits or its file are not what they were before."
    if not check.trained_on_this_file:
        text += " The conversion was trained on another file."
    return Text(text, style="" if check.unchanged else "bold red")
