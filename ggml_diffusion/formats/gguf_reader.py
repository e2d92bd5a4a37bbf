"""The header of a GGUF file, read with suspicion: keys, values and the table of tensors, never tensor data.

ggml's and llama.cpp's own readers abort the process on some malformed files, so every file passes through
here before either sees it. Nothing is trusted: counts, lengths, types, offsets and sizes are checked against
the file before anything of their size is allocated, and every fault is a `UserError` of one line.

Deliberately not here: what the keys mean (model_file.py, gguf_adapter.py), tensor data, and big-endian
files. Source: the GGUF specification (ggml, docs/gguf.md) and, where that leaves room, what llama.cpp
accepts: tensors in the order of the table, each at the next aligned offset, without gap or overlap.
"""

import struct
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NoReturn, overload

import numpy as np
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray

from ggml_diffusion.errors import UserError, quoted
from ggml_diffusion.formats.tensor_types import TENSOR_TYPES
from ggml_diffusion.regular_file import open_regular

DEFAULT_ALIGNMENT = 32
MAX_ALIGNMENT = 1 << 16
# The largest vocabularies in use (260k tokens, 520k merges) have headers of 16 MB and 0.8M strings.
MAX_HEADER_BYTES = 32 << 20
MAX_STRINGS = 1 << 20
MAX_ENTRIES = (
    1 << 16
)  # keys, and tensors: the largest models have about a hundred keys and a few thousand tensors
MAX_TEXT_BYTES = 4 << 20  # all plain string values together; a chat template has some 10 kB
MAX_NAME_BYTES = 63  # GGML_MAX_NAME less its end mark
MAX_KEY_BYTES = 65535

_READ_BYTES = 1 << 20
_ARRAY, _STRING, _BOOL = 9, 8, 7
_NUMBER_TYPES = {
    0: ("u8", "<u1"),
    1: ("i8", "<i1"),
    2: ("u16", "<u2"),
    3: ("i16", "<i2"),
    4: ("u32", "<u4"),
    5: ("i32", "<i4"),
    6: ("f32", "<f4"),
    _BOOL: ("bool", "?"),
    10: ("u64", "<u8"),
    11: ("i64", "<i8"),
    12: ("f64", "<f8"),
}
# ggml's number of a type -> name, elements and bytes of a block; all types, since any file can be described.
_TENSOR_TYPES = {int(other): (other.name, *GGML_QUANT_SIZES[other]) for other in GGMLQuantizationType}
_TENSOR_TYPES |= {known.id: (known.name, known.block, known.bytes_block) for known in TENSOR_TYPES.values()}


class StringArray(Sequence[str]):
    """An array of strings as it lies in the file; each is decoded when it is asked for, which saves memory.

    Bytes that are not UTF-8 become U+FFFD; `raw` has them as they are.

    Attributes:
        data: the bytes of the array in the file: 8 of a length and the text, n times.

    """

    def __init__(self, data: bytes, ends: "array[int]") -> None:
        self.data = data
        self._ends = ends  # where each text ends in data

    def __len__(self) -> int:
        return len(self._ends)

    def raw(self, index: int) -> bytes:
        """The bytes of one string, 0 <= index < len."""
        start = self._ends[index - 1] if index else 0
        return self.data[start + 8 : self._ends[index]]

    def iter_raw(self) -> Iterator[bytes]:
        """The bytes of every string in turn."""
        start = 0
        for end in self._ends:
            yield self.data[start + 8 : end]
            start = end

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(f"string {index} of {len(self)}")
        return self.raw(index % len(self)).decode("utf-8", errors="replace")


MetadataValue = bool | int | float | str | StringArray | NDArray[np.generic]


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies in the file, and as what."""

    name: str
    shape: tuple[int, ...]  # NumPy order: (out, in) of a matrix
    type_name: str  # "Q4_1"
    type_id: int  # ggml's number of the type
    offset_bytes: int  # from the start of the file
    n_bytes: int


@dataclass(frozen=True)
class Header:
    """Everything in a GGUF file but the tensors' data."""

    version: int
    alignment: int
    metadata: dict[str, MetadataValue]
    key_types: dict[str, str]  # key -> "u32", "str", "arr[f32]"...
    tensors: dict[str, TensorInfo]


def read_header(path: Path) -> Header:
    """Read and check the header of a GGUF file.

    Raises:
        UserError: not a readable file, not GGUF of version 2 or 3, or any fault in its structure.

    """
    with open_regular(path) as file:
        try:
            if file.seek(0, 2) == 0:
                raise UserError(f"{path}: the file is empty")
            return _Parser(path, file).header()
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None


class _Parser:
    """A cursor over the file that cannot leave it."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self.file = file
        self.size = file.seek(0, 2)
        self.limit = min(self.size, MAX_HEADER_BYTES)
        self.data = bytearray()  # the file's beginning, as far as it was needed
        file.seek(0)
        self.position = 0
        self.strings_left = MAX_STRINGS
        self.text_bytes_left = MAX_TEXT_BYTES
        self.reading = "the file's head"

    def header(self) -> Header:
        self.fill(min(4, self.size))
        magic = bytes(self.data[:4])
        if magic != b"GGUF":
            self.fail(f"not a GGUF file (it starts with {magic!r}, not with b'GGUF')")
        self.position = 4
        version = self.number("<I")
        if version & 0xFFFF == 0 and version:
            self.fail("a big-endian GGUF file; only little-endian ones are supported")
        if version not in (2, 3):
            self.fail(f"GGUF version {version} is not supported (2 and 3 are)")
        n_tensors, n_keys = self.number("<Q"), self.number("<Q")
        # A key takes at least 8 + 1 + 4 + 1 bytes, a tensor 8 + 1 + 4 + 8 + 4 + 8.
        for what, count, least_bytes in (("keys", n_keys, 14), ("tensors", n_tensors, 33)):
            if count > MAX_ENTRIES or count * least_bytes > self.size:
                self.fail(f"says that it has {count} {what}, more than it can hold")
        metadata: dict[str, MetadataValue] = {}
        key_types: dict[str, str] = {}
        for index in range(n_keys):
            key = self.key(index)
            if key in metadata:
                self.fail(f"key {quoted(key)} occurs twice")
            metadata[key], key_types[key] = self.value(key)
        alignment = self.alignment(metadata, key_types)
        return Header(version, alignment, metadata, key_types, self.tensors(n_tensors, alignment))

    def fail(self, fault: str) -> NoReturn:
        raise UserError(f"{self.path}: {fault}")

    def take(self, n_bytes: int) -> int:
        """Move past n_bytes and return where they start."""
        start = self.position
        if n_bytes > self.limit - start:
            if n_bytes > self.size - start:
                self.fail(
                    f"truncated or damaged: {self.reading} reaches past the file's end ({self.size} bytes)"
                )
            self.fail(f"its header is larger than {MAX_HEADER_BYTES >> 20} MB (at {self.reading})")
        self.position = start + n_bytes
        self.fill(self.position)
        return start

    def fill(self, end: int) -> None:
        """Have the file's bytes up to `end`, which lies inside of it. They are not mapped: under a map, a
        file that is truncated ends the process."""
        if end > len(self.data):
            self.data += self.file.read(max(end - len(self.data), min(len(self.data), _READ_BYTES)))
        if end > len(self.data):
            self.fail("has become shorter while it was read")

    def number(self, code: str) -> int:
        value: int = struct.unpack_from(code, self.data, self.take(struct.calcsize(code)))[0]
        return value

    def text(self, max_bytes: int) -> bytes:
        n_bytes = self.number("<Q")
        if n_bytes > max_bytes and n_bytes <= self.size - self.position:
            self.fail(f"{self.reading} has {n_bytes} bytes; at most {max_bytes} are accepted")
        start = self.take(n_bytes)
        return bytes(self.data[start : start + n_bytes])

    def name(self, what: str, max_bytes: int) -> str:
        """A key or the name of a tensor."""
        self.reading = what
        raw = self.text(max_bytes)
        if not raw:
            self.fail(f"{what} is empty")
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            self.fail(f"{what} is not UTF-8: {raw[:40]!r}")

    def key(self, index: int) -> str:
        key = self.name(f"the name of key {index}", MAX_KEY_BYTES)
        self.reading = f"the value of key {quoted(key)}"
        return key

    def value(self, key: str) -> tuple[MetadataValue, str]:
        """A key's value and the name of its type."""
        type_id = self.number("<I")
        if type_id == _STRING:
            raw = self.text(self.text_bytes_left)
            self.text_bytes_left -= len(raw)
            return raw.decode("utf-8", errors="replace"), "str"
        if type_id == _ARRAY:
            return self.array_value(key)
        if type_id not in _NUMBER_TYPES:
            self.fail(f"key {quoted(key)} has an unknown value type {type_id}")
        value: bool | int | float = self.numbers(key, type_id, 1)[0].item()
        return value, _NUMBER_TYPES[type_id][0]

    def array_value(self, key: str) -> tuple[MetadataValue, str]:
        type_id, count = self.number("<I"), self.number("<Q")
        if type_id == _ARRAY:
            self.fail(f"key {quoted(key)} holds an array of arrays, which no reader supports")
        if type_id == _STRING:
            return self.strings(key, count), "arr[str]"
        if type_id not in _NUMBER_TYPES:
            self.fail(f"key {quoted(key)} has an unknown array type {type_id}")
        return self.numbers(key, type_id, count), f"arr[{_NUMBER_TYPES[type_id][0]}]"

    def numbers(self, key: str, type_id: int, count: int) -> NDArray[np.generic]:
        dtype = np.dtype(_NUMBER_TYPES[type_id][1])
        start = self.take(count * dtype.itemsize)
        raw = bytes(self.data[start : self.position])
        if type_id == _BOOL and raw.strip(b"\0\1"):
            self.fail(f"key {quoted(key)} has a truth value that is neither 0 nor 1")
        return np.frombuffer(raw, dtype)

    def strings(self, key: str, count: int) -> StringArray:
        if count > self.strings_left and count * 8 <= self.size:
            self.fail(f"key {quoted(key)} takes the file past {MAX_STRINGS} strings in its header")
        self.strings_left -= count
        if count * 8 > self.limit - self.position:
            self.take(count * 8)  # says why
        unpack, data, limit = struct.Struct("<Q").unpack_from, self.data, self.limit
        start = end = self.position
        ends = array("Q")
        for _ in range(count):
            if limit - end < 8:
                self.take(limit - start + 1)
            if end + 8 > len(data):
                self.fill(end + 8)
            end += 8 + unpack(data, end)[0]
            if end > limit:
                self.take(end - start)
            ends.append(end - start)
        self.take(end - start)
        return StringArray(bytes(data[start:end]), ends)

    def alignment(self, metadata: dict[str, MetadataValue], key_types: dict[str, str]) -> int:
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or key_types.get("general.alignment", "u32") != "u32":
            self.fail(f"key 'general.alignment' is of type {key_types['general.alignment']}, not u32")
        if not 8 <= alignment <= MAX_ALIGNMENT or alignment & (alignment - 1):
            self.fail(f"alignment {alignment} is not a power of two from 8 to {MAX_ALIGNMENT}")
        return alignment

    def tensors(self, count: int, alignment: int) -> dict[str, TensorInfo]:
        infos: dict[str, TensorInfo] = {}
        for index in range(count):
            info = self.tensor_info(index)
            if info.name in infos:
                self.fail(f"tensor {quoted(info.name)} occurs twice")
            infos[info.name] = info
        data_start = _round_up(self.position, alignment)
        expected = 0
        placed: dict[str, TensorInfo] = {}
        for info in infos.values():
            self.check_place(info, expected, data_start, alignment)
            expected = _round_up(expected + info.n_bytes, alignment)
            offset_bytes = data_start + info.offset_bytes
            placed[info.name] = TensorInfo(
                info.name, info.shape, info.type_name, info.type_id, offset_bytes, info.n_bytes
            )
        return placed

    def tensor_info(self, index: int) -> TensorInfo:
        """One row of the tensor table; its offset is still relative to the start of the data."""
        name = self.name(f"the name of tensor {index}", MAX_NAME_BYTES)
        self.reading = f"the description of tensor {quoted(name)}"
        n_dims = self.number("<I")
        if not 1 <= n_dims <= 4:
            self.fail(f"tensor {quoted(name)} has {n_dims} dimensions; 1 to 4 are possible")
        sizes = [self.number("<Q") for _ in range(n_dims)]
        n_elements = 1
        for size in sizes:
            n_elements *= size
        if n_elements == 0 or n_elements >= 1 << 62:
            self.fail(f"tensor {quoted(name)} has impossible dimensions {tuple(sizes)}")
        type_id, offset_bytes = self.number("<I"), self.number("<Q")
        if type_id not in _TENSOR_TYPES:
            self.fail(f"tensor {quoted(name)} has an unknown type {type_id}")
        type_name, block_size, block_bytes = _TENSOR_TYPES[type_id]
        if sizes[0] % block_size:
            self.fail(
                f"tensor {quoted(name)} has rows of {sizes[0]} elements, which is not divisible by the "
                f"block size {block_size} of its type {type_name}"
            )
        n_bytes = n_elements // block_size * block_bytes
        return TensorInfo(name, tuple(reversed(sizes)), type_name, type_id, offset_bytes, n_bytes)

    def check_place(self, info: TensorInfo, expected: int, data_start: int, alignment: int) -> None:
        if info.offset_bytes % alignment:
            self.fail(
                f"tensor {quoted(info.name)} is at offset {info.offset_bytes}, not aligned to {alignment}"
            )
        end = data_start + info.offset_bytes + info.n_bytes
        if end > self.size:
            self.fail(
                f"truncated or damaged: tensor {quoted(info.name)} ends at byte {end}, "
                f"past the end of the file ({self.size} bytes)"
            )
        if info.offset_bytes != expected:
            fault = "overlaps another tensor" if info.offset_bytes < expected else "leaves a gap before it"
            self.fail(
                f"tensor {quoted(info.name)} {fault}: it is at offset {info.offset_bytes}, not {expected}"
            )


def _round_up(value: int, alignment: int) -> int:
    return (value + alignment - 1) // alignment * alignment
