"""Whether `generate --verify` writes the base's own greedy text, what is accepted, and how fast it is.

    python tools/measure_verified.py MODEL.gguf RUN --prompts 100

Prompts are pieces of 16 to 63 tokens of the run's held-out text. The text to compare with comes from the base
alone, one token after the other over a context of its own; the bar is every prompt.
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

from ggml_diffusion.generation.denoise import GenerationConfig
from ggml_diffusion.generation.diffusion_model import DiffusionModel


def greedy_text(model: DiffusionModel, prompt: str, length: int) -> list[int]:
    """The base's likeliest tokens after a prompt, up to the end of the text."""
    tokens: NDArray[np.int32] = model.start_tokens(model.tokenizer.encode(prompt))
    context = model.engine.context(len(tokens) + length)
    written: list[int] = []
    try:
        while len(written) < length and model.tokenizer.eos_id not in written:
            is_last = np.arange(len(tokens)) == len(tokens) - 1
            logits = context.extend(tokens, select=is_last, int8=model.int8)[0]
            logits[model.mask_token_id] = -np.inf
            written.append(int(logits.argmax()))
            tokens = np.array(written[-1:], dtype=np.int32)
    finally:
        context.close()
    return written


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--length", type=int, default=64, help="tokens of each text")
    parser.add_argument("--block-length", type=int, default=4, help="tokens of a draft")
    parser.add_argument("--seed", type=int, default=0, help="of the places of the prompts")
    given = parser.parse_args()
    model, held_out = open_run(given.model, given.run)
    random = np.random.default_rng(given.seed)
    config = GenerationConfig(length=given.length, temperature=0.0, block_length=given.block_length)
    console = Console(stderr=True)
    same = rounds = drafted = accepted = singles = n_tokens = 0
    verified_s = plain_s = 0.0
    for _ in track(range(given.prompts), "prompts", console=console, disable=not console.is_terminal):
        start, n = int(random.integers(0, 60)), int(random.integers(16, 64))
        sequence = held_out.tokens[random.integers(len(held_out))]
        prompt = model.tokenizer.decode(sequence[start : start + n])
        started_s = time.perf_counter()
        written = model.write_verified(prompt, config)[1]
        between_s = time.perf_counter()
        expected = greedy_text(model, prompt, given.length)
        verified_s += between_s - started_s
        plain_s += time.perf_counter() - between_s
        same += written.tokens.tolist() == expected
        rounds, drafted = rounds + written.rounds, drafted + written.drafted
        accepted, singles = accepted + written.accepted, singles + written.singles
        n_tokens += len(written.tokens)
    print(f"the base's greedy text: {same} of {given.prompts} prompts ({model.engine.description})")
    print(
        f"{rounds} drafts: {accepted} of {drafted} tokens accepted, {1 + accepted / max(1, rounds):.2f} "
        f"tokens a draft; {singles} tokens one after the other"
    )
    print(f"tokens/s: {n_tokens / verified_s:.1f} verified, {n_tokens / plain_s:.1f} the base alone")


if __name__ == "__main__":
    run_tool(main)
