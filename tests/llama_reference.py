"""llama.cpp as a second opinion: its logits on a GGUF, through llama-cpp-python's low-level API.

llama.cpp runs in a child process: libllama aborts on what it does not like, and keeps its own threads and
log. It never sees the engine, and computes as exactly as it can: KV cache in float32, no flash attention, no
repacked weights, the whole sequence in one micro-batch (a non-causal pass needs that).

Source: llama.cpp `include/llama.h`; `llama_set_causal_attn` and `llama_batch.embd` are what it offers for
bidirectional inference and for input embeddings.

usage in the child: llama_reference.py REQUEST.npz RESPONSE.npz
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int32]


@dataclass(frozen=True)
class Request:
    """One forward pass: `inputs` are token ids (T,) int32 or input embeddings (T, C) float32."""

    inputs: IntArray | FloatArray
    causal: bool = True
    adapter: Path | None = None  # a GGUF LoRA adapter, applied at scale 1


def llama_logits(
    model: Path,
    requests: Sequence[Request],
    *,
    n_threads: int = 2,
    kv_type: str = "f32",
    n_ctx: int | None = None,
) -> list[FloatArray]:
    """Logits (T, V) float32 of each request; the model is loaded once.

    kv_type: "f32" or "f16". n_ctx: tokens of the context, those of the longest request if None; llama.cpp
    rounds them up to a multiple of 256, and chooses long or short RoPE factors by them.
    """
    arrays = {f"inputs_{i}": request.inputs for i, request in enumerate(requests)}
    options = {
        "task": "logits",
        "model": str(model),
        "n_threads": n_threads,
        "kv_type": kv_type,
        "n_ctx": n_ctx,
        "causal": [request.causal for request in requests],
        "adapters": [str(request.adapter) if request.adapter else None for request in requests],
    }
    response = _run_child(options, arrays)
    return [response[f"logits_{i}"] for i in range(len(requests))]


def llama_tokens(model: Path, text: str) -> IntArray:
    """Token ids (T,) int32 of a text, with no BOS and no special tokens parsed."""
    return _run_child({"task": "tokens", "model": str(model), "text": text}, {})["tokens"]


def _run_child(options: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    with tempfile.TemporaryDirectory() as folder:
        request, response = Path(folder) / "request.npz", Path(folder) / "response.npz"
        np.savez(request, options=np.array(json.dumps(options)), **arrays)  # type: ignore[arg-type]
        child = subprocess.run(
            [sys.executable, __file__, str(request), str(response)],
            capture_output=True,
            text=True,
            check=False,
        )
        if child.returncode != 0:
            raise RuntimeError(
                f"llama.cpp failed on {options['model']} ({child.returncode}):\n{child.stderr}"
            )
        with np.load(response) as loaded:
            return dict(loaded)


# -- the child ----------------------------------------------------------------------------------


class _Llama:
    """A model and a context of llama.cpp, held by their C handles."""

    def __init__(self, path: str, n_threads: int, kv_type: str, n_tokens: int) -> None:
        import llama_cpp

        self.api: Any = llama_cpp
        model_params = self.api.llama_model_default_params()
        model_params.n_gpu_layers = 0
        model_params.use_extra_bufts = False  # no second, repacked copy of the weights
        self.model = self.api.llama_model_load_from_file(path.encode(), model_params)
        if not self.model:
            raise RuntimeError("the model does not load")
        params = self.api.llama_context_default_params()
        params.n_ctx = params.n_batch = params.n_ubatch = max(n_tokens, 32)
        params.n_threads = params.n_threads_batch = n_threads
        params.type_k = params.type_v = {"f32": 0, "f16": 1}[kv_type]
        params.flash_attn_type = self.api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.context = self.api.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError("no context")
        self.vocabulary_size = self.api.llama_vocab_n_tokens(self.api.llama_model_get_vocab(self.model))
        self.adapters: dict[str, Any] = {}

    def set_adapter(self, path: str | None) -> None:
        if path is None:
            self.api.llama_set_adapters_lora(self.context, None, 0, None)
            return
        if path not in self.adapters:
            self.adapters[path] = self.api.llama_adapter_lora_init(self.model, path.encode())
        if not self.adapters[path]:
            raise RuntimeError(f"the adapter {path} does not load")
        handles = (self.api.llama_adapter_lora_p_ctypes * 1)(self.adapters[path])
        if self.api.llama_set_adapters_lora(self.context, handles, 1, (ctypes.c_float * 1)(1.0)) != 0:
            raise RuntimeError(f"the adapter {path} does not fit")

    def logits(self, inputs: NDArray[Any], causal: bool) -> FloatArray:
        n_tokens = len(inputs)
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        self.api.llama_set_causal_attn(self.context, causal)
        batch = self.api.llama_batch_init(n_tokens, inputs.shape[1] if inputs.ndim == 2 else 0, 1)
        try:
            batch.n_tokens = n_tokens
            source = np.ascontiguousarray(inputs, dtype=np.float32 if inputs.ndim == 2 else np.int32)
            ctypes.memmove(batch.embd if inputs.ndim == 2 else batch.token, source.ctypes.data, source.nbytes)
            for i in range(n_tokens):
                batch.pos[i] = i
                batch.n_seq_id[i] = 1
                batch.seq_id[i][0] = 0
                batch.logits[i] = 1
            if self.api.llama_decode(self.context, batch) != 0:
                raise RuntimeError("llama_decode failed")
            result = np.ctypeslib.as_array(
                self.api.llama_get_logits(self.context), shape=(n_tokens, self.vocabulary_size)
            )
            return np.array(result, dtype=np.float32)
        finally:
            self.api.llama_batch_free(batch)


def _child_logits(options: dict[str, Any], arrays: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    inputs = [arrays[f"inputs_{i}"] for i in range(len(options["causal"]))]
    longest = max(len(one) for one in inputs)
    llama = _Llama(options["model"], options["n_threads"], options["kv_type"], options["n_ctx"] or longest)
    results: dict[str, NDArray[Any]] = {}
    for i, one in enumerate(inputs):
        llama.set_adapter(options["adapters"][i])
        results[f"logits_{i}"] = llama.logits(one, options["causal"][i])
    return results


def _child_tokens(options: dict[str, Any]) -> dict[str, NDArray[Any]]:
    import llama_cpp

    llama = llama_cpp.Llama(options["model"], vocab_only=True, verbose=False)
    tokens = llama.tokenize(options["text"].encode(), add_bos=False, special=False)
    return {"tokens": np.array(tokens, dtype=np.int32)}


def _child(request: str, response: str) -> None:
    with np.load(request) as loaded:
        arrays: dict[str, NDArray[Any]] = dict(loaded)
    options = json.loads(str(arrays.pop("options")))
    results = _child_tokens(options) if options["task"] == "tokens" else _child_logits(options, arrays)
    np.savez(response, **results)  # type: ignore[arg-type]


if __name__ == "__main__":
    _child(sys.argv[1], sys.argv[2])
