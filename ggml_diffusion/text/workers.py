"""Processes that encode batches of a text side by side, and give their tokens back in order.

A process is given a batch at a time and no more than two a process are under way, so that memory does not
grow with the text. Each starts with a fresh interpreter: no lock or thread of this process is in it. It ends
when its input does, and so with this process, whatever ends that. What it answers is checked as if it came
from a file: a text that overruns llama.cpp overruns this process's child, not this process.

Deliberately not here: what a batch is (encoding.py).
"""

import contextlib
import json
import os
import pickle
import queue
import signal
import struct
import subprocess
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any, NoReturn

import numpy as np

from ggml_diffusion.child import isolated
from ggml_diffusion.errors import UserError, one_line
from ggml_diffusion.text.encoding import REFUSED, TEXT, Batch, BatchEncoder, Encoded
from ggml_diffusion.text.tokenizer import Tokenizer

_IN_FLIGHT = 2  # batches a process, so that none waits for this one
_REQUEST = struct.Struct("<Q")  # bytes of a request, a pickle
_REPLY = struct.Struct("<?Q")  # whether it is a fault, and bytes of the reply
_MAX_REPLY_BYTES = 1 << 30
# Libraries that start threads for each processor need none in a process that is one of so many.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}


class EncodingPool:
    """Processes with the vocabulary of one tokenizer; a context manager, which ends them."""

    def __init__(self, tokenizer: Tokenizer, n_processes: int) -> None:
        """Start the processes.

        Args:
            tokenizer: read from a file, which they read again.
            n_processes: at least 1.

        """
        self._vocab_size = tokenizer.vocab_size
        self._processes = [_Process(tokenizer) for _ in range(n_processes)]
        self._free: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        for process in self._processes:
            self._free.put(process)
        self._threads = ThreadPoolExecutor(n_processes, thread_name_prefix="encoding")

    def __enter__(self) -> "EncodingPool":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()  # a thread that waits for it gets the end of its output
        self._threads.shutdown(cancel_futures=True)
        for process in self._processes:
            process.close()

    def encode(self, batches: Iterable[Batch]) -> Iterator[tuple[Batch, Encoded]]:
        """Every batch with its tokens, in order.

        Raises:
            UserError: a process died, with what it was given; or what reading the batches raises, but only
                after all that was read before.

        """
        waiting: deque[tuple[Batch, Future[Encoded]]] = deque()
        source = iter(batches)
        fault: UserError | None = None
        while True:
            while fault is None and len(waiting) < _IN_FLIGHT * len(self._processes):
                try:
                    batch = next(source)
                except StopIteration:
                    break
                except UserError as error:
                    fault = error
                    break
                waiting.append((batch, self._threads.submit(self._encode, batch)))
            if not waiting:
                break
            batch, future = waiting.popleft()
            yield batch, future.result()
        if fault is not None:
            raise fault

    def _encode(self, batch: Batch) -> Encoded:
        process = self._free.get()
        try:
            return process.encode(batch, self._vocab_size)
        finally:
            self._free.put(process)


class _Process:
    """One process, as its parent sees it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._path, self._fingerprint = tokenizer.path, tokenizer.fingerprint.encode()
        self._is_ready = False
        self._process = subprocess.Popen(
            isolated("ggml_diffusion.text.workers", "_serve()"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={**os.environ, **_ONE_THREAD},
            start_new_session=True,  # Ctrl-C is for the parent, which ends it
        )
        self._send(str(tokenizer.path.absolute()), "its vocabulary")

    def encode(self, batch: Batch, vocab_size: int) -> Encoded:
        what = _name(batch)
        if not self._is_ready:
            if self._receive(what) != self._fingerprint:
                raise UserError(f"{self._path}: changed while it was in use")
            self._is_ready = True
        self._send(batch.items, what)
        encoded = _unpacked(self._receive(what), len(batch.items), vocab_size)
        if encoded is None:
            self._fail(what, "answered nonsense")
        return encoded

    def kill(self) -> None:
        self._process.kill()

    def close(self) -> None:
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with contextlib.suppress(OSError):  # what was not sent yet
                stream.close()
        self._process.wait()

    def _send(self, value: Any, what: str) -> None:
        assert self._process.stdin is not None
        data = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
        try:
            self._process.stdin.write(_REQUEST.pack(len(data)))
            self._process.stdin.write(data)
            self._process.stdin.flush()
        except BrokenPipeError:
            self._fail(what)

    def _receive(self, what: str) -> bytes:
        """A reply; one that says what is wrong is raised, and leaves the process to be used again."""
        is_fault, n_bytes = _REPLY.unpack(self._read(_REPLY.size, what))
        if n_bytes > _MAX_REPLY_BYTES:
            self._fail(what, "answered nonsense")
        reply = self._read(n_bytes, what)
        if is_fault:
            raise UserError(f"{what}: {one_line(reply.decode(errors='replace'))}")
        return reply

    def _read(self, n_bytes: int, what: str) -> bytes:
        assert self._process.stdout is not None
        data = self._process.stdout.read(n_bytes)
        if len(data) < n_bytes:
            self._fail(what)
        return data

    def _fail(self, what: str, fault: str | None = None) -> NoReturn:
        self._process.kill()
        code = self._process.wait()
        if fault is None:
            fault = f"was ended by {_signal_name(-code)}" if code < 0 else f"ended with exit code {code}"
        raise UserError(f"{what}: the process that tokenised it with the vocabulary of {self._path} {fault}")


def _name(batch: Batch) -> str:
    first, last = batch.places[0], batch.places[-1]
    return first if first == last else f"{first} to {last.rpartition(', ')[2]}"


def _signal_name(number: int) -> str:
    try:
        name = signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
    return f"{name}, as if out of memory" if number == signal.SIGKILL else name


def _unpacked(reply: bytes, n_items: int, vocab_size: int) -> Encoded | None:
    """What a process says of a batch, None if it cannot be true."""
    if len(reply) < 8 * n_items:
        return None
    lengths = np.frombuffer(reply, dtype=np.int32, count=2 * n_items).reshape(-1, 2)
    kinds, counts = lengths[:, 0], lengths[:, 1]
    if (counts < 0).any() or (kinds < REFUSED).any():
        return None
    n_tokens = int(counts[kinds != REFUSED].sum(dtype=np.int64) + kinds[kinds > TEXT].sum(dtype=np.int64))
    if len(reply) < 8 * n_items + 4 * n_tokens:
        return None
    tokens = np.frombuffer(reply, dtype=np.int32, count=n_tokens, offset=8 * n_items)
    if n_tokens and (int(tokens.min()) < 0 or int(tokens.max()) >= vocab_size):
        return None
    try:
        reasons = json.loads(reply[8 * n_items + 4 * n_tokens :])
    except (ValueError, RecursionError):
        return None
    if not isinstance(reasons, list) or not all(isinstance(reason, str) for reason in reasons):
        return None
    if counts[kinds == REFUSED].tolist() != list(range(len(reasons))):
        return None
    return Encoded(tokens, lengths, [one_line(reason) for reason in reasons])


# -- inside the process ----------------------------------------------------------------------------


def _serve() -> None:
    """Load a vocabulary, say whose it is, and answer batches until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    replies = os.fdopen(os.dup(1), "wb")  # what anything else prints does not mix with them
    os.dup2(2, 1)
    source = sys.stdin.buffer
    with contextlib.suppress(BrokenPipeError), contextlib.ExitStack() as stack:
        try:
            tokenizer = Tokenizer.from_gguf(Path(_next_request(source)))
            encoder = stack.enter_context(BatchEncoder(tokenizer))
            _reply(replies, tokenizer.fingerprint.encode())
        except UserError as error:
            _reply(replies, str(error).encode(), is_fault=True)
            return
        while (items := _next_request(source)) is not None:
            try:
                _reply(replies, _packed(encoder.encode(items)))
            except UserError as error:
                _reply(replies, str(error).encode(), is_fault=True)


def _next_request(source: IO[bytes]) -> Any:
    """What the parent sent, None at the end."""
    size = source.read(_REQUEST.size)
    data = source.read(_REQUEST.unpack(size)[0]) if len(size) == _REQUEST.size else b""
    return pickle.loads(data) if data else None


def _packed(encoded: Encoded) -> bytes:
    return b"".join(
        (encoded.lengths.tobytes(), encoded.tokens.tobytes(), json.dumps(encoded.reasons).encode())
    )


def _reply(replies: IO[bytes], data: bytes, *, is_fault: bool = False) -> None:
    replies.write(_REPLY.pack(is_fault, len(data)))
    replies.write(data)
    replies.flush()
