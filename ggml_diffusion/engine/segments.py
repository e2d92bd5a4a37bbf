"""Padded batches as rows and segments: which positions count, and which attend to each other.

Pure NumPy, for the engine; deliberately knows nothing of the core. Letters: B sequences, T tokens.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ggml_diffusion.errors import UserError


def token_array(tokens: ArrayLike) -> NDArray[np.integer[Any]]:
    """Tokens as a non-empty (B, T) array of integers.

    Raises:
        ValueError: another shape or type.
        UserError: an id that no vocabulary holds.

    """
    ids = np.asarray(tokens)
    if ids.ndim != 2 or ids.size == 0 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(
            f"tokens must be a (B, T) array of integers, not {ids.dtype} of the shape {ids.shape}"
        )
    if ids.max() >= 2**31 or ids.min() < -(2**31):
        raise UserError(f"token id {int(np.abs(ids).max())} is outside the vocabulary")
    return ids


def valid_positions(shape: tuple[int, ...], lengths: ArrayLike | None) -> NDArray[np.bool_]:
    """Which positions of a (B, T) batch are not padding, (B, T) bool, from lengths (B,); None = all."""
    n_sequences, n_tokens = shape
    if lengths is None:
        return np.ones(shape, dtype=bool)
    counts = np.asarray(lengths)
    if counts.shape != (n_sequences,) or counts.min() < 1 or counts.max() > n_tokens:
        raise ValueError(f"lengths must be ({n_sequences},) numbers between 1 and {n_tokens}")
    return np.asarray(np.arange(n_tokens)[None, :] < counts[:, None])


def document_array(shape: tuple[int, ...], document_ids: ArrayLike | None) -> NDArray[np.int32]:
    """Document numbers (B, T) int32, one document a sequence where none are given."""
    if document_ids is None:
        return np.zeros(shape, dtype=np.int32)
    documents = np.asarray(document_ids, dtype=np.int32)
    if documents.shape != shape:
        raise ValueError(f"document_ids has the shape {documents.shape}, not {shape}")
    return documents


def find_segments(
    valid: NDArray[np.bool_],
    documents: NDArray[np.int32],
    positions: NDArray[np.int32] | None = None,
    n_positions: int | None = None,
) -> NDArray[np.int32]:
    """Runs of one document in the rows of a batch without its padding.

    Args:
        valid: (B, T).
        documents: (B, T).
        positions: (B, T), of each row in its text; None = counted from the first of its run.
        n_positions: length of that text; None = up to the run's last row.

    Returns:
        (n, 7) int32, the fields of the core's ggd_segment: first row, number of rows, sequence, position of
        the first row in its sequence, length of the text, and the rows of a context that it sees, none here.

    Raises:
        ValueError: a document appears twice in a sequence, with another one between.

    """
    segments = []
    row = 0
    for sequence, n_tokens in enumerate(valid.sum(axis=1)):
        ids = documents[sequence, :n_tokens]
        starts = np.flatnonzero(np.diff(ids, prepend=ids[0] - 1))
        if len(np.unique(ids)) != len(starts):
            raise ValueError(f"the documents of sequence {sequence} are not contiguous")
        for start, end in zip(starts, [*starts[1:], n_tokens], strict=True):
            length = end - start if positions is None else positions[sequence, end - 1] + 1
            first = start if positions is None else 0
            segments.append((row + start, end - start, sequence, first, n_positions or length, 0, 0))
        row += n_tokens
    return np.array(segments, dtype=np.int32)


def rows_before(segments: NDArray[np.int32], n: int, needed: NDArray[np.bool_]) -> NDArray[np.int32]:
    """For each row the one `n` before it in its segment, itself where there is none; (M,) int32.

    Raises:
        ValueError: a row that has none, but is needed (M,).

    """
    rows = np.arange(len(needed), dtype=np.int32)
    first_rows = np.repeat(segments[:, 0], segments[:, 1])
    has_none = rows - n < first_rows
    if (has_none & needed).any():
        raise ValueError("the first position of a document has a weight, but its teacher has no row for it")
    return np.where(has_none, rows, rows - np.int32(n)).astype(np.int32)
