"""Trainers and batches of a few tokens, for the tests of training."""

from __future__ import annotations

from typing import Any

import numpy as np

from ggml_diffusion.config.toml import load_config
from ggml_diffusion.engine.cpu.q4_model import Q4Model
from ggml_diffusion.text.loader import TokenBatch
from ggml_diffusion.training.trainer import ConversionTrainer

SMALL = {
    "training.batch_size": 2,
    "training.gradient_accumulation": 2,
    "training.sequence_length": 12,
    "training.total_steps": 6,
    "training.warmup_steps": 2,
    "training.learning_rate": 1e-2,
    "model.qlora_rank": 2,
    "mask_annealing.total_steps": 3,
    "time_embedding.dim": 8,
}


def make_trainer(model: Q4Model, **changes: Any) -> ConversionTrainer:
    """A trainer with settings changed, e.g. training__batch_size=1."""
    overrides = {**SMALL, **{key.replace("__", "."): value for key, value in changes.items()}}
    return ConversionTrainer(model, load_config(overrides=overrides))


def make_batch(n: int = 4, seed: int = 0, T: int = 12) -> TokenBatch:
    """Whole sequences of one document each."""
    tokens = np.random.default_rng(seed).integers(20, 300, (n, T)).astype(np.int32)
    return TokenBatch(tokens, np.full(n, T, np.int32), np.zeros((n, T), np.int32))


def packed_batch() -> TokenBatch:
    """Four sequences: one padded, one that holds two documents."""
    batch = make_batch()
    batch.lengths[1] = 7
    batch.document_ids[2, 5:] = 1
    return batch
