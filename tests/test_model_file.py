"""GGUF files, sound and hostile: what is read, and that every fault is one clear line."""

from __future__ import annotations

import hashlib
import struct
import tracemalloc
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_bytes import (
    ARRAY,
    BOOL,
    F32,
    F64,
    I32,
    SIZES,
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
)
from hypothesis import given, settings
from hypothesis import strategies as st

from ggml_diffusion import gguf_reader
from ggml_diffusion.errors import UserError
from ggml_diffusion.model_file import (
    SUPPORTED_TYPES,
    ModelFile,
    check_model,
    file_sha256,
    read_gguf,
    read_model,
)

Reader = Callable[[Path], ModelFile]


def write(path: Path, content: Gguf | bytes) -> Path:
    path.write_bytes(content.build() if isinstance(content, Gguf) else content)
    return path


def refusal(reader: Reader, path: Path) -> str:
    """The message with which a file is refused; it must be one printable line that names the file."""
    with pytest.raises(UserError) as caught:
        reader(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert message.isprintable()
    return message.removeprefix(f"{path}: ")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def test_a_model_is_read_with_its_sizes(path: Path):
    model = read_model(write(path, tiny_llama()))
    assert {letter: getattr(model, letter) for letter in SIZES} == SIZES
    assert model.arch == "llama"
    assert model.version == 3
    assert model.context_length == 64
    assert model.rope_freq_base == 5000.0
    assert model.rms_eps == np.float32(1e-5)
    assert model.rope_scaling_factor == 1.0
    assert not model.tied_head


def test_version_2_is_read_as_well(path: Path):
    file = tiny_llama()
    file.version = 2
    assert read_model(write(path, file)).version == 2


def test_a_model_without_output_weight_has_a_tied_head(path: Path):
    assert read_model(write(path, tiny_llama(tied=True))).tied_head


def test_defaults_are_those_of_llama_cpp(path: Path):
    file = tiny_llama()
    for key in ("llama.attention.head_count_kv", "llama.rope.freq_base", "llama.rope.dimension_count"):
        file.drop(key)
    for name in ("blk.0.attn_k.weight", "blk.0.attn_v.weight"):
        file.tensor(name).dims = (32, 32)
        file.tensor(name).data *= 2
    model = read_model(write(path, file))
    assert (model.G, model.D, model.rope_freq_base) == (4, 8, 10000.0)


def test_a_head_size_of_its_own_is_read(path: Path):
    file = tiny_llama()
    for key in ("llama.attention.key_length", "llama.attention.value_length", "llama.rope.dimension_count"):
        file.set(key, scalar(U32, 4))
    for name, dims in {
        "attn_q": (32, 16),
        "attn_k": (32, 8),
        "attn_v": (32, 8),
        "attn_output": (16, 32),
    }.items():
        tensor = file.tensor(f"blk.0.{name}.weight")
        tensor.dims, tensor.data = dims, tensor.data[: dims[0] * dims[1] * 4]
    assert read_model(write(path, file)).D == 4


def test_frequency_factors_of_the_rotary_embedding_are_known(path: Path):
    file = tiny_llama()
    file.tensors.append(("rope_freqs.weight", Tensor((4,), np.ones(4, "<f4").tobytes())))
    assert "rope_freqs.weight" in read_model(write(path, file)).tensors


@pytest.mark.parametrize(
    ("keys", "factor"),
    [
        ({}, 1.0),
        ({"scaling.factor": 4.0}, 4.0),
        ({"scale_linear": 2.0}, 2.0),
        ({"scaling.type": "none", "scaling.factor": 4.0}, 1.0),
        ({"scaling.type": "linear", "scaling.factor": 0.0}, 1.0),
    ],
)
def test_linear_rope_scaling_is_read_as_llama_cpp_reads_it(
    path: Path, keys: dict[str, str | float], factor: float
):
    file = tiny_llama()
    for key, value in keys.items():
        file.set(f"llama.rope.{key}", scalar(STRING if isinstance(value, str) else F32, value))
    assert read_model(write(path, file)).rope_scaling_factor == factor


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
    file = read_gguf(write(path, Gguf(keys)))
    for type_id, value in values.items():
        assert file.metadata[f"k{type_id}"] == value
        assert list(file.metadata[f"a{type_id}"]) == [value] * 3
        assert file.key_types[f"k{type_id}"] == names[type_id]
        assert file.key_types[f"a{type_id}"] == f"arr[{names[type_id]}]"


def test_arrays_of_strings_are_decoded_on_demand(path: Path):
    tokens = read_gguf(write(path, tiny_llama())).metadata["tokenizer.ggml.tokens"]
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


def test_smollm2_is_read_and_convertible(smollm2_path: Path):
    model = read_model(smollm2_path)
    sizes = {letter: getattr(model, letter) for letter in SIZES}
    assert sizes == {"L": 30, "C": 576, "H": 9, "G": 3, "D": 64, "F": 1536, "V": 49152}
    assert model.tied_head
    assert model.rope_freq_base == 1e5
    assert {info.type_name for info in model.tensors.values()} == {"F32", "Q4_1", "Q8_0"}


def test_every_supported_type_is_accepted_and_named_as_ggml_does(path: Path):
    for name in SUPPORTED_TYPES:
        type_id = gguf.GGMLQuantizationType[name]
        block, n_bytes = gguf.GGML_QUANT_SIZES[type_id]
        file = Gguf([], [("x", Tensor((block * 2, 3), b"\0" * n_bytes * 6, int(type_id)))])
        info = read_gguf(write(path, file)).tensors["x"]
        assert (info.type_name, info.shape, info.n_bytes) == (name, (3, block * 2), n_bytes * 6)


def test_the_sha256_of_a_file_is_that_of_its_bytes(path: Path):
    content = tiny_llama().build() * 200
    assert file_sha256(write(path, content)) == hashlib.sha256(content).hexdigest()


def with_key(key: str, value: bytes) -> Gguf:
    return tiny_llama().set(key, value)


def with_tensor(name: str, **fields: object) -> Gguf:
    file = tiny_llama()
    for field, value in fields.items():
        setattr(file.tensor(name), field, value)
    return file


def with_fields(**fields: object) -> Gguf:
    file = tiny_llama()
    for field, value in fields.items():
        setattr(file, field, value)
    return file


def with_extra_tensor(name: str, tensor: Tensor) -> Gguf:
    file = tiny_llama()
    file.tensors.append((name, tensor))
    return file


def with_extra_key(key: str | bytes, value: bytes) -> Gguf:
    file = tiny_llama()
    file.keys.append((key, value))
    return file


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
    assert fault in refusal(read_gguf, write(path, content))


@pytest.mark.parametrize("name", STRUCTURAL_FAULTS)
def test_a_hostile_file_takes_no_more_memory_than_a_sound_one(path: Path, name: str):
    write(path, STRUCTURAL_FAULTS[name][0])
    tracemalloc.start()
    try:
        refusal(read_gguf, path)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 1 << 20  # the files have 40 kB; a count that was believed would ask for gigabytes


MODEL_FAULTS: dict[str, tuple[Gguf, str]] = {
    "an adapter": (with_key("general.type", scalar(STRING, "adapter")), "holds an 'adapter', not a model"),
    "a part of a split": (with_key("split.count", scalar(U16, 3)), "one part of a split model"),
    "no architecture": (tiny_llama().drop("general.architecture"), "'general.architecture' is missing"),
    "an architecture that is a number": (with_key("general.architecture", scalar(U32, 1)), "expected str"),
    "another architecture": (
        with_key("general.architecture", scalar(STRING, "mamba")),
        "architecture 'mamba' is not supported; supported: llama",
    ),
    "no layers": (with_key("llama.block_count", scalar(U32, 0)), "'llama.block_count' is 0"),
    "10^9 layers": (with_key("llama.block_count", scalar(U32, 10**9)), "at most 512 layers"),
    "a layer too many": (
        with_key("llama.block_count", scalar(U32, 2)),
        "'blk.1.attn_norm.weight' is missing",
    ),
    "layers as text": (with_key("llama.block_count", scalar(STRING, "1")), "is of type str, expected int"),
    "layers as a truth value": (with_key("llama.block_count", scalar(BOOL, True)), "type bool, expected int"),
    "layers as a fraction": (with_key("llama.block_count", scalar(F32, 1.0)), "type f32, expected int"),
    "layers of 64 bits": (with_key("llama.block_count", scalar(U64, 1 << 63)), "not possible"),
    "no heads": (with_key("llama.attention.head_count", scalar(U32, 0)), "head_count' is 0"),
    "no key heads": (with_key("llama.attention.head_count_kv", scalar(U32, 0)), "head_count_kv' is 0"),
    "heads that differ by layer": (
        with_key("llama.attention.head_count_kv", array(U32, [2])),
        "is of type arr[u32], expected int",
    ),
    "heads that cannot share": (
        with_key("llama.attention.head_count_kv", scalar(U32, 3)),
        "4 query heads cannot share 3 key/value heads",
    ),
    "heads that do not divide": (
        with_key("llama.attention.head_count", scalar(U32, 6)),
        "hidden size 32 is not divisible by its 6 heads",
    ),
    "other value heads": (with_key("llama.attention.value_length", scalar(U32, 4)), "value_length' is 4"),
    "a partial rotation": (with_key("llama.rope.dimension_count", scalar(U32, 4)), "dimension_count' is 4"),
    "an epsilon of NaN": (
        with_key("llama.attention.layer_norm_rms_epsilon", scalar(F32, float("nan"))),
        "is nan, not a finite number",
    ),
    "an epsilon of 0": (with_key("llama.attention.layer_norm_rms_epsilon", scalar(F32, 0)), "not possible"),
    "a rope base of infinity": (
        with_key("llama.rope.freq_base", scalar(F32, float("inf"))),
        "is inf, not a finite number",
    ),
    "a rope base of 0": (with_key("llama.rope.freq_base", scalar(F32, 0)), "freq_base' is 0.0"),
    "a rope base of 64 bits of text": (
        with_key("llama.rope.freq_base", scalar(STRING, "1")),
        "expected float",
    ),
    "yarn": (
        with_key("llama.rope.scaling.type", scalar(STRING, "yarn")),
        "RoPE scaling 'yarn' is not supported",
    ),
    "a negative rope factor": (with_key("llama.rope.scaling.factor", scalar(F32, -2)), "not possible"),
    "experts": (with_key("llama.expert_count", scalar(U32, 8)), "'llama.expert_count' is 8; only 0"),
    "a bidirectional model": (
        with_key("llama.attention.causal", scalar(BOOL, False)),
        "'llama.attention.causal' is False; only True",
    ),
    "no context length": (tiny_llama().drop("llama.context_length"), "context_length' is missing"),
    "no embedding": (tiny_llama().drop("token_embd.weight"), "'token_embd.weight' is missing"),
    "no norm": (tiny_llama().drop("blk.0.ffn_norm.weight"), "'blk.0.ffn_norm.weight' is missing"),
    "a bias": (
        with_extra_tensor("blk.0.attn_q.bias", Tensor((32,), bytes(128))),
        "'blk.0.attn_q.bias' is not part of a supported 'llama' model",
    ),
    "a shape of other sizes": (
        with_tensor("blk.0.attn_k.weight", dims=(16, 32)),
        "'blk.0.attn_k.weight' has shape (32, 16); the model's sizes ask for (16, 32)",
    ),
    "an unsupported type": (
        with_tensor("blk.0.ffn_up.weight", type_id=20, data=bytes(64 * 18)),
        "'blk.0.ffn_up.weight' has type IQ4_NL, which is not supported; supported: F32, F16, BF16, Q8_0",
    ),
    "a norm in half precision": (
        with_tensor("blk.0.ffn_norm.weight", type_id=1, data=bytes(64)),
        "only F32 is supported for vectors",
    ),
    "another vocabulary size": (with_key("llama.vocab_size", scalar(U32, 13)), "the embedding has 12 rows"),
    "too few tokens": (
        with_key("tokenizer.ggml.tokens", array(STRING, ["a"])),
        "its vocabulary has 1 tokens, but the token embedding has 12 rows",
    ),
    "tokens that are numbers": (with_key("tokenizer.ggml.tokens", array(U32, [1] * 12)), "array of strings"),
    "a token twice": (with_key("tokenizer.ggml.tokens", array(STRING, ["a"] * 12)), "the same token twice"),
    "a token like the name llama.cpp gives an empty one": (
        with_key("tokenizer.ggml.tokens", array(STRING, [*"abcdefghij", "[EMPTY_11]", ""])),
        "the same token twice",
    ),
    "another tokenizer": (with_key("tokenizer.ggml.model", scalar(STRING, "rwkv")), "tokenizer 'rwkv'"),
    "no kind of tokenizer": (tiny_llama().drop("tokenizer.ggml.model"), "'tokenizer.ggml.model' is missing"),
    "no merges": (tiny_llama().drop("tokenizer.ggml.merges"), "'tokenizer.ggml.merges' is missing"),
    "sentencepiece without bytes": (
        with_key("tokenizer.ggml.model", scalar(STRING, "llama")),
        "has no token for byte 0x00",
    ),
    "too few token types": (
        with_key("tokenizer.ggml.token_type", array(I32, [1])),
        "'tokenizer.ggml.token_type' has 1 entries for 12 tokens",
    ),
    "token types as fractions": (with_key("tokenizer.ggml.token_type", array(F32, [1.0] * 12)), "arr[f32]"),
    "scores of NaN": (
        with_key("tokenizer.ggml.scores", array(F32, [float("nan")] * 12)),
        "'tokenizer.ggml.scores' holds NaN",
    ),
    "an end token past the vocabulary": (
        with_key("tokenizer.ggml.eos_token_id", scalar(U32, 12)),
        "'tokenizer.ggml.eos_token_id' is 12, outside of the vocabulary of 12 tokens",
    ),
    "a mask token past the vocabulary": (
        with_key("tokenizer.ggml.mask_token_id", scalar(U32, 2**32 - 1)),
        "outside of the vocabulary",
    ),
}


@pytest.mark.parametrize("name", MODEL_FAULTS)
def test_a_model_that_cannot_be_computed_is_refused_in_one_line(path: Path, name: str):
    content, fault = MODEL_FAULTS[name]
    assert fault in refusal(read_model, write(path, content))


@pytest.mark.parametrize("name", MODEL_FAULTS)
def test_a_model_that_cannot_be_computed_can_still_be_looked_into(path: Path, name: str):
    assert read_gguf(write(path, MODEL_FAULTS[name][0])).tensors


def test_a_model_without_a_vocabulary_can_be_computed(path: Path):
    file = tiny_llama()
    for key, _ in list(file.keys):
        if str(key).startswith("tokenizer."):
            file.drop(str(key))
    assert read_model(write(path, file)).V == 12


def test_a_missing_file_a_folder_and_an_impossible_path_are_refused(tmp_path: Path):
    assert refusal(read_gguf, tmp_path / "none.gguf") == "no such file"
    assert refusal(read_gguf, tmp_path) == "a folder, not a GGUF file"
    with pytest.raises(UserError, match="cannot be read"):
        read_gguf("x\0y.gguf")
    with pytest.raises(UserError, match="not a file"):
        read_gguf("/dev/zero")
    with pytest.raises(UserError, match="cannot be read"):
        file_sha256(tmp_path / "none.gguf")


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
        message = refusal(read_gguf, write(path, content[:cut]))
        assert "truncated" in message or "more than it can hold" in message or cut < 4


def test_a_changed_byte_anywhere_in_the_header_is_read_or_refused(path: Path):
    content = tiny_llama().build()
    header_bytes = len(content) - len(tiny_llama().parts()[-1])
    changes = np.random.default_rng(0).integers(1, 256, header_bytes)
    for position in range(header_bytes):
        changed = bytearray(content)
        changed[position] ^= int(changes[position])
        write(path, bytes(changed))
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
    path = write(tmp_path_factory.getbasetemp() / "damaged.gguf", bytes(content))
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
        assert fault in refusal(read_gguf, sparse(path, head, 16 << 30))
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
    file = read_gguf(write(path, Gguf(keys)))
    assert file.metadata["tokenizer.ggml.tokens"][128_255] == "token128255"
    assert file.metadata["tokenizer.ggml.merges"][-1] == "m280146 n"
