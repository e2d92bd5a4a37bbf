"""Models in several files: any part opens all, a wrong part is named, and llama.cpp reads the same."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
from conversions import refusal
from gguf_bytes import I32, U16, Gguf, scalar, tiny_llama
from llama_reference import Request, llama_logits
from make_tiny_gguf import make_tiny_gguf

from ggml_diffusion.engine.cpu.q4_model import Q4Model
from ggml_diffusion.engine.interface import Batch
from ggml_diffusion.formats.model_check import read_model
from ggml_diffusion.formats.model_file import file_sha256

TOKENS = np.arange(20, 44, dtype=np.int32)


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    make_tiny_gguf(tmp_path / "tiny.gguf", tensors_a_part=8)
    found = sorted(tmp_path.glob("tiny-*-of-*.gguf"))
    assert len(found) == 3
    return found


@pytest.mark.parametrize("named", [0, 1, 2])
def test_any_part_opens_the_whole_model(parts: list[Path], tmp_path: Path, named: int) -> None:
    whole = make_tiny_gguf(tmp_path / "whole.gguf")
    model = read_model(parts[named])
    assert model.parts == tuple(parts)
    assert model.path == parts[0]
    assert model.tensors.keys() == read_model(whole).tensors.keys()
    with Q4Model.from_gguf(parts[named], 1) as split, Q4Model.from_gguf(whole, 1) as joined:
        ours = split.logits(Batch(TOKENS[None]))[0]
        assert np.array_equal(ours, joined.logits(Batch(TOKENS[None]))[0])
    # float32 sums in another order, of logits of size 2
    assert np.abs(ours - llama_logits(parts[0], [Request(TOKENS)])[0]).max() < 1e-4


def test_the_sha256_is_that_of_the_parts_in_their_order(parts: list[Path]) -> None:
    expected = hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()
    assert [file_sha256(part) for part in parts] == [expected] * 3


def small_parts(folder: Path, n: int = 2) -> list[Path]:
    """A model of 12 tensors in n files, by the writer of bytes."""
    whole = tiny_llama()
    paths = []
    for number in range(n):
        tensors = whole.tensors[number * 12 // n : (number + 1) * 12 // n]
        part = Gguf(list(whole.keys) if number == 0 else [], tensors)
        part.set("split.no", scalar(U16, number)).set("split.count", scalar(U16, n))
        part.set("split.tensors.count", scalar(I32, 12))
        paths.append(folder / f"m-{number + 1:05}-of-{n:05}.gguf")
        paths[-1].write_bytes(part.build())
    return paths


def test_a_missing_part_is_named(tmp_path: Path) -> None:
    first, second = small_parts(tmp_path)
    second.unlink()
    assert refusal(lambda: read_model(first)) == f"{second}: this part of the model is missing"


def test_a_part_of_another_model_is_named(tmp_path: Path) -> None:
    first, second = small_parts(tmp_path)
    (tmp_path / "other").mkdir()
    shutil.copy(small_parts(tmp_path / "other", 3)[1], second)
    assert refusal(lambda: read_model(first)).startswith(f"{second}: is not part 2 of 2 of this model")


def test_a_part_twice_is_named(tmp_path: Path) -> None:
    first, second = small_parts(tmp_path)
    shutil.copy(first, second)
    assert refusal(lambda: read_model(first)).startswith(f"{second}: is not part 2 of 2 of this model")


def test_a_tensor_in_two_parts_is_named(tmp_path: Path) -> None:
    _, second = small_parts(tmp_path)
    again = Gguf([], tiny_llama().tensors[:7])
    again.set("split.no", scalar(U16, 1)).set("split.count", scalar(U16, 2))
    second.write_bytes(again.build())
    assert "which another part of the model holds too" in refusal(lambda: read_model(second))


def test_too_few_tensors_in_all_parts_are_counted(tmp_path: Path) -> None:
    first, second = small_parts(tmp_path)
    fewer = Gguf([], tiny_llama().tensors[7:])
    fewer.set("split.no", scalar(U16, 1)).set("split.count", scalar(U16, 2))
    second.write_bytes(fewer.build())
    assert "its 2 parts hold 11 tensors, not the 12 of the model" in refusal(lambda: read_model(first))


@pytest.mark.parametrize("name", ["m.gguf", "m-00001-of-00003.gguf"])
def test_a_part_under_a_name_that_hides_the_others_is_one_line(tmp_path: Path, name: str) -> None:
    first, _ = small_parts(tmp_path)
    renamed = first.rename(tmp_path / name)
    assert "is one of 2 parts of a model, but its name does not say which" in refusal(
        lambda: read_model(renamed)
    )
