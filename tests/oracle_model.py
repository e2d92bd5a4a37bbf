"""What the oracle computes with: a GGUF as float64 weights and a description that names no architecture.

`load_model` reads a file with gguf-py and writes down, once, what llama.cpp makes of its architecture: which
pairs RoPE turns and how far, windows, scales, soft caps and the gate. What a file has or lacks as a tensor
(norms, biases, an output matrix) needs no description: the network asks the weights. Tensors that a file
stores fused are cut into the projections here, so that every projection has one name everywhere.

Deliberately not here: the network (oracle.py) and any check of the file.

Source: llama.cpp `src/models/<architecture>.cpp`, `src/llama-model.cpp` (`load_hparams`, `get_rope_factors`),
`src/llama-context.cpp` (YaRN's magnitude) and `ggml/src/ggml-cpu/ops.cpp` (`rope_yarn`).

Letters: C hidden size, H query heads, G key/value heads, D head size, F feed-forward size, V vocabulary, L
layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Key = Callable[..., Any]  # (name without the architecture, default) -> the file's value

INTERLEAVED_PAIRS = {"llama", "smollm3", "granite", "mistral3"}  # the others turn halves
GELU_GATE = {"gemma2", "gemma3"}
# gemma2 and gemma3 score by C / H in the place of D where the file has the layers of the 27B model
LAYERS_OF_27B = {"gemma2": 46, "gemma3": 62}
WINDOW_EVERY = {"gemma2": 2, "gemma3": 6, "olmo2": 4}  # the last of so many layers sees everything


@dataclass(frozen=True)
class Rope:
    """Rotation of the first 2 n entries of a head: by position * frequency, the length times magnitude."""

    frequencies: Array  # (n,) radians a position
    magnitude: float = 1.0


@dataclass(frozen=True)
class Layer:
    """What may differ from layer to layer."""

    rope: Rope | None
    window: int | None  # key j is in sight of query i only where |i - j| < window


@dataclass(frozen=True)
class OracleModel:
    """A GGUF with its weights unpacked to float64, matrices (out, in)."""

    arch: str
    L: int
    C: int
    H: int
    G: int
    D: int
    F: int
    V: int
    eps: float
    layers: tuple[Layer, ...]
    rope_pairs: bool  # RoPE turns neighbours (2k, 2k + 1); else the halves (k, k + n)
    gelu: bool  # the gate's activation, else SiLU
    embedding_scale: float
    residual_scale: float
    attention_scale: float
    logit_scale: float
    attention_cap: float | None
    logit_cap: float | None
    temperature: tuple[float, int] | None  # the query at i times 1 + first * ln(floor(i / second) + 1)
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


def load_model(path: str | Path, *, n_ctx: int | None = None) -> OracleModel:
    """Read a GGUF as llama.cpp does with a context of n_ctx tokens, None: no longer than the original one.

    Only the choice between the long and the short RoPE factors of "longrope" depends on it.
    """
    reader = gguf.GGUFReader(str(path))
    arch = str(reader.fields["general.architecture"].contents())

    def key(name: str, default: Any = None) -> Any:
        found = reader.get_field(f"{arch}.{name}")
        return default if found is None else found.contents()

    # gguf's own dequantisation computes in float32, as ggml does; from there on all is float64
    weights = {t.name: dequantised(t.data, t.tensor_type).astype(np.float64) for t in reader.tensors}
    L, C, H = key("block_count"), key("embedding_length"), _one(key("attention.head_count"))
    D, F = key("attention.key_length", C // H), _one(key("feed_forward_length"))
    G = _one(key("attention.head_count_kv", H))
    factors = _rope_factors(arch, key, weights, n_ctx)
    windows = _windows(arch, key, L)
    _cut_fused_tensors(weights, L, (H * D, G * D, G * D), F)
    gemma, granite = arch in GELU_GATE, arch == "granite"
    size_scored = C // H if LAYERS_OF_27B.get(arch) == L else D
    temperature = key("attention.temperature_scale", 0.0) if arch == "mistral3" else 0.0
    return OracleModel(
        arch=arch,
        L=L,
        C=C,
        H=H,
        G=G,
        D=D,
        F=F,
        V=len(weights["token_embd.weight"]),
        eps=key("attention.layer_norm_rms_epsilon"),
        layers=tuple(
            Layer(_rope(arch, key, D, factors, layer, window is not None), window)
            for layer, window in enumerate(windows)
        ),
        rope_pairs=arch in INTERLEAVED_PAIRS,
        gelu=gemma,
        embedding_scale=C**0.5 if gemma else (key("embedding_scale") if granite else None) or 1.0,
        residual_scale=(key("residual_scale") if granite else None) or 1.0,
        attention_scale=(key("attention.scale") if granite else None) or size_scored**-0.5,
        logit_scale=1.0 / key("logit_scale") if granite else 1.0,
        attention_cap=key("attn_logit_softcapping", 50.0) if arch == "gemma2" else None,
        logit_cap=(key("final_logit_softcapping", 30.0 if arch == "gemma2" else 0.0) if gemma else 0.0)
        or None,
        temperature=(temperature, _original_context(key)) if temperature else None,
        weights=weights,
    )


def _one(value: Any) -> int:
    """A count that the file gives for all layers at once or, the same for each, layer by layer."""
    counts = set(np.atleast_1d(value).tolist())
    assert len(counts) == 1, f"the layers differ: {value}"
    return int(counts.pop())


def _cut_fused_tensors(weights: dict[str, Array], L: int, qkv_rows: tuple[int, int, int], F: int) -> None:
    """Replace attn_qkv by attn_q, attn_k and attn_v, and an ffn_up of 2 F rows by ffn_gate and ffn_up."""
    for layer in range(L):
        prefix = f"blk.{layer}."
        for kind in ("weight", "bias"):
            fused = weights.pop(f"{prefix}attn_qkv.{kind}", None)
            if fused is not None:
                parts = np.split(fused, np.cumsum(qkv_rows)[:-1])
                for name, part in zip(("attn_q", "attn_k", "attn_v"), parts, strict=True):
                    weights[f"{prefix}{name}.{kind}"] = part
        up = prefix + "ffn_up.weight"
        if len(weights[up]) == 2 * F and prefix + "ffn_gate.weight" not in weights:
            weights[prefix + "ffn_gate.weight"], weights[up] = np.split(weights[up], 2)


# -- windows ------------------------------------------------------------------------------------


def _windows(arch: str, key: Key, L: int) -> list[int | None]:
    """The window of each layer. Elsewhere llama.cpp ignores the key, and phi3's it switches off."""
    size = key("attention.sliding_window", 4096 if arch == "gemma2" else 0) if arch in WINDOW_EVERY else 0
    if not size:
        return [None] * L
    every = key("attention.sliding_window_pattern", WINDOW_EVERY[arch])
    if isinstance(every, list):  # a layer that the array does not reach has no window
        narrow = [layer < len(every) and bool(every[layer]) for layer in range(L)]
    else:
        narrow = [every == 0 or layer % every < every - 1 for layer in range(L)]
    return [size if one else None for one in narrow]


# -- RoPE ---------------------------------------------------------------------------------------


def _original_context(key: Key) -> int:
    return int(key("rope.scaling.original_context_length", key("context_length")))


def _rope_factors(arch: str, key: Key, weights: dict[str, Array], n_ctx: int | None) -> Array | None:
    """Divisors of the frequencies (n,), None where there are none; takes them out of the weights."""
    one, short, long = (
        weights.pop(f"{name}.weight", None)
        for name in ("rope_freqs", "rope_factors_short", "rope_factors_long")
    )
    if arch != "phi3" and key("rope.scaling.type") != "longrope":
        return one
    # llama.cpp rounds a context up to whole blocks of 256
    return long if n_ctx is not None and -(-n_ctx // 256) * 256 > _original_context(key) else short


def _rope(arch: str, key: Key, D: int, factors: Array | None, layer: int, in_window: bool) -> Rope | None:
    """The rotation of a layer, as llama.cpp's context and `ggml_rope_ext` put it together."""
    if arch == "smollm3" and (layer + 1) % 4 == 0:
        return None
    if arch == "granite" and not key("rope.scaling.finetuned", True):
        return None
    n, base = key("rope.dimension_count", D), key("rope.freq_base", 10000.0)
    scaling = key("rope.scaling.type", "linear")
    written = key("rope.scaling.factor", key("rope.scale_linear", 0.0)) or 1.0
    factor = 1.0 if scaling == "none" else written
    magnitude = key("rope.scaling.attn_factor", 1.0)
    yarn = scaling == "yarn"
    if yarn:  # llama.cpp's context divides here by what its RoPE multiplies below
        multiplier = key("rope.scaling.yarn_log_multiplier", 0.0) if arch == "mistral3" else 0.0
        magnitude *= _yarn_magnitude(factor, 1.0) / (1.0 + 0.1 * np.log(factor))
        if multiplier:
            magnitude /= _yarn_magnitude(factor, multiplier)
    if in_window and arch == "gemma2":
        base, factor = key("rope.freq_base_swa", base), written  # whatever the type
    if in_window and arch == "gemma3":
        base, factor = key("rope.freq_base_swa", 10000.0), 1.0
    if in_window and arch == "olmo2":
        factor, magnitude, yarn = 1.0, 1.0, False
    plain = base ** (-2.0 * np.arange(n // 2) / n) / (1.0 if factors is None else factors)
    if not yarn:
        return Rope(plain / factor, magnitude)
    kept = _yarn_kept(arch, key, n, base)
    return Rope(plain / factor * (1.0 - kept) + plain * kept, magnitude * (1.0 + 0.1 * np.log(factor)))


def _yarn_magnitude(factor: float, multiplier: float) -> float:
    return 1.0 if factor <= 1.0 else float(0.1 * multiplier * np.log(factor) + 1.0)


def _yarn_kept(arch: str, key: Key, n: int, base: float) -> Array:
    """The share (n / 2,) of each frequency that is not interpolated: 1 for fast turns, 0 for slow ones."""
    beta_fast, beta_slow = 32.0, 1.0
    if arch == "mistral3":  # the only one here whose loader reads them
        beta_fast = key("rope.scaling.yarn_beta_fast", beta_fast)
        beta_slow = key("rope.scaling.yarn_beta_slow", beta_slow)
    fast, slow = (
        n * np.log(_original_context(key) / (turns * 2.0 * np.pi)) / (2.0 * np.log(base))
        for turns in (beta_fast, beta_slow)
    )
    low, high = max(0.0, np.floor(fast)), min(n - 1.0, np.ceil(slow))
    kept: Array = 1.0 - np.clip((np.arange(n // 2) - low) / max(0.001, high - low), 0.0, 1.0)
    return kept
