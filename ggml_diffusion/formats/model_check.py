"""Whether a GGUF can be converted: that the engine computes its model as llama.cpp does.

`read_model` takes a known architecture, every tensor known, of the right shape and a supported type, no
setting that would change the network, and a vocabulary that fits. What is in doubt is refused by name, never
guessed.

Deliberately not here: reading the file (model_file.py), what the architectures are (architectures.py).
Sources: llama.cpp, src/llama-model.cpp, for the keys and their defaults, src/llama-vocab.cpp for what a
vocabulary must hold.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from ggml_diffusion.errors import quoted
from ggml_diffusion.formats.architectures import (
    ARCHITECTURES,
    Architecture,
    Feature,
    expected_tensors,
    refusal,
)
from ggml_diffusion.formats.gguf_reader import StringArray
from ggml_diffusion.formats.model_file import ModelFile, read_gguf
from ggml_diffusion.formats.tensor_types import SUPPORTED_TYPES

TOKENIZERS_WITHOUT_VOCABULARY = ("none", "no_vocab")
BPE_TOKENIZERS = ("gpt2", "hybriddna")  # byte-level; the second cuts DNA into words of six letters first
SUPPORTED_TOKENIZERS = (*BPE_TOKENIZERS, "llama", *TOKENIZERS_WITHOUT_VOCABULARY)  # "llama": SentencePiece
# Kinds that llama.cpp reads as well, and why none of them is given text.
_REFUSED_TOKENIZERS = {
    "bert": "it does not keep case and blanks, so a text does not come back from its tokens",
    "gemma4": "only Gemma 4 has it",
    "plamo2": "only PLaMo has it",
    "rwkv": "llama.cpp does not come to an end with a byte that it has no token for",
    "t5": "llama.cpp aborts where its map of characters is damaged",
    "whitespace": "it does not keep blanks, so a text does not come back from its tokens",
    "test": "it makes numbers of texts, and no texts of numbers",
}
# The same for pre-tokenizers of byte-level vocabularies.
_REFUSED_PRE_TOKENIZERS = {
    "gemma4": "it looks for blanks as SentencePiece writes them, and a byte-level vocabulary has none",
    "sarvam-moe": "it looks for blanks as SentencePiece writes them, and a byte-level vocabulary has none",
    "whitespace": "llama.cpp aborts at the first blank",
}
# Roles of tokens that llama.cpp reads, from keys tokenizer.ggml.ROLE_token_id; it ignores other such keys.
_TOKEN_ROLES = (
    *("bos", "eos", "eot", "eom", "unknown", "seperator", "padding", "mask", "prefix", "suffix", "middle"),
    *("fim_pre", "fim_suf", "fim_mid", "fim_pad", "fim_rep", "fim_sep"),
)
# What else is read of a vocabulary, by the type in which llama.cpp reads it.
_VOCABULARY_KEYS = {
    "pre": "str",
    "token_type_count": "u32",
    "add_bos_token": "bool",
    "add_eos_token": "bool",
    "add_sep_token": "bool",
    "add_space_prefix": "bool",
    "remove_extra_whitespaces": "bool",
}
MAX_LAYERS = 512  # llama.cpp's own limit; it aborts beyond

# Keys that change the network in ways that the engine does not compute, and the value that changes nothing.
_NEUTRAL_SETTINGS: Mapping[str, bool | int | float] = {
    "expert_used_count": 0,
    "expert_group_count": 0,
    "nextn_predict_layers": 0,
    "attention.causal": True,
}
# The keys that the network is read from, by the type in which llama.cpp reads them.
_KEY_TYPES = {
    "u32": (
        "block_count",
        "embedding_length",
        "context_length",
        "attention.key_length",
        "attention.value_length",
        "rope.dimension_count",
    ),
    "f32": (
        "attention.layer_norm_rms_epsilon",
        "rope.freq_base",
        "rope.scaling.factor",
        "rope.scale_linear",
        "rope.scaling.attn_factor",
    ),
    "str": ("rope.scaling.type",),
}
_FEATURE_KEYS: Mapping[Feature, tuple[str, ...]] = {
    Feature.SCALE_KEYS: ("embedding_scale", "residual_scale", "logit_scale", "attention.scale"),
    Feature.SCORE_CAP: ("attn_logit_softcapping",),
    Feature.LOGIT_CAP: ("final_logit_softcapping",),
    Feature.YARN_KEYS: (
        "attention.temperature_scale",
        "rope.scaling.yarn_beta_fast",
        "rope.scaling.yarn_beta_slow",
        "rope.scaling.yarn_log_multiplier",
    ),
}
_PATTERN_TYPES = ("u32", "arr[bool]", "arr[u32]", "arr[i32]")
ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")
_WINDOW = "attention.sliding_window"


def read_model(path: str | Path) -> ModelFile:
    """Read the header of a GGUF model that can be converted.

    Raises:
        UserError: what `read_gguf` and `check_model` refuse.

    """
    model = read_gguf(path)
    check_model(model)
    return model


def check_model(model: ModelFile) -> None:
    """Refuse a GGUF that the engine would not compute as llama.cpp does.

    Raises:
        UserError: an adapter, an unsupported architecture, setting, tensor or type,
            sizes that do not agree, or a vocabulary that does not fit.

    """
    kind = model.optional("general.type", "model")
    if kind != "model":
        model.fail(f"holds an {quoted(kind)}, not a model")
    if model.optional(f"{model.arch}.expert_count", 0):
        model.fail("is a mixture of experts, in which each token takes weights of its own")
    if any(key.startswith(f"{model.arch}.ssm.") for key in model.metadata):
        model.fail("has recurrent layers, which cannot see what lies to their right")
    if model.arch not in ARCHITECTURES:
        model.fail(f"architecture {quoted(model.arch)} {refusal(model.arch)}")
    _check_hyperparameters(model, ARCHITECTURES[model.arch])
    _check_tensors(model)
    check_tokenizer(model)


def _check_hyperparameters(model: ModelFile, entry: Architecture) -> None:
    arch = model.arch
    if model.L > MAX_LAYERS:
        model.fail(f"key '{arch}.block_count' is {model.L}; at most {MAX_LAYERS} layers are supported")
    if model.H % model.G:
        model.fail(f"{model.H} query heads cannot share {model.G} key/value heads evenly")
    if f"{arch}.attention.key_length" not in model.metadata and model.C % model.H:
        model.fail(f"hidden size {model.C} is not divisible by its {model.H} heads")
    if model.size("attention.value_length", model.C // model.H) != model.D:
        model.fail(f"its value heads ('{arch}.attention.value_length') are not of the keys' size, {model.D}")
    if entry.square_queries and model.H * model.D != model.C:
        model.fail(f"{model.H} heads of {model.D} do not make up the hidden size {model.C}")
    if model.D % 2:
        model.fail(f"head size {model.D} is odd; rotary embedding needs pairs")
    if model.n_rotated % 2 or model.n_rotated > model.D:
        model.fail(f"RoPE cannot turn {model.n_rotated} elements of a head of {model.D}")
    if model.n_rotated != model.D and not entry.partial_rope:
        model.fail(f"llama.cpp loads no {arch} model with RoPE on {model.n_rotated} of {model.D} elements")
    if not 0 < model.rms_eps < 1:
        model.fail(f"key '{arch}.attention.layer_norm_rms_epsilon' is {model.rms_eps}, which is not possible")
    for key, neutral in _NEUTRAL_SETTINGS.items():
        value = model.optional(f"{arch}.{key}", neutral)
        if value != neutral:
            model.fail(f"key '{arch}.{key}' is {value}; only {neutral} is supported")
    model.size("context_length")  # raises if it is missing or impossible
    _check_types(model, entry)
    _check_rope(model, entry)
    _check_scales(model, entry)
    _check_windows(model, entry)


def _check_types(model: ModelFile, entry: Architecture) -> None:
    """Refuse a key of another type than llama.cpp reads it in, among those that the network is read from."""
    expected = {key: kind for kind, keys in _KEY_TYPES.items() for key in keys}
    for feature, keys in _FEATURE_KEYS.items():
        if feature in entry.features:
            expected |= dict.fromkeys(keys, "f32")
    if Feature.SCALE_KEYS in entry.features:
        expected["rope.scaling.finetuned"] = "bool"
    if entry.window_period:
        expected |= {"rope.freq_base_swa": "f32", "attention.sliding_window": "u32"}
    for key, kind in expected.items():
        full_key = f"{model.arch}.{key}"
        if model.key_types.get(full_key, kind) != kind:
            model.fail(f"key {quoted(full_key)} is of type {model.key_types[full_key]}, expected {kind}")


def _check_rope(model: ModelFile, entry: Architecture) -> None:
    arch = model.arch
    if not model.rope_freq_base > 1:
        model.fail(f"key '{arch}.rope.freq_base' is {model.rope_freq_base}, which is not possible")
    scaling = model.optional(f"{arch}.rope.scaling.type", "linear")
    if scaling not in ROPE_SCALINGS:
        model.fail(f"RoPE scaling {quoted(scaling)} is not supported; supported: {', '.join(ROPE_SCALINGS)}")
    if not model.rope_scaling_factor > 0:
        model.fail(f"key '{arch}.rope.scaling.factor' is {model.rope_scaling_factor}, which is not possible")
    if not model.optional(f"{arch}.rope.scaling.attn_factor", 1.0) > 0:
        model.fail(f"key '{arch}.rope.scaling.attn_factor' is not above zero")
    if scaling in ("yarn", "longrope") or model.optional(f"{arch}.attention.temperature_scale", 0.0):
        model.size("rope.scaling.original_context_length", model.context_length)


def _check_scales(model: ModelFile, entry: Architecture) -> None:
    arch = model.arch
    if Feature.SCALE_KEYS in entry.features and not model.require(f"{arch}.logit_scale", float) > 0:
        model.fail(f"key '{arch}.logit_scale' is not above zero")
    for feature, default in ((Feature.SCORE_CAP, entry.score_cap), (Feature.LOGIT_CAP, entry.logit_cap)):
        key = f"{arch}.{_FEATURE_KEYS[feature][0]}"
        cap = model.optional(key, default) if feature in entry.features else 0.0
        if cap < 0 or (cap == 0 and default):  # where there is always a cap, llama.cpp divides by it
            model.fail(f"key '{key}' is {cap}, which is not possible")


def window_of(model: ModelFile) -> int:
    """Tokens that a layer with a window sees, 0 = there is no such layer."""
    entry = ARCHITECTURES[model.arch]
    return model.optional(f"{model.arch}.{_WINDOW}", entry.window) if entry.window_period else 0


def _check_windows(model: ModelFile, entry: Architecture) -> None:
    if not entry.window_period:
        return
    key, window = f"{model.arch}.{_WINDOW}", window_of(model)
    if window >= 1 << 31 or (window == 0 and entry.window):
        model.fail(f"key '{key}' is {window}, which is not possible")
    pattern = f"{key}_pattern"
    kind = model.key_types.get(pattern, "u32")
    if window and kind not in _PATTERN_TYPES:
        model.fail(f"key '{pattern}' is of type {kind}, expected one of {', '.join(_PATTERN_TYPES)}")
    if window and isinstance(period := model.metadata.get(pattern, 0), int) and period >= 1 << 31:
        model.fail(f"key '{pattern}' is {period}, which is not possible")
    if not model.optional(f"{model.arch}.rope.freq_base_swa", 10000.0) > 0:
        model.fail(f"key '{model.arch}.rope.freq_base_swa' is not above zero")


def _check_tensors(model: ModelFile) -> None:
    known = set()
    longrope = model.optional(f"{model.arch}.rope.scaling.type", "linear") == "longrope"
    for name, shape in expected_tensors(model.arch, model, model.n_rotated, model.tensors, longrope=longrope):
        info = model.tensors.get(name)
        if info is None:
            model.fail(f"tensor {quoted(name)} is missing")
        if info.shape != shape:
            model.fail(f"tensor {quoted(name)} has shape {info.shape}; the model's sizes ask for {shape}")
        if len(shape) == 1 and info.type_name != "F32":
            model.fail(f"tensor {quoted(name)} has type {info.type_name}; only F32 is supported for vectors")
        if info.type_name not in SUPPORTED_TYPES:
            model.fail(
                f"tensor {quoted(name)} has type {info.type_name}, which is not supported; "
                f"supported: {', '.join(SUPPORTED_TYPES)}"
            )
        known.add(name)
    for name in model.tensors:
        if name not in known:
            model.fail(f"tensor {quoted(name)} is not part of a supported {quoted(model.arch)} model")


def check_tokenizer(model: ModelFile) -> None:
    """Refuse a vocabulary that contradicts itself or the model; on some such files llama.cpp aborts.

    A file without any vocabulary passes: it can be computed with, but not be given text. What llama.cpp does
    not read is not judged: an id outside of the vocabulary (it names no token), a `vocab_size` beside a
    vocabulary, entries past its end.

    Raises:
        UserError: an unsupported kind of tokenizer, arrays that are too short or of wrong types, a token that
            occurs twice, or another size than the embedding's.

    """
    if "tokenizer.ggml.model" not in model.metadata and "tokenizer.ggml.tokens" not in model.metadata:
        return
    kind = model.require("tokenizer.ggml.model", str)
    if kind in _REFUSED_TOKENIZERS:
        model.fail(f"tokenizer {quoted(kind)} is not supported: {_REFUSED_TOKENIZERS[kind]}")
    if kind not in SUPPORTED_TOKENIZERS:
        model.fail(f"tokenizer {quoted(kind)} is not supported; supported: {', '.join(SUPPORTED_TOKENIZERS)}")
    if kind in TOKENIZERS_WITHOUT_VOCABULARY:
        return
    tokens = _strings(model, "tokenizer.ggml.tokens")
    if len(tokens) != model.V:
        model.fail(f"its vocabulary has {len(tokens)} tokens, but the token embedding has {model.V} rows")
    texts = _token_texts(model, tokens)
    for key, types in (("scores", ("arr[f32]", "arr[i32]")), ("token_type", ("arr[i32]",))):
        _check_token_array(model, f"tokenizer.ggml.{key}", types, len(tokens))
    if kind in BPE_TOKENIZERS:
        _strings(model, "tokenizer.ggml.merges")
        pre = model.optional("tokenizer.ggml.pre", "")
        if pre in _REFUSED_PRE_TOKENIZERS:
            model.fail(f"pre-tokenizer {quoted(pre)} is not supported: {_REFUSED_PRE_TOKENIZERS[pre]}")
    else:
        missing = [byte for byte in range(256) if not {b"<0x%02X>" % byte, bytes([byte])} & texts]
        if missing:
            model.fail(f"its SentencePiece vocabulary has no token for byte 0x{missing[0]:02X}")
        if not np.isfinite(np.asarray(model.metadata.get("tokenizer.ggml.scores", 0.0))).all():
            model.fail("key 'tokenizer.ggml.scores' holds NaN or infinite values")
    expected = {f"{role}_token_id": "u32" for role in _TOKEN_ROLES} | _VOCABULARY_KEYS
    for key, kind_of_key in ((f"tokenizer.ggml.{name}", kind) for name, kind in expected.items()):
        if model.key_types.get(key, kind_of_key) != kind_of_key:
            model.fail(f"key {quoted(key)} is of type {model.key_types[key]}, expected {kind_of_key}")


def _token_texts(model: ModelFile, tokens: StringArray) -> set[bytes]:
    """The tokens as llama.cpp has them; it aborts if two are the same.

    It reads a token up to a NUL, and gives an empty one a name of its own.
    """
    texts = set()
    for index, text in enumerate(tokens.iter_raw()):
        if b"\0" in text:
            model.fail(f"token {index} of its vocabulary holds a NUL byte, at which llama.cpp would cut it")
        texts.add(text or b"[EMPTY_%d]" % index)
    if len(texts) != len(tokens):
        model.fail("its vocabulary holds the same token twice")
    return texts


def _strings(model: ModelFile, key: str) -> StringArray:
    if key not in model.metadata:
        model.fail(f"key '{key}' is missing")
    value = model.metadata[key]
    if not isinstance(value, StringArray):
        model.fail(f"key '{key}' is of type {model.key_types[key]}, expected an array of strings")
    return value


def _check_token_array(model: ModelFile, key: str, types: tuple[str, ...], n_tokens: int) -> None:
    """A key that holds at least one number a token, if it is there at all."""
    if key not in model.metadata:
        return
    value = model.metadata[key]
    if model.key_types[key] not in types or not isinstance(value, np.ndarray):
        model.fail(f"key '{key}' is of type {model.key_types[key]}, expected {types[0]}")
    if len(value) < n_tokens:
        model.fail(f"key '{key}' has {len(value)} entries for {n_tokens} tokens")
