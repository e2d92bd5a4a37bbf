"""Whole runs for tests: a listener that keeps what it hears, and what the folder says afterwards."""

import json

from ggml_diffusion.config.toml import load_config
from ggml_diffusion.formats.adapter_file import DiffusionCheckpoint
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
