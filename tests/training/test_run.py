"""Whole runs on tiny models: what the folder holds, resuming, signals, deletion."""

import dataclasses
import functools
import json
import os
import shutil
import signal

import pytest
import runs
from runs import TEXT, Recorder, run, steps_in, tensors_of

from ggml_diffusion.config.toml import load_config
from ggml_diffusion.errors import UserError
from ggml_diffusion.formats.adapter_file import DiffusionCheckpoint
from ggml_diffusion.training import earlier_run
from ggml_diffusion.training.earlier_run import bytes_of_run, delete_run, is_half_deleted
from ggml_diffusion.training.run import run_conversion

run_base, settings, quick_gate = runs.run_base, runs.settings, runs.quick_gate  # fixtures
pytestmark = pytest.mark.usefixtures("quick_gate")


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
    freed = bytes_of_run(tmp_path / "run")
    saved = sum(path.stat().st_size for path in (tmp_path / "run" / "checkpoints").rglob("*.safetensors"))
    assert freed > saved > 0
    (tmp_path / "run" / "notes.txt").write_text("mine")
    theirs = tmp_path / "run" / "checkpoints" / "best-so-far" / "adapter.safetensors"
    theirs.parent.mkdir()
    theirs.write_text("a copy that somebody keeps")
    assert bytes_of_run(tmp_path / "run") == freed
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
