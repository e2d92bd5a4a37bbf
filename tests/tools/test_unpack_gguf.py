"""A model unpacked to F32 is the same model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from cases import mean_kl
from conftest import TinyModel
from unpack_gguf import unpack

from ggml_diffusion.engine.cpu.q4_model import Q4Model
from ggml_diffusion.engine.interface import Batch
from ggml_diffusion.formats.model_check import read_model
from ggml_diffusion.text.tokenizer import Tokenizer


def test_an_unpacked_model_predicts_what_the_packed_one_does(tiny_model: TinyModel, tmp_path: Path) -> None:
    packed, unpacked = tiny_model(type="Q4_1", tied=True), tmp_path / "f32.gguf"
    unpack(packed, unpacked)
    assert {tensor.type_name for tensor in read_model(unpacked).tensors.values()} == {"F32"}
    tokens = np.random.default_rng(0).integers(10, 300, (1, 12)).astype(np.int32)
    found = []
    for path in (packed, unpacked):
        with Q4Model.from_gguf(path, 1, compute="f32") as model:
            found.append(model.logits(Batch(tokens))[0])
    assert mean_kl(found[0], found[1]) < 1e-9
    text = "the mill ground corn"
    ours, theirs = (Tokenizer.from_gguf(path).encode(text).tolist() for path in (packed, unpacked))
    assert ours == theirs
