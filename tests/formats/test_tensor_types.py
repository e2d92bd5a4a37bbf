"""The table of tensor types is right, and each type is unpacked as ggml does it."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import oracle_model
import pytest
from conftest import TinyModel, sizes_for
from gguf_bytes import SIZES, tiny_llama

from ggml_diffusion.engine.cpu.q4_model import Q4Model
from ggml_diffusion.engine.interface import Batch
from ggml_diffusion.engine.native import ffi, lib
from ggml_diffusion.errors import UserError
from ggml_diffusion.formats.model_check import read_model
from ggml_diffusion.formats.tensor_types import OTHER_TYPES, TENSOR_TYPES, TensorType

MORE_THAN_GGML_HAS = 100


def core_types() -> dict[str, TensorType]:
    """The core's own table, asked number by number."""
    info = ffi.new("ggd_tensor_type_info *")
    found = {}
    for number in range(-1, MORE_THAN_GGML_HAS):
        if lib.ggd_tensor_type(number, info) == 0:
            name = ffi.string(info.name).decode().upper()
            own_kernels = bool(info.own_kernels)
            found[name] = TensorType(name, number, info.block, info.bytes_block, own_kernels)
    return found


def test_the_core_and_the_reader_know_the_same_types() -> None:
    assert core_types() == TENSOR_TYPES


def test_the_table_agrees_with_the_gguf_package() -> None:
    unknown = []
    for name, known in TENSOR_TYPES.items():
        if name not in gguf.GGMLQuantizationType.__members__:
            unknown.append(name)
            continue
        number = gguf.GGMLQuantizationType[name]
        assert (known.id, (known.block, known.bytes_block)) == (int(number), gguf.GGML_QUANT_SIZES[number])
    assert unknown == ["Q2_0"]
    others = {
        int(number): (number.name, *gguf.GGML_QUANT_SIZES[number])
        for number in gguf.GGMLQuantizationType
        if number.name not in TENSOR_TYPES
    }
    assert others == OTHER_TYPES
    assert TENSOR_TYPES["Q4_K"].bits == 4.5


def embedding(path: Path) -> np.ndarray:
    """The token embedding's rows as the gguf package unpacks them."""
    reader = gguf.GGUFReader(str(path))
    (stored,) = (tensor for tensor in reader.tensors if tensor.name == "token_embd.weight")
    with np.errstate(all="ignore"):  # a random scale may be infinite or no number
        return oracle_model.dequantised(stored.data, stored.tensor_type).astype(np.float32)


def test_each_type_is_unpacked_to_the_bits_of_the_gguf_package(
    tiny_model: TinyModel, tmp_path: Path, each_type: str
) -> None:
    """By the naive kernels; csrc/tests/test_kernels.c holds the others against them."""
    path = tmp_path / "random.gguf"
    raw = bytearray(tiny_model(type=each_type, **sizes_for(each_type)).read_bytes())
    info = read_model(tiny_model(type=each_type, **sizes_for(each_type))).tensors["token_embd.weight"]
    half = info.offset_bytes + info.n_bytes // 2  # the first rows stay as ggml quantised them
    raw[half : info.offset_bytes + info.n_bytes] = np.random.default_rng(5).bytes(
        info.n_bytes - info.n_bytes // 2
    )
    path.write_bytes(raw)
    with Q4Model.from_gguf(path, 1) as model:
        rows = model.embed(np.arange(model.file.V)[None])[0]
    assert np.array_equal(rows, embedding(path), equal_nan=True)
    assert np.count_nonzero(rows) > rows.size // 4


def test_q2_0_is_multiplied_as_the_values_that_it_stands_for(tmp_path: Path) -> None:
    """The gguf package does not know it: a float16 d, then 64 codes of two bits for -1, 0, 1, 2 times d."""
    rng = np.random.default_rng(5)
    d = rng.uniform(0.05, 0.15, (SIZES["C"], 1)).astype(np.float16)
    codes = rng.integers(0, 4, (SIZES["C"], SIZES["F"]))
    packed = (codes.reshape(len(d), -1, 4) << np.array([0, 2, 4, 6])).sum(axis=2).astype(np.uint8)
    blocks = np.concatenate([d.view(np.uint8), packed], axis=1).tobytes()
    values = (d.astype(np.float32) * (codes - 1)).astype(np.float32).tobytes()
    logits = []
    for type_id, data in ((TENSOR_TYPES["Q2_0"].id, blocks), (TENSOR_TYPES["F32"].id, values)):
        file, path = tiny_llama(), tmp_path / f"{type_id}.gguf"
        down = file.tensor("blk.0.ffn_down.weight")
        down.type_id, down.data = type_id, data
        path.write_bytes(file.build())
        with Q4Model.from_gguf(path, 1) as model:
            logits.append(model.logits(Batch(np.arange(8)[None], 0.5)))
    assert np.array_equal(logits[0], logits[1])


@pytest.mark.parametrize("name", [name for name, known in TENSOR_TYPES.items() if known.block > 1])
def test_a_row_that_is_no_whole_blocks_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    known = TENSOR_TYPES[name]
    file, path = tiny_llama(), tmp_path / "model.gguf"
    query = file.tensor("blk.0.attn_q.weight")
    query.dims, query.type_id, query.data = (known.block + 8, 32), known.id, bytes(known.bytes_block * 64)
    path.write_bytes(file.build())
    with pytest.raises(UserError) as refusal:
        read_model(path)
    assert f"not divisible by the block size {known.block} of its type {name}" in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["Q8_1", "Q8_K", "I32", "F64"])
def test_types_that_no_weights_have_are_not_supported_by_the_core(name: str) -> None:
    number = int(gguf.GGMLQuantizationType[name])
    assert name not in TENSOR_TYPES
    assert lib.ggd_tensor_type(number, ffi.new("ggd_tensor_type_info *")) == -1
