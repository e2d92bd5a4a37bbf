"""What a run refuses or warns of, and that what was there before stays."""

import json
import os
import subprocess
import sys

import pytest
import runs
from runs import TEXT, run, steps_in

from ggml_diffusion.errors import UserError
from ggml_diffusion.training import requirements
from ggml_diffusion.training import run as convert

run_base, settings, quick_gate = runs.run_base, runs.settings, runs.quick_gate  # fixtures
pytestmark = pytest.mark.usefixtures("quick_gate")


def test_too_little_memory_or_disk_is_refused_before_anything_is_read(settings, tmp_path, monkeypatch):
    run(settings)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}

    def read(*_, **__):
        raise AssertionError("the text was read")

    monkeypatch.setattr(convert, "TextDataLoader", read)
    for change in ({"model.qlora_rank": 10**7}, {"training.batch_size": 10**9}, {"hardware.memory_mib": 1}):
        if "hardware.memory_mib" in change:
            change["training.sequence_length"] = 200
        with pytest.raises(UserError, match=r"not enough memory|memory_mib is 1") as caught:
            run({**settings, **change}, fresh=True)
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(requirements, "disk_free", lambda folder: 64 * 1024)
    with pytest.raises(UserError, match="64 KiB are free"):
        run({**settings, "model.qlora_rank": 64}, fresh=True)
    after = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    after.pop(tmp_path / "run" / ".pid"), before.pop(tmp_path / "run" / ".pid")
    assert after == before


def test_memory_disk_and_time_are_told_in_a_line_each(settings):
    _, recorder = run(settings)
    for word in ("memory: ", "disk: ", "time: "):
        assert sum(note.startswith(word) for note in recorder.notes) == 1
    assert (
        next(note for note in recorder.notes if note.startswith("time: "))
        .split("s a step, ")[1]
        .startswith("3 steps")
    )


def test_documents_of_white_space_or_one_character_are_a_warning(settings, tmp_path):
    texts = [TEXT, " \t\n \u3000 ", "x", " y\n", "no", ""]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "text.jsonl").write_text(lines)
    _, recorder = run({**settings, "training.data": [str(tmp_path / "text.jsonl")]})
    assert recorder.warnings == [
        "1 documents without text were left out",
        "3 documents hold nothing but white space or a single character",
    ]


def test_a_rank_above_a_dimension_is_a_warning(settings):
    _, recorder = run({**settings, "model.qlora_rank": 20})
    assert recorder.warnings == [
        "rank 20 is more than the smaller dimension of k_proj (16), v_proj (16): it adds nothing there"
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.base_model": None}, "which model"),
        ({"training.data": None}, "which text"),
        ({"training.output": None}, "where to"),
        ({"training.sequence_length": 1000}, "sequence_length 1000 is longer than the context"),
        ({"model.mask_token_id": 100_000}, "mask_token_id 100000"),
        ({"model.base_model": "/nowhere/model.gguf"}, "/nowhere/model.gguf"),
        ({"training.data": ["/nowhere/text.txt"]}, "/nowhere/text.txt"),
    ],
)
def test_what_cannot_be_used_is_named_in_one_line(settings, change, message):
    with pytest.raises(UserError) as caught:
        run({**settings, **change})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_evaluating_without_held_out_text_is_refused(settings):
    with pytest.raises(UserError, match="held_out_fraction is 0"):
        run({**settings, "training.held_out_fraction": 0.0}, evaluate_on=4)


def test_an_output_folder_that_is_a_file_is_refused(settings, tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UserError, match="output folder"):
        run(settings)


def test_a_refused_run_leaves_the_earlier_one_as_it_was(settings, tmp_path, monkeypatch):
    run(settings)

    def refuse(model, tokenizer):
        raise UserError("computed differently")

    monkeypatch.setattr(convert, "check_identity", refuse)
    with pytest.raises(UserError, match="computed differently"):
        run(settings, fresh=True)
    assert steps_in(tmp_path / "run") == [1, 2, 3, 4, 5]


HOLDER = """
import sys, time
from pathlib import Path
from ggml_diffusion.training.run_lock import exclusive

with exclusive(Path(sys.argv[1]), print):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_in_the_same_folder_is_refused_and_the_first_ones_pid_named(settings, tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline().strip() == "held"
        with pytest.raises(UserError, match=f"process {holder.pid} "):
            run(settings)
    finally:
        holder.kill()
        holder.wait()
    run(settings)  # the lock died with its holder


def test_a_named_pipe_in_the_place_of_the_lock_is_one_line(settings, tmp_path):
    (tmp_path / "run").mkdir()
    os.mkfifo(tmp_path / "run" / ".lock")
    with pytest.raises(UserError, match="a named pipe, not a file"):
        run(settings)
