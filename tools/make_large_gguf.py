"""Write a random `llama` GGUF of any size, by default of 7B shape in Q4_0: what the benchmark runs on.

Tensors are written one after the other, so that memory stays at the largest of them. Their blocks are drawn
from a small pool that ggml itself has quantised from Gaussian weights: every type has the bytes and the
scales that it would really have, and billions of weights take seconds. Gains keep the network alive: normed
activations and attention scores are of order one, the residual stream about doubles its power over all
layers, logits spread over about two nats.

It does not make a model that is worth comparing with an exact one, as runs of weights repeat: tests use
make_tiny_gguf.py, whose quantiser, vocabulary and metadata are used here.
Sources: gguf-py's GGUFWriter for the container.

usage: make_large_gguf.py OUT.gguf [--type Q4_0] [--layers 32] [--C 4096] ... [--tied]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from make_tiny_gguf import TENSOR_TYPES, _add_metadata, quantise
from numpy.typing import NDArray
from tiny_vocabularies import bpe_vocabulary
from tool_errors import run_tool

SHAPE_7B = {"L": 32, "C": 4096, "H": 32, "G": 32, "F": 11008, "V": 32000}

POOL_WEIGHTS = 1 << 18
RUN_WEIGHTS = 32  # weights that are drawn together; a longer block of the type is drawn whole
# Root mean square of silu(g) * u for independent standard normal g and u.
SWIGLU_RMS = 0.6


def _tensors(
    *, L: int, C: int, H: int, G: int, D: int, F: int, V: int, tied: bool
) -> Iterator[tuple[str, tuple[int, ...], float]]:
    """Name, shape and root mean square of every tensor, in file order; those of one dimension are norms."""
    # A tied head reads rows of the embedding, which must then be of the size that the head needs.
    head_rms = 2.0 / math.sqrt(C)
    embedding_rms = head_rms if tied else 1.0
    # 2 L additions that together have the power of the embedding itself
    added_rms = embedding_rms / math.sqrt(2 * L)
    yield "token_embd.weight", (V, C), embedding_rms
    for layer in range(L):
        prefix = f"blk.{layer}."
        yield prefix + "attn_norm.weight", (C,), 1.0
        yield prefix + "attn_q.weight", (H * D, C), 1.0 / math.sqrt(C)
        yield prefix + "attn_k.weight", (G * D, C), 1.0 / math.sqrt(C)
        yield prefix + "attn_v.weight", (G * D, C), 1.0 / math.sqrt(C)
        yield prefix + "attn_output.weight", (C, H * D), added_rms / math.sqrt(H * D)
        yield prefix + "ffn_norm.weight", (C,), 1.0
        yield prefix + "ffn_gate.weight", (F, C), 1.0 / math.sqrt(C)
        yield prefix + "ffn_up.weight", (F, C), 1.0 / math.sqrt(C)
        yield prefix + "ffn_down.weight", (C, F), added_rms / SWIGLU_RMS / math.sqrt(F)
    yield "output_norm.weight", (C,), 1.0
    if not tied:
        yield "output.weight", (V, C), head_rms


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


def make_large_gguf(
    path: str | Path,
    *,
    type: str = "Q4_0",
    seed: int = 0,
    L: int = SHAPE_7B["L"],
    C: int = SHAPE_7B["C"],
    H: int = SHAPE_7B["H"],
    G: int = SHAPE_7B["G"],
    D: int | None = None,
    F: int = SHAPE_7B["F"],
    V: int = SHAPE_7B["V"],
    tied: bool = False,
    context: int = 4096,
) -> Path:
    """Write the file and return its path.

    type: the ggml type of every matrix (embedding and head too); norms are F32.
    D: head size, C // H by default. C, H * D and F are multiples of the type's block and of 32.
    The same arguments give the same bytes. ValueError: a size that the type or the vocabulary cannot have.
    """
    head_size = C // H if D is None else D
    sizes = {"L": L, "C": C, "F": F, "H": H, "G": G, "D": head_size, "V": V}
    rng = np.random.Generator(np.random.SFC64(seed))
    pool = _BlockPool(type, rng)
    writer = gguf.GGUFWriter(str(path), "llama")
    _add_metadata(
        writer, bpe_vocabulary(V, reserved=6), context=context, rope_base=10000.0, eps=1e-5, **sizes
    )
    tensors = list(_tensors(**sizes, tied=tied))
    for name, shape, _ in tensors:
        if len(shape) == 1:
            writer.add_tensor_info(name, shape, np.dtype(np.float32), 4 * shape[0])
        else:
            shape_bytes = (shape[0], pool.row_bytes(shape[1]))
            writer.add_tensor_info(
                name, shape_bytes, np.dtype(np.uint8), math.prod(shape_bytes), raw_dtype=pool.type
            )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for _, shape, rms in tensors:
        if len(shape) == 1:
            writer.write_tensor_data((1.0 + 0.2 * rng.standard_normal(shape)).astype(np.float32))
        else:
            writer.write_tensor_data(pool.matrix(shape, rms))
    writer.close()
    return Path(path)


def main() -> None:
    """Write one file as the command line says."""
    parser = argparse.ArgumentParser(description="Write a large random llama GGUF.")
    parser.add_argument("path", type=Path)
    parser.add_argument("--type", choices=TENSOR_TYPES, default="Q4_0")
    parser.add_argument("--layers", "--L", dest="L", type=int, default=SHAPE_7B["L"])
    settings: dict[str, Any] = {name: size for name, size in SHAPE_7B.items() if name != "L"}
    for name, default in (settings | {"seed": 0, "context": 4096}).items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--D", type=int, default=None, help="head size (C / H by default)")
    parser.add_argument("--tied", action="store_true", help="no output.weight: the head reads the embedding")
    make_large_gguf(**vars(parser.parse_args()))


if __name__ == "__main__":
    run_tool(main)
