"""Holes: spans of a text that are to be filled, with text on both sides.

What a hole looks like while it is filled is drawn in training too: a part of its tokens is masked
(corruption.py), the rest has been written already. Scattered masks are nearly all holes of one or two tokens,
and leave little else to learn from.

Deliberately not here: which rows see a hole (standing_rows.py).
Letters: B sequences, T tokens.
"""

import numpy as np
from numpy.typing import NDArray


def keep_holes(
    maskable: NDArray[np.bool_], share: float, longest: int, most: int, generator: np.random.Generator
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Turn some sequences into text with holes: only what is in a hole may be masked.

    Args:
        maskable: (B, T), what may be masked in the whole sequences.
        share: chance of a sequence to have holes.
        longest: tokens of a hole are 1 to so many, each number with equal chance; a hole that reaches the end
            of what may be masked is shorter, and holes may overlap.
        most: holes of a sequence, 1 to so many, each number with equal chance.
        generator: the step's own; B * (2 + 2 * most) numbers are drawn.

    Returns:
        maskable (B, T), and which sequences (B,) have holes; one without maskable tokens has none.

    """
    n_sequences = len(maskable)
    has_holes = (generator.random(n_sequences) < share) & maskable.any(axis=1)
    counts = generator.integers(1, most, n_sequences, endpoint=True)
    lengths = generator.integers(1, longest, (n_sequences, most), endpoint=True)
    starts = generator.random((n_sequences, most))
    result = maskable.copy()
    for row in np.flatnonzero(has_holes):
        places = np.flatnonzero(maskable[row])
        is_hole = np.zeros(maskable.shape[1], dtype=bool)
        for hole in range(counts[row]):
            start = places[int(starts[row, hole] * len(places))]
            is_hole[start : start + lengths[row, hole]] = True
        result[row] &= is_hole
    return result, has_holes
