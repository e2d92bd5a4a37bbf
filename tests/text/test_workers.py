"""Processes that tokenise: the same tokens in order, and none outlives its parent or takes it down."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from texts import write_jsonl

from ggml_diffusion.errors import UserError
from ggml_diffusion.text import encoding, tokenising, workers
from ggml_diffusion.text.encoding import REFUSED, TEXT, BatchEncoder, batches
from ggml_diffusion.text.files import Position, documents
from ggml_diffusion.text.kept_tokens import Reading
from ggml_diffusion.text.loader import TextDataLoader
from ggml_diffusion.text.sources import find_sources
from ggml_diffusion.text.tokenizer import Tokenizer
from ggml_diffusion.text.workers import EncodingPool

SENTENCE = "the sand and the sea, and in the sand the sea"


@pytest.fixture(scope="module")
def tokenizer(tiny_model) -> Tokenizer:
    return Tokenizer.from_gguf(tiny_model(L=1))


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """A small text makes many batches, and goes to processes."""
    monkeypatch.setattr(encoding, "_BATCH_CHARS", 2000)
    monkeypatch.setattr(tokenising, "IN_PROCESS_BYTES", 0)
    monkeypatch.setattr(tokenising, "_TEXT_BYTES_A_PROCESS", 1)


def read(path: Path, n: int = 300) -> list[Path]:
    """A long document, short ones and examples, in files."""
    (path / "a.txt").write_text(f"{SENTENCE}\n" * n)
    write_jsonl(path / "b.jsonl", *(f"{SENTENCE} {k}" for k in range(n)))
    examples = [{"prompt": f"{SENTENCE} {k}?", "completion": f" {SENTENCE}"} for k in range(n)]
    (path / "c.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
    return [path / name for name in ("a.txt", "b.jsonl", "c.jsonl")]


def encodes(pid: int) -> bool:
    """Whether a process is one of the pool's; a vocabulary has one of its own."""
    with contextlib.suppress(OSError):
        return b"ggml_diffusion.text.workers" in Path(f"/proc/{pid}/cmdline").read_bytes()
    return False


def children() -> list[int]:
    found = []
    for thread in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            found += [int(one) for one in (thread / "children").read_text().split()]
    return [pid for pid in found if encodes(pid)]


def test_processes_give_the_tokens_of_this_one_in_its_order(tokenizer, tmp_path):
    files = find_sources(read(tmp_path)).files
    with BatchEncoder(tokenizer) as encoder:
        position = Position()
        expected = [encoder.encode(one.items) for one in batches(documents(files, position), position)]
    assert len(expected) > 20
    position = Position()
    with EncodingPool(tokenizer, 3) as pool:
        found = [encoded for _, encoded in pool.encode(batches(documents(files, position), position))]
    assert len(found) == len(expected)
    for one, two in zip(found, expected, strict=True):
        assert np.array_equal(one.tokens, two.tokens)
        assert np.array_equal(one.lengths, two.lengths)
        assert one.reasons == two.reasons == []
    assert children() == []


@pytest.mark.parametrize("key", ["text", "prompt"])
def test_a_batch_of_long_records_is_as_small_as_one_of_short_ones(tmp_path, key):
    line = json.dumps({key: "x" * 900, "completion": "x"})
    (tmp_path / "a.jsonl").write_text("\n".join([line] * 40))
    position = Position()
    sizes = [
        len(one.items)
        for one in batches(documents(find_sources(tmp_path / "a.jsonl").files, position), position)
    ]
    assert sum(sizes) == 40 and max(sizes) <= 3


def test_no_more_batches_are_read_than_the_processes_are_about_to_need(tokenizer, tmp_path):
    position = Position()
    n_read = n_done = ahead = 0

    def counted():
        nonlocal n_read
        for batch in batches(documents(find_sources(read(tmp_path)).files, position), position):
            n_read += 1
            yield batch

    with EncodingPool(tokenizer, 2) as pool:
        for _ in pool.encode(counted()):
            n_done += 1
            ahead = max(ahead, n_read - n_done)
    assert n_done > 20 and ahead <= 4


def test_the_first_fault_of_the_text_is_reported_whoever_finds_it(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    lines = [json.dumps({"text": SENTENCE})] * 200
    lines[150] = "not JSON"  # found here, while reading ahead
    lines[120] = json.dumps({"messages": "none"})  # found by a process
    path.write_text("\n".join(lines))
    for _ in range(2):
        with pytest.raises(UserError, match=r'a\.jsonl, line 121: "messages" must be a list'):
            TextDataLoader(path, tokenizer, 8, 1, reading=Reading(n_processes=2, strict=True))
    lines[120] = lines[0]
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"a\.jsonl, line 151: not valid JSON"):
        TextDataLoader(path, tokenizer, 8, 1, reading=Reading(n_processes=2, strict=True))
    assert children() == []


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGABRT, signal.SIGKILL])
def test_a_process_that_dies_is_one_line_with_what_it_was_given(tokenizer, tmp_path, number):
    files = read(tmp_path)

    def kill(done: int, total: int) -> None:
        if done:
            for child in children():
                os.kill(child, number)

    with pytest.raises(UserError) as refusal:
        TextDataLoader(
            files, tokenizer, 8, 1,
            reading=Reading(tmp_path / "tokens", keep=True, n_processes=2, on_progress=kill),
        )  # fmt: skip
    line = str(refusal.value)
    assert line.startswith(str(tmp_path)) and str(tokenizer.path) in line and "\n" not in line
    assert f"was ended by {signal.Signals(number).name}" in line
    assert list((tmp_path / "tokens").iterdir()) == []
    assert children() == []


def test_a_model_file_that_was_replaced_meanwhile_is_refused(tokenizer, tiny_model, tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer, "path", tiny_model(L=1, reserved=7))
    with pytest.raises(UserError, match="changed while it was in use"):
        TextDataLoader(read(tmp_path), tokenizer, 8, 1, reading=Reading(n_processes=1))


@pytest.mark.parametrize(
    "lengths, tokens, reasons, is_sound",
    [
        ([[TEXT, 2], [1, 1]], [1, 2, 3, 9], [], True),
        ([[TEXT, 0], [REFUSED, 0]], [], ["why"], True),
        ([[TEXT, 2]], [1, 2, 3], [], False),
        ([[TEXT, 2]], [1, 10], [], False),
        ([[TEXT, 2]], [1, -1], [], False),
        ([[TEXT, -1]], [], [], False),
        ([[-3, 0]], [], [], False),
        ([[REFUSED, 0]], [], [], False),
        ([[REFUSED, 1]], [], ["why"], False),
        ([[REFUSED, 0]], [], [1], False),
        ([[REFUSED, 0]], [], "w", False),
    ],
)
def test_answers_are_checked_as_if_they_came_from_a_file(lengths, tokens, reasons, is_sound):
    reply = np.array(lengths, np.int32).tobytes() + np.array(tokens, np.int32).tobytes()
    reply += json.dumps(reasons).encode()
    encoded = workers._unpacked(reply, len(lengths), 10)
    assert (encoded is not None) == is_sound
    if encoded is not None:
        assert workers._packed(encoded) == reply
    assert workers._unpacked(reply[:-1], len(lengths), 10) is None
    assert workers._unpacked(reply[:7], len(lengths), 10) is None


def test_a_fault_that_a_process_finds_is_reported_in_its_own_words(tokenizer, tmp_path, tiny_model):
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(tokenizer.path.read_bytes()[:100])
    other = Tokenizer.from_gguf(tokenizer.path)
    other.path = broken
    (tmp_path / "a.txt").write_text(SENTENCE)
    with pytest.raises(UserError, match=rf"a\.txt: {broken}: "):
        TextDataLoader(tmp_path / "a.txt", other, 8, 1, reading=Reading(n_processes=1))


@pytest.mark.skipif(not Path("/proc").is_dir(), reason="looks for processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_processes_end_with_their_parent(tokenizer, tmp_path, number):
    (tmp_path / "a.txt").write_text(f"{SENTENCE}\n" * 250_000)  # so large that it goes to processes
    program = (
        "import sys; from pathlib import Path\n"
        "def wait(done, total):\n"
        "    print('x', flush=True)\n"
        "    if done: sys.stdin.read()\n"
        "from ggml_diffusion.text.kept_tokens import Reading\n"
        "from ggml_diffusion.text.loader import TextDataLoader\n"
        "from ggml_diffusion.text.tokenizer import Tokenizer\n"
        "TextDataLoader(sys.argv[2], Tokenizer.from_gguf(sys.argv[1]), 8, 1, reading=Reading(\n"
        "    Path(sys.argv[3]), keep=True, n_processes=2, on_progress=wait))\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", program, tokenizer.path, tmp_path / "a.txt", tmp_path / "tokens"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip
    assert parent.stdout is not None and parent.stderr is not None
    for _ in range(2):
        assert parent.stdout.read(2) == b"x\n"
    found = [
        int(one)
        for task in Path(f"/proc/{parent.pid}/task").iterdir()
        for one in (task / "children").read_text().split()
        if encodes(int(one))
    ]
    assert len(found) == 2
    os.killpg(parent.pid, number)
    assert parent.wait() == -number
    deadline_s = time.monotonic() + 30
    while time.monotonic() < deadline_s and any(_is_alive(pid) for pid in found):
        time.sleep(0.05)
    assert [pid for pid in found if _is_alive(pid)] == []
    if number == signal.SIGINT:
        assert list((tmp_path / "tokens").iterdir()) == []


def _is_alive(pid: int) -> bool:
    try:
        return " Z " not in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
