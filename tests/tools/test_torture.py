"""The tool that kills runs: that it would notice a difference, and a minute of it."""

import json
import shutil
import sys

import pytest
import torture

from ggml_diffusion.errors import UserError


@pytest.fixture
def finished(tmp_path):
    """Two equal folders as a round leaves them."""
    one = tmp_path / "one"
    (one / "run" / "checkpoints").mkdir(parents=True)
    (one / "tmp").mkdir()
    for name in ("adapter.safetensors", "adapter.gguf", "config.toml", "checkpoints/latest"):
        (one / "run" / name).write_text(name)
    for name in ("step-00000038", "step-00000040"):
        (one / "run" / "checkpoints" / name).mkdir()
    lines = [json.dumps({"step": step, "loss": 1.5, "tokens_per_second": step}) for step in (1, 2)]
    (one / "run" / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    shutil.copytree(one, tmp_path / "other")
    return one, tmp_path / "other"


def test_equal_runs_are_equal_whatever_their_speed(finished):
    metrics = finished[1] / "run" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"tokens_per_second": 2', '"tokens_per_second": 7'))
    torture.compare(*finished)


@pytest.mark.parametrize(
    ("name", "content", "word"),
    [
        ("run/adapter.safetensors", "another", "adapter.safetensors differs"),
        ("run/adapter.gguf", "another", "adapter.gguf differs"),
        ("run/config.toml", "another", "config.toml differs"),
        ("run/metrics.jsonl", '{"step": 1, "loss": 1.5, "tokens_per_second": 1}\n', "metrics.jsonl differs"),
        ("run/.adapter.gguf.tmp", "left", "left over: .adapter.gguf.tmp"),
        ("run/checkpoints/.unfinished-1", "left", "checkpoints: .unfinished-1"),
        ("tmp/tokens.npy", "left", "temporary files: tokens.npy"),
    ],
)
def test_a_difference_is_noticed(finished, name, content, word):
    (finished[1] / name).write_text(content)
    with pytest.raises(UserError, match=word):
        torture.compare(*finished)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="preloads a library")
def test_a_minute_of_kills_ends_with_the_same_bytes(tmp_path, capsys):
    torture.main(["--seconds", "60", "--seed", "1", "--folder", str(tmp_path)])
    assert "all identical" in capsys.readouterr().out.splitlines()[-1]
