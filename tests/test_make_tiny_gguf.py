"""The tool behind the tests' models: its command line, and what it refuses.

That llama.cpp loads what it writes is shown by test_oracle_architectures.py.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import gguf
import make_tiny_gguf as tiny
import pytest
from conftest import TinyModel


def test_its_command_line_writes_what_its_function_writes(tmp_path: Path, tiny_model: TinyModel) -> None:
    keys = {"attention.sliding_window": 5, "rope.freq_base_swa": None}
    command = [sys.executable, tiny.__file__, str(tmp_path / "out.gguf"), "--arch", "gemma3", "--L", "2"]
    command += ["--type", "Q8_0", "--biases", "attn_q,attn_k", "--fused-qkv", "--keys", json.dumps(keys)]
    subprocess.run(command, check=True)
    options = {"type": "Q8_0", "biases": ["attn_q", "attn_k"], "fused_qkv": True, "keys": keys}
    same = tiny_model(arch="gemma3", L=2, **options)
    assert (tmp_path / "out.gguf").read_bytes() == same.read_bytes()


def test_a_key_replaces_that_of_the_architecture_and_none_removes_it(tiny_model: TinyModel) -> None:
    keys = {"attention.sliding_window": 5, "rope.freq_base_swa": None, "attention.head_count_kv": [2, 2]}
    reader = gguf.GGUFReader(str(tiny_model(arch="gemma3", L=2, keys=keys)))
    assert reader.fields["gemma3.attention.sliding_window"].contents() == 5
    assert reader.fields["gemma3.attention.head_count_kv"].contents() == [2, 2]
    assert "gemma3.rope.freq_base_swa" not in reader.fields
    assert reader.fields["gemma3.rope.freq_base"].contents() == 1e6


def test_what_an_architecture_has_more_of_leaves_the_other_weights_as_they_are(tiny_model: TinyModel) -> None:
    plain, more = (gguf.GGUFReader(str(tiny_model(arch=arch))) for arch in ("llama", "qwen2"))
    by_name = {t.name: t.data.tobytes() for t in more.tensors}
    assert {t.name for t in plain.tensors} < by_name.keys()
    assert all(by_name[t.name] == t.data.tobytes() for t in plain.tensors)


def test_a_bias_of_nothing_and_a_size_that_a_type_cannot_have_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no bias for"):
        tiny.make_tiny_gguf(tmp_path / "a.gguf", biases=("ffn_norm",))
    with pytest.raises(ValueError, match="Q4_K needs rows in multiples of 256"):
        tiny.make_tiny_gguf(tmp_path / "b.gguf", type="Q4_K")
