"""A run that starts from someone's LoRA pairs: what it takes, what it refuses, and that resuming knows it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conversions import ALPHA, RANK, conversion, refusal
from trainers import make_batch, make_trainer

from ggml_diffusion.engine.cpu.q4_model import Q4Model
from ggml_diffusion.errors import UserError
from ggml_diffusion.formats.gguf_adapter import write_gguf_adapter
from ggml_diffusion.formats.lora import LoraAdapter
from ggml_diffusion.formats.peft_folder import write_peft_folder
from ggml_diffusion.training.resume import resume_run, save_run
from ggml_diffusion.training.trainer import ConversionTrainer

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FITTING: dict[str, Any] = {
    "model__qlora_rank": RANK,
    "model__qlora_alpha": ALPHA,
    "model__target_modules": ALL,
}


@pytest.fixture(scope="module")
def model(tiny_model) -> Iterator[Q4Model]:
    with Q4Model.from_gguf(tiny_model(L=2, C=32, H=2, G=1, F=32), 1) as opened:
        yield opened


def pairs_of(model: Q4Model, seed: int = 5) -> LoraAdapter:
    return LoraAdapter(ALPHA, conversion(model.file, seed=seed).adapter().tensors)


def saved(kind: str, folder: Path, pairs: LoraAdapter, model: Q4Model) -> Path:
    if kind == "peft":
        folder.mkdir(exist_ok=True)
        write_peft_folder(folder, pairs, model.file, None)
        return folder
    path = folder.with_suffix(".gguf")
    write_gguf_adapter(path, pairs, model.file, {})
    return path


def started(model: Q4Model, path: Path, **changes: Any) -> ConversionTrainer:
    return make_trainer(model, model__start_from=str(path), **{**FITTING, **changes})


@pytest.mark.parametrize("kind", ["peft", "gguf"])
def test_the_pairs_are_where_training_starts(model: Q4Model, tmp_path: Path, kind: str):
    pairs = pairs_of(model)
    trainer = started(model, saved(kind, tmp_path / "start", pairs, model))
    for name, array in pairs.tensors.items():
        assert np.array_equal(trainer.parameters.views[name], array)
    assert not trainer.parameters.views["mask_embedding"].any()
    trainer.train_step(make_batch())
    trainer.restart()
    for name, array in pairs.tensors.items():
        assert np.array_equal(trainer.parameters.views[name], array)


def test_projections_that_the_file_leaves_out_start_as_ever(model: Q4Model, tmp_path: Path):
    pairs = pairs_of(model)
    kept = {name: array for name, array in pairs.tensors.items() if ".attn_q." in name or ".attn_v." in name}
    path = saved("peft", tmp_path / "start", LoraAdapter(ALPHA, kept), model)
    trainer, plain = started(model, path), make_trainer(model, **FITTING)
    for name, view in trainer.parameters.views.items():
        assert np.array_equal(view, kept.get(name, plain.parameters.views[name]))


def test_a_conversion_of_its_own_gives_its_pairs_and_nothing_else(model: Q4Model, tmp_path: Path):
    checkpoint = conversion(model.file)
    checkpoint.save(tmp_path / "adapter.safetensors")
    trainer = started(model, tmp_path / "adapter.safetensors")
    name = "blk.0.attn_q.weight.lora_b"
    assert np.array_equal(trainer.parameters.views[name], checkpoint.tensors[name])
    assert not trainer.parameters.views["mask_embedding"].any()


def test_a_resumed_run_ends_with_the_same_bits_wherever_the_start_is_now(model: Q4Model, tmp_path: Path):
    path = saved("peft", tmp_path / "start", pairs_of(model), model)
    undisturbed, first = started(model, path), started(model, path)
    for step in range(4):
        undisturbed.train_step(make_batch(seed=step))
    for step in range(2):
        first.train_step(make_batch(seed=step))
    save_run(first, tmp_path / "checkpoints")
    second = started(model, saved("gguf", tmp_path / "moved", pairs_of(model), model))
    assert resume_run(second, tmp_path / "checkpoints")
    for step in range(2, 4):
        second.train_step(make_batch(seed=step))
    assert np.array_equal(second.parameters.flat, undisturbed.parameters.flat)


def test_a_run_with_another_start_is_not_resumed(model: Q4Model, tmp_path: Path):
    path = saved("peft", tmp_path / "start", pairs_of(model), model)
    save_run(started(model, path), tmp_path / "checkpoints")
    other = saved("peft", tmp_path / "other", pairs_of(model, seed=6), model)
    with pytest.raises(UserError, match=r"model\.start_from \(sha256 \w{12} there, sha256 \w{12} here\)"):
        resume_run(started(model, other), tmp_path / "checkpoints")
    with pytest.raises(UserError, match=r"model\.start_from \(sha256 \w{12} there, none here\)"):
        resume_run(make_trainer(model, **FITTING), tmp_path / "checkpoints")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model__qlora_rank": 4}, f"has pairs of rank {RANK}, and the run of 4: --rank {RANK}"),
        ({"model__qlora_alpha": 64.0}, f"has alpha {ALPHA:g}, and the run 64: --alpha {ALPHA:g}"),
        (
            {"model__target_modules": ["q_proj", "v_proj"]},
            "adapts k_proj, o_proj, gate_proj, up_proj, down_proj too, which the run does not train: "
            f"--target-modules {','.join(ALL)}",
        ),
    ],
)
def test_pairs_that_are_not_those_of_the_run_are_refused_with_the_flag_that_would_take_them(
    model: Q4Model, tmp_path: Path, changes: dict, words: str
):
    path = saved("peft", tmp_path / "start", pairs_of(model), model)
    assert refusal(lambda: started(model, path, **changes)) == f"{path}: {words}"


def test_pairs_of_several_ranks_of_another_base_or_of_no_file_are_one_line(
    model: Q4Model, tiny_model, tmp_path: Path
):
    uneven = pairs_of(model)
    for half, axis in (("a", 0), ("b", 1)):
        name = f"blk.1.attn_k.weight.lora_{half}"
        uneven.tensors[name] = np.ascontiguousarray(np.repeat(uneven.tensors[name], 2, axis=axis))
    path = saved("gguf", tmp_path / "uneven", uneven, model)
    assert "and all must have one" in refusal(lambda: started(model, path))
    with Q4Model.from_gguf(tiny_model(), 1) as larger:
        for kind in ("peft", "gguf"):
            path = saved(kind, tmp_path / "larger", pairs_of(larger), larger)
            assert str(path) in refusal(lambda path=path: started(model, path))
    assert "no such file" in refusal(lambda: started(model, tmp_path / "nowhere"))
    assert "adapter_config.json" in refusal(lambda: started(model, tmp_path))
