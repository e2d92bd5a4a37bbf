#!/usr/bin/env python3
"""The same model with every weight in F32, to tell rounding of the weights from everything else.

    python tools/unpack_gguf.py MODEL.gguf OUT.gguf

Four bytes a weight: SmolLM2-135M becomes 0.6 GB. gguf-py unpacks, so that nothing of this project is in it.
"""

import argparse
from pathlib import Path

import gguf
import numpy as np
from tool_errors import run_tool

# What the writer writes by itself.
_OWN = ("GGUF.version", "GGUF.tensor_count", "GGUF.kv_count", "general.architecture")
_FILE_TYPE = "general.file_type"  # 0 = all F32


def unpack(source: Path, target: Path) -> None:
    """Copy a GGUF, its tensors as float32."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(target, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if name in _OWN:
            continue
        value = 0 if name == _FILE_TYPE else field.contents()
        sub_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
        writer.add_key_value(name, value, field.types[0], sub_type)
    for tensor in reader.tensors:
        writer.add_tensor_info(
            tensor.name,
            list(reversed(tensor.shape.tolist())),
            np.dtype(np.float32),
            4 * int(np.prod(tensor.shape)),
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in reader.tensors:  # one at a time
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.write_tensor_data(np.ascontiguousarray(values, dtype=np.float32))
    writer.close()


def main() -> None:
    """Parse and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    given = parser.parse_args()
    unpack(given.source, given.target)


if __name__ == "__main__":
    run_tool(main)
