"""GGUF files made by hand, byte by byte: an independent writer that can also write what none should.

It checks nothing. Source: the GGUF specification (ggml, docs/gguf.md).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
CODES = {
    U8: "B",
    I8: "b",
    U16: "H",
    I16: "h",
    U32: "I",
    I32: "i",
    F32: "f",
    BOOL: "?",
    U64: "Q",
    I64: "q",
    F64: "d",
}


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def scalar(type_id: int, value: object) -> bytes:
    """A typed value, as it follows a key."""
    if type_id == STRING:
        assert isinstance(value, str | bytes)
        return struct.pack("<I", STRING) + text(value)
    return struct.pack("<I" + CODES[type_id], type_id, value)


def array(type_id: int, values: list[object]) -> bytes:
    """A typed array, as it follows a key."""
    head = struct.pack("<IIQ", ARRAY, type_id, len(values))
    if type_id == STRING:
        return head + b"".join(text(value) for value in values)
    return head + struct.pack(f"<{len(values)}{CODES[type_id]}", *values)


@dataclass
class Tensor:
    """A row of the tensor table with its data; dims in ggml's order, the fastest first."""

    dims: tuple[int, ...]
    data: bytes
    type_id: int = 0
    offset: int | None = None  # None: right behind the one before


@dataclass
class Gguf:
    """A file in parts; `keys` and `tensors` are lists so that names may occur twice."""

    keys: list[tuple[str | bytes, bytes]] = field(default_factory=list)
    tensors: list[tuple[str | bytes, Tensor]] = field(default_factory=list)
    magic: bytes = b"GGUF"
    version: int = 3
    n_keys: int | None = None
    n_tensors: int | None = None
    alignment: int = 32

    def set(self, key: str, value: bytes) -> Gguf:
        """Replace the value of a key, or append it."""
        self.keys = [(name, value if name == key else old) for name, old in self.keys]
        if key not in [name for name, _ in self.keys]:
            self.keys.append((key, value))
        return self

    def drop(self, name: str) -> Gguf:
        """Leave a key or a tensor out."""
        self.keys = [pair for pair in self.keys if pair[0] != name]
        self.tensors = [pair for pair in self.tensors if pair[0] != name]
        return self

    def tensor(self, name: str) -> Tensor:
        return next(tensor for other, tensor in self.tensors if other == name)

    def parts(self) -> list[bytes]:
        """The file cut at every structural boundary."""
        n_tensors = len(self.tensors) if self.n_tensors is None else self.n_tensors
        n_keys = len(self.keys) if self.n_keys is None else self.n_keys
        parts = [
            self.magic,
            struct.pack("<I", self.version),
            struct.pack("<Q", n_tensors),
            struct.pack("<Q", n_keys),
        ]
        for key, value in self.keys:
            raw = text(key)
            parts += [raw[:8], raw[8:], value[:4], value[4:]]
        place, data = 0, b""
        for name, tensor in self.tensors:
            raw = text(name)
            offset = place if tensor.offset is None else tensor.offset
            parts += [raw[:8], raw[8:], struct.pack("<I", len(tensor.dims))]
            parts += [struct.pack("<Q", size) for size in tensor.dims]
            parts += [struct.pack("<I", tensor.type_id), struct.pack("<Q", offset)]
            padding = b"\0" * (-len(tensor.data) % self.alignment)
            data += tensor.data + padding
            place = len(data)
        head = sum(map(len, parts))
        return [*parts, b"\0" * (-head % self.alignment), data]

    def build(self) -> bytes:
        return b"".join(self.parts())


SIZES = {"L": 1, "C": 32, "H": 4, "G": 2, "D": 8, "F": 64, "V": 12}


def tiny_llama(tied: bool = False, seed: int = 0) -> Gguf:
    """A whole `llama` model of one layer (SIZES) with a byte-level BPE vocabulary, its weights random."""
    generator = np.random.default_rng(seed)
    c, f, v, kv = SIZES["C"], SIZES["F"], SIZES["V"], SIZES["G"] * SIZES["D"]
    keys = [
        ("general.architecture", scalar(STRING, "llama")),
        ("general.name", scalar(STRING, "Tiny")),
        ("llama.block_count", scalar(U32, SIZES["L"])),
        ("llama.context_length", scalar(U32, 64)),
        ("llama.embedding_length", scalar(U32, c)),
        ("llama.feed_forward_length", scalar(U32, f)),
        ("llama.attention.head_count", scalar(U32, SIZES["H"])),
        ("llama.attention.head_count_kv", scalar(U32, SIZES["G"])),
        ("llama.attention.layer_norm_rms_epsilon", scalar(F32, 1e-5)),
        ("llama.rope.freq_base", scalar(F32, 5000.0)),
        ("llama.rope.dimension_count", scalar(U32, SIZES["D"])),
        ("tokenizer.ggml.model", scalar(STRING, "gpt2")),
        ("tokenizer.ggml.pre", scalar(STRING, "default")),
        ("tokenizer.ggml.tokens", array(STRING, [*"abcdefgh", "ab", "é", "<end>", ""])),
        ("tokenizer.ggml.token_type", array(I32, [1] * 10 + [3, 5])),
        ("tokenizer.ggml.merges", array(STRING, ["a b"])),
        ("tokenizer.ggml.eos_token_id", scalar(U32, 10)),
    ]

    def matrix(rows: int, columns: int) -> Tensor:
        values = generator.standard_normal(rows * columns).astype("<f4") / np.float32(columns) ** 0.5
        return Tensor((columns, rows), values.tobytes())

    def ones(size: int) -> Tensor:
        return Tensor((size,), np.ones(size, "<f4").tobytes())

    tensors = [
        ("token_embd.weight", matrix(v, c)),
        ("output_norm.weight", ones(c)),
        *([] if tied else [("output.weight", matrix(v, c))]),
        ("blk.0.attn_norm.weight", ones(c)),
        ("blk.0.attn_q.weight", matrix(c, c)),
        ("blk.0.attn_k.weight", matrix(kv, c)),
        ("blk.0.attn_v.weight", matrix(kv, c)),
        ("blk.0.attn_output.weight", matrix(c, c)),
        ("blk.0.ffn_norm.weight", ones(c)),
        ("blk.0.ffn_gate.weight", matrix(f, c)),
        ("blk.0.ffn_up.weight", matrix(f, c)),
        ("blk.0.ffn_down.weight", matrix(c, f)),
    ]
    return Gguf(keys, tensors)


def with_key(key: str, value: bytes) -> Gguf:
    """The tiny model with a key set."""
    return tiny_llama().set(key, value)


def with_tensor(name: str, **fields: object) -> Gguf:
    """The tiny model with fields of a tensor changed."""
    file = tiny_llama()
    for key, value in fields.items():
        setattr(file.tensor(name), key, value)
    return file


def with_fields(**fields: object) -> Gguf:
    """The tiny model with fields of the file changed."""
    file = tiny_llama()
    for key, value in fields.items():
        setattr(file, key, value)
    return file


def with_extra_tensor(name: str, tensor: Tensor) -> Gguf:
    """The tiny model with one tensor more."""
    file = tiny_llama()
    file.tensors.append((name, tensor))
    return file


def with_extra_key(key: str | bytes, value: bytes) -> Gguf:
    """The tiny model with one key more."""
    file = tiny_llama()
    file.keys.append((key, value))
    return file


def write_gguf(path: Path, content: Gguf | bytes) -> Path:
    """Write a file in parts, or what is no such file at all."""
    path.write_bytes(content.build() if isinstance(content, Gguf) else content)
    return path
