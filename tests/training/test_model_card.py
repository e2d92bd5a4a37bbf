"""The model card: what a folder says of itself, and whose README.md it may replace."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TinyModel
from conversions import conversion

from ggml_diffusion.evaluation.held_out import MaskedScore, Score
from ggml_diffusion.formats.model_check import read_model
from ggml_diffusion.formats.model_file import ModelFile, file_sha256
from ggml_diffusion.training.earlier_run import delete_run
from ggml_diffusion.training.model_card import (
    MARK,
    card,
    figures_table,
    is_card,
    write_adapter_card,
    write_card,
)


def test_a_card_says_what_it_is_and_what_it_belongs_to(base: ModelFile) -> None:
    text = card(conversion(base), None)
    assert text.startswith("---\nlibrary_name: ggml-diffusion\ntags: [") and "`Tiny é`" in text
    for part in ("ab" * 32, "12 steps, 1,099,511,627,776 tokens", "the output at i - 1", "| mask token | 9 |",
                 "causal ratio of the attention | 0.1 |", "Nothing was measured", "export standalone",
                 "Not for sampling token after token"):  # fmt: skip
        assert part in text


def test_a_frozen_context_is_said_and_offers_no_form_that_it_has_not(base: ModelFile) -> None:
    made = conversion(base)
    made.metadata = made.metadata.model_copy(update={"context": "frozen"})
    text = card(made, None)
    assert "acts on masks alone" in text and "export standalone" not in text
    assert "A conversion with `--context adapted` has both" in text
    made.metadata = made.metadata.model_copy(update={"margin": 8})
    assert "and on a second look at the 8 tokens beside them" in card(made, None)


def test_names_out_of_files_are_no_markup(base: ModelFile) -> None:
    made = conversion(base)
    hostile = "`</td>|[x](http://evil)\n# heading"
    made.metadata = made.metadata.model_copy(update={"base_model": hostile, "version": hostile})
    text = card(made, None)
    body = text.split("---", 2)[2]
    assert "[x]" not in body and "</td>" not in body and "\n# heading" not in text


def test_figures_are_a_table() -> None:
    def score(ce: float) -> MaskedScore:
        return MaskedScore(0.15, Score(ce, 0.25, 9), Score(ce + 1.0, 0.1, 9))

    table = figures_table(62, Score(3.1, 0.4, 9), [score(6.0)], [score(2.5)])
    assert "On 62 held-out sequences" in table
    assert "| cross-entropy of masked tokens, 15% masked, nats | 6.000 | 2.500 |" in table
    assert "3.100 nats" in table


def test_somebody_elses_readme_stays(base: ModelFile, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    readme.write_text("mine")
    assert not write_card(tmp_path, conversion(base), None)
    delete_run(tmp_path)
    assert readme.read_text() == "mine"
    readme.unlink()
    assert write_card(tmp_path, conversion(base), None) and MARK in readme.read_text()
    assert write_card(tmp_path, conversion(base), "new figures") and "new figures" in readme.read_text()
    delete_run(tmp_path)
    assert not readme.exists()


def test_what_is_no_file_is_no_card(tmp_path: Path) -> None:
    (tmp_path / "README.md").mkdir()
    assert not is_card(tmp_path / "README.md") and not is_card(tmp_path / "nothing")


@pytest.mark.parametrize("frozen", [False, True])
def test_every_line_of_commands_is_one_that_the_program_has(base: ModelFile, frozen: bool) -> None:
    from ggml_diffusion.app.cli.main import click_group

    made = conversion(base)
    if frozen:
        made.metadata = made.metadata.model_copy(update={"context": "frozen"})
    commands = click_group().commands
    lines = [part for part in card(made, None).split("ggml-diffusion ")[1:]]
    names = {line.split()[0].strip("`") for line in lines}
    assert {"infill", "generate"} <= names
    assert names - {"0.1.0,", "-->"} <= set(commands)


def test_an_adapter_by_itself_has_a_card_and_one_in_a_run_has_the_runs(
    base: ModelFile, tmp_path: Path
) -> None:
    target = tmp_path / "mine.gguf"
    assert write_adapter_card(target, conversion(base)) == tmp_path / "mine.md"
    text = (tmp_path / "mine.md").read_text()
    assert "`mine.gguf` is everything" in text and "config.toml" not in text
    assert "infill Tiny é mine.gguf" in text and "export peft Tiny é mine.gguf" in text
    assert write_adapter_card(target, conversion(base)) == tmp_path / "mine.md"
    (tmp_path / "mine.md").write_text("somebody's notes")
    assert write_adapter_card(target, conversion(base)) is None
    assert (tmp_path / "mine.md").read_text() == "somebody's notes"
    (tmp_path / "mine.md").unlink()
    write_card(tmp_path, conversion(base), None)
    assert write_adapter_card(target, conversion(base)) is None
    assert not (tmp_path / "mine.md").exists()


def test_a_first_token_that_sees_itself_alone_is_said(base: ModelFile) -> None:
    made = conversion(base)
    made.metadata = made.metadata.model_copy(update={"attention_sink": True})
    text = card(made, None)
    assert "but for the first, which sees itself alone (`--attention-sink`)" in text
    assert "export standalone" not in text and "export peft" in text and "--no-attention-sink" in text
    assert "the first token, which is decoded by itself before it" in text


@pytest.mark.parametrize(
    ("context", "sink", "n_commands"), [("adapted", False, 4), ("adapted", True, 3), ("frozen", False, 2)]
)
def test_every_command_of_a_card_runs(
    tiny_model: TinyModel, tmp_path: Path, context: str, sink: bool, n_commands: int
) -> None:
    path = tmp_path / "tiny.gguf"
    path.write_bytes(tiny_model(tied=False).read_bytes())
    made = conversion(read_model(path), time=True)
    changed = {"base_model": path.name, "final_causal_ratio": 0.0, "context": context, "mask_token_id": 3}
    changed |= {"attention_sink": sink, "base_sha256": file_sha256(path)}
    made.metadata = made.metadata.model_copy(update=changed)
    made.save(tmp_path / "adapter.safetensors")
    made.save_gguf(tmp_path / "adapter.gguf", read_model(path))
    (tmp_path / "notes.md").write_text("the mill ___ corn")
    text = card(made, None)
    commands = [
        line for block in re.findall(r"```\n(.*?)```", text, re.DOTALL) for line in block.splitlines()
    ]
    commands += re.findall(r"`(ggml-diffusion export .*?)`", text)
    programs = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(commands) == n_commands and len(programs) == (context == "adapted")
    run = [[sys.executable, "-m", "ggml_diffusion", *shlex.split(one, comments=True)[1:]] for one in commands]
    for command in [*run, *([sys.executable, "-c", program] for program in programs)]:
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (command, done.stderr)
