"""How fast weights of each type are packed for products, without the products.

A section of tools/bench/bench.py: a process a type, all take turns, and a ratio is the median of the rounds'
own ratios. It neither prints nor judges. Letters: L layers, C hidden size, H query heads, G key/value heads,
F feed-forward size, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from bench_arms import Reply
from bench_sections import Row, Settings, Work, generated_model, our_arm, spread
from make_tiny_gguf import TENSOR_TYPES as WRITABLE_TYPES

from ggml_diffusion.formats.tensor_types import TENSOR_TYPES

PACKING_BASE = "Q4_K"
# All types that can be written but float ones; the layer is larger than a core's own caches.
PACKING_TYPES = tuple(name for name in WRITABLE_TYPES if TENSOR_TYPES[name].block > 1)
PACKING_SIZES = {"L": 1, "C": 2048, "H": 32, "G": 8, "F": 5632, "V": 512}
PACKING_TIME_S = 0.2


def packing(settings: Settings) -> list[Row]:
    """Rate at which weights of each type are packed for products, alone and beside Q4_K's."""
    work = Work("packing", 1, 8)
    rates: dict[str, list[Reply]] = {name: [] for name in PACKING_TYPES}
    with ExitStack() as stack:
        arms = {
            name: stack.enter_context(
                our_arm(settings, name, generated_model(settings, name, PACKING_SIZES), work, train=False)
            )
            for name in PACKING_TYPES
        }
        for round_number in range(settings.n_rounds + 1):
            for name, arm in arms.items():
                reply = arm.ask("packing", time_s=PACKING_TIME_S)
                if round_number > 0:
                    rates[name].append(reply)
        about = arms[PACKING_BASE].about
    return [_packing_row(name, rates[name], rates[PACKING_BASE], about) for name in PACKING_TYPES]


def _packing_row(name: str, found: Sequence[Reply], base: Sequence[Reply], about: Mapping[str, Any]) -> Row:
    """Medians of a type's rates, and of the rounds' ratios to the base's."""
    own = TENSOR_TYPES[name].own_kernels
    row: Row = {"type": name, "own_kernels": own, "kernels": about["kernels"], "element": about["element"]}
    for direction in ("forward", "backward"):
        pairs = zip(found, base, strict=True)
        row[f"{direction}_gweights"] = spread(reply[direction] for reply in found)
        row[f"{direction}_of_base"] = spread(reply[direction] / other[direction] for reply, other in pairs)
    return row
