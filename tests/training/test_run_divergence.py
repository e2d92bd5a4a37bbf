"""Runs that diverge: they go back to a checkpoint at half the rate, twice at most."""

import dataclasses
import os
import shutil
import signal

import pytest
import runs
from runs import Recorder, rates_in, run, steps_in, tensors_of

from ggml_diffusion.config.toml import load_config
from ggml_diffusion.errors import UserError
from ggml_diffusion.training.checkpoint import load_latest
from ggml_diffusion.training.loss_gradients import LossGradients
from ggml_diffusion.training.run import run_conversion
from ggml_diffusion.training.trainer import ConversionTrainer

run_base, settings, quick_gate = runs.run_base, runs.settings, runs.quick_gate  # fixtures
pytestmark = pytest.mark.usefixtures("quick_gate")


@pytest.fixture
def diverging(monkeypatch):
    """A function: from a step on the loss is not finite wherever the learning rate is above a limit."""

    def above(limit, from_step):
        take, add_masked, now_bad = ConversionTrainer.train_step, LossGradients.add_masked, []

        def train_step(self, batch):
            now_bad[:] = [self.step_count >= from_step and self.learning_rate > limit]
            return take(self, batch)

        def terms(self, *rest):
            found = add_masked(self, *rest)
            return dataclasses.replace(found, loss=float("nan")) if now_bad == [True] else found

        monkeypatch.setattr(ConversionTrainer, "train_step", train_step)
        monkeypatch.setattr(LossGradients, "add_masked", terms)

    return above


def test_a_run_that_diverges_goes_back_and_on_at_half_the_rate(settings, tmp_path, diverging):
    settings = {**settings, "training.total_steps": 8, "training.lr_schedule": "constant"}
    diverging(0.006, from_step=4)
    conversion, recorder = run({**settings, "training.checkpoint_every": 3})
    assert conversion.step == 8
    assert steps_in(tmp_path / "run") == [1, 2, 3, 4, 5, 6, 7, 8]
    assert rates_in(tmp_path / "run") == [0.01] * 3 + [0.005] * 5
    said = [text for text in recorder.warnings if "gone back" in text]
    assert len(said) == 1
    assert "gone back to step 3, and on from there at 0.005" in said[0]
    state = load_latest(tmp_path / "run" / "checkpoints").state
    assert state.extra["rate_changes"] == [[0, 0.01], [3, 0.005]]


def test_a_run_that_diverges_before_its_first_checkpoint_starts_again(settings, tmp_path, diverging):
    diverging(0.006, from_step=0)
    conversion, recorder = run({**settings, "training.lr_schedule": "constant"})
    assert any("gone back to step 0" in text for text in recorder.warnings)
    # as if it had been asked for half the rate
    calm, _ = run(
        {
            **settings,
            "training.output": str(tmp_path / "calm"),
            "training.learning_rate": 0.005,
            "training.lr_schedule": "constant",
        }
    )
    assert tensors_of(conversion) == tensors_of(calm)


def test_a_run_that_went_back_and_was_killed_ends_with_the_same_bits(settings, tmp_path, diverging):
    settings = {**settings, "training.total_steps": 8}
    diverging(0.006, from_step=3)
    undisturbed, _ = run({**settings, "training.output": str(tmp_path / "undisturbed")})

    class Killed(Exception):
        pass

    class Mortal(Recorder):
        def start(self, first_step, tokens_seen, total_steps):
            if self.warnings:  # it has gone back, and taken no step since
                raise Killed

    with pytest.raises(Killed):
        run_conversion(load_config(overrides=settings), Mortal())
    resumed, recorder = run(settings)
    assert recorder.started[0] == 2
    assert recorder.warnings == []  # the lower rate was saved
    assert tensors_of(undisturbed) == tensors_of(resumed)


def test_after_going_back_twice_it_stops_with_advice_that_it_takes(settings, tmp_path, diverging):
    settings = {**settings, "training.total_steps": 8, "training.lr_schedule": "constant"}
    diverging(0.002, from_step=3)
    for _ in range(2):  # the same command again says the same
        with pytest.raises(UserError) as caught:
            run(settings)
        assert "after going back 2 times" in str(caught.value)
    assert steps_in(tmp_path / "run")[:2] == [1, 2]
    lower = float(str(caught.value).partition("--learning-rate ")[2].split()[0])
    assert lower == pytest.approx(0.01 / 8)
    conversion, recorder = run({**settings, "training.learning_rate": lower})
    assert conversion.step == 8
    assert recorder.started[0] == 2
    # The second time it went beyond the checkpoint that it had gone back to, so to the start.
    assert rates_in(tmp_path / "run") == [0.0025, 0.0025] + [lower] * 6
    assert load_config(tmp_path / "run" / "config.toml").learning_rate == lower
    with pytest.raises(UserError, match=r"training.learning_rate \(0.00125 there, 0.01 here\)"):
        run(settings)


def test_a_base_that_is_overwritten_is_not_taken_for_a_run_that_diverges(settings, tmp_path, diverging):
    """Whose steps are as bad: it would go back and go on with half the rate, on another base."""
    base = tmp_path / "base.gguf"
    shutil.copy(settings["model.base_model"], base)
    diverging(0.0, from_step=3)

    class Overwriting(Recorder):
        def step(self, metrics):
            super().step(metrics)
            if metrics.step == 3:
                with base.open("r+b") as file:
                    file.seek(-64, os.SEEK_END)
                    file.write(bytes(64))

    settings = {**settings, "model.base_model": str(base), "training.total_steps": 8}
    listener = Overwriting()
    with pytest.raises(UserError, match="overwritten while the run used it"):
        run_conversion(load_config(overrides=settings), listener)
    assert not any("gone back" in warning for warning in listener.warnings)


def test_steps_far_worse_than_a_guess_count_as_diverging(settings):
    with pytest.raises(UserError, match="far worse than a guess"):
        run({**settings, "training.learning_rate": 1e6, "training.total_steps": 40})


def test_a_lower_rate_does_not_undo_one_that_the_run_found(settings, tmp_path, diverging):
    settings = {**settings, "training.total_steps": 8, "training.lr_schedule": "constant"}
    diverging(0.003, from_step=3)

    class Stopped(Recorder):
        def step(self, metrics):
            if metrics.step == 6:  # it comes that far only after going back
                os.kill(os.getpid(), signal.SIGTERM)

    stopped = run_conversion(load_config(overrides=settings), Stopped())
    assert stopped.step == 6
    run({**settings, "training.learning_rate": 0.009})
    assert rates_in(tmp_path / "run") == [0.0025] * 8  # the second time it went back to the start
