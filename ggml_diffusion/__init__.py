"""Turn a quantised autoregressive GGUF into a masked-diffusion language model, on the CPU.

The names below are the public API. They load on first use, so that `import ggml_diffusion` is quick.
"""

from __future__ import annotations

TYPE_CHECKING = False  # typing's, without its import: an interrupt of that could not be caught (__main__.py)
if TYPE_CHECKING:
    from typing import Any

    from ggml_diffusion.config.groups import MaskAnnealingConfig, QLoraConversionConfig, TimeEmbeddingConfig
    from ggml_diffusion.config.settings import ConversionTrainingConfig
    from ggml_diffusion.engine.cpu.q4_model import Q4Model
    from ggml_diffusion.engine.interface import Batch, Engine, LossResult, Teacher
    from ggml_diffusion.errors import UserError
    from ggml_diffusion.formats.adapter_file import CheckpointMetadata, DiffusionCheckpoint, load_adapter
    from ggml_diffusion.formats.lora import LoraAdapter, TargetModule
    from ggml_diffusion.generation.denoise import GenerationConfig
    from ggml_diffusion.generation.diffusion_model import DiffusionModel
    from ggml_diffusion.generation.draft_model import DiffusionDraftModel
    from ggml_diffusion.generation.infill import FilledHole, InfillConfig, infill
    from ggml_diffusion.objective.annealing import AnnealingSchedule, AttentionMaskAnnealer
    from ggml_diffusion.objective.corruption import NoiseSchedule
    from ggml_diffusion.objective.time_embedding import TimeEmbedding
    from ggml_diffusion.text.kept_tokens import Reading
    from ggml_diffusion.text.loader import TextDataLoader, TokenBatch
    from ggml_diffusion.text.sources import Records
    from ggml_diffusion.text.tokenizer import Tokenizer
    from ggml_diffusion.training.metrics import TrainMetrics
    from ggml_diffusion.training.resume import resume_run, save_run
    from ggml_diffusion.training.trainer import ConversionTrainer

_HOMES = {
    "AnnealingSchedule": "objective.annealing",
    "AttentionMaskAnnealer": "objective.annealing",
    "Batch": "engine.interface",
    "CheckpointMetadata": "formats.adapter_file",
    "ConversionTrainer": "training.trainer",
    "ConversionTrainingConfig": "config.settings",
    "DiffusionCheckpoint": "formats.adapter_file",
    "DiffusionDraftModel": "generation.draft_model",
    "DiffusionModel": "generation.diffusion_model",
    "Engine": "engine.interface",
    "FilledHole": "generation.infill",
    "GenerationConfig": "generation.denoise",
    "InfillConfig": "generation.infill",
    "LoraAdapter": "formats.lora",
    "LossResult": "engine.interface",
    "MaskAnnealingConfig": "config.groups",
    "NoiseSchedule": "objective.corruption",
    "Q4Model": "engine.cpu.q4_model",
    "QLoraConversionConfig": "config.groups",
    "Reading": "text.kept_tokens",
    "Records": "text.sources",
    "TargetModule": "formats.lora",
    "Teacher": "engine.interface",
    "TextDataLoader": "text.loader",
    "TimeEmbedding": "objective.time_embedding",
    "TimeEmbeddingConfig": "config.groups",
    "TokenBatch": "text.loader",
    "Tokenizer": "text.tokenizer",
    "TrainMetrics": "training.metrics",
    "UserError": "errors",
    "infill": "generation.infill",
    "load_adapter": "formats.adapter_file",
    "resume_run": "training.resume",
    "save_run": "training.resume",
}

__all__ = [
    "AnnealingSchedule",
    "AttentionMaskAnnealer",
    "Batch",
    "CheckpointMetadata",
    "ConversionTrainer",
    "ConversionTrainingConfig",
    "DiffusionCheckpoint",
    "DiffusionDraftModel",
    "DiffusionModel",
    "Engine",
    "FilledHole",
    "GenerationConfig",
    "InfillConfig",
    "LoraAdapter",
    "LossResult",
    "MaskAnnealingConfig",
    "NoiseSchedule",
    "Q4Model",
    "QLoraConversionConfig",
    "Reading",
    "Records",
    "TargetModule",
    "Teacher",
    "TextDataLoader",
    "TimeEmbedding",
    "TimeEmbeddingConfig",
    "TokenBatch",
    "Tokenizer",
    "TrainMetrics",
    "UserError",
    "infill",
    "load_adapter",
    "resume_run",
    "save_run",
]


def __getattr__(name: str) -> Any:
    """Load a public name from the module that defines it."""
    if name not in _HOMES:
        raise AttributeError(f"module 'ggml_diffusion' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(f"ggml_diffusion.{_HOMES[name]}"), name)
