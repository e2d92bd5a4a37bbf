"""Logits of llama.cpp without a causal mask, of a file alone or of a base with its adapter, in a child.

Token ids go in, or embeddings (`llama_batch.embd`), which is how a mask or time embedding that no file holds
is given to llama.cpp. It computes as exactly as it can: all tokens in one micro-batch, as a pass without a
causal mask needs, and keys and values in float32.

Deliberately not here: what is compared with it (comparison.py, verify.py).
Source: llama.cpp, include/llama.h. Letters: T tokens, C hidden size, V vocabulary.
"""

import ctypes
import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggml_diffusion.child import Child
from ggml_diffusion.errors import UserError
from ggml_diffusion.training.identity import CHILD_TIMEOUT_S, open_llama


def bidirectional_logits(
    model: Path,
    inputs: NDArray[np.int32] | NDArray[np.float32],
    *,
    adapter: Path | None = None,
    attention_sink: bool = False,
    n_threads: int = 1,
) -> NDArray[np.float32]:
    """Logits (T, V) of a GGUF in llama.cpp, every token in sight of every other.

    Args:
        model: the GGUF.
        inputs: tokens (T,), or what goes in in place of their embeddings (T, C).
        adapter: a GGUF LoRA that `load_adapter` has read, since llama.cpp aborts on a bad one.
        attention_sink: the first token sees itself alone.
        n_threads: of llama.cpp.

    Raises:
        UserError: llama.cpp cannot run the file, or died of it; the message holds what it said.

    """
    job = {
        "path": str(model),
        "adapter": None if adapter is None else str(adapter),
        "shape": inputs.shape,
        "attention_sink": attention_sink,
        "n_threads": n_threads,
    }
    header = json.dumps(job).encode()
    argument = struct.pack("<I", len(header)) + header + np.ascontiguousarray(inputs).tobytes()
    limit_s = CHILD_TIMEOUT_S * n_threads
    with Child(_Logits, argument, f"{model}: llama.cpp", time_limit_s=limit_s) as child:
        logits = np.frombuffer(child.hello, np.float32)
    if not len(logits) or len(logits) % len(inputs):
        raise UserError(f"{model}: llama.cpp gave an answer that makes no sense")
    return logits.reshape(len(inputs), -1)


class _Logits:
    """Lives in the child: all that is asked comes with its start."""

    def __init__(self, argument: bytes) -> None:
        end = 4 + struct.unpack_from("<I", argument)[0]
        job = json.loads(argument[4:end])
        kind = np.int32 if len(job["shape"]) == 1 else np.float32
        inputs = np.frombuffer(argument, kind, offset=end).reshape(job["shape"])
        api, model, context = open_llama(os.fsencode(job["path"]), len(inputs), job["n_threads"], exact=True)
        if job["adapter"] is not None:
            _set_adapter(api, model, context, os.fsencode(job["adapter"]))
        parts = [inputs[:1], inputs[1:]] if job["attention_sink"] else [inputs]
        found, first = [], 0
        for part in parts:  # what is in the cache is in sight, what comes later is not
            found.append(_logits(api, model, context, part, first))
            first += len(part)
        self.hello = np.concatenate(found).tobytes()

    def answer(self, request: bytes) -> bytes:
        raise ValueError("there is nothing to ask")


def _set_adapter(api: Any, model: Any, context: Any, path: bytes) -> None:
    adapter = api.llama_adapter_lora_init(model, path)
    if not adapter:
        raise RuntimeError("does not load the adapter")
    handles = (api.llama_adapter_lora_p_ctypes * 1)(adapter)
    if api.llama_set_adapters_lora(context, handles, 1, (ctypes.c_float * 1)(1.0)):
        raise RuntimeError("does not take the adapter")


def _logits(api: Any, model: Any, context: Any, inputs: NDArray[Any], first: int) -> NDArray[np.float32]:
    n_tokens, inputs = len(inputs), np.ascontiguousarray(inputs)
    api.llama_set_causal_attn(context, False)
    batch = api.llama_batch_init(n_tokens, inputs.shape[1] if inputs.ndim == 2 else 0, 1)
    batch.n_tokens = n_tokens
    target = batch.embd if inputs.ndim == 2 else batch.token
    ctypes.memmove(target, inputs.ctypes.data, inputs.nbytes)
    for position in range(n_tokens):
        batch.pos[position] = first + position
        batch.n_seq_id[position] = 1
        batch.seq_id[position][0] = 0
        batch.logits[position] = 1
    if api.llama_decode(context, batch) != 0:
        raise RuntimeError("failed at the text")
    n_vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    return np.array(np.ctypeslib.as_array(api.llama_get_logits(context), shape=(n_tokens, n_vocab)))
