"""Recipes to start from: presets of settings, and how one is fitted to a run of another length.

Deliberately not here: which of preset, file and flag counts (toml.py).
"""

from collections.abc import Mapping
from typing import Any

from ggml_diffusion.formats.lora import TargetModule

MIN_WARMUP_STEPS = 10

# What the ablations (docs/results/ablations.md) leave of the PyTorch conversion's recipe.
_SHORT_RECIPE: Mapping[str, Any] = {
    "model.target_modules": [module.value for module in TargetModule],
    # Without the sink or the damping a short run may make sinks of all its tokens and forget the base
    # (docs/results/ablations.md, "Runs that fail").
    "model.attention_sink": True,
    "training.norm_damping": 1.5,
    "training.batch_size": 8,
    "training.gradient_accumulation": 1,
    "training.sequence_length": 128,
    "training.learning_rate": 5e-4,
    "training.lora_b_rate_factor": 8.0,
    "training.held_out_fraction": 0.07,
    "training.checkpoint_every": 50,
    "mask_annealing.schedule": "linear",
    "noise_schedule.type": "linear",
    "noise_schedule.num_timesteps": 0,
    "noise_schedule.min_time": 0.05,
    # In so few steps at this learning rate the projection's output outgrows the token embeddings.
    "time_embedding.enabled": False,
}

PRESETS: Mapping[str, Mapping[str, Any]] = {
    # The defaults are the seed's recipe; its base_model and num_threads belong to one machine.
    "seed": {},
    # SmolLM2-135M in an hour on two cores; longer with more --steps.
    "laptop": {
        **_SHORT_RECIPE,
        "training.total_steps": 2000,
        "training.warmup_steps": 100,
        "mask_annealing.total_steps": 400,
    },
    # SmolLM2-135M on the text of `ggml-diffusion demo`, in about ten minutes on two cores.
    "demo": {
        **_SHORT_RECIPE,
        "training.total_steps": 200,
        "training.warmup_steps": 10,
        "mask_annealing.total_steps": 40,
    },
}


def preset_for(preset: Mapping[str, Any], total_steps: Any) -> dict[str, Any]:
    """A preset's values in a run of another length: annealing and warm-up keep their share of the run.

    But a warm-up is not cut below a few steps: Adam knows too little of its gradients by then, and at the
    full rate of the LoRA matrices B the model would lose what the base knows.
    """
    values = dict(preset)
    of_run = preset.get("training.total_steps")
    if of_run is not None and isinstance(total_steps, int):
        for name, least in (("training.warmup_steps", MIN_WARMUP_STEPS), ("mask_annealing.total_steps", 1)):
            values[name] = max(least, round(preset[name] * total_steps / of_run))
    return values
