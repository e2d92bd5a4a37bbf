"""`infill` from outside: bytes in, bytes out."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import TinyModel
from conversions import conversion, write

from ggml_diffusion.app.cli.main import main
from ggml_diffusion.formats.adapter_file import DiffusionCheckpoint
from ggml_diffusion.formats.model_check import read_model

DOCUMENT = (
    b"\xef\xbb\xbfthe old mill\r\nground ___ for\tthe [[...]] whole\n"
    + "naïve 😀 ".encode()
    + b"\xff\xfe<mask:2>\x00 end  \r\n\r\n"
)
OUTSIDE = re.split(rb"___|\[\[\.\.\.\]\]|<mask:2>", DOCUMENT)


@pytest.fixture(scope="module")
def base(tiny_model: TinyModel) -> Path:
    return tiny_model(L=1, C=32, H=2, G=1, F=32, type="Q4_0")


@pytest.fixture(scope="module", params=["adapted", "frozen"])
def adapter(request: pytest.FixtureRequest, base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = read_model(base)
    made = conversion(file)
    metadata = made.metadata.model_copy(
        update={"context": request.param, "mask_token_id": 3, "final_causal_ratio": 0.0}
    )
    return write(
        replace(made, metadata=metadata), tmp_path_factory.mktemp("run") / "adapter.safetensors", file
    )


@pytest.fixture
def infill(base: Path, adapter: Path, capfdbinary: Any) -> Any:
    """Run the command; returns its exit code and what it printed, as bytes."""

    def run(*arguments: object) -> SimpleNamespace:
        capfdbinary.readouterr()
        given = ("infill", base, adapter, "--allow-other-base", "--threads", 1, "--at-most", 4, *arguments)
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in given])
        out, err = capfdbinary.readouterr()
        return SimpleNamespace(code=exit_.value.code or 0, out=out, err=err.decode())

    return run


def parts_of(filled: bytes) -> list[bytes]:
    """What came into the holes, if all that was outside is there as it was."""
    pattern = b"(.*?)".join(re.escape(part) for part in OUTSIDE)
    found = re.fullmatch(pattern, filled, re.DOTALL)
    assert found is not None, filled
    return list(found.groups())


def test_the_text_is_printed_with_every_byte_outside_of_the_holes(infill, tmp_path):
    (tmp_path / "text").write_bytes(DOCUMENT)
    done = infill(tmp_path / "text")
    assert done.code == 0 and done.err == ""
    assert len(parts_of(done.out)) == 3
    assert (tmp_path / "text").read_bytes() == DOCUMENT


def test_llama_cpp_fills_what_is_adapted_and_says_what_it_cannot(infill, tmp_path, adapter):
    (tmp_path / "text").write_bytes(DOCUMENT)
    done = infill(tmp_path / "text", "--runtime", "llama.cpp")
    if DiffusionCheckpoint.load(adapter).metadata.context == "frozen":
        assert done.code == 2 and "Only --verify runs" in done.err
    else:
        assert done.code == 0 and done.err == "" and len(parts_of(done.out)) == 3
    assert infill(tmp_path / "text", "--gpu-layers", 1).code == 2


def test_standard_input(infill, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(DOCUMENT)))
    (tmp_path / "text").write_bytes(DOCUMENT)
    assert infill("-").out == infill(tmp_path / "text").out
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b"")))
    assert "standard input: the text has no hole" in infill("-").err


def test_json_says_what_came_into_each_hole_and_how_sure_it_was(infill, tmp_path):
    (tmp_path / "text").write_bytes(DOCUMENT)
    shown = json.loads(infill(tmp_path / "text", "--json").out)["holes"]
    filled = parts_of(infill(tmp_path / "text").out)
    assert [hole["text"].encode() for hole in shown] == filled
    assert [hole["line"] for hole in shown] == [2, 2, 3]
    assert [DOCUMENT[hole["start_byte"] : hole["end_byte"]] for hole in shown] == [
        *(b"___", b"[[...]]", b"<mask:2>"),
    ]
    assert [bool(hole["lengths_tried"]) for hole in shown] == [True, True, False]
    for hole in shown:
        assert all(0.0 < token["probability"] <= 1.0 for token in hole["tokens"])
    assert len(shown[2]["tokens"]) == 2


@pytest.mark.skipif(shutil.which("patch") is None, reason="needs the program patch")
def test_a_diff_can_be_applied(infill, tmp_path):
    text = tmp_path / "text"
    text.write_bytes(DOCUMENT.replace(b"\x00", b"") + b"no end ___")
    done = infill(text, "--diff")
    expected = infill(text).out
    applied = subprocess.run(
        ["patch", "--binary", "-s", text], input=done.out, check=True, capture_output=True
    )
    assert applied.stdout == b""
    assert text.read_bytes() == expected


def test_in_place_keeps_the_mode_and_the_link(infill, tmp_path):
    text, link = tmp_path / "text", tmp_path / "link"
    text.write_bytes(DOCUMENT)
    text.chmod(0o640)
    link.symlink_to(text)
    expected = infill(text).out
    done = infill(link, "--in-place")
    assert done.code == 0 and done.out == b""
    assert link.is_symlink() and text.read_bytes() == expected
    assert stat.S_IMODE(text.stat().st_mode) == 0o640


def test_output_goes_to_another_file(infill, tmp_path):
    (tmp_path / "text").write_bytes(DOCUMENT)
    assert infill(tmp_path / "text", "--output", tmp_path / "filled").out == b""
    assert len(parts_of((tmp_path / "filled").read_bytes())) == 3
    assert (tmp_path / "text").read_bytes() == DOCUMENT


def test_output_goes_through_a_link_and_into_a_device_and_never_over_the_model(infill, base, tmp_path):
    text, filled, link = tmp_path / "text", tmp_path / "filled", tmp_path / "link"
    text.write_bytes(DOCUMENT)
    link.symlink_to(filled)
    assert infill(text, "--output", link).code == 0
    assert link.is_symlink() and len(parts_of(filled.read_bytes())) == 3
    null = tmp_path / "null"
    null.symlink_to("/dev/null")
    assert infill(text, "--output", null).code == 0
    assert null.is_symlink() and stat.S_ISCHR(os.stat("/dev/null").st_mode)
    before = base.read_bytes()
    done = infill(text, "--output", base)
    assert done.code == 2 and "is the model or the adapter" in done.err
    assert base.read_bytes() == before


def test_a_marker_of_ones_own(infill, tmp_path):
    (tmp_path / "text").write_bytes(b"the ___ mill ?? corn")
    out = infill(tmp_path / "text", "--marker", "??", "--length", 2).out
    assert out.startswith(b"the ___ mill ") and out.endswith(b" corn") and b"??" not in out


@pytest.mark.parametrize(
    ("document", "more", "words"),
    [
        (b"no hole", (), "the text has no hole: mark one with ___"),
        (b"___", ("--length", 0), "--length 0: Input should be greater than or equal to 1"),
        (b"___", ("--at-most", 0), "--at-most 0: "),
        (b"___", ("--window", 3), "--window 3: "),
        (b"___", ("--temperature", "nan"), "--temperature nan: "),
        (b"<mask:0>", (), "line 1: <mask:0>: a hole has 1 to 4096 tokens"),
        (b"<mask:4000>", (), "holes of 4000 tokens do not fit into a window of "),
        (b"\xff\xfe_\x00_\x00_\x00", (), "the text is UTF-16: save it as UTF-8"),
        (b"___", ("--in-place", "--output", "x"), "give --output or --in-place, not both"),
        (b"___", ("--diff", "--json"), "give --diff or --json, not both"),
        (b"___", ("--output", "/nowhere/x"), "/nowhere/x: could not be written"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_changes_nothing(infill, tmp_path, document, more, words):
    (tmp_path / "text").write_bytes(document)
    done = infill(tmp_path / "text", *more)
    assert done.code == 2 and done.out == b""
    assert words in done.err and done.err.count("\n") == 1
    assert (tmp_path / "text").read_bytes() == document


def test_what_is_no_file_is_refused_at_once(infill, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    assert "a named pipe, not a file" in infill(tmp_path / "pipe").err
    assert "a folder, not a file" in infill(tmp_path).err
    assert "no such file" in infill(tmp_path / "nothing").err
    assert "--in-place needs a file" in infill("-", "--in-place").err
