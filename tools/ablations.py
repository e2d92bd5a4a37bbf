#!/usr/bin/env python3
"""One setting at a time: short conversions that differ in it alone, on the same tokens, with the same masks.

    python tools/ablations.py RUNS_FOLDER --json ablations.json --markdown ablations.md

converts SmolLM2-135M on the text of `ggml-diffusion demo` once for each variation below and writes what the
held-out text says of each. A run is a folder of its own: what is complete is not done again, and what was
interrupted resumes where it stopped. `--only aligned,annealing-none` and `--seeds 0,1,2` choose, `--on
lr-1e-3` takes another variation than the preset as what the others start from; `--list` shows what there is.
"""

import argparse
import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from tool_errors import run_tool

from ggml_diffusion.app.demo import demo_model, write_demo_text
from ggml_diffusion.config.toml import load_config
from ggml_diffusion.engine.cpu.q4_model import Q4Model
from ggml_diffusion.evaluation.held_out import as_rows, masked_scores
from ggml_diffusion.evaluation.suite import load_held_out
from ggml_diffusion.formats.adapter_file import DiffusionCheckpoint
from ggml_diffusion.generation.diffusion_model import DiffusionModel
from ggml_diffusion.run_folder import EVALUATION, METRICS
from ggml_diffusion.text.tokenizer import Tokenizer
from ggml_diffusion.training.metrics import TrainMetrics
from ggml_diffusion.training.run import exported_weights, run_conversion

QKVO = ["q_proj", "k_proj", "v_proj", "o_proj"]
HELD_OUT_SEQUENCES, BATCH_SIZE = 62, 8

# The recipe that all others differ from by one thing, at 1,024 tokens a step.
BASE_PRESET = "demo"
VARIATIONS: Mapping[str, Mapping[str, Any]] = {
    "base": {},
    "lr-2e-4": {"training.learning_rate": 2e-4},
    "lr-1e-3": {"training.learning_rate": 1e-3},
    "lr-2e-3": {"training.learning_rate": 2e-3},
    "lora-b-1": {"training.lora_b_rate_factor": 1.0},
    "lora-b-1-lr-1e-3": {"training.lora_b_rate_factor": 1.0, "training.learning_rate": 1e-3},
    "lora-b-4": {"training.lora_b_rate_factor": 4.0},
    "lora-b-16": {"training.lora_b_rate_factor": 16.0},
    "lora-b-20-lr-2e-4": {"training.lora_b_rate_factor": 20.0, "training.learning_rate": 2e-4},
    "warmup-20": {"training.warmup_steps": 20},
    "annealing-none": {"mask_annealing.total_steps": 0},
    "annealing-half": {"mask_annealing.total_steps": 0.5},
    "bernoulli-mask": {"mask_annealing.mask": "bernoulli"},
    "aligned": {"model.prediction": "aligned"},
    "nelbo": {"training.loss_weighting": "nelbo"},
    "rank-8": {"model.qlora_rank": 8, "model.qlora_alpha": 16.0},
    "rank-64": {"model.qlora_rank": 64, "model.qlora_alpha": 128.0},
    "targets-qkvo": {"model.target_modules": QKVO},
    "no-sink": {"model.attention_sink": False},
    "no-damping": {"training.norm_damping": 0.0},
    "no-mask-row": {"model.train_mask_embedding": False},
    "mask-row-fast": {"training.embedding_rate_factor": 10.0},
    "time-embedding": {"time_embedding.enabled": True},
    "distillation": {"training.distillation_weight": 0.5},
    "ar-share": {"training.ar_loss_share": 0.2},
    "exact-count": {"noise_schedule.masking": "exact"},
    # half as many sequences, each with both halves of its masks: the same tokens a step
    "complementary": {"noise_schedule.complementary": True, "training.batch_size": 4},
    "noise-cosine": {"noise_schedule.type": "cosine"},
    "no-int8": {"hardware.int8": False},
}


class Quiet:
    """A listener that says little: these runs are watched by their results."""

    def note(self, text: str) -> None:
        """Nothing."""

    def warn(self, text: str) -> None:
        """A warning."""
        print(f"warning: {text}", file=sys.stderr)

    def tokenise(self, done_bytes: int, total_bytes: int) -> None:
        """Nothing."""

    def start(self, first_step: int, tokens_seen: int, total_steps: int) -> None:
        """Nothing."""

    def step(self, metrics: TrainMetrics) -> None:
        """A sign of life."""
        if metrics.step % 20 == 0:
            print(f"  step {metrics.step}: loss {metrics.loss:.3f}", flush=True)

    def stop(self) -> None:
        """Nothing."""


def settings_of(name: str, steps: int, on: str) -> dict[str, Any]:
    """What a variation of `on` sets; an annealing below 1 is a share of the run."""
    settings: dict[str, Any] = {"training.total_steps": steps, **VARIATIONS[on], **VARIATIONS[name]}
    share = settings.get("mask_annealing.total_steps")
    if isinstance(share, float):
        settings["mask_annealing.total_steps"] = round(share * steps)
    return settings


def run(
    folder: Path, name: str, seed: int, steps: int, on: str, text: Path, n_threads: int | None = None
) -> None:
    """One conversion, unless its folder has its evaluation already."""
    output = folder / f"{name}-seed{seed}"
    if (output / EVALUATION).exists():
        return
    print(f"{output}: {steps} steps", flush=True)
    overrides = settings_of(name, steps, on) | {
        "model.base_model": str(demo_model()),
        "training.data": [str(text)],
        "training.output": str(output),
        "training.seed": seed,
    }
    if n_threads is not None:
        overrides["hardware.num_threads"] = n_threads
    config = load_config(overrides=overrides, preset=BASE_PRESET)
    begin = time.monotonic()
    if run_conversion(config, Quiet()).interrupted_by is not None:
        sys.exit("interrupted; the same command resumes")
    measure(output, demo_model(), n_threads)
    print(f"{output}: {time.monotonic() - begin:.0f} s", flush=True)


def measure(output: Path, base: Path, n_threads: int | None) -> None:
    """Put into a run's folder what the held-out text says of it; of the base it says the same for all."""
    checkpoint = DiffusionCheckpoint.load(exported_weights(output))
    tokenizer = Tokenizer.from_gguf(base)
    held_out = load_held_out(checkpoint, tokenizer, HELD_OUT_SEQUENCES).held_out
    with Q4Model.from_gguf(base, n_threads) as engine:
        converted = DiffusionModel.from_checkpoint(engine, tokenizer, checkpoint)
        after = as_rows(masked_scores(converted, held_out, BATCH_SIZE))
    text = json.dumps({"n_sequences": len(held_out), "after": after}, indent=1) + "\n"
    (output / EVALUATION).write_text(text, encoding="utf-8")


def collect(folder: Path, steps: int, on: str) -> list[dict[str, Any]]:
    """The figures of all complete runs, variations in their order."""
    rows = []
    for name in VARIATIONS:
        for output in sorted(folder.glob(f"{name}-seed*")):
            if not (output / EVALUATION).exists():
                continue
            scores = json.loads((output / EVALUATION).read_text(encoding="utf-8"))
            lines = [json.loads(line) for line in (output / METRICS).read_text(encoding="utf-8").splitlines()]
            rows.append(
                {
                    "variation": name,
                    "seed": int(output.name.rpartition("seed")[2]),
                    "settings": settings_of(name, steps, on),
                    "tokens": lines[-1]["tokens"],
                    "final_training_loss": float(np.mean([line["loss"] for line in lines[-20:]])),
                    "after": scores["after"],
                }
            )
    return rows


def as_markdown(rows: list[dict[str, Any]]) -> str:
    """A table: means over seeds, and how far they are from those of the base with the same seeds."""
    figures: dict[str, dict[int, list[float]]] = {}
    for row in rows:
        after = row["after"]
        values = [score["visible"]["cross_entropy"] for score in after]
        figures.setdefault(row["variation"], {})[row["seed"]] = [*values, after[1]["future_context_gain"]]
    lines = [
        "| variation | seeds | CE t = .15 | CE t = .5 | CE t = .85 | mean CE less base's, same seeds | "
        "future gain (a), t = .5 |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, by_seed in figures.items():
        cells = [f"{value:.3f}" for value in np.mean(list(by_seed.values()), axis=0)]
        beside = beside_base(by_seed, figures.get("base", {}))
        lines.append(
            f"| {name} | {len(by_seed)} | {' | '.join(cells[:3])} | {beside} | {float(cells[3]):+.3f} |"
        )
    return "\n".join(lines) + "\n"


def beside_base(by_seed: Mapping[int, list[float]], base: Mapping[int, list[float]]) -> str:
    """The mean difference over the seeds that both have, with its standard error where there are several."""
    differences = [
        float(np.mean(by_seed[seed][:3]) - np.mean(base[seed][:3])) for seed in by_seed if seed in base
    ]
    if not differences or by_seed is base:
        return ""
    text = f"{np.mean(differences):+.3f}"
    if len(differences) > 1:
        text += f" ± {np.std(differences, ddof=1) / len(differences) ** 0.5:.3f}"
    return text


def main() -> None:
    """Parse, run, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?", default=Path("ablations"), help="where the runs go")
    parser.add_argument("--steps", type=int, default=100, help="steps of 1,024 tokens (100)")
    parser.add_argument("--only", help="variations, separated by commas")
    parser.add_argument(
        "--on", default="base", help="variation that the others differ from by one thing (base)"
    )
    parser.add_argument("--seeds", default="0", help="seeds, separated by commas (0)")
    parser.add_argument(
        "--n-threads", type=int, help="threads of a run: with 1, two of these commands share two cores well"
    )
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--markdown", type=Path, help="write the table there")
    parser.add_argument("--list", action="store_true", help="show the variations and stop")
    arguments = parser.parse_args()
    if arguments.list:
        for name, settings in VARIATIONS.items():
            print(f"{name:16} {dict(settings)}")
        return
    names = arguments.only.split(",") if arguments.only else list(VARIATIONS)
    if unknown := [name for name in names if name not in VARIATIONS]:
        parser.error(f"no variation {unknown[0]}; --list shows them")
    if arguments.on not in VARIATIONS:
        parser.error(f"no variation {arguments.on}; --list shows them")
    text = write_demo_text(arguments.folder)
    for seed in map(int, arguments.seeds.split(",")):
        for name in names:
            run(arguments.folder, name, seed, arguments.steps, arguments.on, text, arguments.n_threads)
    rows = collect(arguments.folder, arguments.steps, arguments.on)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    table = as_markdown(rows)
    if arguments.markdown is not None:
        arguments.markdown.write_text(table, encoding="utf-8")
    print(table)


if __name__ == "__main__":
    run_tool(main)
