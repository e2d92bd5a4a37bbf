"""How well `infill` finds the length of a hole: exact matches with the length found, beside the true one.

    python tools/measure_hole_length.py MODEL.gguf RUN --holes 30

Holes of 1, 2, 3, 4, 6 and 8 tokens are cut out of the run's held-out text, one a sequence and length, and
filled without chance. A hole of unknown length cannot be filled right more often than one of known length by
much: the bar is .8 of it.
"""

import argparse
from pathlib import Path

import numpy as np
from finished_run import open_run
from rich.console import Console
from rich.progress import track
from tool_errors import run_tool

from ggml_diffusion.evaluation.infilling import cut_holes
from ggml_diffusion.generation.infill import infill

LENGTHS = (1, 2, 3, 4, 6, 8)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--holes", type=int, default=30, help="of each length")
    parser.add_argument("--seed", type=int, default=0, help="of the places")
    given = parser.parse_args()
    model, held_out = open_run(given.model, given.run)
    holes = [
        hole
        for length in LENGTHS
        for hole in cut_holes(held_out, length, 1, model.mask_token_id, given.seed)[: given.holes]
    ]
    console = Console(stderr=True)
    right = np.zeros((2, len(holes)), dtype=bool)
    found = np.zeros(len(holes), dtype=int)
    for index, hole in enumerate(track(holes, "holes", console=console, disable=not console.is_terminal)):
        decode = model.tokenizer.decode
        texts = [
            decode(hole.text[: hole.start]),
            decode(hole.text[hole.start + hole.length :], continued=True),
        ]
        answer = decode(hole.answer, continued=True)
        known, unknown = (infill(model, texts, [length])[0] for length in (hole.length, None))
        right[:, index] = known.text == answer, unknown.text == answer
        found[index] = len(unknown.tokens)
    true = np.array([hole.length for hole in holes])
    for length in LENGTHS:
        which = true == length
        counts = " ".join(str(int(row[which].sum())) for row in right)
        print(f"length {length}: {which.sum()} holes, exact with true and found length {counts}")
    n_known, n_unknown = right.sum(axis=1)
    print(
        f"all: {len(holes)} holes, exact {n_known} and {n_unknown}: {n_unknown / max(1, n_known):.2f}; "
        f"length right {np.mean(found == true):.2f}, mean {found.mean():.1f} beside {true.mean():.1f}"
    )


if __name__ == "__main__":
    run_tool(main)
