"""Denoise with transformers and peft: a conversion by ggml-diffusion, as a PEFT folder, on its base.

usage: python denoise.py BASE --prompt "The keys are" --suffix " so nobody can open the door." --length 6

BASE is the Hugging Face model that the GGUF was made from (a name or a folder), or the GGUF itself. Needs
torch, transformers, peft and safetensors, and gguf for a GGUF. This file lies beside adapter_config.json and
may be copied and changed; it uses nothing of ggml-diffusion.

Letters: T tokens, C hidden size, V vocabulary.
"""

import argparse
import json
import math
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

Tensor = Any  # of torch


class Denoiser:
    """A base with the adapter of a folder, its mask embedding and its time embedding.

    Attributes:
        rule: diffusion_config.json.
        mask: id of the mask token.
        model: the base with its adapter.

    """

    def __init__(self, folder: str | Path, base: str | Path) -> None:
        """Load both, in float32.

        Args:
            folder: with adapter_config.json, diffusion_config.json and the tensors.
            base: what `from_pretrained` takes, or a GGUF file.

        """
        self.rule = json.loads((Path(folder) / "diffusion_config.json").read_text(encoding="utf-8"))
        self.mask = self.rule["mask_token_id"]
        self._extra = load_file(Path(folder) / "embeddings.safetensors")
        name, options = pretrained(base)
        plain = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **options)
        self.model = PeftModel.from_pretrained(plain, str(folder)).eval()

    def logits(self, tokens: Tensor, time: float | None) -> Tensor:
        """Raw logits (T, V) of tokens (T,), masks included, at a diffusion time in [0, 1]."""
        embed = self.model.get_input_embeddings().requires_grad_(False)
        rows = self._extra["mask_embedding"] * (tokens == self.mask)[:, None]
        if time is not None and "time_embedding.weight" in self._extra:
            rows = rows + self._time_row(time)
        # Some models scale their embeddings inside of this layer, and what is added to them with it.
        inputs = embed(tokens[None]) + rows * getattr(embed, "embed_scale", 1.0)
        with torch.no_grad():
            output = self.model(inputs_embeds=inputs, attention_mask=self._bias(len(tokens)))
        return output.logits[0].float()

    def fill(self, tokens: Tensor, block: int = 8) -> Tensor:
        """Replace every mask token of (T,), one a step: the surest of the `block` leftmost ones."""
        tokens, n_maskable = tokens.clone(), max(1, len(tokens) - 1)
        while (where := (tokens == self.mask).nonzero()[:, 0]).numel():
            logits = self.logits(tokens, self.time_at(len(where) / n_maskable))
            logits[:, self.mask] = -math.inf
            where = where[:block]
            shift = 1 if self.rule["prediction"] == "shifted" else 0
            best = logits[where - shift].softmax(-1).max(-1)
            surest = int(best.values.argmax())
            tokens[where[surest]] = best.indices[surest]
        return tokens

    def time_at(self, share_masked: float) -> float:
        """The time at which such a share of the text is masked: the schedule's inverse."""
        low, high = 0.0, 1.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self._mask_probability(middle) < share_masked else (low, middle)
        return high

    def _mask_probability(self, t: float) -> float:
        kind = self.rule["noise_schedule"]
        if kind == "linear":
            return t
        if kind == "cosine":
            return 1 - math.sin(math.pi / 2 * (1 - t))
        sigma = 1e-4 * math.expm1(math.log(20 / 1e-4) * t)
        return math.expm1(-sigma) / math.expm1(-(20 - 1e-4))

    def _time_row(self, t: float) -> Tensor:
        """The time embedding (C,): sines and cosines of rows of a table, interpolated, times a matrix."""
        weight, bias = self._extra["time_embedding.weight"], self._extra["time_embedding.bias"]
        position = t * (self.rule["time_max_timesteps"] - 1)
        low = int(position)
        high = min(low + 1, self.rule["time_max_timesteps"] - 1)
        half = weight.shape[1] // 2
        frequencies = torch.exp(torch.arange(half, dtype=torch.float64) * (-math.log(10000.0) / half))
        rows = [
            torch.cat([torch.sin(row * frequencies), torch.cos(row * frequencies)]) for row in (low, high)
        ]
        features = (rows[0] * (1 - (position - low)) + rows[1] * (position - low)).float()
        return weight @ features + bias

    def _bias(self, n_tokens: int) -> Tensor:
        """What is added to attention scores, (1, 1, T, T): nothing is hidden at causal ratio 0, but from the
        first token, which sees itself alone where it is an attention sink."""
        ratio = self.rule["causal_ratio"]
        weight_of_future = math.log(1 - ratio) if ratio < 1 else -math.inf
        bias = torch.triu(torch.full((n_tokens, n_tokens), weight_of_future), 1)
        if self.rule["attention_sink"]:
            bias[0, 1:] = -math.inf
        return bias[None, None]


def pretrained(base: str | Path) -> tuple[str, dict[str, str]]:
    """The arguments of `from_pretrained` for a name, a folder or a GGUF file."""
    path = Path(base)
    return (str(path.parent), {"gguf_file": path.name}) if path.suffix == ".gguf" else (str(base), {})


def main() -> None:
    """Fill the hole between a prompt and a suffix, and print all of it."""
    parser = argparse.ArgumentParser(description="Denoise with transformers and peft.")
    parser.add_argument("base")
    parser.add_argument("--prompt", default="Once upon a time")
    parser.add_argument("--suffix", default="")
    parser.add_argument("--length", type=int, default=16)
    arguments = parser.parse_args()
    denoiser = Denoiser(Path(__file__).resolve().parent, arguments.base)
    name, options = pretrained(arguments.base)
    tokenizer = AutoTokenizer.from_pretrained(name, **options)
    before = tokenizer(arguments.prompt)["input_ids"]
    after = tokenizer(arguments.suffix, add_special_tokens=False)["input_ids"] if arguments.suffix else []
    tokens = torch.tensor(before + [denoiser.mask] * arguments.length + after)
    print(tokenizer.decode(denoiser.fill(tokens), skip_special_tokens=True))


if __name__ == "__main__":
    main()
