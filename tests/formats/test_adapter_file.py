"""Conversions as files: both forms hold everything, refuse what is wrong, and mean the same to llama.cpp."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from conversions import ALPHA, MASK_TOKEN, RANK, TIME_DIM, conversion, raw_safetensors, refusal, write
from hypothesis import given, settings
from hypothesis import strategies as st

from ggml_diffusion.errors import UserError
from ggml_diffusion.formats.adapter_file import DiffusionCheckpoint, load_adapter
from ggml_diffusion.formats.lora import TargetModule, lora_shapes
from ggml_diffusion.formats.model_file import ModelFile

FORMS = pytest.mark.parametrize("name", ["adapter.safetensors", "adapter.gguf"])


@FORMS
@pytest.mark.parametrize("time", [True, False])
@pytest.mark.parametrize("tied", [True, False])
def test_a_conversion_comes_back_bit_for_bit(
    tmp_path: Path, base: ModelFile, tied_base: ModelFile, name: str, time: bool, tied: bool
):
    of = tied_base if tied else base
    saved = conversion(of, time=time)
    loaded = DiffusionCheckpoint.load(write(saved, tmp_path / name, of))
    assert loaded.metadata == saved.metadata
    assert loaded.config == saved.config
    assert loaded.noise_schedule == saved.noise_schedule
    assert loaded.tensors.keys() == saved.tensors.keys()
    for key, array_ in saved.tensors.items():
        assert loaded.tensors[key].dtype == np.float32
        assert loaded.tensors[key].flags.c_contiguous
        assert np.array_equal(loaded.tensors[key], array_)


@FORMS
def test_the_engine_gets_the_lora_pairs_and_the_mask_embedding(tmp_path: Path, base: ModelFile, name: str):
    saved = conversion(base)
    adapter = load_adapter(write(saved, tmp_path / name, base), arch="llama")
    adapter.check(base)
    assert (adapter.alpha, adapter.mask_token_id) == (ALPHA, MASK_TOKEN)
    assert np.array_equal(adapter.mask_embedding, saved.tensors["mask_embedding"])
    assert adapter.tensors.keys() == lora_shapes(base, TargetModule, RANK).keys()


def test_the_content_decides_about_the_form_not_the_name(tmp_path: Path, base: ModelFile):
    saved = conversion(base)
    saved.save_gguf(tmp_path / "adapter", base)
    saved.save(tmp_path / "adapter.bin")
    for name in ("adapter", "adapter.bin"):
        assert DiffusionCheckpoint.load(tmp_path / name).metadata == saved.metadata


@FORMS
def test_equal_conversions_make_equal_files(tmp_path: Path, base: ModelFile, name: str):
    first = write(conversion(base), tmp_path / name, base).read_bytes()
    for attempt in range(5):  # the safetensors library orders several metadata keys at random
        assert write(conversion(base), tmp_path / f"{attempt}-{name}", base).read_bytes() == first


@FORMS
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, base: ModelFile, name: str, monkeypatch: pytest.MonkeyPatch
):
    path = write(conversion(base), tmp_path / name, base)
    before = path.read_bytes()

    def fail(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", fail)
    message = refusal(lambda: write(conversion(base, seed=1), path, base))
    assert message == f"{path}: could not be written: No space left on device"
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == [name]


@FORMS
def test_a_folder_that_is_not_there_is_refused(tmp_path: Path, base: ModelFile, name: str):
    assert "could not be written" in refusal(lambda: write(conversion(base), tmp_path / "none" / name, base))


def test_another_base_is_refused_unless_it_is_allowed(base: ModelFile):
    checkpoint = conversion(base)
    checkpoint.check_base("ab" * 32)
    message = refusal(lambda: checkpoint.check_base("cd" * 32))
    assert "abababababab" in message
    assert "cdcdcdcdcdcd" in message
    checkpoint.check_base("cd" * 32, allow_other_base=True)


def test_a_base_of_other_sizes_is_refused(tmp_path: Path, base: ModelFile):
    checkpoint = conversion(base)
    checkpoint.tensors["time_embedding.weight"] = np.zeros((31, TIME_DIM), np.float32)
    assert "'time_embedding.weight' has shape (31, 6)" in refusal(lambda: checkpoint.check_shapes(base))
    checkpoint = conversion(base)
    checkpoint.tensors["blk.1.attn_q.weight.lora_a"] = checkpoint.tensors["blk.0.attn_q.weight.lora_a"]
    checkpoint.tensors["blk.1.attn_q.weight.lora_b"] = checkpoint.tensors["blk.0.attn_q.weight.lora_b"]
    assert "'blk.1.attn_q.weight'" in refusal(lambda: checkpoint.save_gguf(tmp_path / "a.gguf", base))


NAN = np.full(32, np.nan, np.float32)


@FORMS
@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"mask_embedding": None}, "tensor 'mask_embedding' is missing"),
        ({"time_embedding.bias": None}, "tensor 'time_embedding.bias' is missing"),
        ({"time_embedding.weight": None}, "tensor 'time_embedding.weight' is missing"),
        ({"other": NAN}, "tensor 'other' is unknown"),
        ({"blk.0.attn_q.weight": NAN}, "tensor 'blk.0.attn_q.weight' is unknown"),
        ({"blk.0.attn_q.weight.lora_a": None}, "'blk.0.attn_q.weight.lora_b' has no partner"),
        ({"mask_embedding": np.zeros((32, 1), np.float32)}, "'mask_embedding' has shape (32, 1)"),
        ({"time_embedding.bias": np.zeros(31, np.float32)}, "'time_embedding.bias' has shape (31,)"),
        ({"time_embedding.weight": np.zeros(32, np.float32)}, "'time_embedding.weight' has shape (32,)"),
        (
            {"time_embedding.weight": np.zeros((32, 0), np.float32)},
            "'time_embedding.weight' has shape",
        ),
        ({"mask_embedding": NAN}, "'mask_embedding' holds NaN or infinite values"),
    ],
)
def test_an_incomplete_or_impossible_conversion_is_not_written(
    tmp_path: Path, base: ModelFile, name: str, change: dict, fault: str
):
    broken = conversion(base)
    broken.tensors = {key: value for key, value in (broken.tensors | change).items() if value is not None}
    assert fault in refusal(lambda: write(broken, tmp_path / name, base))
    assert not os.listdir(tmp_path)


def sound(base: ModelFile, tmp_path: Path) -> tuple[dict, bytes]:
    """Header and data of a sound file."""
    raw = write(conversion(base), tmp_path / "sound.safetensors", base).read_bytes()
    n_header = struct.unpack("<Q", raw[:8])[0]
    return json.loads(raw[8 : 8 + n_header]), raw[8 + n_header :]


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"format": 2}, "is of format '2'; this version reads format 1"),
        ({"format": True}, "is of format 'True'"),
        ({"config": None}, "key 'config' of its metadata is missing or no JSON object"),
        ({"noise_schedule": []}, "key 'noise_schedule' of its metadata is missing or no JSON object"),
        ({"metadata": {}}, "metadata key 'base_model': Field required"),
    ],
)
def test_a_damaged_document_is_refused_and_the_key_named(
    tmp_path: Path, base: ModelFile, change: dict, fault: str
):
    header, data = sound(base, tmp_path)
    document = json.loads(header["__metadata__"]["ggml_diffusion"]) | change
    header["__metadata__"]["ggml_diffusion"] = json.dumps(document)
    path = tmp_path / "changed.safetensors"
    path.write_bytes(raw_safetensors(header, data))
    assert fault in refusal(lambda: DiffusionCheckpoint.load(path))


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("alpha", 0.0),
        ("alpha", "5"),
        ("base_sha256", "xyz"),
        ("conversion_steps", -1),
        ("conversion_steps", 1.5),
        ("final_causal_ratio", 1.5),
        ("prediction", "sideways"),
        ("mask_token_id", -1),
        ("mask_token_id", None),
        ("time_max_timesteps", 1),
        ("learned_by", "heart"),
    ],
)
def test_metadata_of_the_wrong_kind_is_refused_and_the_key_named(
    tmp_path: Path, base: ModelFile, field: str, value: object
):
    header, data = sound(base, tmp_path)
    document = json.loads(header["__metadata__"]["ggml_diffusion"])
    document["metadata"][field] = value
    header["__metadata__"]["ggml_diffusion"] = json.dumps(document)
    path = tmp_path / "changed.safetensors"
    path.write_bytes(raw_safetensors(header, data))
    assert f"metadata key '{field}'" in refusal(lambda: DiffusionCheckpoint.load(path))


@FORMS
def test_a_time_embedding_and_its_metadata_come_together(tmp_path: Path, base: ModelFile, name: str):
    checkpoint = conversion(base)
    checkpoint.metadata = checkpoint.metadata.model_copy(update={"time_max_timesteps": None})
    assert "'time_embedding.weight' is unknown" in refusal(lambda: write(checkpoint, tmp_path / name, base))


@FORMS
def test_a_file_cut_anywhere_is_refused(tmp_path: Path, base: ModelFile, name: str):
    content = write(conversion(base), tmp_path / name, base).read_bytes()
    path = tmp_path / "cut"
    for cut in range(0, len(content) - 32, len(content) // 300):  # the last bytes of a GGUF are padding
        path.write_bytes(content[:cut])
        assert str(path) in refusal(lambda: DiffusionCheckpoint.load(path))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
@pytest.mark.parametrize("form", ["safetensors", "gguf"])
def test_random_damage_is_read_or_refused(
    tmp_path_factory: pytest.TempPathFactory, base: ModelFile, form: str, data: st.DataObject
):
    folder = tmp_path_factory.getbasetemp()
    sound_path = folder / f"sound.{form}"
    if not sound_path.exists():
        write(conversion(base), sound_path, base)
    content = bytearray(sound_path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, min(len(content), 6000)))
        piece = data.draw(st.binary(min_size=1, max_size=5))
        content[position : position + data.draw(st.integers(0, 5))] = piece
    path = folder / f"damaged.{form}"
    path.write_bytes(bytes(content))
    try:
        DiffusionCheckpoint.load(path)
    except UserError as error:
        assert str(error).isprintable()


def test_missing_files_and_folders_are_refused(tmp_path: Path):
    assert refusal(lambda: load_adapter(tmp_path / "none.gguf")) == f"{tmp_path / 'none.gguf'}: no such file"
    assert refusal(lambda: load_adapter(tmp_path)) == f"{tmp_path}: a folder, not a file"
    with pytest.raises(UserError, match="cannot be read"):
        load_adapter("a\0b")
