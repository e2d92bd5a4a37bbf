"""The shift between a token and the output row that predicts it."""

import numpy as np
import pytest

from ggml_diffusion.objective.output_rows import rows_of_positions, to_output_rows, to_positions

TARGETS = np.array([[10, 11, 12, 13], [20, 21, 22, 23]], dtype=np.int32)
WEIGHTS = np.array([[0, 0.5, 0, 0.25], [0, 0, 1, 0]], dtype=np.float32)


def test_aligned_reads_each_token_from_its_own_row():
    targets, weights = to_output_rows(TARGETS, WEIGHTS, None, "aligned")
    assert (targets == TARGETS).all()
    assert (weights == WEIGHTS).all()


def test_shifted_reads_each_token_from_the_row_before_it():
    targets, weights = to_output_rows(TARGETS, WEIGHTS, None, "shifted")
    for b, i in zip(*np.nonzero(WEIGHTS), strict=True):
        assert targets[b, i - 1] == TARGETS[b, i]
        assert weights[b, i - 1] == WEIGHTS[b, i]
    assert np.count_nonzero(weights) == np.count_nonzero(WEIGHTS)
    assert (weights[:, -1] == 0).all()


@pytest.mark.parametrize("prediction", ["shifted", "aligned"])
def test_the_engine_gets_contiguous_arrays_of_its_types(prediction):
    targets, weights = to_output_rows(TARGETS[:, ::-1].astype(np.int64), np.zeros((2, 4)), None, prediction)
    assert targets.dtype == np.int32
    assert weights.dtype == np.float32
    assert targets.flags.c_contiguous
    assert weights.flags.c_contiguous


@pytest.mark.parametrize("place", [(0, 0), (1, 2)])
def test_a_weight_on_the_first_token_of_a_document_is_refused_under_shifted(place):
    documents = np.array([[0, 0, 0, 0], [0, 0, 1, 1]], dtype=np.int32)
    weights = np.zeros((2, 4), dtype=np.float32)
    weights[place] = 1.0
    with pytest.raises(ValueError, match="first position of a document"):
        to_output_rows(TARGETS, weights, documents, "shifted")
    to_output_rows(TARGETS, weights, documents, "aligned")


def test_rows_of_positions():
    assert rows_of_positions(np.array([1, 5]), "shifted").tolist() == [0, 4]
    assert rows_of_positions(np.array([0, 5]), "aligned").tolist() == [0, 5]
    assert rows_of_positions(np.array([], dtype=np.int64), "shifted").tolist() == []
    with pytest.raises(ValueError, match="position 0"):
        rows_of_positions(np.array([0]), "shifted")


@pytest.mark.parametrize("prediction", ["shifted", "aligned"])
def test_what_rows_say_goes_back_to_the_positions_that_they_predict(prediction):
    targets = np.arange(1, 9, dtype=np.int32).reshape(2, 4)
    weights = np.array([[0, 1, 1, 1], [0, 0, 1, 0]], np.float32)
    row_targets, row_weights = to_output_rows(targets, weights, None, prediction)
    np.testing.assert_array_equal(to_positions(row_weights, prediction), weights)
    has_weight = weights != 0
    np.testing.assert_array_equal(to_positions(row_targets, prediction)[has_weight], targets[has_weight])
