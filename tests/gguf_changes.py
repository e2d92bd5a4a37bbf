"""A GGUF file with some of its keys changed, for files that no converter of ours would write."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np


def with_vocabulary_keys(source: Path, path: Path, keys: Mapping[str, Any]) -> Path:
    """Copy a GGUF with keys tokenizer.ggml.* changed: bool, str, lists, int as uint32; None takes a key away.

    "chat_template" stands without the "ggml".
    """
    changes = {
        f"tokenizer.{'' if key == 'chat_template' else 'ggml.'}{key}": value for key, value in keys.items()
    }
    reader = gguf.GGUFReader(source)
    arch = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(path, arch)
    for name, field in reader.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture" or name in changes:
            continue
        sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, field.contents(), field.types[0], sub_type=sub_type)
    for name, value in changes.items():
        if isinstance(value, list):
            writer.add_array(name, value)
        elif value is not None:
            kind = {bool: "BOOL", int: "UINT32", str: "STRING"}[type(value)]
            writer.add_key_value(name, value, gguf.GGUFValueType[kind])
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
