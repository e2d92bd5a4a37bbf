"""A merged file in llama.cpp computes what the engine computes with base and adapter; the rest is refused."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from conversions import ALPHA, MASK_TOKEN, RANK, conversion, refusal
from llama_reference import Request, llama_logits
from make_tiny_gguf import quantise

from ggml_diffusion.engine.cpu.q4_model import Q4Model
from ggml_diffusion.engine.interface import Batch
from ggml_diffusion.export import standalone
from ggml_diffusion.export.peft import export_peft
from ggml_diffusion.export.standalone import plan_standalone, write_standalone
from ggml_diffusion.formats.adapter_file import DiffusionCheckpoint
from ggml_diffusion.formats.architectures import ARCHITECTURES, Gate
from ggml_diffusion.formats.model_check import read_model
from ggml_diffusion.formats.model_file import ModelFile, read_gguf
from ggml_diffusion.generation.reading import ReadingRule
from ggml_diffusion.training.identity import mean_kl_divergence

TWINS = {"llama": "llada", "qwen2": "dream", "qwen3": "rnd1"}
# The prompt and nothing else, whatever template the base had.
PLAIN_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
TinyModel = Callable[..., Path]


def bidirectional(base: ModelFile, *, time: bool = True, scale: float = 0.15) -> DiffusionCheckpoint:
    """A random conversion with all of the right side in sight, large enough to move logits by nats."""
    checkpoint = conversion(base, time=time, scale=scale)
    checkpoint.metadata = checkpoint.metadata.model_copy(update={"final_causal_ratio": 0.0})
    return checkpoint


def written(path: Path, base: ModelFile, checkpoint: DiffusionCheckpoint, **options: object) -> ModelFile:
    plan = plan_standalone(base, checkpoint, **options)  # type: ignore[arg-type]
    write_standalone(path, base, checkpoint, plan, 2)
    return read_gguf(path)


def some_tokens(base: ModelFile, n: int = 15) -> np.ndarray:
    tokens = np.random.default_rng(0).integers(20, base.V, n).astype(np.int32)
    tokens[::3] = MASK_TOKEN
    return tokens


def engine_logits(base: ModelFile, checkpoint: DiffusionCheckpoint, tokens: np.ndarray, time: float):
    offset = ReadingRule.of_checkpoint(checkpoint).embedding_offset(np.array([time], np.float32))
    with Q4Model.from_gguf(base.path, 1, compute="f32") as engine:
        batch = Batch(tokens[None], 0.0, embedding_offset=offset)
        return engine.logits(batch, checkpoint.adapter())[0], engine.logits(Batch(tokens[None], 0.0))[0]


def without_mask(logits: np.ndarray) -> np.ndarray:
    return np.delete(logits, MASK_TOKEN, axis=1)


@pytest.mark.parametrize("time", [True, False])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("arch", TWINS)
def test_the_merged_float_file_predicts_what_base_and_adapter_predict(
    tmp_path: Path, tiny_model: TinyModel, arch: str, tied: bool, time: bool
):
    base = read_model(tiny_model(arch=arch, tied=tied))
    checkpoint = bidirectional(base, time=time)
    file = written(tmp_path / "out.gguf", base, checkpoint, **({"time": 0.3} if time else {}))
    assert file.arch == TWINS[arch]
    tokens = some_tokens(base)
    expected, plain = engine_logits(base, checkpoint, tokens, 0.3)
    # Without being asked to: the file itself says that its attention is not causal.
    (found,) = llama_logits(file.path, [Request(tokens, causal=False)])
    assert mean_kl_divergence(expected, found) < 1e-9  # float32 sums in another order
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
    assert mean_kl_divergence(expected, plain) > 0.1  # so that a wrong merge cannot hide


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_any_base_can_stay_what_it_is(tmp_path: Path, tiny_model: TinyModel, arch: str):
    base = read_model(tiny_model(arch=arch))
    has_time = ARCHITECTURES[arch].head != "absent"
    checkpoint = bidirectional(base, time=has_time)
    file = written(tmp_path / "out.gguf", base, checkpoint, arch="same")
    assert file.arch == arch
    assert file.require(f"{arch}.attention.causal", bool) is False
    tokens = some_tokens(base, 8)  # within every window: llama.cpp's end on one side only
    time = file.optional("ggml_diffusion.time", 0.0)
    expected, _ = engine_logits(base, checkpoint, tokens, time)
    (found,) = llama_logits(file.path, [Request(tokens, causal=False)])
    limit = 1e-6 if ARCHITECTURES[arch].gate is Gate.GELU else 1e-9  # ggml's GELU is a table in float16
    assert mean_kl_divergence(without_mask(expected), without_mask(found)) < limit


def sizes(type_name: str) -> dict[str, int]:
    return {"C": 256, "H": 4, "F": 256, "L": 1} if type_name in ("Q4_K", "Q6_K", "IQ4_XS") else {}


@pytest.mark.parametrize("type_name", ["Q4_1", "Q8_0", "Q4_K", "Q6_K", "IQ4_XS", "F16", "BF16"])
def test_in_its_own_types_a_quantised_base_is_unpacked_merged_and_packed_once(
    tmp_path: Path, tiny_model: TinyModel, type_name: str
):
    """The rule for quantised files: every adapted tensor holds what ggml's own quantisation of the exactly
    merged weights holds, but where a float64 and a float32 sum round a weight differently."""
    base = read_model(tiny_model(type=type_name, **sizes(type_name)))
    checkpoint = bidirectional(base, scale=0.05)
    file = written(tmp_path / "out.gguf", base, checkpoint, type_name="own")
    before = {one.name: one for one in gguf.GGUFReader(base.path).tensors}
    after = {one.name: one for one in gguf.GGUFReader(file.path).tensors}
    n_compared = 0
    for name, tensor in before.items():
        a = checkpoint.tensors.get(f"{name}.lora_a")
        if a is None:
            continue
        b = checkpoint.tensors[f"{name}.lora_b"].astype(np.float64)
        exact = gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float64) + ALPHA / RANK * (b @ a)
        expected = gguf.dequantize(quantise(exact.astype(np.float32), type_name), tensor.tensor_type)
        found = gguf.dequantize(after[name].data, after[name].tensor_type)
        assert after[name].tensor_type == tensor.tensor_type
        assert (found != expected).mean() < 0.005
        n_compared += 1
    assert n_compared == 7 * base.L


@pytest.mark.parametrize("type_name", ["Q4_0", "Q8_0", "F16", "IQ2_XXS"])
def test_what_changes_gets_eight_bits_where_it_had_fewer(
    tmp_path: Path, tiny_model: TinyModel, type_name: str
):
    base = read_model(tiny_model(type=type_name, **({"C": 256, "F": 256} if type_name == "IQ2_XXS" else {})))
    checkpoint = bidirectional(base, scale=0.05)
    for name in list(checkpoint.tensors):
        if ".ffn_" in name:
            del checkpoint.tensors[name]
    file = written(tmp_path / "out.gguf", base, checkpoint, time=0.7)
    changed = {name for name in base.tensors if base.tensors[name].type_name != file.tensors[name].type_name}
    adapted = {f"blk.{layer}.attn_{part}.weight" for layer in range(base.L) for part in "qkv"}
    adapted |= {f"blk.{layer}.attn_output.weight" for layer in range(base.L)} | {"token_embd.weight"}
    assert changed == (adapted if type_name in ("Q4_0", "IQ2_XXS") else set())
    assert {file.tensors[name].type_name for name in changed} <= {"Q8_0"}
    tokens = some_tokens(base)
    expected, _ = engine_logits(base, checkpoint, tokens, 0.7)
    (found,) = llama_logits(file.path, [Request(tokens, causal=False)])
    # llama.cpp rounds activations to 8 bits, on which a random model without a causal mask depends strongly.
    assert mean_kl_divergence(expected, found) < 0.05


def test_one_type_for_all_matrices(tmp_path: Path, tiny_model: TinyModel):
    base = read_model(tiny_model(type="Q4_0", tied=True))
    checkpoint = bidirectional(base)
    file = written(tmp_path / "out.gguf", base, checkpoint, type_name="f16", time=0.7)
    assert {one.type_name for one in file.tensors.values() if len(one.shape) > 1} == {"F16"}
    assert {one.type_name for one in file.tensors.values() if len(one.shape) == 1} == {"F32"}
    tokens = some_tokens(base)
    expected, _ = engine_logits(base, checkpoint, tokens, 0.7)
    (found,) = llama_logits(file.path, [Request(tokens, causal=False)])
    assert mean_kl_divergence(expected, found) < 1e-4  # weights and activations of 11 bits


def raw(file: ModelFile, name: str) -> bytes:
    info = file.tensors[name]
    return file.path.read_bytes()[info.offset_bytes : info.offset_bytes + info.n_bytes]


def test_what_nothing_changes_is_copied_byte_for_byte(tmp_path: Path, tiny_model: TinyModel):
    base = read_model(tiny_model(type="Q4_0", tied=True))
    checkpoint = bidirectional(base, time=False)
    for name in list(checkpoint.tensors):
        if ".attn_v." in name or ".ffn_" in name:
            del checkpoint.tensors[name]
    file = written(tmp_path / "out.gguf", base, checkpoint, arch="same", type_name="own")
    changed = {name for name in base.tensors if raw(base, name) != raw(file, name)}
    adapted = {f"blk.{layer}.{part}.weight" for layer in range(base.L) for part in ("attn_q", "attn_k")}
    adapted |= {f"blk.{layer}.attn_output.weight" for layer in range(base.L)}
    assert changed == {"token_embd.weight"} | adapted
    assert raw(file, "output.weight") == raw(base, "token_embd.weight")  # the head stays as it was
    before, after = (np.frombuffer(raw(one, "token_embd.weight"), np.uint8) for one in (base, file))
    rows = np.flatnonzero((before.reshape(base.V, -1) != after.reshape(base.V, -1)).any(axis=1))
    assert rows.tolist() == [MASK_TOKEN]


def test_the_file_says_what_llama_diffusion_cli_asks_of_it(tmp_path: Path, tiny_model: TinyModel):
    base = read_model(tiny_model())
    file = written(tmp_path / "out.gguf", base, bidirectional(base), time=0.25)
    expected = {
        "general.architecture": "llada",
        "llada.attention.causal": False,
        "llada.block_count": base.L,
        "tokenizer.ggml.mask_token_id": MASK_TOKEN,
        "diffusion.shift_logits": True,
        "ggml_diffusion.standalone": True,
        "ggml_diffusion.time": 0.25,
    }
    assert {key: file.metadata[key] for key in expected} == expected
    assert not any(key.startswith("llama.") for key in file.metadata)
    assert file.metadata["tokenizer.chat_template"] == PLAIN_TEMPLATE
    tokens = [one.metadata["tokenizer.ggml.tokens"] for one in (base, file)]
    assert tokens[0].data == tokens[1].data  # type: ignore[union-attr]


def test_a_conversion_of_prompts_keeps_the_chat_template_of_its_base(tmp_path: Path, tiny_model: TinyModel):
    base = read_model(tiny_model(tokenizer="mistral"))
    checkpoint = bidirectional(base)
    checkpoint.metadata = checkpoint.metadata.model_copy(update={"prompts": True})
    file = written(tmp_path / "out.gguf", base, checkpoint)
    assert file.metadata["tokenizer.chat_template"] == base.metadata["tokenizer.chat_template"]


def test_a_base_in_parts_becomes_one_file(tmp_path: Path, tiny_model: TinyModel):
    one = read_model(tiny_model(type="Q8_0"))
    tiny = tiny_model(type="Q8_0", tensors_a_part=7)
    parts = read_model(next(iter(sorted(tiny.parent.glob(f"{tiny.stem}*-00001-of-*.gguf")))))
    files = [
        written(tmp_path / f"{name}.gguf", base, bidirectional(base), arch="same")
        for name, base in (("one", one), ("parts", parts))
    ]
    assert len(parts.parts) > 1
    assert not any(key.startswith("split.") for key in files[1].metadata)
    assert all(raw(files[0], name) == raw(files[1], name) for name in files[0].tensors)


@pytest.mark.parametrize(
    ("model", "options", "words"),
    [
        ({"rope_freqs": True}, {}, ("llada", "'rope_freqs.weight'", "--arch same")),
        ({"arch": "gemma3"}, {}, ("no diffusion architecture for 'gemma3'", "--arch same")),
        ({"arch": "granite"}, {}, ("no diffusion architecture for 'granite'", "--arch same")),
        ({"biases": ("attn_output",)}, {}, ("attn_output.bias' and does not add it", "--arch same")),
        ({"arch": "gemma2"}, {"arch": "same"}, ("no output matrix for 'gemma2'", "time_embedding.enabled")),
        ({}, {"time": 1.5}, ("--time 1.5",)),
        ({}, {"type_name": "q9"}, ("--type 'q9'", "q4_k")),
        ({}, {"type_name": "q4_k"}, ("rows of 64", "blocks of 256", "q8_0")),
        ({"type": "IQ2_XXS", "C": 256, "F": 256}, {"type_name": "own"}, ("importance matrix", "q4_k")),
    ],
)
def test_what_the_target_would_compute_wrongly_is_refused_with_the_alternative(
    tiny_model: TinyModel, model: dict, options: dict, words: tuple[str, ...]
):
    base = read_model(tiny_model(**model))
    message = refusal(lambda: plan_standalone(base, bidirectional(base), **options))
    assert all(word in message for word in words), message


def test_an_attention_sink_is_refused_where_the_program_has_none(tiny_model: TinyModel):
    base = read_model(tiny_model())
    checkpoint = bidirectional(base)
    checkpoint.metadata = checkpoint.metadata.model_copy(update={"attention_sink": True})
    message = refusal(lambda: plan_standalone(base, checkpoint))
    assert "--no-attention-sink" in message and "--arch same" in message
    assert plan_standalone(base, checkpoint, arch="same").arch == base.arch


def test_a_conversion_that_is_not_bidirectional_yet_is_refused(tiny_model: TinyModel):
    base = read_model(tiny_model())
    assert "causal ratio 0.1" in refusal(lambda: plan_standalone(base, conversion(base)))


def test_a_frozen_context_is_refused_with_what_does_go(tiny_model: TinyModel):
    base = read_model(tiny_model(type="F32"))
    checkpoint = bidirectional(base)
    checkpoint.metadata = checkpoint.metadata.model_copy(update={"context": "frozen"})
    assert "--context adapted" in refusal(lambda: plan_standalone(base, checkpoint))
    assert "--context adapted" in refusal(lambda: export_peft(Path("unused"), checkpoint, base))


def test_a_time_without_a_time_embedding_is_refused(tiny_model: TinyModel):
    base = read_model(tiny_model())
    checkpoint = bidirectional(base, time=False)
    assert "has no time embedding" in refusal(lambda: plan_standalone(base, checkpoint, time=0.5))


def test_the_base_itself_is_not_overwritten(tiny_model: TinyModel):
    base = read_model(tiny_model())
    checkpoint = bidirectional(base)
    plan = plan_standalone(base, checkpoint)
    assert "is the base model" in refusal(lambda: write_standalone(base.path, base, checkpoint, plan))


def test_a_number_too_large_for_the_type_leaves_the_old_file(tmp_path: Path, tiny_model: TinyModel):
    base = read_model(tiny_model())
    checkpoint = bidirectional(base)
    checkpoint.tensors["blk.1.ffn_up.weight.lora_b"] *= np.float32(1e6)
    plan = plan_standalone(base, checkpoint, type_name="f16")
    target = tmp_path / "out.gguf"
    target.write_text("old")
    message = refusal(lambda: write_standalone(target, base, checkpoint, plan))
    assert message == "tensor 'blk.1.ffn_up.weight', merged, holds numbers that are too large for type F16"
    assert target.read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["out.gguf"]


def test_a_piece_of_one_tensor_is_unpacked_at_a_time(
    tmp_path: Path, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
):
    base = read_model(tiny_model(type="Q8_0", C=256, F=1024, L=4, V=1024))
    checkpoint = bidirectional(base)
    monkeypatch.setattr(standalone, "_PIECE_VALUES", 1 << 14)
    written(tmp_path / "first.gguf", base, checkpoint)  # imports, and what is made once
    plan = plan_standalone(base, checkpoint)
    tracemalloc.start()
    write_standalone(tmp_path / "out.gguf", base, checkpoint, plan)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    largest_unpacked = 4 * base.V * base.C
    assert peak < largest_unpacked
