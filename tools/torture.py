#!/usr/bin/env python3
"""Kills conversions at random, resumes them, and compares what they end with, bit for bit.

    python tools/torture.py --kills 200 --seed 0
    python tools/torture.py --seconds 60

Each round converts a tiny model in a folder of its own: the command is killed some times (SIGKILL) and
started again, then left alone. A kill is of one of four kinds:

- moment: after a random time, start-up, identity gate and end included;
- call: in a random file operation in the output folder, half of a write done (tools/faults.c, preloaded);
- save: the same inside a checkpoint that is being saved;
- fresh: the same in a command with --fresh, mostly while it deletes the run that is there.

After each kill the newest checkpoint must load, without a damaged one beside it. In the end exports, settings
and metrics (but for times) must be those of the undisturbed run, two whole checkpoints must be there, and
nothing else: no temporary file in the folder or where the system puts them. Exit code 2 where not; the folder
of the round stays. All but the first kind run in processes that are forked from one that has imported the
package, and without the identity gate, which writes nothing: start-up would be nine tenths of the time.

For Linux; needs a C compiler. docs/results/reliability.md has a recorded run.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from make_tiny_gguf import make_tiny_gguf
from tool_errors import run_tool

from ggml_diffusion.errors import UserError
from ggml_diffusion.run_folder import BASE, CARD, CHECKPOINTS, CONFIG, EXPORTS, METRICS, TOKENS
from ggml_diffusion.training.checkpoint import KEPT, load_latest

KINDS = ("moment", "call", "save", "fresh")
MAX_KILLS_A_ROUND = 6
MODEL, TEXT, OUTPUT, TEMPORARY = "base.gguf", "text.txt", "run", "tmp"
SENTENCE = "the old mill ground corn for the whole village and the miller told his children of it. "
FLAGS = (
    f"{MODEL} --data {TEXT} --output {OUTPUT} --steps 40 --batch-size 2 --gradient-accumulation 2 --rank 4 "
    f"--sequence-length 32 --checkpoint-every 4 --threads 2"
).split()
# A request a line: where to run which command. The answer is the exit code of the process that ran it.
FORKER = """
import json, os, sys
from ggml_diffusion.app import display
from ggml_diffusion.app.cli import convert
from ggml_diffusion.app.cli.main import main
from ggml_diffusion.training import run
run.check_identity = lambda *_: "no identity gate"
for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if child == 0:
        os.chdir(request["folder"])
        os.environ.update(request["environment"])
        for descriptor, name in enumerate((os.devnull, "output.log", "output.log")):
            os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND), descriptor)
        try:
            main(request["arguments"])
        except SystemExit as error:
            sys.stdout.flush()
            os._exit(error.code or 0)
        finally:
            os._exit(1)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
# What a run may leave in its folder.
LEFT = {".lock", ".pid", BASE, CARD, CHECKPOINTS, CONFIG, METRICS, TOKENS, *EXPORTS}


@dataclass(frozen=True)
class Kill:
    """Where a process is killed.

    Attributes:
        kind: of `KINDS`.
        seconds: after its start; None = in a file operation.
        path: part of the operation's path.
        number: of the operation among those on such paths.

    """

    kind: str
    seconds: float | None = None
    path: str = ""
    number: int = 0


@dataclass(frozen=True)
class Undisturbed:
    """The run that nobody killed: its folder, how long it took, and its file operations' paths."""

    folder: Path
    seconds: float
    paths: list[str]

    def draw(self, generator: random.Random) -> Kill:
        """A kill of a random kind at a random place."""
        kind = generator.choice(KINDS)
        if kind == "moment":
            return Kill(kind, seconds=generator.uniform(0.0, self.seconds))
        if kind == "fresh":  # some dozens of operations, those of the lock before them
            return Kill(kind, path=OUTPUT, number=generator.randrange(40))
        part = OUTPUT if kind == "call" else f"{OUTPUT}/{CHECKPOINTS}"
        return Kill(kind, path=part, number=generator.randrange(sum(part in path for path in self.paths)))


class Torture:
    """Rounds of kills in a folder.

    Attributes:
        killed: kills of each kind that found the process alive.
        rounds: whole rounds, each identical to the undisturbed run.

    """

    def __init__(self, folder: Path, seed: int) -> None:
        self._folder = folder
        self._generator = random.Random(seed)
        self._library = folder / "faults.so"
        self.killed: Counter[str] = Counter()
        self.rounds = 0

    def prepare(self) -> None:
        """Compile the library, make the model and the text, and run undisturbed.

        Raises:
            UserError: no compiler, or the run fails.

        """
        compiler = shutil.which("cc")
        if sys.platform != "linux" or compiler is None:
            raise UserError("needs Linux and a C compiler, cc")
        source = Path(__file__).with_name("faults.c")
        command = [
            compiler,
            "-std=c11",
            "-O1",
            "-shared",
            "-fPIC",
            "-o",
            str(self._library),
            str(source),
            "-ldl",
        ]
        subprocess.run(command, check=True)
        self._forker = subprocess.Popen(
            [sys.executable, "-c", FORKER],
            env={**os.environ, "LD_PRELOAD": str(self._library)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        make_tiny_gguf(self._folder / MODEL, L=2, type="Q4_0")
        folder = self._new_folder("undisturbed")
        started_s = time.monotonic()
        if self._run_for(folder, float("inf")) != 0:
            raise UserError(f"{folder}: the undisturbed run failed: {(folder / 'output.log').read_text()}")
        seconds = time.monotonic() - started_s
        logged = self._new_folder("logged")
        self._run(logged, log=True)
        compare(folder, logged)
        paths = [line.partition(" ")[2] for line in (logged / "calls.log").read_text().splitlines()]
        self._undisturbed = Undisturbed(folder, seconds, paths)

    def close(self) -> None:
        """End the process that the others are forked from."""
        if self._forker.stdin is not None:
            self._forker.stdin.close()
        self._forker.wait()

    def round(self, max_kills: int) -> None:
        """Kill a run a few times, let it end, and compare.

        Raises:
            UserError: a difference, with the folder.

        """
        folder = self._new_folder(f"round-{self.rounds}")
        for _ in range(self._generator.randint(1, min(max_kills, MAX_KILLS_A_ROUND))):
            kill = self._undisturbed.draw(self._generator)
            if self._killed(folder, kill):
                self.killed[kill.kind] += 1
            self._check_checkpoints(folder, kill)
        if self._run(folder) != 0:
            raise UserError(f"{folder}: the last run failed: {(folder / 'output.log').read_text()}")
        compare(self._undisturbed.folder, folder)
        shutil.rmtree(folder)
        self.rounds += 1

    def _killed(self, folder: Path, kill: Kill) -> bool:
        """Start the command and kill it; False if it ended before."""
        code = self._run(folder, kill) if kill.seconds is None else self._run_for(folder, kill.seconds)
        if code not in (0, -signal.SIGKILL):
            raise UserError(f"{folder}: exit code {code} after {kill}: {(folder / 'output.log').read_text()}")
        return code == -signal.SIGKILL

    def _run_for(self, folder: Path, seconds: float) -> int:
        """Run the whole command, and kill it after some time; returns its exit code."""
        with (folder / "output.log").open("wb") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "ggml_diffusion", "convert", *FLAGS],
                cwd=folder,
                env={**os.environ, **_environment(folder)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    def _run(self, folder: Path, kill: Kill | None = None, *, log: bool = False) -> int:
        """Run the command in a forked process, which may die in a file operation; returns its exit code."""
        environment = _environment(folder)
        if log:
            environment |= {"GGD_FAULT_PATH": OUTPUT, "GGD_FAULT_LOG": str(folder / "calls.log")}
        if kill is not None:
            environment |= {
                "GGD_FAULT": "kill",
                "GGD_FAULT_AT": str(kill.number),
                "GGD_FAULT_PATH": kill.path,
            }
        more = ["--fresh"] if kill is not None and kill.kind == "fresh" else []
        request = {
            "folder": str(folder),
            "environment": environment,
            "arguments": ["convert", *FLAGS, *more],
        }
        assert self._forker.stdin is not None and self._forker.stdout is not None
        self._forker.stdin.write(json.dumps(request) + "\n")
        self._forker.stdin.flush()
        return int(self._forker.stdout.readline())

    def _new_folder(self, name: str) -> Path:
        folder = self._folder / name
        (folder / TEMPORARY).mkdir(parents=True)
        shutil.copy(self._folder / MODEL, folder / MODEL)
        (folder / TEXT).write_text(SENTENCE * 120)
        return folder

    def _check_checkpoints(self, folder: Path, kill: Kill) -> None:
        """What a kill left can be resumed: no checkpoint is damaged."""
        loaded = load_latest(folder / OUTPUT / CHECKPOINTS)
        if loaded is not None and loaded.damaged:
            raise UserError(f"{folder}: {kill} left a damaged checkpoint: {loaded.warnings[0]}")


def _environment(folder: Path) -> dict[str, str]:
    return {"SOURCE_DATE_EPOCH": "1700000000", "TMPDIR": str(folder / TEMPORARY)}


def compare(expected: Path, folder: Path) -> None:
    """Compare two finished rounds by their folders.

    Raises:
        UserError: what differs.

    """
    output = folder / OUTPUT
    for name in (*EXPORTS, CONFIG):
        if (output / name).read_bytes() != (expected / OUTPUT / name).read_bytes():
            raise UserError(f"{output}: {name} differs from that of the undisturbed run")
    if metrics_in(output) != metrics_in(expected / OUTPUT):
        raise UserError(f"{output}: {METRICS} differs from that of the undisturbed run")
    if unknown := {path.name for path in output.iterdir()} - LEFT:
        raise UserError(f"{output}: left over: {', '.join(sorted(unknown))}")
    checkpoints = sorted(path.name for path in (output / CHECKPOINTS).iterdir())
    if len(checkpoints) != KEPT + 1:  # and the file that names the newest
        raise UserError(f"{output}: checkpoints: {', '.join(checkpoints)}")
    if temporary := sorted(path.name for path in (folder / TEMPORARY).rglob("*")):
        raise UserError(f"{folder}: temporary files: {', '.join(temporary)}")


def metrics_in(output: Path) -> list[dict[str, object]]:
    """The lines of a run's metrics without the speed."""
    lines = (output / METRICS).read_text(encoding="utf-8").splitlines()
    return [
        {key: value for key, value in json.loads(line).items() if key != "tokens_per_second"}
        for line in lines
    ]


def main(arguments: list[str] | None = None) -> None:
    """See the top of this file."""
    parser = argparse.ArgumentParser(description="Kill conversions at random and compare what they end with.")
    parser.add_argument("--kills", type=int, default=200, help="stop after the round that reaches so many")
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="start no further round after so long"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="for the rounds; kept where one differs")
    options = parser.parse_args(arguments)
    if options.folder is not None:
        options.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="torture-", dir=options.folder))
    torture = Torture(folder, options.seed)
    started_s = time.monotonic()
    torture.prepare()
    while torture.killed.total() < options.kills and time.monotonic() - started_s < options.seconds:
        torture.round(options.kills - torture.killed.total())
        print(f"round {torture.rounds}: {torture.killed.total()} kills, identical", flush=True)
    torture.close()
    shutil.rmtree(folder)
    kinds = ", ".join(f"{kind} {torture.killed[kind]}" for kind in KINDS)
    print(
        f"{torture.killed.total()} kills ({kinds}) in {torture.rounds} rounds, all identical to the "
        f"undisturbed run; seed {options.seed}, {time.monotonic() - started_s:.0f} s"
    )


if __name__ == "__main__":
    run_tool(main)
