"""Where a run that diverged goes back to, which checkpoints that leaves, and what is no reason to go back."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TinyModel
from trainers import make_batch, make_trainer

from ggml_diffusion.engine.cpu.q4_model import Q4Model
from ggml_diffusion.errors import UserError
from ggml_diffusion.training import checkpoint as checkpoint_module
from ggml_diffusion.training.checkpoint import load_latest
from ggml_diffusion.training.resume import resume_run, roll_back, save_run
from ggml_diffusion.training.trainer import ConversionTrainer, Diverged

CAUSE = Diverged("three steps in a row far above a guess")


@pytest.fixture(scope="module")
def model(tiny_model: TinyModel) -> Iterator[Q4Model]:
    with Q4Model.from_gguf(tiny_model(L=1, C=32, H=2, G=1, F=32), 1) as opened:
        yield opened


def trained(model: Q4Model, folder: Path, n_saves: int) -> ConversionTrainer:
    """A run that was saved after each of its steps, and has gone one further."""
    trainer = make_trainer(model)
    for _ in range(n_saves):
        trainer.train_step(make_batch())
        save_run(trainer, folder)
    trainer.train_step(make_batch())
    return trainer


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("step-*"))


def test_a_checkpoint_of_broken_weights_is_not_gone_back_to_twice(model: Q4Model, tmp_path: Path) -> None:
    trainer = trained(model, tmp_path, 2)
    rate = trainer.learning_rate
    roll_back(trainer, tmp_path, CAUSE)
    assert (trainer.step_count, trainer.learning_rate) == (2, rate / 2)
    assert steps(tmp_path) == [1, 2]
    trainer.train_step(make_batch())
    roll_back(trainer, tmp_path, CAUSE)  # nothing was saved since: those weights are no good
    assert (trainer.step_count, trainer.learning_rate, trainer.rollbacks) == (1, rate / 4, 2)
    assert steps(tmp_path) == [1]
    with pytest.raises(UserError, match="after going back 2 times"):
        roll_back(trainer, tmp_path, CAUSE)
    resumed = make_trainer(model)
    assert resume_run(resumed, tmp_path)
    assert (resumed.step_count, resumed.learning_rate) == (1, rate / 4)
    assert np.array_equal(resumed.parameters.flat, load_latest(tmp_path).state.parameters)  # type: ignore[union-attr]


def test_without_an_older_checkpoint_the_run_begins_anew(model: Q4Model, tmp_path: Path) -> None:
    trainer = trained(model, tmp_path, 1)
    start = make_trainer(model).parameters.flat.copy()
    roll_back(trainer, tmp_path, CAUSE)
    roll_back(trainer, tmp_path, CAUSE)
    assert trainer.step_count == 0 and np.array_equal(trainer.parameters.flat, start)
    assert steps(tmp_path) == [0]


def test_what_was_saved_since_is_gone_back_to(model: Q4Model, tmp_path: Path) -> None:
    trainer = trained(model, tmp_path, 2)
    roll_back(trainer, tmp_path, CAUSE)
    for _ in range(2):
        trainer.train_step(make_batch())
    save_run(trainer, tmp_path)
    trainer.train_step(make_batch())
    roll_back(trainer, tmp_path, CAUSE)
    assert trainer.step_count == 4


@pytest.mark.parametrize("name", ["manifest.json", "state.safetensors"])
def test_a_checkpoint_that_cannot_be_read_is_not_a_damaged_one(
    model: Q4Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    trained(model, tmp_path, 2)
    before = steps(tmp_path)
    opened = checkpoint_module.open_regular
    digest = checkpoint_module.file_sha256

    def failing(path: Path, *more: Any) -> Any:
        if path.name == name and path.parent.name.endswith("2"):
            raise OSError(errno.EIO, "Input/output error", str(path))
        return (opened if name == "manifest.json" else digest)(path, *more)

    with monkeypatch.context() as patch:
        patch.setattr(
            checkpoint_module, "open_regular" if name == "manifest.json" else "file_sha256", failing
        )
        with pytest.raises((UserError, OSError), match="Input/output error"):
            resume_run(make_trainer(model), tmp_path)
    assert steps(tmp_path) == before
    assert resume_run(make_trainer(model), tmp_path)


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(
    model: Q4Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained(model, tmp_path, 1)

    def denied(self: Path) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "iterdir", denied)
    with pytest.raises(UserError, match="cannot be listed: Permission denied"):
        resume_run(make_trainer(model), tmp_path)
