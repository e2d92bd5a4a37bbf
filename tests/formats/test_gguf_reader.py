"""GGUF files, sound and hostile: every fault in the structure is one clear line."""

from __future__ import annotations

import struct
import tracemalloc
from itertools import accumulate
from pathlib import Path

import gguf
import numpy as np
import pytest
from conversions import refused
from gguf_bytes import (
    ARRAY,
    BOOL,
    F32,
    F64,
    I32,
    STRING,
    U16,
    U32,
    U64,
    Gguf,
    Tensor,
    array,
    scalar,
    text,
    tiny_llama,
    with_extra_key,
    with_extra_tensor,
    with_fields,
    with_key,
    with_tensor,
    write_gguf,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from ggml_diffusion.errors import UserError
from ggml_diffusion.formats import gguf_reader
from ggml_diffusion.formats.model_check import check_model, read_model
from ggml_diffusion.formats.model_file import read_gguf
from ggml_diffusion.formats.tensor_types import TENSOR_TYPES


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def test_all_types_of_values_are_read(path: Path):
    values = {
        U16: 65535,
        U32: 4294967295,
        U64: 2**64 - 1,
        I32: -5,
        F32: 0.5,
        F64: 1e300,
        BOOL: True,
        STRING: "é\n",
    }
    names = {
        U16: "u16",
        U32: "u32",
        U64: "u64",
        I32: "i32",
        F32: "f32",
        F64: "f64",
        BOOL: "bool",
        STRING: "str",
    }
    keys = [(f"k{type_id}", scalar(type_id, value)) for type_id, value in values.items()]
    keys += [(f"a{type_id}", array(type_id, [value] * 3)) for type_id, value in values.items()]
    file = read_gguf(write_gguf(path, Gguf(keys)))
    for type_id, value in values.items():
        assert file.metadata[f"k{type_id}"] == value
        assert list(file.metadata[f"a{type_id}"]) == [value] * 3
        assert file.key_types[f"k{type_id}"] == names[type_id]
        assert file.key_types[f"a{type_id}"] == f"arr[{names[type_id]}]"


def test_arrays_of_strings_are_decoded_on_demand(path: Path):
    tokens = read_gguf(write_gguf(path, tiny_llama())).metadata["tokenizer.ggml.tokens"]
    assert isinstance(tokens, gguf_reader.StringArray)
    expected = [*"abcdefgh", "ab", "é", "<end>", ""]
    assert list(tokens) == expected
    assert [tokens[i] for i in range(12)] == expected
    assert (tokens[-2], tokens[8:10], tokens.raw(9)) == ("<end>", ["ab", "é"], "é".encode())
    with pytest.raises(IndexError):
        tokens[12]


def test_what_gguf_py_writes_is_read_as_gguf_py_reads_it(path: Path):
    generator = np.random.default_rng(1)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_custom_alignment(64)
    writer.add_token_list(["one", "two"])
    writer.add_token_scores([0.5, -1.0])
    writer.add_tensor("plain", generator.standard_normal((3, 5)).astype(np.float32))
    blocks = gguf.quants.quantize(
        generator.standard_normal((2, 64)).astype(np.float32), gguf.GGMLQuantizationType.Q4_1
    )
    writer.add_tensor("packed", blocks, raw_dtype=gguf.GGMLQuantizationType.Q4_1)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    reader, file = gguf.GGUFReader(path), read_gguf(path)
    assert file.alignment == 64
    for theirs in reader.tensors:
        ours = file.tensors[theirs.name]
        assert ours.shape == tuple(reversed(theirs.shape.tolist()))
        assert ours.type_name == theirs.tensor_type.name
        assert (ours.offset_bytes, ours.n_bytes) == (theirs.data_offset, theirs.n_bytes)
    for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.scores"):
        assert list(file.metadata[key]) == reader.fields[key].contents()


def test_every_supported_type_is_accepted_and_measured_in_its_blocks(path: Path):
    for name, known in TENSOR_TYPES.items():
        file = Gguf([], [("x", Tensor((known.block * 2, 3), bytes(6 * known.bytes_block), known.id))])
        info = read_gguf(write_gguf(path, file)).tensors["x"]
        assert (info.type_name, info.shape, info.n_bytes) == (
            name,
            (3, known.block * 2),
            6 * known.bytes_block,
        )


HUGE = 1 << 63
FOUR = Tensor((4,), bytes(16))
STRUCTURAL_FAULTS: dict[str, tuple[Gguf | bytes, str]] = {
    "an empty file": (b"", "the file is empty"),
    "another format": (b"PK\3\4" + bytes(60), "not a GGUF file"),
    "a magic in the other byte order": (with_fields(magic=b"FUGG"), "not a GGUF file"),
    "version 0": (with_fields(version=0), "version 0 is not supported"),
    "version 1": (with_fields(version=1), "version 1 is not supported"),
    "version 4": (with_fields(version=4), "version 4 is not supported"),
    "big-endian": (with_fields(version=3 << 24), "big-endian"),
    "2^63 keys": (with_fields(n_keys=HUGE), f"says that it has {HUGE} keys"),
    "2^63 tensors": (with_fields(n_tensors=HUGE), f"says that it has {HUGE} tensors"),
    "a key too many": (with_fields(n_keys=18), ""),
    "a tensor too many": (with_fields(n_tensors=13), ""),
    "an empty key": (with_extra_key("", scalar(U32, 1)), "the name of key 17 is empty"),
    "a key twice": (with_extra_key("general.name", scalar(U32, 1)), "key 'general.name' occurs twice"),
    "a key that is not UTF-8": (with_extra_key(b"\xff\xfe", scalar(U32, 1)), "is not UTF-8"),
    "a key with control characters": (
        with_extra_key("a\nb\x1b[2J", struct.pack("<I", 77)),
        r"key 'a\nb\x1b[2J' has an unknown value type 77",
    ),
    "a string of 2^63": (
        with_key("x", struct.pack("<IQ", STRING, HUGE)),
        "the value of key 'x' reaches past",
    ),
    "a string of 2^64 - 1": (with_key("x", struct.pack("<IQ", STRING, 2**64 - 1)), "'x' reaches past"),
    "an unknown value type": (with_key("x", struct.pack("<II", 13, 0)), "'x' has an unknown value type 13"),
    "an unknown array type": (with_key("x", struct.pack("<IIQ", ARRAY, 99, 1)), "unknown array type 99"),
    "an array of arrays": (with_key("x", struct.pack("<IIQ", ARRAY, ARRAY, 1)), "an array of arrays"),
    "an array of 2^63 numbers": (with_key("x", struct.pack("<IIQ", ARRAY, U64, HUGE)), "'x' reaches past"),
    "an array whose bytes overflow": (
        with_key("x", struct.pack("<IIQ", ARRAY, U64, 1 << 61)),
        "reaches past",
    ),
    "an array of 2^63 strings": (with_key("x", struct.pack("<IIQ", ARRAY, STRING, HUGE)), "'x' reaches past"),
    "a long string in an array": (
        with_key("x", struct.pack("<IIQQ", ARRAY, STRING, 1, HUGE)),
        "the value of key 'x' reaches past",
    ),
    "a truth value of 2": (with_key("x", struct.pack("<IB", BOOL, 2)), "neither 0 nor 1"),
    "alignment 0": (with_key("general.alignment", scalar(U32, 0)), "alignment 0 is not a power of two"),
    "alignment 3": (with_key("general.alignment", scalar(U32, 3)), "alignment 3 is not a power of two"),
    "alignment 1": (with_key("general.alignment", scalar(U32, 1)), "alignment 1 is not a power of two"),
    "alignment 2^31": (with_key("general.alignment", scalar(U32, 1 << 31)), "alignment 2147483648"),
    "an alignment of text": (with_key("general.alignment", scalar(STRING, "32")), "type str, not u32"),
    "an alignment of 64 bits": (with_key("general.alignment", scalar(U64, 32)), "type u64, not u32"),
    "a tensor twice": (with_extra_tensor("output.weight", FOUR), "tensor 'output.weight' occurs twice"),
    "a tensor without a name": (with_extra_tensor("", FOUR), "the name of tensor 12 is empty"),
    "a tensor's name too long": (with_extra_tensor("x" * 64, FOUR), "has 64 bytes; at most 63"),
    "no dimensions": (with_extra_tensor("x", Tensor((), b"")), "'x' has 0 dimensions"),
    "five dimensions": (with_extra_tensor("x", Tensor((1,) * 5, b"")), "'x' has 5 dimensions"),
    "a dimension of 0": (with_extra_tensor("x", Tensor((4, 0), b"")), "impossible dimensions (4, 0)"),
    "a dimension of 2^63": (with_extra_tensor("x", Tensor((HUGE,), b"")), "impossible dimensions"),
    "dimensions whose product is 2^64": (
        with_extra_tensor("x", Tensor((1 << 32, 1 << 32), b"")),
        "impossible dimensions",
    ),
    "a removed tensor type": (with_extra_tensor("x", Tensor((32,), b"", 4)), "'x' has an unknown type 4"),
    "a tensor type of 2^31": (with_extra_tensor("x", Tensor((32,), b"", 1 << 31)), "unknown type 2147483648"),
    "rows that are no whole blocks": (
        with_extra_tensor("x", Tensor((48, 2), b"", 2)),
        "not divisible by the block size 32 of its type Q4_0",
    ),
    "rows that are no whole super-blocks": (
        with_extra_tensor("x", Tensor((576, 2), b"", 12)),
        "not divisible by the block size 256 of its type Q4_K",
    ),
    "an unaligned offset": (with_tensor("output_norm.weight", offset=4), "not aligned to 32"),
    "an offset past the end": (with_tensor("output_norm.weight", offset=1 << 40), "past the end"),
    "an offset of 2^64 - 32": (with_tensor("output_norm.weight", offset=2**64 - 32), "past the end"),
    "overlapping tensors": (with_tensor("output_norm.weight", offset=0), "overlaps another tensor"),
    "a gap between tensors": (with_tensor("output_norm.weight", offset=4096), "leaves a gap"),
    "more rows than data": (with_tensor("token_embd.weight", dims=(32, 1 << 20)), "past the end"),
}


@pytest.mark.parametrize("name", STRUCTURAL_FAULTS)
def test_a_fault_in_the_structure_is_refused_in_one_line(path: Path, name: str):
    content, fault = STRUCTURAL_FAULTS[name]
    assert fault in refused(read_gguf, write_gguf(path, content))


@pytest.mark.parametrize("name", STRUCTURAL_FAULTS)
def test_a_hostile_file_takes_no_more_memory_than_a_sound_one(path: Path, name: str):
    write_gguf(path, STRUCTURAL_FAULTS[name][0])
    tracemalloc.start()
    try:
        refused(read_gguf, path)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 1 << 20  # the files have 40 kB; a count that was believed would ask for gigabytes


def test_a_file_cut_at_any_boundary_of_its_structure_is_refused(path: Path):
    file = tiny_llama()
    content = file.build()
    data_start = len(content) - len(file.parts()[-1])
    ends = list(accumulate(len(part) for part in file.parts()))
    last_byte_of_data = len(content.rstrip(b"\0"))
    cuts = {end + shift for end in ends for shift in (-1, 0, 1)} | set(
        range(data_start, last_byte_of_data, 997)
    )
    for cut in sorted(cut for cut in cuts if cut < last_byte_of_data):
        message = refused(read_gguf, write_gguf(path, content[:cut]))
        assert "truncated" in message or "more than it can hold" in message or cut < 4


def test_a_changed_byte_anywhere_in_the_header_is_read_or_refused(path: Path):
    content = tiny_llama().build()
    header_bytes = len(content) - len(tiny_llama().parts()[-1])
    changes = np.random.default_rng(0).integers(1, 256, header_bytes)
    for position in range(header_bytes):
        changed = bytearray(content)
        changed[position] ^= int(changes[position])
        write_gguf(path, bytes(changed))
        try:
            read_model(path)
        except UserError as error:
            assert str(error).isprintable()


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_random_damage_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject):
    content = bytearray(tiny_llama().build())
    for _ in range(data.draw(st.integers(1, 6))):
        position = data.draw(st.integers(0, 2000))
        piece = data.draw(st.binary(min_size=1, max_size=9))
        content[position : position + data.draw(st.integers(0, 9))] = piece
    path = write_gguf(tmp_path_factory.getbasetemp() / "damaged.gguf", bytes(content))
    try:
        check_model(read_gguf(path))
    except UserError as error:
        assert str(error).isprintable()


def sparse(path: Path, head: bytes, size: int) -> Path:
    with path.open("wb") as file:
        file.write(head)
        file.truncate(size)
    return path


@pytest.mark.parametrize(
    ("value", "fault"),
    [
        (struct.pack("<IIQ", ARRAY, STRING, 1 << 30), "strings in its header"),
        (struct.pack("<IIQ", ARRAY, U64, 1 << 29), "its header is larger than"),
        (struct.pack("<IQ", STRING, 1 << 32), "has 4294967296 bytes"),
    ],
)
def test_a_large_file_cannot_back_a_large_count(path: Path, value: bytes, fault: str):
    """The counts agree with the file's size: it is a sparse file of 16 GB."""
    head = b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + text("x") + value
    tracemalloc.start()
    try:
        assert fault in refused(read_gguf, sparse(path, head, 16 << 30))
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_large_vocabulary_is_read(path: Path):
    """128k tokens and 280k merges, as Llama 3 has."""
    tokens = [f"token{i}" for i in range(128_256)]
    merges = [f"m{i} n" for i in range(280_147)]
    keys = [
        ("tokenizer.ggml.tokens", array(STRING, tokens)),
        ("tokenizer.ggml.merges", array(STRING, merges)),
    ]
    file = read_gguf(write_gguf(path, Gguf(keys)))
    assert file.metadata["tokenizer.ggml.tokens"][128_255] == "token128255"
    assert file.metadata["tokenizer.ggml.merges"][-1] == "m280146 n"
