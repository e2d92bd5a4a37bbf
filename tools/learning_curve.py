#!/usr/bin/env python3
"""The learning curve of one run or of several, as a picture.

    python tools/learning_curve.py RUN [RUN ...] --plot curve.png

reads each run's metrics.jsonl: loss and masked accuracy of every step, faint, and their mean over the last
`--window` steps. Each step masks another share of other tokens, so a step by itself says little. A dotted
line marks the step from which the attention was fully bidirectional.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tool_errors import run_tool

from ggml_diffusion.run_folder import METRICS

COLORS = ("#1d5fa6", "#d9822b", "#3b9a6d", "#7d5ba6", "#c0392b", "#6b7280")


def read_metrics(run: Path) -> dict[str, NDArray[np.float64]]:
    """Every figure of a run, one value a step."""
    with (run / METRICS).open(encoding="utf-8") as file:
        steps = [json.loads(line) for line in file]
    return {name: np.array([step[name] for step in steps], np.float64) for name in steps[0]}


def trailing_mean(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """The mean over the last `window` values, over all there are where there are fewer."""
    sums = np.concatenate([[0.0], np.cumsum(values)])
    end = np.arange(1, len(values) + 1)
    begin = np.maximum(end - window, 0)
    means: NDArray[np.float64] = (sums[end] - sums[begin]) / (end - begin)
    return means


def draw(runs: dict[str, dict[str, NDArray[np.float64]]], window: int) -> Any:
    """Loss and masked accuracy against tokens, as a matplotlib figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    for place, (name, metrics) in enumerate(runs.items()):
        color = COLORS[place % len(COLORS)]
        millions = metrics["tokens"] / 1e6
        for axes, figure_name in zip(panels, ("loss", "masked_accuracy"), strict=True):
            axes.plot(millions, metrics[figure_name], color=color, alpha=0.15, linewidth=0.6)
            axes.plot(millions, trailing_mean(metrics[figure_name], window), color=color, label=name)
            annealed = np.flatnonzero(metrics["causal_ratio"] == 0.0)
            if len(annealed) and annealed[0] > 0:
                axes.axvline(millions[annealed[0]], color=color, linestyle=":", linewidth=1.0)
    # the first steps, before the mask embedding is one, would press all that follows together
    highest = max(np.quantile(metrics["loss"], 0.99) for metrics in runs.values())
    lowest = min(metrics["loss"].min() for metrics in runs.values())
    panels[0].set_ylim(lowest, highest)
    panels[0].set(title=f"masked cross-entropy, nats (mean of {window} steps)")
    panels[1].set(title="masked accuracy")
    for axes in panels:
        axes.set_xlabel("million tokens; dotted: fully bidirectional from there")
        axes.grid(color="#e6e6e6")
        axes.spines[["top", "right"]].set_visible(False)
    panels[1].legend(frameon=False, loc="lower right")
    return figure


def main() -> None:
    """Parse, read, draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", type=Path, nargs="+", help="output folders of `convert`")
    parser.add_argument("--plot", type=Path, required=True, help="draw it there; needs matplotlib")
    parser.add_argument("--window", type=int, default=50, help="steps of a mean (50)")
    arguments = parser.parse_args()
    draw({run.name: read_metrics(run) for run in arguments.runs}, arguments.window).savefig(
        arguments.plot, dpi=110
    )


if __name__ == "__main__":
    run_tool(main)
