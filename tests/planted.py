"""Engines whose predictions are planted: a Python function gives the logits, so that every figure is known.

They stand in for an engine where a measure is compared with what it should find, and know nothing of GGUF.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np

from ggml_diffusion.engine.interface import Batch, LossResult
from ggml_diffusion.formats.lora import LoraAdapter
from ggml_diffusion.generation.diffusion_model import DiffusionModel
from ggml_diffusion.generation.reading import ReadingRule
from ggml_diffusion.objective.corruption import NoiseSchedule
from ggml_diffusion.text.loader import TokenBatch

# (tokens (T,) of one document, causal ratio, whether an adapter is on) -> logits (T, V)
Rows = Callable[[Any, float, bool], Any]


class PlantedEngine:
    """An engine by a function of one document's tokens."""

    compute = "f32"

    def __init__(self, V: int, rows: Rows) -> None:
        self.file = SimpleNamespace(V=V, C=8, context_length=4096)
        self.rows = rows
        self.n_tokens = 0

    def logits(self, batch: Batch, adapter=None, *, select=None):
        tokens = batch.tokens
        lengths = np.full(len(tokens), tokens.shape[1]) if batch.lengths is None else batch.lengths
        documents = np.zeros(tokens.shape) if batch.document_ids is None else batch.document_ids
        result = np.zeros((*tokens.shape, self.file.V), np.float32)
        for b, length in enumerate(lengths):
            self.n_tokens += int(length)
            for document in np.unique(documents[b, :length]):
                where = np.flatnonzero(documents[b, :length] == document)
                result[b, where] = self.rows(tokens[b, where], batch.causal_ratio, adapter is not None)
        return result if select is None else result[select]

    def check_memory(self, n_sequences, n_tokens, adapter=None):
        pass

    def loss(self, batch: Batch, targets, weights, adapter=None):
        logits = self.logits(batch, adapter).astype(np.float64)
        if adapter is not None and adapter.mask_token_id is not None:
            logits[..., adapter.mask_token_id] = -np.inf
        log_p = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
        row_loss = -np.take_along_axis(log_p, np.asarray(targets)[..., None].astype(int), -1)[..., 0]
        counted = weights != 0
        row_loss = np.where(counted, row_loss, 0.0)
        return LossResult(
            float((weights * row_loss).sum()),
            row_loss.astype(np.float32),
            (logits.argmax(-1) == targets) & counted,
        )


class NoVocabulary:
    """A tokenizer of numbers: two bytes a token, but the end of text is none."""

    bos_id = None
    eos_id = 1
    start_id = None

    def n_bytes(self, token: int) -> int:
        return 0 if token == self.eos_id else 2


def planted_model(
    engine: Any, mask_token_id: int = 0, prediction: Any = "shifted", causal_ratio: float = 0.0
) -> Any:
    """A conversion on such an engine."""
    return DiffusionModel(
        engine,
        LoraAdapter(1.0, {}, mask_token_id),
        NoVocabulary(),  # type: ignore[arg-type]
        ReadingRule(prediction, causal_ratio, NoiseSchedule("linear")),
    )


def batch_of(sequences: Any, lengths: Any = None, document_ids: Any = None) -> TokenBatch:
    """Sequences (B, T) of one document each, unless said otherwise."""
    tokens = np.asarray(sequences, np.int32)
    return TokenBatch(
        tokens,
        np.full(len(tokens), tokens.shape[1], np.int32) if lengths is None else np.asarray(lengths, np.int32),
        np.zeros(tokens.shape, np.int32) if document_ids is None else np.asarray(document_ids, np.int32),
    )
