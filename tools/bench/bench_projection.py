"""From steps of one and of two layers to the seed document's run: a whole 7B model on 16 cores.

What two layers take more than one is a layer; the rest of one is head and embedding. It is arithmetic on
measured figures, not a measurement, and it takes memory bandwidth for granted.

Source: Amdahl's law; the seed document's table (50K steps in about 100 hours, batch 8, accumulation 4).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

SEED_STEPS = 50_000
SEED_CORES = 16
SEED_STEP_S = 7.2


@dataclass(frozen=True)
class StepCost:
    """Where the time of an optimizer step goes.

    Attributes:
        parallel_s: of a micro-batch, in loops that all threads share.
        serial_s: of a micro-batch, in the engine outside of them.
        optimizer_s: of the step, whatever the number of micro-batches: noise, clipping, AdamW.

    """

    parallel_s: float
    serial_s: float
    optimizer_s: float

    def time_s(self, speedup: float, micro_batches: float) -> float:
        """Of a step whose parallel loops run `speedup` times as fast."""
        return micro_batches * (self.parallel_s / speedup + self.serial_s) + self.optimizer_s


def cost_of_step(figures: Mapping[str, Any]) -> StepCost:
    """The cost of a measured step of one micro-batch (bench_sections.step_figures)."""
    whole_s = figures["time_s"]["median"]
    serial_s, optimizer_s = figures["serial_share"] * whole_s, figures["optimizer_share"] * whole_s
    return StepCost(whole_s - serial_s, serial_s - optimizer_s, optimizer_s)


def cost_of_layers(one: StepCost, two: StepCost, n_layers: int) -> StepCost:
    """The cost of a step of more layers; figures that noise has turned round count as 0."""

    def extended(cost: Callable[[StepCost], float]) -> float:
        layer = max(0.0, cost(two) - cost(one))
        return max(0.0, cost(one) - layer) + n_layers * layer

    return StepCost(
        extended(lambda cost: cost.parallel_s),
        extended(lambda cost: cost.serial_s),
        extended(lambda cost: cost.optimizer_s),
    )


def scaling(measured: float, n_threads: int, n_cores: int) -> float:
    """How much faster cores are than the threads that were measured, if every doubling gains the same.

    Args:
        measured: how much faster `n_threads` were than one, with n_threads > 1.
        n_threads: threads that were measured.
        n_cores: cores to project to.

    """
    return float(measured ** (math.log(n_cores / n_threads) / math.log(n_threads)))


def project(cost: StepCost, speedup: float, tokens_micro_batch: int, micro_batches: int) -> dict[str, float]:
    """The seed's run with steps of so many micro-batches.

    Args:
        cost: of the whole model.
        speedup: of the seed's cores over the threads that were measured.
        tokens_micro_batch: tokens of a micro-batch as it was measured.
        micro_batches: of a step.

    """
    time_s = cost.time_s(speedup, micro_batches)
    serial_s = micro_batches * cost.serial_s + cost.optimizer_s
    fitting = max(0.0, SEED_STEP_S - cost.optimizer_s) / (cost.parallel_s / speedup + cost.serial_s)
    return {
        "tokens_step": micro_batches * tokens_micro_batch,
        "speedup": speedup,
        "step_s": time_s,
        "serial_share": serial_s / time_s,
        "run_hours": SEED_STEPS * time_s / 3600.0,
        "tokens_in_seed_step": fitting * tokens_micro_batch,
    }
