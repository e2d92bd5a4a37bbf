"""llama.cpp as an engine that writes: for its Metal, CUDA and Vulkan builds, through llama-cpp-python.

A file holds neither the time embedding nor, where the head is tied, the mask embedding. So llama.cpp is given
the sums of token, mask and time embeddings in place of tokens (`llama_batch.embd`), and the LoRA pairs as an
adapter of its own. An adapted context is a whole pass with the adapter, without a causal mask. With a frozen
one its own cache holds what stands, computed without adapter; noisy rows are computed behind it with it, and
taken away again.

What llama.cpp cannot do exactly is refused in a sentence: causal ratios between 0 and 1; and denoising over
a frozen context. There a token that stands and the noisy row in its place are both in sight, and text stands
behind a hole, while llama.cpp wants one row a position and no gap. What is only a draft (verified.py), and
checked by the base afterwards, goes over its cache all the same.

Deliberately not here: gradients, which llama.cpp does not compute; token rows, which the core reads.
Source: llama.cpp, include/llama.h and src/llama-batch.cpp of the copy in llama-cpp-python 0.3.36.
Letters: B sequences, T tokens, C hidden size, V vocabulary.
"""

import ctypes
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ggml_diffusion.engine.foreign_maps import forget, maps_of, watch
from ggml_diffusion.engine.interface import (
    Batch,
    Compute,
    ContextType,
    Int8,
    LossResult,
    StepDescription,
)
from ggml_diffusion.engine.open import open_engine
from ggml_diffusion.errors import UserError, one_line
from ggml_diffusion.formats.gguf_adapter import write_gguf_adapter
from ggml_diffusion.formats.lora import LoraAdapter
from ggml_diffusion.formats.model_check import window_of
from ggml_diffusion.formats.model_file import ModelFile
from ggml_diffusion.machine import memory_available, processors
from ggml_diffusion.units import in_bytes

_ERROR_LEVEL = 4  # GGML_LOG_LEVEL_ERROR
_CACHE = (
    "llama.cpp's cache cannot hold what this needs: it has one row a position and no gaps, where a frozen "
    "context has a token and the noisy row in its place. Only --verify runs; otherwise leave out --runtime"
)
_CAUSAL_ROWS = 512  # that go through the network together where what stands is read


def llama_embedding_scale(file: ModelFile) -> float:
    """What an embedding has to be multiplied by that is given to llama.cpp in place of a token: it scales a
    Gemma 3's tokens, and nothing given instead."""
    return math.sqrt(file.C) if file.arch == "gemma3" else 1.0


_MAX_SAID = 8
_said: list[str] = []  # errors of the call that llama.cpp is in


@cache
def _listening() -> tuple[Any, Any]:
    """llama-cpp-python, and what its llama.cpp tells its errors instead of the screen.

    llama.cpp keeps a bare pointer to the second, which therefore has to live as long as the process.
    """
    import llama_cpp

    def listen(level: int, text: bytes, user_data: object) -> None:
        if level == _ERROR_LEVEL and len(_said) < _MAX_SAID:
            _said.append(text.decode(errors="replace"))

    callback: Any = llama_cpp.llama_log_callback(listen)
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    return llama_cpp, callback


class LlamaEngine:
    """A model in llama.cpp; see `Engine`, whose gradients it does not have. For one caller at a time.

    The model is loaded into this process: it has to come from `read_model`, which refuses what libllama would
    end the process at.
    """

    def __init__(
        self, file: ModelFile, n_threads: int | None = None, *, n_gpu_layers: int = 0, exact: bool = True
    ) -> None:
        """Load a model.

        Args:
            file: from `read_model`.
            n_threads: None = the processors that this process may use.
            n_gpu_layers: layers on the device of llama.cpp's build, -1 = all.
            exact: keys and values in float32 and no flash attention, else as llama.cpp has them by default.

        Raises:
            UserError: llama.cpp does not load it.

        """
        self.api: Any = _listening()[0]
        _said.clear()
        self._core = open_engine(file, 1)
        self.n_threads = n_threads or processors()
        self.exact = exact
        params = self.api.llama_model_default_params()
        params.n_gpu_layers = n_gpu_layers
        params.use_extra_bufts = False  # no second, repacked copy of the weights
        before = maps_of(file.parts)
        self.model = self.api.llama_model_load_from_file(os.fsencode(file.path), params)
        self._maps = {at: one for at, one in maps_of(file.parts).items() if at not in before}
        if not self.model:
            self.fail("does not load the model")
        watch(self._maps)
        self._whole: _Session | None = None
        self._adapter: LoraAdapter | None = None
        self._handle: Any = None

    def __del__(self) -> None:
        """Free llama.cpp's memory with the object."""
        self.close()

    def close(self) -> None:
        """See `Engine`."""
        if getattr(self, "model", None):
            if self._whole is not None:
                self._whole.close()
            forget(self._maps)
            self.api.llama_model_free(self.model)  # and its adapters
            self.model = None
            self._core.close()

    @property
    def file(self) -> ModelFile:
        """See `Engine`."""
        return self._core.file

    @property
    def sha256(self) -> str:
        """See `Engine`."""
        return self._core.sha256

    @property
    def description(self) -> str:
        """See `Engine`."""
        return f"{self.file.path.name}: {self.file.arch} in llama.cpp, {self.n_threads} threads"

    @property
    def compute(self) -> Compute:
        """See `Engine`."""
        return "fast"

    @property
    def has_int8(self) -> bool:
        """False: how it multiplies is llama.cpp's own affair."""
        return False

    def embed(self, tokens: ArrayLike) -> NDArray[np.float32]:
        """See `Engine`."""
        return self._core.embed(tokens)

    def check_memory(self, n_sequences: int, n_tokens: int, adapter: LoraAdapter | None = None) -> None:
        """See `Engine`: the scores of a whole pass are most of it."""
        needed = 4 * n_tokens * (2 * self.file.H * n_tokens + 4 * self.file.F)
        if needed > memory_available():
            raise UserError(
                f"not enough memory: {n_tokens} tokens at once need some {in_bytes(needed)} in llama.cpp, "
                f"and {in_bytes(memory_available())} are available"
            )

    def logits(
        self,
        batch: Batch,
        adapter: LoraAdapter | None = None,
        *,
        select: ArrayLike | None = None,
        int8: Int8 = "none",
    ) -> NDArray[np.float32]:
        """See `Engine`; sequences go one by one, each with its whole text."""
        if batch.context is not None:
            raise UserError(_CACHE)
        if batch.positions is not None or batch.document_ids is not None or batch.bernoulli_seed is not None:
            raise UserError("llama.cpp computes whole texts: no documents in one, and no rows apart from it")
        wanted = batch.valid if select is None else np.asarray(select, dtype=bool) & batch.valid
        parts = []
        for number, (tokens, valid) in enumerate(zip(batch.tokens, batch.valid, strict=True)):
            text = tokens[valid]
            self._check_window(len(text), batch.causal_ratio)
            if self._whole is None or self._whole.n_rows < len(text):
                if self._whole is not None:
                    self._whole.close()
                self._whole = _Session(self, len(text), len(text))
            self._whole.forget(0)
            rows = self.inputs(text, batch, number, adapter)
            # What is in the cache is in sight, what comes later is not: a sink goes first, by itself.
            n_alone = 1 if batch.attention_sink and len(text) > 1 else 0
            for part in (slice(0, n_alone), slice(n_alone, None)):
                if len(rows[part]):
                    is_wanted = wanted[number][valid][part]
                    parts.append(
                        self._whole.decode(rows[part], part.start, batch.causal_ratio, adapter, is_wanted)
                    )
        logits = np.concatenate(parts)
        if select is not None:
            return logits
        result = np.zeros((*batch.tokens.shape, self.file.V), dtype=np.float32)
        result[batch.valid] = logits
        return result

    def context(
        self,
        n_rows: int,
        *,
        keys: ContextType | None = None,
        adapter: LoraAdapter | None = None,
        drafts: bool = False,
    ) -> "LlamaContext":
        """See `Engine`: for drafts alone; `keys` are what `exact` says."""
        if not drafts:
            raise UserError(_CACHE)
        return LlamaContext(self, n_rows)

    def inputs(
        self, tokens: NDArray[np.integer[Any]], batch: Batch, number: int, adapter: LoraAdapter | None
    ) -> NDArray[np.int32] | NDArray[np.float32]:
        """Tokens (T,) of a sequence as llama.cpp is given them: as they are, or with what is added (T, C)."""
        offset = batch.embedding_offset
        mask = None if adapter is None else adapter.mask_embedding
        if offset is None and mask is None:
            return tokens.astype(np.int32)
        rows = self._core.embed(tokens[None])[0]
        if mask is not None and adapter is not None:
            rows[tokens == adapter.mask_token_id] += mask
        if offset is not None:
            rows += offset[number]
        scaled: NDArray[np.float32] = rows * np.float32(llama_embedding_scale(self.file))
        return scaled

    def adapter_handle(self, adapter: LoraAdapter | None) -> Any:
        """llama.cpp's adapter with the pairs of ours, None for none; the arrays do not change meanwhile."""
        if adapter is None or not adapter.tensors or adapter.alpha == 0:
            return None
        if adapter is not self._adapter:
            if self._handle is not None:
                self.api.llama_adapter_lora_free(self._handle)
                self._adapter = self._handle = None
            with TemporaryDirectory(prefix="ggml-diffusion-") as folder:
                path = Path(folder) / "adapter.gguf"
                pairs = replace(adapter, mask_token_id=None, mask_embedding=None)
                write_gguf_adapter(path, pairs, self.file, {})
                self._handle = self.api.llama_adapter_lora_init(self.model, os.fsencode(path))
            if not self._handle:
                self.fail("does not load the adapter")
            self._adapter = adapter
        return self._handle

    def describe_step(
        self, n_sequences: int, n_tokens: int, rank: int, *, teacher: bool = False
    ) -> StepDescription:
        """Refused: llama.cpp does not train."""
        self._refuse_training()

    def loss(
        self,
        batch: Batch,
        targets: ArrayLike,
        weights: ArrayLike,
        adapter: LoraAdapter | None = None,
        *,
        int8: Int8 = "none",
    ) -> LossResult:
        """Refused: llama.cpp does not train."""
        self._refuse_training()

    def loss_and_gradients(
        self,
        batch: Batch,
        targets: ArrayLike,
        weights: ArrayLike,
        adapter: LoraAdapter,
        gradients: Mapping[str, NDArray[np.float32]],
        *,
        int8: Int8 = "none",
    ) -> LossResult:
        """Refused: llama.cpp does not train."""
        self._refuse_training()

    def fail(self, what: str) -> NoReturn:
        """Raise what llama.cpp could not do, with the first that it said about it."""
        said = f" ({one_line(_said[0])})" if _said else ""
        raise UserError(f"{self._core.file.path}: llama.cpp {what}{said}")

    def _refuse_training(self) -> NoReturn:
        raise UserError("llama.cpp computes no losses and gradients here: it is there to write with")

    def _check_window(self, n_tokens: int, causal_ratio: float) -> None:
        """Without a causal mask llama.cpp looks ahead beyond a layer's window, and the conversion did not."""
        window = window_of(self.file)
        if causal_ratio != 1.0 and 0 < window < n_tokens:
            raise UserError(
                f"this model's layers see {window} tokens, beyond which llama.cpp looks ahead differently: "
                f"{n_tokens} tokens are too many for --runtime llama.cpp"
            )


class _Session:
    """A context of llama.cpp's: positions of one sequence, one behind the other."""

    def __init__(self, engine: LlamaEngine, n_rows: int, n_together: int) -> None:
        api = engine.api
        params = api.llama_context_default_params()
        params.n_ctx = n_rows
        params.n_batch = params.n_ubatch = n_together
        params.n_threads = params.n_threads_batch = engine.n_threads
        if engine.exact:
            params.type_k = params.type_v = 0  # F32
            params.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_DISABLED
        self.n_rows, self.n_together = n_rows, n_together
        self._engine = engine
        _said.clear()
        self._context = api.llama_init_from_model(engine.model, params)
        if not self._context:
            engine.fail(f"has no context of {n_rows} tokens")

    def close(self) -> None:
        if self._context:
            self._engine.api.llama_free(self._context)
        self._context = None

    def forget(self, first: int) -> None:
        """Take away what stands from a position on."""
        memory = self._engine.api.llama_get_memory(self._context)
        if first == 0:
            self._engine.api.llama_memory_clear(memory, False)
        else:
            self._engine.api.llama_memory_seq_rm(memory, 0, first, -1)

    def decode(
        self,
        rows: NDArray[np.int32] | NDArray[np.float32],
        first: int,
        causal_ratio: float,
        adapter: LoraAdapter | None,
        wanted: NDArray[np.bool_],
    ) -> NDArray[np.float32]:
        """Logits (n_wanted, V) of rows, tokens (n,) or embeddings (n, C), at positions from `first` on."""
        if causal_ratio not in (0.0, 1.0):
            raise UserError(
                f"llama.cpp has a causal mask or none, and this conversion has a causal ratio of "
                f"{causal_ratio:g}: --runtime llama.cpp cannot run it"
            )
        engine, api, n = self._engine, self._engine.api, len(rows)
        _said.clear()
        api.llama_set_causal_attn(self._context, causal_ratio == 1.0)
        handle = engine.adapter_handle(adapter)
        handles = None if handle is None else (api.llama_adapter_lora_p_ctypes * 1)(handle)
        scales = None if handle is None else (ctypes.c_float * 1)(1.0)
        if api.llama_set_adapters_lora(self._context, handles, 0 if handle is None else 1, scales):
            engine.fail("does not take the adapter")
        batch = api.llama_batch_init(n, rows.shape[1] if rows.ndim == 2 else 0, 1)
        try:
            batch.n_tokens = n
            data = np.ascontiguousarray(rows)
            ctypes.memmove(batch.embd if rows.ndim == 2 else batch.token, data.ctypes.data, data.nbytes)
            for row in range(n):
                batch.pos[row] = first + row
                batch.n_seq_id[row] = 1
                batch.seq_id[row][0] = 0
                batch.logits[row] = bool(wanted[row])
            if api.llama_decode(self._context, batch) != 0:
                engine.fail(f"failed at {n} tokens")
        finally:
            api.llama_batch_free(batch)
        V = engine.file.V
        found = [
            np.ctypeslib.as_array(api.llama_get_logits_ith(self._context, int(row)), shape=(V,))
            for row in np.flatnonzero(wanted)
        ]
        logits = np.array(found, dtype=np.float32).reshape(-1, V)
        if not np.isfinite(logits).all():
            engine.fail("gives logits that are not finite")
        return logits


class LlamaContext:
    """What stands, in llama.cpp's own cache, from the first position on and without a gap; see `Context`."""

    def __init__(self, engine: LlamaEngine, n_rows: int) -> None:
        self._engine = engine
        self._tokens = np.zeros(0, dtype=np.int32)
        self._n_there = 0  # of these, in llama.cpp's cache
        self._session = _Session(engine, n_rows, min(n_rows, _CAUSAL_ROWS))

    def close(self) -> None:
        """See `Context`."""
        self._session.close()

    @property
    def n_rows(self) -> int:
        """See `Context`."""
        return len(self._tokens)

    @property
    def positions(self) -> NDArray[np.int32]:
        """See `Context`."""
        return np.arange(len(self._tokens), dtype=np.int32)

    def extend(
        self,
        tokens: ArrayLike,
        positions: ArrayLike | None = None,
        *,
        select: ArrayLike | None = None,
        int8: Int8 = "none",
    ) -> NDArray[np.float32]:
        """See `Context`."""
        new = np.atleast_1d(np.asarray(tokens)).astype(np.int32)
        n = len(self._tokens)
        places = np.arange(n, n + len(new)) if positions is None else np.asarray(positions)
        if not np.array_equal(places, np.arange(n, n + len(new))):
            raise UserError(_CACHE)
        if n + len(new) > self._session.n_rows:
            raise UserError(f"a context of {self._session.n_rows} tokens has no room for {n + len(new)}")
        wanted = np.zeros(len(new), dtype=bool) if select is None else np.asarray(select, dtype=bool)
        self._tokens = np.concatenate([self._tokens, new])
        return self._read(len(self._tokens), np.concatenate([np.zeros(n - self._n_there, bool), wanted]))

    def truncate(self, n_rows: int) -> None:
        """See `Context`."""
        self._tokens = self._tokens[:n_rows]
        if n_rows < self._n_there:
            self._session.forget(n_rows)
            self._n_there = n_rows

    def refill(
        self,
        batch: Batch,
        adapter: LoraAdapter | None = None,
        *,
        keep: ArrayLike,
        select: ArrayLike | None = None,
        int8: Int8 = "none",
    ) -> NDArray[np.float32]:
        """Refused: llama.cpp takes no rows out of the middle of its cache."""
        raise UserError(_CACHE)

    def logits(
        self, groups: Batch, adapter: LoraAdapter | None = None, *, select: ArrayLike, int8: Int8 = "none"
    ) -> NDArray[np.float32]:
        """See `Context`; one group, at the end of what stands or in the place of its last tokens, which then
        none of its rows sees."""
        wanted = np.asarray(select, dtype=bool)
        places = groups.positions
        if len(groups.tokens) != 1 or places is None or groups.document_ids is not None:
            raise UserError("llama.cpp computes one group at a time over what stands")
        first, n = int(places[0, 0]), groups.tokens.shape[1]
        reaches_end = first <= len(self._tokens) <= first + n
        if not reaches_end or not np.array_equal(places[0], np.arange(first, first + n)):
            raise UserError(_CACHE)
        if n > self._session.n_together:
            raise UserError(f"a block of {n} tokens is too long for llama.cpp: {self._session.n_together}")
        if self._n_there < first:
            self._read(first, np.zeros(first - self._n_there, dtype=bool))
        self._session.forget(first)
        self._n_there = first  # the keys of what stands there are computed again when the text goes on
        rows = self._engine.inputs(groups.tokens[0], groups, 0, adapter)
        logits = self._session.decode(rows, first, groups.causal_ratio, adapter, wanted[0])
        self._session.forget(first)
        return logits

    def _read(self, stop: int, wanted: NDArray[np.bool_]) -> NDArray[np.float32]:
        """Compute what stands up to a place and is not there yet; logits of wanted rows of it."""
        parts = [np.zeros((0, self._engine.file.V), dtype=np.float32)]
        start = self._n_there
        for first in range(start, stop, self._session.n_together):
            end = min(first + self._session.n_together, stop)
            chosen = wanted[first - start : end - start]
            parts.append(self._session.decode(self._tokens[first:end], first, 1.0, None, chosen))
            self._n_there = end
        return np.concatenate(parts)
