"""The state of a run on disk: saved so that no crash loses it, loaded only if it is whole.

A checkpoint is a folder: `state.safetensors` (what the optimizer needs to continue), `adapter.safetensors`
(the conversion as it stands) and `manifest.json` (size and SHA-256 of both). It is written under a temporary
name, flushed, renamed to `step-NNNNNNNN`, and only then does the file `latest` name it. Loading starts from
`latest` and falls back to the next older checkpoint when one is damaged.

Deliberately not here: when to save, and whether a state belongs to the run (run.py). Randomness needs no
state: it is drawn from (seed, step). Source: rename and fsync order as in SQLite's atomic commit.
"""

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggml_diffusion.durable import fsync_path, replace_file
from ggml_diffusion.errors import UserError, quoted
from ggml_diffusion.formats.adapter_file import CheckpointMetadata, DiffusionCheckpoint
from ggml_diffusion.formats.model_file import file_sha256
from ggml_diffusion.formats.safetensors_file import parse_object, read_safetensors, write_safetensors
from ggml_diffusion.regular_file import open_regular

__all__ = [
    "CheckpointMetadata",
    "DiffusionCheckpoint",
    "LoadedCheckpoint",
    "TrainingState",
    "delete_checkpoints",
    "delete_older",
    "load_latest",
    "save_state",
    "set_aside",
]

KEPT = 2  # checkpoints: a damaged one never is the only one

_FORMAT = 1
_ARRAYS = ("parameters", "first_moment", "second_moment")
_STATE_KEYS: dict[str, type] = {
    "step": int,
    "tokens_seen": int,
    "config": dict,
    "base_sha256": str,
    "data_fingerprint": str,
    "extra": dict,
}
_STATE_FILE, _ADAPTER_FILE, _MANIFEST_FILE = "state.safetensors", "adapter.safetensors", "manifest.json"
_LATEST_FILE = "latest"
_MAX_MANIFEST_BYTES = 1 << 16
_FOLDER_NAME = re.compile(r"step-(\d{8,})(?:-(\d+))?")
_UNFINISHED_PREFIX, _DAMAGED_PREFIX = ".unfinished-", ".damaged-"

# Faults of the disk or its permissions, which may be over by the next time; a missing or cut file is damage.
_CANNOT_READ = (
    errno.EIO,
    errno.EACCES,
    errno.EPERM,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EMFILE,
    errno.ENOMEM,
)


@dataclass
class TrainingState:
    """What a run needs to continue exactly where it was, beside its settings and data.

    Attributes:
        step: optimizer steps done.
        tokens_seen: tokens that went through the model.
        parameters: (n,) float32, everything that is trained, as `ParameterStore.flat`.
        first_moment: (n,) float32, AdamW's mean of the gradient.
        second_moment: (n,) float32, AdamW's mean of the squared gradient.
        config: the resolved settings, as plain JSON values.
        base_sha256: of the base GGUF.
        data_fingerprint: of the token stream.
        extra: whatever else the trainer keeps, as plain JSON values.

    """

    step: int
    tokens_seen: int
    parameters: NDArray[np.float32]
    first_moment: NDArray[np.float32]
    second_moment: NDArray[np.float32]
    config: dict[str, Any]
    base_sha256: str
    data_fingerprint: str
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass
class LoadedCheckpoint:
    """A whole checkpoint, and the newer ones that were not, with a sentence about each."""

    folder: Path
    state: TrainingState
    checkpoint: DiffusionCheckpoint
    warnings: list[str]
    damaged: list[Path]


def save_state(
    folder: str | Path, state: TrainingState, checkpoint: DiffusionCheckpoint, keep: int = KEPT
) -> Path:
    """Save a checkpoint durably, then delete all but the newest `keep`.

    Args:
        folder: the run's `checkpoints` folder; made if it is missing.
        state: for resuming.
        checkpoint: for using the conversion as it stands.
        keep: how many checkpoints stay, at least 2.

    Returns:
        The new checkpoint's folder.

    Raises:
        UserError: it could not be saved; the checkpoints from before are as they were.

    """
    folder = Path(folder)
    temporary = folder / f"{_UNFINISHED_PREFIX}{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _delete_all(folder, _UNFINISHED_PREFIX)
        temporary.mkdir()
        _write_files(temporary, state, checkpoint)
        saved = _unused_name(folder, state.step)
        os.rename(temporary, saved)
        fsync_path(folder)
    except (OSError, UserError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = error if isinstance(error, UserError) else error.strerror or error
        raise UserError(f"{folder}: the checkpoint of step {state.step} was not saved: {reason}") from error
    replace_file(folder / _LATEST_FILE, lambda path: _write_text(path, saved.name + "\n"))
    delete_older(folder, saved, keep)
    _delete_all(folder, _DAMAGED_PREFIX)
    return saved


def delete_older(folder: str | Path, newest: Path, keep: int = KEPT) -> None:
    """Delete all checkpoints but the newest `keep`, and what a killed process left of one."""
    folder = Path(folder)
    for old in [other for other in _newest_first(folder) if other != newest][max(keep, 2) - 1 :]:
        shutil.rmtree(old, ignore_errors=True)
    _delete_all(folder, _UNFINISHED_PREFIX)


def saved_in(folder: Path) -> list[Path]:
    """All that runs saved into a folder of checkpoints, whole or not; what somebody else put there is not.

    Raises:
        OSError: the folder cannot be listed.

    """

    def is_ours(path: Path) -> bool:
        if path.name in (_LATEST_FILE, f".{_LATEST_FILE}.tmp"):
            return True
        has_our_name = path.name.startswith((_UNFINISHED_PREFIX, _DAMAGED_PREFIX)) or _FOLDER_NAME.fullmatch(
            path.name
        )
        return bool(has_our_name) and path.is_dir() and not path.is_symlink()

    return [path for path in folder.iterdir() if is_ours(path)]


def delete_checkpoints(folder: Path) -> None:
    """Delete all that was saved into a folder, and the folder where nothing else is in it.

    Raises:
        OSError: something cannot be deleted.

    """
    for path in saved_in(folder):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    with contextlib.suppress(OSError):  # somebody's files, or a link to the folder
        folder.rmdir()


def load_latest(folder: str | Path, before: int | None = None) -> LoadedCheckpoint | None:
    """Load the newest whole checkpoint of a run: the one `latest` names, else the one of the highest step.

    Args:
        folder: of the checkpoints.
        before: a step; those of this one and later are passed over as if they were damaged. None = none are.

    Returns:
        None if the folder holds no checkpoint at all, or none before that step.

    Raises:
        UserError: there are checkpoints, but every one is damaged; or one cannot be read, which says nothing
            of what is in it.

    """
    folder = Path(folder)
    try:
        candidates = _listed(folder)
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed: {error.strerror}") from None
    latest = folder / _read_latest(folder)
    if latest in candidates:
        candidates.remove(latest)
        candidates.insert(0, latest)
    warnings: list[str] = []
    for number, candidate in enumerate(candidates):
        if before is not None and _step_of(candidate) >= before:
            continue
        try:
            state, checkpoint = _load(candidate)
        except UserError as error:
            if _is_unread(error):
                raise
            warnings.append(f"a damaged checkpoint is left out: {error}")
        else:
            return LoadedCheckpoint(candidate, state, checkpoint, warnings, candidates[:number])
    if not warnings:
        return None
    raise UserError(f"{folder}: all {len(candidates)} checkpoints are damaged; the newest: {warnings[0]}")


def set_aside(checkpoints: Iterable[Path]) -> None:
    """Let damaged checkpoints no longer count among those that are kept; the next save deletes them."""
    for path in checkpoints:
        aside = path.with_name(_DAMAGED_PREFIX + path.name)
        shutil.rmtree(aside, ignore_errors=True)
        with contextlib.suppress(OSError):  # then it counts, and is passed over again
            os.rename(path, aside)


def _write_files(folder: Path, state: TrainingState, checkpoint: DiffusionCheckpoint) -> None:
    document = {"format": _FORMAT} | {key: getattr(state, key) for key in _STATE_KEYS}
    write_safetensors(folder / _STATE_FILE, {name: getattr(state, name) for name in _ARRAYS}, document)
    checkpoint.save(folder / _ADAPTER_FILE)
    _write_text(folder / _MANIFEST_FILE, json.dumps(_manifest(folder), indent=1) + "\n")
    fsync_path(folder / _MANIFEST_FILE)
    fsync_path(folder)


def _load(folder: Path) -> tuple[TrainingState, DiffusionCheckpoint]:
    manifest_path = folder / _MANIFEST_FILE
    try:
        with open_regular(manifest_path) as file:
            text = file.read(_MAX_MANIFEST_BYTES)
    except OSError as error:
        raise UserError(f"{manifest_path}: cannot be read: {error.strerror}") from None
    manifest = parse_object(manifest_path, text, "its content")
    if manifest != _manifest(folder):
        raise UserError(f"{folder}: its files do not have the sizes and sums of its {_MANIFEST_FILE}")
    return _read_state(folder / _STATE_FILE), DiffusionCheckpoint.load(folder / _ADAPTER_FILE)


def _read_state(path: Path) -> TrainingState:
    arrays, document = read_safetensors(path)
    if document.pop("format", None) != _FORMAT:
        raise UserError(f"{path}: is no training state of format {_FORMAT}")
    for key, kind in _STATE_KEYS.items():
        if not isinstance(document.get(key), kind):
            raise UserError(f"{path}: metadata key '{key}' is missing or no {kind.__name__}")
    for key in document:
        if key not in _STATE_KEYS:
            raise UserError(f"{path}: metadata key {quoted(key)} is unknown")
    shapes = {name: array.shape for name, array in arrays.items()}
    if sorted(shapes) != sorted(_ARRAYS) or len(set(shapes.values())) != 1 or arrays["parameters"].ndim != 1:
        raise UserError(f"{path}: expected three vectors of one length, found {quoted(str(shapes))}")
    fields: dict[str, Any] = {**document, **arrays}
    return TrainingState(**fields)


def _manifest(folder: Path) -> dict[str, Any]:
    """What `manifest.json` must say about the files as they are."""
    files = {}
    for name in (_STATE_FILE, _ADAPTER_FILE):
        sha256 = file_sha256(folder / name)  # raises if the file is missing
        files[name] = {"bytes": (folder / name).stat().st_size, "sha256": sha256}
    return {"format": _FORMAT, "files": files}


def _newest_first(folder: Path) -> list[Path]:
    """As `_listed`; none where that fails."""
    try:
        return _listed(folder)
    except OSError:
        return []


def _listed(folder: Path) -> list[Path]:
    """Checkpoint folders, the highest step first; of equal steps, the one saved later."""
    found = []
    try:
        paths = list(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
    for path in paths:
        match = _FOLDER_NAME.fullmatch(path.name)
        if match and path.is_dir():
            found.append((int(match[1]), int(match[2] or 0), path))
    return [path for _, _, path in sorted(found, reverse=True)]


def _step_of(folder: Path) -> int:
    match = _FOLDER_NAME.fullmatch(folder.name)
    assert match is not None
    return int(match[1])


def _is_unread(error: BaseException | None) -> bool:
    """Whether an error came of a file that is there and cannot be read, by what it was raised for."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in _CANNOT_READ:
            return True
        error = error.__cause__ or error.__context__
    return False


def _unused_name(folder: Path, step: int) -> Path:
    """`step-N`, or `step-N-1`... where that step was saved before: a run may go back to an older one."""
    name, count = f"step-{step:08d}", 0
    while (folder / (name if count == 0 else f"{name}-{count}")).exists():
        count += 1
    return folder / (name if count == 0 else f"{name}-{count}")


def _read_latest(folder: Path) -> str:
    try:
        with open_regular(folder / _LATEST_FILE) as file:
            return file.read(100).decode("utf-8", errors="replace").strip()
    except (UserError, OSError):
        return ""


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


def _delete_all(folder: Path, prefix: str) -> None:
    """Clear away what a killed process left, or what was set aside."""
    with contextlib.suppress(OSError):
        for path in folder.glob(f"{prefix}*"):
            shutil.rmtree(path, ignore_errors=True)
