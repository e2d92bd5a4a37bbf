"""LoRA pairs of projections that lie together in one tensor of the base (Phi's attn_qkv, its gate in ffn_up).

llama.cpp takes one pair a tensor. The pairs of the parts are stacked: A one above the other, B block by block
on the diagonal, so that the rows of each part see its own A alone. llama.cpp scales a pair by alpha / its
rank: the rank of the stack is R times a power of two, by rows of zeros where need be, and B is multiplied by
that power. That is exact, so taking the pairs apart gives the same bits back.

Deliberately not here: files (gguf_adapter.py).
Letters: R rank of each part.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggml_diffusion.errors import UserError, quoted
from ggml_diffusion.formats.architectures import fused_projections
from ggml_diffusion.formats.lora import TargetModule
from ggml_diffusion.formats.model_file import ModelFile
from ggml_diffusion.formats.tensor_names import LORA_A_SUFFIX, LORA_B_SUFFIX, layer_tensor

Pairs = dict[str, NDArray[np.float32]]


@dataclass(frozen=True)
class Stack:
    """The parts of one fused tensor that are adapted, the same in every layer.

    Attributes:
        n_rows: of the tensor.
        parts: projection -> its first row and its rows.

    """

    n_rows: int
    parts: Mapping[TargetModule, tuple[int, int]]

    @property
    def factor(self) -> int:
        """What the rank of a part is multiplied by: a power of two that has room for all parts."""
        return 1 << (len(self.parts) - 1).bit_length()


Layout = Mapping[str, Stack]  # by the fused tensor's name inside a layer, "attn_qkv"


def layout_of(base: ModelFile, tensors: Mapping[str, NDArray[np.float32]]) -> Layout:
    """What of an adapter has to be stacked for a base; empty where each projection has its own tensor."""
    layout: dict[str, Stack] = {}
    for weight, modules in fused_projections(0, base.tensors).items():
        parts, n_rows = {}, 0
        for module in modules:
            rows = module.weight_shape(base)[0]
            if any(name.endswith(f".{module.gguf_name}.weight{LORA_A_SUFFIX}") for name in tensors):
                parts[module] = (n_rows, rows)
            n_rows += rows
        if parts:
            layout[weight.split(".")[2]] = Stack(n_rows, parts)
    return layout


def write_layout(layout: Layout) -> str:
    """A layout as JSON."""
    return json.dumps(
        {
            name: {"rows": stack.n_rows, "parts": {part.value: place for part, place in stack.parts.items()}}
            for name, stack in layout.items()
        }
    )


def read_layout(text: str) -> Layout:
    """What `write_layout` wrote.

    Raises:
        UserError: it is something else.

    """
    try:
        layout = {name: _read_stack(stack) for name, stack in json.loads(text).items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise UserError("its key about fused tensors is damaged") from None
    return layout


def _read_stack(stack: Any) -> Stack:
    """A stack out of JSON; what is wrong with it raises one of the errors that JSON itself may."""
    parts = {TargetModule(part): (first, rows) for part, (first, rows) in stack["parts"].items()}
    numbers = [stack["rows"], *(number for place in parts.values() for number in place)]
    if any(type(number) is not int or not 0 <= number < 1 << 31 for number in numbers):
        raise ValueError("no whole number, or out of range")
    if not parts or any(rows < 1 or first + rows > stack["rows"] for first, rows in parts.values()):
        raise ValueError("parts outside of the tensor")
    return Stack(stack["rows"], parts)


def stack_pairs(tensors: Mapping[str, NDArray[np.float32]], layout: Layout) -> Pairs:
    """Put the pairs of fused projections together; the others stay as they are.

    Args:
        tensors: pairs by the names of their projections, as in `LoraAdapter`.
        layout: from `layout_of`.

    """
    stacked = dict(tensors)
    for layer in sorted({int(name.split(".")[1]) for name in tensors}):
        for name, stack in layout.items():
            first_part = next(iter(stack.parts))
            rank, in_size = tensors[first_part.weight_name(layer) + LORA_A_SUFFIX].shape
            a = np.zeros((stack.factor * rank, in_size), dtype=np.float32)
            b = np.zeros((stack.n_rows, stack.factor * rank), dtype=np.float32)
            for index, (part, (first, rows)) in enumerate(stack.parts.items()):
                weight, columns = part.weight_name(layer), _columns(index, rank)
                a[columns] = stacked.pop(weight + LORA_A_SUFFIX)
                b[first : first + rows, columns] = stacked.pop(weight + LORA_B_SUFFIX)
            fused = layer_tensor(layer, f"{name}.weight")
            stacked[fused + LORA_A_SUFFIX] = a
            stacked[fused + LORA_B_SUFFIX] = b * np.float32(stack.factor)
    return stacked


def unstack_pairs(tensors: Mapping[str, NDArray[np.float32]], layout: Layout) -> Pairs:
    """Take the stacked pairs apart.

    Raises:
        UserError: a pair is no stack of this layout.

    """
    apart = dict(tensors)
    for layer in {int(match[1]) for name in tensors if (match := re.match(r"blk\.(\d+)\.", name))}:
        for name, stack in layout.items():
            weight = layer_tensor(layer, f"{name}.weight")
            a, b = apart.pop(weight + LORA_A_SUFFIX, None), apart.pop(weight + LORA_B_SUFFIX, None)
            if a is None or b is None or a.ndim != 2 or b.shape != (stack.n_rows, len(a)):
                raise UserError(f"its pair for {quoted(weight)} is not what its key about fused tensors says")
            rank, rest = len(a) // stack.factor, b.copy()
            for index, (part, (first, rows)) in enumerate(stack.parts.items()):
                columns = _columns(index, rank)
                own, own_b = part.weight_name(layer), b[first : first + rows, columns]
                apart[own + LORA_A_SUFFIX] = np.ascontiguousarray(a[columns])
                apart[own + LORA_B_SUFFIX] = np.ascontiguousarray(own_b / np.float32(stack.factor))
                rest[first : first + rows, columns] = 0
            if rank == 0 or len(a) % stack.factor or rest.any():
                raise UserError(f"its pair for {quoted(weight)} is no stack of its parts' pairs")
    return apart


def _columns(index: int, rank: int) -> slice:
    """The place of a part's rank in the rank of the stack."""
    return slice(index * rank, (index + 1) * rank)
