#!/usr/bin/env python3
"""How large the residual stream is, layer by layer: of the first token, of tokens that stand, of masks.

    python tools/residual_norms.py MODEL.gguf RUN --layers 1,3,15,29

A trained model makes the activations of a text's first token hundreds of times as large as all others, and
its heads rest there. A conversion may lose that, or do it to all tokens. This runs the tests' float64 network
on 96 tokens of the run's held-out text, half of them masked, with the run's newest weights, and prints norms
in front of each layer: the base on clean text, then the conversion.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tool_errors import run_tool

from ggml_diffusion.evaluation.suite import load_held_out
from ggml_diffusion.formats.adapter_file import DiffusionCheckpoint
from ggml_diffusion.text.tokenizer import Tokenizer
from ggml_diffusion.training.run import exported_weights

sys.path.append(str(Path(__file__).parent.parent / "tests"))
import oracle  # type: ignore[import-not-found]
import oracle_model  # type: ignore[import-not-found]

N_TOKENS = 96


def norms_by_layer(
    model: Any, adapter: Any, tokens: NDArray[np.int32], causal_ratio: float, attention_sink: bool
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The norm of each token in front of each layer (L, T), and the logits (T, V)."""
    seen: list[NDArray[np.float64]] = []
    norm = oracle._Block.norm

    def listening(block: Any, name: str, x: NDArray[np.float64]) -> Any:
        if name == "attn_norm":
            seen.append(np.linalg.norm(x, axis=1))
        return norm(block, name, x)

    oracle._Block.norm = listening
    try:
        w = oracle.mask_weights(len(tokens), causal_ratio, attention_sink=attention_sink)
        logits = oracle.sequence_logits(model, adapter, oracle.embeddings(model, adapter, tokens), w)
    finally:
        oracle._Block.norm = norm
    return np.array(seen), logits


def cross_entropy(
    logits: NDArray[np.float64], clean: NDArray[np.int32], masked: NDArray[np.bool_], rows_back: int
) -> float:
    """Of the masked tokens, nats."""
    places = np.flatnonzero(masked)
    losses = oracle.row_losses(logits[places - rows_back], clean[places], None)
    return float(losses.mean())


def main() -> None:
    """Compute and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("run", type=Path, help="a run of an adapted context without a time embedding")
    parser.add_argument("--layers", default="1,2,3,4,8,15,22,29", help="layers to print, by number")
    parser.add_argument("--seed", type=int, default=0, help="of the masks")
    given = parser.parse_args()
    checkpoint = DiffusionCheckpoint.load(exported_weights(given.run))
    metadata = checkpoint.metadata
    held_out = load_held_out(checkpoint, Tokenizer.from_gguf(given.model), 8).held_out
    clean = held_out.tokens[int(held_out.lengths.argmax())][:N_TOKENS]
    masked = np.random.default_rng(given.seed).random(len(clean)) < 0.5
    masked[0] = False
    noisy = np.where(masked, metadata.mask_token_id, clean)
    model = oracle_model.load_model(given.model)
    adapter = oracle.Adapter(dict(checkpoint.tensors), metadata.alpha, metadata.mask_token_id)
    rows_back = 1 if metadata.prediction == "shifted" else 0
    cases = (
        ("base, causal, clean", oracle.EMPTY_ADAPTER, clean, 1.0, 1),
        ("conversion", adapter, noisy, metadata.final_causal_ratio, rows_back),
    )
    for name, of_case, tokens, ratio, back in cases:
        norms, logits = norms_by_layer(model, of_case, tokens, ratio, metadata.attention_sink)
        print(f"{name}: cross-entropy of the masked tokens {cross_entropy(logits, clean, masked, back):.2f}")
        for layer in map(int, given.layers.split(",")):
            first, standing, hidden = norms[layer, 0], norms[layer, ~masked][1:], norms[layer, masked]
            print(
                f"  layer {layer:2}: first {first:.0f}, standing median {np.median(standing):.0f} "
                f"(most {standing.max():.0f}), masked {np.median(hidden):.0f} ({hidden.max():.0f})"
            )


if __name__ == "__main__":
    run_tool(main)
