"""Whether all numbers of a model's tensors are finite, found while the SHA-256 of the file is taken.

A packed block is finite if its scales are: quants are whole numbers, and no scale times a quant leaves
float32. So only scales, minima and float tensors are looked at, which takes a seventh of the time of the sum.

Deliberately not here: what the blocks hold else (csrc/kernels/unpack.h). Source: ggml's ggml-common.h.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from ggml_diffusion.errors import UserError, quoted
from ggml_diffusion.formats.gguf_reader import TensorInfo, read_header
from ggml_diffusion.formats.model_file import ModelFile, file_sha256
from ggml_diffusion.formats.tensor_types import TENSOR_TYPES
from ggml_diffusion.regular_file import open_regular

_CHUNK_BYTES = 1 << 20
_HALF_EXPONENT, _BFLOAT_EXPONENT = 0x7C00, 0x7F80  # all bits of it set: NaN or infinite
# MXFP4's scale is 2^(e - 127) and its largest value 6: from here on that is no float32, and 255 stands for
# NaN.
_FIRST_BAD_E8M0 = 253

# Where the float16 scales and minima of a block lie, in bytes. NVFP4's scales have no code for NaN that ggml
# reads as such.
_HALVES: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("Q8_0", "Q4_0", "Q5_0", "IQ4_NL", "IQ4_XS", "Q1_0", "Q2_0"), (0,)),
    **dict.fromkeys(("IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
    "NVFP4": (),
}
Blocks = NDArray[np.uint8]  # (n, bytes of a block)


def checked_sha256(model: ModelFile, sound: str | None = None) -> str:
    """The SHA-256 of a model whose numbers are all finite, as `file_sha256` has it.

    Args:
        model: of supported types, as from `read_model`.
        sound: the SHA-256 of a file that was found to be finite before: this one is not looked at if it is
        that.

    Raises:
        UserError: NaN or an infinite number, with the tensor and the row; or the file cannot be read.

    """
    if sound is not None and (digest := file_sha256(model.path)) == sound:
        return digest
    total = hashlib.sha256()
    for part in model.parts:
        tensors = model.tensors if len(model.parts) == 1 else read_header(part).tensors
        for chunk, tensor, first_block in _chunks(part, tensors):
            total.update(chunk)
            bad = -1 if tensor is None else first_bad_block(tensor.type_name, chunk)
            if tensor is not None and bad >= 0:
                block = TENSOR_TYPES[tensor.type_name].block
                row = (first_block + bad) * block // tensor.shape[-1]
                what = "a scale that is" if block > 1 else "a value that is"
                raise UserError(
                    f"{part}: tensor {quoted(tensor.name)} has {what} NaN or infinite in row {row}: "
                    f"the file is damaged"
                )
    return total.hexdigest()


def first_bad_block(type_name: str, data: bytes | memoryview) -> int:
    """Number of the first block that is not finite, -1 if all are; of whole blocks."""
    blocks = np.frombuffer(data, np.uint8).reshape(-1, TENSOR_TYPES[type_name].bytes_block)
    bad = _not_finite(type_name)(blocks)
    return int(bad.argmax()) if bad is not None and bad.any() else -1


def _not_finite(type_name: str) -> Callable[[Blocks], NDArray[np.bool_] | None]:
    if type_name in _HALVES:
        return lambda blocks: _any_of(
            [_is_full(_u16(blocks, place), _HALF_EXPONENT) for place in _HALVES[type_name]]
        )
    return _BY_TYPE[type_name]


def _any_of(found: list[NDArray[np.bool_]]) -> NDArray[np.bool_] | None:
    return np.logical_or.reduce(found) if found else None


def _u16(blocks: Blocks, place: int) -> NDArray[np.uint16]:
    """Two bytes of every block as a number."""
    return blocks[:, place : place + 2].view("<u2")[:, 0]


def _is_full(numbers: NDArray[np.uint16], exponent: int) -> NDArray[np.bool_]:
    full: NDArray[np.bool_] = (numbers & np.uint16(exponent)) == exponent
    return full


def _iq1_m_scale(blocks: Blocks) -> NDArray[np.uint16]:
    """The scale of IQ1_M: its four bits lie in the highest bits of each of four groups' scales."""
    quarters = [_u16(blocks, 48 + 2 * i) >> np.uint16(12) << np.uint16(4 * i) for i in range(4)]
    scale: NDArray[np.uint16] = np.bitwise_or.reduce(quarters)
    return scale


_BY_TYPE: dict[str, Callable[[Blocks], NDArray[np.bool_]]] = {
    "F32": lambda blocks: ~np.isfinite(blocks.view("<f4")[:, 0]),
    "F16": lambda blocks: _is_full(_u16(blocks, 0), _HALF_EXPONENT),
    "BF16": lambda blocks: _is_full(_u16(blocks, 0), _BFLOAT_EXPONENT),
    "MXFP4": lambda blocks: blocks[:, 0] >= _FIRST_BAD_E8M0,
    "IQ1_M": lambda blocks: _is_full(_iq1_m_scale(blocks), _HALF_EXPONENT),
}


def _chunks(
    path: Path, tensors: dict[str, TensorInfo]
) -> Iterator[tuple[memoryview, TensorInfo | None, int]]:
    """The bytes of a file in their order: whole blocks of a tensor with the first one's number, or what lies
    between.

    Each chunk lies in the place of the one before.
    """
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    position = 0
    with open_regular(path) as file:
        for tensor in sorted(tensors.values(), key=lambda one: one.offset_bytes):
            for chunk in _pieces(file, path, buffer, tensor.offset_bytes - position, 1):
                yield chunk, None, 0
            bytes_block = TENSOR_TYPES[tensor.type_name].bytes_block
            first = 0
            for chunk in _pieces(file, path, buffer, tensor.n_bytes, bytes_block):
                yield chunk, tensor, first
                first += len(chunk) // bytes_block
            position = tensor.offset_bytes + tensor.n_bytes
        for chunk in _pieces(file, path, buffer, os.fstat(file.fileno()).st_size - position, 1):
            yield chunk, None, 0


def _pieces(file: BinaryIO, path: Path, buffer: memoryview, n_bytes: int, unit: int) -> Iterator[memoryview]:
    """The next bytes of a file, by so many whole units as the buffer holds."""
    while n_bytes > 0:
        chunk = buffer[: min(n_bytes, len(buffer) // unit * unit)]
        try:
            n_read = file.readinto(chunk)  # type: ignore[attr-defined]
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        if n_read != len(chunk):
            raise UserError(f"{path}: has become shorter while it was read")
        yield chunk
        n_bytes -= n_read
