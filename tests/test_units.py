"""Numbers for people."""

import pytest

from ggml_diffusion.units import duration, in_bytes


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (10 * 1024 - 1, "10239 bytes"),
        (64 << 10, "64 KiB"),
        (1200 << 20, "1200 MiB"),
        (10 << 30, "10 GiB"),
        (10**30, "867361737988 EiB"),
    ],
)
def test_bytes_are_told_in_the_largest_unit_of_which_there_are_ten(count, text):
    assert in_bytes(count) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (61, "1:01"), (3600, "1:00:00"), (90061, "25:01:01")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
