"""The folder for transformers: what is beside the pairs, and that no text of a file reaches its code."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from conversions import MASK_TOKEN, conversion, refusal
from safetensors.numpy import load_file

from ggml_diffusion.export.peft import DENOISE_PROGRAM, export_peft
from ggml_diffusion.formats.model_check import read_model

TinyModel = Callable[..., Path]


def test_the_folder_holds_what_else_was_trained_and_how_it_is_read(tmp_path: Path, tiny_model: TinyModel):
    base = read_model(tiny_model())
    checkpoint = conversion(base)
    export_peft(tmp_path / "out", checkpoint, base)
    tensors = load_file(tmp_path / "out" / "embeddings.safetensors")
    assert tensors.keys() == {"mask_embedding", "time_embedding.weight", "time_embedding.bias"}
    assert all(np.array_equal(array, checkpoint.tensors[name]) for name, array in tensors.items())
    rule = json.loads((tmp_path / "out" / "diffusion_config.json").read_text())
    expected = {
        "mask_token_id": MASK_TOKEN,
        "prediction": "shifted",
        "causal_ratio": 0.1,
        "noise_schedule": "cosine",
        "time_max_timesteps": 1000,
    }
    assert {key: rule[key] for key in expected} == expected
    assert (tmp_path / "out" / "denoise.py").read_text() == DENOISE_PROGRAM.read_text()


def test_without_a_time_embedding_there_is_none(tmp_path: Path, tiny_model: TinyModel):
    base = read_model(tiny_model())
    export_peft(tmp_path / "out", conversion(base, time=False), base)
    assert load_file(tmp_path / "out" / "embeddings.safetensors").keys() == {"mask_embedding"}


def test_the_readme_names_the_base_only_if_it_is_a_name(tmp_path: Path, tiny_model: TinyModel):
    base = read_model(tiny_model())
    for value, name in (
        ("https://huggingface.co/some-one/Model-1.5", "some-one/Model-1.5"),
        ('x/y"); import os; ("', None),
    ):
        base.metadata["general.repo_url"] = value
        export_peft(tmp_path / "out", conversion(base), base)
        text = (tmp_path / "out" / "README.md").read_text()
        assert f'Denoiser(".", "{name or "BASE"}")' in text
        assert "import os" not in text
        config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == name


def test_equal_exports_make_equal_files(tmp_path: Path, tiny_model: TinyModel):
    base = read_model(tiny_model(arch="phi3"))
    for name in ("a", "b"):
        export_peft(tmp_path / name, conversion(base), base)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes()


def test_a_folder_that_cannot_be_made_is_one_line(tmp_path: Path, tiny_model: TinyModel):
    base = read_model(tiny_model())
    (tmp_path / "file").write_text("")
    for place in (tmp_path / "nowhere" / "out", tmp_path / "file"):
        assert "cannot be made" in refusal(lambda place=place: export_peft(place, conversion(base), base))
