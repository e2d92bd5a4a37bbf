"""Conversions with random values, and how the tests look at what is refused."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from ggml_diffusion.errors import UserError
from ggml_diffusion.formats.adapter_file import CheckpointMetadata, DiffusionCheckpoint
from ggml_diffusion.formats.lora import ModelDims, TargetModule, lora_shapes
from ggml_diffusion.formats.model_file import ModelFile

RANK, ALPHA, MASK_TOKEN, TIME_DIM = 3, 5.0, 9, 6


def conversion(
    dims: ModelDims, *, time: bool = True, seed: int = 0, scale: float = 0.1
) -> DiffusionCheckpoint:
    """A conversion of a model with random values in every tensor."""
    generator = np.random.default_rng(seed)
    shapes: dict[str, tuple[int, ...]] = dict(lora_shapes(dims, TargetModule, RANK))
    shapes["mask_embedding"] = (dims.C,)
    if time:
        shapes |= {"time_embedding.weight": (dims.C, TIME_DIM), "time_embedding.bias": (dims.C,)}
    tensors = {
        name: np.float32(scale) * generator.standard_normal(shape, dtype=np.float32)
        for name, shape in shapes.items()
    }
    metadata = CheckpointMetadata(
        base_model="Tiny é",
        base_sha256="ab" * 32,
        conversion_steps=12,
        training_tokens=1 << 40,
        final_causal_ratio=0.1,  # no float32, so that rounding would show
        prediction="shifted",
        mask_token_id=MASK_TOKEN,
        alpha=ALPHA,
        time_max_timesteps=1000 if time else None,
        created_at="2025-01-02T03:04:05+00:00",
        version="0.1.0",
    )
    config = {"training": {"learning_rate": 1e-4, "seed": 0}, "targets": ["q_proj"], "none": None}
    return DiffusionCheckpoint(config, tensors, metadata, {"type": "cosine", "num_timesteps": 1000})


def write(checkpoint: DiffusionCheckpoint, path: Path, base: ModelFile) -> Path:
    """Save in the form that the name asks for."""
    if path.suffix == ".gguf":
        checkpoint.save_gguf(path, base)
    else:
        checkpoint.save(path)
    return path


def refusal(action: Callable[[], object]) -> str:
    """The message with which an action is refused; it must be one printable line."""
    with pytest.raises(UserError) as caught:
        action()
    assert str(caught.value).isprintable()
    return str(caught.value)


def refused(reader: Callable[[Path], object], path: Path) -> str:
    """Why a file is refused; the message must be one printable line that opens with the file's name."""
    message = refusal(lambda: reader(path))
    assert message.startswith(f"{path}: ")
    return message.removeprefix(f"{path}: ")


def raw_safetensors(header: object, data: bytes) -> bytes:
    """A safetensors file with any header."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data
