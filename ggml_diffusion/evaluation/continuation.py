"""The base as the autoregressive model that it is: continuations from left to right.

The engine keeps no keys and values, so each new token is a forward pass over all before it; samples that have
said the same so far share one.

Deliberately not here: what the continuations are compared with (infilling.py, fluency.py).
Letters: N prefixes, S samples of each, K new tokens, V vocabulary.
"""

import numpy as np
from numpy.typing import NDArray

from ggml_diffusion.engine.interface import Batch, Engine
from ggml_diffusion.evaluation.scoring import OnTokens, chunks, ignore_tokens
from ggml_diffusion.generation.sampling import draw, log_softmax

_TOKENS_AT_ONCE = 1024


def continue_greedily(
    engine: Engine,
    prefixes: list[NDArray[np.int32]],
    n_new: int,
    never: int | None = None,
    on_tokens: OnTokens = ignore_tokens,
) -> NDArray[np.int32]:
    """The likeliest next token, K times: (N, K)."""
    return _continue(engine, prefixes, n_new, 1, None, never, on_tokens)[:, 0]


def continue_sampled(
    engine: Engine,
    prefixes: list[NDArray[np.int32]],
    n_new: int,
    n_samples: int,
    generator: np.random.Generator,
    never: int | None = None,
    on_tokens: OnTokens = ignore_tokens,
) -> NDArray[np.int32]:
    """Samples (N, S, K) of the base's own distribution, at temperature 1 and not cut.

    Args:
        engine: of the base.
        prefixes: token sequences of at least one token each.
        n_new: K.
        n_samples: S.
        generator: of the draws.
        never: a token that is never drawn: the mask token, which is not text.
        on_tokens: told about progress.

    """
    return _continue(engine, prefixes, n_new, n_samples, generator, never, on_tokens)


def _continue(
    engine: Engine,
    prefixes: list[NDArray[np.int32]],
    n_new: int,
    n_samples: int,
    generator: np.random.Generator | None,
    never: int | None,
    on_tokens: OnTokens,
) -> NDArray[np.int32]:
    written = np.zeros((len(prefixes) * n_samples, n_new), dtype=np.int32)
    owner = np.repeat(np.arange(len(prefixes)), n_samples)
    for step in range(n_new):
        so_far = np.column_stack([owner, written[:, :step]])
        states, state_of = np.unique(so_far, axis=0, return_inverse=True)
        state_of = state_of.reshape(-1)  # NumPy 2.0 gave it another shape
        texts = [np.concatenate([prefixes[state[0]], state[1:]]).astype(np.int32) for state in states]
        for part in _parts(texts):
            log_p = log_softmax(_next_logits(engine, texts[part], never))
            mine = np.flatnonzero((state_of >= part.start) & (state_of < part.stop))
            for rows in chunks(len(mine), 32):  # a row of noise is V numbers
                each = log_p[state_of[mine[rows]] - part.start]
                if generator is None:
                    written[mine[rows], step] = each.argmax(axis=-1)
                else:
                    written[mine[rows], step] = draw(each, generator, temperature=1.0, top_k=0, top_p=1.0)
            on_tokens(sum(len(text) for text in texts[part]))
    return written.reshape(len(prefixes), n_samples, n_new)


def _parts(texts: list[NDArray[np.int32]]) -> list[slice]:
    """Cut a list into slices of about `_TOKENS_AT_ONCE` tokens, at least one text each."""
    longest = max(len(text) for text in texts)
    return chunks(len(texts), max(1, _TOKENS_AT_ONCE // longest))


def _next_logits(engine: Engine, texts: list[NDArray[np.int32]], never: int | None) -> NDArray[np.float32]:
    """Logits (N, V) of the token that follows each text."""
    tokens, lengths = padded(texts)
    is_last = np.arange(tokens.shape[1]) == lengths[:, None] - 1
    logits = engine.logits(Batch(tokens, lengths=lengths), select=is_last)
    if never is not None:
        logits[:, never] = -np.inf
    return logits


def padded(texts: list[NDArray[np.int32]]) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Token sequences as one array (N, T), padded with 0, and their lengths (N,)."""
    lengths = np.array([len(text) for text in texts], dtype=np.int32)
    tokens = np.zeros((len(texts), int(lengths.max())), dtype=np.int32)
    for row, text in zip(tokens, texts, strict=True):
        row[: len(text)] = text
    return tokens, lengths


def continuation_losses(
    engine: Engine,
    texts: list[NDArray[np.int32]],
    starts: list[int],
    batch_size: int,
    on_tokens: OnTokens = ignore_tokens,
) -> NDArray[np.float64]:
    """The base's cross-entropy in nats (N,), summed over each text from position `starts` on (1 or more)."""
    totals = np.zeros(len(texts))
    for part in chunks(len(texts), batch_size):
        tokens, lengths = padded(texts[part])
        column = np.arange(tokens.shape[1])
        predicts = (column >= np.array(starts[part])[:, None] - 1) & (column < lengths[:, None] - 1)
        targets = np.roll(tokens, -1, axis=1)
        result = engine.loss(Batch(tokens, lengths=lengths), targets, predicts.astype(np.float32))
        totals[part] = result.row_loss.sum(axis=1, dtype=np.float64)
        on_tokens(int(lengths.sum()))
    return totals
