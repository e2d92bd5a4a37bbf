"""A command that says nothing for long is seen to go on."""

import io
import sys

from with_clock import clock, run


def test_the_time_is_shown_and_the_exit_code_kept() -> None:
    out = io.StringIO()
    code = run(
        "waiting", [sys.executable, "-c", "import time; time.sleep(0.5); raise SystemExit(3)"], out, 0.1
    )
    assert code == 3
    assert set(out.getvalue().splitlines()) == {"waiting: 0:00"}


def test_a_quick_command_says_nothing() -> None:
    out = io.StringIO()
    assert run("waiting", [sys.executable, "-c", "pass"], out, 60.0) == 0
    assert out.getvalue() == ""


def test_the_clock_has_minutes_and_seconds() -> None:
    assert [clock(seconds) for seconds in (0.0, 59.9, 245.0, 3600.0)] == ["0:00", "0:59", "4:05", "60:00"]
