"""Low-rank adapters as plain arrays: their names, shapes, start values and checks.

A projection computes W x + (alpha / R) * B (A x), with A (R, in) and B (out, R) [Hu et al. 2021,
arXiv:2106.09685]. Tensors carry GGUF names and GGUF row order ("blk.0.attn_q.weight.lora_a"), the form that
both the C core and llama.cpp read, so nothing is renamed or permuted between training and export.

Deliberately not here: files (adapter_file.py), arithmetic (the C core) and settings (config/).
Letters: C hidden size, H query heads, G key/value heads, D head size, F feed-forward size, V vocabulary,
R rank, L layers.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ggml_diffusion.errors import UserError, quoted
from ggml_diffusion.formats.tensor_names import (
    LORA_A_SUFFIX,
    LORA_B_SUFFIX,
    MASK_EMBEDDING,
    layer_tensor,
)


class ModelDims(Protocol):
    """The sizes of a base model; `ModelFile` has them."""

    @property
    def L(self) -> int:
        """Layers."""

    @property
    def C(self) -> int:
        """Hidden size."""

    @property
    def H(self) -> int:
        """Query heads."""

    @property
    def G(self) -> int:
        """Key/value heads."""

    @property
    def D(self) -> int:
        """Head size."""

    @property
    def F(self) -> int:
        """Feed-forward size."""

    @property
    def V(self) -> int:
        """Size of the vocabulary."""


class TargetModule(str, Enum):
    """A linear projection of a transformer layer that can carry an adapter (the names PEFT uses)."""

    QUERY_PROJ = "q_proj"
    KEY_PROJ = "k_proj"
    VALUE_PROJ = "v_proj"
    OUTPUT_PROJ = "o_proj"
    GATE_PROJ = "gate_proj"
    UP_PROJ = "up_proj"
    DOWN_PROJ = "down_proj"

    @property
    def gguf_name(self) -> str:
        """The projection's name inside a GGUF layer, e.g. "attn_q"."""
        return _GGUF_NAMES[self]

    def weight_name(self, layer: int) -> str:
        """The projection's GGUF tensor name in a layer, e.g. "blk.3.attn_q.weight"."""
        return layer_tensor(layer, f"{self.gguf_name}.weight")

    def weight_shape(self, dims: ModelDims) -> tuple[int, int]:
        """The projection's shape (out, in) in a model of these sizes."""
        queries, keys = dims.H * dims.D, dims.G * dims.D
        return {
            TargetModule.QUERY_PROJ: (queries, dims.C),
            TargetModule.KEY_PROJ: (keys, dims.C),
            TargetModule.VALUE_PROJ: (keys, dims.C),
            TargetModule.OUTPUT_PROJ: (dims.C, queries),
            TargetModule.GATE_PROJ: (dims.F, dims.C),
            TargetModule.UP_PROJ: (dims.F, dims.C),
            TargetModule.DOWN_PROJ: (dims.C, dims.F),
        }[self]


_GGUF_NAMES = {
    TargetModule.QUERY_PROJ: "attn_q",
    TargetModule.KEY_PROJ: "attn_k",
    TargetModule.VALUE_PROJ: "attn_v",
    TargetModule.OUTPUT_PROJ: "attn_output",
    TargetModule.GATE_PROJ: "ffn_gate",
    TargetModule.UP_PROJ: "ffn_up",
    TargetModule.DOWN_PROJ: "ffn_down",
}


@dataclass
class LoraAdapter:
    """An adapter as the engine takes it. The engine reads the arrays in place, without a copy.

    Attributes:
        alpha: scale of every pair is alpha / R, with R the pair's own rank.
        tensors: "blk.N.<projection>.weight.lora_a" (R, in) and ".lora_b" (out, R), float32, C-contiguous.
        mask_token_id: the token that stands for a masked position; its logit is -inf in every loss.
        mask_embedding: (C,) float32, added to the embedding of `mask_token_id`.

    """

    alpha: float
    tensors: dict[str, NDArray[np.float32]]
    mask_token_id: int | None = None
    mask_embedding: NDArray[np.float32] | None = None

    def check(self, dims: ModelDims) -> None:
        """Refuse an adapter that does not fit a model of these sizes; the message names the tensor.

        Raises:
            UserError: unknown or unpaired tensor, wrong shape or type, a value that is not finite, or a mask
                token outside of the vocabulary.

        """
        if not math.isfinite(self.alpha):
            raise UserError(f"adapter: alpha is {self.alpha}, not a finite number")
        known = {
            module.weight_name(layer): module.weight_shape(dims)
            for layer in range(dims.L)
            for module in TargetModule
        }
        for weight, rank in lora_ranks(self.tensors).items():
            if weight not in known:
                raise UserError(
                    f"adapter: tensor {quoted(weight)} is no projection of a model with {dims.L} layers"
                )
            out_size, in_size = known[weight]
            _check_array(weight + LORA_A_SUFFIX, self.tensors[weight + LORA_A_SUFFIX], (rank, in_size))
            _check_array(weight + LORA_B_SUFFIX, self.tensors[weight + LORA_B_SUFFIX], (out_size, rank))
        if self.mask_token_id is not None and not 0 <= self.mask_token_id < dims.V:
            raise UserError(
                f"adapter: mask token {self.mask_token_id} is outside of the vocabulary of {dims.V}"
            )
        if self.mask_embedding is not None:
            _check_array(MASK_EMBEDDING, self.mask_embedding, (dims.C,))
            if self.mask_token_id is None:
                raise UserError(
                    "adapter: it has a mask_embedding but does not say which token is the mask token"
                )


def lora_ranks(tensors: Mapping[str, NDArray[np.float32]]) -> dict[str, int]:
    """Pair up LoRA tensors: the name of each adapted weight -> the rank of its pair.

    Raises:
        UserError: a name that is not of a pair, a half pair, or a pair whose halves disagree on the rank.

    """
    ranks: dict[str, int] = {}
    for name in tensors:
        weight, suffix = name[: -len(LORA_A_SUFFIX)], name[-len(LORA_A_SUFFIX) :]
        if suffix not in (LORA_A_SUFFIX, LORA_B_SUFFIX):
            raise UserError(f"adapter: tensor {quoted(name)} ends neither in .lora_a nor in .lora_b")
        other = weight + (LORA_B_SUFFIX if suffix == LORA_A_SUFFIX else LORA_A_SUFFIX)
        if other not in tensors:
            raise UserError(f"adapter: tensor {quoted(name)} has no partner {quoted(other)}")
        if suffix == LORA_B_SUFFIX:
            continue
        a, b = tensors[name], tensors[other]
        if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or a.shape[0] == 0:
            raise UserError(
                f"adapter: {quoted(weight)} has a pair of shapes {a.shape} and {b.shape}, "
                f"not (R, in) and (out, R)"
            )
        ranks[weight] = a.shape[0]
    return ranks


def largest_rank(adapter: LoraAdapter | None) -> int:
    """The largest R of an adapter's pairs; 0 without any."""
    return 0 if adapter is None else max(lora_ranks(adapter.tensors).values(), default=0)


def _check_array(name: str, array: NDArray[np.float32], shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise UserError(
            f"adapter: tensor {quoted(name)} has shape {array.shape}, but the model needs {shape}"
        )
    if array.dtype != np.float32 or not array.flags.c_contiguous:
        raise UserError(
            f"adapter: tensor {quoted(name)} must be a contiguous float32 array, not {array.dtype}"
        )
    if not np.isfinite(array).all():
        raise UserError(f"adapter: tensor {quoted(name)} holds NaN or infinite values")


class ParameterStore:
    """Everything that is trained: one flat float32 vector, with a named view of each tensor.

    The optimizer works on `flat`, the engine and the exports on `views`; both see the same memory.

    Attributes:
        flat: (n,) float32, C-contiguous, starts at zero.
        views: name -> view of `flat` in the tensor's shape.
        slices: name -> the tensor's place in `flat`.

    """

    def __init__(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.slices: dict[str, slice] = {}
        end = 0
        for name, shape in shapes.items():
            start, end = end, end + math.prod(shape)
            self.slices[name] = slice(start, end)
        self.flat: NDArray[np.float32] = np.zeros(end, dtype=np.float32)
        self.views: dict[str, NDArray[np.float32]] = {
            name: self.flat[self.slices[name]].reshape(shape) for name, shape in shapes.items()
        }


def lora_shapes(dims: ModelDims, targets: Iterable[TargetModule], rank: int) -> dict[str, tuple[int, int]]:
    """Name and shape of every LoRA tensor: layer by layer, in the order of `TargetModule`, A before B."""
    wanted = set(targets)
    shapes: dict[str, tuple[int, int]] = {}
    for layer in range(dims.L):
        for module in TargetModule:
            if module in wanted:
                out_size, in_size = module.weight_shape(dims)
                shapes[module.weight_name(layer) + LORA_A_SUFFIX] = (rank, in_size)
                shapes[module.weight_name(layer) + LORA_B_SUFFIX] = (out_size, rank)
    return shapes


def init_lora(views: Mapping[str, NDArray[np.float32]], generator: np.random.Generator) -> None:
    """Fill LoRA tensors in place with their start values; views of other names are left as they are.

    A is Kaiming-uniform with PEFT's a = sqrt(5), i.e. uniform in +-1/sqrt(in); B is zero, so that the adapter
    changes nothing before its first step.
    """
    for name, view in views.items():
        if name.endswith(LORA_A_SUFFIX):
            bound = 1.0 / math.sqrt(view.shape[1])
            view[...] = (2.0 * generator.random(view.shape, dtype=np.float32) - 1.0) * np.float32(bound)
        elif name.endswith(LORA_B_SUFFIX):
            view[...] = 0.0
