"""Training states on disk: no crash, failing disk or damaged file loses more than the newest checkpoint."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conversions import conversion, refusal

from ggml_diffusion.errors import UserError
from ggml_diffusion.formats import safetensors_file
from ggml_diffusion.formats.adapter_file import DiffusionCheckpoint
from ggml_diffusion.training.checkpoint import TrainingState, load_latest, save_state, set_aside

DIMS = SimpleNamespace(L=1, C=8, H=2, G=1, D=4, F=8, V=20)
FILES = ("state.safetensors", "adapter.safetensors", "manifest.json")


def state_of(step: int) -> TrainingState:
    arrays = np.random.default_rng(step).standard_normal((3, 50), dtype=np.float32)
    return TrainingState(
        step=step,
        tokens_seen=step * 100,
        parameters=arrays[0],
        first_moment=arrays[1],
        second_moment=arrays[2],
        config={"seed": 0, "nested": {"rate": 1e-4}},
        base_sha256="ab" * 32,
        data_fingerprint="cd" * 32,
        extra={"learning_rate_scale": 0.5},
    )


def save(folder: Path, step: int, keep: int = 2) -> Path:
    return save_state(folder, state_of(step), conversion(DIMS, seed=step), keep)


def names(folder: Path) -> list[str]:
    return sorted(os.listdir(folder))


def assert_whole(folder: Path, step: int) -> list[str]:
    """The newest whole checkpoint is that of `step`, with all that was saved; returns the warnings."""
    loaded = load_latest(folder)
    assert loaded is not None
    expected = state_of(step)
    for field in ("step", "tokens_seen", "config", "base_sha256", "data_fingerprint", "extra"):
        assert getattr(loaded.state, field) == getattr(expected, field)
    for field in ("parameters", "first_moment", "second_moment"):
        assert np.array_equal(getattr(loaded.state, field), getattr(expected, field))
    tensors = conversion(DIMS, seed=step).tensors
    assert loaded.checkpoint.tensors.keys() == tensors.keys()
    assert all(np.array_equal(loaded.checkpoint.tensors[name], tensors[name]) for name in tensors)
    return loaded.warnings


def test_a_state_comes_back_as_it_was_saved(tmp_path: Path):
    folder = tmp_path / "deep" / "checkpoints"
    saved = save(folder, 7)
    assert saved.name == "step-00000007"
    assert (folder / "latest").read_text() == "step-00000007\n"
    assert names(saved) == sorted(FILES)
    assert assert_whole(folder, 7) == []


def test_a_checkpoint_can_be_used_as_a_conversion(tmp_path: Path):
    saved = save(tmp_path, 7)
    assert DiffusionCheckpoint.load(saved / "adapter.safetensors").metadata == conversion(DIMS).metadata


def test_the_manifest_holds_size_and_sum_of_each_file(tmp_path: Path):
    saved = save(tmp_path, 7)
    manifest = json.loads((saved / "manifest.json").read_text())
    for name in FILES[:2]:
        content = (saved / name).read_bytes()
        assert manifest["files"][name] == {
            "bytes": len(content),
            "sha256": hashlib.sha256(content).hexdigest(),
        }


def test_without_checkpoints_there_is_nothing_to_load(tmp_path: Path):
    assert load_latest(tmp_path) is None
    assert load_latest(tmp_path / "none") is None


def test_only_the_newest_are_kept_and_never_fewer_than_two(tmp_path: Path):
    for step in range(1, 6):
        save(tmp_path / "two", step)
        save(tmp_path / "three", step, keep=3)
        save(tmp_path / "one", step, keep=1)
    assert names(tmp_path / "two") == ["latest", "step-00000004", "step-00000005"]
    assert names(tmp_path / "one") == ["latest", "step-00000004", "step-00000005"]
    assert names(tmp_path / "three") == ["latest", "step-00000003", "step-00000004", "step-00000005"]


def test_after_going_back_the_run_resumes_from_where_it_went_back_to(tmp_path: Path):
    for step in (10, 20, 30):
        save(tmp_path, step, keep=3)
    assert save(tmp_path, 20, keep=3).name == "step-00000020-1"
    assert assert_whole(tmp_path, 20) == []
    assert (tmp_path / "latest").read_text() == "step-00000020-1\n"
    assert "step-00000020-1" in names(tmp_path)


def test_steps_are_compared_as_numbers(tmp_path: Path):
    save(tmp_path, 99_999_999)
    save(tmp_path, 100_000_000)
    (tmp_path / "latest").unlink()
    assert_whole(tmp_path, 100_000_000)


@pytest.mark.parametrize("content", [None, b"", b"step-00000099\n", b"../..\n", b"\xff\xfe\0", b"x" * 10_000])
def test_a_lost_or_damaged_pointer_does_no_harm(tmp_path: Path, content: bytes | None):
    save(tmp_path, 1)
    save(tmp_path, 2)
    (tmp_path / "latest").unlink()
    if content is not None:
        (tmp_path / "latest").write_bytes(content)
    assert assert_whole(tmp_path, 2) == []


@pytest.mark.parametrize("name", FILES)
def test_flipped_bits_are_noticed_and_the_checkpoint_before_is_loaded(tmp_path: Path, name: str):
    save(tmp_path, 1)
    path = save(tmp_path, 2) / name
    content = path.read_bytes()
    generator = np.random.default_rng(0)
    for position in generator.integers(
        0, len(content) - 1, 40
    ):  # the last byte of the manifest is white space
        changed = bytearray(content)
        changed[position] ^= 1 << generator.integers(0, 8)
        path.write_bytes(changed)
        if name == "manifest.json" and json_equal(changed, content):
            continue
        (warning,) = assert_whole(tmp_path, 1)
        assert "damaged" in warning
        assert "step-00000002" in warning
        assert warning.isprintable()


def json_equal(first: bytes, second: bytes) -> bool:
    """Whether two JSON texts say the same: one white space may have become another."""
    try:
        return json.loads(first) == json.loads(second)
    except ValueError:
        return False


@pytest.mark.parametrize("name", FILES)
def test_truncated_and_missing_files_are_noticed(tmp_path: Path, name: str):
    save(tmp_path, 1)
    path = save(tmp_path, 2) / name
    content = path.read_bytes()
    for length in (0, 1, len(content) // 2, len(content) - 2):
        path.write_bytes(content[:length])
        assert len(assert_whole(tmp_path, 1)) == 1
    path.unlink()
    assert len(assert_whole(tmp_path, 1)) == 1


def test_what_is_set_aside_does_not_count_among_those_that_are_kept(tmp_path: Path):
    save(tmp_path, 1)
    (save(tmp_path, 2) / "state.safetensors").unlink()
    loaded = load_latest(tmp_path)
    assert [path.name for path in loaded.damaged] == ["step-00000002"]
    set_aside(loaded.damaged)
    assert names(tmp_path) == [".damaged-step-00000002", "latest", "step-00000001"]
    assert assert_whole(tmp_path, 1) == []
    save(tmp_path, 2)  # the whole one of step 1 stays beside it
    assert names(tmp_path) == ["latest", "step-00000001", "step-00000002"]


def test_setting_aside_again_what_was_damaged_again_does_no_harm(tmp_path: Path):
    for _ in range(2):
        (tmp_path / ".damaged-step-00000002").mkdir(exist_ok=True)
        save(tmp_path, 1)
        (save(tmp_path, 2) / "state.safetensors").unlink()
        set_aside(load_latest(tmp_path).damaged)
        assert_whole(tmp_path, 1)
    set_aside([tmp_path / "step-00000009"])  # gone already


def test_if_every_checkpoint_is_damaged_that_is_said(tmp_path: Path):
    for step in (1, 2):
        (save(tmp_path, step) / "state.safetensors").unlink()
    message = refusal(lambda: load_latest(tmp_path))
    assert "all 2 checkpoints are damaged" in message
    assert "step-00000002" in message


def test_a_state_with_its_sums_right_but_its_content_wrong_is_refused(tmp_path: Path):
    broken = state_of(1)
    broken.second_moment = broken.second_moment[:-1]
    save_state(tmp_path / "length", broken, conversion(DIMS))
    assert "three vectors of one length" in refusal(lambda: load_latest(tmp_path / "length"))
    broken = state_of(1)
    broken.tokens_seen = "many"
    save_state(tmp_path / "kind", broken, conversion(DIMS))
    assert "metadata key 'tokens_seen' is missing or no int" in refusal(
        lambda: load_latest(tmp_path / "kind")
    )


def test_a_state_that_is_not_finite_is_not_saved(tmp_path: Path):
    save(tmp_path, 1)
    broken = state_of(2)
    broken.first_moment[3] = np.nan
    message = refusal(lambda: save_state(tmp_path, broken, conversion(DIMS)))
    assert "the checkpoint of step 2 was not saved" in message
    assert "'first_moment' holds NaN" in message
    assert names(tmp_path) == ["latest", "step-00000001"]


FILE_OPERATIONS = ("mkdir", "open", "fsync", "close", "rename", "replace", "unlink", "rmdir", "scandir")


def interrupt(
    set_attribute: Callable[[object, str, object], None], at: int, strike: Callable[[str, tuple], None]
) -> Callable[[], int]:
    """Count the file operations of this process, and call `strike` instead of the one with number `at`."""
    count = 0

    def watch(owner: object, name: str) -> None:
        original = getattr(owner, name)

        def watched(*arguments: object, **options: object) -> object:
            nonlocal count
            count += 1
            if count - 1 == at:
                strike(name, arguments)
            return original(*arguments, **options)

        set_attribute(owner, name, watched)

    for name in FILE_OPERATIONS:
        watch(os, name)
    watch(safetensors_file, "save_file")
    watch(Path, "write_text")
    return lambda: count


def write_half(name: str, arguments: tuple) -> None:
    """What a write leaves behind that is interrupted in its middle."""
    if name == "save_file":
        Path(arguments[1]).write_bytes(b"\x10\0\0\0")
    elif name == "write_text":
        Path(arguments[0]).write_bytes(b"{")


def killed_while_saving(folder: Path, step: int, at: int) -> bool:
    """Save in a child process that dies at its file operation number `at`; whether it came that far."""
    child = os.fork()
    if child == 0:

        def die(name: str, arguments: tuple) -> None:
            write_half(name, arguments)
            os._exit(9)

        try:
            interrupt(setattr, at, die)
            save(folder, step)
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_a_process_killed_at_any_file_operation_leaves_a_whole_checkpoint(tmp_path: Path):
    at, steps_found = 0, set()
    while True:
        folder = tmp_path / str(at)
        save(folder, 1)
        save(folder, 2)
        if not killed_while_saving(folder, 3, at):
            break
        loaded = load_latest(folder)
        assert loaded is not None
        steps_found.add(loaded.state.step)
        assert assert_whole(folder, loaded.state.step) == []
        save(folder, 3)  # the next start saves again, and clears away what was left
        assert assert_whole(folder, 3) == []
        assert len([name for name in names(folder) if name.startswith("step-")]) == 2
        assert all(
            name == "latest" or name.startswith("step-") for name in names(folder) if ".tmp" not in name
        )
        at += 1
    assert at > 20  # it was interrupted at that many places
    assert steps_found == {2, 3}


def test_a_failing_disk_leaves_the_old_checkpoint_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    at = failures = 0

    def fail(name: str, arguments: tuple) -> None:
        write_half(name, arguments)
        raise OSError(28, "No space left on device")

    while True:
        folder = tmp_path / str(at)
        save(folder, 1)
        save(folder, 2)
        failure = None
        with monkeypatch.context() as patch:
            count = interrupt(patch.setattr, at, fail)
            try:
                save(folder, 3)
            except UserError as error:
                failure = str(error)
        if failure is None:
            assert_whole(folder, 3)
        else:
            failures += 1
            assert "No space left on device" in failure
            assert not [name for name in names(folder) if name.startswith(".")]
            step = load_latest(folder).state.step
            assert_whole(folder, step)
            assert step == 2 or "latest" in failure or not (folder / "step-00000001").exists()
        if count() <= at:
            break
        at += 1
    assert failures > 15


def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path):
    (tmp_path / "checkpoints").write_text("a file is in the way")
    message = refusal(lambda: save(tmp_path / "checkpoints", 1))
    assert "the checkpoint of step 1 was not saved" in message
