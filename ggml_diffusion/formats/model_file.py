"""A base model's GGUF: what it says about itself.

`read_gguf` reads the header of any GGUF, in one file or in parts; whether its model can be converted is for
model_check.py.

Deliberately not here: tensor data and arithmetic (the C core), the bytes of the format (gguf_reader.py).
Source: the GGUF specification (ggml, docs/gguf.md) for the keys; llama.cpp, src/llama-model.cpp, for their
defaults.
Letters: C hidden size, H query heads, G key/value heads, D head size, F feed-forward size, V vocabulary,
L layers.
"""

import hashlib
import math
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn, TypeVar

import numpy as np
from numpy.typing import NDArray

from ggml_diffusion.errors import UserError, quoted
from ggml_diffusion.formats.gguf_reader import MetadataValue, TensorInfo, read_header
from ggml_diffusion.formats.tensor_names import TOKEN_EMBEDDING
from ggml_diffusion.regular_file import open_regular

_T = TypeVar("_T", bool, int, float, str)

# Sizes that a file may give as a list, one a layer.
LISTED_SIZES = ("attention.head_count", "attention.head_count_kv", "feed_forward_length")
_SPLIT_NAME = re.compile(r"(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
MAX_PARTS = 4096


@dataclass(frozen=True)
class ModelFile:
    """The header of a GGUF file. The model's sizes are read out of it on demand, and raise if it has none.

    A file that comes in parts has the keys of the first and the tensors of all.
    """

    path: Path  # the first part
    version: int
    alignment: int  # bytes
    metadata: dict[str, MetadataValue]
    key_types: dict[str, str]  # key -> "u32", "str", "arr[f32]"...
    tensors: dict[str, TensorInfo]
    parts: tuple[Path, ...]  # all files, in their order

    def fail(self, fault: str) -> NoReturn:
        """Refuse this file in one line.

        Raises:
            UserError: always.

        """
        raise UserError(f"{self.path}: {fault}")

    def require(self, key: str, kind: type[_T]) -> _T:
        """The value of a key, as bool, int, float (finite) or str.

        Raises:
            UserError: the key is missing or holds something else.

        """
        if key not in self.metadata:
            self.fail(f"key {quoted(key)} is missing")
        value = self.metadata[key]
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            self.fail(f"key {quoted(key)} is of type {self.key_types[key]}, expected {kind.__name__}")
        if isinstance(value, float) and not math.isfinite(value):
            self.fail(f"key {quoted(key)} is {value}, not a finite number")
        return value

    def optional(self, key: str, default: _T) -> _T:
        """The value of a key, which must be of the default's type, or the default if there is no such key."""
        return self.require(key, type(default)) if key in self.metadata else default

    def size(self, key: str, default: int | None = None) -> int:
        """A positive whole number among the architecture's keys, e.g. "block_count".

        Raises:
            UserError: the key is missing and has no default, or it holds no positive number.

        """
        full_key = f"{self.arch}.{key}"
        if key in LISTED_SIZES and isinstance(value := self.metadata.get(full_key), np.ndarray):
            size = self._common_size(full_key, value)
        else:
            size = self.require(full_key, int) if default is None else self.optional(full_key, default)
        if not 0 < size < 1 << 31:
            self.fail(f"key {quoted(full_key)} is {size}, which is not possible")
        return size

    def _common_size(self, key: str, values: NDArray[np.generic]) -> int:
        """A list of numbers, one a layer, as the one that they all are."""
        if self.key_types[key] not in ("arr[u32]", "arr[i32]") or len(values) != self.L:
            self.fail(f"key {quoted(key)} is no list of {self.L} whole numbers, one a layer")
        if len(different := set(values.tolist())) > 1:
            self.fail(f"key {quoted(key)} differs from layer to layer, which is not supported")
        return int(different.pop())

    @property
    def arch(self) -> str:
        """The model family, e.g. "llama"."""
        return self.require("general.architecture", str)

    @property
    def L(self) -> int:
        """Layers."""
        return self.size("block_count")

    @property
    def C(self) -> int:
        """Hidden size."""
        return self.size("embedding_length")

    @property
    def H(self) -> int:
        """Query heads."""
        return self.size("attention.head_count")

    @property
    def G(self) -> int:
        """Key/value heads."""
        return self.size("attention.head_count_kv", self.H)

    @property
    def D(self) -> int:
        """Head size, of keys and values alike."""
        return self.size("attention.key_length", self.C // self.H)

    @property
    def F(self) -> int:
        """Feed-forward size."""
        return self.size("feed_forward_length")

    @property
    def V(self) -> int:
        """Size of the vocabulary: the rows of the token embedding."""
        if TOKEN_EMBEDDING not in self.tensors:
            self.fail(f"tensor '{TOKEN_EMBEDDING}' is missing")
        return self.tensors[TOKEN_EMBEDDING].shape[0]

    @property
    def context_length(self) -> int:
        """Tokens that the model was made for."""
        return self.size("context_length")

    @property
    def n_rotated(self) -> int:
        """Elements of each head that RoPE turns."""
        return self.size("rope.dimension_count", self.D)

    @property
    def rope_freq_base(self) -> float:
        """Base of the rotary frequencies."""
        return self.optional(f"{self.arch}.rope.freq_base", 10000.0)

    @property
    def rope_scaling_factor(self) -> float:
        """Positions are divided by this; 1 where they are not scaled."""
        if self.optional(f"{self.arch}.rope.scaling.type", "linear") == "none":
            return 1.0
        legacy = self.optional(f"{self.arch}.rope.scale_linear", 0.0)
        return self.optional(f"{self.arch}.rope.scaling.factor", legacy) or 1.0

    @property
    def rms_eps(self) -> float:
        """Epsilon of the RMS norms."""
        return self.require(f"{self.arch}.attention.layer_norm_rms_epsilon", float)

    @property
    def tied_head(self) -> bool:
        """Whether the token embedding also is the output matrix."""
        return "output.weight" not in self.tensors


def read_gguf(path: str | Path) -> ModelFile:
    """Read the header of any GGUF file, a model or an adapter.

    Raises:
        UserError: not a readable file, not GGUF of version 2 or 3, or any fault in its structure.

    """
    path = Path(path)
    first = _read_one(path)
    n_parts = first.optional("split.count", 1)
    if n_parts <= 1:
        return first
    return _read_parts(first, n_parts)


def _read_one(path: Path) -> ModelFile:
    header = read_header(path)
    return ModelFile(
        path, header.version, header.alignment, header.metadata, header.key_types, header.tensors, (path,)
    )


def _read_parts(named: ModelFile, n_parts: int) -> ModelFile:
    """All parts of a split model, of which any one was named."""
    match = _SPLIT_NAME.fullmatch(named.path.name)
    if match is None or int(match["count"]) != n_parts or n_parts > MAX_PARTS:
        named.fail(
            f"is one of {n_parts} parts of a model, but its name does not say which "
            f"(NAME-00001-of-{min(n_parts, 99999):05}.gguf)"
        )
    paths = [
        named.path.with_name(f"{match['stem']}-{number:05}-of-{n_parts:05}.gguf")
        for number in range(1, n_parts + 1)
    ]
    tensors: dict[str, TensorInfo] = {}
    files = []
    for number, path in enumerate(paths):
        if not path.exists():
            raise UserError(f"{path}: this part of the model is missing")
        file = named if path == named.path else _read_one(path)
        if file.optional("split.count", 1) != n_parts or file.optional("split.no", -1) != number:
            file.fail(f"is not part {number + 1} of {n_parts} of this model, though its name says so")
        if double := tensors.keys() & file.tensors.keys():
            file.fail(f"holds tensor {quoted(min(double))}, which another part of the model holds too")
        tensors |= file.tensors
        files.append(file)
    first = files[0]
    total = first.optional("split.tensors.count", len(tensors))
    if total != len(tensors):
        first.fail(f"its {n_parts} parts hold {len(tensors)} tensors, not the {total} of the model")
    return replace(first, tensors=tensors, parts=tuple(paths))


def file_sha256(path: str | Path) -> str:
    """The SHA-256 of a file's bytes as 64 hexadecimal digits; of a GGUF in parts, of all in their order.

    Raises:
        UserError: it cannot be read.

    """
    digest = hashlib.sha256()
    path = Path(path)
    parts = read_gguf(path).parts if _SPLIT_NAME.fullmatch(path.name) else (path,)
    for part in parts:
        with open_regular(part) as file:
            try:
                while block := file.read(1 << 20):
                    digest.update(block)
            except OSError as error:
                raise UserError(f"{part}: cannot be read: {error.strerror}") from None
    return digest.hexdigest()
