"""What the tests of the engine share: random adapters and batches, measures, and a text.

It holds no expected values: those come from oracle.py and llama_reference.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import oracle
from numpy.typing import NDArray

from ggml_diffusion.engine.interface import Batch
from ggml_diffusion.formats.lora import LoraAdapter

FloatArray = NDArray[np.float32]

# Plain English, so that a real model is as certain of its predictions as it ever is: on random tokens it is
# chaotic, and two right implementations drift apart.
TEXT = (
    "The old mill by the river ground corn for the whole village. In winter, when the wheel froze, the "
    "miller sat by the fire and told his children how the river had once carried the bridge away, and how "
    "the people had built it again from the stones of the ruined tower."
)
MASK = 3  # a control token of the tiny models that their tokenizer never emits


def log_softmax(logits: Any) -> oracle.Array:
    """Log-probabilities (T, V) in float64 from logits (T, V)."""
    shifted = np.asarray(logits, np.float64)
    shifted = shifted - shifted.max(axis=1, keepdims=True)
    result: oracle.Array = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def mean_kl(reference: Any, other: Any) -> float:
    """Mean over the rows of KL(reference || other) in nats, from logits (T, V)."""
    p, q = log_softmax(reference), log_softmax(other)
    return float(np.mean(np.sum(np.exp(p) * (p - q), axis=1)))


def relative_error(actual: Any, expected: Any) -> float:
    """|actual - expected| / |expected| in the Euclidean norm; NaN stays NaN."""
    return float(np.linalg.norm(np.asarray(actual, np.float64) - expected) / np.linalg.norm(expected))


def relative_errors(actual: Mapping[str, Any], expected: Mapping[str, oracle.Array]) -> dict[str, float]:
    """The relative error of each tensor of a gradient.

    A tensor whose true gradient is 0 but for float64 rounding (query and key of a lone token, or of tokens
    that are all the same) has no size of its own: there the error is measured against the whole gradient.
    """
    assert actual.keys() == expected.keys()
    whole = float(np.sqrt(sum(np.sum(g * g) for g in expected.values())))
    errors: dict[str, float] = {}
    for name, g in expected.items():
        size = float(np.linalg.norm(g))
        difference = float(np.linalg.norm(np.asarray(actual[name], np.float64) - g))
        errors[name] = difference / (size if size > 1e-12 * whole else whole)
    return errors


def random_adapter(
    model: oracle.OracleModel,
    *,
    rank: int,
    B: int,
    seed: int = 0,
    mask_token_id: int = MASK,
    gain: float = 1.0,
) -> oracle.Adapter:
    """All seven projections adapted, a mask row and an offset a sequence, in float32 values.

    B is not zero: with gain 1 the adapter changes each projection by about half of its own size.
    """
    rng = np.random.default_rng(seed)
    values: dict[str, oracle.Array] = {}
    for name, weight in model.weights.items():
        if weight.ndim == 2 and name.startswith("blk."):
            inputs = weight.shape[1]
            values[name + ".lora_a"] = rng.standard_normal((rank, inputs)) / np.sqrt(inputs)
            values[name + ".lora_b"] = (
                rng.standard_normal((len(weight), rank)) * weight.std() * np.sqrt(inputs)
            )
    size = model.weights["token_embd.weight"].std()
    values["mask_embedding"] = rng.standard_normal(model.C) * size
    values["embedding_offset"] = rng.standard_normal((B, model.C)) * size / 2
    rounded = {name: value.astype(np.float32).astype(np.float64) for name, value in values.items()}
    return oracle.Adapter(rounded, alpha=0.5 * gain * float(np.sqrt(rank)), mask_token_id=mask_token_id)


def lora_adapter(adapter: oracle.Adapter) -> LoraAdapter:
    """The engine's form of it: LoRA pairs and the mask row; the offset is an argument of its own."""
    values = {
        name: np.ascontiguousarray(value, dtype=np.float32) for name, value in adapter.parameters.items()
    }
    return LoraAdapter(
        alpha=adapter.alpha,
        tensors={name: value for name, value in values.items() if ".lora_" in name},
        mask_token_id=adapter.mask_token_id,
        mask_embedding=values.get("mask_embedding"),
    )


def offset_of(adapter: oracle.Adapter) -> FloatArray | None:
    """The embedding offset (B, C) of an adapter, as the engine takes it."""
    offset = adapter.parameters.get("embedding_offset")
    return None if offset is None else np.ascontiguousarray(offset, dtype=np.float32)


def engine_batch(
    batch: oracle.Batch,
    causal_ratio: float,
    adapter: oracle.Adapter = oracle.EMPTY_ADAPTER,
    bernoulli_seed: int | None = None,
) -> Batch:
    """What the engine sees of a batch of the oracle; the adapter gives the embedding offset."""
    return Batch(
        batch.tokens,
        causal_ratio,
        batch.lengths,
        batch.document_ids,
        offset_of(adapter),
        bernoulli_seed,
        attention_sink=batch.attention_sink,
    )


def random_batch(V: int, *, B: int, T: int, seed: int = 0) -> oracle.Batch:
    """Tokens of which 4 in 10 are the mask token, random targets, and random weights of which half are 0."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(10, V, (B, T)).astype(np.int32)
    tokens[rng.random((B, T)) < 0.4] = MASK
    targets = rng.integers(10, V, (B, T)).astype(np.int32)
    weights = np.where(rng.random((B, T)) < 0.5, rng.uniform(0.1, 1.0, (B, T)), 0.0).astype(np.float32)
    return oracle.Batch(tokens, targets, weights)


def packed_batch(V: int, *, B: int, T: int, seed: int = 0) -> oracle.Batch:
    """A random batch of different lengths, the last one token long; every sequence holds three documents."""
    batch = random_batch(V, B=B, T=T, seed=seed)
    lengths = np.linspace(T, 1, B).round().astype(np.int32)
    ids = np.minimum(3 * np.arange(T) // T, 2).astype(np.int32)
    for b, length in enumerate(lengths):
        batch.weights[b, length:] = 0.0
        batch.tokens[b, length:] = 0
    batch.weights[-1, 0] = 0.7
    return oracle.Batch(batch.tokens, batch.targets, batch.weights, lengths, np.tile(ids, (B, 1)))
