"""The identity gate: a model that is computed differently than by llama.cpp is refused."""

import shutil

import numpy as np
import pytest
import runs
from runs import run

from ggml_diffusion.engine.cpu.q4_model import Q4Model
from ggml_diffusion.engine.interface import Batch
from ggml_diffusion.errors import UserError
from ggml_diffusion.text.tokenizer import Tokenizer
from ggml_diffusion.training.identity import check_identity, mean_kl_divergence

run_base, settings = runs.run_base, runs.settings  # fixtures


@pytest.mark.parametrize("tokenizer", ["bpe", "spm"])
def test_the_gate_lets_a_right_model_pass_and_says_how_close_it_is(tiny_model, tokenizer):
    path = tiny_model(type="Q4_0", tokenizer=tokenizer)
    with Q4Model.from_gguf(path, 1) as model:
        report = check_identity(model, Tokenizer.from_gguf(path))
    assert 0 <= report.mean_kl < 0.05
    assert report.n_tokens > 24
    assert "passed" in str(report)


class Wrong:
    """An engine that computes something else than the file says."""

    def __init__(self, model):
        self._model = model

    def __getattr__(self, name):
        return getattr(self._model, name)

    def logits(self, batch):
        return self._model.logits(Batch(batch.tokens[:, ::-1], batch.causal_ratio))


def test_the_gate_refuses_a_model_that_is_computed_differently(tiny_model):
    path = tiny_model(type="Q4_0")
    with (
        Q4Model.from_gguf(path, 1) as model,
        pytest.raises(UserError, match="computes the model differently"),
    ):
        check_identity(Wrong(model), Tokenizer.from_gguf(path))


def test_the_gate_names_a_model_that_llama_cpp_cannot_run(tiny_model, tmp_path):
    path = tmp_path / "model.gguf"
    shutil.copy(tiny_model(type="Q4_0"), path)
    tokenizer = Tokenizer.from_gguf(path)
    with Q4Model.from_gguf(path, 1) as model:
        path.rename(tmp_path / "elsewhere.gguf")
        with pytest.raises(UserError, match="cannot run this model"):
            check_identity(model, tokenizer)


def test_a_run_with_the_gate_reports_it_in_a_line(settings):
    _, recorder = run(settings)
    assert sum("identity gate passed" in note for note in recorder.notes) == 1


def test_mean_kl_of_the_gate_is_the_definition():
    rng = np.random.default_rng(0)
    p, q = rng.normal(size=(2, 5, 7)).astype(np.float32)
    expected = []
    for a, b in zip(p, q, strict=True):
        pa, pb = np.exp(a) / np.exp(a).sum(), np.exp(b) / np.exp(b).sum()
        expected.append((pa * np.log(pa / pb)).sum())
    assert mean_kl_divergence(p, q) == pytest.approx(np.mean(expected), rel=1e-5)
    assert mean_kl_divergence(p, p) == 0.0
    assert np.isnan(mean_kl_divergence(p, np.full_like(q, np.nan)))
