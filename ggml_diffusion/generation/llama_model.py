"""A conversion over llama.cpp in the place of the engine."""

from pathlib import Path

from ggml_diffusion.engine.llama_engine import LlamaEngine
from ggml_diffusion.formats.adapter_file import DiffusionCheckpoint
from ggml_diffusion.formats.model_check import read_model
from ggml_diffusion.generation.diffusion_model import DiffusionModel
from ggml_diffusion.text.tokenizer import Tokenizer


def load_in_llama_cpp(
    base: str | Path,
    weights: str | Path,
    n_threads: int | None = None,
    *,
    n_gpu_layers: int = 0,
    exact: bool = True,
    allow_other_base: bool = False,
) -> DiffusionModel:
    """Read a base GGUF and a conversion of it, to write with in llama.cpp.

    Args:
        base: the GGUF that was converted.
        weights: adapter.safetensors, or adapter.gguf where it carries the same.
        n_threads: None = as many as there are cores.
        n_gpu_layers: layers on the device of llama.cpp's build, -1 = all.
        exact: keys and values in float32 and no flash attention; False is faster on a device.
        allow_other_base: use the conversion although it was trained on another file.

    Raises:
        UserError: a file is missing or malformed, the conversion belongs to another base, or llama.cpp does
            not load it.

    """
    checkpoint = DiffusionCheckpoint.load(weights)
    file = read_model(base)
    engine = LlamaEngine(file, n_threads, n_gpu_layers=n_gpu_layers, exact=exact)
    checkpoint.check_base(engine.sha256, allow_other_base=allow_other_base)
    return DiffusionModel.from_checkpoint(engine, Tokenizer.from_file(file), checkpoint)
