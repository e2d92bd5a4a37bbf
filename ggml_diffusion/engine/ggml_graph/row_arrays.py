"""A batch as arrays of whole sequences: positions, and how much each query sees of each key.

The core works on rows without padding and on segments; a graph has one shape, so that here sequences keep
their padding and documents are told apart by the mask. Padding sees itself only and is seen by nobody.
Pure NumPy, and deliberately the definitions word for word (docs/objective.md).
Letters: B sequences, T tokens a sequence.
"""

import numpy as np
from numpy.typing import NDArray

from ggml_diffusion.engine.interface import Batch

_GOLDEN, _FIRST, _SECOND = (
    np.uint64(0x9E3779B97F4A7C15),
    np.uint64(0xBF58476D1CE4E5B9),
    np.uint64(0x94D049BB133111EB),
)


def place_in_document(batch: Batch) -> NDArray[np.int32]:
    """Each token's position in its document, (B, T), 0 at padding."""
    places = np.zeros(batch.tokens.shape, dtype=np.int32)
    for _, n_rows, sequence, first, *_ in batch.segments:
        places[sequence, first : first + n_rows] = np.arange(n_rows)
    return places


def document_lengths(batch: Batch) -> NDArray[np.int32]:
    """The length of each token's document, (B, T), 0 at padding."""
    lengths = np.zeros(batch.tokens.shape, dtype=np.int32)
    for _, n_rows, sequence, first, *_ in batch.segments:
        lengths[sequence, first : first + n_rows] = n_rows
    return lengths


def sees_everything(batch: Batch) -> bool:
    """Whether each sequence is one document without padding, so that all have the same mask."""
    return bool((document_lengths(batch) == batch.tokens.shape[1]).all())


def log_visibility(batch: Batch, window: int = 0) -> NDArray[np.float32]:
    """What is added to scores, (B or 1, T, T) query by key: log of the key's weight, -inf if it is not seen.

    Args:
        batch: see `Batch`.
        window: keys at a distance of so much or more are not seen; 0 = no window.

    """
    n_tokens = batch.tokens.shape[1]
    places = np.arange(n_tokens)
    future = places[None, :] > places[:, None]
    scores = np.where(future, _future(batch, n_tokens), np.float32(0.0))
    if window > 0:
        scores[np.abs(places[None, :] - places[:, None]) >= window] = -np.inf
    if sees_everything(batch):
        if batch.attention_sink:
            scores[0, 1:] = -np.inf
        return scores[None]
    documents = np.full(batch.tokens.shape, -1)
    for number, (_, n_rows, sequence, first, *_) in enumerate(batch.segments):
        documents[sequence, first : first + n_rows] = number
    same = (documents[:, :, None] == documents[:, None, :]) & (documents >= 0)[:, :, None]
    shown = np.where(same, scores[None], np.float32(-np.inf))
    if batch.attention_sink:
        shown[place_in_document(batch) == 0] = -np.inf  # padding too, which sees itself only
    shown[:, places, places] = 0.0
    return shown


def _future(batch: Batch, n_tokens: int) -> NDArray[np.float32] | np.float32:
    """The log of the weight of a future key: one number, or the Bernoulli pattern's (T, T)."""
    share = np.float32(1.0) - np.float32(batch.causal_ratio)
    if batch.bernoulli_seed is None:
        with np.errstate(divide="ignore"):
            return np.float32(np.log(share))
    shown = _uniform(batch.bernoulli_seed, n_tokens) < share
    return np.where(shown, np.float32(0.0), np.float32(-np.inf))


def _uniform(seed: int, n_tokens: int) -> NDArray[np.float32]:
    """Uniform in [0, 1) from (seed, query, key): the core's `pattern`, splitmix64's finaliser."""
    places = np.arange(n_tokens, dtype=np.uint64)
    x = np.uint64(seed % 2**64) + _GOLDEN * (
        (places[:, None] << np.uint64(32) | places[None, :]) + np.uint64(1)
    )
    x = (x ^ (x >> np.uint64(30))) * _FIRST
    x = (x ^ (x >> np.uint64(27))) * _SECOND
    x = x ^ (x >> np.uint64(31))
    return ((x >> np.uint64(40)).astype(np.float64) / 2**24).astype(np.float32)
