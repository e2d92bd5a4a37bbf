"""Run a command that prints nothing for minutes, and show that it goes on: the time since its start.

On a terminal the line is rewritten every second, elsewhere a line is printed every half minute, since the
log of a build is read while it grows. The command's own output and exit code pass through. The standard
library only: it runs before anything is installed.

usage: with_clock.py WHAT COMMAND...
"""

from __future__ import annotations

import subprocess
import sys
import time
from typing import TextIO

SECONDS_ON_A_TERMINAL = 1.0
SECONDS_IN_A_LOG = 30.0


def clock(seconds: float) -> str:
    """Minutes and seconds, "4:05"."""
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def run(what: str, command: list[str], out: TextIO, every_s: float | None = None) -> int:
    """The command's exit code; `out` is told of the time that it takes."""
    started_s, rewrite = time.monotonic(), out.isatty()
    every_s = every_s or (SECONDS_ON_A_TERMINAL if rewrite else SECONDS_IN_A_LOG)
    with subprocess.Popen(command) as process:
        while True:
            try:
                code = process.wait(timeout=every_s)
            except subprocess.TimeoutExpired:
                shown = f"{what}: {clock(time.monotonic() - started_s)}"
                print(f"\r{shown}" if rewrite else shown, end="" if rewrite else "\n", file=out, flush=True)
                continue
            if rewrite:
                print(file=out)
            return code


def main() -> int:
    """Run what the command line names."""
    if len(sys.argv) < 3:
        print("usage: with_clock.py WHAT COMMAND...", file=sys.stderr)
        return 2
    return run(sys.argv[1], sys.argv[2:], sys.stdout)


if __name__ == "__main__":
    sys.exit(main())
