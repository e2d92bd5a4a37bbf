"""What `--approximate-cache` brings and costs a conversion with an adapted context.

    python tools/measure_approximate_cache.py MODEL.gguf RUN --holes 62

Holes of 4, 8 and 16 tokens in held-out text, and 64 tokens behind prompts of 64, each with whole passes and
with the cache, without chance: seconds, tokens that are right, and tokens that are the same in both.
"""

import argparse
import time
from pathlib import Path

import numpy as np
from finished_run import open_run
from numpy.typing import NDArray
from rich.console import Console
from rich.progress import track
from tool_errors import run_tool

from ggml_diffusion.errors import UserError
from ggml_diffusion.evaluation.infilling import cut_holes
from ggml_diffusion.generation.denoise import GenerationConfig
from ggml_diffusion.generation.diffusion_model import DiffusionModel

LENGTHS = (4, 8, 16)
N_PROMPT = N_WRITTEN = 64


def measure(model: DiffusionModel, texts: list[NDArray[np.int32]], truth: list[NDArray[np.int32]]) -> str:
    """Fill the masks of texts in both ways, in turn; (T,) tokens each, and what stood in their holes."""
    right, seconds = np.zeros(2), np.zeros(2)
    same = total = 0
    console = Console(stderr=True)
    for text, answer in track(
        list(zip(texts, truth, strict=True)), "texts", console=console, disable=not console.is_terminal
    ):
        holes = text == model.mask_token_id
        filled = []
        for kind in (0, 1):
            config = GenerationConfig(temperature=0.0, approximate_cache=bool(kind))
            started_s = time.perf_counter()
            filled.append(model.fill(text, config)[holes])
            seconds[kind] += time.perf_counter() - started_s
            right[kind] += (filled[-1] == answer).sum()
        same += int((filled[0] == filled[1]).sum())
        total += len(answer)
    return (
        f"right {right[0] / total:.3f} and {right[1] / total:.3f}, the same {same / total:.3f}, "
        f"tokens/s {total / seconds[0]:.1f} and {total / seconds[1]:.1f}"
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--holes", type=int, default=62, help="of each length, and prompts")
    parser.add_argument("--seed", type=int, default=0, help="of the places")
    given = parser.parse_args()
    model, held_out = open_run(given.model, given.run)
    if model.rule.context == "frozen":
        raise UserError(f"{given.run}: its context is frozen, which is computed once anyway")
    print(model.engine.description)
    for length in LENGTHS:
        holes = cut_holes(held_out, length, 1, model.mask_token_id, given.seed)[: given.holes]
        masks = np.full(length, model.mask_token_id, np.int32)
        line = measure(model, [hole.filled(masks) for hole in holes], [hole.answer for hole in holes])
        print(f"{len(holes)} holes of {length}, whole passes and cache: {line}")
    texts: list[NDArray[np.int32]] = []
    truth: list[NDArray[np.int32]] = []
    for tokens, n_tokens in zip(held_out.tokens, held_out.lengths, strict=True):
        if n_tokens >= N_PROMPT + N_WRITTEN and len(texts) < given.holes:
            text = tokens[: N_PROMPT + N_WRITTEN].copy()
            truth.append(text[N_PROMPT:].copy())
            text[N_PROMPT:] = model.mask_token_id
            texts.append(text)
    print(f"{N_WRITTEN} tokens behind {len(texts)} prompts of {N_PROMPT}: {measure(model, texts, truth)}")


if __name__ == "__main__":
    run_tool(main)
