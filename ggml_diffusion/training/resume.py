"""Saving a run so that it can be resumed, and resuming it with the same bits as if it had never stopped; and
going back to what was saved where training diverged.

Deliberately not here: the files (checkpoint.py), and when to save (run.py).
"""

from pathlib import Path

from ggml_diffusion.config.settings import settings_that_differ
from ggml_diffusion.errors import UserError
from ggml_diffusion.training.checkpoint import (
    KEPT,
    LoadedCheckpoint,
    TrainingState,
    delete_older,
    load_latest,
    save_state,
    set_aside,
)
from ggml_diffusion.training.trainer import ConversionTrainer, Diverged

MAX_ROLLBACKS = 2


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
    differences = _differences(loaded.state, trainer)
    if differences:
        raise UserError(f"{folder}: the run there differs from this one in {'; '.join(differences)}")
    if loaded.state.extra["int8"] != "none" and not trainer.model.has_int8:
        raise UserError(f"{folder}: the run there uses int8 products, which this engine does not have")
    _restore(trainer, loaded)
    chosen = trainer.config.learning_rate
    if chosen < loaded.state.config["learning_rate"]:  # the user has lowered it since
        trainer.rollbacks = 0
        trainer.lower_rate(min(chosen, trainer.learning_rate))
    return True


def roll_back(trainer: ConversionTrainer, folder: str | Path, cause: Diverged) -> None:
    """Go back to the newest whole checkpoint, or to the start, with half the learning rate, and save that.

    Where nothing was saved since the last time that the run went back, the weights that it went back to were
    broken already: then it goes to a checkpoint before them, or to the start.

    Raises:
        UserError: the run went back twice already, and says what the user can do; or as `resume_run`.

    """
    learning_rate, n_before = trainer.learning_rate / 2.0, trainer.rollbacks
    if n_before >= MAX_ROLLBACKS:
        raise UserError(
            f"{cause}, after going back {n_before} times; what was saved before is still there: go on from "
            f"it with --learning-rate {learning_rate:g} or lower, or start anew with --fresh"
        )
    loaded = load_latest(folder)
    broken: list[Path] = []
    if loaded is not None and loaded.state.step == trainer.rolled_back_to:
        broken, loaded = [loaded.folder], load_latest(folder, loaded.state.step)
    if loaded is None:
        set_aside(broken)
        trainer.restart()
    else:
        _restore(trainer, loaded)
    trainer.rollbacks, trainer.rolled_back_to = n_before + 1, trainer.step_count
    trainer.lower_rate(learning_rate)
    # If the process is killed now, the run goes on at this rate. What it replaces goes, and no older one.
    save_state(folder, trainer.state(), trainer.checkpoint(), KEPT + 1)
    if loaded is not None:
        set_aside([loaded.folder])
    trainer.warn(
        f"{cause}; gone back to step {trainer.step_count}, and on from there at {learning_rate:g}, half of it"
    )


def _restore(trainer: ConversionTrainer, loaded: LoadedCheckpoint) -> None:
    """Take a checkpoint over; the newer ones that are damaged are no longer the run's."""
    for warning in loaded.warnings:
        trainer.warn(warning)
    set_aside(loaded.damaged)
    delete_older(loaded.folder.parent, loaded.folder)  # a save may have been killed before it did
    trainer.restore(loaded.state)


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
    if (began := state.extra.get("start_sha256", "")) != trainer.start.sha256:
        there, here = (f"sha256 {one[:12]}" if one else "none" for one in (str(began), trainer.start.sha256))
        found.append(f"model.start_from ({there} there, {here} here)")
    if state.extra.get("mask_token_id") != trainer.mask_token_id:
        found.append(f"mask token ({state.extra.get('mask_token_id')} there, {trainer.mask_token_id} here)")
    if not found and state.parameters.shape != trainer.parameters.flat.shape:
        found.append(
            f"number of parameters ({state.parameters.size} there, {trainer.parameters.flat.size} here)"
        )
    return found
