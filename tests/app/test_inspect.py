"""What `inspect` says about each kind of file."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import gguf
import numpy as np
import pytest
from conftest import TinyModel
from conversions import conversion, refusal
from gguf_bytes import F32, I32, STRING, U32, Gguf, Tensor, array, scalar, tiny_llama
from rich.console import Console
from texts import write_jsonl

from ggml_diffusion.app.inspect import Description, describe_file
from ggml_diffusion.errors import UserError
from ggml_diffusion.formats.adapter_file import load_adapter
from ggml_diffusion.formats.model_check import read_model
from ggml_diffusion.text.kept_tokens import Reading
from ggml_diffusion.text.loader import TextDataLoader
from ggml_diffusion.text.tokenizer import Tokenizer


def rows(description: Description) -> dict[str, dict[str, str]]:
    """The description as nested dicts; every text in it must be one printable line."""
    for section in description.sections:
        for pair in section.rows:
            assert all(text.isprintable() for text in pair)
    return {section.title: dict(section.rows) for section in description.sections}


@pytest.fixture
def model_path(tmp_path: Path) -> Path:
    path = tmp_path / "model.gguf"
    path.write_bytes(tiny_llama().build())
    return path


def test_a_key_with_a_control_character_is_shown_without_it(model_path: Path):
    model_path.write_bytes(tiny_llama().set("tokenizer.ggml.\x10adding_token_id", scalar(U32, 3)).build())
    assert "?adding" in rows(describe_file(model_path))["Tokenizer"]


def test_a_model_is_described_with_sizes_types_and_tokenizer(model_path: Path):
    description = describe_file(model_path)
    assert description.kind == "GGUF model"
    said = rows(description)
    assert said["File"]["architecture"] == "llama"
    assert said["Sizes"]["L  layers"] == "1"
    assert said["Sizes"]["F  feed-forward size"] == "64"
    assert said["Sizes"]["V  vocabulary"] == "12"
    assert said["Sizes"]["context length"] == "64"
    assert said["Sizes"]["output matrix"] == "its own"
    # embedding, head, 2 attention matrices of 32 x 32 and 2 of 16 x 32, 3 of 64 x 32, 3 norms
    n_weights = 2 * 12 * 32 + 2 * 32 * 32 + 2 * 16 * 32 + 3 * 64 * 32 + 3 * 32
    assert said["Tensors"] == {
        "all": f"12 tensors, {n_weights:,} weights",
        "F32": f"12 tensors, {n_weights * 4:,} bytes",
    }
    assert said["Tokenizer"]["kind"] == "gpt2, pre-tokenizer default"
    assert said["Tokenizer"]["tokens"] == "12"
    assert said["Tokenizer"]["eos"] == "10  '<end>'"
    assert said["Tokenizer"]["mask token"] == "11  the unused token ''"
    assert said["Conversion"]["possible"].startswith("yes")


def test_types_without_own_kernels_are_said_to_be_slower(tiny_model: TinyModel):
    path = tiny_model(type="IQ4_NL", overrides={"attn_q": "NVFP4"}, C=64, F=64, L=1)
    said = rows(describe_file(path))["Tensors"]
    # the query matrix: 64 rows of one block of 36 bytes
    assert said["NVFP4"] == "1 tensor, 2,304 bytes, unpacked through ggml, slower"
    assert "slower" not in said["IQ4_NL"] + said["F32"]


def test_smollm2_is_described_with_its_mask_token(smollm2_path: Path):
    said = rows(describe_file(smollm2_path))
    assert said["Tensors"]["all"] == "272 tensors, 134,515,008 weights"
    assert list(said["Tensors"]) == ["all", "Q4_1", "Q8_0", "F32"]
    assert said["Tokenizer"]["mask token"].startswith("7  ")
    assert said["Sizes"]["output matrix"].startswith("tied")


def test_a_model_that_cannot_be_converted_is_described_with_the_reason(model_path: Path):
    model_path.write_bytes(tiny_llama().set("llama.expert_count", scalar(U32, 8)).build())
    assert rows(describe_file(model_path))["Conversion"]["possible"] == (
        "no: is a mixture of experts, in which each token takes weights of its own"
    )


def test_a_model_of_another_architecture_is_described_as_far_as_it_can_be(model_path: Path):
    keys = [("general.architecture", scalar(STRING, "mamba")), ("mamba.block_count", scalar(U32, 3))]
    model_path.write_bytes(Gguf(keys, [("x", Tensor((4,), bytes(16)))]).build())
    said = rows(describe_file(model_path))
    assert said["Sizes"] == {"L  layers": "3", "RoPE base": "10000", "RoPE scaling factor": "1"} | {
        "output matrix": "tied: the token embedding"
    }
    assert said["Tokenizer"] == {"vocabulary": "none"}
    assert (
        said["Conversion"]["possible"]
        == "no: architecture 'mamba' has recurrent layers, which cannot see what lies to their right"
    )


def test_a_vocabulary_without_a_mask_token_says_how_to_go_on(model_path: Path):
    file = tiny_llama().set("tokenizer.ggml.token_type", array(I32, [1] * 12))
    model_path.write_bytes(file.build())
    assert "set mask_token_id" in rows(describe_file(model_path))["Tokenizer"]["mask token"]


def test_hostile_text_in_a_file_is_shown_as_text(model_path: Path):
    file = tiny_llama().set("general.name", scalar(STRING, "[bold]x[/bold]\n\x1b[2J"))
    file.set("tokenizer.ggml.eos_token_id", scalar(U32, 99))
    model_path.write_bytes(file.build())
    description = describe_file(model_path)
    said = rows(description)
    assert said["Tokenizer"]["eos"] == "none: 99 is outside of the vocabulary"
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(description)
    assert "[bold]x[/bold] ?[2J" in console.export_text()


@pytest.mark.parametrize("name", ["adapter.safetensors", "adapter.gguf"])
def test_a_conversion_is_described_in_both_of_its_forms(tmp_path: Path, model_path: Path, name: str):
    base = read_model(model_path)
    checkpoint = conversion(base)
    if name.endswith("gguf"):
        checkpoint.save_gguf(tmp_path / name, base)
    else:
        checkpoint.save(tmp_path / name)
    description = describe_file(tmp_path / name)
    assert "conversion" in description.kind
    said = rows(description)
    assert said["Conversion"]["base model"] == f"Tiny é, sha256 {'ab' * 32}"
    assert said["Conversion"]["steps"] == "12"
    assert said["Conversion"]["final causal ratio"] == "0.1"
    assert said["Conversion"]["prediction"] == "shifted"
    assert said["Conversion"]["noise schedule"] == "num_timesteps 1000, type cosine"
    # Rank 3 on seven projections of (in, out): q 32+32, k 32+16, v 32+16, o 32+32, gate, up and down 96 each.
    assert said["LoRA"] == {
        "target modules": "q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj",
        "layers": "1",
        "rank R": "3",
        "alpha": "5",
        "parameters": f"{3 * (64 + 48 + 48 + 64 + 3 * 96):,}",
    }
    assert said["Also trained"] == {
        "mask_embedding": "(32,)",
        "time_embedding.weight": "(32, 6)",
        "time_embedding.bias": "(32,)",
    }
    assert said["Settings"]["training.learning_rate"] == "0.0001"


def test_a_run_is_described_with_its_conversion_and_its_text(tmp_path: Path, tiny_model: TinyModel):
    model_path = tiny_model(L=1)
    tokenizer = Tokenizer.from_gguf(model_path)
    path = write_jsonl(tmp_path / "text.jsonl", "the sand", "", "and the sea")
    run = tmp_path / "run"
    TextDataLoader(path, tokenizer, 8, 1, reading=Reading(run / "tokens", keep=True))
    description = describe_file(run)
    assert description.kind == "run" and [section.title for section in description.sections] == ["Text"]
    said = rows(description)["Text"]
    assert said["files"] == str(path)
    assert said["documents"] == "3, 1 of them without text"
    n_tokens = len(tokenizer.encode("the sand")) + len(tokenizer.encode("and the sea")) + 2
    assert said["tokens"] == f"{n_tokens}, 2 bytes each"
    conversion(read_model(model_path)).save(run / "adapter.safetensors")
    assert {"Conversion", "Text"} <= rows(describe_file(run)).keys()
    assert "holds no conversion" in refusal(lambda: describe_file(tmp_path))


def foreign_lora(path: Path, pair: dict[str, Tensor], changes: Mapping[str, bytes] | None = None) -> Path:
    """A LoRA adapter of another program for attn_k of the first layer, with other values of keys."""
    file = tiny_llama()
    file.keys = [
        ("general.architecture", scalar(STRING, "llama")),
        ("general.type", scalar(STRING, "adapter")),
        ("adapter.type", scalar(STRING, "lora")),
        ("adapter.lora.alpha", scalar(F32, 16)),
    ]
    file.tensors = [(f"blk.0.attn_k.weight.{half}", tensor) for half, tensor in pair.items()]
    for key, value in (changes or {}).items():
        file.set(key, value)
    path.write_bytes(file.build())
    return path


def float_tensor(values: np.ndarray) -> Tensor:
    return Tensor(values.shape[::-1], values.astype(np.float32).tobytes())


OTHER_TYPES = {
    "array of numbers": array(I32, [1, 2, 3]),
    "array of strings": array(STRING, ["a", "b"]),
    "empty array": array(I32, []),
    "number": scalar(F32, 1.5),
    "text": scalar(STRING, "x"),
}
ADAPTER_KEYS = ("general.architecture", "general.type", "adapter.type", "adapter.lora.alpha")


@pytest.mark.parametrize("other", OTHER_TYPES)
def test_a_key_of_any_other_type_is_described_or_refused(model_path: Path, tmp_path: Path, other: str):
    for key in [key for key, _ in tiny_llama().keys] + ["tokenizer.ggml.bos_token_id", "general.type"]:
        model_path.write_bytes(tiny_llama().set(str(key), OTHER_TYPES[other]).build())
        described_or_refused(model_path)
    pair = {"lora_a": float_tensor(np.ones((2, 32))), "lora_b": float_tensor(np.ones((16, 2)))}
    for key in ADAPTER_KEYS:
        described_or_refused(foreign_lora(tmp_path / "lora.gguf", pair, {key: OTHER_TYPES[other]}))


def described_or_refused(path: Path) -> None:
    """Any other exception is a traceback on somebody's screen."""
    for action in (describe_file, read_model, load_adapter):
        with suppress(UserError):
            action(path)


def test_a_lora_of_another_program_is_described(tmp_path: Path):
    pair = {"lora_a": float_tensor(np.ones((2, 32))), "lora_b": float_tensor(np.ones((16, 2)))}
    description = describe_file(foreign_lora(tmp_path / "lora.gguf", pair))
    assert description.kind == "GGUF LoRA adapter"
    assert rows(description)["LoRA"] == {
        "target modules": "k_proj",
        "layers": "1",
        "rank R": "2",
        "alpha": "16",
        "parameters": "96",
        "can be applied": "yes, to its base model; it cannot denoise, since it has no mask",
    }


@pytest.mark.parametrize("type_name", ["Q8_0", "Q4_0", "F16"])
def test_a_lora_of_other_types_is_read_as_float32(tmp_path: Path, type_name: str):
    kind = gguf.GGMLQuantizationType[type_name]
    values = np.random.default_rng(0).standard_normal((2, 32)).astype(np.float32)
    packed = gguf.quants.quantize(values, kind)
    pair = {
        "lora_a": Tensor((32, 2), packed.tobytes(), int(kind)),
        "lora_b": float_tensor(np.ones((16, 2))),
    }
    path = foreign_lora(tmp_path / "lora.gguf", pair)
    said = rows(describe_file(path))
    assert said["LoRA"]["can be applied"].startswith("yes")
    assert said["Tensors"][type_name].startswith("1 tensor")
    read = load_adapter(path).tensors["blk.0.attn_k.weight.lora_a"]
    assert np.array_equal(read, gguf.quants.dequantize(packed, kind))
    assert np.abs(read - values).max() < {"Q8_0": 0.02, "Q4_0": 0.4, "F16": 2e-3}[type_name]


def test_a_lora_that_cannot_be_applied_is_described_with_the_reason(tmp_path: Path):
    pair = {"lora_a": Tensor((32, 2), bytes(64), 24), "lora_b": float_tensor(np.ones((16, 2)))}
    said = rows(describe_file(foreign_lora(tmp_path / "lora.gguf", pair)))
    assert said["LoRA"]["can be applied"].startswith(
        "no: tensor 'blk.0.attn_k.weight.lora_a' has type I8, which is not supported in adapters"
    )
    assert said["Tensors"]["all"].startswith("2 tensors")
    alone = {"lora_b": float_tensor(np.ones((16, 2)))}
    said = rows(describe_file(foreign_lora(tmp_path / "lora.gguf", alone)))
    assert said["LoRA"]["can be applied"].startswith("no: ")


def test_what_cannot_be_read_is_refused(tmp_path: Path):
    assert refusal(lambda: describe_file(tmp_path / "none")).endswith("no such file")
    (tmp_path / "text").write_text("hello")
    assert "not a safetensors file" in refusal(lambda: describe_file(tmp_path / "text"))
