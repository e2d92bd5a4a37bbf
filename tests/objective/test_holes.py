"""Holes in place of scattered masks: how many, how long, and where they may be."""

import numpy as np

from ggml_diffusion.objective.blocks import block_groups
from ggml_diffusion.objective.holes import keep_holes
from ggml_diffusion.objective.standing_rows import NOTHING


def runs(kept: np.ndarray) -> list[int]:
    """Lengths of the runs of True in (T,)."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], kept.astype(int), [0]])))
    return (edges[1::2] - edges[::2]).tolist()


def test_a_single_hole_has_every_length_as_often_and_lies_anywhere() -> None:
    maskable = np.ones((20_000, 40), dtype=bool)
    maskable[:, :3] = False
    kept, has_holes = keep_holes(maskable, 1.0, 4, 1, np.random.default_rng(0))
    assert has_holes.all() and not kept[:, :3].any()
    lengths = np.array([runs(row)[0] for row in kept])
    whole = ~kept[:, -1]  # those at the end are cut
    counts = np.bincount(lengths[whole], minlength=5)[1:] / whole.sum()
    # four shares of about 5,000 draws: a standard deviation of .003; the cut ones are long
    assert np.abs(counts - 0.25).max() < 0.03
    starts = np.bincount(kept.argmax(axis=1), minlength=40)[3:] / len(kept)
    assert np.abs(starts - 1 / 37).max() < 0.006  # five standard deviations of .0011


def test_only_a_share_of_the_sequences_has_holes_and_the_others_are_as_they_were() -> None:
    maskable = np.random.default_rng(1).random((4000, 30)) < 0.8
    maskable[0] = False
    kept, has_holes = keep_holes(maskable, 0.25, 5, 3, np.random.default_rng(2))
    assert not has_holes[0]
    assert abs(has_holes.mean() - 0.25) < 0.035  # five standard deviations
    np.testing.assert_array_equal(kept[~has_holes], maskable[~has_holes])
    assert not (kept & ~maskable).any()
    n_kept = kept[has_holes].sum(axis=1)
    assert n_kept.min() >= 1 and n_kept.max() <= 15


def test_blocks_cover_each_document_from_its_first_maskable_token_on() -> None:
    maskable = np.ones((2, 12), dtype=bool)
    maskable[0, [0, 5, 6, 8]] = False  # the second document begins at 5 with two tokens of a prompt
    maskable[1] = False
    maskable[1, 4:9] = True
    documents = np.array([[0] * 5 + [1] * 7, [3] * 12], np.int32)
    groups = block_groups(maskable, np.array([11, 9], np.int32), documents, 3)
    N = NOTHING
    assert groups.tolist() == [[N, 0, 0, 0, 1, N, N, 2, 2, 2, 3, N], [N, N, N, N, 0, 0, 0, 1, 1, N, N, N]]
