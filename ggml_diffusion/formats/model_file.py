"""A base model's GGUF: what it says about itself, and whether it can be converted.

`read_gguf` reads any GGUF; `read_model` also checks that the engine computes this model as llama.cpp does: a
known architecture, every tensor known, of the right shape and a supported type, and no setting that would
change the network. What is in doubt is refused by name, never guessed.

Deliberately not here: tensor data and arithmetic (the C core), the bytes of the format (gguf_reader.py), the
table of architectures (architectures.py).
Sources: the GGUF specification (ggml, docs/gguf.md) for the keys; llama.cpp, src/llama-model.cpp and
src/models/llama.cpp, for their defaults and the shapes, src/llama-vocab.cpp for what a vocabulary must hold.
Letters: C hidden size, H query heads, G key/value heads, D head size, F feed-forward size, V vocabulary,
L layers.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn, TypeVar

import numpy as np

from ggml_diffusion.errors import UserError, quoted
from ggml_diffusion.formats.architectures import SUPPORTED_ARCHS, Architecture
from ggml_diffusion.formats.gguf_reader import MetadataValue, StringArray, TensorInfo, read_header
from ggml_diffusion.formats.tensor_names import TOKEN_EMBEDDING, layer_tensor

SUPPORTED_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q4_K", "Q5_K", "Q6_K")
TOKENIZERS_WITHOUT_VOCABULARY = ("none", "no_vocab")
SUPPORTED_TOKENIZERS = ("gpt2", "llama", *TOKENIZERS_WITHOUT_VOCABULARY)  # byte-level BPE, SentencePiece
MAX_LAYERS = 512  # llama.cpp's own limit; it aborts beyond

_T = TypeVar("_T", bool, int, float, str)


# Keys that change the network in ways that the engine does not compute, and the value that changes nothing.
_NEUTRAL_SETTINGS: Mapping[str, bool | int | float] = {
    "expert_count": 0,
    "expert_used_count": 0,
    "expert_group_count": 0,
    "nextn_predict_layers": 0,
    "attention.causal": True,
    "rope.scaling.attn_factor": 1.0,
}


@dataclass(frozen=True)
class ModelFile:
    """The header of a GGUF file. The model's sizes are read out of it on demand, and raise if it has none."""

    path: Path
    version: int
    alignment: int  # bytes
    metadata: dict[str, MetadataValue]
    key_types: dict[str, str]  # key -> "u32", "str", "arr[f32]"...
    tensors: dict[str, TensorInfo]

    def fail(self, fault: str) -> NoReturn:
        """Refuse this file in one line.

        Raises:
            UserError: always.

        """
        raise UserError(f"{self.path}: {fault}")

    def require(self, key: str, kind: type[_T]) -> _T:
        """The value of a key, as bool, int, float (finite) or str.

        Raises:
            UserError: the key is missing or holds something else.

        """
        if key not in self.metadata:
            self.fail(f"key {quoted(key)} is missing")
        value = self.metadata[key]
        if not isinstance(value, kind) or (kind is not bool and isinstance(value, bool)):
            self.fail(f"key {quoted(key)} is of type {self.key_types[key]}, expected {kind.__name__}")
        if isinstance(value, float) and not math.isfinite(value):
            self.fail(f"key {quoted(key)} is {value}, not a finite number")
        return value

    def optional(self, key: str, default: _T) -> _T:
        """The value of a key, which must be of the default's type, or the default if there is no such key."""
        return self.require(key, type(default)) if key in self.metadata else default

    def size(self, key: str, default: int | None = None) -> int:
        """A positive whole number among the architecture's keys, e.g. "block_count".

        Raises:
            UserError: the key is missing and has no default, or it holds no positive number.

        """
        full_key = f"{self.arch}.{key}"
        size = self.require(full_key, int) if default is None else self.optional(full_key, default)
        if not 0 < size < 1 << 31:
            self.fail(f"key {quoted(full_key)} is {size}, which is not possible")
        return size

    @property
    def arch(self) -> str:
        """The model family, e.g. "llama"."""
        return self.require("general.architecture", str)

    @property
    def L(self) -> int:
        """Layers."""
        return self.size("block_count")

    @property
    def C(self) -> int:
        """Hidden size."""
        return self.size("embedding_length")

    @property
    def H(self) -> int:
        """Query heads."""
        return self.size("attention.head_count")

    @property
    def G(self) -> int:
        """Key/value heads."""
        return self.size("attention.head_count_kv", self.H)

    @property
    def D(self) -> int:
        """Head size, of keys and values alike."""
        return self.size("attention.key_length", self.C // self.H)

    @property
    def F(self) -> int:
        """Feed-forward size."""
        return self.size("feed_forward_length")

    @property
    def V(self) -> int:
        """Size of the vocabulary: the rows of the token embedding."""
        if TOKEN_EMBEDDING not in self.tensors:
            self.fail("tensor 'token_embd.weight' is missing")
        return self.tensors[TOKEN_EMBEDDING].shape[0]

    @property
    def context_length(self) -> int:
        """Tokens that the model was made for."""
        return self.size("context_length")

    @property
    def rope_freq_base(self) -> float:
        """Base of the rotary frequencies."""
        return self.optional(f"{self.arch}.rope.freq_base", 10000.0)

    @property
    def rope_scaling_factor(self) -> float:
        """Positions are divided by this; 1 where they are not scaled."""
        if self.optional(f"{self.arch}.rope.scaling.type", "linear") == "none":
            return 1.0
        legacy = self.optional(f"{self.arch}.rope.scale_linear", 0.0)
        return self.optional(f"{self.arch}.rope.scaling.factor", legacy) or 1.0

    @property
    def rms_eps(self) -> float:
        """Epsilon of the RMS norms."""
        return self.require(f"{self.arch}.attention.layer_norm_rms_epsilon", float)

    @property
    def tied_head(self) -> bool:
        """Whether the token embedding also is the output matrix."""
        return "output.weight" not in self.tensors


def read_gguf(path: str | Path) -> ModelFile:
    """Read the header of any GGUF file, a model or an adapter.

    Raises:
        UserError: not a readable file, not GGUF of version 2 or 3, or any fault in its structure.

    """
    path = Path(path)
    header = read_header(path)
    return ModelFile(
        path, header.version, header.alignment, header.metadata, header.key_types, header.tensors
    )


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
        UserError: an adapter, a part of a split model, an unsupported architecture, setting, tensor or type,
            sizes that do not agree, or a vocabulary that does not fit.

    """
    kind = model.optional("general.type", "model")
    if kind != "model":
        model.fail(f"holds an {quoted(kind)}, not a model")
    if model.optional("split.count", 1) > 1:
        model.fail("is one part of a split model; join the parts first (llama-gguf-split --merge)")
    if model.arch not in SUPPORTED_ARCHS:
        model.fail(
            f"architecture {quoted(model.arch)} is not supported; supported: {', '.join(SUPPORTED_ARCHS)}"
        )
    _check_hyperparameters(model)
    _check_tensors(model, SUPPORTED_ARCHS[model.arch])
    check_tokenizer(model)


def _check_hyperparameters(model: ModelFile) -> None:
    arch = model.arch
    if model.L > MAX_LAYERS:
        model.fail(f"key '{arch}.block_count' is {model.L}; at most {MAX_LAYERS} layers are supported")
    if model.H % model.G:
        model.fail(f"{model.H} query heads cannot share {model.G} key/value heads evenly")
    if f"{arch}.attention.key_length" not in model.metadata and model.C % model.H:
        model.fail(f"hidden size {model.C} is not divisible by its {model.H} heads")
    for key, default in (("attention.value_length", model.C // model.H), ("rope.dimension_count", model.D)):
        size = model.size(key, default)
        if size != model.D:
            model.fail(
                f"key '{arch}.{key}' is {size}; only the head size of the keys, {model.D}, is supported"
            )
    if model.D % 2:
        model.fail(f"head size {model.D} is odd; rotary embedding needs pairs")
    if not 0 < model.rms_eps < 1:
        model.fail(f"key '{arch}.attention.layer_norm_rms_epsilon' is {model.rms_eps}, which is not possible")
    if not model.rope_freq_base >= 1:
        model.fail(f"key '{arch}.rope.freq_base' is {model.rope_freq_base}, which is not possible")
    scaling = model.optional(f"{arch}.rope.scaling.type", "linear")
    if scaling not in ("none", "linear"):
        model.fail(f"RoPE scaling {quoted(scaling)} is not supported; supported: none, linear")
    if not model.rope_scaling_factor > 0:
        model.fail(f"key '{arch}.rope.scaling.factor' is {model.rope_scaling_factor}, which is not possible")
    for key, neutral in _NEUTRAL_SETTINGS.items():
        value = model.optional(f"{arch}.{key}", neutral)
        if value != neutral:
            model.fail(f"key '{arch}.{key}' is {value}; only {neutral} is supported")
    model.size("context_length")  # raises if it is missing or impossible


def _expected_tensors(model: ModelFile, arch: Architecture) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor that the model must or may have; those it may have only if it does."""
    sizes = {
        "V": model.V,
        "C": model.C,
        "F": model.F,
        "HD": model.H * model.D,
        "GD": model.G * model.D,
        "D/2": model.D // 2,
    }
    for name, letters in arch.required_tensors.items():
        yield name, tuple(sizes[letter] for letter in letters)
    for name, letters in arch.optional_tensors.items():
        if name in model.tensors:
            yield name, tuple(sizes[letter] for letter in letters)
    for layer in range(model.L):
        for name, letters in arch.layer_tensors.items():
            yield layer_tensor(layer, name), tuple(sizes[letter] for letter in letters)


def _check_tensors(model: ModelFile, arch: Architecture) -> None:
    known = set()
    for name, shape in _expected_tensors(model, arch):
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

    A file without any vocabulary passes: it can be computed with, but not be given text.

    Raises:
        UserError: an unsupported kind of tokenizer, arrays of different lengths or wrong types, a token that
            occurs twice, a special token past the vocabulary, or another size than the embedding's.

    """
    vocab_size = model.optional(f"{model.arch}.vocab_size", model.V)
    if vocab_size != model.V:
        model.fail(f"key '{model.arch}.vocab_size' is {vocab_size}, but the embedding has {model.V} rows")
    if "tokenizer.ggml.model" not in model.metadata and "tokenizer.ggml.tokens" not in model.metadata:
        return
    kind = model.require("tokenizer.ggml.model", str)
    if kind not in SUPPORTED_TOKENIZERS:
        model.fail(f"tokenizer {quoted(kind)} is not supported; supported: {', '.join(SUPPORTED_TOKENIZERS)}")
    if kind in TOKENIZERS_WITHOUT_VOCABULARY:
        return
    tokens = _strings(model, "tokenizer.ggml.tokens")
    if len(tokens) != model.V:
        model.fail(f"its vocabulary has {len(tokens)} tokens, but the token embedding has {model.V} rows")
    # llama.cpp gives an empty token such a name of its own, and aborts if two tokens are the same.
    texts = {text or b"[EMPTY_%d]" % index for index, text in enumerate(tokens.iter_raw())}
    if len(texts) != len(tokens):
        model.fail("its vocabulary holds the same token twice")
    for key, types in (("scores", ("arr[f32]",)), ("token_type", ("arr[i32]",))):
        _check_token_array(model, f"tokenizer.ggml.{key}", types, len(tokens))
    if kind == "gpt2":
        _strings(model, "tokenizer.ggml.merges")
    else:
        missing = [byte for byte in range(256) if not {b"<0x%02X>" % byte, bytes([byte])} & texts]
        if missing:
            model.fail(f"its SentencePiece vocabulary has no token for byte 0x{missing[0]:02X}")
    for key in model.metadata:
        if key.startswith("tokenizer.ggml.") and key.endswith("_token_id"):
            token = model.require(key, int)
            if not 0 <= token < len(tokens):
                model.fail(f"key {quoted(key)} is {token}, outside of the vocabulary of {len(tokens)} tokens")


def _strings(model: ModelFile, key: str) -> StringArray:
    if key not in model.metadata:
        model.fail(f"key '{key}' is missing")
    value = model.metadata[key]
    if not isinstance(value, StringArray):
        model.fail(f"key '{key}' is of type {model.key_types[key]}, expected an array of strings")
    return value


def _check_token_array(model: ModelFile, key: str, types: tuple[str, ...], n_tokens: int) -> None:
    """A key that holds one number a token, if it is there at all."""
    if key not in model.metadata:
        return
    value = model.metadata[key]
    if model.key_types[key] not in types or not isinstance(value, np.ndarray):
        model.fail(f"key '{key}' is of type {model.key_types[key]}, expected {types[0]}")
    if len(value) != n_tokens:
        model.fail(f"key '{key}' has {len(value)} entries for {n_tokens} tokens")
    if not np.isfinite(value.astype(np.float32)).all():
        model.fail(f"key '{key}' holds NaN or infinite values")


def file_sha256(path: str | Path) -> str:
    """The SHA-256 of a file's bytes as 64 hexadecimal digits.

    Raises:
        UserError: it cannot be read.

    """
    digest = hashlib.sha256()
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    return digest.hexdigest()
