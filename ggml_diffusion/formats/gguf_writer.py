"""GGUF files written tensor by tensor, so that no more than a piece of one is in memory.

The gguf package writes the header; the tensors' bytes follow in its order, each at the next aligned offset.

Deliberately not here: what a file holds (export/standalone.py), adapters (gguf_adapter.py, whose tensors are
small enough for the package's own writer). Source: the GGUF specification (ggml, docs/gguf.md).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ggml_diffusion.durable import replace_file
from ggml_diffusion.formats.gguf_reader import DEFAULT_ALIGNMENT, MetadataValue, StringArray
from ggml_diffusion.formats.model_file import read_gguf
from ggml_diffusion.formats.packing import row_bytes
from ggml_diffusion.formats.tensor_types import TENSOR_TYPES

Pieces = Iterable[bytes | memoryview]


@dataclass(frozen=True)
class NewTensor:
    """A tensor of a file that is to be written.

    Attributes:
        name: in the file.
        shape: in NumPy's order, (out, in) of a matrix.
        type_name: "Q4_1".
        pieces: makes its bytes, whole, in order, when they are wanted.

    """

    name: str
    shape: tuple[int, ...]
    type_name: str
    pieces: Callable[[], Pieces]

    @property
    def n_bytes(self) -> int:
        """Of the packed tensor."""
        return int(np.prod(self.shape[:-1])) * row_bytes(self.type_name, self.shape[-1])


@dataclass(frozen=True)
class KeyValue:
    """A key's value and its type as the reader names it: "u32", "str", "arr[f32]"."""

    value: MetadataValue
    kind: str


def write_gguf(path: Path, arch: str, keys: Mapping[str, KeyValue], tensors: list[NewTensor]) -> None:
    """Write a file so that it is whole or not there.

    Args:
        path: where to.
        arch: "general.architecture".
        keys: all others, in their order; empty arrays are left out, since the format has no use for them.
        tensors: in their order.

    Raises:
        UserError: writing failed, or what makes a tensor's bytes refused; the old file is still there.

    """

    def write(temporary: Path) -> None:
        _write_header(temporary, arch, keys, tensors)
        with open(temporary, "ab") as file:
            _align(file)
            for tensor in tensors:
                start = file.tell()
                for piece in tensor.pieces():
                    file.write(piece)
                if file.tell() - start != tensor.n_bytes:
                    raise AssertionError(f"{tensor.name} has {file.tell() - start} bytes")
                _align(file)
        read_gguf(temporary)  # a file that could not be read back must not take the place of one that can

    replace_file(path, write)


def _write_header(path: Path, arch: str, keys: Mapping[str, KeyValue], tensors: list[NewTensor]) -> None:
    from gguf import GGUFWriter  # slow to import

    writer = GGUFWriter(path, arch)
    try:
        for name, key in keys.items():
            _add_key(writer, name, key)
        for tensor in tensors:
            type_id: Any = TENSOR_TYPES[tensor.type_name].id  # of which the package does not know all
            writer.add_tensor_info(
                tensor.name, tensor.shape, np.dtype(np.float32), tensor.n_bytes, raw_dtype=type_id
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
    finally:
        writer.close()


def _add_key(writer: Any, name: str, key: KeyValue) -> None:
    from gguf.constants import GGUFValueType

    kinds = {
        **{"u8": "UINT8", "i8": "INT8", "u16": "UINT16", "i16": "INT16", "u32": "UINT32", "i32": "INT32"},
        **{"f32": "FLOAT32", "bool": "BOOL", "str": "STRING", "u64": "UINT64", "i64": "INT64"},
        "f64": "FLOAT64",
    }
    if not key.kind.startswith("arr["):
        writer.add_key_value(name, key.value, GGUFValueType[kinds[key.kind]])
        return
    elements = list(_elements(key.value))
    if elements:
        sub_type = GGUFValueType[kinds[key.kind[4:-1]]]
        writer.add_key_value(name, elements, GGUFValueType.ARRAY, sub_type)


def _elements(value: MetadataValue) -> Iterator[Any]:
    if isinstance(value, StringArray):
        return value.iter_raw()  # the bytes as they are, UTF-8 or not
    assert isinstance(value, np.ndarray)
    return iter(value.tolist())


def _align(file: Any) -> None:
    file.write(bytes(-file.tell() % DEFAULT_ALIGNMENT))
