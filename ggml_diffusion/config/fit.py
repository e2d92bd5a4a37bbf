"""A run that is shorter than its annealing or warm-up: both are scaled to it.

Deliberately not here: presets, which scale in proportion to their own length (presets.py).
"""

from ggml_diffusion.config.settings import ConversionTrainingConfig

# Share of its steps that the seed's recipe anneals for: 20K of 50K.
_ANNEALING_SHARE = 0.4


def scaled_to_run(config: ConversionTrainingConfig) -> tuple[ConversionTrainingConfig, str | None]:
    """Fit annealing and warm-up to a run that is shorter than one of them.

    Both are scaled by one factor, such that the longer one takes two fifths of the run, as in the seed's
    recipe; else a short run would train a causal model, or never reach its learning rate.

    Returns:
        The config to run with, and one sentence for the user that says what changed; None if nothing did.

    """
    annealing = config.qlora.mask_annealing
    longest = max(annealing.total_steps, config.warmup_steps)
    if config.total_steps >= longest:
        return config, None
    factor = _ANNEALING_SHARE * config.total_steps / longest

    def scaled(steps: int) -> int:
        return max(1, round(steps * factor)) if steps else 0

    annealing_steps = scaled(annealing.total_steps)
    # Of several ratios that would now start at one step only the last is left.
    stepwise = {
        min(round(step * factor), max(0, annealing_steps - 1)): ratio for step, ratio in annealing.steps
    }
    fitted_annealing = annealing.model_copy(
        update={"total_steps": annealing_steps, "steps": tuple(stepwise.items())}
    )
    fitted = config.model_copy(
        update={
            "warmup_steps": scaled(config.warmup_steps),
            "qlora": config.qlora.model_copy(update={"mask_annealing": fitted_annealing}),
        }
    )
    return fitted, (
        f"The run of {config.total_steps} steps is shorter than its annealing ({annealing.total_steps}) or "
        f"warm-up ({config.warmup_steps}): they are scaled to {annealing_steps} and {fitted.warmup_steps}."
    )
