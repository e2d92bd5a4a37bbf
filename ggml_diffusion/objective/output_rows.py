"""Which output row of the network predicts which token: the one place that knows the shift.

An autoregressive base reads the token at i from its output at i - 1. `prediction = "shifted"` keeps that, so
that with causal ratio 1 and a zero adapter the model is the base; the first token of a document then has no
row that could predict it. `prediction = "aligned"` reads the token at i from its own row.

Deliberately not here: which tokens are masked (corruption.py), the loss (the engine).
Letters: B sequences, T tokens.
"""

from typing import Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

Prediction = Literal["shifted", "aligned"]
Scalar = TypeVar("Scalar", bound=np.generic)


def to_output_rows(
    targets: NDArray[np.int32],
    weights: NDArray[np.float32],
    document_ids: NDArray[np.int32] | None,
    prediction: Prediction,
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Move targets and weights from the token's own position to the output row that predicts it.

    Args:
        targets: (B, T), the clean token of each position.
        weights: (B, T), 0 where the position is not predicted.
        document_ids: (B, T), which document of the sequence a position belongs to; None = one document each.
        prediction: "shifted" or "aligned".

    Returns:
        The same arrays by output row, C-contiguous int32 and float32; a row that predicts nothing has weight
        0.

    Raises:
        ValueError: with "shifted", the first position of a document has a weight.

    """
    if prediction == "aligned":
        return np.ascontiguousarray(targets, np.int32), np.ascontiguousarray(weights, np.float32)
    has_weight = weights != 0.0
    has_no_row = has_weight[:, :1].any()
    if document_ids is not None:
        has_no_row |= (has_weight[:, 1:] & (document_ids[:, 1:] != document_ids[:, :-1])).any()
    if has_no_row:
        raise ValueError(
            "the first position of a document has a weight, but a shifted prediction has no row for it"
        )
    row_targets = np.zeros(targets.shape, dtype=np.int32)
    row_weights = np.zeros(weights.shape, dtype=np.float32)
    row_targets[:, :-1] = targets[:, 1:]
    row_weights[:, :-1] = weights[:, 1:]
    return row_targets, row_weights


def to_positions(rows: NDArray[Scalar], prediction: Prediction) -> NDArray[Scalar]:
    """Move values (B, T) from the output row that predicts a token back to the token's own position.

    A position that no row predicts gets 0.
    """
    if prediction == "aligned":
        return rows
    result = np.zeros_like(rows)
    result[:, 1:] = rows[:, :-1]
    return result


def rows_of_positions(positions: NDArray[np.int64], prediction: Prediction) -> NDArray[np.int64]:
    """The output row that predicts each position, (N,) -> (N,).

    Raises:
        ValueError: with "shifted", position 0.

    """
    if prediction == "aligned":
        return positions
    if len(positions) and positions.min() < 1:
        raise ValueError("a shifted prediction has no row for position 0")
    return positions - 1
