"""The int8 gate: before a conversion starts, int8 input gradients must agree with the ones they replace.

Multiplying the frozen weights' input gradients in int8 is faster, and coarser than bfloat16. Whether it is
safe depends on the model and its text, so it is tried on the run's own first batch: the whole gradient is
computed both ways, and int8 is used if the cosine between them is high enough. The decision belongs to the
run: a resumed one keeps it.

Deliberately not here: the arithmetic (the engine), and a check during the run: one costs a step.
"""

from dataclasses import dataclass

import numpy as np

from ggml_diffusion.data import TokenBatch
from ggml_diffusion.errors import UserError
from ggml_diffusion.trainer import ConversionTrainer

# Training all in bfloat16, which people do, is 4.5e-3 from float32 in this measure in PyTorch on SmolLM2
# (tests/test_peer_torch.py); int8 must stay well below that.
MIN_COSINE = 0.998


@dataclass(frozen=True)
class Int8Report:
    """Cosine of the two gradients of the first batch, None where int8 was not tried; and whether it is on."""

    cosine: float | None
    is_used: bool

    def __str__(self) -> str:
        """One line for people."""
        if self.cosine is None:
            return "input gradients: not in int8 on this processor"
        verdict = "used" if self.is_used else f"not used, below {MIN_COSINE}"
        return f"int8 input gradients: cosine {self.cosine:.5f} on the first batch, {verdict}"


def choose_int8(trainer: ConversionTrainer, batch: TokenBatch) -> Int8Report:
    """Turn the engine's int8 input gradients on if it has them and they agree on this batch."""
    model = trainer.model
    try:
        model.int8_backward = True
    except UserError:
        return Int8Report(None, False)
    coarse = trainer.first_gradient(batch)
    model.int8_backward = False
    fine = trainer.first_gradient(batch)
    size = float(np.linalg.norm(coarse) * np.linalg.norm(fine))
    cosine = float(np.dot(coarse, fine)) / size if size > 0.0 else float("nan")
    is_used = cosine >= MIN_COSINE
    model.int8_backward = is_used
    return Int8Report(cosine, is_used)
