"""An oracle's adapter as the GGUF LoRA file that llama.cpp reads: what an export is to be compared with.

It is written from llama.cpp's own rules and shares nothing with the package's exporter.

Source: llama.cpp `src/llama-adapter.cpp` and `build_inp_embd` in `src/llama-graph.cpp`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np
import oracle


def write_llama_adapter(
    path: Path,
    adapter: oracle.Adapter,
    arch: str = "llama",
    fused: Mapping[str, Sequence[str]] | None = None,
    mask_row_of: int | None = None,
) -> Path:
    """Write the LoRA pairs, those of fused projections stacked.

    fused: the projections in a tensor, in the order of its rows: {"ffn_up": ("ffn_gate", "ffn_up")}.
    mask_row_of: the size of the vocabulary, to put the mask row in as a pair of the embedding.
    """
    tensors = {
        name: np.asarray(value)
        for name, value in adapter.parameters.items()
        if name.endswith((".lora_a", ".lora_b"))
    }
    layers = {name.split(".")[1] for name in tensors}
    for holder, parts in (fused or {}).items():
        for layer in layers:
            _stack(tensors, f"blk.{layer}.", holder, parts)
    if mask_row_of is not None:
        # the pair of an embedding has a row of A for each token; rank 1, and so llama.cpp's factor is alpha
        tensors["token_embd.weight.lora_a"] = np.eye(mask_row_of)[:, [adapter.mask_token_id or 0]]
        tensors["token_embd.weight.lora_b"] = adapter.parameters["mask_embedding"][:, None] / adapter.alpha
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    writer.add_float32("adapter.lora.alpha", adapter.alpha)
    for name, value in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(value, dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _stack(tensors: dict[str, oracle.Array], prefix: str, holder: str, parts: Sequence[str]) -> None:
    """One pair for a fused tensor: all rows of A, and B with a block for each part.

    llama.cpp divides alpha by the stacked rank, which is as many times too large as there are parts.
    """
    a = [tensors.pop(f"{prefix}{part}.weight.lora_a") for part in parts]
    b = [tensors.pop(f"{prefix}{part}.weight.lora_b") for part in parts]
    stacked = np.zeros((sum(len(one) for one in b), sum(len(one) for one in a)))
    row = column = 0
    for one in b:
        stacked[row : row + len(one), column : column + one.shape[1]] = one * len(parts)
        row, column = row + len(one), column + one.shape[1]
    tensors[f"{prefix}{holder}.weight.lora_a"] = np.concatenate(a)
    tensors[f"{prefix}{holder}.weight.lora_b"] = stacked
