"""Turn a quantised autoregressive GGUF into a masked-diffusion language model, on the CPU.

The names below are the public API. They load on first use, so that `import ggml_diffusion` is quick.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ggml_diffusion.adapter_file import CheckpointMetadata, DiffusionCheckpoint
    from ggml_diffusion.annealing import AnnealingSchedule, AttentionMaskAnnealer
    from ggml_diffusion.config import (
        ConversionTrainingConfig,
        MaskAnnealingConfig,
        QLoraConversionConfig,
        TimeEmbeddingConfig,
    )
    from ggml_diffusion.corruption import NoiseSchedule
    from ggml_diffusion.data import TextDataLoader, TokenBatch
    from ggml_diffusion.diffusion_model import DiffusionModel
    from ggml_diffusion.engine import LossResult, Q4Model
    from ggml_diffusion.errors import UserError
    from ggml_diffusion.generate import GenerationConfig
    from ggml_diffusion.lora import LoraAdapter, TargetModule
    from ggml_diffusion.metrics import TrainMetrics
    from ggml_diffusion.time_embedding import TimeEmbedding
    from ggml_diffusion.tokenizer import Tokenizer
    from ggml_diffusion.trainer import ConversionTrainer

_HOMES = {
    "AnnealingSchedule": "annealing",
    "AttentionMaskAnnealer": "annealing",
    "CheckpointMetadata": "adapter_file",
    "ConversionTrainer": "trainer",
    "ConversionTrainingConfig": "config",
    "DiffusionCheckpoint": "adapter_file",
    "DiffusionModel": "diffusion_model",
    "GenerationConfig": "generate",
    "LoraAdapter": "lora",
    "LossResult": "engine",
    "MaskAnnealingConfig": "config",
    "NoiseSchedule": "corruption",
    "Q4Model": "engine",
    "QLoraConversionConfig": "config",
    "TargetModule": "lora",
    "TextDataLoader": "data",
    "TimeEmbedding": "time_embedding",
    "TimeEmbeddingConfig": "config",
    "TokenBatch": "data",
    "Tokenizer": "tokenizer",
    "TrainMetrics": "metrics",
    "UserError": "errors",
}

__all__ = [
    "AnnealingSchedule",
    "AttentionMaskAnnealer",
    "CheckpointMetadata",
    "ConversionTrainer",
    "ConversionTrainingConfig",
    "DiffusionCheckpoint",
    "DiffusionModel",
    "GenerationConfig",
    "LoraAdapter",
    "LossResult",
    "MaskAnnealingConfig",
    "NoiseSchedule",
    "Q4Model",
    "QLoraConversionConfig",
    "TargetModule",
    "TextDataLoader",
    "TimeEmbedding",
    "TimeEmbeddingConfig",
    "TokenBatch",
    "Tokenizer",
    "TrainMetrics",
    "UserError",
]


def __getattr__(name: str) -> Any:
    """Load a public name from the module that defines it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'ggml_diffusion' has no attribute '{name}'")
    return getattr(import_module(f"ggml_diffusion.{_HOMES[name]}"), name)
