"""Fuzz every reader of files: damaged with knowledge of their structure, in forked workers, with limits a
case.

A case may be accepted or refused in one line. Anything else is a fault: a signal, a traceback, more than a
second of processor time, more than 100 MB beside what the worker began with, a line that cannot be printed.
Each fault is kept as a file, with the line that makes it again. Exit code 1 if there was any.

usage: fuzz.py [--inputs 20000] [--seconds N] [--seed 0] [--kinds model,toml] [--workers 2] [--only NUMBER]
[--keep FOLDER]
"""

from __future__ import annotations

import argparse
import json
import mmap
import os
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from fuzz_inputs import KINDS, Corpus
from fuzz_targets import LIMIT_S, Fault, Targets
from tool_errors import run_tool

from ggml_diffusion.app.demo import demo_model
from ggml_diffusion.errors import UserError

MEMORY_LIMIT_BYTES = 100 << 20
WALL_LIMIT_S = 120.0  # of what waits instead of computing
BLOCK = 500  # inputs a worker reads before a fresh one takes its place
_COUNTS = ("current", "accepted", "refused", "faults", "vocabularies", "deaths")


class Worker:
    """A process that reads the inputs first, first + step, ... of a kind; what it counts outlives it."""

    def __init__(
        self, corpus: Corpus, targets: Targets, kind: str, seed: int, folder: Path, keep: Path
    ) -> None:
        self._corpus, self._targets, self._kind, self._seed = corpus, targets, kind, seed
        self._folder, self._keep = folder, keep
        self._memory = mmap.mmap(-1, 8 * len(_COUNTS))
        self.counts = np.frombuffer(self._memory, np.int64)
        self.process, self._waited_for = 0, -1
        self._end = 0

    def start(self, first: int, end: int) -> None:
        """Fork."""
        self._end = end
        self.counts[0] = first
        self.process = os.fork()
        if self.process == 0:
            try:
                self._read_all(first, end)
            except BaseException:  # not the input's fault, and nobody else would say it
                traceback.print_exc(file=sys.__stderr__)
                os._exit(3)
            os._exit(0)

    def ended(self, status: int) -> int | None:
        """What the end of the process says: where to go on, None where it has read all."""
        if status == 0:
            return None
        code = os.waitstatus_to_exitcode(status)
        if code > 0:
            raise UserError("a worker ended by itself; see above")
        number = int(self.counts[0])
        if code == -signal.SIGALRM and self._waited_for != number:
            self._waited_for = number  # the whole machine may have stood still: once more
            return number
        limits: dict[int, str] = {
            signal.SIGPROF: f"more than {LIMIT_S:g} s of processor time",
            signal.SIGALRM: "hangs",
        }
        self._keep_fault(number, limits.get(-code, f"died of signal {-code}"))
        return number + 1 if number + 1 < self._end else None

    def _read_all(self, first: int, end: int) -> None:
        warnings.simplefilter("ignore")
        sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 -- for the rest of the process
        usage = [
            int(line.split()[1])
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith("VmData")
        ]
        limit = (usage[0] << 10) + MEMORY_LIMIT_BYTES
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        for number in range(first, end):
            self.counts[0] = number
            self._read_one(number)

    def _read_one(self, number: int) -> None:
        item = self._corpus.make(self._kind, self._seed, number)
        path = self._folder / f"{os.getpid()}{item.suffix}"
        path.write_bytes(item.content)
        os.truncate(path, max(item.size, len(item.content)))
        before = self._targets.vocabularies, self._targets.deaths
        signal.setitimer(signal.ITIMER_PROF, LIMIT_S)
        signal.setitimer(signal.ITIMER_REAL, WALL_LIMIT_S)
        try:
            self._targets.read(self._kind, path, number)
            self.counts[1] += 1
        except UserError as error:
            self.counts[2] += 1
            if not str(error).isprintable() or "memory" in str(error) or len(str(error)) > 2000:
                self._keep_fault(number, f"refused by {str(error)!r}")
        except (Exception, MemoryError) as error:
            reason = str(error) if isinstance(error, Fault) else traceback.format_exc()
            self._keep_fault(number, reason)
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            signal.setitimer(signal.ITIMER_REAL, 0)
            path.unlink()
        self.counts[4] += self._targets.vocabularies - before[0]
        self.counts[5] += self._targets.deaths - before[1]

    def _keep_fault(self, number: int, reason: str) -> None:
        self.counts[3] += 1
        item = self._corpus.make(self._kind, self._seed, number)
        name = self._keep / f"{self._kind}-{self._seed}-{number}"
        name.with_suffix(item.suffix).write_bytes(item.content)
        again = f"tools/fuzz.py --kinds {self._kind} --seed {self._seed} --only {number}"
        name.with_suffix(".fault").write_text(f"{again}\n{reason}\n", encoding="utf-8")


def _blocks(first: int, end: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + BLOCK, end)) for start in range(first, end, BLOCK))


def fuzz(worker: Worker, first: int, end: int, seconds: float) -> int:
    """Let workers read the inputs one block after the other; returns how many were read."""
    until_s = time.monotonic() + seconds
    for start, block_end in _blocks(first, end):
        if time.monotonic() > until_s:
            return start - first
        at: int | None = start
        while at is not None:
            worker.start(at, block_end)
            at = worker.ended(os.waitpid(worker.process, 0)[1])
    return end - first


def _share(
    arguments: argparse.Namespace, kind: str, part: int, counts: mmap.mmap, corpus: Corpus, folder: Path
) -> None:
    """One of the parallel parts of a kind's inputs, in a process of its own."""
    n_inputs = arguments.inputs // arguments.workers
    worker = Worker(
        corpus, Targets(folder / "base.gguf", folder), kind, arguments.seed, folder, arguments.keep
    )
    n_read = fuzz(worker, part * n_inputs, (part + 1) * n_inputs, arguments.seconds)
    total = np.frombuffer(counts, np.int64).reshape(arguments.workers, -1)
    total[part] = [n_read, *worker.counts[1:]]


def main() -> None:
    """Fuzz as the command line says, and print a line of counts a kind."""
    parser = argparse.ArgumentParser(description="Fuzz every reader of files.")
    parser.add_argument("--inputs", type=int, default=20_000, help="of each kind")
    parser.add_argument("--seconds", type=float, default=1e9, help="at most, for each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=KINDS)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--only", type=int, help="read one input in this process, and let its error be seen")
    parser.add_argument("--keep", type=Path, default=Path("fuzz-faults"))
    arguments = parser.parse_args()
    if not set(arguments.kinds) <= set(KINDS):
        raise UserError(f"kinds are {', '.join(KINDS)}")
    try:
        corpus = Corpus(demo_model())
    except UserError:
        corpus = Corpus(None)  # its package is not installed: no boundaries of a real header
    n_faults = 0
    with TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as name:
        folder = Path(name)
        (folder / "base.gguf").write_bytes(corpus.base)
        if arguments.only is not None:
            (kind,) = arguments.kinds
            item = corpus.make(kind, arguments.seed, arguments.only)
            path = folder / f"only{item.suffix}"
            path.write_bytes(item.content)
            os.truncate(path, max(item.size, len(item.content)))
            Targets(folder / "base.gguf", folder).read(kind, path, arguments.only)
            return
        arguments.keep.mkdir(parents=True, exist_ok=True)
        for kind in arguments.kinds:
            started_s = time.monotonic()
            counts = mmap.mmap(-1, 8 * len(_COUNTS) * arguments.workers)
            processes = []
            for part in range(arguments.workers):
                process = os.fork()
                if process == 0:
                    status = 3
                    try:
                        _share(arguments, kind, part, counts, corpus, folder)
                        status = 0
                    finally:
                        os._exit(status)
                processes.append(process)
            if any(os.waitpid(process, 0)[1] for process in processes):
                raise UserError("a worker ended by itself; see above")
            total = np.frombuffer(counts, np.int64).reshape(arguments.workers, -1).sum(axis=0).tolist()
            line = dict(zip(("inputs", *_COUNTS[1:]), total, strict=True))
            print(
                json.dumps(
                    {
                        "kind": kind,
                        "seed": arguments.seed,
                        **line,
                        "seconds": round(time.monotonic() - started_s),
                    }
                ),
                flush=True,
            )
            n_faults += line["faults"]
    if n_faults:
        print(f"{n_faults} faults, kept in {arguments.keep}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    run_tool(main)
