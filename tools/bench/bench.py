"""Measure this project on this machine, beside PyTorch + PEFT where an interpreter that has them is named.

Tables go to the terminal, the same figures as JSON to a file. Ratios are of one run in which the arms take
turns. Nothing here fails because it is slow: what the figures should be is said in docs/results/.

usage: tools/bench/bench.py [--step --products ...] [--peer-python /path/to/python] [--json FILE]

Without a section's flag: all but --packing, --kernels and --large. The peer's environment is any that has
done `pip install torch transformers peft gguf`.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the makers of models lie one folder up

import bench_sections as sections
from bench_architectures import architectures
from bench_arms import ArmFailed
from bench_context import context
from bench_device import device_steps
from bench_few_rows import few_rows
from bench_packing import packing
from bench_report import show
from bench_sections import Settings
from rich.console import Console

from ggml_diffusion.app.demo import demo_model
from ggml_diffusion.errors import UserError
from ggml_diffusion.machine import processors

SECTIONS: Mapping[str, tuple[Callable[[Settings], Any], str]] = {
    "machine": (sections.machine, "the machine, versions, and the kernels' peak"),
    "products": (sections.products, "matrix products of each weight type"),
    "packing": (packing, "packing alone, of each quantised type, beside Q4_K"),
    "step": (sections.steps, "training steps, whole, with memory and shares of time"),
    "architectures": (architectures, "a training step of each architecture, beside llama of the same sizes"),
    "threads": (sections.threads, "one thread against all, and the projection to 7B on 16 cores"),
    "generation": (sections.generation, "denoising at several numbers of steps"),
    "few-rows": (few_rows, "a pass of 1 to 32 rows, beside llama.cpp"),
    "context": (context, "a step of a hole, and writing, over text that stands"),
    "kernels": (sections.kernels, "training steps with kernels switched off, against PyTorch float32"),
    "large": (sections.large, "one step of a whole 7B model: takes minutes and 4 GB of disk"),
    "device": (device_steps, "training steps on a device beside the processor"),
}
WIDTH_OF_FILES = 140
LEFT_OUT = ("packing", "kernels", "large", "device")


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Measure training and generation on this machine.",
        epilog=f"Without a section: all but {', '.join(LEFT_OUT)}.",
    )
    for name, (_, description) in SECTIONS.items():
        if name != "device":
            parser.add_argument(f"--{name}", action="store_true", help=description)
    parser.add_argument("--device", metavar="KIND", help=f"{SECTIONS['device'][1]}: cuda, metal, vulkan")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    parser.add_argument("--peer-python", type=Path, help="Python with torch, transformers, peft, gguf")
    parser.add_argument("--peer-dtype", choices=("bf16", "f32"), default="bf16", help="of the peer's steps")
    parser.add_argument(
        "--peer-llama", type=Path, help="Python with another llama-cpp-python for --few-rows than this one's"
    )
    parser.add_argument("--model", type=Path, help="GGUF of the steps; SmolLM2-135M Q4_1 if left out")
    parser.add_argument("--folder", type=Path, help="keep generated models there, to be used again")
    parser.add_argument("--work", default="", help="only training steps whose name contains this")
    parser.add_argument("--rounds", type=int, default=3, help="counted rounds of each comparison")
    parser.add_argument("--n-threads", type=int, default=processors(), help="threads of every arm")
    return parser.parse_args(arguments)


def measure(chosen: Sequence[str], settings: Settings, console: Console, json_path: Path | None) -> None:
    """Run sections, show each as it is done, and write what there is after each."""
    results: dict[str, Any] = {"rounds": settings.n_rounds, "threads": settings.n_threads}
    for name in chosen:
        with console.status(f"measuring: {name}"):
            results[name] = SECTIONS[name][0](settings)
        show(console, name, results[name])
        if json_path is not None:
            json_path.write_text(json.dumps(results, indent=1) + "\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what the command line asks for; 2 = something to put right."""
    options = parsed(arguments)
    named = [name for name in SECTIONS if getattr(options, name.replace("-", "_"))]
    chosen = named or [name for name in SECTIONS if name not in LEFT_OUT]
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            settings = Settings(
                model=options.model or demo_model(),
                folder=folder,
                n_threads=options.n_threads,
                n_rounds=options.rounds,
                peer_python=options.peer_python,
                peer_dtype=options.peer_dtype,
                work=options.work,
                peer_llama=options.peer_llama,
                device=options.device,
            )
            console = Console(width=None if sys.stdout.isatty() else WIDTH_OF_FILES)
            measure(chosen, settings, console, options.json)
        except (ArmFailed, UserError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
