"""The identity gate: before a conversion starts, the engine must compute the base model as llama.cpp does.

At causal ratio 1 with no adapter the engine *is* the base model; if its predictions on a plain English
sentence differ from llama.cpp's, then training would adapt a model that does not exist. llama.cpp runs in a
child process: it aborts on files that it does not like, and its memory is given back. It maps the weights and
repacks nothing (`use_extra_bufts = false`), so that a large model is not held twice.

Deliberately not here: close comparisons (tests/ has them); llama.cpp quantises activations, which alone is
3e-3 nats on a Q4_1 model, and the gate is there to catch a wrong computation, not a rounding.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggml_diffusion.child import Child
from ggml_diffusion.engine.interface import Batch, Engine
from ggml_diffusion.errors import UserError
from ggml_diffusion.generation.sampling import log_softmax
from ggml_diffusion.text.tokenizer import Tokenizer

SENTENCE = (
    "The old lighthouse keeper climbed the stairs every evening, lit the lamp, and wrote the weather of the "
    "day into a book that nobody had ever asked to read."
)
MEAN_KL_LIMIT = (
    0.05  # nats; rounding gives 3e-3 on a 4-bit model, a wrong RoPE or a swapped tensor gives whole nats
)
CHILD_TIMEOUT_S = 1800.0  # a model that is read from a slow disk for the first time


@dataclass(frozen=True)
class IdentityReport:
    """Mean KL(llama.cpp || engine) in nats over `n_tokens` positions of the built-in sentence."""

    mean_kl: float
    n_tokens: int

    def __str__(self) -> str:
        return (
            f"identity gate passed: mean KL from llama.cpp {self.mean_kl:.1e} nats over {self.n_tokens} "
            f"tokens (limit {MEAN_KL_LIMIT})"
        )


def check_identity(model: Engine, tokenizer: Tokenizer) -> IdentityReport:
    """Compare the engine with llama.cpp on the built-in sentence.

    Raises:
        UserError: llama.cpp cannot run the file, or the two differ by more than `MEAN_KL_LIMIT`.

    """
    tokens = _sentence_tokens(tokenizer, model.file.context_length)
    reference = llama_logits(model.file.path, tokens, model.n_threads)
    if not np.isfinite(reference).all():
        raise UserError(
            f"{model.file.path}: its weights give NaN or infinite logits, in llama.cpp too: it is damaged"
        )
    mean_kl = mean_kl_divergence(reference, model.logits(Batch(tokens[None]))[0])
    if not mean_kl <= MEAN_KL_LIMIT:  # written so that NaN fails
        raise UserError(
            f"{model.file.path}: this program computes the model differently from llama.cpp (mean KL "
            f"{mean_kl:.3g} nats over {len(tokens)} tokens, limit {MEAN_KL_LIMIT}), so it will not train it; "
            f"please report the model"
        )
    return IdentityReport(mean_kl, len(tokens))


def mean_kl_divergence(reference: NDArray[np.float32], ours: NDArray[np.float32]) -> float:
    """Mean over positions of KL(reference || ours) in nats, from logits (T, V)."""
    # a position at a time: in float64 a few copies of (T, V) are more than a small model with 262,144 tokens
    divergences = []
    for row, our_row in zip(reference, ours, strict=True):
        log_p, log_q = log_softmax(row[None]), log_softmax(our_row[None])
        divergences.append((np.exp(log_p) * (log_p - log_q)).sum())
    return float(np.mean(divergences))


def _sentence_tokens(tokenizer: Tokenizer, context_length: int) -> NDArray[np.int32]:
    tokens = tokenizer.encode(SENTENCE)
    if tokenizer.bos_id is not None:  # models that were trained with it are not themselves without it
        tokens = np.concatenate([np.array([tokenizer.bos_id], dtype=np.int32), tokens])
    return np.ascontiguousarray(tokens[:context_length], dtype=np.int32)


def llama_logits(path: Path, tokens: NDArray[np.int32], n_threads: int) -> NDArray[np.float32]:
    """Causal logits (T, V) of llama.cpp on a GGUF file, computed in a child process.

    Raises:
        UserError: llama.cpp cannot run the file, or died of it; the message holds what it said.

    """
    argument = {"path": str(path), "tokens": tokens.tolist(), "n_threads": n_threads}
    with Child(
        _Logits, json.dumps(argument).encode(), f"{path}: llama.cpp", time_limit_s=CHILD_TIMEOUT_S * n_threads
    ) as child:
        n_bytes_row = len(child.hello) // len(tokens)
        if len(child.hello) != len(tokens) * n_bytes_row or n_bytes_row % 4 or not n_bytes_row:
            raise UserError(f"{path}: llama.cpp gave an answer that makes no sense")
        return np.frombuffer(child.hello, np.float32).reshape(len(tokens), -1)


class _Logits:
    """Lives in the child: all that is asked comes with its start."""

    def __init__(self, argument: bytes) -> None:
        job = json.loads(argument)
        tokens = np.array(job["tokens"], dtype=np.int32)
        opened = open_llama(os.fsencode(job["path"]), len(tokens), job["n_threads"])
        self.hello = logits_in_context(*opened, tokens).tobytes()

    def answer(self, request: bytes) -> bytes:
        raise ValueError("there is nothing to ask")


def open_llama(
    path: str | bytes, n_tokens: int, n_threads: int, *, exact: bool = False
) -> tuple[Any, Any, Any]:
    """llama.cpp's C API, a model and a context for that many tokens, on the CPU; for a child process.

    Args:
        path: of the GGUF.
        n_tokens: of the longest text.
        n_threads: that compute.
        exact: keys and values in float32, as they are rounded nowhere but in the weights' products.

    Raises:
        RuntimeError: llama.cpp loads no model from the file, or has no context of that size.

    """
    import llama_cpp

    api: Any = llama_cpp
    model_params = api.llama_model_default_params()
    model_params.n_gpu_layers = 0
    model_params.use_extra_bufts = False  # no second, repacked copy of the weights
    model = api.llama_model_load_from_file(os.fsencode(path), model_params)
    if not model:
        raise RuntimeError("cannot run this model: the file does not load")
    params = api.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = max(n_tokens, 32)
    params.n_threads = params.n_threads_batch = n_threads
    if exact:
        params.type_k = params.type_v = 0  # F32
        params.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = api.llama_init_from_model(model, params)
    if not context:
        raise RuntimeError("has no context of that size")
    return api, model, context


def logits_in_context(api: Any, model: Any, context: Any, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
    """Logits (T, V) of T tokens from position 0 on, whatever the context held; from what `open_llama` gave.

    Raises:
        RuntimeError: llama.cpp failed.

    """
    api.llama_memory_clear(api.llama_get_memory(context), True)
    batch = api.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for position, token in enumerate(tokens):
        batch.token[position] = int(token)
        batch.pos[position] = position
        batch.n_seq_id[position] = 1
        batch.seq_id[position][0] = 0
        batch.logits[position] = 1
    failed = api.llama_decode(context, batch) != 0
    api.llama_batch_free(batch)
    if failed:
        raise RuntimeError("failed at the sentence")
    vocabulary = api.llama_vocab_n_tokens(api.llama_model_get_vocab(model))
    return np.array(np.ctypeslib.as_array(api.llama_get_logits(context), shape=(len(tokens), vocabulary)))
