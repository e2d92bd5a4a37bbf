#!/usr/bin/env python3
"""How often a short run fails: many conversions that differ in their seed alone.

    python tools/short_runs.py RUNS_FOLDER --steps 60,100,200 --seeds 24

converts SmolLM2-135M on the text of `ggml-diffusion demo` with the preset `demo` at each length and seed and
says how each run went: the greatest norm of a gradient behind the warm-up, the training loss at its end. A
run has *failed* if its last ten steps have a mean loss above `FAILED` nats, near the 6.48 nats of the text's
token frequencies. What is complete is not done again, so the same command goes on where it was interrupted;
`--until STEP` leaves every run there, since a run that fails does so behind its warm-up.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from ablations import BASE_PRESET, Quiet
from tool_errors import run_tool

from ggml_diffusion.app.demo import demo_model, write_demo_text
from ggml_diffusion.config.toml import load_config
from ggml_diffusion.run_folder import METRICS
from ggml_diffusion.training.metrics import TrainMetrics
from ggml_diffusion.training.run import run_conversion

FAILED = 6.0
LAST_STEPS = 10
# A usual norm is 2 to 5.
SPELL = 30.0


class _FarEnough(Exception):
    """The step that was asked for is reached."""


class _Until(Quiet):
    """A listener that ends the run behind a step."""

    def __init__(self, until: int) -> None:
        self.until = until

    def step(self, metrics: TrainMetrics) -> None:
        """The end, where it is due."""
        if metrics.step >= self.until:
            raise _FarEnough


def run(output: Path, steps: int, until: int, settings: dict[str, Any]) -> None:
    """One conversion, unless it is there."""
    if len(read(output)) >= until:
        return
    config = load_config(
        overrides={
            "model.base_model": str(demo_model()),
            "training.output": str(output),
            "training.total_steps": steps,
            **settings,
        },
        preset=BASE_PRESET,
    )
    try:
        if run_conversion(config, _Until(until)).interrupted_by is not None:
            sys.exit("interrupted; the same command goes on")
    except _FarEnough:
        pass


def read(output: Path) -> list[dict[str, Any]]:
    """A run's metrics, a step each; none where it has not begun."""
    path = output / METRICS
    return (
        [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
    )


def judge(metrics: list[dict[str, Any]], warmup: int) -> dict[str, Any]:
    """What is worth knowing of a run."""
    warmup = min(warmup, len(metrics) - 1)
    norms = np.array([line["grad_norm"] for line in metrics])[warmup:]
    loss = float(np.mean([line["loss"] for line in metrics[-LAST_STEPS:]]))
    return {
        "steps": len(metrics),
        "loss": round(loss, 4),
        "greatest_norm": round(float(norms.max()), 1),
        "at_step": warmup + int(norms.argmax()) + 1,
        "failed": loss > FAILED,
    }


def main() -> None:
    """Parse, run, tell."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=Path("short_runs"), help="where the runs go")
    parser.add_argument("--steps", default="60,100,200", help="lengths of a run, separated by commas")
    parser.add_argument("--seeds", type=int, default=24, help="seeds 0, 1, ... of each length (24)")
    parser.add_argument("--until", type=int, help="leave every run at this step")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="another value of a setting, as training.learning_rate=1e-3; JSON",
    )
    parser.add_argument(
        "--share",
        default="1/1",
        help="of the seeds: 1/2 and 2/2 for two of these commands beside each other, with --n-threads 1",
    )
    parser.add_argument("--n-threads", type=int, help="threads of a run")
    parser.add_argument("--json", type=Path, help="write all figures there")
    arguments = parser.parse_args()
    settings = {name: json.loads(value) for name, _, value in (pair.partition("=") for pair in arguments.set)}
    if arguments.n_threads is not None:
        settings["hardware.num_threads"] = arguments.n_threads
    settings["training.data"] = [str(write_demo_text(arguments.folder))]
    part, n_parts = map(int, arguments.share.split("/"))
    rows = []
    for steps in map(int, arguments.steps.split(",")):
        until = min(steps, arguments.until or steps)
        for seed in range(part - 1, arguments.seeds, n_parts):
            output = arguments.folder / f"{steps}-steps-seed{seed}"
            run(output, steps, until, settings | {"training.seed": seed})
            rows.append({"of": steps, "seed": seed, **judge(read(output)[:until], warmup=10)})
            print(json.dumps(rows[-1]), flush=True)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    for steps in sorted({row["of"] for row in rows}):
        of = [row for row in rows if row["of"] == steps]
        norms = [row["greatest_norm"] for row in of]
        print(
            f"{steps} steps: {sum(row['failed'] for row in of)} of {len(of)} failed, "
            f"{sum(norm > SPELL for norm in norms)} with a norm above {SPELL:g} (greatest {max(norms):g}), "
            f"loss at the end {np.mean([row['loss'] for row in of]):.3f}"
        )


if __name__ == "__main__":
    run_tool(main)
