"""What tests of whole runs share: their base, their settings, and a gate that does not start llama.cpp."""

import pytest
from runs import TEXT

from ggml_diffusion.training import run as convert


@pytest.fixture(scope="module")
def run_base(tiny_model):
    return tiny_model(L=1, C=32, H=2, G=1, F=32, type="Q4_0")


@pytest.fixture
def settings(run_base, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return {
        "model.base_model": str(run_base),
        "model.qlora_rank": 2,
        "training.data": [str(tmp_path / "text.txt")],
        "training.output": str(tmp_path / "run"),
        "training.batch_size": 2,
        "training.gradient_accumulation": 1,
        "training.sequence_length": 24,
        "training.total_steps": 5,
        "training.warmup_steps": 1,
        "training.learning_rate": 1e-2,
        "training.checkpoint_every": 2,
        "training.held_out_fraction": 0.2,
        "mask_annealing.total_steps": 3,
        "time_embedding.dim": 8,
        "hardware.num_threads": 1,
    }


@pytest.fixture
def quick_gate(monkeypatch):
    """llama.cpp takes a second to start: what is not about the gate does without it."""
    monkeypatch.setattr(convert, "check_identity", lambda model, tokenizer: "gate")
