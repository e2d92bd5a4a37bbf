"""The int8 gate: before a conversion starts, the gradient in int8 must agree with the one it replaces.

Multiplying the frozen weights in int8 is faster, and coarser than bfloat16 or float32. Whether it is safe
depends on the model and its text, so it is tried on the run's own first batch: the whole gradient is computed
both ways, and int8 is used as far as the cosine between them is high enough: in forward and backward, else in
the backward alone, else not at all. The decision belongs to the run: a resumed one keeps it.

Only training uses int8: figures that are compared with others are computed without it.

Deliberately not here: the arithmetic (the engine), and a check during the run: one costs a step.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ggml_diffusion.engine.interface import Int8
from ggml_diffusion.text.loader import TokenBatch
from ggml_diffusion.training.trainer import ConversionTrainer

# Training all in bfloat16, which people do, is 4.5e-3 from float32 in this measure in PyTorch on SmolLM2
# (tests/engine/test_peer_torch.py); int8 must not be further away than that.
MIN_COSINE = 1.0 - 4.5e-3
_PIECE = 1 << 15
_CHOICES: tuple[Int8, ...] = ("both", "backward")  # fastest first
_PRODUCTS: Mapping[Int8, str] = {"both": "forward and backward", "backward": "backward", "none": "nothing"}


@dataclass(frozen=True)
class Int8Report:
    """What was tried on the first batch, in order, with the cosine of its gradient; and what is used."""

    cosines: Mapping[Int8, float]
    used: Int8

    def __str__(self) -> str:
        """One line for people."""
        if not self.cosines:
            return "no int8 products: the processor has none, or a matrix of the model is not quantised"
        tried = ", ".join(f"{_PRODUCTS[products]} {cosine:.5f}" for products, cosine in self.cosines.items())
        return (
            f"int8 products, cosine of the first batch's gradient: {tried} (at least {MIN_COSINE}); "
            f"in int8: {_PRODUCTS[self.used]}"
        )


def choose_int8(trainer: ConversionTrainer, batch: TokenBatch) -> Int8Report:
    """Let the trainer use int8 products as far as the engine has them and they agree on this batch."""
    cosines = dict[Int8, float]()
    trainer.int8 = "none"
    if not trainer.model.has_int8:
        return Int8Report(cosines, "none")
    fine = trainer.first_gradient(batch).copy()  # the only copy: a second one would be the run's peak
    for products in _CHOICES:
        trainer.int8 = products
        coarse = trainer.first_gradient(batch)
        cosines[products] = _cosine(coarse, fine)
        if cosines[products] >= MIN_COSINE:
            return Int8Report(cosines, products)
    trainer.int8 = "none"
    return Int8Report(cosines, "none")


def _cosine(x: NDArray[np.float32], y: NDArray[np.float32]) -> float:
    """Cosine of two flat gradients, summed in float64 by pieces: copies of them would be the run's peak."""
    products = np.zeros(3)
    for start in range(0, len(x), _PIECE):
        a, b = (flat[start : start + _PIECE].astype(np.float64) for flat in (x, y))
        products += (a @ b, a @ a, b @ b)
    size = float(np.sqrt(products[1] * products[2]))
    return float(products[0]) / size if size > 0.0 else float("nan")
