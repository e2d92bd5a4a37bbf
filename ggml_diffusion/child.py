"""A process of its own for work whose input may end it: its death is an error of one line, not ours.

libllama and ggml answer bad files and texts with assertions and recursion without end, which kill the process
that they are in. What hands them bytes of others lives in a `Child`: a class that is made from bytes and
answers bytes with bytes. Nothing that comes back is trusted more than any other input: no pickles, and a
limit of size and time on every reply.

Deliberately not here: what is asked and answered (text/vocabulary_child.py, training/identity.py).
Sources: multiprocessing.connection for the framing of messages; POSIX setrlimit(2) for the limits.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable
from importlib import import_module
from multiprocessing.connection import Connection
from typing import Any, NoReturn, Protocol

from ggml_diffusion.errors import UserError, one_line

START_LIMIT_S = 120.0  # Python, NumPy and libllama on a busy machine, from a cold disk
MAX_REQUEST_BYTES = MAX_REPLY_BYTES = (1 << 31) - 1
# A recursion over each letter of a long text needs some hundred bytes of stack a letter.
STACKS_BYTES = (1 << 30, 1 << 26, 0)  # the first that the system grants; 0 = its own
WAITING_FACTOR = 20
_SLICE_S = 1.0
_LOG_BYTES = 1 << 16


def isolated(module: str, call: str) -> list[str]:
    """The command of a fresh interpreter that makes a call of a module of this package; arguments may follow.

    It is isolated, so that nothing of the current folder is imported; its module path is the one of this
    process.
    """
    program = f"import json, sys; sys.path[:] = json.loads(sys.argv[1]); import {module} as m; m.{call}"
    return [sys.executable, "-I", "-c", program, json.dumps(sys.path)]


class Worker(Protocol):
    """What lives in a child: made with the bytes that `Child` was given, it answers requests."""

    hello: bytes  # the reply to being made

    def answer(self, request: bytes) -> bytes:
        """The reply to a request."""


class Child:
    """A worker in a process of its own, for one thread at a time; a context manager.

    Attributes:
        hello: what the worker said when it had been made.

    """

    def __init__(
        self,
        worker: Callable[[bytes], Worker],
        argument: bytes,
        what: str,
        *,
        time_limit_s: float = START_LIMIT_S,
        memory_limit_bytes: int | None = None,
    ) -> None:
        """Start the process and make the worker in it.

        Args:
            worker: a class at the top of a module of this package.
            argument: what it is made with.
            what: how errors begin: the file, and who works on it ("model.gguf: llama.cpp").
            time_limit_s: for the start.
            memory_limit_bytes: of address space; None = no limit.

        Raises:
            UserError: the worker refused its argument, died of it, or took too long.

        """
        self._what = what
        ours, theirs = socket.socketpair()
        self._log = _open_log()
        environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}
        try:
            name = f"{worker.__module__}:{worker.__qualname__}"
            arguments = [name, str(theirs.fileno()), str(memory_limit_bytes or 0)]
            self._process = subprocess.Popen(
                [*isolated("ggml_diffusion.child", "_main(sys.argv[2:])"), *arguments],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
                pass_fds=(theirs.fileno(),),
                env=environment,
                start_new_session=True,  # Ctrl-C is for this process, which decides what becomes of the child
            )
        except OSError as error:
            ours.close()
            self._log.close()
            raise UserError(f"{what} cannot be started: {error.strerror or error}") from None
        finally:
            theirs.close()
        self._connection = Connection(ours.detach())
        self.close = weakref.finalize(self, _end, self._process, self._connection, self._log)
        self.hello = self.ask(argument, time_limit_s)

    def ask(self, request: bytes, time_limit_s: float, about: str = "") -> bytes:
        """The worker's reply.

        Args:
            request: what it is to answer.
            time_limit_s: of processor time; a busy machine may take `WAITING_FACTOR` times as long.
            about: what of the input is to blame if it dies, " at a text of 30 bytes".

        Raises:
            UserError: it refuses the request, died of it or took too long; the last two end it.

        """
        try:
            before_s, waited_s = _processor_s(self._process.pid), 0.0
            self._connection.send_bytes(request)
            while not self._connection.poll(_SLICE_S):
                waited_s += _SLICE_S  # while this process and its child are stopped together, none passes
                used_s = _processor_s(self._process.pid) - before_s
                if used_s >= time_limit_s or waited_s >= WAITING_FACTOR * time_limit_s:
                    self.close()
                    raise UserError(f"{self._what} did not finish within {time_limit_s:.0f} s{about}")
            reply = self._connection.recv_bytes(MAX_REPLY_BYTES)
        except (EOFError, OSError):
            self._died(about)
        except BaseException:
            # An interrupt: nobody wants the reply that is under way, and it would pass for the next one's.
            self.close()
            raise
        if reply[:1] != b"\0":
            raise UserError(f"{self._what} {one_line(reply[1:].decode(errors='replace'))}")
        return reply[1:]

    @property
    def is_alive(self) -> bool:
        """Whether it can be asked."""
        return bool(self.close.alive)

    def __enter__(self) -> "Child":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _died(self, about: str) -> NoReturn:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(5.0)
        code = self._process.poll()
        reason = reason_in_log(_last_bytes(self._log))
        self.close()
        end = (
            f"failed with exit code {code}" if code is None or code >= 0 else f"died of {_signal_name(-code)}"
        )
        raise UserError(f"{self._what} {end}{about}: {reason}")


def reason_in_log(log: str) -> str:
    """The line of a child's log that says why it failed: its own words, an assertion, or the last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    for mark in ("error loading model", "GGML_ASSERT", "terminate called", "error:"):
        for line in lines:
            if mark in line:
                return one_line(line)
    return one_line(lines[-1]) if lines else "no message"


def _open_log() -> Any:
    """What a child writes: a file without a name, which goes with the two processes.

    A pipe that nobody reads would fill up. Where there is no room for a file, nothing is kept.
    """
    try:
        return tempfile.TemporaryFile()
    except OSError:
        return open(os.devnull, "w+b")


def _end(process: "subprocess.Popen[bytes]", connection: Connection, log: Any) -> None:
    connection.close()
    process.kill()
    process.wait()
    log.close()


def _last_bytes(log: Any) -> str:
    log.seek(max(0, log.seek(0, os.SEEK_END) - _LOG_BYTES))
    return bytes(log.read()).decode(errors="replace")


def _processor_s(pid: int) -> float:
    """Processor time that a process has used; 0 where the system does not say, or the process has ended."""
    if not sys.platform.startswith("linux"):
        return 0.0
    try:
        return time.clock_gettime((~pid << 3) | 2)  # the kernel's number of another process's clock
    except OSError:
        return 0.0


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


# -- inside the process ------------------------------------------------------------------------------


def _main(arguments: list[str]) -> None:
    """Body of the child.

    Args:
        arguments: the worker's class, the descriptor to talk over, and a limit of memory.

    """
    name, descriptor, memory_limit_bytes = arguments
    with contextlib.suppress(ImportError, ValueError, OSError):  # not every system has these limits
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        if int(memory_limit_bytes):
            resource.setrlimit(resource.RLIMIT_AS, (int(memory_limit_bytes), int(memory_limit_bytes)))
    connection = Connection(int(descriptor))
    for stack_bytes in STACKS_BYTES:
        with contextlib.suppress(ValueError, RuntimeError):
            threading.stack_size(stack_bytes)
            thread = threading.Thread(target=_serve, args=(name, connection))
            thread.start()
            thread.join()
            return


def _serve(name: str, connection: Connection) -> None:
    """Answer requests until the other side goes away; the first one makes the worker."""
    module, _, class_name = name.partition(":")
    worker: Worker | None = None
    with contextlib.suppress(EOFError, OSError):
        while True:
            request = connection.recv_bytes(MAX_REQUEST_BYTES)
            try:
                if worker is None:
                    worker = getattr(import_module(module), class_name)(request)
                    reply = b"\0" + worker.hello
                else:
                    reply = b"\0" + worker.answer(request)
            except Exception as error:  # whatever it raises is its answer
                reply = b"\1" + (str(error) or type(error).__name__).encode(errors="replace")
            connection.send_bytes(reply)
