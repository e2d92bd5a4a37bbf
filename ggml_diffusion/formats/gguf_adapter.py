"""LoRA adapters as GGUF files, the form that llama.cpp loads beside its base model.

Written: the LoRA pairs as they are (stacked where the base has projections in one tensor, fused_lora.py), and
everything else that was trained as keys named "ggml_diffusion.*", which other programs ignore. llama.cpp can
also be given the mask embedding: A = one-hot(mask token), B = the embedding, as a pair for
`token_embd.weight`. Only where the head is untied, though: with a tied head llama.cpp would look the same
pair up for the output matrix and abort, so there the mask embedding is in the keys alone.

Deliberately not here: what the "ggml_diffusion.*" keys mean (adapter_file.py), adapters on other tensors
than the seven projections, merging. Source: llama.cpp, src/llama-adapter.cpp and build_inp_embd in
src/llama-graph.cpp. Letters: C hidden size, V vocabulary, R rank.
"""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from gguf import GGUFWriter
from gguf.constants import GGMLQuantizationType, GGUFType, GGUFValueType
from gguf.quants import dequantize
from numpy.typing import NDArray

from ggml_diffusion.durable import replace_file
from ggml_diffusion.errors import UserError, quoted
from ggml_diffusion.formats.fused_lora import layout_of, read_layout, stack_pairs, unstack_pairs, write_layout
from ggml_diffusion.formats.gguf_reader import TensorInfo
from ggml_diffusion.formats.lora import LoraAdapter, lora_ranks
from ggml_diffusion.formats.model_file import ModelFile, read_gguf
from ggml_diffusion.formats.tensor_names import (
    LORA_A_SUFFIX,
    LORA_B_SUFFIX,
    MASK_EMBEDDING,
    TOKEN_EMBEDDING,
)
from ggml_diffusion.regular_file import open_regular

KEY_PREFIX = "ggml_diffusion."
_ALPHA_KEY = "adapter.lora.alpha"
_FUSED_KEY = KEY_PREFIX + "fused"
_MASK_TOKEN_KEY = KEY_PREFIX + "mask_token_id"
_MASK_EMBEDDING_KEY = KEY_PREFIX + MASK_EMBEDDING

KeyValue = bool | int | float | str | NDArray[np.float32]


def write_gguf_adapter(
    path: Path, adapter: LoraAdapter, base: ModelFile, keys: Mapping[str, KeyValue]
) -> None:
    """Write an adapter so that the file is whole or not there.

    Args:
        path: where to.
        adapter: must fit `base`; its mask token and mask embedding become keys of their own.
        base: the model it was trained on; decides about the architecture and the `token_embd` pair.
        keys: what else to keep, as "ggml_diffusion.<name>"; arrays are flattened.

    Raises:
        UserError: the adapter does not fit the base, its alpha is 0, or writing failed.

    """
    adapter.check(base)
    if adapter.alpha == 0:
        raise UserError(f"{path}: not written: with alpha 0 llama.cpp would apply the adapter unscaled")
    layout = layout_of(base, adapter.tensors)
    tensors = stack_pairs(adapter.tensors, layout)
    values = dict(keys)
    if layout:
        values["fused"] = write_layout(layout)
    if adapter.mask_token_id is not None:
        values["mask_token_id"] = adapter.mask_token_id
        if adapter.mask_embedding is not None:
            values[MASK_EMBEDDING] = adapter.mask_embedding
            if not base.tied_head:
                tensors |= _mask_pair(adapter.mask_embedding, adapter.mask_token_id, base.V, adapter.alpha)

    def write(temporary: Path) -> None:
        writer = GGUFWriter(temporary, base.arch)
        try:
            _add_keys(writer, adapter.alpha, base, values)
            for name, array in sorted(tensors.items()):  # one order, whatever the adapter came from
                writer.add_tensor(name, array)
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()
        read_gguf(temporary)  # a file that could not be read back must not take the place of one that can

    replace_file(path, write)


def _add_keys(writer: GGUFWriter, alpha: float, base: ModelFile, values: Mapping[str, KeyValue]) -> None:
    writer.add_type(GGUFType.ADAPTER)
    writer.add_string("adapter.type", "lora")
    writer.add_float32(_ALPHA_KEY, alpha)
    writer.add_uint32("general.base_model.count", 1)
    writer.add_string("general.base_model.0.name", base.optional("general.name", base.path.name))
    for name, value in values.items():
        key = KEY_PREFIX + name
        if isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint64(key, value)
        elif isinstance(value, float):
            writer.add_float64(key, value)
        elif isinstance(value, str):
            writer.add_string(key, value)
        else:
            numbers = np.ravel(value).tolist()
            writer.add_key_value(key, numbers, GGUFValueType.ARRAY, GGUFValueType.FLOAT32)


def _mask_pair(
    embedding: NDArray[np.float32], token: int, vocab_size: int, alpha: float
) -> dict[str, NDArray[np.float32]]:
    """The mask embedding as a rank-1 pair; for `token_embd` the roles are A (V, R) and B (C, R)."""
    one_hot = np.zeros((vocab_size, 1), dtype=np.float32)
    one_hot[token] = 1.0
    column = (embedding / np.float32(alpha)).reshape(-1, 1)  # llama.cpp scales the pair by alpha / 1
    return {TOKEN_EMBEDDING + LORA_A_SUFFIX: one_hot, TOKEN_EMBEDDING + LORA_B_SUFFIX: column}


def read_gguf_adapter(path: str | Path) -> tuple[LoraAdapter, ModelFile]:
    """Read any LoRA adapter for llama.cpp, ours or another's, and the header that it came with.

    Tensors of other types become float32. Without alpha, or with 0, llama.cpp scales by 1: that becomes alpha
    1 here, with R multiplied into B.

    Raises:
        UserError: not a GGUF LoRA adapter, or one that this package could not apply exactly as llama.cpp
        does.

    """
    file = read_gguf(path)
    kind, method = file.optional("general.type", "model"), file.optional("adapter.type", "lora")
    if kind != "adapter" or method != "lora":
        file.fail(f"holds a {quoted(kind if kind != 'adapter' else method)}, not a LoRA adapter")
    file.require("general.architecture", str)
    if file.key_types.get(_ALPHA_KEY, "f32") != "f32":
        file.fail(f"key '{_ALPHA_KEY}' is of type {file.key_types[_ALPHA_KEY]}, not f32")
    if "adapter.alora.invocation_tokens" in file.metadata:
        file.fail("is an activated LoRA (aLoRA), which is not supported")
    alpha = file.optional(_ALPHA_KEY, 0.0)
    tensors = {info.name: _read_tensor(file, info) for info in file.tensors.values()}
    mask_token, mask_embedding = _read_mask(file)
    _drop_mask_pair(file, tensors, mask_token, mask_embedding, alpha or 1.0)
    try:
        if _FUSED_KEY in file.metadata:
            tensors = unstack_pairs(tensors, read_layout(file.require(_FUSED_KEY, str)))
        ranks = lora_ranks(tensors)
    except UserError as error:
        file.fail(str(error).removeprefix("adapter: "))
    if alpha == 0.0:
        alpha = 1.0
        for weight, rank in ranks.items():
            tensors[weight + LORA_B_SUFFIX] *= np.float32(rank)
    return LoraAdapter(alpha, tensors, mask_token, mask_embedding), file


def _read_tensor(file: ModelFile, info: TensorInfo) -> NDArray[np.float32]:
    """A tensor of the file as C-contiguous float32."""
    with open_regular(file.path) as content:
        try:
            content.seek(info.offset_bytes)
            raw = content.read(info.n_bytes)
        except OSError as error:
            file.fail(f"cannot be read: {error.strerror}")
    if len(raw) != info.n_bytes:
        file.fail("has become shorter while it was read")
    rows = np.frombuffer(raw, np.uint8).reshape(*info.shape[:-1], -1)
    try:
        with np.errstate(all="ignore"):  # what is not finite is refused below
            values = dequantize(rows, GGMLQuantizationType[info.type_name])
    except (KeyError, NotImplementedError):
        file.fail(f"tensor {quoted(info.name)} has type {info.type_name}, which is not supported in adapters")
    array = np.array(values.reshape(info.shape), dtype=np.float32, order="C")
    if not np.isfinite(array).all():
        file.fail(f"tensor {quoted(info.name)} holds NaN or infinite values")
    return array


def _read_mask(file: ModelFile) -> tuple[int | None, NDArray[np.float32] | None]:
    """Mask token and mask embedding (C,), where the file has them."""
    if _MASK_TOKEN_KEY not in file.metadata:
        return None, None
    token = file.require(_MASK_TOKEN_KEY, int)
    if _MASK_EMBEDDING_KEY not in file.metadata:
        return token, None
    return token, float_array(file, _MASK_EMBEDDING_KEY)


def float_array(file: ModelFile, key: str) -> NDArray[np.float32]:
    """A key that holds finite float32 numbers, as an array of its own.

    Raises:
        UserError: it is missing or holds something else.

    """
    value = file.metadata.get(key)
    if file.key_types.get(key) != "arr[f32]" or not isinstance(value, np.ndarray):
        file.fail(f"key {quoted(key)} is {file.key_types.get(key, 'missing')}, expected an array of float32")
    array = value.astype(np.float32)
    if not np.isfinite(array).all():
        file.fail(f"key {quoted(key)} holds NaN or infinite values")
    return array


def _drop_mask_pair(
    file: ModelFile,
    tensors: dict[str, NDArray[np.float32]],
    mask_token: int | None,
    mask_embedding: NDArray[np.float32] | None,
    alpha: float,
) -> None:
    """Take the `token_embd` pair out of the tensors: it repeats what the keys say, or it is refused."""
    one_hot = tensors.pop(TOKEN_EMBEDDING + LORA_A_SUFFIX, None)
    column = tensors.pop(TOKEN_EMBEDDING + LORA_B_SUFFIX, None)
    if one_hot is None and column is None:
        return
    if one_hot is None or column is None or mask_token is None or mask_embedding is None:
        file.fail("adapts the token embedding, which is supported only for a mask token of ggml-diffusion")
    expected_shapes = one_hot.shape[1:] == (1,) and column.shape == (len(mask_embedding), 1)
    # Dividing by alpha and multiplying again rounds twice: 2 units in the last place.
    if (
        not expected_shapes
        or not np.array_equal(np.flatnonzero(one_hot), [mask_token])
        or one_hot[mask_token, 0] != 1
        or not np.allclose(column[:, 0] * np.float32(alpha), mask_embedding, rtol=3e-7, atol=1e-37)
    ):
        file.fail(f"its {TOKEN_EMBEDDING} pair is not the mask embedding that its keys hold")
