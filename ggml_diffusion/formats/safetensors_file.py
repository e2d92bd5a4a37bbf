"""Safetensors files of float32 arrays with a JSON document, read with suspicion and written to last.

The safetensors library already refuses overlaps, gaps and sizes that do not agree. It takes the last of two
equal names, any number type and NaN, and accepts a header of 100 MB: those are refused here, by name.

Deliberately not here: which tensors there should be (adapter_file.py, checkpoint.py).
Source: the format section of the safetensors README.
"""

import json
import math
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ggml_diffusion.durable import replace_file
from ggml_diffusion.errors import UserError, is_unicode, one_line, quoted
from ggml_diffusion.regular_file import open_regular

# One key only: the library writes several in random order, and equal runs must make equal files.
DOCUMENT_KEY = "ggml_diffusion"
MAX_JSON_DEPTH = 32
MAX_HEADER_BYTES = 4 << 20  # 500 layers with seven adapters each take 1 MB


def write_safetensors(
    path: Path, tensors: Mapping[str, NDArray[np.float32]], document: Mapping[str, Any]
) -> None:
    """Write float32 arrays and a JSON document so that the file is whole or not there.

    Raises:
        UserError: an array holds NaN or infinite values, or writing failed.

    """
    arrays = {name: np.ascontiguousarray(array, dtype=np.float32) for name, array in tensors.items()}
    for name, array in arrays.items():
        if not np.isfinite(array).all():
            raise UserError(f"{path}: not written: tensor {quoted(name)} holds NaN or infinite values")
    metadata = {DOCUMENT_KEY: json.dumps(document, sort_keys=True, allow_nan=False)}

    def write(temporary: Path) -> None:
        # The library fills a file of a random name first: in a folder of its own, what a killed process left
        # of it is found again.
        folder = temporary.with_name(temporary.name + ".d")
        shutil.rmtree(folder, ignore_errors=True)
        try:
            folder.mkdir()
            save_file(arrays, folder / temporary.name, metadata=metadata)
            os.replace(folder / temporary.name, temporary)
        except SafetensorError as error:
            raise OSError(str(error)) from error
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    replace_file(path, write)


def read_safetensors(path: Path) -> tuple[dict[str, NDArray[np.float32]], dict[str, Any]]:
    """Read all arrays, C-contiguous float32 in memory of their own, and the JSON document ({} without one).

    Raises:
        UserError: not a readable safetensors file, a header that is too large or names a tensor twice, an
            array that is not float32 or holds NaN or infinite values, or a document that is no JSON object.

    """
    metadata, held = read_unmapped(path, only="F32")
    tensors = {}
    for name, _, data in held:
        tensors[name] = data.view("<f4")[..., 0] if data.size else np.zeros(data.shape[:-1], np.float32)
    for name, array in tensors.items():
        if not np.isfinite(array).all():
            _fail(path, f"tensor {quoted(name)} holds NaN or infinite values")
    return tensors, parse_object(path, metadata.get(DOCUMENT_KEY, "{}"), f"metadata key '{DOCUMENT_KEY}'")


def read_unmapped(
    path: Path, *, only: str | None = None
) -> tuple[dict[str, str], Iterator[tuple[str, str, NDArray[np.uint8]]]]:
    """A file's metadata, and of each tensor its name, its type, and its bytes (..., bytes of a number).

    The library checks the header. What is behind it is read and not mapped: a file that is truncated
    meanwhile would end the process. With `only` any other type is refused.

    Raises:
        UserError: not a readable safetensors file, or a header that is too large or names a tensor twice.

    """
    with open_regular(path) as file:
        try:
            size = file.seek(0, 2)
            file.seek(0)
            head = file.read(8)
            n_header_bytes = struct.unpack("<Q", head)[0] if len(head) == 8 else 0
            if not 2 <= n_header_bytes <= size - 8:
                _fail(path, f"truncated, or not a safetensors file ({size} bytes)")
            if n_header_bytes > MAX_HEADER_BYTES:
                _fail(path, f"its header has {n_header_bytes} bytes; at most {MAX_HEADER_BYTES} are accepted")
            header = parse_object(path, file.read(n_header_bytes), "its header")
            metadata = header.pop("__metadata__", None) or {}
            for name, entry in header.items():
                dtype = entry.get("dtype") if isinstance(entry, dict) else None
                if only is not None and dtype != only:
                    fault = f"has type {quoted(str(dtype))}; only {only} is supported"
                    _fail(path, f"tensor {quoted(name)} {fault}")
            with safe_open(path, framework="numpy"):
                pass
        except SafetensorError as error:
            _fail(path, f"not a valid safetensors file: {one_line(str(error))}")
        except OSError as error:
            _fail(path, f"cannot be read: {error.strerror}")
    return metadata, _tensors(path, header, 8 + n_header_bytes)


def _tensors(
    path: Path, entries: Mapping[str, Mapping[str, Any]], first: int
) -> Iterator[tuple[str, str, NDArray[np.uint8]]]:
    """The bytes of tensors that a checked header describes; `first` is where the first one begins."""
    with open_regular(path) as file:
        for name, entry in entries.items():
            start, end = entry["data_offsets"]
            shape = tuple(entry["shape"])
            data = np.empty((*shape, (end - start) // max(1, math.prod(shape))), np.uint8)
            try:
                file.seek(first + start)
                content = file.read(data.size)
            except OSError as error:
                _fail(path, f"cannot be read: {error.strerror}")
            if len(content) != data.size:
                _fail(path, "was cut while it was read")
            data[...] = np.frombuffer(content, np.uint8).reshape(data.shape)
            yield name, entry["dtype"], data


def parse_object(path: Path, text: str | bytes, what: str) -> dict[str, Any]:
    """A JSON object out of a file that may be hostile: no name twice, no NaN, no endless nesting.

    Raises:
        UserError: the text is anything else.

    """
    try:
        value = json.loads(text, object_pairs_hook=_unique_names, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        _fail(path, f"{what} is not valid JSON: {one_line(str(error))}")
    if not isinstance(value, dict):
        _fail(path, f"{what} is not a JSON object")
    if fault := _json_fault(value):
        _fail(path, f"{what} {fault}")
    return value


def _json_fault(value: object) -> str | None:
    """Why parsed JSON cannot be written again or shown: too deep, a number too large, half a character."""
    layer = [value]
    for _ in range(MAX_JSON_DEPTH):
        below: list[object] = []
        for item in layer:
            if isinstance(item, dict):
                below += [*item.keys(), *item.values()]
            elif isinstance(item, list):
                below += item
            elif isinstance(item, float) and not math.isfinite(item):
                return "holds a number that is too large"
            elif isinstance(item, str) and not is_unicode(item):
                return "holds half of a surrogate pair"
        if not below:
            return None
        layer = below
    return f"is nested more than {MAX_JSON_DEPTH} levels deep"


def _fail(path: Path, fault: str) -> NoReturn:
    raise UserError(f"{path}: {fault}")


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value: dict[str, Any] = {}
    for name, item in pairs:
        if name in value:
            raise ValueError(f"the name {quoted(name)} occurs twice")
        value[name] = item
    return value


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no number of JSON")
