"""Write a tiny random GGUF of any dense architecture, one that llama.cpp loads: the models of the test suite.

The network is neither dead nor chaotic (tiny_architectures.py), so that a KL divergence between two
implementations says something. The vocabulary (tiny_vocabularies.py) really tokenises English. Weights are
random: Q and K rows are taken to be in GGUF's order already.

It does not train anything, and it does not check that the result is supported: a test may ask for odd files.

Sources: gguf-py's GGUFWriter for the container, ggml's public `ggml_quantize_chunk` for every tensor type
(gguf-py cannot quantise K types).

usage: make_tiny_gguf.py OUT.gguf [--arch gemma3] [--type Q4_0] [--tokenizer spm] [--L 2] [--C 64] ...
       [--tied] [--rope-freqs] [--fused-qkv] [--biases attn_q,attn_k] [--keys '{"rope.scaling.type": "yarn"}']
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import json
import sys
from collections.abc import Collection, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.gguf_writer import GGUFValue
from numpy.typing import NDArray
from tiny_architectures import ARCHITECTURES, Shape, random_weights, rope_factors
from tiny_vocabularies import TOKENIZERS, Vocabulary, make_vocabulary

from ggml_diffusion.formats.tensor_types import SUPPORTED_TYPES

FloatArray = NDArray[np.float32]

# All that the engine reads but Q2_0, which the gguf package does not know yet.
TENSOR_TYPES = tuple(name for name in SUPPORTED_TYPES if name in gguf.GGMLQuantizationType.__members__)
# Types whose quantisation asks how much each column matters; here all matter the same.
IMPORTANCE_TYPES = ("IQ1_S", "IQ2_XXS", "IQ2_XS")


@cache
def _ggml() -> ctypes.CDLL:
    """The ggml library inside llama-cpp-python, found without importing (and so initialising) llama.cpp."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or not spec.submodule_search_locations:
        raise RuntimeError("llama-cpp-python is not installed: its ggml library quantises the tensors")
    name = {"darwin": "libggml-base.dylib", "win32": "ggml-base.dll"}.get(sys.platform, "libggml-base.so")
    library = ctypes.CDLL(str(Path(spec.submodule_search_locations[0]) / "lib" / name))
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    library.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_void_p,
    ]
    return library


def quantise(array: FloatArray, type_name: str) -> NDArray[np.uint8]:
    """Bytes (rows, bytes a row) of a float32 matrix in a ggml type, rounded as ggml itself does."""
    tensor_type = gguf.GGMLQuantizationType[type_name]
    block, bytes_block = gguf.GGML_QUANT_SIZES[tensor_type]
    rows, columns = array.shape
    if columns % block:
        raise ValueError(f"{type_name} needs rows in multiples of {block}, these have {columns}")
    source = np.ascontiguousarray(array, dtype=np.float32)
    result = np.zeros((rows, columns // block * bytes_block), dtype=np.uint8)
    importance = np.ones(columns, dtype=np.float32) if type_name in IMPORTANCE_TYPES else None
    written = _ggml().ggml_quantize_chunk(
        int(tensor_type),
        source.ctypes.data,
        result.ctypes.data,
        0,
        rows,
        columns,
        None if importance is None else importance.ctypes.data,
    )
    if written != result.nbytes:
        raise RuntimeError(f"ggml wrote {written} bytes of {type_name}, {result.nbytes} were expected")
    return result


def _add_metadata(writer: gguf.GGUFWriter, vocabulary: Vocabulary, **h: Any) -> None:
    # no digits: in a file whose name has "phi3" llama.cpp looks for tokens of Phi's own vocabulary
    writer.add_name(vocabulary.name or "tiny random " + writer.arch.rstrip("0123456789"))
    writer.add_block_count(h["L"])
    writer.add_context_length(h["context"])
    writer.add_embedding_length(h["C"])
    writer.add_feed_forward_length(h["F"])
    writer.add_head_count(h["H"])
    writer.add_head_count_kv(h["G"])
    writer.add_key_length(h["D"])
    writer.add_value_length(h["D"])
    writer.add_rope_dimension_count(h["D"])
    writer.add_rope_freq_base(h["rope_base"])
    writer.add_layer_norm_rms_eps(h["eps"])
    writer.add_vocab_size(h["V"])
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    else:
        writer.add_token_scores(vocabulary.scores)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    for role, token in vocabulary.ids.items():
        writer.add_uint32(f"tokenizer.ggml.{role}_token_id", token)
    if vocabulary.add_bos is not None:
        writer.add_add_bos_token(vocabulary.add_bos)
    if vocabulary.add_space_prefix is not None:
        writer.add_add_space_prefix(vocabulary.add_space_prefix)
    if vocabulary.chat_template is not None:
        writer.add_chat_template(vocabulary.chat_template)


def _set_key(writer: gguf.GGUFWriter, name: str, value: Any) -> None:
    """Set a key, in its place if it is there: numbers as uint32 and float32. None takes the key away."""
    kinds = {bool: "BOOL", int: "UINT32", float: "FLOAT32", str: "STRING"}
    values = writer.kv_data[0]
    if value is None:
        values.pop(name, None)
    elif isinstance(value, list | tuple):
        element = gguf.GGUFValueType[kinds[type(value[0])]]
        values[name] = GGUFValue(list(value), gguf.GGUFValueType.ARRAY, sub_type=element)
    else:
        values[name] = GGUFValue(value, gguf.GGUFValueType[kinds[type(value)]])


def make_tiny_gguf(
    path: str | Path,
    *,
    arch: str = "llama",
    type: str = "F32",
    overrides: Mapping[str, str] | None = None,
    seed: int = 0,
    L: int | None = None,
    C: int = 64,
    H: int = 4,
    G: int = 2,
    D: int | None = None,
    F: int = 96,
    V: int = 384,
    tied: bool | None = None,
    biases: Collection[str] | None = None,
    fused_qkv: bool | None = None,
    rope_freqs: bool = False,
    rope_base: float | None = None,
    eps: float = 1e-5,
    context: int = 512,
    keys: Mapping[str, Any] | None = None,
    tokenizer: str = "bpe",
    reserved: int = 6,
    tensors_a_part: int = 0,
) -> Path:
    """Write a random GGUF and return its path. What is None is as the architecture usually has it.

    arch: one of ARCHITECTURES, with the keys and the tensors that its entry names.
    type: the ggml type of every matrix (embedding and head too); norms, biases and RoPE factors are F32.
    overrides: types of single matrices, for example {"token_embd": "Q8_0", "attn_v": "Q6_K"}.
    L: layers. D: head size, C // H by default. C, H * D and F are multiples of the type's block.
    tied: no output.weight: the head reads the embedding.
    biases: projections with a bias, for example ("attn_q", "ffn_down"), and "output" for that of the head.
    fused_qkv: one tensor attn_qkv for the three projections.
    rope_freqs: with frequency factors, as Llama 3.1; long and short ones come with the scaling "longrope".
    keys: keys without the architecture's prefix, for example {"attention.sliding_window": 16}, over those of
    the entry; None takes one away.
    tokenizer: "bpe" (byte-level, as GPT-2) or "spm" (as Llama 2), with some `reserved` control tokens, or one
    of tiny_vocabularies.FAMILIES.
    tensors_a_part: write files NAME-00001-of-0000N.gguf with so many tensors each; 0: one file.
    The same arguments give the same bytes. ValueError: a size that the type or the vocabulary cannot have.
    """
    entry = ARCHITECTURES[arch]
    head_size = C // H if D is None else D
    shape = Shape(
        L=entry.L if L is None else L,
        C=C,
        H=H,
        G=G,
        D=head_size,
        F=F,
        V=V,
        tied=entry.tied if tied is None else tied,
    )
    changed = {"rope.dimension_count": int(head_size * entry.rotated), **entry.keys}
    if rope_base is not None:
        changed["rope.freq_base"] = rope_base
    changed.update(keys or {})
    weights = random_weights(
        entry,
        shape,
        seed=seed,
        biases=entry.biases if biases is None else biases,
        fused_qkv=entry.fused_qkv if fused_qkv is None else fused_qkv,
    )
    pairs = (changed["rope.dimension_count"] or head_size) // 2
    if rope_freqs:
        weights.update(rope_factors("llama3", pairs))
    if changed.get("rope.scaling.type") == "longrope":
        weights.update(rope_factors("longrope", pairs))

    writer = gguf.GGUFWriter(str(path), arch, split_max_tensors=tensors_a_part)
    sizes = {name: getattr(shape, name) for name in "LCFHGDV"}
    vocabulary = make_vocabulary(tokenizer, V, reserved)
    _add_metadata(writer, vocabulary, context=context, rope_base=rope_base or 10000.0, eps=eps, **sizes)
    for name, value in changed.items():
        _set_key(writer, f"{arch}.{name}", value)
    _write(writer, weights, type, overrides or {})
    return Path(path)


def _write(
    writer: gguf.GGUFWriter, weights: Mapping[str, FloatArray], type_name: str, overrides: Mapping[str, str]
) -> None:
    """Add the tensors, matrices packed and vectors in float32, and write the file."""
    for name, array in weights.items():
        if array.ndim == 1:
            writer.add_tensor(name, array)
            continue
        packed_type = overrides.get(name.removesuffix(".weight").rsplit(".", 1)[-1], type_name)
        writer.add_tensor(
            name, quantise(array, packed_type), raw_dtype=gguf.GGMLQuantizationType[packed_type]
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """Write one file as the command line says."""
    parser = argparse.ArgumentParser(description="Write a tiny random GGUF.")
    parser.add_argument("path", type=Path)
    parser.add_argument("--arch", choices=ARCHITECTURES, default="llama")
    parser.add_argument("--type", choices=TENSOR_TYPES, default="F32")
    parser.add_argument("--tokenizer", choices=TOKENIZERS, default="bpe")
    for name, default in {
        "seed": 0,
        "C": 64,
        "H": 4,
        "G": 2,
        "F": 96,
        "V": 384,
        "context": 512,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--L", type=int, help="layers (as many as the architecture's pattern needs)")
    parser.add_argument("--D", type=int, help="head size (C / H by default)")
    parser.add_argument("--tied", action="store_true", default=None)
    parser.add_argument("--rope-freqs", action="store_true")
    parser.add_argument("--fused-qkv", action="store_true", default=None)
    parser.add_argument("--biases", type=lambda text: tuple(text.split(",")), help="attn_q,attn_k,...")
    parser.add_argument("--keys", type=json.loads, help="a JSON object of keys without the prefix")
    make_tiny_gguf(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
