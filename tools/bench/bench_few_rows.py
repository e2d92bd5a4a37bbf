"""A pass of a few rows beside llama.cpp's: what a denoising step behind cached context multiplies.

A section of tools/bench/bench.py. The peer is `llama_decode` of as many tokens behind a cached context, with
all logits, in the llama-cpp-python of this environment, or of another one (`--peer-llama`), such as one built
for the instruction set to which `GGD_KERNELS` holds this project. Ours has no context before its rows yet. It
neither prints nor judges.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from bench_arms import Arm, ArmFailed
from bench_sections import Row, Settings, Work, our_arm, spread

N_ROWS = (1, 4, 8, 16, 32)
N_CACHED = 128
REPEATS = 9  # of which a round takes the median


def few_rows(settings: Settings) -> list[Row]:
    """Times of a pass, by rows, and the medians of the rounds' ratios."""
    times_s: dict[int, list[tuple[float, float]]] = {n: [] for n in N_ROWS}
    job = {"model": str(settings.model), "n_threads": settings.n_threads, "n_cached": N_CACHED}
    python = settings.peer_llama or sys.executable
    with ExitStack() as stack:
        work = Work("few rows", 1, 8)
        ours = stack.enter_context(our_arm(settings, "ours", settings.model, work, train=False))
        peer = stack.enter_context(_peer(python, job))
        for round_number in range(settings.n_rounds + 1):
            for n_rows, counted in times_s.items():
                arms = (ours, peer)
                replies = [arm.ask("pass_of", n_rows=n_rows, repeats=REPEATS)["time_s"] for arm in arms]
                if round_number > 0:
                    counted.append((replies[0], replies[1]))
        kernels, system = ours.about["kernels"], peer.about["system"]
    return [
        {
            "n_rows": n_rows,
            "kernels": kernels,
            "peer": system,
            "time_s": spread(own for own, _ in pairs),
            "peer_time_s": spread(other for _, other in pairs),
            "ratio": spread(own / other for own, other in pairs),
        }
        for n_rows, pairs in times_s.items()
    ]


def _peer(python: str | Path, job: Mapping[str, Any]) -> Arm:
    """llama.cpp as it is by default; without its repacked weights where it dies of them.

    Some virtual machines offer AMX and do not let it be used.
    """
    try:
        return Arm("llama.cpp", python, "peer_llama.py", {**job, "repack": True})
    except ArmFailed:
        return Arm("llama.cpp", python, "peer_llama.py", {**job, "repack": False})
