"""The oracle: the whole network in float64 NumPy, differentiated by the `autograd` package.

It knows nothing of the engine: it reads the GGUF with gguf-py, unpacks the weights, takes one sequence at a
time, keeps every score and every logit, and follows the definitions word for word. Slow, short and right;
`test_oracle.py` and `test_oracle_architectures.py` hold it against llama.cpp and against finite differences.
It knows no architecture either: what a file's architecture means is written down by oracle_model.py.

Sources: docs/objective.md for the fractional mask, windows, LoRA, the time embedding and AdamW; llama.cpp
`src/models/*.cpp` and `src/llama-graph.cpp` for the network.

Letters: B sequences, T tokens, C hidden size, H query heads, G key/value heads, D head size, F feed-forward
size, V vocabulary, R LoRA rank, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import autograd
import autograd.numpy as anp
import numpy as np
from numpy.typing import NDArray
from oracle_model import Array, Layer, OracleModel, Rope
from oracle_model import load_model as load_model

Parameters = Mapping[str, Any]  # GGUF names; float64 arrays, or autograd's boxes of them


# -- the mask -----------------------------------------------------------------------------------


def bernoulli_uniform(seed: int, i: int, j: int) -> float:
    """The number in [0, 1) that decides whether query i sees future key j: 24 bits of splitmix64."""
    x = (seed + 0x9E3779B97F4A7C15 * ((i << 32 | j) + 1)) % 2**64
    x ^= x >> 30
    x = x * 0xBF58476D1CE4E5B9 % 2**64
    x ^= x >> 27
    x = x * 0x94D049BB133111EB % 2**64
    x ^= x >> 31
    return (x >> 40) / 2**24


def mask_weights(
    T: int,
    causal_ratio: float,
    document_ids: NDArray[Any] | None = None,
    bernoulli_seed: int | None = None,
    attention_sink: bool = False,
) -> Array:
    """Factors w (T, T) of the exponentials of the scores, query by key, before a row is normalised.

    attention_sink: the first token of a document sees itself alone.
    """
    positions = document_positions(T, document_ids)
    a = 1.0 - causal_ratio
    w = np.ones((T, T))
    for i in range(T):
        for j in range(T):
            if j > i:
                visible = bernoulli_seed is None or bernoulli_uniform(bernoulli_seed, i, j) < a
                w[i, j] = (a if bernoulli_seed is None else 1.0) if visible else 0.0
                if attention_sink and positions[i] == 0:
                    w[i, j] = 0.0
            if document_ids is not None and document_ids[i] != document_ids[j]:
                w[i, j] = 0.0
    return w


def document_positions(T: int, document_ids: NDArray[Any] | None = None) -> NDArray[np.int64]:
    """The position (T,) of each token, counted from the first of its document."""
    if document_ids is None:
        return np.arange(T)
    return np.arange(T) - [np.argmax(document_ids == one) for one in document_ids]


# -- the network --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Adapter:
    """What is trained.

    parameters: LoRA pairs by GGUF name, `mask_embedding` (C,), and `embedding_offset` (B, C) or, in its
    place, `time_embedding.weight` (C, dim) and `time_embedding.bias` (C,).
    rows: (T, 1) factors of the LoRA deltas: 0 on rows that the adapter does not act on.
    """

    parameters: Parameters
    alpha: float = 1.0
    mask_token_id: int | None = None
    rows: Any = 1.0


EMPTY_ADAPTER = Adapter({})


def _rms_norm(x: Any, weight: Array, eps: float) -> Any:
    return x / anp.sqrt(anp.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def _rope(x: Any, rope: Rope, pairs: bool, positions: NDArray[Any]) -> Any:
    """Turn x (T, heads, D): neighbours (2k, 2k + 1), or halves (k, k + n), of its first 2 n entries."""
    n = len(rope.frequencies)
    angles = positions[:, None, None] * rope.frequencies  # (T, 1, n)
    cos, sin = rope.magnitude * np.cos(angles), rope.magnitude * np.sin(angles)
    first, second = (
        (x[..., 0 : 2 * n : 2], x[..., 1 : 2 * n : 2]) if pairs else (x[..., :n], x[..., n : 2 * n])
    )
    turned = [first * cos - second * sin, first * sin + second * cos]
    whole = (
        anp.stack(turned, axis=-1).reshape((*x.shape[:2], 2 * n)) if pairs else anp.concatenate(turned, -1)
    )
    return anp.concatenate([whole, x[..., 2 * n :]], axis=-1)


def _softmax(scores: Any) -> Any:
    exponentials = anp.exp(scores - anp.max(scores, axis=-1, keepdims=True))
    return exponentials / anp.sum(exponentials, axis=-1, keepdims=True)


def _soft_cap(x: Any, cap: float | None) -> Any:
    return x if cap is None else cap * anp.tanh(x / cap)


def _gelu(x: Any) -> Any:
    return 0.5 * x * (1.0 + anp.tanh(np.sqrt(2.0 / np.pi) * x * (1.0 + 0.044715 * x * x)))


def _silu(x: Any) -> Any:
    return x / (1.0 + anp.exp(-x))


@dataclass(frozen=True)
class _Block:
    """A layer's own weights under their short names, with the adapter's pairs for them."""

    model: OracleModel
    adapter: Adapter
    layer: int

    def norm(self, name: str, x: Any) -> Any:
        """RMSNorm over pieces as long as the weight (C, or a head's D); a missing norm is the identity."""
        weight = self.model.weights.get(f"blk.{self.layer}.{name}.weight")
        if weight is None:
            return x
        return _rms_norm(x.reshape((len(x), -1, len(weight))), weight, self.model.eps).reshape(x.shape)

    def linear(self, name: str, x: Any) -> Any:
        """W x + bias + (alpha / R) B (A x) for every row of x (T, in)."""
        full = f"blk.{self.layer}.{name}"
        y = anp.dot(x, self.model.weights[full + ".weight"].T) + self.model.weights.get(full + ".bias", 0.0)
        if full + ".weight.lora_a" in self.adapter.parameters:
            a, b = (self.adapter.parameters[f"{full}.weight.lora_{one}"] for one in "ab")
            y = y + self.adapter.rows * (self.adapter.alpha / a.shape[0] * anp.dot(anp.dot(x, a.T), b.T))
        return y


def _attention(
    model: OracleModel, layer: Layer, q: Any, k: Any, v: Any, log_w: Array, at: NDArray[Any]
) -> Any:
    """Mix values: q (T, H * D), k and v (T, G * D) before RoPE, log_w (T, T), positions at (T,)."""
    T = q.shape[0]
    q, k, v = (x.reshape((T, heads, model.D)) for x, heads in ((q, model.H), (k, model.G), (v, model.G)))
    if layer.rope is not None:
        q, k = (_rope(x, layer.rope, model.rope_pairs, at) for x in (q, k))
    if model.temperature is not None:
        scale, length = model.temperature
        q = q * (1.0 + scale * np.log(at // length + 1.0))[:, None, None]
    if layer.window is not None:
        distance = np.abs(at[:, None] - at)
        log_w = np.where(distance < layer.window, log_w, -np.inf)
    outputs = []
    for head in range(model.H):
        group = head * model.G // model.H
        scores = _soft_cap(anp.dot(q[:, head], k[:, group].T) * model.attention_scale, model.attention_cap)
        outputs.append(anp.dot(_softmax(scores + log_w), v[:, group]))
    return anp.concatenate(outputs, axis=1)


def embeddings(model: OracleModel, adapter: Adapter, tokens: NDArray[Any], offset: Any = 0.0) -> Any:
    """The network's input (T, C): token rows, the trained row on mask tokens, one offset (C,) on all.

    Before the architecture's embedding scale, which is a part of the network.
    """
    x = model.weights["token_embd.weight"][tokens]
    if "mask_embedding" in adapter.parameters:
        is_mask = (tokens == adapter.mask_token_id)[:, None].astype(np.float64)
        x = x + is_mask * adapter.parameters["mask_embedding"]
    return x + offset


def sequence_logits(
    model: OracleModel, adapter: Adapter, x: Any, w: Array, positions: NDArray[Any] | None = None
) -> Any:
    """Raw logits (T, V) of one sequence from its input embeddings x (T, C) and its mask weights w (T, T).

    positions (T,): of each token in its document, 0, 1, 2... if None.
    """
    with np.errstate(divide="ignore"):
        log_w = np.log(w)
    at = np.arange(len(x)) if positions is None else positions
    x = x * model.embedding_scale
    for number, layer in enumerate(model.layers):
        block = _Block(model, adapter, number)
        h = block.norm("attn_norm", x)
        q, k = (block.norm(f"attn_{one}_norm", block.linear(f"attn_{one}", h)) for one in "qk")
        mixed = block.linear(
            "attn_output", _attention(model, layer, q, k, block.linear("attn_v", h), log_w, at)
        )
        x = x + model.residual_scale * block.norm("post_attention_norm", mixed)
        h = block.norm("ffn_norm", x)
        gate = (_gelu if model.gelu else _silu)(block.linear("ffn_gate", h))
        h = block.linear("ffn_down", gate * block.linear("ffn_up", h))
        x = x + model.residual_scale * block.norm("post_ffw_norm", h)
    h = _rms_norm(x, model.weights["output_norm.weight"], model.eps)
    logits = anp.dot(h, model.head.T) * model.logit_scale + model.weights.get("output.bias", 0.0)
    return _soft_cap(logits, model.logit_cap)


# -- batches, loss, gradients -------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Noisy tokens (B, T), and targets and weights (B, T) of the output row that predicts.

    lengths (B,): the rest is padding. document_ids (B, T): attention stays within equal ones.
    time_features (B, dim): the input of the time projection.
    attention_sink: the first token of a document sees itself alone.
    """

    tokens: NDArray[np.int32]
    targets: NDArray[np.int32]
    weights: NDArray[np.float32]
    lengths: NDArray[np.int32] | None = None
    document_ids: NDArray[np.int32] | None = None
    time_features: Array | None = None
    attention_sink: bool = False

    def length(self, b: int) -> int:
        return int(self.tokens.shape[1] if self.lengths is None else self.lengths[b])


@dataclass(frozen=True)
class Result:
    loss: float
    row_loss: Array  # (B, T) cross-entropy in nats where the weight is not 0, else 0
    row_correct: NDArray[np.bool_]  # (B, T)
    gradients: dict[str, Array]


def batch_logits(
    model: OracleModel,
    tokens: NDArray[Any],
    causal_ratio: float = 1.0,
    adapter: Adapter = EMPTY_ADAPTER,
    *,
    lengths: NDArray[Any] | None = None,
    document_ids: NDArray[Any] | None = None,
    bernoulli_seed: int | None = None,
) -> list[Array]:
    """Raw logits (length, V) of each sequence."""
    unused = np.zeros(tokens.shape, np.float32)
    batch = Batch(tokens, tokens, unused, lengths, document_ids)
    return [_logits_of(model, adapter, batch, b, causal_ratio, bernoulli_seed) for b in range(len(tokens))]


def _logits_of(
    model: OracleModel,
    adapter: Adapter,
    batch: Batch,
    b: int,
    causal_ratio: float,
    bernoulli_seed: int | None,
) -> Any:
    n, parameters = batch.length(b), adapter.parameters
    offset = parameters["embedding_offset"][b] if "embedding_offset" in parameters else 0.0
    if batch.time_features is not None and "time_embedding.weight" in parameters:
        offset = anp.dot(parameters["time_embedding.weight"], batch.time_features[b])
        offset = offset + parameters["time_embedding.bias"]
    documents = None if batch.document_ids is None else batch.document_ids[b, :n]
    w = mask_weights(n, causal_ratio, documents, bernoulli_seed, batch.attention_sink)
    x = embeddings(model, adapter, batch.tokens[b, :n], offset)
    return sequence_logits(model, adapter, x, w, document_positions(n, documents))


def row_losses(logits: Any, targets: NDArray[Any], mask_token_id: int | None) -> Any:
    """Cross-entropy (T,) of every row, the mask token being impossible."""
    if mask_token_id is not None:
        impossible = np.zeros(logits.shape[1])
        impossible[mask_token_id] = -np.inf
        logits = logits + impossible
    top = anp.max(logits, axis=1)
    total = top + anp.log(anp.sum(anp.exp(logits - top[:, None]), axis=1))
    return total - logits[np.arange(len(targets)), targets]


def loss(
    model: OracleModel, adapter: Adapter, batch: Batch, causal_ratio: float, bernoulli_seed: int | None = None
) -> Any:
    """Sum over the rows of weight * cross-entropy, in nats, not normalised."""
    total = 0.0
    for b in range(len(batch.tokens)):
        used = np.flatnonzero(batch.weights[b, : batch.length(b)])
        if len(used):
            logits = _logits_of(model, adapter, batch, b, causal_ratio, bernoulli_seed)[used]
            rows = row_losses(logits, batch.targets[b, used], adapter.mask_token_id)
            total = total + anp.sum(batch.weights[b, used].astype(np.float64) * rows)
    return total


def loss_and_gradients(
    model: OracleModel, adapter: Adapter, batch: Batch, causal_ratio: float, bernoulli_seed: int | None = None
) -> Result:
    """The loss, its parts by row, and its gradient with respect to each of the adapter's parameters."""
    row_loss, row_correct = np.zeros(batch.tokens.shape), np.zeros(batch.tokens.shape, dtype=bool)
    for b in range(len(batch.tokens)):
        used = np.flatnonzero(batch.weights[b, : batch.length(b)])
        if len(used):
            logits = _logits_of(model, adapter, batch, b, causal_ratio, bernoulli_seed)[used]
            row_loss[b, used] = row_losses(logits, batch.targets[b, used], adapter.mask_token_id)
            if adapter.mask_token_id is not None:
                logits[:, adapter.mask_token_id] = -np.inf
            row_correct[b, used] = logits.argmax(axis=1) == batch.targets[b, used]
    parameters = {name: np.asarray(value, np.float64) for name, value in adapter.parameters.items()}
    gradients = {name: np.zeros_like(value) for name, value in parameters.items()}
    if parameters and row_loss.any():

        def objective(values: Parameters) -> Any:
            return loss(model, replace(adapter, parameters=values), batch, causal_ratio, bernoulli_seed)

        gradients = autograd.grad(objective)(parameters)
    return Result(float(np.sum(batch.weights * row_loss)), row_loss, row_correct, gradients)


def output_rows(
    clean: NDArray[np.int32], weights: NDArray[np.float32], prediction: str
) -> tuple[NDArray[np.int32], NDArray[np.float32]]:
    """Targets and weights (B, T) of the output rows, from those of the positions to predict (B, T).

    aligned: row i predicts position i. shifted: row i predicts position i + 1; position 0 has no row.
    """
    if prediction == "aligned":
        return clean, weights
    targets, row_weights = np.zeros_like(clean), np.zeros_like(weights)
    targets[:, :-1], row_weights[:, :-1] = clean[:, 1:], weights[:, 1:]
    return targets, row_weights


# -- time embedding and optimizer ---------------------------------------------------------------


def time_features(t: Iterable[float], dim: int, max_timesteps: int) -> Array:
    """The sinusoidal table read between its rows at times t in [0, 1]: (len(t), dim), sines first."""
    frequencies = np.exp(-np.log(10000.0) * np.arange(dim // 2) / (dim // 2))
    table = np.outer(np.arange(max_timesteps), frequencies)
    table = np.concatenate([np.sin(table), np.cos(table)], axis=1)
    rows = []
    for one in t:
        place = one * (max_timesteps - 1)
        low = int(np.floor(place))
        high = min(low + 1, max_timesteps - 1)
        rows.append(table[low] * (1.0 - (place - low)) + table[high] * (place - low))
    return np.array(rows)


def adamw(
    parameters: dict[str, Array],
    gradients_at: Callable[[dict[str, Array]], dict[str, Array]],
    *,
    steps: int,
    learning_rate: float,
    weight_decay: float,
    max_grad_norm: float,
) -> dict[str, Array]:
    """Parameters after some steps of AdamW (betas .9, .999, eps 1e-8), clipped by the whole gradient's norm.

    Decay is decoupled and falls on matrices only: LoRA pairs and the time projection, not its bias or the
    mask row.
    """
    values = {name: value.copy() for name, value in parameters.items()}
    first = {name: np.zeros_like(value) for name, value in values.items()}
    second = {name: np.zeros_like(value) for name, value in values.items()}
    for step in range(1, steps + 1):
        gradients = gradients_at(values)
        norm = np.sqrt(sum(float(np.sum(g * g)) for g in gradients.values()))
        scale = min(1.0, max_grad_norm / norm)
        for name, value in values.items():
            g = gradients[name] * scale
            first[name] = 0.9 * first[name] + 0.1 * g
            second[name] = 0.999 * second[name] + 0.001 * g * g
            update = first[name] / (1 - 0.9**step) / (np.sqrt(second[name] / (1 - 0.999**step)) + 1e-8)
            decay = weight_decay if value.ndim == 2 else 0.0
            values[name] = value - learning_rate * (update + decay * value)
    return values
