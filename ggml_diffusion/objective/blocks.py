"""Block diffusion: a sequence as clean text, one noisy block, and nothing behind it.

The block is what a model writes at a time when it goes from left to right in blocks: it sees all that is
finished, and its own block, and no masks that are still to come. Training takes one block of each sequence;
the text after it is cut off, so that it costs nothing. Blocks lie on a grid that starts at the sequence's
first token that may be masked, as they do in generation, where it starts at the first hole. A block as long
as the sequence is the whole of it: that is plain masked diffusion.

Deliberately not here: the masks inside of the block (corruption.py), the loop that writes block by block
(generation/denoise.py).
Sources: BD3-LM [Arriola et al. 2025, arXiv:2503.09573], one block at a time instead of all under one mask of
twice the length; block sizes that grow during a conversion, LLaDA2.0 [Bie et al.
2025].
Letters: B sequences, T tokens.
"""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ggml_diffusion.objective.standing_rows import NOTHING


def block_size_at(step: int, growth_steps: float, initial_size: int, final_size: int) -> int:
    """The block size of optimizer step `step`, counted from 0, in tokens.

    It grows from the initial to the final size by the same factor each step, because 1 to 2 tokens is as
    much of a change as 32 to 64, and is the final one from `growth_steps` on.
    """
    if step >= growth_steps:
        return final_size
    growth: float = (final_size / initial_size) ** (step / growth_steps)
    return round(initial_size * growth)


def keep_one_block(
    maskable: NDArray[np.bool_], block_size: int, generator: np.random.Generator
) -> tuple[NDArray[np.bool_], NDArray[np.int32]]:
    """Choose a block of each sequence; what lies behind it is to be cut off.

    A block's chance is its share of the sequence's maskable tokens: each token is then equally likely to be
    in the noisy block, and the mean over a block's tokens estimates the mean over the sequence's.

    Args:
        maskable: (B, T), what may be masked in the whole sequences.
        block_size: tokens; a sequence's last block may hold fewer.
        generator: the step's own; B numbers are drawn.

    Returns:
        maskable (B, T), False outside of the block, and the block's end (B,) int32, which may lie behind the
        sequence. A sequence without maskable tokens stays whole.

    """
    result, ends = np.zeros_like(maskable), np.full(len(maskable), maskable.shape[1], dtype=np.int32)
    for row, share in enumerate(generator.random(len(maskable))):
        places = np.flatnonzero(maskable[row])
        if len(places) == 0:
            continue
        first, chosen = places[0], places[int(share * len(places))]
        start = chosen - (chosen - first) % block_size
        ends[row] = start + block_size
        result[row, start : ends[row]] = maskable[row, start : ends[row]]
    return result, ends


def block_groups(
    maskable: NDArray[np.bool_],
    lengths: NDArray[np.int32],
    document_ids: NDArray[np.int32],
    block_size: int,
) -> NDArray[np.int32]:
    """The number of the block that each token (B, T) is in, all blocks of a sequence at once.

    They lie on the same grid, one in each document, from its first token that may be masked to its end;
    `NOTHING` = -1 elsewhere. Numbers rise along a sequence.
    """
    result = np.full(maskable.shape, NOTHING, dtype=np.int32)
    for row, length in enumerate(lengths):
        n_blocks = 0
        ids = document_ids[row, :length]
        for start, end in pairwise([*np.flatnonzero(np.diff(ids, prepend=ids[:1] - 1)), length]):
            places = np.flatnonzero(maskable[row, start:end])
            if len(places):
                first = start + places[0]
                result[row, first:end] = n_blocks + np.arange(end - first) // block_size
                n_blocks = int(result[row, end - 1]) + 1
    return result
