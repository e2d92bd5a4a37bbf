"""Convert files of random weights in the shapes that people have, and hold the result against llama.cpp.

For each shape: write the file, run two steps of the real `ggml-diffusion convert` on all seven projections,
load base and adapter.gguf in llama.cpp, and compare its predictions with the engine's: of the base, and with
the adapter. Two steps move next to nothing, so that every B is doubled in a copy of the adapter until it
moves the engine by `MOVED_KL`. It ends with 1 if the adapter does not move llama.cpp as it moves the engine,
or if the training took more memory than was planned.

It does not measure speed, and random weights say nothing about quality.

Letters: C hidden size, F feed-forward size, V vocabulary, L layers, T tokens.

usage: family_shapes.py [--shapes gemma3-1b ...] [--layers 6] [--folder FOLDER] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import pydoc_data.topics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from family_arms import convert, llama_logits
from large_architectures import SHAPES
from make_large_gguf import make_large_gguf
from make_tiny_gguf import TENSOR_TYPES
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from tool_errors import run_tool

from ggml_diffusion.engine.cpu.q4_model import Q4Model
from ggml_diffusion.engine.interface import Batch
from ggml_diffusion.formats.adapter_file import DiffusionCheckpoint, load_adapter
from ggml_diffusion.formats.lora import LoraAdapter, TargetModule
from ggml_diffusion.machine import processors
from ggml_diffusion.text.tokenizer import Tokenizer
from ggml_diffusion.training.identity import SENTENCE, mean_kl_divergence

FAMILIES = ("qwen3-0.6b", "gemma3-1b", "phi3-mini")
N_SEQUENCES, N_TOKENS, RANK = 1, 64, 4
TEXT_CHARACTERS = 20_000
N_COMPARED = 48  # tokens, fewer than any window
RATIOS: Mapping[str, float] = {"causal": 1.0, "bidirectional": 0.0}

# Nats that the adapter should move the engine's predictions by: far above the rounding of llama.cpp, which
# holds activations in 8 bits, and far below where predictions are of one token only.
MOVED_KL = 0.3
DOUBLINGS = 30
# The pairs are float32 in both programs; what differs is the rounding of the base's activations, with the
# adapter as without, only that it starts from other activations. A part of a fused pair in the wrong place,
# or a wrong scale, differs by about what the adapter moves.
KL_FACTOR = 3.0
# ... which must be so much more than rounding, or the comparison could not tell them apart.
MOVED_FACTOR = 10.0
# Of each trained number beside itself: gradient, two moments of AdamW, and one for the int8 gate's copy and
# what a checkpoint holds while it is written, which are not there together.
COPIES_OF_TRAINED = 4
# Python's own: batches, the modules that are imported late, and pieces that its allocator keeps.
BYTES_OF_PYTHON = 8 << 20


@dataclass(frozen=True)
class Compared:
    """Mean KL divergences in nats over the compared tokens.

    base: llama.cpp from the engine. adapted: the same, both with the adapter. moved: the engine with the
    adapter from the engine without. llama_moved: the same of llama.cpp.
    """

    base: float
    adapted: float
    moved: float
    llama_moved: float

    @property
    def same_effect(self) -> bool:
        """Whether the adapter moves llama.cpp as it moves the engine."""
        can_tell = self.moved >= MOVED_FACTOR * self.base
        return can_tell and self.adapted <= KL_FACTOR * self.base


@dataclass(frozen=True)
class Memory:
    """Bytes of the conversion; None where the system does not tell.

    Attributes:
        planned: by the engine for a step, beside the model.
        trained: of the trained numbers, once.
        gate_peak: most that was resident until the identity gate was done.
        training_peak: most that was resident from there to the end of training, pages of the model included.
        bound: what training_peak may be at most.

    """

    planned: int
    trained: int
    gate_peak: int | None
    training_peak: int | None
    bound: int | None

    @classmethod
    def of(cls, found: Mapping[str, int], n_trained: int) -> Memory:
        """From what `family_arms.convert` found, and how many numbers were trained."""
        trained, bound = 4 * n_trained, None
        if {"before", "model"} <= found.keys():
            rest = COPIES_OF_TRAINED * trained + BYTES_OF_PYTHON
            bound = found["before"] + found["model"] + found["planned"] + rest
        peaks = found.get("gate_peak"), found.get("training_peak")
        return cls(found["planned"], trained, *peaks, bound)

    @property
    def as_planned(self) -> bool:
        """Whether training stayed within its bound, or nobody can tell."""
        return self.training_peak is None or self.bound is None or self.training_peak <= self.bound


@dataclass(frozen=True)
class Result:
    """What was found of a shape.

    factor: what every B was multiplied by. compared: by pass, causal and bidirectional.
    """

    shape: str
    layers: int
    file_bytes: int
    memory: Memory
    factor: float
    compared: Mapping[str, Compared]
    convert_s: float
    whole_s: float

    @property
    def passed(self) -> bool:
        """Whether the effect is the same and memory as planned."""
        return self.memory.as_planned and all(one.same_effect for one in self.compared.values())


def measure(shape: str, folder: Path, *, layers: int | None, type_name: str, n_threads: int) -> Result:
    """Write, convert and compare one shape; the files stay in the folder.

    Raises:
        UserError: a step of it failed.

    """
    started_s = time.perf_counter()
    base = make_large_gguf(folder / f"{shape}.gguf", shape=shape, type=type_name, L=layers)
    text, output = folder / "text.txt", folder / f"{shape}-run"
    text.write_text("".join(pydoc_data.topics.topics.values())[:TEXT_CHARACTERS], encoding="utf-8")
    sizes = ("--batch-size", N_SEQUENCES, "--gradient-accumulation", 1, "--sequence-length", N_TOKENS)
    adapter = ("--rank", RANK, "--target-modules", ",".join(module.value for module in TargetModule))
    arguments = (base, "--data", text, "--output", output, "--steps", 2, *sizes, *adapter, "--fresh")
    convert_from_s = time.perf_counter()
    found = convert(
        (*arguments, "--threads", n_threads), n_sequences=N_SEQUENCES, n_tokens=N_TOKENS, rank=RANK
    )
    convert_s = time.perf_counter() - convert_from_s
    checkpoint = DiffusionCheckpoint.load(output / "adapter.safetensors")
    with Q4Model.from_gguf(base, n_threads) as model:
        tokens = Tokenizer.from_gguf(base).encode(SENTENCE)[:N_COMPARED]
        factor = _visible_factor(model, checkpoint, tokens)
        visible = output / "visible.gguf"
        replace(checkpoint, tensors=_scaled(checkpoint.tensors, factor)).save_gguf(visible, model.file)
        compared = compare(model, visible, tokens)
        n_layers = model.file.L
    return Result(
        shape=shape,
        layers=n_layers,
        file_bytes=base.stat().st_size,
        memory=Memory.of(found, sum(array.size for array in checkpoint.tensors.values())),
        factor=factor,
        compared=compared,
        convert_s=convert_s,
        whole_s=time.perf_counter() - started_s,
    )


def compare(model: Q4Model, adapter: Path, tokens: NDArray[np.int32]) -> dict[str, Compared]:
    """The engine and llama.cpp with and without an adapter, by pass."""
    theirs = llama_logits(model.file.path, adapter, tokens, model.n_threads)
    lora, compared = load_adapter(adapter, model.file.arch), {}
    for name, ratio in RATIOS.items():
        batch = Batch(tokens[None], ratio)
        base, adapted = model.logits(batch)[0], model.logits(batch, lora)[0]
        their_base, their_adapted = theirs[name]
        compared[name] = Compared(
            base=mean_kl_divergence(their_base, base),
            adapted=mean_kl_divergence(their_adapted, adapted),
            moved=mean_kl_divergence(base, adapted),
            llama_moved=mean_kl_divergence(their_base, their_adapted),
        )
    return compared


def _scaled(tensors: Mapping[str, NDArray[np.float32]], factor: float) -> dict[str, NDArray[np.float32]]:
    return {
        name: array * np.float32(factor) if name.endswith(".lora_b") else array
        for name, array in tensors.items()
    }


def _visible_factor(model: Q4Model, checkpoint: DiffusionCheckpoint, tokens: NDArray[np.int32]) -> float:
    """The smallest power of two for every B that moves the engine's predictions enough."""
    batch, trained = Batch(tokens[None]), checkpoint.adapter()
    base = model.logits(batch)[0]
    for doubling in range(DOUBLINGS):
        factor = 2.0**doubling
        scaled = LoraAdapter(trained.alpha, _scaled(trained.tensors, factor))
        if mean_kl_divergence(base, model.logits(batch, scaled)[0]) >= MOVED_KL:
            break
    return factor


def table_of(results: Sequence[Result]) -> Table:
    """A column a shape."""
    table = Table(title="Families against llama.cpp")
    table.add_column("")
    for result in results:
        table.add_column(f"{result.shape}, {result.layers} layers", justify="right")

    def add(name: str, cells: Sequence[str]) -> None:
        table.add_row(name, *cells)

    def mebibytes(n_bytes: int | None) -> str:
        return "?" if n_bytes is None else f"{n_bytes / 2**20:,.0f}"

    add("file, MiB", [mebibytes(result.file_bytes) for result in results])
    for label, name in (
        ("planned for a step, MiB", "planned"),
        ("trained numbers, MiB", "trained"),
        ("peak until the identity gate, MiB", "gate_peak"),
        ("peak of training, MiB", "training_peak"),
        ("bound of that, MiB", "bound"),
    ):
        add(label, [mebibytes(getattr(result.memory, name)) for result in results])
    add("B multiplied by", [f"{result.factor:,.0f}" for result in results])
    for name in RATIOS:
        for label, field in (
            ("KL(llama.cpp || engine), base", "base"),
            ("with adapter", "adapted"),
            ("moved by adapter, engine", "moved"),
            ("moved by adapter, llama.cpp", "llama_moved"),
        ):
            add(f"{name}: {label}", [f"{getattr(result.compared[name], field):.2e}" for result in results])
    add("seconds, of them converting", [f"{one.whole_s:.0f}, {one.convert_s:.0f}" for one in results])
    add("as it should be", ["yes" if result.passed else "NO" for result in results])
    return table


def main() -> None:
    """Measure the shapes that the command line names; exits with 1 where one is not as it should be."""
    parser = argparse.ArgumentParser(description="Convert random files of real shapes, beside llama.cpp.")
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=FAMILIES)
    parser.add_argument("--layers", type=int, help="cut the shapes to so many layers")
    parser.add_argument("--type", choices=TENSOR_TYPES, default="Q4_0")
    parser.add_argument("--threads", type=int, default=processors())
    parser.add_argument("--folder", type=Path, help="keep the files there; up to 2.2 GB a shape")
    parser.add_argument("--json", type=Path, help="write the figures there too")
    options = parser.parse_args()
    results = []
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for shape in options.shapes:
            result = measure(
                shape, folder, layers=options.layers, type_name=options.type, n_threads=options.threads
            )
            results.append(result)
    Console(width=None if sys.stdout.isatty() else 140).print(table_of(results))
    if options.json is not None:
        options.json.write_text(json.dumps([asdict(result) for result in results], indent=1) + "\n")
    if not all(result.passed for result in results):
        sys.exit(1)


if __name__ == "__main__":
    run_tool(main)
