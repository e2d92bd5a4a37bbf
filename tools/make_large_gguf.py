"""Write a random GGUF of any size and architecture, by default of 7B shape in Q4_0: the benchmark's models.

Tensors are written one after the other, so that memory stays at the largest of them. Their blocks are drawn
from a small pool that ggml itself has quantised from Gaussian weights: every type has the bytes and the
scales that it would really have, and billions of weights take seconds. What a model holds, and how large its
weights are so that the network is alive, is said by large_architectures.py.

It does not make a model that is worth comparing with an exact one, as runs of weights repeat: tests use
make_tiny_gguf.py, whose quantiser, vocabularies and metadata are used here.
Sources: gguf-py's GGUFWriter for the container.

usage: make_large_gguf.py OUT.gguf [--shape gemma3-1b] [--arch qwen2] [--type Q4_0] [--layers 4] ...
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from large_architectures import SHAPES, LargeShape, Tensor, keys_of, tensors_of
from make_tiny_gguf import TENSOR_TYPES, _add_metadata, _set_key, quantise
from numpy.typing import NDArray
from tiny_architectures import ARCHITECTURES, Shape
from tiny_vocabularies import bpe_vocabulary, spm_vocabulary
from tool_errors import run_tool

SHAPE_7B = {name: size for name, size in SHAPES["7b"].sizes.items() if name != "D"}

POOL_WEIGHTS = 1 << 18
RUN_WEIGHTS = 32  # weights that are drawn together; a longer block of the type is drawn whole


class _BlockPool:
    """Quantised runs of Gaussian weights, one set of them for each root mean square."""

    def __init__(self, type_name: str, rng: np.random.Generator) -> None:
        self.type = gguf.GGMLQuantizationType[type_name]
        block, block_bytes = gguf.GGML_QUANT_SIZES[self.type]
        self.run_weights = max(block, RUN_WEIGHTS)
        self.run_bytes = self.run_weights // block * block_bytes
        self._rng = rng
        self._runs: dict[float, NDArray[np.uint8]] = {}

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row."""
        if columns % self.run_weights:
            raise ValueError(
                f"{self.type.name} needs rows in multiples of {self.run_weights}, these have {columns}"
            )
        return columns // self.run_weights * self.run_bytes

    def matrix(self, shape: tuple[int, ...], rms: float) -> NDArray[np.uint8]:
        """The bytes (rows, bytes a row) of a matrix of this shape, its runs drawn at random."""
        rows, columns = shape
        if rms not in self._runs:
            weights = self._rng.standard_normal((POOL_WEIGHTS // self.run_weights, self.run_weights))
            self._runs[rms] = quantise((weights * rms).astype(np.float32), self.type.name)
        runs = self._runs[rms]
        drawn = self._rng.integers(len(runs), size=rows * columns // self.run_weights)
        return runs[drawn].reshape(rows, self.row_bytes(columns))


def _settled(shape: str, arch: str | None) -> LargeShape:
    """A named shape, or its sizes in another architecture."""
    named = SHAPES[shape]
    if arch is None or arch == named.arch:
        return named
    return replace(named, arch=arch, tied=ARCHITECTURES[arch].tied, keys={})


def make_large_gguf(
    path: str | Path,
    *,
    shape: str = "7b",
    arch: str | None = None,
    type: str = "Q4_0",
    seed: int = 0,
    L: int | None = None,
    C: int | None = None,
    H: int | None = None,
    G: int | None = None,
    D: int | None = None,
    F: int | None = None,
    V: int | None = None,
    tied: bool | None = None,
    context: int | None = None,
    keys: Mapping[str, Any] | None = None,
) -> Path:
    """Write the file and return its path. What is None is as the shape has it.

    shape: one of SHAPES. arch: one of ARCHITECTURES, with its own keys and tensors in the shape's sizes.
    type: the ggml type of every matrix (embedding and head too); norms, biases and RoPE factors are F32.
    D: head size; C // H where C or H is given. C, H * D and F are multiples of the type's block and of 32.
    keys: without the architecture's prefix, over those of the shape; None takes one away.
    The same arguments give the same bytes. ValueError: a size that the type or the vocabulary cannot have.
    """
    named = _settled(shape, arch)
    given = {"L": L, "C": C, "H": H, "G": G, "D": D, "F": F, "V": V}
    sizes = {**named.sizes, **{name: size for name, size in given.items() if size is not None}}
    if D is None and not (C is None and H is None):
        sizes["D"] = sizes["C"] // sizes["H"]
    whole = Shape(**sizes, tied=named.tied if tied is None else tied)
    all_keys = keys_of(named.arch, whole, {**named.keys, **(keys or {})})
    tensors = list(tensors_of(named.arch, whole, all_keys))
    rng = np.random.Generator(np.random.SFC64(seed))
    pool = _BlockPool(type, rng)
    writer = gguf.GGUFWriter(str(path), named.arch)
    vocabulary = {"bpe": bpe_vocabulary, "spm": spm_vocabulary}[named.tokenizer](whole.V, reserved=6)
    _add_metadata(writer, vocabulary, context=context or named.context, rope_base=10000.0, eps=1e-5, **sizes)
    for name, value in all_keys.items():
        _set_key(writer, f"{named.arch}.{name}", value)
    _write(writer, tensors, pool, rng)
    return Path(path)


def _write(
    writer: gguf.GGUFWriter, tensors: list[Tensor], pool: _BlockPool, rng: np.random.Generator
) -> None:
    """Write the header, then one tensor after the other."""
    for tensor in tensors:
        if len(tensor.shape) == 1:
            size = tensor.shape[0]
            writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), 4 * size)
        else:
            shape_bytes = (tensor.shape[0], pool.row_bytes(tensor.shape[1]))
            writer.add_tensor_info(
                tensor.name, shape_bytes, np.dtype(np.uint8), math.prod(shape_bytes), raw_dtype=pool.type
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in tensors:
        if tensor.fixed is not None:
            writer.write_tensor_data(tensor.fixed)
        elif len(tensor.shape) == 1:
            drawn = tensor.mean + tensor.rms * rng.standard_normal(tensor.shape)
            writer.write_tensor_data(drawn.astype(np.float32))
        else:
            writer.write_tensor_data(pool.matrix(tensor.shape, tensor.rms))
    writer.close()


def main() -> None:
    """Write one file as the command line says."""
    parser = argparse.ArgumentParser(description="Write a large random GGUF.")
    parser.add_argument("path", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="7b")
    parser.add_argument("--arch", choices=ARCHITECTURES, help="another architecture in the shape's sizes")
    parser.add_argument("--type", choices=TENSOR_TYPES, default="Q4_0")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--layers", "--L", dest="L", type=int, help="fewer or more layers than the shape has")
    for name in "CHGFV":
        parser.add_argument(f"--{name}", type=int, help="another size than the shape's")
    parser.add_argument("--D", type=int, help="head size (C / H where one of these is given)")
    parser.add_argument("--context", type=int)
    parser.add_argument("--tied", action="store_true", default=None, help="the head reads the embedding")
    parser.add_argument("--keys", type=json.loads, help="a JSON object of keys without the prefix")
    make_large_gguf(**vars(parser.parse_args()))


if __name__ == "__main__":
    run_tool(main)
