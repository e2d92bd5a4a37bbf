"""Seconds that `infill` takes for a hole in the middle of a page, by conversion, the model loaded.

    python tools/measure_page.py MODEL.gguf RUN OTHER_RUN --repeats 3

The page is from Python's own manual, three words of it taken out. The runs take turns; medians are printed,
once with the length of the hole to be found and once with eight tokens given.
"""

import argparse
import pydoc_data.topics
import statistics
import time
from pathlib import Path

from finished_run import open_run
from tool_errors import run_tool

from ggml_diffusion.generation.infill import infill

_CHARS = 4200  # about a thousand tokens
_GIVEN = 8


def page() -> tuple[str, str]:
    """The text before the hole, and the one behind it."""
    text = "\n\n".join(pydoc_data.topics.topics.values())
    middle = text.index('The "if" statement')
    words = text[middle - _CHARS // 2 : middle + _CHARS // 2].split(" ")
    half = len(words) // 2
    return " ".join(words[:half]) + " ", " " + " ".join(words[half + 3 :])


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    models = {run: open_run(given.model, run)[0] for run in given.runs}
    before, behind = page()
    for length in (None, _GIVEN):
        times_s: dict[Path, list[float]] = {run: [] for run in models}
        for _ in range(given.repeats):
            for run, model in models.items():
                started_s = time.perf_counter()
                infill(model, [before, behind], [length])
                times_s[run].append(time.perf_counter() - started_s)
        for run, all_s in times_s.items():
            rule = models[run].rule
            print(
                f"{run}: {rule.context} context, margin {rule.margin}, "
                f"{'length found' if length is None else f'{length} tokens'}: "
                f"{statistics.median(all_s):.2f} s ({min(all_s):.2f} to {max(all_s):.2f})"
            )


if __name__ == "__main__":
    run_tool(main)
