"""What an earlier run left in the output folder: its size, and how it is deleted.

Deliberately not here: the names (run_folder.py), the content of the files, and the lock (run.py).
"""

import contextlib
import shutil
from pathlib import Path

from ggml_diffusion.durable import fsync_path
from ggml_diffusion.errors import UserError
from ggml_diffusion.run_folder import BASE, CARD, CHECKPOINTS, CONFIG, EVALUATION, EXPORTS, METRICS
from ggml_diffusion.training.checkpoint import delete_checkpoints, saved_in
from ggml_diffusion.training.model_card import is_card

_DELETED = ".deleted"


def _run_files(output: Path) -> list[Path]:
    """All that runs write into their folder, but for the lock and the checkpoints."""
    names = (_DELETED, *EXPORTS, METRICS, CONFIG, EVALUATION, BASE)
    found = [output / name for name in names if (output / name).exists()]
    return found + ([output / CARD] if is_card(output / CARD) else [])


def bytes_of_run(output: Path) -> int:
    """Size of what a run left in its folder, which is replaced or deleted while it goes on."""
    total, paths = 0, _run_files(output)
    with contextlib.suppress(OSError):
        paths += saved_in(output / CHECKPOINTS)
    for path in paths:
        with contextlib.suppress(OSError):
            total += sum(each.stat().st_size for each in [path, *path.rglob("*")] if each.is_file())
    return total


def is_half_deleted(output: Path) -> bool:
    """Whether a process was killed while it deleted the run in a folder; a link or file is nobody's mark."""
    return (output / _DELETED).is_dir() and not (output / _DELETED).is_symlink()


def delete_run(output: Path) -> None:
    """Delete what earlier runs wrote into the folder, and nothing else.

    From its first moment to its last there is a folder `.deleted`: who finds it finishes the deletion
    (`is_half_deleted`), so that nobody resumes what a killed process left.

    Raises:
        UserError: something cannot be deleted.

    """
    deleted = output / _DELETED
    if deleted.is_symlink() or (deleted.exists() and not deleted.is_dir()):
        raise UserError(f"{deleted}: not a folder: delete it, so that the earlier run can be deleted")
    try:
        deleted.mkdir(exist_ok=True)
        fsync_path(output)
        if (output / CHECKPOINTS).exists():
            delete_checkpoints(output / CHECKPOINTS)
        for path in _run_files(output):
            if path != deleted:
                path.unlink()
        shutil.rmtree(deleted)
    except OSError as error:
        raise UserError(f"{output}: the earlier run cannot be deleted: {error.strerror or error}") from None
