"""The values that go into an engine: a batch is checked when it is made, and cut into whole sequences."""

from dataclasses import FrozenInstanceError
from typing import Any

import numpy as np
import pytest

from ggml_diffusion.engine.interface import Batch, LossResult, Teacher

B, T, C = 3, 5, 4


def whole() -> Batch:
    tokens = np.arange(B * T, dtype=np.int32).reshape(B, T)
    return Batch(
        tokens,
        0.25,
        np.array([5, 3, 4], np.int32),
        np.array([[0, 0, 1, 1, 1], [0, 1, 1, 1, 1], [2, 2, 2, 2, 2]], np.int32),
        np.arange(B * C, dtype=np.float32).reshape(B, C),
        7,
        Teacher(tokens + 100, np.full((B, T), 0.5, np.float32), 1),
    )


def test_a_part_has_the_arrays_of_its_sequences_and_the_numbers_of_the_whole() -> None:
    batch, part = whole(), whole().part(slice(1, 3))
    assert (part.causal_ratio, part.bernoulli_seed) == (0.25, 7)
    assert batch.embedding_offset is not None and part.embedding_offset is not None
    assert part.teacher is not None and part.teacher.rows_back == 1
    np.testing.assert_array_equal(part.tokens, batch.tokens[1:])
    np.testing.assert_array_equal(part.embedding_offset, batch.embedding_offset[1:])
    np.testing.assert_array_equal(part.teacher.tokens, batch.tokens[1:] + 100)
    np.testing.assert_array_equal(part.valid, batch.valid[1:])
    # first row, rows, sequence, position, length, context: counted within the part
    assert part.segments.tolist() == [[0, 1, 0, 0, 1, 0, 0], [1, 2, 0, 1, 2, 0, 0], [3, 4, 1, 0, 4, 0, 0]]


def test_parts_without_the_optional_arrays_have_none() -> None:
    part = Batch(np.zeros((B, T), np.int32)).part(slice(0, 1))
    assert part.lengths is part.document_ids is part.embedding_offset is part.teacher is None
    assert part.valid.shape == (1, T)


WRONG: dict[str, dict[str, Any]] = {
    "no tokens": {"tokens": np.zeros((2, 0), np.int32)},
    "tokens that are no integers": {"tokens": np.zeros((2, 4))},
    "a length of 0": {"lengths": np.array([0, 4])},
    "documents of another shape": {"document_ids": np.zeros((2, 3), np.int32)},
    "a document in two parts": {"document_ids": np.array([[0, 1, 0, 0]] * 2)},
    "an offset of another batch": {"embedding_offset": np.zeros((3, C), np.float32)},
    "an offset of one dimension": {"embedding_offset": np.zeros(2, np.float32)},
    "a teacher of another shape": {
        "teacher": Teacher(np.zeros((2, 3), np.int32), np.zeros((2, 4), np.float32))
    },
    "a teacher with weights of another shape": {
        "teacher": Teacher(np.zeros((2, 4), np.int32), np.zeros((2, 3), np.float32))
    },
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_what_does_not_fit_together_is_refused_when_the_batch_is_made(change: dict[str, Any]) -> None:
    good: dict[str, Any] = {"tokens": np.zeros((2, 4), np.int32)}
    Batch(**good)
    with pytest.raises(ValueError, match=r"shape|lengths|contiguous"):
        Batch(**{**good, **change})


def test_a_batch_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        whole().causal_ratio = 0.5  # type: ignore[misc]


def test_results_of_parts_are_joined_in_order() -> None:
    parts = [
        LossResult(loss, np.full((1, T), loss, np.float32), np.full((1, T), right), None, loss / 2)
        for loss, right in ((1.0, True), (2.0, False))
    ]
    joined = LossResult.joined(parts)
    assert (joined.loss, joined.distillation_loss, joined.offset_gradient) == (3.0, 1.5, None)
    assert joined.row_loss[:, 0].tolist() == [1.0, 2.0]
    assert joined.row_correct[:, 0].tolist() == [True, False]
