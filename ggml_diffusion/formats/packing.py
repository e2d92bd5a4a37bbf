"""Rows of a tensor from packed bytes to float32 and back, as ggml does both.

ggml is the one inside llama-cpp-python; of it only what packs is loaded, and no backend or driver is started.
Packing the K types is slow, so a tensor's rows go to several threads; the bits do not depend on how many.

Deliberately not here: which tensors are packed anew (export/standalone.py). The engine unpacks by kernels of
its own (csrc/kernels/unpack.h).
Source: `ggml_quantize_chunk` and `ggml_get_type_traits` in ggml.h of the pinned version.
"""

import importlib.util
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from cffi import FFI
from numpy.typing import NDArray

from ggml_diffusion.errors import UserError
from ggml_diffusion.formats.tensor_types import TENSOR_TYPES
from ggml_diffusion.formats.tensor_values import first_bad_block

# Types that ggml packs only with a matrix that says how much each column matters.
NEED_IMPORTANCE = frozenset(("IQ1_S", "IQ2_XXS", "IQ2_XS"))
_ROWS_A_TASK = 64

_ffi = FFI()
_ffi.cdef("""
typedef struct {
    const char *type_name;
    int64_t blck_size, blck_size_interleave;
    size_t type_size;
    bool is_quantized;
    void (*to_float)(const void *packed, float *values, int64_t n);
    void *from_float;
} type_traits;
const type_traits *ggml_get_type_traits(int type);
size_t ggml_quantize_chunk(int type, const float *src, void *dst, int64_t start, int64_t nrows,
                           int64_t n_per_row, const float *imatrix);
""")


@cache
def _ggml() -> Any:
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise ImportError("llama-cpp-python is not installed")
    suffix = "dylib" if sys.platform == "darwin" else "so"
    library = _ffi.dlopen(str(Path(spec.origin).parent / "lib" / f"libggml-base.{suffix}"))
    for known in TENSOR_TYPES.values():
        traits = library.ggml_get_type_traits(known.id)
        if (traits.blck_size, traits.type_size) != (known.block, known.bytes_block):
            raise ImportError(f"this ggml has another type {known.id} than {known.name}")
    return library


def row_bytes(type_name: str, columns: int) -> int:
    """Bytes of a packed row; the columns are whole blocks."""
    known = TENSOR_TYPES[type_name]
    return columns // known.block * known.bytes_block


def unpack_rows(packed: bytes | memoryview, type_name: str, columns: int) -> NDArray[np.float32]:
    """Packed rows of a tensor as float32, (rows, columns)."""
    n_rows = len(packed) // row_bytes(type_name, columns)
    if type_name == "F32":
        return np.frombuffer(packed, np.float32).reshape(n_rows, columns).copy()
    values = np.empty((n_rows, columns), dtype=np.float32)
    source = _ffi.from_buffer("char[]", packed)
    target = _ffi.from_buffer("float[]", values)
    _ggml().ggml_get_type_traits(TENSOR_TYPES[type_name].id).to_float(source, target, values.size)
    return values


def pack_rows(values: NDArray[np.float32], type_name: str, n_threads: int = 1) -> NDArray[np.uint8]:
    """float32 rows (rows, columns) in a type, (rows, bytes a row), rounded as ggml rounds them.

    Raises:
        UserError: a value is not finite, or is too large for the type.

    """
    n_rows, columns = values.shape
    values = np.ascontiguousarray(values, dtype=np.float32)
    packed = np.zeros((n_rows, row_bytes(type_name, columns)), dtype=np.uint8)
    if not np.isfinite(values).all():  # on which ggml may abort
        raise UserError("holds NaN or infinite values")
    library, type_id = _ggml(), TENSOR_TYPES[type_name].id

    def pack(first: int) -> None:
        rows = values[first : first + _ROWS_A_TASK]
        target = _ffi.from_buffer("char[]", packed[first : first + _ROWS_A_TASK])
        source = _ffi.from_buffer("float[]", rows)
        library.ggml_quantize_chunk(type_id, source, target, 0, len(rows), columns, _ffi.NULL)

    with ThreadPoolExecutor(n_threads) as pool:
        list(pool.map(pack, range(0, n_rows, _ROWS_A_TASK)))
    if first_bad_block(type_name, packed.tobytes()) >= 0:
        raise UserError(f"holds numbers that are too large for type {type_name}")
    return packed
