"""Compare two engines on a real model: the gradient of one batch, its cosine, losses, and the time of a step.

Usage: python tools/gradient_cosine.py MODEL.gguf --device cuda --sequences 8 --tokens 512
The text is docs/architecture.md, half of its tokens masked; the adapter is random and small, as
after some steps of training, so that every gradient is there. It decides nothing: a person reads it.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggml_diffusion.engine.cpu.q4_model import Q4Model
from ggml_diffusion.engine.ggml_graph.graph_model import GraphModel
from ggml_diffusion.engine.interface import Batch, Engine, Int8
from ggml_diffusion.formats.lora import LoraAdapter, TargetModule, init_lora, lora_shapes
from ggml_diffusion.text.tokenizer import Tokenizer

TEXT = Path(__file__).resolve().parents[1] / "docs" / "architecture.md"


def make_case(
    model: Engine, n_sequences: int, n_tokens: int, rank: int, text: NDArray[np.int32] | None = None
) -> tuple[Batch, Any, Any, LoraAdapter]:
    """Masked random text, its targets and weights, and an adapter with all seven projections."""
    rng = np.random.default_rng(7)
    hidden = model.file.C
    if text is None:
        text = Tokenizer.from_gguf(model.file.path).encode(TEXT.read_text(encoding="utf-8"))
    targets = np.resize(text, (n_sequences, n_tokens)).astype(np.int32)
    masked = rng.random(targets.shape) < 0.5
    tensors = {
        name: np.zeros(shape, np.float32)
        for name, shape in lora_shapes(model.file, TargetModule, rank).items()
    }
    init_lora(tensors, rng)
    for name, values in tensors.items():
        if name.endswith("lora_b"):
            values[...] = 0.002 * rng.standard_normal(values.shape)
    mask_row = (0.02 * rng.standard_normal(hidden)).astype(np.float32)
    adapter = LoraAdapter(2.0 * rank, tensors, 7, mask_row)
    offset = (0.005 * rng.standard_normal((n_sequences, hidden))).astype(np.float32)
    batch = Batch(np.where(masked, 7, targets), 0.4, embedding_offset=offset)
    return batch, targets, masked.astype(np.float32) / masked.sum(), adapter


def measure(
    model: Engine, case: tuple[Batch, Any, Any, LoraAdapter], repeats: int, int8: Int8 = "none"
) -> dict[str, Any]:
    """Loss, gradients, and the seconds of the best of some calls after the first."""
    batch, targets, weights, adapter = case
    gradients = {name: np.zeros_like(values) for name, values in adapter.tensors.items()}
    assert adapter.mask_embedding is not None
    gradients["mask_embedding"] = np.zeros_like(adapter.mask_embedding)
    started = time.perf_counter()
    result = model.loss_and_gradients(batch, targets, weights, adapter, gradients, int8=int8)
    first, times = time.perf_counter() - started, []
    whole = np.concatenate([gradients[name].ravel() for name in sorted(gradients)])
    for _ in range(repeats):
        started = time.perf_counter()
        model.loss_and_gradients(batch, targets, weights, adapter, gradients, int8=int8)
        times.append(time.perf_counter() - started)
    seconds = min(times, default=first)
    return {"loss": result.loss, "gradient": whole, "first_s": first, "s": seconds}


def main() -> None:
    """Run the comparison and print it as one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text-tokens", type=Path, help="token ids in a .npy file, instead of that text")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--sequences", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--compute", default="fast", choices=("fast", "f32"))
    parser.add_argument("--int8", default="none", choices=("none", "both"), help="of the device")
    parser.add_argument("--cpu-compute", default="fast", choices=("fast", "f32"))
    options = parser.parse_args()
    with Q4Model.from_gguf(options.model, options.threads, compute=options.cpu_compute) as model:
        text = None if options.text_tokens is None else np.load(options.text_tokens)
        case = make_case(model, options.sequences, options.tokens, options.rank, text)
        ours = measure(model, case, options.repeats)
    with GraphModel.from_gguf(
        options.model, options.device, options.threads, compute=options.compute
    ) as model:
        theirs = measure(model, case, options.repeats, options.int8)
        description = model.description
    a, b = ours["gradient"].astype(np.float64), theirs["gradient"].astype(np.float64)
    n_tokens = options.sequences * options.tokens
    print(
        json.dumps(
            {
                "device": description,
                "compute": options.compute,
                "int8": options.int8,
                "cosine": float(a @ b / np.linalg.norm(a) / np.linalg.norm(b)),
                "norm_ratio": float(np.linalg.norm(b) / np.linalg.norm(a)),
                "loss": {"cpu": ours["loss"], "device": theirs["loss"]},
                "tokens_per_s": {"cpu": n_tokens / ours["s"], "device": n_tokens / theirs["s"]},
                "first_call_s": {"cpu": ours["first_s"], "device": theirs["first_s"]},
            },
            indent=2,
        )
    )


if __name__ == "__main__":
    main()
