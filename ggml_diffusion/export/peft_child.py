"""Logits of transformers + peft on a PEFT folder, by the program that is in it; a process of its own.

It runs in whatever interpreter has these packages, knows nothing else of ggml-diffusion, and takes the
program from beside itself, not from the folder. Deliberately not here: what is compared (verify.py).

usage: peft_child.py FOLDER BASE.gguf REQUEST.npz RESPONSE.npz
       REQUEST: tokens (T,), time (a number; NaN without time embedding)
       RESPONSE: logits (T, V), and base (T, V) of the base alone with a causal mask
"""

import math
import runpy
import sys
from pathlib import Path
from typing import Any


def main(folder: str, base: str, request: str, response: str) -> None:
    """Load, compute and write."""
    import numpy as np
    import torch

    program = runpy.run_path(str(Path(__file__).with_name("denoise_with_peft.py")))
    denoiser: Any = program["Denoiser"](folder, base)
    with np.load(request) as asked:
        tokens, time = torch.from_numpy(asked["tokens"]).long(), float(asked["time"])
    logits = denoiser.logits(tokens, None if math.isnan(time) else time).numpy()
    with denoiser.model.disable_adapter(), torch.no_grad():
        base_logits = denoiser.model(input_ids=tokens[None]).logits[0].float().numpy()
    np.savez(response, logits=logits, base=base_logits)


if __name__ == "__main__":
    main(*sys.argv[1:5])
