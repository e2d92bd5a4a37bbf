"""The distillation loss of the engine against the oracle: the base, causal and on clean text, as teacher."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import autograd
import autograd.numpy as anp
import numpy as np
import oracle
import pytest
from cases import MASK, lora_adapter, offset_of, packed_batch, random_adapter, relative_errors
from conftest import TinyModel

from ggml_diffusion.engine.cpu.q4_model import Q4Model
from ggml_diffusion.engine.interface import Batch, Compute, Engine, Teacher

OpenEngine = Callable[[Path], AbstractContextManager[Engine]]

# float32 sums of some hundred terms against float64, and bfloat16 products, as in test_gradients.py
TOLERANCE: dict[Compute, float] = {"f32": 1e-4, "fast": 1e-1}
CAUSAL_RATIO = 0.3


def log_probabilities(logits: Any) -> Any:
    """Of every row, the mask token being impossible; its entry stays finite, since autograd meets it."""
    possible = np.arange(logits.shape[1]) != MASK
    top = anp.max(logits, axis=1)
    total = top + anp.log(anp.sum(anp.exp(logits - top[:, None]) * possible, axis=1))
    return logits - total[:, None]


def teacher_distribution(
    model: oracle.OracleModel, batch: oracle.Batch, b: int, rows_back: int
) -> oracle.Array:
    """(T, V) of the base alone for the tokens that the student's rows predict."""
    logits = oracle.batch_logits(
        model, batch.tokens, 1.0, lengths=batch.lengths, document_ids=batch.document_ids
    )[b]
    possible = np.arange(logits.shape[1]) != MASK
    rows = np.maximum(np.arange(len(logits)) - rows_back, 0)
    return np.asarray(np.exp(log_probabilities(logits)) * possible)[rows]


@pytest.fixture(scope="module", params=[0, 1], ids=["the student's row", "the row before"])
def rows_back(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.mark.parametrize("compute", TOLERANCE)
def test_loss_and_gradients_of_a_student_with_a_teacher_are_the_oracles(
    tiny_model: TinyModel, rows_back: int, compute: Compute
) -> None:
    check_student(tiny_model(type="Q8_0"), rows_back, compute)


def check_student(
    path: Path, rows_back: int, compute: Compute, open_engine: OpenEngine | None = None
) -> None:
    """Hold both losses and every gradient of the engine against the oracle's."""
    reference = oracle.load_model(path)
    batch = packed_batch(reference.V, B=3, T=13)
    adapter = random_adapter(reference, rank=4, B=3)
    generator = np.random.default_rng(5)
    clean = generator.integers(10, reference.V, batch.tokens.shape).astype(np.int32)
    assert batch.document_ids is not None
    first = np.diff(batch.document_ids, axis=1, prepend=-1) != 0
    valid = np.arange(batch.tokens.shape[1]) < np.asarray(batch.lengths)[:, None]
    teacher_weights = np.where(
        (first & (rows_back == 1)) | ~valid, 0.0, generator.uniform(0.0, 1.0, batch.tokens.shape)
    ).astype(np.float32)
    teacher_weights[0, 3] = 0.0
    teaching = [teacher_distribution(reference, replace(batch, tokens=clean), b, rows_back) for b in range(3)]

    def distillation(parameters: dict[str, Any]) -> Any:
        total = 0.0
        for b in range(3):
            n = batch.length(b)
            student = replace(adapter, parameters=parameters)
            logits = oracle._logits_of(reference, student, batch, b, CAUSAL_RATIO, None)
            rows = -anp.sum(teaching[b] * log_probabilities(logits), axis=1)
            total = total + anp.sum(teacher_weights[b, :n].astype(np.float64) * rows)
        return total

    def objective(parameters: dict[str, Any]) -> Any:
        own = oracle.loss(reference, replace(adapter, parameters=parameters), batch, CAUSAL_RATIO)
        return own + distillation(parameters)

    expected = autograd.grad(objective)(dict(adapter.parameters))
    gradients = {
        name: np.zeros(value.shape, np.float32)
        for name, value in adapter.parameters.items()
        if name != "embedding_offset"
    }
    opened = open_engine(path) if open_engine else Q4Model.from_gguf(path, 2, compute=compute)
    with opened as model:
        result = model.loss_and_gradients(
            Batch(
                batch.tokens,
                CAUSAL_RATIO,
                lengths=batch.lengths,
                document_ids=batch.document_ids,
                embedding_offset=offset_of(adapter),
                teacher=Teacher(clean, teacher_weights, rows_back),
            ),
            batch.targets,
            batch.weights,
            lora_adapter(adapter),
            gradients,
        )
    assert result.offset_gradient is not None
    # a loss of some ten nats in float32, or with activations rounded to 2^-9
    size = float(distillation(dict(adapter.parameters)))
    assert abs(result.distillation_loss - size) <= {"f32": 1e-5, "fast": 1e-2}[compute] * size
    own = float(oracle.loss(reference, adapter, batch, CAUSAL_RATIO))
    assert abs(result.loss - own) <= {"f32": 1e-5, "fast": 1e-2}[compute] * own
    errors = relative_errors({**gradients, "embedding_offset": result.offset_gradient}, expected)
    assert not {name: error for name, error in errors.items() if not error < TOLERANCE[compute]}


def test_a_teacher_has_no_row_before_a_document(tiny_model: TinyModel) -> None:
    tokens = np.full((1, 4), 20, np.int32)
    weights = np.zeros((1, 4), np.float32)
    weights[0, 0] = 1.0
    with Q4Model.from_gguf(tiny_model(type="Q8_0"), 1) as model:
        model.loss(Batch(tokens, teacher=Teacher(tokens, weights, 0)), tokens, weights)
        with pytest.raises(ValueError, match="first position of a document"):
            model.loss(Batch(tokens, teacher=Teacher(tokens, weights, 1)), tokens, weights)
