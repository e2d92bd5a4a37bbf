"""What people see: sparkline, times, plain lines, masks."""

import dataclasses
import io
import re

import numpy as np
import pytest
from rich.console import Console

from ggml_diffusion.app.display import (
    DenoisingDisplay,
    TrainingDisplay,
    masked_text,
    printable,
    show_evidence,
    sparkline,
)
from ggml_diffusion.evaluation.held_out import MaskedScore, Score
from ggml_diffusion.generation.denoise import DenoisingStep
from ggml_diffusion.training.metrics import TrainMetrics
from ggml_diffusion.training.run import Evidence


def test_a_sparkline_rises_and_falls_with_its_values():
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([7, 0]) == "█▁"


def test_a_sparkline_has_no_more_characters_than_it_may():
    line = sparkline(list(range(1000)), width=8)
    assert line == "▁▂▃▄▅▆▇█"


@pytest.mark.parametrize(
    ("values", "line"), [([], ""), ([np.nan], ""), ([2.0, 2.0], "▁▁"), ([1, np.inf], "▁")]
)
def test_a_sparkline_of_odd_values(values, line):
    assert sparkline(values) == line


class Clock:
    """A clock that a test turns."""

    def __init__(self):
        self.now_s = 0.0

    def __call__(self):
        return self.now_s


def metrics(step, loss=2.5):
    return TrainMetrics(step, loss, 0.25, 0.5, 1e-4, 1.0, step * 100, 50.0)


def show(terminal, n_steps, seconds_a_step):
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, force_terminal=terminal, width=100, color_system=None)
    display = TrainingDisplay(console, clock)
    display.start(0, 0, n_steps)
    for step in range(1, n_steps + 1):
        clock.now_s += seconds_a_step
        display.step(metrics(step))
    display.stop()
    return out.getvalue()


def test_without_a_terminal_a_line_is_written_every_ten_seconds_and_at_the_end():
    lines = show(terminal=False, n_steps=23, seconds_a_step=2.0).splitlines()
    assert [line.split()[1] for line in lines] == ["1/23", "6/23", "11/23", "16/23", "21/23", "23/23"]
    assert all("\x1b" not in line for line in lines)
    for part in ("loss 2.5000", "masked accuracy 0.250", "causal ratio 0.500", "learning rate 1.00e-04",
                 "tokens/s 50", "elapsed 0:12", "remaining 0:34"):  # fmt: skip
        assert part in lines[1]


def test_on_a_terminal_the_panel_shows_all_fields_and_the_sparkline():
    out = show(terminal=True, n_steps=4, seconds_a_step=2.0)
    for part in ("step 4/4", "loss 2.5000", "remaining 0:00", "▁▁▁▁"):
        assert part in out


def test_the_panel_of_a_run_of_months_fits_80_columns():
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, force_terminal=True, width=80, color_system=None)
    display = TrainingDisplay(console, clock)
    display.start(49_990, 49_990 * 100, 100_000)
    clock.now_s += 10_000_000
    display.step(dataclasses.replace(metrics(99_999, 10.1234), learning_rate=1.25e-4))
    display.stop()
    shown = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", out.getvalue())
    for part in ("step 99999/100000", "loss 10.1234", "masked accuracy 0.", "causal ratio ", "tokens/s 1",
                 "learning rate 1.25e-04", "elapsed 2777:46:40", "remaining 3:20"):  # fmt: skip
        assert part in shown
    assert "…" not in shown and max(map(len, shown.splitlines())) <= 80


@pytest.mark.parametrize("terminal", [False, True])
def test_a_text_that_takes_long_to_tokenise_is_shown_and_a_short_one_is_not(terminal):
    out, clock = io.StringIO(), Clock()
    display = TrainingDisplay(Console(file=out, force_terminal=terminal, width=100), clock)
    display.tokenise(0, 2_000_000_000)
    clock.now_s += 0.5
    display.tokenise(2_000_000_000, 2_000_000_000)
    assert out.getvalue() == ""
    display.tokenise(0, 2_000_000_000)
    for done in range(1, 4):
        clock.now_s += 6
        display.tokenise(done * 500_000_000, 2_000_000_000)
    clock.now_s += 6
    display.tokenise(2_000_000_000, 2_000_000_000)
    display.stop()
    if terminal:
        assert "tokenising the text" in out.getvalue() and "/2.0 GB" in out.getvalue()
        assert out.getvalue().rstrip().endswith("\x1b[2K")  # the bar goes
    else:
        line = "tokenising the text: 1,000 of 2,000 MB, 83.3 MB/s, 0:12 left\n"
        assert out.getvalue() == line


def test_what_stands_in_a_message_is_no_markup():
    out = io.StringIO()
    display = TrainingDisplay(Console(file=out, width=40))
    display.note("[bold]a[/bold] " + "long " * 20)
    display.warn("[/oops]")
    assert out.getvalue() == "[bold]a[/bold] " + "long " * 20 + "\nwarning: [/oops]\n"


def test_a_text_cannot_send_commands_to_the_terminal():
    assert printable("a\x1b[31mb\x07\n\tc\u009bd é\u200c") == "a\ufffd[31mb\ufffd\n\tc\ufffdd é\u200c"


class Letters:
    """A tokenizer whose tokens are the letters of the alphabet; a text that starts anew is capital."""

    def decode(self, tokens, *, continued):
        text = "".join(chr(ord("a") + int(token)) for token in tokens)
        return text if continued else text.upper()


@pytest.mark.parametrize(
    ("tokens", "text"),
    [([0, 99, 99, 1, 2], "A░░bc"), ([99], "░"), ([1], "B"), ([], ""), ([99, 0, 99], "░a░")],
)
def test_masks_are_blocks_between_the_words(tokens, text):
    assert masked_text(np.array(tokens, dtype=np.int32), Letters(), 99).plain == text


def test_the_live_view_shows_each_step():
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=60, color_system=None)
    with DenoisingDisplay(console, Letters(), 99) as display:
        display.step(DenoisingStep(1, 2, np.array([0, 99, 99], dtype=np.int32), np.zeros(3)))
        display.step(DenoisingStep(2, 2, np.array([0, 1, 2], dtype=np.int32), np.zeros(3)))
    assert "A░░" in out.getvalue()
    assert "ABC" in out.getvalue()
    assert "step 2/2" in out.getvalue()


def test_the_evidence_table_shows_figures_before_and_after():
    def scores(visible, hidden):
        return [MaskedScore(0.5, Score(visible, 0.125, 10), Score(hidden, 0.1, 10))]

    out = io.StringIO()
    evidence = Evidence(7, Score(3.25, 0.4, 9), scores(8.0, 7.5), scores(4.0, 4.75))
    show_evidence(Console(file=out, width=120), evidence)
    text = out.getvalue()
    for part in ("7 held-out sequences", "8.000", "4.000", "-0.500", "+0.750", "3.250"):
        assert part in text
