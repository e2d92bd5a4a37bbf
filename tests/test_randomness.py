"""Randomness is a function of (seed, step, stream)."""

import numpy as np

from ggml_diffusion.randomness import Stream, generator_of


def test_equal_draws_are_equal_and_every_other_seed_step_or_stream_is_another():
    def numbers(seed, step, stream):
        return tuple(generator_of(seed, step, stream).random(4))

    assert numbers(3, 4, Stream.MASKS) == numbers(3, 4, Stream.MASKS)
    others = {numbers(*key) for key in ((3, 4, stream) for stream in Stream)}
    others |= {numbers(4, 3, Stream.MASKS), numbers(3, 5, Stream.MASKS), numbers(2**63, 4, Stream.MASKS)}
    assert len(others) == len(Stream) + 3


def test_the_generator_is_philox_with_the_stream_in_the_highest_word_of_the_counter():
    # recorded runs depend on these numbers
    bits = np.random.Philox(key=np.array([7, 2], dtype=np.uint64), counter=[0, 0, 0, 9])
    expected = np.random.Generator(bits).random(3)
    np.testing.assert_array_equal(generator_of(7, 2, Stream.NELBO).random(3), expected)
