"""Hostile safetensors: each kind of damage is refused in one line."""

from __future__ import annotations

import json
import os
import struct
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from conversions import raw_safetensors, refusal

from ggml_diffusion.formats.adapter_file import load_adapter
from ggml_diffusion.formats.safetensors_file import read_unmapped, write_safetensors

ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
HOSTILE_SAFETENSORS: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "truncated, or not a safetensors file"),
    "a few bytes": (b"abc", "truncated, or not a safetensors file"),
    "a header of 2^63": (struct.pack("<Q", 1 << 63) + b"{}", "truncated, or not a safetensors file"),
    "a header larger than the file": (struct.pack("<Q", 100) + b"{}", "truncated, or not a safetensors file"),
    "a huge header": (raw_safetensors(b"{}" + b" " * (5 << 20), b""), "at most 4194304 are accepted"),
    "no JSON": (raw_safetensors(b"hello...", b""), "its header is not valid JSON"),
    "endless nesting": (raw_safetensors(b"[" * 1_000_000, b""), "its header is not valid JSON"),
    "a list": (raw_safetensors([1, 2], b""), "its header is not a JSON object"),
    "not UTF-8": (raw_safetensors(b'{"\xff": 1}', b""), "its header is not valid JSON"),
    "the same tensor twice": (
        raw_safetensors(
            b'{"a":' + json.dumps(ENTRY).encode() + b',"a":' + json.dumps(ENTRY).encode() + b"}", bytes(8)
        ),
        "the name 'a' occurs twice",
    ),
    "an entry of text": (raw_safetensors({"a": "F32"}, b""), "tensor 'a' has type 'None'"),
    "half precision": (
        raw_safetensors({"a": ENTRY | {"dtype": "F16", "shape": [4]}}, bytes(8)),
        "tensor 'a' has type 'F16'; only F32",
    ),
    "a name with control characters": (
        raw_safetensors({"a\n\x1b[2J": ENTRY | {"dtype": "I8"}}, bytes(8)),
        r"tensor 'a\n\x1b[2J' has type 'I8'",
    ),
    "overlap": (
        raw_safetensors({"a": ENTRY, "b": ENTRY | {"data_offsets": [4, 12]}}, bytes(12)),
        "not a valid safetensors",
    ),
    "a gap": (
        raw_safetensors({"a": ENTRY | {"data_offsets": [4, 12]}}, bytes(12)),
        "not a valid safetensors",
    ),
    "past the end": (raw_safetensors({"a": ENTRY}, bytes(4)), "not a valid safetensors"),
    "bytes left over": (raw_safetensors({"a": ENTRY}, bytes(12)), "not a valid safetensors"),
    "a shape that overflows": (
        raw_safetensors({"a": ENTRY | {"shape": [1 << 62, 8]}}, bytes(8)),
        "not a valid safetensors",
    ),
    "a negative size": (
        raw_safetensors({"a": ENTRY | {"shape": [-2]}}, bytes(8)),
        "not a valid safetensors",
    ),
    "NaN": (raw_safetensors({"a": ENTRY}, struct.pack("<2f", 1, float("nan"))), "tensor 'a' holds NaN"),
    "another program's": (raw_safetensors({"a": ENTRY}, bytes(8)), "was not written by ggml-diffusion"),
}


@pytest.mark.parametrize("name", HOSTILE_SAFETENSORS)
def test_hostile_safetensors_are_refused_in_one_line(tmp_path: Path, name: str):
    path = tmp_path / "adapter.safetensors"
    content, fault = HOSTILE_SAFETENSORS[name]
    path.write_bytes(content)
    tracemalloc.start()
    try:
        message = refusal(lambda: load_adapter(path))
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert message.startswith(f"{path}: ")
    assert fault in message
    assert peak_bytes < 20 << 20


def test_a_file_that_is_cut_while_it_is_read_is_refused(tmp_path: Path):
    """Mapped, it would end the process by a signal."""
    path = tmp_path / "a.safetensors"
    write_safetensors(path, {name: np.ones(5000, np.float32) for name in "ab"}, {})
    metadata, tensors = read_unmapped(path)
    assert metadata == {"ggml_diffusion": "{}"}
    name, kind, data = next(tensors)
    assert (name, kind, data.shape) == ("a", "F32", (5000, 4))
    os.truncate(path, path.stat().st_size - 8192)
    assert refusal(lambda: next(tensors)) == f"{path}: was cut while it was read"


def test_metadata_of_null_are_none(tmp_path: Path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(raw_safetensors({"__metadata__": None, "a": ENTRY}, bytes(8)))
    assert read_unmapped(path)[0] == {}


def test_a_file_gets_the_mode_that_others_get(tmp_path: Path) -> None:
    plain, written = tmp_path / "plain", tmp_path / "adapter.safetensors"
    plain.write_text("", encoding="utf-8")
    write_safetensors(written, {"x": np.zeros(2, np.float32)}, {})
    assert written.stat().st_mode == plain.stat().st_mode
