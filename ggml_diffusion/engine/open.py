"""The one place that chooses an engine for a model file.

Deliberately not here: what an engine computes (interface.py), and how (cpu/).
"""

from ggml_diffusion.engine.cpu.q4_model import Q4Model
from ggml_diffusion.engine.interface import Compute, Engine
from ggml_diffusion.formats.model_file import ModelFile


def open_engine(
    file: ModelFile,
    n_threads: int | None = None,
    *,
    compute: Compute = "fast",
    use_simd: bool = True,
    memory_budget: int | None = None,
    sound_sha256: str | None = None,
) -> Engine:
    """Open the engine of a model; the caller closes it.

    Args:
        file: from `read_model`.
        n_threads: None = the processors that this process may use.
        compute: see `Engine.compute`.
        use_simd: False selects the naive reference kernels.
        memory_budget: bytes that a training step should take beside the mapped file; None = no limit.
        sound_sha256: of a file whose numbers were found to be finite before; None = none was.

    Raises:
        UserError: the file is damaged, or an option is out of its limits.

    """
    return Q4Model(
        file,
        n_threads,
        compute=compute,
        use_simd=use_simd,
        memory_budget=memory_budget,
        sound_sha256=sound_sha256,
    )
