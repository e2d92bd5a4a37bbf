#!/usr/bin/env python3
"""Convert on the split, batches and masks of a PyTorch + PEFT conversion, to compare quality at equal tokens.

    python tools/compare_torch_conversion.py FOLDER --peer-python PYTHON [--preset laptop] [--steps 400]

The peer trains SmolLM2-135M on blocks of 128 tokens of Python's help topics: 64 blocks held out by
permutation 1 of NumPy's default generator, batches of 8 drawn by its seed, 5% warm-up, a cosine to 0, mask
annealed over the first fifth. Its evaluation masks come from torch's generator with seed 7, so a Python with
torch is asked for them once (`masks.npz` in FOLDER is used again). With the peer's recipe (learning rate
5e-4, rank 32 on all seven projections, shifted, uniform weights, soft mask, no time embedding) it went from
masked cross-entropy 6.42 / 7.82 at t = .15 / .5 to 3.12 / 4.41 after 205K tokens and 2.90 / 4.20 after 410K.

Noise in training is each side's own. An interrupted run resumes from its checkpoint.
"""

import argparse
import json
import pydoc_data.topics
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tool_errors import run_tool

from ggml_diffusion.app.demo import demo_model
from ggml_diffusion.config.settings import ConversionTrainingConfig
from ggml_diffusion.config.toml import load_config
from ggml_diffusion.engine.cpu.q4_model import Q4Model
from ggml_diffusion.errors import UserError
from ggml_diffusion.evaluation.scoring import score_masked
from ggml_diffusion.formats.lora import TargetModule
from ggml_diffusion.generation.diffusion_model import DiffusionModel
from ggml_diffusion.text.loader import TokenBatch
from ggml_diffusion.text.tokenizer import Tokenizer
from ggml_diffusion.training.int8_gate import choose_int8
from ggml_diffusion.training.resume import resume_run, save_run
from ggml_diffusion.training.trainer import ConversionTrainer

T, B, HELD_OUT, GROUP = 128, 8, 64, 16
SHARES = (0.15, 0.5, 0.85)
PEER_RECIPE: dict[str, Any] = {
    "training.learning_rate": 5e-4,
    "model.target_modules": [module.value for module in TargetModule],
    "mask_annealing.mask": "soft",
    "model.attention_sink": False,
    "training.norm_damping": 0.0,
    "training.lora_b_rate_factor": 1.0,
    "training.embedding_rate_factor": 1.0,
    "noise_schedule.masking": "bernoulli",
    "time_embedding.enabled": False,
}
# Run by the peer's Python: the masks (3, 64, 128) as its evaluation draws them, in groups of 16 blocks.
MASKS_CODE = f"""
import sys, numpy as np, torch
masks = []
for t in {SHARES}:
    generator = torch.Generator().manual_seed(7)
    groups = [torch.rand(({GROUP}, {T}), generator=generator) < t for _ in range({HELD_OUT // GROUP})]
    masks.append(torch.cat(groups).numpy())
masks = np.stack(masks)
masks[:, :, 0] = False
np.savez_compressed(sys.argv[1], masks=masks)
"""


def peer_masks(folder: Path, peer_python: str | None) -> NDArray[np.bool_]:
    """The peer's evaluation masks, (shares, sequences, T)."""
    path = folder / "masks.npz"
    if not path.exists():
        if peer_python is None:
            raise UserError(f"{path} is not there yet: name a Python with torch by --peer-python")
        subprocess.run([peer_python, "-c", MASKS_CODE, str(path)], check=True)
    masks: NDArray[np.bool_] = np.load(path)["masks"]
    return masks


def split_blocks(tokenizer: Tokenizer) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Training and held-out blocks (n, T) of the help topics, as the peer splits them."""
    text = "\n\n".join(pydoc_data.topics.topics.values())
    ids = np.asarray(tokenizer.encode(text), dtype=np.int32)
    n = len(ids) // T
    blocks = ids[: n * T].reshape(n, T)
    order = np.random.default_rng(1).permutation(n)
    return blocks[order[n // 10 :]], blocks[order[: min(HELD_OUT, n // 10)]]


def as_batch(blocks: NDArray[np.int32]) -> TokenBatch:
    """Blocks as whole sequences of one document each."""
    n = len(blocks)
    return TokenBatch(np.ascontiguousarray(blocks), np.full(n, T, np.int32), np.zeros((n, T), np.int32))


def measure(
    model: DiffusionModel, held_out: TokenBatch, masks: NDArray[np.bool_], causal_ratio: float
) -> dict[str, float]:
    """Masked cross-entropy and accuracy at each share."""
    figures = {}
    for share, masked in zip(SHARES, masks, strict=True):
        scores = score_masked(model, held_out, masked, np.full(len(masked), share), causal_ratio, B)
        figures[f"ce@{share}"] = round(float(scores.loss.sum() / masked.sum()), 3)
        figures[f"acc@{share}"] = round(float(scores.correct.sum() / masked.sum()), 3)
    return figures


def configured(preset: str, steps: int, seed: int) -> ConversionTrainingConfig:
    """A preset's recipe at this length, or the peer's."""
    overrides: dict[str, Any] = {
        "training.total_steps": steps,
        "training.seed": seed,
        "training.batch_size": B,
        "training.gradient_accumulation": 1,
        "training.sequence_length": T,
    }
    if preset == "peer":
        lengths = {"training.warmup_steps": steps // 20, "mask_annealing.total_steps": steps // 5}
        return load_config(preset="demo", overrides={**overrides, **PEER_RECIPE, **lengths})
    return load_config(preset=preset, overrides=overrides)


def main() -> None:
    """Parse, train, measure, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where checkpoints, masks and figures go")
    parser.add_argument("--peer-python", help="a Python with torch; only for the masks")
    parser.add_argument("--preset", default="peer", help="peer = its recipe; or a preset of ours")
    parser.add_argument("--steps", type=int, default=400, help="steps of 1,024 tokens (400)")
    parser.add_argument("--seed", type=int, default=0, help="of adapter, noise and batches (0)")
    parser.add_argument("--every", type=int, default=200, help="steps between measurements (200)")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    masks = peer_masks(arguments.folder, arguments.peer_python)
    path = demo_model()
    tokenizer = Tokenizer.from_gguf(path)
    train, held = split_blocks(tokenizer)
    config = configured(arguments.preset, arguments.steps, arguments.seed)
    checkpoints = arguments.folder / f"{arguments.preset}-{arguments.steps}-seed{arguments.seed}"
    with Q4Model.from_gguf(path) as model:
        trainer = ConversionTrainer(model, config, data_fingerprint="peer split")
        draws = np.random.default_rng(arguments.seed)
        batches = [as_batch(train[draws.integers(0, len(train), B)]) for _ in range(config.total_steps)]
        rows: list[dict[str, Any]] = []

        def note(tag: str, model_now: DiffusionModel, causal_ratio: float) -> None:
            row = {"tag": tag, "step": trainer.step_count, "tokens": trainer.step_count * B * T}
            rows.append({**row, **measure(model_now, as_batch(held), masks, causal_ratio)})
            print(json.dumps(rows[-1]), flush=True)

        def current() -> DiffusionModel:
            return DiffusionModel.from_checkpoint(model, tokenizer, trainer.checkpoint())

        if not resume_run(trainer, checkpoints):
            print(choose_int8(trainer, batches[0]))
            note("step 0, bidirectional", current().untrained(), 0.0)
        while trainer.step_count < config.total_steps:
            metrics = trainer.train_step(batches[trainer.step_count])
            if trainer.step_count % 20 == 0:
                print(f"step {metrics.step}: loss {metrics.loss:.3f}", flush=True)
            if trainer.step_count % arguments.every == 0 or trainer.step_count == config.total_steps:
                save_run(trainer, checkpoints)
                note("bidirectional", current(), 0.0)
        note("right hidden (causal)", current(), 1.0)
    output = checkpoints.with_suffix(".json")
    output.write_text(json.dumps({"config": config.model_dump(mode="json"), "rows": rows}, indent=1) + "\n")
    print(f"written to {output}")


if __name__ == "__main__":
    run_tool(main)
