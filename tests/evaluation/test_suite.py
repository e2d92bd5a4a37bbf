"""A whole evaluation of a tiny conversion: what it holds, costs and says, as tables, JSON and a page."""

import dataclasses
import io
import json
import math
import sys

import numpy as np
import pytest
from conversions import conversion
from rich.console import Console

from ggml_diffusion.engine.cpu.q4_model import Q4Model
from ggml_diffusion.errors import UserError
from ggml_diffusion.evaluation import suite
from ggml_diffusion.evaluation.estimates import estimate_ratio
from ggml_diffusion.evaluation.plots import draw_page, save_evaluation
from ggml_diffusion.evaluation.settings import EvaluationSettings
from ggml_diffusion.evaluation.suite import EvaluationInputs, load_held_out, run_evaluation
from ggml_diffusion.evaluation.tables import EvaluationProgress, evaluation_tables
from ggml_diffusion.formats.adapter_file import DiffusionCheckpoint
from ggml_diffusion.formats.model_file import file_sha256
from ggml_diffusion.text import kept_tokens
from ggml_diffusion.text.kept_tokens import Reading
from ggml_diffusion.text.loader import TextDataLoader
from ggml_diffusion.text.tokenizer import Tokenizer

TEXT = "the old mill ground corn for the whole village and the miller told his children of it. " * 30
SETTINGS = EvaluationSettings(
    sequences=6, seeds=2, one_by_one=4, candidates=2, samples=2, length=8, prompt_length=4
)


class Recorder:
    def __init__(self):
        self.notes, self.planned, self.parts, self.stopped = [], 0, {}, 0
        self.tokenised = []

    def note(self, text):
        self.notes.append(text)

    def tokenise(self, done_bytes, total_bytes):
        self.tokenised.append((done_bytes, total_bytes))

    def start(self, n_tokens):
        self.planned = n_tokens

    def advance(self, part, n_tokens):
        self.parts[part] = self.parts.get(part, 0) + n_tokens

    def stop(self):
        self.stopped += 1


@pytest.fixture(scope="module")
def base(tiny_model):
    return tiny_model(L=1, C=32, H=2, G=1, F=32, type="Q4_0")


@pytest.fixture(scope="module")
def folder(base, tmp_path_factory):
    """A text and two conversions of the base, as files."""
    folder = tmp_path_factory.mktemp("evaluation")
    (folder / "text.txt").write_text(TEXT)
    with Q4Model.from_gguf(base, 1) as engine:
        for name, seed, ratio in (("adapter", 0, 0.0), ("control", 1, 1.0)):
            made = conversion(engine.file, seed=seed)
            made.metadata = made.metadata.model_copy(
                update={"base_sha256": engine.sha256, "final_causal_ratio": ratio, "mask_token_id": 3}
            )
            made.config = {
                "data": [str(folder / "text.txt")],
                "sequence_length": 40,
                "held_out_fraction": 0.3,
            }
            made.save(folder / f"{name}.safetensors")
    return folder


@pytest.fixture(scope="module")
def measured(base, folder):
    """The evaluation of everything, and what was said meanwhile."""
    listener = Recorder()
    inputs = EvaluationInputs(
        base, folder / "adapter.safetensors", control=folder / "control.safetensors", n_threads=1
    )
    return run_evaluation(inputs, SETTINGS, listener), listener


def printed(renderable, width=80):
    console = Console(file=io.StringIO(), width=width)
    console.print(renderable)
    return console.file.getvalue()


def test_everything_is_measured(measured):
    evaluation, listener = measured
    assert evaluation.ln_vocabulary == pytest.approx(math.log(384))
    assert evaluation.likelihoods.keys() == {"converted", "step_0", "base", "unigram"}
    assert len(evaluation.likelihoods["converted"].by_seed) == 2
    assert [one.share for one in evaluation.masked] == [0.15, 0.5, 0.85]
    assert evaluation.masked[0].arms.keys() == {
        "converted", "converted_causal", "step_0", "step_0_causal", "control", "base",
    }  # fmt: skip
    assert list(evaluation.masked[0].gain) == ["a", "b", "c"]
    assert [one.span_length for one in evaluation.infilling] == [1, 4, 8]
    assert [text.steps for text in evaluation.texts] == [None, None, 2, 4, 8]
    assert evaluation.base_check.unchanged
    assert evaluation.base_check.trained_on_this_file
    assert evaluation.seconds > 0
    assert listener.stopped == 1
    assert list(listener.parts) == ["base", "NELBO", "masked tokens", "infilling", "writing"]


def test_the_tokens_that_a_run_kept_are_not_made_again(base, folder, tmp_path, monkeypatch):
    tokenizer = Tokenizer.from_gguf(base)
    text = folder / "text.txt"
    checkpoint = DiffusionCheckpoint.load(folder / "adapter.safetensors")
    expected = load_held_out(checkpoint, tokenizer, 6, data=[text])
    TextDataLoader(text, tokenizer, 40, 6, reading=Reading(tmp_path / "tokens", keep=True))
    monkeypatch.setattr(kept_tokens, "tokenise", None)
    found = load_held_out(checkpoint, tokenizer, 6, data=[text], reading=Reading(tmp_path / "tokens"))
    assert found.fingerprint == expected.fingerprint
    assert np.array_equal(found.held_out.tokens, expected.held_out.tokens)
    assert np.array_equal(found.training_counts, expected.training_counts)


def test_the_cost_is_said_before_and_is_not_exceeded(measured):
    _, listener = measured
    done = sum(listener.parts.values())
    assert done <= listener.planned
    assert done > 0.9 * listener.planned


def test_all_likelihoods_are_of_the_same_tokens_and_bytes(measured, base, folder):
    evaluation, _ = measured
    tokenizer = Tokenizer.from_gguf(base)
    loader = TextDataLoader([folder / "text.txt"], tokenizer, 40, 6, split="held_out", held_out_fraction=0.3)
    sequences = loader.batch_at(0)
    n_bytes = sum(
        len(tokenizer.decode([token]).encode())
        for line, length in zip(sequences.tokens, sequences.lengths, strict=True)
        for token in line[1:length]  # one document: the first token of a sequence is given
    )
    counts = np.bincount(np.concatenate(loader.with_split("train").sequences), minlength=tokenizer.vocab_size)
    probability = (counts + 0.5) / (counts.sum() + 0.5 * len(counts))
    nats = -sum(
        np.log(probability[line[1:length]]).sum()
        for line, length in zip(sequences.tokens, sequences.lengths, strict=True)
    )
    unigram = evaluation.likelihoods["unigram"]
    assert {figures.nats_per_token.n for figures in evaluation.likelihoods.values()} == {
        int(sum(sequences.lengths - 1))
    }
    assert {figures.bits_per_byte.n for figures in evaluation.likelihoods.values()} == {n_bytes}
    assert unigram.nats_per_token.value == pytest.approx(nats / sum(sequences.lengths - 1))
    assert unigram.bits_per_byte.value == pytest.approx(nats / math.log(2) / n_bytes)


def test_the_same_evaluation_gives_the_same_figures(measured, base, folder):
    first, _ = measured
    inputs = EvaluationInputs(
        base, folder / "adapter.safetensors", control=folder / "control.safetensors", n_threads=1
    )
    again = run_evaluation(inputs, SETTINGS.model_copy(update={"batch_size": 3}), Recorder())
    for name, figures in first.likelihoods.items():
        value = again.likelihoods[name].nats_per_token.value
        assert value == pytest.approx(figures.nats_per_token.value, rel=1e-5)
    assert [text.example for text in again.texts] == [text.example for text in first.texts]
    assert again.masked[1].gain["c"].value == pytest.approx(first.masked[1].gain["c"].value, rel=1e-3)


def test_parts_can_be_left_out(base, folder):
    settings = SETTINGS.model_copy(update={"one_by_one": 0, "spans": 0, "samples": 0, "seeds": 1})
    inputs = EvaluationInputs(base, folder / "adapter.safetensors", n_threads=1)
    listener = Recorder()
    evaluation = run_evaluation(inputs, settings, listener)
    assert evaluation.infilling == []
    assert evaluation.texts == []
    assert list(evaluation.masked[0].gain) == ["a"]
    assert sum(listener.parts.values()) == listener.planned
    assert "Infilling" not in printed(evaluation_tables(evaluation))


def test_what_the_text_has_no_room_for_is_left_out_with_a_note(base, folder):
    settings = SETTINGS.model_copy(update={"one_by_one": 0, "seeds": 1, "length": 5000})
    inputs = EvaluationInputs(
        base, folder / "adapter.safetensors", sequence_length=18, held_out_fraction=0.5, n_threads=1
    )
    listener = Recorder()
    evaluation = run_evaluation(inputs, settings, listener)
    assert evaluation.texts == []
    assert [one.span_length for one in evaluation.infilling] == [1]
    notes = " ".join(listener.notes)
    assert "no texts are written: no held-out text has 4 tokens of prompt and 5000" in notes
    assert "no held-out text has room for spans of 4" in notes
    assert "no held-out text has room for spans of 8" in notes


# -- the base ---------------------------------------------------------------------------------------------


def test_a_base_that_has_changed_is_reported(base, folder, monkeypatch):
    probe, calls = suite._probe, []

    def drifting(engine, held_out, adapter):
        calls.append(adapter)
        return probe(engine, held_out, adapter) + np.float32(len(calls) > 1) * 1e-6

    monkeypatch.setattr(suite, "_probe", drifting)
    settings = SETTINGS.model_copy(update={"one_by_one": 0, "spans": 0, "samples": 0, "seeds": 1})
    evaluation = run_evaluation(
        EvaluationInputs(base, folder / "adapter.safetensors", n_threads=1), settings, Recorder()
    )
    assert not evaluation.base_check.same_logits
    assert not evaluation.base_check.unchanged
    assert evaluation.base_check.same_file
    assert "THE BASE HAS CHANGED" in printed(evaluation_tables(evaluation))


def test_the_files_sum_is_that_of_the_file(measured, base):
    assert measured[0].base_check.sha256 == file_sha256(base)


# -- what is refused ----------------------------------------------------------------------------------------


def checkpoint_with(folder, **config):
    loaded = suite.DiffusionCheckpoint.load(folder / "adapter.safetensors")
    loaded.config = {**loaded.config, **config}
    return loaded


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"data": []}, "which text"),
        ({"data": None}, "which text"),
        ({"held_out_fraction": 0.0}, "held nothing out"),
        ({"data": ["/nowhere.txt"]}, "no such file"),
    ],
)
def test_data_that_cannot_be_measured_on_are_refused(base, folder, config, words):
    with pytest.raises(UserError, match=words):
        load_held_out(checkpoint_with(folder, **config), Tokenizer.from_gguf(base), 4)


def test_given_data_come_before_those_of_the_training(base, folder, tmp_path):
    (tmp_path / "other.txt").write_text("corn " * 400)
    tokenizer = Tokenizer.from_gguf(base)
    checkpoint = checkpoint_with(folder)
    trained = load_held_out(checkpoint, tokenizer, 4)
    given = load_held_out(
        checkpoint, tokenizer, 2, data=[tmp_path / "other.txt"], sequence_length=16, held_out_fraction=0.5
    )
    assert trained.held_out.tokens.shape == (4, 40)
    assert given.held_out.tokens.shape == (2, 16)
    assert given.fingerprint != trained.fingerprint
    assert given.fraction == 0.5
    assert trained.fraction == 0.3


def test_a_control_with_another_mask_token_is_refused(base, folder, tmp_path):
    other = suite.DiffusionCheckpoint.load(folder / "control.safetensors")
    other.metadata = other.metadata.model_copy(update={"mask_token_id": 4})
    other.save(tmp_path / "other.safetensors")
    inputs = EvaluationInputs(
        base, folder / "adapter.safetensors", control=tmp_path / "other.safetensors", n_threads=1
    )
    with pytest.raises(UserError, match="its mask token is 4"):
        run_evaluation(inputs, SETTINGS, Recorder())


def test_a_conversion_of_another_base_is_refused_unless_allowed(tiny_model, folder):
    other = tiny_model(L=1, C=32, H=2, G=1, F=32, type="Q4_0", seed=5)
    inputs = EvaluationInputs(other, folder / "adapter.safetensors", n_threads=1)
    with pytest.raises(UserError, match="another base model"):
        run_evaluation(inputs, SETTINGS, Recorder())
    settings = SETTINGS.model_copy(update={"one_by_one": 0, "spans": 0, "samples": 0, "seeds": 1})
    evaluation = run_evaluation(dataclasses.replace(inputs, allow_other_base=True), settings, Recorder())
    assert not evaluation.base_check.trained_on_this_file
    assert "trained on another file" in printed(evaluation_tables(evaluation))


# -- how it looks -------------------------------------------------------------------------------------------


def test_tables_fit_80_columns_and_say_what_is_what(measured):
    evaluation, _ = measured
    text = printed(evaluation_tables(evaluation))
    assert max(len(line) for line in text.splitlines()) <= 80
    assert "…" not in text
    for figures in evaluation.likelihoods.values():  # the widest table is not cut off
        assert f" {figures.nats_per_token.standard_error:.3f}" in text
        assert f"[{figures.bits_per_byte.low:.3f}, {figures.bits_per_byte.high:.3f}]" in text
    for words in ("NELBO", "ln V", "unigram", "t = 0.85", "(a) causal ratio 1", "(c) causal control",
                  "AR base, best of n", "8 tokens", "distinct-2", "bit for bit"):  # fmt: skip
        assert words in text, words
    estimate = evaluation.masked[1].arms["converted"].cross_entropy
    assert f"{estimate.value:.3f}" in text
    assert f"[{estimate.low:.3f}, {estimate.high:.3f}]" in text


def test_json_holds_every_figure_and_null_for_what_has_no_value(measured):
    evaluation, _ = measured
    document = json.loads(evaluation.as_json(), parse_constant=lambda name: pytest.fail(name))
    assert document["format"] == 1
    assert document["masked"][1]["arms"]["converted"]["cross_entropy"]["value"] == pytest.approx(
        evaluation.masked[1].arms["converted"].cross_entropy.value
    )
    assert document["about"]["settings"]["sequences"] == 6
    assert document["about"]["conversion"]["mask_token_id"] == 3
    assert document["base_check"]["unchanged"] is True
    assert document["texts"][2]["steps"] == 2
    lonely = estimate_ratio([1.0], [1])
    arms = {**evaluation.masked[0].arms}
    arms["converted"] = dataclasses.replace(arms["converted"], accuracy=lonely)
    masked = [dataclasses.replace(evaluation.masked[0], arms=arms), *evaluation.masked[1:]]
    other = json.loads(dataclasses.replace(evaluation, masked=masked).as_json())
    assert other["masked"][0]["arms"]["converted"]["accuracy"]["low"] is None


def test_the_page_is_one_picture_beside_the_json(measured, tmp_path):
    pytest.importorskip("matplotlib")
    evaluation, _ = measured
    written = save_evaluation(evaluation, tmp_path / "deep" / "folder", pytest.fail)
    assert [path.name for path in written] == ["evaluation.json", "evaluation.png"]
    assert written[1].read_bytes().startswith(b"\x89PNG")
    assert written[1].stat().st_size > 50_000


def test_the_page_has_a_panel_for_each_measure_that_was_taken(measured, tmp_path):
    pytest.importorskip("matplotlib")
    evaluation = dataclasses.replace(measured[0], infilling=[])
    figure = draw_page(evaluation, tmp_path / "page.svg")
    titles = {axes.get_title(loc="left").split(" ")[0] for axes in figure.axes} - {""}
    assert titles == {"Likelihood:", "Masked", "Future-context", "Written"}
    assert (tmp_path / "page.svg").read_text().startswith("<?xml")


def test_without_matplotlib_the_page_is_left_out_with_a_sentence(measured, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    notes = []
    written = save_evaluation(measured[0], tmp_path, notes.append)
    assert [path.name for path in written] == ["evaluation.json"]
    assert len(notes) == 1
    assert "pip install 'ggml-diffusion[plots]'" in notes[0]


def test_a_folder_that_cannot_be_made_is_one_line(measured, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be used as output folder"):
        save_evaluation(measured[0], tmp_path / "file", print)


@pytest.mark.parametrize(
    ("asked", "trained", "expected"), [(None, None, 0), (None, 4, 4), (0, 4, 0), (8, None, 8)]
)
def test_texts_are_written_at_once_unless_blocks_were_trained_or_asked_for(asked, trained, expected):
    config = EvaluationSettings(block_length=asked, top_p=0.5).generation_config(trained)
    assert (config.block_length, config.top_p) == (expected, 0.5)


def test_progress_is_plain_lines_where_there_is_no_terminal():
    now_s = [0.0]
    console = Console(file=io.StringIO(), width=80)
    with EvaluationProgress(console, lambda: now_s[0]) as progress:
        progress.start(1000)
        for _ in range(4):
            now_s[0] += 6.0
            progress.advance("NELBO", 100)
    lines = console.file.getvalue().splitlines()
    assert lines[0] == "at most 1,000 tokens are to go through the model"
    assert len(lines) == 3  # every 10 s
    assert lines[1].split() == ["NELBO", "20%", "17", "tokens/s", "at", "most", "0.8", "min", "left"]


def test_progress_is_a_bar_on_a_terminal():
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    with EvaluationProgress(console) as progress:
        progress.start(1000)
        progress.advance("masked tokens", 1000)
    assert "masked tokens" in console.file.getvalue()
