"""Blocks: their size over a run, where they lie, and that each token is as likely as another to be in one."""

import math

import numpy as np
import pytest

from ggml_diffusion.objective.blocks import block_size_at, keep_one_block


def generator(seed: int = 0) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=[seed, 0]))


def test_blocks_grow_by_a_constant_factor_from_the_initial_to_the_final_size():
    sizes = [block_size_at(step, 4, 4, 64) for step in range(7)]
    assert sizes == [4, 8, 16, 32, 64, 64, 64]


@pytest.mark.parametrize("step", [0, 1, 99])
def test_without_growth_the_final_size_holds_at_once(step):
    assert block_size_at(step, 0, 4, 32) == 32


def test_sizes_never_shrink_and_stay_within_their_ends():
    sizes = [block_size_at(step, 30.5, 3, 50) for step in range(40)]
    assert sizes[0] == 3 and sizes[-1] == 50
    assert sizes == sorted(sizes)


def test_blocks_lie_on_a_grid_and_the_last_one_may_end_behind_the_sequence():
    maskable = np.ones((200, 11), dtype=bool)
    maskable[:, :2] = False  # the grid starts at 2: blocks 2-5, 6-9, 10
    kept, ends = keep_one_block(maskable, 4, generator())
    found = {(tuple(np.flatnonzero(row)), int(end)) for row, end in zip(kept, ends, strict=True)}
    assert found == {((2, 3, 4, 5), 6), ((6, 7, 8, 9), 10), ((10,), 14)}
    assert maskable[:, 2:].all()


def test_every_maskable_token_is_equally_likely_to_be_in_the_block_per_token_of_it():
    """The chance that a block is chosen, by its tokens, is its share of all tokens that may be masked."""
    maskable = np.tile(np.array([0, 1, 1, 0, 1, 1, 1, 1, 0, 0, 1], dtype=bool), (20_000, 1))
    kept, ends = keep_one_block(maskable, 4, generator(1))
    for end, n_tokens in ((5, 3), (9, 3), (13, 1)):
        p = n_tokens / 7
        assert (ends == end).mean() == pytest.approx(p, abs=5 * math.sqrt(p * (1 - p) / 20_000))
        assert (kept[ends == end].sum(axis=1) == n_tokens).all()


def test_the_mean_over_the_chosen_block_estimates_the_mean_over_the_sequence():
    loss = generator(2).random(11)
    maskable = np.tile(np.array([0, 1, 1, 0, 1, 1, 1, 1, 0, 0, 1], dtype=bool), (20_000, 1))
    kept, _ = keep_one_block(maskable, 4, generator(3))
    means = (kept * loss).sum(axis=1) / kept.sum(axis=1)
    expected = loss[maskable[0]].mean()
    assert means.mean() == pytest.approx(expected, abs=5 * means.std() / math.sqrt(20_000))


def test_a_block_as_long_as_the_sequence_is_all_of_it():
    maskable = np.ones((3, 6), dtype=bool)
    maskable[:, 0] = False
    maskable[1, 4:] = False
    kept, ends = keep_one_block(maskable, 6, generator())
    assert np.array_equal(kept, maskable)
    assert (ends >= [6, 4, 6]).all()


def test_a_sequence_with_nothing_to_mask_stays_whole():
    kept, ends = keep_one_block(np.zeros((1, 5), bool), 2, generator())
    assert not kept.any()
    assert ends.tolist() == [5]
