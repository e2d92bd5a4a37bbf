"""The card beside a standalone file: its program runs, and predicts what the file predicts."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import TinyModel
from conversions import MASK_TOKEN, conversion

from ggml_diffusion.export.comparison import Agreement
from ggml_diffusion.export.llama_runtime import bidirectional_logits
from ggml_diffusion.export.standalone import plan_standalone, write_standalone
from ggml_diffusion.export.standalone_card import write_standalone_card
from ggml_diffusion.formats.adapter_file import DiffusionCheckpoint
from ggml_diffusion.formats.model_check import read_model
from ggml_diffusion.text.tokenizer import Tokenizer
from ggml_diffusion.training.model_card import MARK

FOUND = Agreement(1.5e-3, 0.9, 60)


def bidirectional(path: Path) -> DiffusionCheckpoint:
    checkpoint = conversion(read_model(path), time=True, scale=0.15)
    checkpoint.metadata = checkpoint.metadata.model_copy(update={"final_causal_ratio": 0.0})
    return checkpoint


@pytest.mark.parametrize("sink", [False, True])
def test_the_program_of_the_card_runs(tiny_model: TinyModel, tmp_path: Path, sink: bool) -> None:
    path = tiny_model(tied=False)
    base, checkpoint, target = read_model(path), bidirectional(path), tmp_path / "out.gguf"
    checkpoint.metadata = checkpoint.metadata.model_copy(update={"attention_sink": sink})
    plan = plan_standalone(base, checkpoint, arch="same")
    write_standalone(target, base, checkpoint, plan, 1)
    card = write_standalone_card(target, checkpoint, plan, FOUND)
    assert card == tmp_path / "out.md"
    text = card.read_text()
    assert checkpoint.metadata.base_sha256 in text and "1.5e-03 nats" in text
    assert "llama-diffusion-cli -m" not in text
    (program,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    program += "\nprint([tokens, [int(row.argmax()) for row in rows]])"
    run = subprocess.run([sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    tokens, likeliest = json.loads(run.stdout.splitlines()[-1])
    before = Tokenizer.from_gguf(target).encode("The keys are").tolist()
    assert tokens[: len(before)] == before and tokens[len(before) : len(before) + 4] == [MASK_TOKEN] * 4
    expected = bidirectional_logits(target, np.array(tokens, np.int32), attention_sink=sink).copy()
    expected[:, MASK_TOKEN] = -np.inf
    assert likeliest == expected.argmax(axis=1).tolist()


def test_a_diffusion_architecture_is_for_the_stock_program(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = tiny_model(tied=False)
    base, checkpoint, target = read_model(path), bidirectional(path), tmp_path / "out.gguf"
    card = write_standalone_card(target, checkpoint, plan_standalone(base, checkpoint), FOUND)
    assert card is not None
    text = card.read_text()
    assert "llama-diffusion-cli -m out.gguf" in text and "--arch same" in text and "```python" not in text


def test_a_file_of_somebody_else_stays(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = tiny_model()
    checkpoint = bidirectional(path)
    plan = plan_standalone(read_model(path), checkpoint)
    (tmp_path / "out.md").write_text("mine")
    assert write_standalone_card(tmp_path / "out.gguf", checkpoint, plan, FOUND) is None
    assert (tmp_path / "out.md").read_text() == "mine"
    (tmp_path / "out.md").write_text(f"{MARK}\nold")
    assert write_standalone_card(tmp_path / "out.gguf", checkpoint, plan, FOUND) is not None
    assert "old" not in (tmp_path / "out.md").read_text().splitlines()
