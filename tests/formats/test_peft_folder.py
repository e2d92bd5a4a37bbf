"""PEFT folders: Hugging Face's names, its order of rows, and what is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conversions import ALPHA, MASK_TOKEN, RANK, conversion, refusal
from safetensors.numpy import load_file, save_file

from ggml_diffusion.formats.architectures import ARCHITECTURES, Rope
from ggml_diffusion.formats.lora import LoraAdapter
from ggml_diffusion.formats.model_check import read_model
from ggml_diffusion.formats.model_file import ModelFile
from ggml_diffusion.formats.peft_folder import read_peft_folder, write_peft_folder

TinyModel = Callable[..., Path]


def written(folder: Path, adapter: LoraAdapter, base: ModelFile) -> dict[str, np.ndarray]:
    write_peft_folder(folder, adapter, base, None)
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_folder_that_is_read_again_has_the_same_bits(tmp_path: Path, tiny_model: TinyModel, arch: str):
    base = read_model(tiny_model(arch=arch))
    adapter = conversion(base).adapter()
    written(tmp_path, adapter, base)
    again = read_peft_folder(tmp_path, base)
    assert again.alpha == adapter.alpha
    assert again.tensors.keys() == adapter.tensors.keys()
    assert all(np.array_equal(again.tensors[name], adapter.tensors[name]) for name in adapter.tensors)


def rotated_by_hand(vector: np.ndarray, heads: int, position: int, kind: Rope) -> np.ndarray:
    """RoPE of queries (heads * D,), by its definition, at base 10000."""
    result = np.empty_like(vector)
    size = len(vector) // heads
    for head in range(heads):
        for pair in range(size // 2):
            first, second = (2 * pair, 2 * pair + 1) if kind is Rope.PAIRS else (pair, pair + size // 2)
            i, j = head * size + first, head * size + second
            angle = position * 10000.0 ** (-2 * pair / size)
            result[i] = vector[i] * np.cos(angle) - vector[j] * np.sin(angle)
            result[j] = vector[i] * np.sin(angle) + vector[j] * np.cos(angle)
    return result


@pytest.mark.parametrize("arch", ["llama", "qwen2"])
def test_queries_and_keys_give_the_same_scores_when_halves_turn_as_when_the_bases_pairs_do(
    tmp_path: Path, tiny_model: TinyModel, arch: str
):
    """Hugging Face turns halves in every model; a GGUF of arch llama turns neighbours. The scores are what
    has to be the same, at any two positions, of a model that is nothing but these pairs."""
    base = read_model(tiny_model(arch=arch))
    adapter = conversion(base).adapter()
    theirs = written(tmp_path, adapter, base)
    x, y = np.random.default_rng(0).standard_normal((2, base.C))
    scores = {}
    for kind in (ARCHITECTURES[arch].rope, Rope.HALVES):
        heads = {}
        for part, name, n_heads, vector, position in (
            ("attn_q", "q_proj", base.H, x, 3),
            ("attn_k", "k_proj", base.G, y, 11),
        ):
            key = f"base_model.model.model.layers.1.self_attn.{name}"
            a, b = theirs[f"{key}.lora_A.weight"], theirs[f"{key}.lora_B.weight"]
            if kind is not Rope.HALVES:
                a, b = (adapter.tensors[f"blk.1.{part}.weight.lora_{half}"] for half in "ab")
            turned = rotated_by_hand(b.astype(np.float64) @ (a @ vector), n_heads, position, kind)
            heads[part] = turned.reshape(n_heads, -1)
        keys = np.repeat(heads["attn_k"], base.H // base.G, axis=0)
        scores[kind] = (heads["attn_q"] * keys).sum(axis=1)
    np.testing.assert_allclose(scores[Rope.HALVES], scores[ARCHITECTURES[arch].rope], rtol=1e-9)


def test_only_b_of_queries_and_keys_of_bases_that_turn_neighbours_is_put_in_another_order(
    tmp_path: Path, tiny_model: TinyModel
):
    base = read_model(tiny_model(arch="llama"))
    adapter = conversion(base).adapter()
    theirs = written(tmp_path, adapter, base)
    modules = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    moved = set()
    for part, module in modules.items():
        for half in "AB":
            ours = adapter.tensors[f"blk.0.{part}.weight.lora_{half.lower()}"]
            if not np.array_equal(
                ours, theirs[f"base_model.model.model.layers.0.{module}.lora_{half}.weight"]
            ):
                moved.add((part, half))
    assert moved == {("attn_q", "B"), ("attn_k", "B")}


def test_the_config_says_what_peft_asks(tmp_path: Path, tiny_model: TinyModel):
    base = read_model(tiny_model())
    adapter = conversion(base).adapter()
    written(tmp_path, adapter, base)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["peft_type"], config["r"], config["lora_alpha"]) == ("LORA", RANK, ALPHA)
    assert config["rank_pattern"] == {}
    assert len(config["target_modules"]) == 7


def test_a_pair_of_another_rank_is_named_in_the_config(tmp_path: Path, tiny_model: TinyModel):
    base = read_model(tiny_model())
    adapter = conversion(base).adapter()
    for half, axis in (("a", 0), ("b", 1)):
        name = f"blk.1.attn_k.weight.lora_{half}"
        adapter.tensors[name] = np.ascontiguousarray(np.repeat(adapter.tensors[name], 2, axis=axis))
    written(tmp_path, adapter, base)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["rank_pattern"] == {"model.layers.1.self_attn.k_proj": 2 * RANK}


def test_phis_pairs_are_stacked_as_its_projections_lie_together(tmp_path: Path, tiny_model: TinyModel):
    base = read_model(tiny_model(arch="phi3"))
    adapter = conversion(base).adapter()
    theirs = written(tmp_path, adapter, base)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    key = "base_model.model.model.layers.0.self_attn.qkv_proj"
    a, b = theirs[f"{key}.lora_A.weight"], theirs[f"{key}.lora_B.weight"]
    rank = config["rank_pattern"].get("model.layers.0.self_attn.qkv_proj", config["r"])
    assert rank == len(a) == b.shape[1]
    parts = [
        ALPHA / RANK * adapter.tensors[f"blk.0.{part}.weight.lora_b"].astype(np.float64)
        @ adapter.tensors[f"blk.0.{part}.weight.lora_a"]
        for part in ("attn_q", "attn_k", "attn_v")
    ]  # fmt: skip
    np.testing.assert_allclose(ALPHA / rank * b.astype(np.float64) @ a, np.concatenate(parts), atol=1e-7)


def test_names_without_prefix_and_half_precision_are_read(tmp_path: Path, tiny_model: TinyModel):
    base = read_model(tiny_model(arch="qwen2"))
    adapter = conversion(base).adapter()
    theirs = written(tmp_path, adapter, base)
    short = {
        name.removeprefix("base_model.model."): array.astype(np.float16) for name, array in theirs.items()
    }
    save_file(short, tmp_path / "adapter_model.safetensors")
    again = read_peft_folder(tmp_path, base)
    for name, array in adapter.tensors.items():
        assert np.array_equal(again.tensors[name], array.astype(np.float16).astype(np.float32))


def test_bf16_is_read(tmp_path: Path, tiny_model: TinyModel):
    base = read_model(tiny_model(arch="qwen2"))
    adapter = conversion(base).adapter()
    theirs = written(tmp_path, adapter, base)
    header, data = {}, b""
    for name, array in theirs.items():
        upper = (array.view(np.uint32) >> 16).astype("<u2").tobytes()
        header[name] = {
            "dtype": "BF16",
            "shape": list(array.shape),
            "data_offsets": [len(data), len(data) + len(upper)],
        }
        data += upper
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (tmp_path / "adapter_model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    again = read_peft_folder(tmp_path, base)
    for name, array in adapter.tensors.items():
        upper = (array.view(np.uint32) >> 16 << 16).view(np.float32)
        assert np.array_equal(again.tensors[name], upper)


def change_config(folder: Path, **values: object) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"peft_type": "IA3"}, "peft_type is 'IA3'"),
        ({"use_dora": True}, "use_dora"),
        ({"use_rslora": True}, "use_rslora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern"),
        ({"lora_alpha": 0}, "lora_alpha is '0'"),
        ({"lora_alpha": "x"}, "lora_alpha is 'x'"),
    ],
)
def test_a_config_that_means_more_than_pairs_is_refused(
    tmp_path: Path, tiny_model: TinyModel, values: dict, words: str
):
    base = read_model(tiny_model())
    written(tmp_path, conversion(base).adapter(), base)
    change_config(tmp_path, **values)
    message = refusal(lambda: read_peft_folder(tmp_path, base))
    assert message.startswith(f"{tmp_path / 'adapter_config.json'}: ")
    assert words in message


PAIR = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({f"{PAIR}.lora_B.weight": None}, "has no partner"),
        ({f"{PAIR}.lora_B.weight": np.zeros((3, 3), np.float32)}, "has shape (3, 3), not (64, R)"),
        ({f"{PAIR}.lora_A.weight": np.zeros((3, 9), np.float32)}, "has shape (3, 9)"),
        ({f"{PAIR}.lora_A.weight": np.full((3, 64), np.nan, np.float32)}, "NaN"),
        ({f"{PAIR}.lora_A.weight": np.zeros((3, 64), np.int8)}, "type 'I8'"),
        ({"base_model.model.lm_head.lora_A.weight": np.zeros((3, 64), np.float32)}, "is no LoRA of a"),
        ({PAIR.replace("0", "7") + ".lora_A.weight": np.zeros((3, 64), np.float32)}, "is no LoRA of a"),
    ],
)
def test_tensors_that_do_not_fit_the_base_are_refused(
    tmp_path: Path, tiny_model: TinyModel, changes: dict, words: str
):
    base = read_model(tiny_model())
    tensors = written(tmp_path, conversion(base).adapter(), base) | changes
    kept = {name: array for name, array in tensors.items() if array is not None}
    save_file(kept, tmp_path / "adapter_model.safetensors")
    message = refusal(lambda: read_peft_folder(tmp_path, base))
    assert message.startswith(f"{tmp_path / 'adapter_model.safetensors'}: ")
    assert words in message


@pytest.mark.parametrize("content", [b"", b"GGUF", b"\xff" * 64])
def test_a_file_that_is_no_safetensors_is_one_line(tmp_path: Path, tiny_model: TinyModel, content: bytes):
    base = read_model(tiny_model())
    written(tmp_path, conversion(base).adapter(), base)
    (tmp_path / "adapter_model.safetensors").write_bytes(content)
    message = refusal(lambda: read_peft_folder(tmp_path, base))
    assert re.search("not a (valid )?safetensors file", message)


def test_mask_and_time_embeddings_are_not_in_the_pairs(tmp_path: Path, tiny_model: TinyModel):
    base = read_model(tiny_model())
    checkpoint = conversion(base)
    assert checkpoint.metadata.mask_token_id == MASK_TOKEN
    names = written(tmp_path, checkpoint.adapter(), base)
    assert all(".lora_" in name for name in names)
