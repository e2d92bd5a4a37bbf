"""How a training step fits a memory budget: what it keeps for its backward, and in how many parts it goes.

A step may keep all activations, compute gate and up again, or compute whole layers again; the gradients
have the same bits. It may also take its batch in parts of whole sequences, which changes only the order
in which sums are taken. Fewer rows a part mean that packed weights are unpacked more often; recomputing means
more products. The plan takes the cheapest that fits. Pure arithmetic: the engine says what each choice takes.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

Keep = Literal["all", "without-ffn", "boundaries"]

# Products of a step relative to keeping all, in a llama with F of about 2.7 C: forward and backward are about
# equal, gate and up are two fifths of the forward, a layer computed again is nearly all of it.
RELATIVE_WORK: dict[Keep, float] = {"all": 1.0, "without-ffn": 1.2, "boundaries": 1.4}
# Unpacking the weights costs about as much as multiplying so many rows by them.
ROWS_OF_UNPACKING = 50


@dataclass(frozen=True)
class StepPlan:
    """What to keep, and how many sequences go through the model together."""

    keep: Keep
    sequences: int


def plan_step(
    n_sequences: int, rows_a_sequence: int, budget: int | None, planned_bytes: Callable[[Keep, int], int]
) -> StepPlan:
    """The cheapest plan within a budget, and the smallest one where none fits.

    Args:
        n_sequences: B of the batch.
        rows_a_sequence: its longest sequence, tokens.
        budget: bytes; None = no limit.
        planned_bytes: (what is kept, sequences a part) -> bytes.

    """
    if budget is None:
        return StepPlan("all", n_sequences)
    best, best_cost = StepPlan("boundaries", 1), float("inf")
    for keep, work in RELATIVE_WORK.items():
        sequences = _largest_part(n_sequences, partial(_fits, planned_bytes, keep, budget))
        cost = work * (1.0 + ROWS_OF_UNPACKING / (sequences * rows_a_sequence)) if sequences else float("inf")
        if cost < best_cost:
            best, best_cost = StepPlan(keep, sequences), cost
    return best


def _fits(planned_bytes: Callable[[Keep, int], int], keep: Keep, budget: int, sequences: int) -> bool:
    return planned_bytes(keep, sequences) <= budget


def _largest_part(n_sequences: int, fits: Callable[[int], bool]) -> int:
    """Sequences a part when a batch is cut into as few nearly equal parts as fit; 0 if not even one does."""
    most, too_many = 0, n_sequences + 1  # more sequences never take less memory
    while too_many - most > 1:
        middle = (most + too_many) // 2
        most, too_many = (middle, too_many) if fits(middle) else (most, middle)
    if most == 0:
        return 0
    n_parts = -(-n_sequences // most)
    return -(-n_sequences // n_parts)
