"""Whole runs on tiny models: what the folder holds, resuming, refusals, signals, the identity gate."""

import dataclasses
import functools
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest

from ggml_diffusion.config.toml import load_config
from ggml_diffusion.engine.cpu.q4_model import Q4Model
from ggml_diffusion.engine.interface import Batch
from ggml_diffusion.errors import UserError
from ggml_diffusion.formats.adapter_file import DiffusionCheckpoint
from ggml_diffusion.text.tokenizer import Tokenizer
from ggml_diffusion.training import earlier_run, requirements
from ggml_diffusion.training import run as convert
from ggml_diffusion.training.checkpoint import load_latest
from ggml_diffusion.training.earlier_run import delete_run, is_half_deleted
from ggml_diffusion.training.identity import check_identity, mean_kl_divergence
from ggml_diffusion.training.run import run_conversion
from ggml_diffusion.training.trainer import ConversionTrainer

TEXT = "the old mill ground corn for the whole village and the miller told his children of it. " * 40


class Recorder:
    """Keeps all that a run says."""

    def __init__(self):
        self.notes, self.warnings, self.steps, self.started = [], [], [], None
        self.tokenised = []

    def note(self, text):
        self.notes.append(text)

    def tokenise(self, done_bytes, total_bytes):
        self.tokenised.append((done_bytes, total_bytes))

    def warn(self, text):
        self.warnings.append(text)

    def start(self, first_step, tokens_seen, total_steps):
        self.started = (first_step, tokens_seen, total_steps)

    def step(self, metrics):
        self.steps.append(metrics)

    def stop(self):
        pass


@pytest.fixture(scope="module")
def base(tiny_model):
    return tiny_model(L=1, C=32, H=2, G=1, F=32, type="Q4_0")


@pytest.fixture
def settings(base, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return {
        "model.base_model": str(base),
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


@pytest.fixture(autouse=True)
def quick_gate(request, monkeypatch):
    """llama.cpp takes a second to start: only the tests of the gate let it run."""
    if "gate" not in request.node.name:
        monkeypatch.setattr(convert, "check_identity", lambda model, tokenizer: "gate")


def run(settings, **options):
    recorder = Recorder()
    return run_conversion(load_config(overrides=settings), recorder, **options), recorder


def steps_in(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


# -- the run -------------------------------------------------------------------------------------------


def test_a_run_leaves_its_exports_metrics_config_and_checkpoints(settings, tmp_path):
    conversion, recorder = run(settings)
    output = tmp_path / "run"
    assert conversion.interrupted_by is None
    assert conversion.step == conversion.total_steps == 5
    assert conversion.safetensors == output / "adapter.safetensors"
    assert conversion.gguf == output / "adapter.gguf"
    assert DiffusionCheckpoint.load(conversion.gguf).metadata.conversion_steps == 5
    assert steps_in(output) == [1, 2, 3, 4, 5]
    first = json.loads((output / "metrics.jsonl").read_text().splitlines()[0])
    values = dataclasses.asdict(recorder.steps[0])
    assert first.keys() == {name for name, value in values.items() if value is not None}
    assert load_config(output / "config.toml") == load_config(overrides=settings)
    assert sorted(path.name for path in (output / "checkpoints").glob("step-*")) == [
        "step-00000004",
        "step-00000005",
    ]
    assert [one.step for one in recorder.steps] == [1, 2, 3, 4, 5]


def test_evaluation_is_written_only_if_asked_for(settings, tmp_path):
    conversion, _ = run(settings)
    assert conversion.evidence is None
    assert not (tmp_path / "run" / "evaluation.json").exists()
    conversion, _ = run(settings, evaluate_on=4)
    written = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert written["n_sequences"] == conversion.evidence.n_sequences == 4
    assert [row["share"] for row in written["before"]] == [0.15, 0.5, 0.85]
    assert written["after"][1]["visible"]["cross_entropy"] == pytest.approx(
        conversion.evidence.after[1].visible.cross_entropy
    )
    assert written["base_next_token"]["n_tokens"] > 0


def test_figures_before_the_first_step_do_not_depend_on_whether_the_run_is_resumed(settings):
    first, _ = run(settings, evaluate_on=4)
    again, _ = run(settings, evaluate_on=4)
    assert first.evidence.before == again.evidence.before
    assert first.evidence.after == again.evidence.after
    assert first.evidence.before != first.evidence.after


def test_a_run_shorter_than_its_annealing_scales_it_and_says_so(settings, tmp_path):
    _, recorder = run({**settings, "mask_annealing.total_steps": 1000})
    assert any("scaled" in note for note in recorder.notes)
    assert recorder.steps[-1].causal_ratio == 0.0
    resolved = load_config(tmp_path / "run" / "config.toml")
    assert resolved.qlora.mask_annealing.total_steps == 2
    # the same command again finds the same settings
    run({**settings, "mask_annealing.total_steps": 1000})


def test_bits_that_are_not_as_expected_are_a_warning_that_names_both(settings):
    _, recorder = run({**settings, "model.quantization_bits": 8})
    assert len(recorder.warnings) == 1
    assert "is 8" in recorder.warnings[0]
    assert "4 bits" in recorder.warnings[0]
    _, recorder = run({**settings, "model.quantization_bits": 4}, fresh=True)
    assert recorder.warnings == []


# -- resuming --------------------------------------------------------------------------------------------


def test_an_interrupted_run_goes_on_and_ends_with_the_same_bytes(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    settings["training.output"] = "run"  # relative, so that both runs have one and the same config

    def enter(name):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)

    enter("undisturbed")
    undisturbed, _ = run(settings)
    expected = [path.read_bytes() for path in (undisturbed.safetensors, undisturbed.gguf)]

    class Impatient(Recorder):
        def step(self, metrics):
            super().step(metrics)
            if metrics.step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    enter("interrupted")
    stopped = run_conversion(load_config(overrides=settings), Impatient())
    assert stopped.interrupted_by == signal.SIGTERM
    assert stopped.step == 3
    assert stopped.safetensors is None
    resumed, recorder = run(settings)
    assert recorder.started == (3, 3 * 48, 5)
    assert steps_in(resumed.output) == [1, 2, 3, 4, 5]
    assert [path.read_bytes() for path in (resumed.safetensors, resumed.gguf)] == expected


def tensors_of(conversion):
    loaded = DiffusionCheckpoint.load(conversion.safetensors)
    return {name: array.tobytes() for name, array in loaded.tensors.items()}


def test_signal_handlers_are_as_before_after_a_run(settings):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run(settings)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_killed_run_goes_on_from_its_last_checkpoint(settings, tmp_path):
    class Killed(Exception):
        pass

    class Mortal(Recorder):
        def step(self, metrics):
            if metrics.step == 4:
                raise Killed

    undisturbed, _ = run({**settings, "training.output": str(tmp_path / "undisturbed")})
    with pytest.raises(Killed):
        run_conversion(load_config(overrides={**settings, "training.checkpoint_every": 3}), Mortal())
    resumed, recorder = run(settings)
    assert recorder.started[0] == 3
    assert steps_in(tmp_path / "run") == [1, 2, 3, 4, 5]
    assert tensors_of(undisturbed) == tensors_of(resumed)


def test_a_finished_run_is_not_trained_again(settings):
    first, _ = run(settings)
    before = tensors_of(first)
    again, recorder = run(settings)
    assert recorder.started is None
    assert any("all 5 steps are done" in note for note in recorder.notes)
    assert tensors_of(again) == before


def test_fresh_starts_anew_and_deletes_nothing_of_the_users(settings, tmp_path):
    run(settings)
    (tmp_path / "run" / "notes.txt").write_text("mine")
    theirs = tmp_path / "run" / "checkpoints" / "best-so-far" / "adapter.safetensors"
    theirs.parent.mkdir()
    theirs.write_text("a copy that somebody keeps")
    conversion, recorder = run({**settings, "training.learning_rate": 2e-2}, fresh=True)
    assert recorder.started == (0, 0, 5)
    assert conversion.step == 5
    assert steps_in(tmp_path / "run") == [1, 2, 3, 4, 5]
    assert (tmp_path / "run" / "notes.txt").read_text() == "mine"
    assert theirs.read_text() == "a copy that somebody keeps"


@pytest.mark.parametrize("kind", ["link", "file"])
def test_a_mark_of_deletion_that_is_no_folder_deletes_nothing(settings, tmp_path, kind):
    conversion, _ = run(settings)
    mark, elsewhere = tmp_path / "run" / ".deleted", tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "notes.txt").write_text("mine")
    mark.symlink_to(elsewhere) if kind == "link" else mark.write_text("mine")
    _, recorder = run(settings)
    assert any("all 5 steps are done" in note for note in recorder.notes)
    with pytest.raises(UserError, match=r"\.deleted: not a folder"):
        run(settings, fresh=True)
    assert (tmp_path / "run" / "adapter.gguf").exists() and (elsewhere / "notes.txt").exists()
    assert conversion.step == 5


def test_the_text_is_tokenised_once_for_a_run_its_measures_and_what_resumes_it(settings, tmp_path):
    _, recorder = run(settings, evaluate_on=4)
    assert recorder.tokenised[0][0] == 0 and recorder.tokenised[-1] == (len(TEXT), len(TEXT))
    assert sum(done == 0 for done, _ in recorder.tokenised) == 1
    for options in ({}, {"evaluate_on": 4}, {"fresh": True}):
        _, recorder = run(settings, **options)
        assert recorder.tokenised == []
    assert len(list((tmp_path / "run" / "tokens").iterdir())) == 1


def test_a_run_with_kept_tokens_ends_with_the_same_bytes(settings, tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    run(settings)
    first = (tmp_path / "run" / "adapter.safetensors").read_bytes()
    _, recorder = run(settings, fresh=True)
    assert recorder.tokenised == []
    assert (tmp_path / "run" / "adapter.safetensors").read_bytes() == first


def test_a_run_that_is_refused_for_its_text_keeps_the_tokens_of_the_old_one(settings, tmp_path):
    run(settings)
    (tmp_path / "text.txt").write_text(TEXT + "more of it ")
    for _ in range(2):
        with pytest.raises(UserError, match="training data"):
            run(settings)
    assert len(list((tmp_path / "run" / "tokens").iterdir())) == 2
    (tmp_path / "text.txt").write_text(TEXT)
    _, recorder = run(settings)
    assert recorder.tokenised == []
    assert len(list((tmp_path / "run" / "tokens").iterdir())) == 1


def test_a_run_interrupted_while_it_tokenises_leaves_no_tokens(settings, tmp_path):
    class Interrupting(Recorder):
        def tokenise(self, done_bytes, total_bytes):
            if done_bytes:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_conversion(load_config(overrides=settings), Interrupting())
    assert list((tmp_path / "run" / "tokens").iterdir()) == []
    _, recorder = run(settings)
    assert recorder.tokenised


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"training.learning_rate": 2e-2}, "training.learning_rate (0.01 there, 0.02 here)"),
        ({"model.qlora_rank": 3}, "model.qlora_rank (2 there, 3 here)"),
        ({"training.seed": 1}, "training.seed (0 there, 1 here)"),
    ],
)
def test_other_settings_are_refused_by_name_with_the_way_out(settings, change, named):
    run(settings)
    with pytest.raises(UserError) as caught:
        run({**settings, **change})
    assert named in str(caught.value)
    assert "--fresh" in str(caught.value)


def test_other_data_are_refused(settings, tmp_path):
    run(settings)
    (tmp_path / "text.txt").write_text(TEXT + "more")
    with pytest.raises(UserError, match="training data"):
        run(settings)


def test_another_base_is_refused(settings, tiny_model):
    run(settings)
    other = tiny_model(L=1, C=32, H=2, G=1, F=32, type="Q4_0", seed=9)
    with pytest.raises(UserError, match="base model"):
        run({**settings, "model.base_model": str(other)})


def test_a_base_that_is_overwritten_while_it_is_used_is_noticed_before_anything_is_saved(settings, tmp_path):
    base = tmp_path / "base.gguf"
    shutil.copy(settings["model.base_model"], base)
    content = base.read_bytes()
    settings = {**settings, "model.base_model": str(base), "training.checkpoint_every": 2}

    class Overwriting(Recorder):
        def step(self, metrics):
            super().step(metrics)
            if metrics.step == 2:
                os.utime(base)  # touched, and the same
            if metrics.step == 3:
                with base.open("r+b") as file:
                    file.seek(len(content) - 64)
                    file.write(bytes(64))

    with pytest.raises(UserError, match="overwritten while the run used it"):
        run_conversion(load_config(overrides=settings), Overwriting())
    assert not (tmp_path / "run" / "adapter.gguf").exists()
    with base.open("r+b") as file:
        file.write(content)
    _, recorder = run(settings)
    assert recorder.started[0] == 2


def test_a_base_that_is_replaced_by_another_file_changes_nothing(settings, tmp_path, tiny_model):
    base = tmp_path / "base.gguf"
    shutil.copy(settings["model.base_model"], base)
    undisturbed, _ = run({**settings, "training.output": str(tmp_path / "undisturbed")})
    settings = {**settings, "model.base_model": str(base)}

    class Replacing(Recorder):
        def step(self, metrics):
            super().step(metrics)
            if metrics.step == 2:
                shutil.copy(tiny_model(L=1, C=32, H=2, G=1, F=32, type="Q4_0", seed=9), tmp_path / "new")
                os.replace(tmp_path / "new", base)

    replaced = run_conversion(load_config(overrides=settings), Replacing())
    assert tensors_of(replaced) == tensors_of(undisturbed)


def test_the_same_base_and_data_may_be_found_elsewhere(settings, tmp_path):
    run(settings)
    moved = tmp_path / "moved.gguf"
    shutil.copy(settings["model.base_model"], moved)
    shutil.copy(tmp_path / "text.txt", tmp_path / "moved.txt")
    _, recorder = run(
        {**settings, "model.base_model": str(moved), "training.data": [str(tmp_path / "moved.txt")]}
    )
    assert recorder.started is None


def test_a_damaged_checkpoint_is_passed_over_with_a_warning(settings, tmp_path):
    run(settings)
    newest = tmp_path / "run" / "checkpoints" / "step-00000005" / "state.safetensors"
    newest.write_bytes(newest.read_bytes()[:-1])
    _, recorder = run(settings)
    assert recorder.started[0] == 4
    assert any("damaged" in warning for warning in recorder.warnings)


def test_a_damaged_checkpoint_does_not_count_among_those_that_are_kept(settings, tmp_path):
    run({**settings, "training.checkpoint_every": 2})
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "step-00000005" / "state.safetensors").unlink()
    run(settings)
    assert sorted(os.listdir(checkpoints)) == ["latest", "step-00000004", "step-00000005"]
    (checkpoints / "step-00000005" / "state.safetensors").unlink()
    _, recorder = run(settings)
    assert recorder.started[0] == 4


def test_what_a_killed_save_did_not_delete_goes_with_the_next_start(settings, tmp_path):
    """Also where all steps were taken, and nothing is saved any more."""
    run(settings)
    checkpoints = tmp_path / "run" / "checkpoints"
    for name in ("step-00000001", "step-00000002", ".unfinished-123"):
        shutil.copytree(checkpoints / "step-00000004", checkpoints / name)
    run(settings)
    assert sorted(os.listdir(checkpoints)) == ["latest", "step-00000004", "step-00000005"]


@pytest.mark.parametrize("fresh", [True, False])
def test_a_run_that_was_killed_while_it_was_deleted_is_never_resumed(settings, tmp_path, monkeypatch, fresh):
    run(settings)

    unlink = earlier_run.Path.unlink

    def killed(path, missing_ok=False):
        if path.name == "metrics.jsonl":
            raise KeyboardInterrupt
        unlink(path, missing_ok)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(earlier_run.Path, "unlink", killed)
        run(settings, fresh=True)
    _, recorder = run(settings, fresh=fresh)
    assert recorder.started == (0, 0, 5)
    assert steps_in(tmp_path / "run") == [1, 2, 3, 4, 5]
    assert not (tmp_path / "run" / ".deleted").exists()


def test_a_deletion_that_is_killed_anywhere_has_left_all_or_can_be_finished(settings, tmp_path, monkeypatch):
    run(settings)
    operations = ("mkdir", "rename", "unlink", "rmdir", "open", "scandir")
    at = n_halves = 0
    while True:
        folder = tmp_path / f"copy{at}"
        shutil.copytree(tmp_path / "run", folder)
        (folder / "notes.txt").write_text("mine")
        whole = sorted(folder.rglob("*"))
        count = 0

        def watched(original, *arguments, **options):
            nonlocal count
            count += 1
            if count - 1 == at:  # noqa: B023 -- called in this round only
                raise KeyboardInterrupt
            return original(*arguments, **options)

        with monkeypatch.context() as patch:
            for name in operations:
                patch.setattr(os, name, functools.partial(watched, getattr(os, name)))
            try:
                delete_run(folder)
            except KeyboardInterrupt:
                pass
            else:
                break
        if is_half_deleted(folder):
            n_halves += 1
            delete_run(folder)
            assert sorted(path.name for path in folder.iterdir()) == [".lock", ".pid", "notes.txt", "tokens"]
        else:
            assert sorted(folder.rglob("*")) == whole or not (folder / "checkpoints").exists()
        at += 1
    assert n_halves > 10


# -- divergence -------------------------------------------------------------------------------------------


@pytest.fixture
def diverging(monkeypatch):
    """A function: from a step on the loss is not finite wherever the learning rate is above a limit."""

    def above(limit, from_step):
        masked_terms = ConversionTrainer._masked_terms

        def terms(self, batch, causal_ratio):
            found = masked_terms(self, batch, causal_ratio)
            bad = self.step_count >= from_step and self.learning_rate > limit
            return dataclasses.replace(found, loss=float("nan")) if bad else found

        monkeypatch.setattr(ConversionTrainer, "_masked_terms", terms)

    return above


def rates_in(folder):
    return [json.loads(line)["learning_rate"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


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


# -- refusals ---------------------------------------------------------------------------------------------


def test_too_little_memory_or_disk_is_refused_before_anything_is_read(settings, tmp_path, monkeypatch):
    run(settings)
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}

    def read(*_, **__):
        raise AssertionError("the text was read")

    monkeypatch.setattr(convert, "TextDataLoader", read)
    for change in ({"model.qlora_rank": 10**7}, {"training.batch_size": 10**9}, {"hardware.memory_mib": 1}):
        if "hardware.memory_mib" in change:
            change["training.sequence_length"] = 200
        with pytest.raises(UserError, match=r"not enough memory|memory_mib is 1") as caught:
            run({**settings, **change}, fresh=True)
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(requirements, "disk_free", lambda folder: 64 * 1024)
    with pytest.raises(UserError, match="64 KiB are free"):
        run({**settings, "model.qlora_rank": 64}, fresh=True)
    after = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    after.pop(tmp_path / "run" / ".pid"), before.pop(tmp_path / "run" / ".pid")
    assert after == before


def test_memory_disk_and_time_are_told_in_a_line_each(settings):
    _, recorder = run(settings)
    for word in ("memory: ", "disk: ", "time: "):
        assert sum(note.startswith(word) for note in recorder.notes) == 1
    assert (
        next(note for note in recorder.notes if note.startswith("time: "))
        .split("s a step, ")[1]
        .startswith("3 steps")
    )


def test_documents_of_white_space_or_one_character_are_a_warning(settings, tmp_path):
    texts = [TEXT, " \t\n \u3000 ", "x", " y\n", "no", ""]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "text.jsonl").write_text(lines)
    _, recorder = run({**settings, "training.data": [str(tmp_path / "text.jsonl")]})
    assert recorder.warnings == [
        "1 documents without text were left out",
        "3 documents hold nothing but white space or a single character",
    ]


def test_a_rank_above_a_dimension_is_a_warning(settings):
    _, recorder = run({**settings, "model.qlora_rank": 20})
    assert recorder.warnings == [
        "rank 20 is more than the smaller dimension of k_proj (16), v_proj (16): it adds nothing there"
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model.base_model": None}, "which model"),
        ({"training.data": None}, "which text"),
        ({"training.output": None}, "where to"),
        ({"training.sequence_length": 1000}, "sequence_length 1000 is longer than the context"),
        ({"model.mask_token_id": 100_000}, "mask_token_id 100000"),
        ({"model.base_model": "/nowhere/model.gguf"}, "/nowhere/model.gguf"),
        ({"training.data": ["/nowhere/text.txt"]}, "/nowhere/text.txt"),
    ],
)
def test_what_cannot_be_used_is_named_in_one_line(settings, change, message):
    with pytest.raises(UserError) as caught:
        run({**settings, **change})
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_evaluating_without_held_out_text_is_refused(settings):
    with pytest.raises(UserError, match="held_out_fraction is 0"):
        run({**settings, "training.held_out_fraction": 0.0}, evaluate_on=4)


def test_an_output_folder_that_is_a_file_is_refused(settings, tmp_path):
    (tmp_path / "run").write_text("a file")
    with pytest.raises(UserError, match="output folder"):
        run(settings)


def test_a_refused_run_leaves_the_earlier_one_as_it_was(settings, tmp_path, monkeypatch):
    run(settings)

    def refuse(model, tokenizer):
        raise UserError("computed differently")

    monkeypatch.setattr(convert, "check_identity", refuse)
    with pytest.raises(UserError, match="computed differently"):
        run(settings, fresh=True)
    assert steps_in(tmp_path / "run") == [1, 2, 3, 4, 5]


HOLDER = """
import sys, time
from pathlib import Path
from ggml_diffusion.training.run_lock import exclusive
with exclusive(Path(sys.argv[1]), print):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_second_run_in_the_same_folder_is_refused_and_the_first_ones_pid_named(settings, tmp_path):
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / "run")], stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout.readline().strip() == "held"
        with pytest.raises(UserError, match=f"process {holder.pid} "):
            run(settings)
    finally:
        holder.kill()
        holder.wait()
    run(settings)  # the lock died with its holder


def test_a_named_pipe_in_the_place_of_the_lock_is_one_line(settings, tmp_path):
    (tmp_path / "run").mkdir()
    os.mkfifo(tmp_path / "run" / ".lock")
    with pytest.raises(UserError, match="a named pipe, not a file"):
        run(settings)


# -- the identity gate --------------------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["bpe", "spm"])
def test_the_gate_lets_a_right_model_pass_and_says_how_close_it_is(tiny_model, tokenizer):
    path = tiny_model(type="Q4_0", tokenizer=tokenizer)
    with Q4Model.from_gguf(path, 1) as model:
        report = check_identity(model, Tokenizer.from_gguf(path))
    assert 0 <= report.mean_kl < 0.05
    assert report.n_tokens > 24
    assert "passed" in str(report)


class Wrong:
    """An engine that computes something else than the file says."""

    def __init__(self, model):
        self._model = model

    def __getattr__(self, name):
        return getattr(self._model, name)

    def logits(self, batch):
        return self._model.logits(Batch(batch.tokens[:, ::-1], batch.causal_ratio))


def test_the_gate_refuses_a_model_that_is_computed_differently(tiny_model):
    path = tiny_model(type="Q4_0")
    with (
        Q4Model.from_gguf(path, 1) as model,
        pytest.raises(UserError, match="computes the model differently"),
    ):
        check_identity(Wrong(model), Tokenizer.from_gguf(path))


def test_the_gate_names_a_model_that_llama_cpp_cannot_run(tiny_model, tmp_path):
    path = tmp_path / "model.gguf"
    shutil.copy(tiny_model(type="Q4_0"), path)
    tokenizer = Tokenizer.from_gguf(path)
    with Q4Model.from_gguf(path, 1) as model:
        path.rename(tmp_path / "elsewhere.gguf")
        with pytest.raises(UserError, match="cannot run this model"):
            check_identity(model, tokenizer)


def test_a_run_with_the_gate_reports_it_in_a_line(settings):
    _, recorder = run(settings)
    assert sum("identity gate passed" in note for note in recorder.notes) == 1


def test_mean_kl_of_the_gate_is_the_definition():
    rng = np.random.default_rng(0)
    p, q = rng.normal(size=(2, 5, 7)).astype(np.float32)
    expected = []
    for a, b in zip(p, q, strict=True):
        pa, pb = np.exp(a) / np.exp(a).sum(), np.exp(b) / np.exp(b).sum()
        expected.append((pa * np.log(pa / pb)).sum())
    assert mean_kl_divergence(p, q) == pytest.approx(np.mean(expected), rel=1e-5)
    assert mean_kl_divergence(p, p) == 0.0
    assert np.isnan(mean_kl_divergence(p, np.full_like(q, np.nan)))
