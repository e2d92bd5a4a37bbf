"""Models as GGUF files: what is read of them, and which are refused."""

from __future__ import annotations

import hashlib
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from conversions import refused
from gguf_bytes import (
    BOOL,
    F32,
    F64,
    I32,
    SIZES,
    STRING,
    U32,
    U64,
    Gguf,
    Tensor,
    array,
    scalar,
    tiny_llama,
    with_extra_tensor,
    with_key,
    with_tensor,
    write_gguf,
)

from ggml_diffusion.errors import UserError
from ggml_diffusion.formats.model_check import read_model
from ggml_diffusion.formats.model_file import file_sha256, read_gguf


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "model.gguf"


def test_a_model_is_read_with_its_sizes(path: Path):
    model = read_model(write_gguf(path, tiny_llama()))
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
    assert read_model(write_gguf(path, file)).version == 2


def test_a_model_without_output_weight_has_a_tied_head(path: Path):
    assert read_model(write_gguf(path, tiny_llama(tied=True))).tied_head


def test_defaults_are_those_of_llama_cpp(path: Path):
    file = tiny_llama()
    for key in ("llama.attention.head_count_kv", "llama.rope.freq_base", "llama.rope.dimension_count"):
        file.drop(key)
    for name in ("blk.0.attn_k.weight", "blk.0.attn_v.weight"):
        file.tensor(name).dims = (32, 32)
        file.tensor(name).data *= 2
    model = read_model(write_gguf(path, file))
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
    assert read_model(write_gguf(path, file)).D == 4


def test_frequency_factors_of_the_rotary_embedding_are_known(path: Path):
    file = tiny_llama()
    file.tensors.append(("rope_freqs.weight", Tensor((4,), np.ones(4, "<f4").tobytes())))
    assert "rope_freqs.weight" in read_model(write_gguf(path, file)).tensors


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
    assert read_model(write_gguf(path, file)).rope_scaling_factor == factor


def test_smollm2_is_read_and_convertible(smollm2_path: Path):
    model = read_model(smollm2_path)
    sizes = {letter: getattr(model, letter) for letter in SIZES}
    assert sizes == {"L": 30, "C": 576, "H": 9, "G": 3, "D": 64, "F": 1536, "V": 49152}
    assert model.tied_head
    assert model.rope_freq_base == 1e5
    assert {info.type_name for info in model.tensors.values()} == {"F32", "Q4_1", "Q8_0"}


def test_the_sha256_of_a_file_is_that_of_its_bytes(path: Path):
    content = tiny_llama().build() * 200
    assert file_sha256(write_gguf(path, content)) == hashlib.sha256(content).hexdigest()


def sentencepiece(scores: list[object], type_id: int = F32) -> Gguf:
    """A model with a SentencePiece vocabulary: 32 padding tokens and 256 bytes."""
    file = tiny_llama().drop("tokenizer.ggml.merges")
    n_tokens, width = len(scores), SIZES["C"]
    names = [
        *(f"<{number}>" for number in range(n_tokens - 256)),
        *(f"<0x{byte:02X}>" for byte in range(256)),
    ]
    for key, value in {
        "model": scalar(STRING, "llama"),
        "tokens": array(STRING, [*names]),
        "token_type": array(I32, [5] * (n_tokens - 256) + [6] * 256),
        "scores": array(type_id, scores),
    }.items():
        file.set(f"tokenizer.ggml.{key}", value)
    for name in ("token_embd.weight", "output.weight"):
        file.tensor(name).dims, file.tensor(name).data = (width, n_tokens), bytes(4 * width * n_tokens)
    return file


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("llama.attention.sliding_window", scalar(U32, 2**32 - 1)),
        ("llama.attention.sliding_window", array(U32, [4, 8])),
        ("llama.rope.freq_base_swa", scalar(F32, 0)),
        ("llama.rope.scaling.original_context_length", scalar(U32, 0)),
        ("llama.attention.scale", scalar(STRING, "none")),
        ("tokenizer.ggml.padding_token_id", scalar(U32, 2**32 - 1)),
        ("llama.attention.head_count_kv", array(I32, [2])),
    ],
)
def test_what_is_not_needed_to_compute_is_not_judged(path: Path, key: str, value: bytes):
    assert read_model(write_gguf(path, with_key(key, value))).G == 2


MODEL_FAULTS: dict[str, tuple[Gguf, str]] = {
    "an adapter": (with_key("general.type", scalar(STRING, "adapter")), "holds an 'adapter', not a model"),
    "no architecture": (tiny_llama().drop("general.architecture"), "'general.architecture' is missing"),
    "an architecture that is a number": (with_key("general.architecture", scalar(U32, 1)), "expected str"),
    "another architecture": (
        with_key("general.architecture", scalar(STRING, "mamba")),
        "architecture 'mamba' has recurrent layers",
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
        with_key("llama.attention.head_count_kv", array(U32, [2, 4])).set(
            "llama.block_count", scalar(U32, 2)
        ),
        "'llama.attention.head_count_kv' differs from layer to layer",
    ),
    "heads of other layers": (
        with_key("llama.attention.head_count_kv", array(U32, [2, 2])),
        "is no list of 1 whole numbers",
    ),
    "heads as fractions": (
        with_key("llama.attention.head_count_kv", array(F32, [2.0])),
        "is no list of 1 whole numbers",
    ),
    "layers as a list": (
        with_key("llama.block_count", array(U32, [1])),
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
    "other value heads": (
        with_key("llama.attention.value_length", scalar(U32, 4)),
        "value_length') are not of the keys' size, 8",
    ),
    "a rotation of half a head": (
        with_key("llama.rope.dimension_count", scalar(U32, 4)),
        "llama.cpp loads no llama model with RoPE on 4 of 8 elements",
    ),
    "layers that may be negative": (
        with_key("llama.block_count", scalar(I32, 1)),
        "'llama.block_count' is of type i32, expected u32",
    ),
    "an epsilon of 64 bits": (
        with_key("llama.attention.layer_norm_rms_epsilon", scalar(F64, 1e-5)),
        "is of type f64, expected f32",
    ),
    "experts of an unknown kind": (
        with_key("general.architecture", scalar(STRING, "dbrx")).set("dbrx.expert_count", scalar(U32, 16)),
        "is a mixture of experts",
    ),
    "a rotation of pairs and a half": (
        with_key("llama.rope.dimension_count", scalar(U32, 5)),
        "RoPE cannot turn 5 elements of a head of 8",
    ),
    "a rotation beyond the head": (
        with_key("llama.rope.dimension_count", scalar(U32, 10)),
        "RoPE cannot turn 10 elements of a head of 8",
    ),
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
        "expected f32",
    ),
    "a scaling of another kind": (
        with_key("llama.rope.scaling.type", scalar(STRING, "dynamic")),
        "RoPE scaling 'dynamic' is not supported",
    ),
    "a negative rope factor": (with_key("llama.rope.scaling.factor", scalar(F32, -2)), "not possible"),
    "experts": (with_key("llama.expert_count", scalar(U32, 8)), "is a mixture of experts"),
    "a bidirectional model": (
        with_key("llama.attention.causal", scalar(BOOL, False)),
        "'llama.attention.causal' is False; only True",
    ),
    "no context length": (tiny_llama().drop("llama.context_length"), "context_length' is missing"),
    "no embedding": (tiny_llama().drop("token_embd.weight"), "'token_embd.weight' is missing"),
    "no norm": (tiny_llama().drop("blk.0.ffn_norm.weight"), "'blk.0.ffn_norm.weight' is missing"),
    "a bias": (
        with_extra_tensor("output.bias", Tensor((12,), bytes(48))),
        "'output.bias' is not part of a supported 'llama' model",
    ),
    "a shape of other sizes": (
        with_tensor("blk.0.attn_k.weight", dims=(16, 32)),
        "'blk.0.attn_k.weight' has shape (32, 16); the model's sizes ask for (16, 32)",
    ),
    "an unsupported type": (
        with_tensor("blk.0.ffn_up.weight", type_id=26, data=bytes(64 * 32 * 4)),
        "'blk.0.ffn_up.weight' has type I32, which is not supported; supported: F32, F16, BF16, Q8_0",
    ),
    "a norm in half precision": (
        with_tensor("blk.0.ffn_norm.weight", type_id=1, data=bytes(64)),
        "only F32 is supported for vectors",
    ),
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
    "another tokenizer": (
        with_key("tokenizer.ggml.model", scalar(STRING, "tiktoken")),
        "tokenizer 'tiktoken'",
    ),
    "a tokenizer that is not safe": (
        with_key("tokenizer.ggml.model", scalar(STRING, "rwkv")),
        "tokenizer 'rwkv' is not supported: llama.cpp does not come to an end",
    ),
    "a pre-tokenizer that is not safe": (
        with_key("tokenizer.ggml.pre", scalar(STRING, "whitespace")),
        "pre-tokenizer 'whitespace' is not supported: llama.cpp aborts",
    ),
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
    "scores of NaN": (sentencepiece([float("nan")] * 288), "'tokenizer.ggml.scores' holds NaN"),
    "an id of another type": (
        with_key("tokenizer.ggml.eos_token_id", scalar(I32, 1)),
        "'tokenizer.ggml.eos_token_id' is of type i32, expected u32",
    ),
}


@pytest.mark.parametrize("name", MODEL_FAULTS)
def test_a_model_that_cannot_be_computed_is_refused_in_one_line(path: Path, name: str):
    content, fault = MODEL_FAULTS[name]
    assert fault in refused(read_model, write_gguf(path, content))


@pytest.mark.parametrize("name", MODEL_FAULTS)
def test_a_model_that_cannot_be_computed_can_still_be_looked_into(path: Path, name: str):
    assert read_gguf(write_gguf(path, MODEL_FAULTS[name][0])).tensors


TOLERATED: dict[str, Gguf] = {
    "another vocabulary size": with_key("llama.vocab_size", scalar(U32, 13)),
    "scores of a kind that has none": with_key("tokenizer.ggml.scores", array(F32, [float("nan")] * 12)),
    "scores as whole numbers": sentencepiece([-1] * 288, I32),
    "more types than tokens": with_key("tokenizer.ggml.token_type", array(I32, [1] * 10 + [3, 5, 1])),
    "an end token past the vocabulary": with_key("tokenizer.ggml.eos_token_id", scalar(U32, 12)),
    "a mask token past the vocabulary": with_key("tokenizer.ggml.mask_token_id", scalar(U32, 2**32 - 1)),
    "an id that nobody reads": with_key("tokenizer.ggml.cls_token_id", scalar(STRING, "a")),
}


@pytest.mark.parametrize("name", TOLERATED)
def test_what_llama_cpp_does_not_read_of_a_vocabulary_is_not_judged(path: Path, name: str):
    write_gguf(path, TOLERATED[name])
    assert read_model(path).V
    assert llama_cpp.Llama(str(path), vocab_only=True, verbose=False).n_vocab() == read_model(path).V


def test_a_model_without_a_vocabulary_can_be_computed(path: Path):
    file = tiny_llama()
    for key, _ in list(file.keys):
        if str(key).startswith("tokenizer."):
            file.drop(str(key))
    assert read_model(write_gguf(path, file)).V == 12


def test_a_missing_file_a_folder_and_an_impossible_path_are_refused(tmp_path: Path):
    assert refused(read_gguf, tmp_path / "none.gguf") == "no such file"
    assert refused(read_gguf, tmp_path) == "a folder, not a file"
    with pytest.raises(UserError, match="cannot be read"):
        read_gguf("x\0y.gguf")
    with pytest.raises(UserError, match="a device, not a file"):
        read_gguf("/dev/zero")
    with pytest.raises(UserError, match="no such file"):
        file_sha256(tmp_path / "none.gguf")
