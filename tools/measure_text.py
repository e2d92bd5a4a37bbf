#!/usr/bin/env python3
"""Time and memory of tokenising a large text once, and of finding its tokens again.

    python tools/measure_text.py MODEL.gguf FOLDER --megabytes 2000

writes a text of that size into FOLDER, if none of that size is there: paragraphs of Python's manual
(pydoc_data.topics) in random order, one word in 25 replaced by a made-up one, so that new words never end, as
in a text of the web. Then, each in a process of its own: the text is tokenised as `convert` does it; its
tokens are found again, and 200 batches of 64 sequences of 128 tokens are read all over it; the same with
nothing of text or tokens in the system's cache; and with the text touched, so that its content decides.
Prints a table.
"""

import argparse
import json
import os
import pydoc_data.topics
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tool_errors import run_tool

from ggml_diffusion.text.kept_tokens import Reading
from ggml_diffusion.text.loader import TextDataLoader
from ggml_diffusion.text.tokenizer import Tokenizer

MADE_UP_SHARE = 0.04
BATCHES, BATCH_SIZE, T = 200, 64, 128
_ROUND_BYTES = 50_000_000  # what is written again in another order
_ONSETS = (*"bcdfghlmnprstvw", "st", "tr", "pl", "br", "ch", "sh", "th", "qu")
_VOWELS = (*"aeiou", "ea", "ou", "ai", "io")
_ENDS = ("", "n", "s", "r", "ng", ",", ".")


def made_up_word(generator: random.Random) -> str:
    """One of some hundred million words."""
    syllables = (
        generator.choice(_ONSETS) + generator.choice(_VOWELS) for _ in range(generator.randint(2, 4))
    )
    return "".join(syllables) + generator.choice(_ENDS)


def paragraphs(generator: random.Random) -> Iterator[str]:
    """Paragraphs of the manual, on one line each, with made-up words, without end."""
    topics = "\n\n".join(pydoc_data.topics.topics.values())
    prose = [" ".join(part.split()) for part in topics.split("\n\n") if len(part) > 200]
    while True:
        words = generator.choice(prose).split(" ")
        yield " ".join(
            made_up_word(generator) if generator.random() < MADE_UP_SHARE else word for word in words
        )


def write_text(path: Path, n_bytes: int) -> None:
    """Write a text of at least so many bytes."""
    generator = random.Random(0)
    lines: list[str] = []
    size = 0
    for line in paragraphs(generator):
        lines.append(line + "\n")
        size += len(line.encode()) + 1
        if size >= min(n_bytes, _ROUND_BYTES):
            break
    with path.open("w", encoding="utf-8") as file:
        while file.tell() < n_bytes:
            generator.shuffle(lines)
            file.write("".join(lines))


def measure(model: Path, text: Path, tokens: Path, processes: int | None) -> dict[str, Any]:
    """Open the text once, and read batches; seconds and MiB of this process and of those it started."""
    started_s = time.perf_counter()
    tokenizer = Tokenizer.from_gguf(model)
    seen: list[int] = []
    reading = Reading(
        tokens, keep=True, n_processes=processes, on_progress=lambda done, total: seen.append(done)
    )
    loader = TextDataLoader(text, tokenizer, T, BATCH_SIZE, held_out_fraction=0.01, reading=reading)
    opened_s = time.perf_counter() - started_s
    for index in range(BATCHES):
        loader.batch_at(index * 11)
    read_s = time.perf_counter() - started_s - opened_s
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    own = resource.getrusage(resource.RUSAGE_SELF)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {
        "tokenised": bool(seen),
        "seconds": opened_s,
        "seconds_for_batches": read_s,
        "cpu_seconds": own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime,
        "peak_mib": int(status["VmHWM"].split()[0]) >> 10,  # that of getrusage begins with the parent's
        "peak_mib_of_a_child": children.ru_maxrss >> 10,
        "tokens": loader.n_tokens,
        "sequences": loader.n_sequences,
        "fingerprint": loader.fingerprint,
    }


def forget(paths: list[Path]) -> None:
    """Let the system drop what it has of files in memory."""
    for path in paths:
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def in_new_process(arguments: argparse.Namespace) -> dict[str, Any]:
    """`measure` in a process of its own."""
    command = [sys.executable, __file__, str(arguments.model), str(arguments.folder), "--only"]
    command += ["--megabytes", str(arguments.megabytes)]
    if arguments.processes is not None:
        command += ["--processes", str(arguments.processes)]
    result: dict[str, Any] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    return result


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--megabytes", type=float, default=100.0)
    parser.add_argument("--processes", type=int)
    parser.add_argument("--only", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    text = arguments.folder / f"text-{arguments.megabytes:g}.txt"
    tokens = arguments.folder / f"tokens-{arguments.megabytes:g}"
    if arguments.only:
        print(json.dumps(measure(arguments.model, text, tokens, arguments.processes)))
        return
    arguments.folder.mkdir(parents=True, exist_ok=True)
    if not text.exists():
        write_text(text, int(arguments.megabytes * 1e6))
    os.utime(text, (1e9, 1e9))
    shutil.rmtree(tokens, ignore_errors=True)
    time.sleep(4)  # a file that changed just now is known by its content only
    rows = [("tokenised", in_new_process(arguments)), ("found again", in_new_process(arguments))]
    forget([text, *tokens.rglob("*.bin")])
    rows.append(("found again, nothing in the system's cache", in_new_process(arguments)))
    os.utime(text, (1e9 + 1, 1e9 + 1))
    forget([text, *tokens.rglob("*.bin")])
    time.sleep(4)
    rows.append(("touched, nothing in the system's cache", in_new_process(arguments)))
    first = rows[0][1]
    n_bytes = text.stat().st_size
    print(f"{n_bytes / 1e6:,.0f} MB, {first['tokens']:,} tokens in {first['sequences']:,} sequences\n")
    print("| | s | CPU s | MB/s | peak MiB | peak MiB of a process that tokenises | s for 200 batches |")
    print("|---|---|---|---|---|---|---|")
    for name, row in rows:
        print(
            f"| {name} | {row['seconds']:.1f} | {row['cpu_seconds']:.1f} | "
            f"{n_bytes / 1e6 / row['seconds']:,.1f} | {row['peak_mib']} | "
            f"{row['peak_mib_of_a_child'] if row['tokenised'] else ''} | {row['seconds_for_batches']:.2f} |"
        )
    assert len({row["fingerprint"] for _, row in rows}) == 1
    assert [row["tokenised"] for _, row in rows] == [True, False, False, False]


if __name__ == "__main__":
    run_tool(main)
