"""Conversions in llama.cpp, through llama-cpp-python alone: on whatever devices its build has.

    from ggml_diffusion.llama_cpp import load

    model = load("model.gguf", "run/adapter.safetensors", n_gpu_layers=-1)
    print(model.generate("The sea"))

What comes back is a `DiffusionModel` like any other, which denoises with llama.cpp's passes in place of the
engine's: the same seed gives the same text on an F32 model. It does not train.
"""

from ggml_diffusion.engine.llama_engine import LlamaEngine
from ggml_diffusion.generation.llama_model import load_in_llama_cpp as load

__all__ = ["LlamaEngine", "load"]
