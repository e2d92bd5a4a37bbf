"""Child processes that are measured against each other: both ends of the line, and a process's own memory.

Every arm of a comparison is a process of its own, so that its peak memory is its own, and lives through the
whole comparison, so that the arms can take turns step by step: machines drift, and a ratio of two figures
from different minutes says little. An idle arm waits for its next line and uses no processor.

It does not know what is measured: the children are bench_worker.py and peer_torch_step.py. The standard
library only, as the peer runs it in an environment without this project.
Source: proc(5) for the files under /proc/self.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

Reply = dict[str, Any]
Action = Callable[..., Reply]
DESCRIBE = "describe"  # the action that is asked for first
ERROR_LINES = 12


class ArmFailed(Exception):
    """A child process ended instead of answering; the message holds the end of what it wrote to stderr."""


class Arm:
    """A child process that answers one command at a time; a context manager that ends it.

    Attributes:
        name: for tables.
        about: what it said about itself at the start.

    """

    def __init__(
        self,
        name: str,
        python: str | Path,
        script: str,
        job: Mapping[str, Any],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self.name = name
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - open as long as the arm
        self._process = subprocess.Popen(
            [str(python), str(Path(__file__).with_name(script)), json.dumps(job)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env={**os.environ, **(environment or {})},
        )
        try:
            self.about = self.ask(DESCRIBE)
        except ArmFailed:
            self.close()
            raise

    def ask(self, action: str, **arguments: Any) -> Reply:
        """What the child answers to a command.

        Raises:
            ArmFailed: it ended.

        """
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # why it ended is told below
            self._process.stdin.write(json.dumps([action, arguments]) + "\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._errors.seek(0)
            last = self._errors.read().decode(errors="replace").splitlines()[-ERROR_LINES:]
            raise ArmFailed("\n".join([f"{self.name} ended with status {self._process.returncode}", *last]))
        reply: Reply = json.loads(line)
        return reply

    def close(self) -> None:
        """Let the child end; it is killed if it is still busy."""
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            self._process.stdin.close()
            self._process.wait(timeout=10.0)
        except (BrokenPipeError, subprocess.TimeoutExpired):
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._errors.close()

    def __enter__(self) -> Arm:
        """The arm ends with the `with` block."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """See `close`."""
        self.close()


def alternate(arms: Sequence[Arm], n_rounds: int, action: str, **arguments: Any) -> list[list[Reply]]:
    """Ask the arms in turn, A B A B; each arm's `n_rounds` replies."""
    in_turn = [[arm.ask(action, **arguments) for arm in arms] for _ in range(n_rounds)]
    return [list(of_arm) for of_arm in zip(*in_turn, strict=True)]


def serve(start: Callable[[Reply], Mapping[str, Action]]) -> None:
    """The child's side: answer commands until the line is closed.

    Args:
        start: job -> the actions by name, `DESCRIBE` among them.

    """
    # Replies get the real standard output; what libraries print there goes to the errors.
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as replies:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        actions = start(json.loads(sys.argv[1]))
        for line in sys.stdin:
            name, arguments = json.loads(line)
            print(json.dumps(actions[name](**arguments)), file=replies, flush=True)


def peak_memory_bytes() -> int | None:
    """Most memory that this process had resident, pages of mapped files among it; None where unknown."""
    # Not getrusage: its maximum starts at that of the process that started this one.
    lines = _proc_lines("status")
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)


def reset_peak_memory() -> None:
    """Count the peak from now on, where the system can."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def resident_bytes_of_file(path: str | Path) -> int | None:
    """How much of a mapped file is resident in this process; None where unknown."""
    wanted, found, is_it = str(Path(path).resolve()), None, False
    for line in _proc_lines("smaps"):
        words = line.split(maxsplit=5)
        if "-" in words[0] and not words[0].endswith(":"):
            is_it = len(words) == 6 and words[5] == wanted
        elif is_it and words[0] == "Rss:":
            found = (found or 0) + 1024 * int(words[1])
    return found


def _proc_lines(name: str) -> list[str]:
    try:
        return Path("/proc/self", name).read_text().splitlines()
    except OSError:
        return []
