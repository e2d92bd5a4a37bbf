"""All randomness: a function of (seed, step, stream).

Nothing has to be saved to resume a run, and two arms of a comparison that ask for the same numbers get them.
Streams tell draws apart that have the same seed and step; a new use takes a new one. Code below the caller
takes a generator and never makes one.

Source: the counter-based generator Philox [Salmon et al. 2011], as NumPy has it: seed and step are the key,
the stream is the highest word of the counter.
"""

from enum import IntEnum

import numpy as np


class Stream(IntEnum):
    """What is drawn. Uses that never share a seed may share a number."""

    TRAINING_STEP = 0  # times, masks, dropout of one optimizer step
    DATA_ORDER = 1  # the order of the sequences; its "step" is the epoch
    START_VALUES = 2
    # Evaluation; the "step" is the mask seed, the share or the length of a span.
    MASKS = 8
    NELBO = 9
    SUBSAMPLE = 10
    HOLES = 11
    CANDIDATES = 12
    BASE_TEXT = 13
    # With a seed of their own.
    DENOISING = 0
    HELD_OUT_SPLIT = 0
    BOOTSTRAP = 0


def generator_of(seed: int, step: int, stream: Stream) -> np.random.Generator:
    """The generator of one draw.

    Args:
        seed: of the run, evaluation or text; 0 to 2^64 - 1.
        step: which of several draws of a stream.
        stream: what is drawn.

    """
    key = np.array([seed, step], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, int(stream)]))
