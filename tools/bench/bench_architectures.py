"""Whether an architecture is slower than `llama` for the same operations: a section of tools/bench/bench.py.

For each architecture a small model takes training steps in turn with a `llama` of the same sizes and layers,
A B A B, both with the same int8 products. What counts is the time of the engine (forward, loss, gradients)
an operation of the matrix products that the step needs. What an architecture has beyond them (norms, biases,
caps, another gate) does the same work at more cost, and shows as a ratio above 1. `llama` beside itself shows
what the machine's noise makes of it. The processors' own time is given too: other programs disturb it less.

It neither prints nor judges. Letters: B sequences, T tokens, M rows (B T), C hidden size, H query heads, G
key/value heads, D head size, F feed-forward size, V vocabulary, L layers, R rank.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from bench_arms import Arm, Reply, alternate
from bench_sections import RANK, Row, Settings, Work, generated_model, our_arm, spread
from tiny_architectures import ARCHITECTURES

from ggml_diffusion.formats.architectures import ARCHITECTURES as NETWORKS
from ggml_diffusion.formats.lora import TargetModule
from ggml_diffusion.formats.model_check import read_model
from ggml_diffusion.formats.model_file import ModelFile

BASE = "llama"
TYPE = "Q4_0"
SIZES: Mapping[str, int] = {"C": 1024, "H": 16, "G": 8, "D": 64, "F": 3072, "V": 4096}
BATCH_SIZE, SEQUENCE_LENGTH = 8, 256
MASKED_SHARE = 0.5  # of the rows, on average
# Products over the keys: scores and output, and in the backward scores again, dP, dV, dQ and dK.
ATTENTION_PRODUCTS = 7


@dataclass(frozen=True)
class Case:
    """An architecture to measure.

    Attributes:
        name: for tables and --work.
        arch: one of ARCHITECTURES.
        keys: over those that a large model of it has.

    """

    name: str
    arch: str
    keys: Mapping[str, Any] = field(default_factory=dict)


# Windows of real models are wider than these texts; one row has windows that make a difference.
CASES = (
    *(Case(arch, arch) for arch in ARCHITECTURES),
    Case("gemma3, window 64", "gemma3", {"attention.sliding_window": 64}),
)


def visible_pairs(n_tokens: int, window: int) -> int:
    """Pairs (query, key) of one head: all, or those less than `window` apart; 0 = no window."""
    reach = min(window or n_tokens, n_tokens)
    return n_tokens * (2 * reach - 1) - reach * (reach - 1)


def step_operations(file: ModelFile, work: Work) -> float:
    """Multiplications and additions of a step's matrix products, with gradients of LoRA pairs and inputs.

    Args:
        file: the model.
        work: batch and targets of the pairs.

    """
    n_rows = work.n_tokens
    frozen = pairs = 0
    for module in TargetModule:
        out_size, in_size = module.weight_shape(file)
        frozen += out_size * in_size
        pairs += RANK * (out_size + in_size) if module.value in work.targets else 0
    keys = sum(visible_pairs(work.sequence_length, window) for window in windows_of(file))
    # frozen weights: output and input's gradient; pairs: these and their own gradients
    linear = 2.0 * n_rows * file.L * (2 * frozen + 3 * pairs)
    attention = 2.0 * ATTENTION_PRODUCTS * work.batch_size * file.H * file.D * keys
    head = 2.0 * 2 * MASKED_SHARE * n_rows * file.C * file.V
    return linear + attention + head


def windows_of(file: ModelFile) -> list[int]:
    """The window of each layer in tokens, 0 where it has none; scalar patterns only, as generated files have.

    Source: the table of architectures for the default pattern.
    """
    entry = NETWORKS[file.arch]
    width = file.metadata.get(f"{file.arch}.attention.sliding_window", entry.window)
    period = entry.window_period
    if not isinstance(width, int) or not width or not period:
        return [0] * file.L
    return [0 if layer % period == period - 1 else width for layer in range(file.L)]


def architectures(settings: Settings) -> list[Row]:
    """Each architecture beside llama: rates, time an operation, memory and where the difference lies."""
    return [_measured(settings, case) for case in CASES if settings.work in case.name]


def _measured(settings: Settings, case: Case) -> Row:
    n_layers = ARCHITECTURES[case.arch].L
    work = Work(case.name, BATCH_SIZE, SEQUENCE_LENGTH)
    sizes: dict[str, Any] = {"arch": case.arch, "L": n_layers, **SIZES}
    if case.keys:
        sizes["keys"] = dict(case.keys)
    model = generated_model(settings, TYPE, sizes)
    base = generated_model(settings, TYPE, {"arch": BASE, "L": n_layers, **SIZES})
    with ExitStack() as stack:
        arm = stack.enter_context(our_arm(settings, case.name, model, work))
        # in int8 goes what the architecture's own first batch allows
        base_work = replace(work, int8=arm.about["int8"])
        arms = [arm, stack.enter_context(our_arm(settings, BASE, base, base_work))]
        alternate(arms, 1, "step")
        ours, bases = alternate(arms, settings.n_rounds, "step")
        row = _row(arms, (ours, bases), [step_operations(read_model(path), work) for path in (model, base)])
    return {"architecture": case.name, "layers": n_layers, **row}


def _row(arms: Sequence[Arm], replies: tuple[list[Reply], list[Reply]], operations: Sequence[float]) -> Row:
    """The figures of an architecture's arm and of llama's."""
    ours, bases = replies
    memory, base_memory = (arm.ask("memory") for arm in arms)
    rounds = list(zip(ours, bases, strict=True))
    a_part = {
        part: statistics.median(
            (one["parts_s"][part] - other["parts_s"].get(part, 0.0)) / other["engine_s"]
            for one, other in rounds
        )
        for part in ours[0]["parts_s"]
    }
    return {
        "element": arms[0].about["element"],
        "operations": operations[0],
        "gops": spread(1e-9 * operations[0] / reply["engine_s"] for reply in ours),
        "base_gops": spread(1e-9 * operations[1] / reply["engine_s"] for reply in bases),
        "time_ratio": _ratio(rounds, operations, "engine_s"),
        "processor_ratio": _ratio(rounds, operations, "processor_s"),
        "more_of_base_time": a_part,
        "peak_bytes": memory["peak_bytes"],
        "model_bytes": memory["model_bytes"],
        "planned_bytes": memory["planned_bytes"],
        "base_planned_bytes": base_memory["planned_bytes"],
    }


def _ratio(rounds: Sequence[tuple[Reply, Reply]], operations: Sequence[float], name: str) -> Row:
    """Seconds an operation as a multiple of llama's, of each round."""
    return spread((ours[name] / operations[0]) / (base[name] / operations[1]) for ours, base in rounds)
