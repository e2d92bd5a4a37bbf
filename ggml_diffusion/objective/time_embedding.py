"""The time embedding: tells the network how noisy its input is, by a vector added to every input embedding.

A sinusoidal table over `max_timesteps` discrete times, interpolated for a continuous t, then a linear
projection to the hidden size. Weight and bias of the projection start at zero, so that the embedding leaves
the base as it is at step 0.

Deliberately not here: the projection's parameters, which the trainer holds with all the others, and d loss /
d input embedding, which the engine sums over each sequence.
Source: the seed document's TimeEmbedding; sinusoids as in "Attention is all you need" [arXiv:1706.03762].
Letters: B sequences, C hidden size.
"""

import math

import numpy as np
from numpy.typing import NDArray

from ggml_diffusion.formats.tensor_names import TIME_BIAS, TIME_WEIGHT


def parameter_shapes(dim: int, hidden_dim: int) -> dict[str, tuple[int, ...]]:
    """Name and shape of what is trained; all of it starts at zero."""
    return {TIME_WEIGHT: (hidden_dim, dim), TIME_BIAS: (hidden_dim,)}


class TimeEmbedding:
    """Sinusoidal features of the diffusion time and their projection.

    Attributes:
        dim: number of features, even.
        hidden_dim: C.
        max_timesteps: rows of the table; t = 0 is its first, t = 1 its last.

    """

    def __init__(self, dim: int, hidden_dim: int, max_timesteps: int) -> None:
        if dim < 2 or dim % 2 != 0 or max_timesteps < 1:
            raise ValueError(
                f"dim must be even and at least 2, max_timesteps at least 1, not {dim} and {max_timesteps}"
            )
        self.dim = dim
        self.hidden_dim = hidden_dim
        self.max_timesteps = max_timesteps
        half = dim // 2
        self._frequencies = np.exp(np.arange(half) * (-math.log(10000.0) / half))

    def table_rows(self, rows: NDArray[np.int64]) -> NDArray[np.float32]:
        """Rows (n,) of the table, each in [0, max_timesteps): (n, dim), sines of rising wavelength, then
        their cosines.

        Computed for those asked for alone: a table may be long.
        """
        angles = rows[:, None] * self._frequencies
        return np.concatenate([np.sin(angles), np.cos(angles)], axis=1).astype(np.float32)

    def features(self, t: NDArray[np.floating]) -> NDArray[np.float32]:
        """Rows of the table for times (B,) in [0, 1], linearly interpolated: (B, dim) float32."""
        position = np.asarray(t, dtype=np.float64) * (self.max_timesteps - 1)
        low = position.astype(np.int64)
        high = np.minimum(low + 1, self.max_timesteps - 1)
        share_high = (position - low)[:, None]
        between = self.table_rows(low) * (1.0 - share_high) + self.table_rows(high) * share_high
        return between.astype(np.float32)

    # The sums go through einsum, not @: BLAS may add in another order with another number of threads.

    def forward(
        self, t: NDArray[np.floating], weight: NDArray[np.float32], bias: NDArray[np.float32]
    ) -> NDArray[np.float32]:
        """features(t) W^T + b.

        Args:
            t: (B,) in [0, 1].
            weight: (C, dim).
            bias: (C,).

        Returns:
            (B, C) float32, to be added to every input embedding of the sequence.

        """
        return np.asarray(np.einsum("bd,cd->bc", self.features(t), weight) + bias, dtype=np.float32)

    def backward(
        self, t: NDArray[np.floating], d_out: NDArray[np.float32]
    ) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        """Gradients of the projection: d_out^T features(t), and d_out summed over the sequences.

        Args:
            t: (B,), as in `forward`.
            d_out: (B, C), d loss / d forward's result.

        Returns:
            d_weight (C, dim) and d_bias (C,), float32.

        """
        d_weight = np.einsum("bc,bd->cd", d_out, self.features(t))
        return np.asarray(d_weight, dtype=np.float32), np.asarray(d_out.sum(axis=0), dtype=np.float32)
