"""One thread that writes, one request at a time, and the queue in front of it.

A request that is given up is left out, or ends at its next denoising step. Deliberately not here: what is
written (jobs.py), HTTP (routes.py).
"""

import asyncio
import queue
import threading
import traceback
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

from ggml_diffusion.app.server.requests import RequestError
from ggml_diffusion.errors import UserError

_LOOK_S = 0.1  # how often it is looked whether the client is still there
_POLL_S = 0.05

# Tells what has been written so far; raises `Cancelled` when nobody wants more.
Tell = Callable[[Any], None]
# Writes; returns the result.
Job = Callable[[Tell], Any]


class Cancelled(Exception):
    """Nobody waits for the text."""


@dataclass
class _Waiting:
    job: Job
    loop: asyncio.AbstractEventLoop
    told: "asyncio.Queue[tuple[str, Any]]"
    cancelled: threading.Event = field(default_factory=threading.Event)

    def tell(self, kind: str, value: Any) -> None:
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.told.put_nowait, (kind, value))


class Writer:
    """A thread and its queue."""

    def __init__(self, max_waiting: int) -> None:
        self._queue: queue.Queue[_Waiting] = queue.Queue(max_waiting)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._work, name="writer", daemon=True)
        self._thread.start()

    async def write(
        self, job: Job, is_gone: Callable[[], Awaitable[bool]]
    ) -> AsyncGenerator[tuple[str, Any], None]:
        """Queue a job; yields ("state", what it tells) and at last ("done", its result).

        Raises:
            RequestError: the queue is full, the server ends, or the job refuses.
            Cancelled: the client has gone.

        """
        waiting = _Waiting(job, asyncio.get_running_loop(), asyncio.Queue())
        if self._closing.is_set():
            raise _ends()
        try:
            self._queue.put_nowait(waiting)
        except queue.Full:
            raise RequestError("too many requests wait: try again", status=503, code="queue_full") from None
        try:
            while True:
                try:
                    kind, value = await asyncio.wait_for(waiting.told.get(), _LOOK_S)
                except asyncio.TimeoutError:
                    kind, value = "nothing", None
                if self._closing.is_set():
                    raise _ends()
                if kind == "error":
                    raise value
                if await is_gone():
                    raise Cancelled
                if kind != "nothing":
                    yield kind, value
                if kind == "done":
                    return
        finally:
            waiting.cancelled.set()

    def is_closing(self) -> bool:
        """Whether all requests are given up."""
        return self._closing.is_set()

    def close(self) -> None:
        """Give up all requests, at once."""
        self._closing.set()

    def join(self, timeout_s: float) -> bool:
        """Wait for the thread; whether it has ended."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while not self._closing.is_set():
            try:
                waiting = self._queue.get(timeout=_POLL_S)
            except queue.Empty:
                continue
            self._run(waiting)

    def _run(self, waiting: _Waiting) -> None:
        def tell(state: Any) -> None:
            if waiting.cancelled.is_set() or self._closing.is_set():
                raise Cancelled
            if state is not None:
                waiting.tell("state", state)

        try:
            tell(None)
            waiting.tell("done", waiting.job(tell))
        except Cancelled:
            pass
        except RequestError as error:
            waiting.tell("error", error)
        except UserError as error:
            waiting.tell("error", RequestError(str(error)))
        except MemoryError:
            waiting.tell("error", RequestError("not enough memory: ask for less", status=503))
        except Exception:  # a defect of ours: the next request is served all the same
            traceback.print_exc()
            waiting.tell("error", RequestError("internal error", status=500))


def _ends() -> RequestError:
    return RequestError("the server is shutting down", status=503, code="shutting_down")
