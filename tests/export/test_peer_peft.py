"""The PEFT folder in transformers + peft computes what the engine computes; run with `pytest -m peer`.

Neither is a dependency: without them the test is skipped. The base is the GGUF itself, which transformers
unpacks, so that nothing but the folder is tried.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conversions import MASK_TOKEN, conversion

from ggml_diffusion.engine.cpu.q4_model import Q4Model
from ggml_diffusion.engine.interface import Batch
from ggml_diffusion.export.peft import export_peft
from ggml_diffusion.export.verify import Runtimes, verify_run
from ggml_diffusion.formats.model_check import read_model
from ggml_diffusion.generation.reading import ReadingRule
from ggml_diffusion.training.identity import mean_kl_divergence

pytestmark = pytest.mark.peer

# What transformers does not take from these GGUFs, or takes for granted; without it the base is another one.
# Gemma 2 is left out: whatever is set, the base that it reads differs by more than a nat.
CONFIG = {
    "qwen3": {"head_dim": 16},
    "gemma3": {"query_pre_attn_scalar": 16},
    "phi3": {"pad_token_id": 0},
}
MODEL = {"phi3": {"keys": {"rope.scaling.type": None, "rope.scaling.attn_factor": None}}}


@pytest.mark.parametrize("sink", [False, True])
@pytest.mark.parametrize("causal_ratio", [0.0, 0.4])
@pytest.mark.parametrize("arch", ["llama", "qwen2", "qwen3", "phi3", "gemma3"])
def test_base_and_folder_predict_what_base_and_adapter_predict(
    tmp_path: Path,
    tiny_model: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    arch: str,
    causal_ratio: float,
    sink: bool,
):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    pytest.importorskip("peft", reason="PEFT is not installed")
    from ggml_diffusion.export.denoise_with_peft import Denoiser

    base = read_model(tiny_model(arch=arch, **MODEL.get(arch, {})))
    config = transformers.AutoConfig.from_pretrained(base.path.parent, gguf_file=base.path.name)
    for key, value in CONFIG.get(arch, {}).items():
        setattr(config, key, value)
    if base.n_rotated != base.D:
        config.rope_parameters["partial_rotary_factor"] = base.n_rotated / base.D
    read = transformers.AutoModelForCausalLM.from_pretrained
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM,
        "from_pretrained",
        lambda *names, **options: read(*names, config=config, **options),
    )
    checkpoint = conversion(base, scale=0.15)
    checkpoint.metadata = checkpoint.metadata.model_copy(
        update={"final_causal_ratio": causal_ratio, "attention_sink": sink}
    )
    export_peft(tmp_path / "folder", checkpoint, base)
    tokens = np.random.default_rng(0).integers(20, base.V, 8).astype(np.int32)
    tokens[1::3] = MASK_TOKEN
    rule = ReadingRule.of_checkpoint(checkpoint)
    offset = rule.embedding_offset(np.array([0.37], np.float32))
    with Q4Model.from_gguf(base.path, 1, compute="f32") as engine:
        expected, plain = (
            engine.logits(rule.batch(tokens[None], offset), checkpoint.adapter())[0],
            engine.logits(Batch(tokens[None], causal_ratio))[0],
        )
    found = Denoiser(tmp_path / "folder", base.path).logits(torch.from_numpy(tokens).long(), 0.37).numpy()
    assert mean_kl_divergence(expected, found) < 1e-6
    assert mean_kl_divergence(expected, plain) > 0.1  # so that a wrong folder cannot hide


def test_verify_runs_the_folder_in_a_process_of_its_own(tmp_path: Path, tiny_model: Callable[..., Path]):
    for package in ("torch", "transformers", "peft"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    base = read_model(tiny_model(arch="qwen2"))
    checkpoint = conversion(base, scale=0.15)
    export_peft(tmp_path / "right", checkpoint, base)
    export_peft(tmp_path / "wrong", conversion(base, scale=0.15, seed=1), base)
    with Q4Model.from_gguf(base.path, 1, compute="f32") as engine:
        found = {one.export: one for one in verify_run(tmp_path, engine, checkpoint, Runtimes())}
    assert {name: one.status for name, one in found.items()} == {"right": "ok", "wrong": "failed"}


def test_a_base_that_transformers_reads_otherwise_is_not_compared(
    tmp_path: Path, tiny_model: Callable[..., Path]
):
    for package in ("torch", "transformers", "peft"):
        pytest.importorskip(package, reason=f"{package} is not installed")
    base = read_model(tiny_model(arch="gemma3"))  # whose scale of scores is taken for granted
    checkpoint = conversion(base, scale=0.15)
    export_peft(tmp_path / "peft", checkpoint, base)
    with Q4Model.from_gguf(base.path, 1, compute="f32") as engine:
        (check,) = verify_run(tmp_path, engine, checkpoint, Runtimes())
    assert check.status == "skipped"
    assert "transformers reads another model" in check.found
