"""How well a conversion fills holes in held-out text, and how sure it is of what stood there.

    python tools/measure_holes.py MODEL.gguf RUN --lengths 1,4,8 --a-sequence 4

The cross-entropy is that of the true tokens in one pass, all of a hole masked. The tokens right, and whole
holes right, are those of filling token after token, the surest first, without chance. Intervals are 95%,
over holes.
"""

import argparse
from pathlib import Path

import numpy as np
from finished_run import open_run
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from tool_errors import run_tool

from ggml_diffusion.evaluation.infilling import Hole, cut_holes, fill_holes
from ggml_diffusion.generation.diffusion_model import DiffusionModel
from ggml_diffusion.generation.sampling import log_softmax
from ggml_diffusion.objective.output_rows import rows_of_positions


def cross_entropy(model: DiffusionModel, hole: Hole) -> float:
    """Of the true tokens of a hole, nats a token."""
    masked = hole.filled(np.full(hole.length, model.mask_token_id, dtype=np.int32))
    share = 1.0 if model.rule.context == "frozen" else hole.length / len(masked)
    logits = model.logits(masked, model.rule.noise_schedule.time_at(share))
    places = np.arange(hole.start, hole.start + hole.length)
    said = log_softmax(logits[rows_of_positions(places, model.rule.prediction)])
    return -float(said[np.arange(hole.length), hole.answer].mean())


def with_interval(values: NDArray[np.floating]) -> str:
    """A mean with half of its interval."""
    return f"{values.mean():.3f} +- {1.96 * values.std() / np.sqrt(len(values)):.3f}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--lengths", default="1,4,8", help="tokens of a hole")
    parser.add_argument("--a-sequence", type=int, default=4, help="holes of each length in a sequence")
    parser.add_argument("--seed", type=int, default=0, help="of the places")
    given = parser.parse_args()
    model, held_out = open_run(given.model, given.run)
    console = Console(stderr=True)
    for length in map(int, given.lengths.split(",")):
        holes = cut_holes(held_out, length, given.a_sequence, model.mask_token_id, given.seed)
        losses, right = [], []
        for hole in track(holes, f"holes of {length}", console=console, disable=not console.is_terminal):
            losses.append(cross_entropy(model, hole))
            right.append(fill_holes(model, [hole])[0] == hole.answer)
        shares = np.array(right).mean(axis=1)
        print(
            f"{len(holes)} holes of {length}: cross-entropy {with_interval(np.array(losses))}, tokens right "
            f"{with_interval(shares)}, whole holes {np.mean(shares == 1.0):.3f}",
            flush=True,
        )


if __name__ == "__main__":
    run_tool(main)
