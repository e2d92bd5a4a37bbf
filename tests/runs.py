"""Whole runs for tests: settings of a tiny one, a listener that keeps what it hears, what the folder has."""

import json

import pytest

from ggml_diffusion.config.toml import load_config
from ggml_diffusion.formats.adapter_file import DiffusionCheckpoint
from ggml_diffusion.training import run as convert
from ggml_diffusion.training.run import run_conversion

TEXT = "the old mill ground corn for the whole village and the miller told his children of it. " * 40


class Recorder:
    """Keeps all that a run says."""

    def __init__(self):
        self.notes, self.warnings, self.steps, self.started = [], [], [], None
        self.tokenised = []

    def note(self, text):
        self.notes.append(text)

    def tokenise(self, done_bytes, total_bytes):
        self.tokenised.append((done_bytes, total_bytes))

    def warn(self, text):
        self.warnings.append(text)

    def start(self, first_step, tokens_seen, total_steps):
        self.started = (first_step, tokens_seen, total_steps)

    def step(self, metrics):
        self.steps.append(metrics)

    def stop(self):
        pass


@pytest.fixture(scope="module")
def run_base(tiny_model):
    return tiny_model(L=1, C=32, H=2, G=1, F=32, type="Q4_0")


@pytest.fixture
def settings(run_base, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    return {
        "model.base_model": str(run_base),
        "model.qlora_rank": 2,
        "training.data": [str(tmp_path / "text.txt")],
        "training.output": str(tmp_path / "run"),
        "training.batch_size": 2,
        "training.gradient_accumulation": 1,
        "training.sequence_length": 24,
        "training.total_steps": 5,
        "training.warmup_steps": 1,
        "training.learning_rate": 1e-2,
        "training.checkpoint_every": 2,
        "training.held_out_fraction": 0.2,
        "mask_annealing.total_steps": 3,
        "time_embedding.dim": 8,
        "hardware.num_threads": 1,
    }


@pytest.fixture
def quick_gate(monkeypatch):
    """llama.cpp takes a second to start: what is not about the gate does without it."""
    monkeypatch.setattr(convert, "check_identity", lambda model, tokenizer: "gate")


def run(settings, **options):
    recorder = Recorder()
    return run_conversion(load_config(overrides=settings), recorder, **options), recorder


def steps_in(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


# -- the run -------------------------------------------------------------------------------------------


def rates_in(folder):
    return [json.loads(line)["learning_rate"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def tensors_of(conversion):
    loaded = DiffusionCheckpoint.load(conversion.safetensors)
    return {name: array.tobytes() for name, array in loaded.tensors.items()}
