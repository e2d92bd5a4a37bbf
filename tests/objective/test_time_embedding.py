"""The time embedding against the seed's loops in float64, and its gradients against finite differences."""

import math

import numpy as np
import pytest

from ggml_diffusion.formats.tensor_names import TIME_BIAS, TIME_WEIGHT
from ggml_diffusion.objective.time_embedding import TimeEmbedding, parameter_shapes


def table_of_the_seed(dim: int, max_timesteps: int) -> np.ndarray:
    half = dim // 2
    table = np.zeros((max_timesteps, dim))
    for t in range(max_timesteps):
        for i in range(half):
            frequency = math.exp(-math.log(10000.0) / half * i)
            table[t, i] = math.sin(t * frequency)
            table[t, half + i] = math.cos(t * frequency)
    return table


def features_of_the_seed(t: float, table: np.ndarray) -> np.ndarray:
    scaled = t * (len(table) - 1)
    low = math.floor(scaled)
    high = min(low + 1, len(table) - 1)
    return table[low] * (1 - (scaled - low)) + table[high] * (scaled - low)


@pytest.mark.parametrize("dim, max_timesteps", [(2, 1), (4, 7), (256, 1000)])
def test_the_table_is_the_seeds(dim, max_timesteps):
    table = TimeEmbedding(dim, 3, max_timesteps).table_rows(np.arange(max_timesteps))
    assert table.dtype == np.float32
    # Half a unit in the last place of a number up to 1, and the float64 rounding of angles up to 1000.
    assert np.abs(table - table_of_the_seed(dim, max_timesteps)).max() < 6e-8 + 1e-12


@pytest.mark.parametrize("max_timesteps", [1, 2, 1000])
def test_features_are_interpolated_between_the_rows(max_timesteps):
    embedding = TimeEmbedding(8, 3, max_timesteps)
    table = table_of_the_seed(8, max_timesteps)
    t = np.array([0.0, 1e-9, 0.1, 1 / 3, 0.5, 0.999999, 1.0])
    expected = np.stack([features_of_the_seed(time, table) for time in t])
    assert np.abs(embedding.features(t) - expected).max() < 2e-7  # two float32 roundings


def test_features_of_a_row_of_the_table_are_that_row():
    embedding = TimeEmbedding(6, 3, 11)
    assert np.array_equal(
        embedding.features(np.arange(11) / 10)[[0, 5, 10]], embedding.table_rows(np.array([0, 5, 10]))
    )


def test_the_projection_is_an_affine_map_in_float64_up_to_rounding():
    rng = np.random.default_rng(0)
    embedding = TimeEmbedding(64, 40, 1000)
    weight = rng.standard_normal((40, 64)).astype(np.float32)
    bias = rng.standard_normal(40).astype(np.float32)
    t = rng.random(5)
    table = table_of_the_seed(64, 1000)
    expected = np.stack([features_of_the_seed(time, table) @ weight.astype(float).T + bias for time in t])
    out = embedding.forward(t, weight, bias)
    assert out.shape == (5, 40)
    assert out.dtype == np.float32
    # 64 products of order 1, summed in float32.
    assert np.abs(out - expected).max() < 1e-5


def test_it_starts_at_zero_and_yet_learns():
    embedding, shapes = TimeEmbedding(8, 3, 10), parameter_shapes(8, 3)
    assert shapes == {TIME_WEIGHT: (3, 8), TIME_BIAS: (3,)}
    t = np.array([0.2, 0.9])
    zeros = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    assert not embedding.forward(t, zeros[TIME_WEIGHT], zeros[TIME_BIAS]).any()
    d_weight, d_bias = embedding.backward(t, np.ones((2, 3), np.float32))
    assert np.abs(d_weight).max() > 0.1
    assert np.array_equal(d_bias, [2, 2, 2])


def test_gradients_agree_with_finite_differences():
    rng = np.random.default_rng(1)
    embedding, t = TimeEmbedding(10, 4, 50), rng.random(3)
    d_out = rng.standard_normal((3, 4)).astype(np.float32)
    weight, bias = rng.standard_normal((4, 10)), rng.standard_normal(4)
    table = table_of_the_seed(10, 50)
    features = np.stack([features_of_the_seed(time, table) for time in t])

    def loss(weight: np.ndarray, bias: np.ndarray) -> float:
        return float(((features @ weight.T + bias) * d_out).sum())

    def difference(array: np.ndarray, index: tuple[int, ...]) -> float:
        kept, h = array[index], 1e-4
        array[index] = kept + h
        above = loss(weight, bias)
        array[index] = kept - h
        below = loss(weight, bias)
        array[index] = kept
        return (above - below) / (2 * h)

    d_weight, d_bias = embedding.backward(t, d_out)
    assert d_weight.shape == (4, 10) and d_bias.shape == (4,)
    # The loss is linear: the difference is exact but for float64 rounding / h. The gradient is float32.
    for index in np.ndindex(4, 10):
        assert d_weight[index] == pytest.approx(difference(weight, index), abs=2e-6)
    for index in np.ndindex(4):
        assert d_bias[index] == pytest.approx(difference(bias, index), abs=2e-6)


@pytest.mark.parametrize("dim, max_timesteps", [(0, 10), (1, 10), (7, 10), (8, 0)])
def test_sizes_that_make_no_table_are_refused(dim, max_timesteps):
    with pytest.raises(ValueError, match="dim must be even"):
        TimeEmbedding(dim, 3, max_timesteps)


@pytest.mark.parametrize("dim", [2, 6, 64, 256])
def test_a_row_has_the_same_bits_whichever_are_asked_for_with_it(dim):
    """So that a resumed run, with another batch, computes what the whole table would have held."""
    embedding = TimeEmbedding(dim, 3, 1000)
    table = embedding.table_rows(np.arange(1000))
    for rows in (np.arange(0, 1000, 7), np.array([999]), np.array([3, 1, 2])):
        assert np.array_equal(embedding.table_rows(rows), table[rows])


def test_a_long_table_is_computed_for_the_rows_asked_for_alone():
    embedding = TimeEmbedding(256, 64, 1_000_000)
    features = embedding.features(np.linspace(0, 1, 16))
    assert features.shape == (16, 256) and np.isfinite(features).all()
