"""Files of others through the commands: one line, exit code 2, nothing written, at once."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TinyModel
from conversions import conversion, raw_safetensors, refusal

from ggml_diffusion.app.cli.main import main
from ggml_diffusion.evaluation.settings import EvaluationSettings
from ggml_diffusion.evaluation.suite import EvaluationInputs, run_evaluation
from ggml_diffusion.evaluation.tables import EvaluationProgress
from ggml_diffusion.formats.adapter_file import DiffusionCheckpoint
from ggml_diffusion.formats.gguf_adapter import write_gguf_adapter
from ggml_diffusion.formats.model_check import read_model
from ggml_diffusion.formats.model_file import file_sha256
from ggml_diffusion.generation.denoise import GenerationConfig
from ggml_diffusion.generation.diffusion_model import DiffusionModel
from ggml_diffusion.generation.sampling import RevealOrder

TEXT = "the old mill ground corn for the whole village and the miller told his children of it. " * 30
TINY = ("--steps", "2", "--batch-size", "1", "--gradient-accumulation", "1", "--sequence-length", "16")
TINY += ("--rank", "2", "--threads", "1")


@pytest.fixture(autouse=True)
def at_once() -> Iterator[None]:
    """What waits for ever fails instead."""

    def fail(*_: object) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, fail)
    signal.setitimer(signal.ITIMER_REAL, 60)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="module")
def base(tiny_model: TinyModel) -> Path:
    return tiny_model(L=1, C=32, H=2, G=1, F=32, type="Q4_0")


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line with which a command refuses."""
    with pytest.raises(SystemExit) as exit_:
        main([str(argument) for argument in arguments])
    _, err = capsys.readouterr()
    assert exit_.value.code == 2
    assert err.startswith("error: ") and err.endswith("\n") and err[:-1].isprintable(), err
    return str(err[len("error: ") : -1])


def conversion_of(base: Path) -> DiffusionCheckpoint:
    made = conversion(read_model(base))
    made.metadata = made.metadata.model_copy(update={"base_sha256": file_sha256(base), "mask_token_id": 3})
    return made


# -- numbers that are none ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def overflowing(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conversion of finite numbers, so large that no logit is one."""
    path = tmp_path_factory.mktemp("overflowing") / "adapter.safetensors"
    made = conversion_of(base)
    for name, array in made.tensors.items():
        if name.endswith(".lora_b"):
            array[...] = np.float32(3e38)
    made.save(path)
    return path


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.0}, {"top_p": 1.0}, {"top_k": 3, "remasking": 0.5}]
)
def test_logits_that_are_not_finite_give_no_text_in_any_order(
    base: Path, overflowing: Path, settings: dict[str, Any]
) -> None:
    model = DiffusionModel.load(base, overflowing, 1)
    for order in RevealOrder:
        config = GenerationConfig(length=4, order=order, **settings)
        message = refusal(lambda config=config: model.generate("the", config))
        assert "NaN or infinite logits: the adapter or its weights are damaged" in message
    with pytest.raises(Exception, match="NaN or infinite logits"):
        model.logits(np.array([1, 3, 3], dtype=np.int32), 0.5)


def test_generate_and_evaluate_end_with_one_line(
    base: Path, overflowing: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    message = refused(capsys, "generate", base, overflowing, "--temperature", "0", "--threads", "1")
    assert "NaN or infinite logits" in message
    (tmp_path / "text.txt").write_text(TEXT)
    inputs = EvaluationInputs(
        base,
        overflowing,
        data=(tmp_path / "text.txt",),
        sequence_length=16,
        held_out_fraction=0.5,
        n_threads=1,
    )
    from rich.console import Console

    settings = EvaluationSettings(sequences=2, seeds=1, one_by_one=0, spans=0, samples=0)
    with open(os.devnull, "w") as nowhere:
        progress = EvaluationProgress(Console(file=nowhere))
        assert "NaN or infinite logits" in refusal(lambda: run_evaluation(inputs, settings, progress))


@pytest.fixture(scope="module")
def damaged(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The base with a NaN in the scale of a token that hardly any text has."""
    path = tmp_path_factory.mktemp("damaged") / "damaged.gguf"
    content, info = bytearray(base.read_bytes()), read_model(base).tensors["token_embd.weight"]
    content[info.offset_bytes + 300 * 18 : info.offset_bytes + 300 * 18 + 2] = b"\0\x7e"
    path.write_bytes(content)
    return path


def test_a_base_with_a_number_that_is_none_is_refused_before_anything_is_written(
    damaged: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    output = tmp_path / "run"
    message = refused(capsys, "convert", damaged, "--data", tmp_path / "text.txt", "--output", output, *TINY)
    fault = "tensor 'token_embd.weight' has a scale that is NaN or infinite in row 300: the file is damaged"
    assert message == f"{damaged}: {fault}"
    assert {path.name for path in output.iterdir() if not path.name.startswith(".")} <= {"tokens"}
    conversion_of(damaged).save(tmp_path / "adapter.safetensors")
    assert "row 300" in refused(
        capsys, "generate", damaged, tmp_path / "adapter.safetensors", "--threads", "1"
    )


def test_the_verdict_on_the_base_is_kept_beside_the_run(base: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    arguments = [
        "convert",
        str(base),
        "--data",
        str(tmp_path / "text.txt"),
        "--output",
        str(tmp_path / "run"),
        *TINY,
    ]
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert not exit_.value.code
    verdict = json.loads((tmp_path / "run" / "base.json").read_text())
    assert verdict == {"file": base.name, "sha256": file_sha256(base), "all_finite": True}
    (tmp_path / "run" / "base.json").write_text("[" * 10**6)  # nonsense is no verdict, and no fault
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert not exit_.value.code
    assert json.loads((tmp_path / "run" / "base.json").read_text()) == verdict


# -- keys of ours ------------------------------------------------------------------------------------

_BAD_METADATA: list[tuple[str, Any]] = [
    ("training_tokens", 2**70),
    ("training_tokens", 2**63),
    ("conversion_steps", 2**64),
    ("conversion_steps", [1, 2]),
    ("mask_token_id", 2**31),
    ("alpha", 1e300),
    ("alpha", 1e-300),
    ("alpha", 3e38),
    ("time_max_timesteps", 10**12),
    ("time_max_timesteps", 1_000_001),
    ("block_size", 0),
    ("block_size", 2**40),
    ("final_causal_ratio", [0.5, 0.5]),
    ("base_model", ["a"]),
    ("base_model", "x" * 5000),
    ("created_at", 5),
    ("version", None),
    ("prediction", ["shifted"]),
]


def changed_safetensors(base: Path, path: Path, part: str, changes: dict[str, Any]) -> Path:
    conversion_of(base).save(path)
    content = path.read_bytes()
    n_header = struct.unpack_from("<Q", content)[0]
    header = json.loads(content[8 : 8 + n_header])
    document = json.loads(header["__metadata__"]["ggml_diffusion"])
    (document[part] if part else document).update(changes)
    header["__metadata__"]["ggml_diffusion"] = json.dumps(document)
    path.write_bytes(raw_safetensors(header, content[8 + n_header :]))
    return path


def changed_gguf(base: Path, path: Path, changes: dict[str, Any]) -> Path:
    """Lists become arrays of float32, the only ones that a writer of ours knows."""
    made, model = conversion_of(base), read_model(base)
    keys: dict[str, Any] = {"format": 1, "noise_schedule": "{}", "config": "{}"}
    keys |= made.metadata.model_dump(exclude={"alpha", "mask_token_id"}, exclude_none=True)
    keys |= {name: made.tensors[name] for name in ("time_embedding.weight", "time_embedding.bias")}
    for name, value in changes.items():
        keys[name] = np.zeros(len(value), np.float32) if isinstance(value, list) else value
    write_gguf_adapter(path, made.adapter(), model, keys)
    return path


@pytest.mark.parametrize("key, value", _BAD_METADATA)
def test_every_key_has_a_type_and_a_range_in_safetensors(
    base: Path, tmp_path: Path, key: str, value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = changed_safetensors(base, tmp_path / "adapter.safetensors", "metadata", {key: value})
    for command in (
        ("inspect", path),
        ("generate", base, path),
        ("export", "adapter", path, tmp_path / "other.gguf"),
    ):
        assert f"{path}: metadata key '{key}'" in refused(capsys, *command)


@pytest.mark.parametrize(
    "key, value",
    [
        (key, value)
        for key, value in _BAD_METADATA
        if key not in ("alpha", "mask_token_id")
        and value is not None
        and not (isinstance(value, int) and value >= 2**64)
    ],
)
def test_every_key_has_the_same_type_and_range_in_gguf(
    base: Path, tmp_path: Path, key: str, value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = changed_gguf(base, tmp_path / "adapter.gguf", {key: value})
    for command in (
        ("inspect", path),
        ("generate", base, path),
        ("export", "adapter", path, tmp_path / "o.safetensors"),
    ):
        assert f"{path}: metadata key '{key}'" in refused(capsys, *command)


@pytest.mark.parametrize("found", [[1.0], [1.0, 1.0], "1", 2, 1.0, True])
def test_a_format_is_a_number(
    base: Path, tmp_path: Path, found: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    path = changed_gguf(base, tmp_path / "adapter.gguf", {"format": found})
    assert "this version reads format 1" in refused(capsys, "inspect", path)
    other = changed_safetensors(base, tmp_path / "adapter.safetensors", "", {"format": found})
    assert "this version reads format 1" in refused(capsys, "inspect", other)


@pytest.mark.parametrize(
    "part, changes, fault",
    [
        ("config", {"base_model": 5}, "config key 'base_model'"),
        ("config", {"base_model": ["a"]}, "config key 'base_model'"),
        ("config", {"data": "text.txt"}, "config key 'data'"),
        ("config", {"data": [1]}, "config key 'data.0'"),
        ("config", {"sequence_length": "128"}, "config key 'sequence_length'"),
        ("config", {"sequence_length": 2**40}, "config key 'sequence_length'"),
        ("config", {"held_out_fraction": 1.5}, "config key 'held_out_fraction'"),
        ("config", {"held_out_fraction": [0.5]}, "config key 'held_out_fraction'"),
        ("noise_schedule", {"type": ["cosine"]}, "noise_schedule key 'type'"),
        ("config", {"x": "\ud800"}, "holds half of a surrogate pair"),
        ("config", {"\ud800": 1}, "holds half of a surrogate pair"),
    ],
)
def test_settings_that_are_used_again_have_types_in_both_formats(
    base: Path,
    tmp_path: Path,
    part: str,
    changes: dict[str, Any],
    fault: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = changed_safetensors(base, tmp_path / "adapter.safetensors", part, changes)
    other = changed_gguf(base, tmp_path / "adapter.gguf", {part: json.dumps(changes)})
    for adapter in (path, other):
        for command in (
            ("inspect", adapter),
            ("generate", base, adapter),
            ("export", "adapter", adapter, tmp_path / "o.gguf"),
        ):
            message = refused(capsys, *command)
            assert message.startswith(f"{adapter}: ") and fault in message


@pytest.mark.parametrize(
    "text", ['{"a":' * 40 + "1" + "}" * 40, '{"a": 1e999}', '{"a": ' + "[" * 5000 + "]" * 5000 + "}"]
)
def test_json_that_could_not_be_written_again_is_refused(
    base: Path, tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = changed_gguf(base, tmp_path / "adapter.gguf", {"config": text})
    assert f"{path}: key 'ggml_diffusion.config' " in refused(capsys, "inspect", path)


def test_a_name_out_of_a_file_is_never_printed_as_it_is(base: Path, tmp_path: Path) -> None:
    made = conversion_of(base)
    name = next(name for name in made.tensors if name.endswith(".lora_a"))
    adapter = dataclasses.replace(made.adapter())
    adapter.tensors = {name.replace(".lora_a", "\x1b[2J\n.lora_a"): made.tensors[name]}
    refusal(lambda: adapter.check(read_model(base)))


# -- what is no file ---------------------------------------------------------------------------------


@pytest.fixture(params=["pipe", "socket", "device", "folder"])
def no_file(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """What stands under a name of a text file, and what it is called."""
    path = tmp_path / "x.txt"
    if request.param == "pipe":
        os.mkfifo(path)
    elif request.param == "socket":
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(path))
            yield "a socket", path
        return
    elif request.param == "device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()
    yield {"pipe": "a named pipe", "device": "a device", "folder": "a folder"}[request.param], path


def test_a_pipe_a_socket_a_device_or_a_folder_is_refused_at_once_wherever_a_file_is_asked_for(
    base: Path, tmp_path: Path, no_file: tuple[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    kind, path = no_file
    conversion_of(base).save(tmp_path / "adapter.safetensors")
    (tmp_path / "text").write_text(TEXT)
    commands: list[tuple[object, ...]] = [
        ("convert", path, "--data", tmp_path / "text", "--output", tmp_path / "run", *TINY),
        ("convert", "--config", path),
        ("generate", path, tmp_path / "adapter.safetensors"),
    ]
    if kind != "a folder":  # as data and as conversion a folder is what it is
        commands += [
            ("inspect", path),
            ("convert", base, "--data", path, "--output", tmp_path / "run", *TINY),
            ("generate", base, path),
            ("export", "adapter", path, tmp_path / "o.gguf"),
            ("evaluate", base, path),
        ]
    for command in commands:
        assert f"{path}: {kind}, not a file" in refused(capsys, *command)
