"""Numbers that are not finite are found in every type, and only they, while the SHA-256 is taken."""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

import numpy as np
import pytest
from conftest import TinyModel, sizes_for
from conversions import refusal
from gguf_bytes import tiny_llama, write_gguf

from ggml_diffusion.engine.cpu.q4_model import Q4Model
from ggml_diffusion.formats.model_check import read_model
from ggml_diffusion.formats.model_file import ModelFile, file_sha256
from ggml_diffusion.formats.tensor_types import TENSOR_TYPES
from ggml_diffusion.formats.tensor_values import checked_sha256, first_bad_block

NAN_HALF, INFINITE_HALF = b"\x01\x7e", b"\x00\xfc"


def changed(source: ModelFile, path: Path, name: str, place: int, data: bytes) -> ModelFile:
    """A copy of a model with bytes of a tensor changed."""
    content = bytearray(source.path.read_bytes())
    start = source.tensors[name].offset_bytes + place
    content[start : start + len(data)] = data
    path.write_bytes(content)
    return read_model(path)


def test_every_type_that_is_read_is_looked_at() -> None:
    for name, known in TENSOR_TYPES.items():
        assert first_bad_block(name, bytes(3 * known.bytes_block)) == -1


def test_a_block_is_refused_exactly_where_it_is_unpacked_to_what_is_not_finite(
    tiny_model: TinyModel, tmp_path: Path, each_type: str
) -> None:
    """Against the core's own unpacking (and ggml's, where it does that), on blocks of random bytes.

    MXFP4 alone may refuse what is finite: a scale whose larger values would not be.
    """
    source = read_model(tiny_model(type=each_type, **sizes_for(each_type)))
    known, tensor = TENSOR_TYPES[each_type], source.tensors["token_embd.weight"]
    generator = np.random.default_rng(5)
    blocks = generator.integers(
        0, 256, (tensor.n_bytes // known.bytes_block, known.bytes_block), dtype=np.uint8
    )
    each = np.arange(len(blocks))
    blocks[each, each % known.bytes_block] = 0xFF  # of a scale that makes it NaN or infinite
    path = tmp_path / "random.gguf"
    changed(source, path, tensor.name, 0, blocks.tobytes())
    with Q4Model.from_gguf(path, 1) as model:
        rows = model.embed(np.arange(tensor.shape[0])[None])[0]
    is_finite = np.isfinite(rows.reshape(len(blocks), -1)).all(axis=1)
    found = np.array([first_bad_block(each_type, block.tobytes()) < 0 for block in blocks])
    if each_type == "MXFP4":
        assert not (found & ~is_finite).any() and (blocks[is_finite & ~found, 0] >= 253).all()
    else:
        assert np.array_equal(found, is_finite)
    assert found.any() and (not found.all() or each_type == "NVFP4")


@pytest.mark.parametrize(
    "type_name, place", [("Q4_0", 0), ("Q4_1", 2), ("Q8_0", 0), ("Q4_K", 2), ("Q6_K", 208)]
)
@pytest.mark.parametrize("half", [NAN_HALF, INFINITE_HALF])
def test_a_scale_that_is_no_number_is_named_with_its_tensor_and_row(
    tiny_model: TinyModel, tmp_path: Path, type_name: str, place: int, half: bytes
) -> None:
    source = read_model(tiny_model(type=type_name, **sizes_for(type_name)))
    info, known = source.tensors["blk.0.ffn_down.weight"], TENSOR_TYPES[type_name]
    blocks_row = info.shape[1] // known.block
    model = changed(
        source,
        tmp_path / "nan.gguf",
        info.name,
        (7 * blocks_row + blocks_row - 1) * known.bytes_block + place,
        half,
    )
    message = "has a scale that is NaN or infinite in row 7: the file is damaged"
    expected = f"{model.path}: tensor 'blk.0.ffn_down.weight' {message}"
    assert refusal(lambda: checked_sha256(model)) == expected


@pytest.mark.parametrize("name", ["output_norm.weight", "token_embd.weight", "blk.0.attn_norm.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_number_that_is_none_is_found_in_norms_and_float_tensors(
    tiny_model: TinyModel, tmp_path: Path, name: str, value: float
) -> None:
    source = read_model(tiny_model(type="F32"))
    model = changed(source, tmp_path / "nan.gguf", name, 4 * source.C - 4, struct.pack("<f", value))
    assert f"tensor '{name}' has a value that is NaN or infinite in row 0" in refusal(
        lambda: checked_sha256(model)
    )


def test_the_sum_is_that_of_all_bytes(tiny_model: TinyModel, tmp_path: Path) -> None:
    source = read_model(tiny_model(type="Q4_K", **sizes_for("Q4_K")))
    assert checked_sha256(source) == hashlib.sha256(source.path.read_bytes()).hexdigest()
    longer = tmp_path / "longer.gguf"  # more bytes than one chunk behind the tensors
    longer.write_bytes(source.path.read_bytes() + bytes(range(256)) * 9000)
    assert checked_sha256(read_model(longer)) == hashlib.sha256(longer.read_bytes()).hexdigest()


def test_a_model_that_was_found_sound_is_not_looked_at_again(tmp_path: Path) -> None:
    content = tiny_llama()
    content.tensor("output_norm.weight").data = struct.pack("<f", float("nan")) * 32
    model = read_model(write_gguf(tmp_path / "nan.gguf", content))
    digest = file_sha256(model.path)
    assert checked_sha256(model, sound=digest) == digest
    assert "output_norm.weight" in refusal(lambda: checked_sha256(model, sound="0" * 64))


def test_a_file_that_became_shorter_is_refused(tiny_model: TinyModel, tmp_path: Path) -> None:
    source = read_model(tiny_model(type="F32"))
    model = changed(source, tmp_path / "short.gguf", "output_norm.weight", 0, b"")
    with model.path.open("r+b") as file:
        file.truncate(model.path.stat().st_size - 100)
    assert "has become shorter" in refusal(lambda: checked_sha256(model))
