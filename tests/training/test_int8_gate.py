"""The int8 gate: it decides by the gradients of the first batch, and the run keeps the decision."""

from pathlib import Path

import numpy as np
import pytest
from conftest import TinyModel
from numpy.typing import NDArray

from ggml_diffusion.config.settings import ConversionTrainingConfig
from ggml_diffusion.engine.cpu.q4_model import Q4Model
from ggml_diffusion.engine.interface import Batch
from ggml_diffusion.text.loader import TokenBatch
from ggml_diffusion.training.int8_gate import MIN_COSINE, choose_int8
from ggml_diffusion.training.resume import resume_run, save_run
from ggml_diffusion.training.trainer import ConversionTrainer


def batch(B: int = 4, T: int = 24) -> TokenBatch:
    tokens = np.random.default_rng(0).integers(20, 200, (B, T)).astype(np.int32)
    return TokenBatch(tokens, np.full(B, T, np.int32), np.zeros((B, T), np.int32))


@pytest.fixture
def model(tiny_model: TinyModel, int8_kernels: str) -> Q4Model:
    opened = Q4Model.from_gguf(tiny_model(type="Q4_1"), 1)
    assert opened.kernels == int8_kernels
    return opened


def trainer_of(model: Q4Model) -> ConversionTrainer:
    return ConversionTrainer(model, ConversionTrainingConfig(batch_size=4, gradient_accumulation=1))


def test_int8_is_used_where_the_gradient_agrees(model: Q4Model) -> None:
    trainer = trainer_of(model)
    fine = trainer.first_gradient(batch()).copy()
    report = choose_int8(trainer, batch())
    coarse = trainer.first_gradient(batch())
    assert trainer.int8 == report.used == "both"
    x, y = coarse.astype(np.float64), fine.astype(np.float64)
    expected = x @ y / np.linalg.norm(x) / np.linalg.norm(y)
    assert report.cosines == {"both": pytest.approx(expected, abs=1e-12)}
    assert MIN_COSINE < expected < 1.0
    assert "in int8: forward and backward" in str(report)


@pytest.mark.parametrize(("spoiled", "used"), [({"both"}, "backward"), ({"both", "backward"}, "none")])
def test_int8_is_used_only_as_far_as_the_gradient_agrees(
    model: Q4Model, monkeypatch: pytest.MonkeyPatch, spoiled: set[str], used: str
) -> None:
    trainer = trainer_of(model)
    true_gradient = trainer.first_gradient

    def first_gradient(tokens: TokenBatch) -> NDArray[np.float32]:
        gradient = true_gradient(tokens)
        if trainer.int8 in spoiled:
            gradient[: len(gradient) // 2] = 0.0
        return gradient

    monkeypatch.setattr(trainer, "first_gradient", first_gradient)
    report = choose_int8(trainer, batch())
    assert trainer.int8 == report.used == used
    assert list(report.cosines) == ["both", "backward"]
    assert report.cosines["both"] < MIN_COSINE


def test_a_model_that_computes_in_float32_goes_without(tiny_model: TinyModel) -> None:
    with Q4Model.from_gguf(tiny_model(type="F32"), 1) as model:
        trainer = trainer_of(model)
        report = choose_int8(trainer, batch())
        assert not report.cosines
        assert trainer.int8 == "none"


def test_only_training_uses_int8(model: Q4Model) -> None:
    trainer, seen = trainer_of(model), Batch(batch().tokens, 0.5)
    before = model.logits(seen)
    trainer.int8 = "both"
    trainer.train_step(batch())
    assert np.array_equal(model.logits(seen), before)
    assert not np.array_equal(model.logits(seen, int8="both"), before)


def test_a_resumed_run_keeps_the_decision(model: Q4Model, tmp_path: Path) -> None:
    trainer = trainer_of(model)
    choose_int8(trainer, batch())
    trainer.train_step(batch())
    save_run(trainer, tmp_path)
    resumed = trainer_of(model)
    assert resumed.int8 == "none"
    assert resume_run(resumed, tmp_path)
    assert resumed.int8 == "both"
