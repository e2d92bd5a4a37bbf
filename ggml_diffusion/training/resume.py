"""Saving a run so that it can be resumed, and resuming it with the same bits as if it had never stopped.

Deliberately not here: the files (checkpoint.py), and when to save (run.py).
"""

from pathlib import Path

from ggml_diffusion.config.settings import settings_that_differ
from ggml_diffusion.errors import UserError
from ggml_diffusion.training.checkpoint import TrainingState, load_latest, save_state
from ggml_diffusion.training.trainer import ConversionTrainer


def save_run(trainer: ConversionTrainer, folder: str | Path) -> Path:
    """Save all that the run needs to be resumed, as a folder of its own inside `folder`.

    Raises:
        UserError: it could not be saved; earlier checkpoints are as they were.

    """
    return save_state(folder, trainer.state(), trainer.checkpoint())


def resume_run(trainer: ConversionTrainer, folder: str | Path) -> bool:
    """Resume from the newest whole checkpoint in `folder`.

    Returns:
        False if there is no checkpoint; the trainer is then as it was.

    Raises:
        UserError: all checkpoints are damaged; or they are of another base, other data or other settings,
            or use products that this engine does not have.

    """
    loaded = load_latest(folder)
    if loaded is None:
        return False
    for warning in loaded.warnings:
        trainer.warn(warning)
    differences = _differences(loaded.state, trainer)
    if differences:
        raise UserError(f"{folder}: the run there differs from this one in {'; '.join(differences)}")
    if loaded.state.extra["int8"] != "none" and not trainer.model.has_int8:
        raise UserError(f"{folder}: the run there uses int8 products, which this engine does not have")
    trainer.restore(loaded.state)
    return True


def _differences(state: TrainingState, trainer: ConversionTrainer) -> list[str]:
    """Why a saved state is not of the trainer's run, one phrase a difference; "there" is the saved one."""
    found = []
    if state.base_sha256 != trainer.model.sha256:
        found.append(f"base model (sha256 {state.base_sha256[:12]} there, {trainer.model.sha256[:12]} here)")
    if state.data_fingerprint != trainer.data_fingerprint:
        found.append(
            f"training data (sha256 {state.data_fingerprint[:12]} there, "
            f"{trainer.data_fingerprint[:12]} here)"
        )
    found += settings_that_differ(state.config, trainer.config)
    if state.extra.get("mask_token_id") != trainer.mask_token_id:
        found.append(f"mask token ({state.extra.get('mask_token_id')} there, {trainer.mask_token_id} here)")
    if not found and state.parameters.shape != trainer.parameters.flat.shape:
        found.append(
            f"number of parameters ({state.parameters.size} there, {trainer.parameters.flat.size} here)"
        )
    return found
