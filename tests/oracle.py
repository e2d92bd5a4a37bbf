"""The oracle: the whole network in float64 NumPy, differentiated by the `autograd` package.

It knows nothing of the engine: it reads the GGUF with gguf-py, unpacks the weights, takes one sequence at a
time, keeps every score and every logit, and follows the definitions word for word. Slow, short and right;
`test_oracle.py` holds it against llama.cpp and against finite differences.

Sources: docs/objective.md for the fractional mask, LoRA, the time embedding and AdamW; llama.cpp
`src/models/llama.cpp` for the architecture and its NORM kind of RoPE (interleaved pairs).

Letters: B sequences, T tokens, C hidden size, H query heads, G key/value heads, D head size, F feed-forward
size, V vocabulary, R LoRA rank, L layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import autograd
import autograd.numpy as anp
import gguf
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Parameters = Mapping[str, Any]  # GGUF names; float64 arrays, or autograd's boxes of them


@dataclass(frozen=True)
class OracleModel:
    """A llama-arch GGUF with its weights unpacked to float64, matrices (out, in)."""

    L: int
    C: int
    H: int
    G: int
    D: int
    F: int
    V: int
    eps: float
    rope_frequencies: Array  # (D / 2,) radians a position
    weights: dict[str, Array] = field(repr=False)

    @property
    def head(self) -> Array:
        """The output matrix (V, C): its own, or the embedding where the two are tied."""
        return self.weights.get("output.weight", self.weights["token_embd.weight"])


def dequantised(data: NDArray[Any], tensor_type: gguf.GGMLQuantizationType) -> NDArray[Any]:
    """Weights in float32 from rows of blocks, by the gguf package; Q1_0, which it cannot, by ggml's words.

    Q1_0: a float16 d, then 128 bits, the lowest of a byte first: d where the bit is 1, else -d.
    """
    if tensor_type != gguf.GGMLQuantizationType.Q1_0:
        return gguf.quants.dequantize(data, tensor_type)
    blocks = data.reshape(-1, 18)
    d = np.ascontiguousarray(blocks[:, :2]).view(np.float16).astype(np.float32)
    bits = np.unpackbits(blocks[:, 2:], axis=1, bitorder="little")
    return np.where(bits == 1, d, -d).reshape(len(data), -1)


def load_model(path: str | Path) -> OracleModel:
    reader = gguf.GGUFReader(str(path))

    def key(name: str, default: Any = None) -> Any:
        found = reader.get_field("llama." + name)
        return default if found is None else found.contents()

    # gguf's own dequantisation computes in float32, as ggml does; from there on all is float64
    weights = {t.name: dequantised(t.data, t.tensor_type).astype(np.float64) for t in reader.tensors}
    C, H = key("embedding_length"), key("attention.head_count")
    D = key("attention.key_length", C // H)
    factors = weights.pop("rope_freqs.weight", np.ones(D // 2))
    return OracleModel(
        L=key("block_count"),
        C=C,
        H=H,
        G=key("attention.head_count_kv", H),
        D=D,
        F=key("feed_forward_length"),
        V=len(weights["token_embd.weight"]),
        eps=key("attention.layer_norm_rms_epsilon"),
        rope_frequencies=key("rope.freq_base", 10000.0) ** (-2.0 * np.arange(D // 2) / D) / factors,
        weights=weights,
    )


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
    T: int, causal_ratio: float, document_ids: NDArray[Any] | None = None, bernoulli_seed: int | None = None
) -> Array:
    """Factors w (T, T) of the exponentials of the scores, query by key, before a row is normalised."""
    a = 1.0 - causal_ratio
    w = np.ones((T, T))
    for i in range(T):
        for j in range(T):
            if j > i:
                visible = bernoulli_seed is None or bernoulli_uniform(bernoulli_seed, i, j) < a
                w[i, j] = (a if bernoulli_seed is None else 1.0) if visible else 0.0
            if document_ids is not None and document_ids[i] != document_ids[j]:
                w[i, j] = 0.0
    return w


# -- the network --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Adapter:
    """What is trained.

    parameters: LoRA pairs by GGUF name, `mask_embedding` (C,), and `embedding_offset` (B, C) or, in its
    place, `time_embedding.weight` (C, dim) and `time_embedding.bias` (C,).
    """

    parameters: Parameters
    alpha: float = 1.0
    mask_token_id: int | None = None


EMPTY_ADAPTER = Adapter({})


def _rms_norm(x: Any, weight: Array, eps: float) -> Any:
    return x / anp.sqrt(anp.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def _rope(x: Any, frequencies: Array) -> Any:
    """Rotate neighbouring pairs (2k, 2k + 1) of x (T, heads, D) by position * frequency k."""
    angles = np.arange(x.shape[0])[:, None, None] * frequencies  # (T, 1, D / 2)
    cos, sin = np.cos(angles), np.sin(angles)
    even, odd = x[..., 0::2], x[..., 1::2]
    return anp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1).reshape(x.shape)


def _softmax(scores: Any) -> Any:
    exponentials = anp.exp(scores - anp.max(scores, axis=-1, keepdims=True))
    return exponentials / anp.sum(exponentials, axis=-1, keepdims=True)


def _linear(model: OracleModel, adapter: Adapter, name: str, x: Any) -> Any:
    """W x + (alpha / R) B (A x) for every row of x (T, in)."""
    y = anp.dot(x, model.weights[name].T)
    if name + ".lora_a" in adapter.parameters:
        a, b = adapter.parameters[name + ".lora_a"], adapter.parameters[name + ".lora_b"]
        y = y + adapter.alpha / a.shape[0] * anp.dot(anp.dot(x, a.T), b.T)
    return y


def _attention(model: OracleModel, q: Any, k: Any, v: Any, log_w: Array) -> Any:
    """Mix values: q (T, H * D), k and v (T, G * D) before RoPE, log_w (T, T); returns (T, H * D)."""
    T = q.shape[0]
    q = _rope(q.reshape(T, model.H, model.D), model.rope_frequencies)
    k = _rope(k.reshape(T, model.G, model.D), model.rope_frequencies)
    v = v.reshape(T, model.G, model.D)
    outputs = []
    for head in range(model.H):
        group = head * model.G // model.H
        scores = anp.dot(q[:, head], k[:, group].T) / np.sqrt(model.D)
        outputs.append(anp.dot(_softmax(scores + log_w), v[:, group]))
    return anp.concatenate(outputs, axis=1)


def embeddings(model: OracleModel, adapter: Adapter, tokens: NDArray[Any], offset: Any = 0.0) -> Any:
    """The network's input (T, C): token rows, the trained row on mask tokens, one offset (C,) on all."""
    x = model.weights["token_embd.weight"][tokens]
    if "mask_embedding" in adapter.parameters:
        is_mask = (tokens == adapter.mask_token_id)[:, None].astype(np.float64)
        x = x + is_mask * adapter.parameters["mask_embedding"]
    return x + offset


def sequence_logits(model: OracleModel, adapter: Adapter, x: Any, w: Array) -> Any:
    """Raw logits (T, V) of one sequence from its input embeddings x (T, C) and its mask weights w (T, T)."""
    with np.errstate(divide="ignore"):
        log_w = np.log(w)
    for layer in range(model.L):
        prefix = f"blk.{layer}."

        def linear(name: str, rows: Any, prefix: str = prefix) -> Any:
            return _linear(model, adapter, prefix + name + ".weight", rows)

        h = _rms_norm(x, model.weights[prefix + "attn_norm.weight"], model.eps)
        mixed = _attention(model, linear("attn_q", h), linear("attn_k", h), linear("attn_v", h), log_w)
        x = x + linear("attn_output", mixed)
        h = _rms_norm(x, model.weights[prefix + "ffn_norm.weight"], model.eps)
        gate, up = linear("ffn_gate", h), linear("ffn_up", h)
        x = x + linear("ffn_down", gate / (1.0 + anp.exp(-gate)) * up)
    return anp.dot(_rms_norm(x, model.weights["output_norm.weight"], model.eps), model.head.T)


# -- batches, loss, gradients -------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """Noisy tokens (B, T), and targets and weights (B, T) of the output row that predicts.

    lengths (B,): the rest is padding. document_ids (B, T): attention stays within equal ones.
    time_features (B, dim): the input of the time projection.
    """

    tokens: NDArray[np.int32]
    targets: NDArray[np.int32]
    weights: NDArray[np.float32]
    lengths: NDArray[np.int32] | None = None
    document_ids: NDArray[np.int32] | None = None
    time_features: Array | None = None

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
    w = mask_weights(n, causal_ratio, documents, bernoulli_seed)
    return sequence_logits(model, adapter, embeddings(model, adapter, batch.tokens[b, :n], offset), w)


def _row_losses(logits: Any, targets: NDArray[Any], mask_token_id: int | None) -> Any:
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
            rows = _row_losses(logits, batch.targets[b, used], adapter.mask_token_id)
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
            row_loss[b, used] = _row_losses(logits, batch.targets[b, used], adapter.mask_token_id)
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
