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

from ggml_diffusion.errors import UserError, one_line
from ggml_diffusion.text.encoding import REFUSED, TEXT, Batch, BatchEncoder, Encoded
from ggml_diffusion.text.tokenizer import Tokenizer

_IN_FLIGHT = 2  # batches a process, so that none waits for this one
_SIZE = struct.Struct("<Q")  # of a message to a process, and of the vocabulary's answer
_REPLY = struct.Struct("<QQQ")  # items, tokens, bytes of the reasons as JSON
_MAX_REASONS_BYTES = 64 << 20

# Isolated, so that nothing of the current folder is imported; the module path is the one of this process.
_CHILD = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from ggml_diffusion.text.workers import _serve; _serve()"
)


def usable_cpus() -> int:
    """Processors that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


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
        self._path, self._fingerprint = tokenizer.path, tokenizer.fingerprint
        self._is_ready = False
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-c", _CHILD, json.dumps(sys.path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C is for the parent, which ends it
        )
        self._send(str(tokenizer.path.absolute()), "its vocabulary")

    def encode(self, batch: Batch, vocab_size: int) -> Encoded:
        what = _name(batch)
        if not self._is_ready:
            fingerprint = self._receive(_SIZE.unpack(self._receive(_SIZE.size, what))[0] & 0xFFFF, what)
            if fingerprint.decode("ascii", "replace") != self._fingerprint:
                raise UserError(f"{self._path}: changed while it was in use")
            self._is_ready = True
        self._send(batch.items, what)
        n_items, n_tokens, n_reason_bytes = _REPLY.unpack(self._receive(_REPLY.size, what))
        n_bytes = sum(len(getattr(item, "text", "")) for item in batch.items)
        if n_items != len(batch.items) or n_reason_bytes > _MAX_REASONS_BYTES or n_tokens > 1 << 31:
            self._fail(what, f"answered {n_tokens} tokens for {n_bytes} characters")
        lengths = np.frombuffer(self._receive(8 * n_items, what), dtype=np.int32).reshape(-1, 2)
        tokens = np.frombuffer(self._receive(4 * n_tokens, what), dtype=np.int32)
        reasons = json.loads(self._receive(n_reason_bytes, what))
        if not _is_sound(lengths, tokens, reasons, vocab_size):
            self._fail(what, "answered nonsense")
        return Encoded(tokens, lengths, reasons)

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
            self._process.stdin.write(_SIZE.pack(len(data)))
            self._process.stdin.write(data)
            self._process.stdin.flush()
        except BrokenPipeError:
            self._fail(what)

    def _receive(self, n_bytes: int, what: str) -> bytes:
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


def _is_sound(lengths: Any, tokens: Any, reasons: object, vocab_size: int) -> bool:
    kinds, counts = lengths[:, 0], lengths[:, 1]
    if not isinstance(reasons, list) or not all(isinstance(reason, str) for reason in reasons):
        return False
    if (counts < 0).any() or (kinds < REFUSED).any():
        return False
    if counts[kinds == REFUSED].tolist() != list(range(len(reasons))):
        return False
    n_tokens = int(counts[kinds != REFUSED].sum(dtype=np.int64) + kinds[kinds > TEXT].sum(dtype=np.int64))
    return n_tokens == len(tokens) and (
        n_tokens == 0 or (int(tokens.min()) >= 0 and int(tokens.max()) < vocab_size)
    )


# -- inside the process ----------------------------------------------------------------------------


def _serve() -> None:
    """Load a vocabulary, say whose it is, and answer batches until the input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")  # what anything else prints does not mix with them
    os.dup2(2, 1)
    source = sys.stdin.buffer
    with contextlib.suppress(BrokenPipeError):
        tokenizer = Tokenizer.from_gguf(Path(_read(source)))
        fingerprint = tokenizer.fingerprint.encode()
        answers.write(_SIZE.pack(len(fingerprint)) + fingerprint)
        answers.flush()
        with BatchEncoder(tokenizer) as encoder:
            while (items := _read(source)) is not None:
                _answer(answers, encoder.encode(items))


def _read(source: IO[bytes]) -> Any:
    size = source.read(_SIZE.size)
    if len(size) < _SIZE.size:
        return None
    data = source.read(_SIZE.unpack(size)[0])
    return pickle.loads(data) if len(data) == _SIZE.unpack(size)[0] else None  # written by the parent


def _answer(answers: IO[bytes], encoded: Encoded) -> None:
    reasons = json.dumps([one_line(reason) for reason in encoded.reasons]).encode()
    answers.write(_REPLY.pack(len(encoded.lengths), len(encoded.tokens), len(reasons)))
    for part in (encoded.lengths, encoded.tokens):
        answers.write(np.ascontiguousarray(part).data)
    answers.write(reasons)
    answers.flush()
