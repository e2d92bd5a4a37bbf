"""Work in a process of its own: answers, refusals, deaths and limits, each a line."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from conversions import refusal

from ggml_diffusion import child
from ggml_diffusion.child import Child, reason_in_log


class Example:
    """A worker that does what it is told."""

    def __init__(self, argument: bytes) -> None:
        if argument == b"refuse":
            raise ValueError("will not be\nmade")
        self.hello = argument

    def answer(self, request: bytes) -> bytes:
        if request == b"die":
            print("GGML_ASSERT(x) failed", flush=True)
            os.abort()
        if request == b"leave":
            os._exit(3)
        if request == b"wait":
            time.sleep(60)
        if request == b"loop":
            while True:
                pass
        if request == b"raise":
            raise ValueError("not \x1b[2Jthis")
        return request[::-1]


@pytest.fixture(autouse=True)
def importable(monkeypatch: pytest.MonkeyPatch) -> None:
    """The child finds this file as a module."""
    monkeypatch.setattr(Example, "__module__", "test_child")


def test_a_worker_answers_and_its_refusals_are_one_line() -> None:
    with Child(Example, b"made", "it") as worker:
        assert worker.hello == b"made"
        assert worker.ask(b"abc", 30) == b"cba" and worker.ask(b"", 30) == b""
        large = bytes(range(256)) * 40_000
        assert worker.ask(large, 30) == large[::-1]
        assert refusal(lambda: worker.ask(b"raise", 30)) == "it not ?[2Jthis"
        assert worker.ask(b"abc", 30) == b"cba"
    assert refusal(lambda: Child(Example, b"refuse", "it")) == "it will not be made"


def test_its_death_is_a_line_with_the_signal_and_what_it_said() -> None:
    worker = Child(Example, b"", "it")
    process = worker._process
    assert (
        refusal(lambda: worker.ask(b"die", 30, " at this"))
        == "it died of SIGABRT at this: GGML_ASSERT(x) failed"
    )
    assert not worker.is_alive and process.poll() == -signal.SIGABRT
    assert (
        refusal(lambda: Child(Example, b"", "it").ask(b"leave", 30))
        == "it failed with exit code 3: no message"
    )


@pytest.mark.parametrize("request_, factor", [(b"wait", 2), (b"loop", 10**6)])
def test_what_takes_too_long_is_ended(monkeypatch: pytest.MonkeyPatch, request_: bytes, factor: int) -> None:
    monkeypatch.setattr(child, "_SLICE_S", 0.05)
    monkeypatch.setattr(child, "WAITING_FACTOR", factor)
    worker = Child(Example, b"", "it")
    assert refusal(lambda: worker.ask(request_, 0.2, " at this")) == "it did not finish within 0 s at this"
    assert not worker.is_alive and worker._process.poll() == -signal.SIGKILL


def test_a_child_that_cannot_be_started_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    assert refusal(lambda: Child(Example, b"", "it")) == "it cannot be started: No such file or directory"


def test_a_child_without_room_for_its_log_works(monkeypatch: pytest.MonkeyPatch) -> None:
    def full() -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(child.tempfile, "TemporaryFile", full)
    with Child(Example, b"", "it") as worker:
        assert worker.ask(b"abc", 30) == b"cba"
        assert refusal(lambda: worker.ask(b"die", 30)) == "it died of SIGABRT: no message"


def test_a_child_ends_with_a_killed_parent() -> None:
    program = (
        "import sys, os, signal; from ggml_diffusion.child import Child; from test_child import Example\n"
        "worker = Child(Example, b'', 'it'); print(worker._process.pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, check=False, env=environment)
    pid = int(run.stdout)
    until_s = time.monotonic() + 30
    while time.monotonic() < until_s:
        try:
            with open(f"/proc/{pid}/stat") as stat:
                if stat.read().rpartition(")")[2].split()[0] == "Z":
                    return
        except FileNotFoundError:
            return
        time.sleep(0.05)
    raise AssertionError("the child lives on")


@pytest.mark.parametrize(
    "log, reason",
    [
        ("", "no message"),
        ("a\nllama: error loading model: x\nb\n", "llama: error loading model: x"),
        ("file.cpp:3: GGML_ASSERT(a) failed\nlast\n", "file.cpp:3: GGML_ASSERT(a) failed"),
        ("terminate called after throwing\n  what():  x\n", "terminate called after throwing"),
        ("first\nlast \x1b[2J\n", "last ?[2J"),
    ],
)
def test_the_reason_is_the_line_that_says_why(log: str, reason: str) -> None:
    assert reason_in_log(log) == reason
