"""A finished run as the measuring tools want it: the conversion, and the text it was not trained on."""

from pathlib import Path

from ggml_diffusion.evaluation.suite import load_held_out
from ggml_diffusion.formats.adapter_file import DiffusionCheckpoint
from ggml_diffusion.generation.diffusion_model import DiffusionModel
from ggml_diffusion.text.loader import TokenBatch

_SEQUENCES = 256  # at most


def open_run(base: Path, run: Path) -> tuple[DiffusionModel, TokenBatch]:
    """A run's conversion, ready to write, and its held-out sequences.

    Raises:
        UserError: a file is missing or malformed, or belongs to another base.

    """
    weights = run / "adapter.safetensors"
    model = DiffusionModel.load(base, weights)
    return model, load_held_out(DiffusionCheckpoint.load(weights), model.tokenizer, _SEQUENCES).held_out
