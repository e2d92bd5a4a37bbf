#!/usr/bin/env python3
"""What each sampler is worth: quality of text against denoising steps and tokens a second, for a conversion.

    python tools/sampler_table.py MODEL.gguf RUN --json FILE --markdown FILE --plot FILE

Every sampler continues the same held-out prompts in 8, K/4, K/2 and K steps, drawing at temperature 1 from
all of the distribution, so that they differ in which position they reveal when. Perplexity is the base's, and
can be gamed by repeating; entropy, distinct pairs and repetition stand beside it, and the held-out text and
the base's own samples above (docs/evaluation.md).
"""

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tool_errors import run_tool

from ggml_diffusion.engine.cpu.q4_model import Q4Model
from ggml_diffusion.evaluation.fluency import WrittenText, cut_prompts, denoised_texts, reference_texts
from ggml_diffusion.evaluation.suite import load_held_out
from ggml_diffusion.formats.adapter_file import DiffusionCheckpoint
from ggml_diffusion.generation.denoise import GenerationConfig
from ggml_diffusion.generation.diffusion_model import DiffusionModel
from ggml_diffusion.text.tokenizer import Tokenizer
from ggml_diffusion.training.run import exported_weights

SAMPLERS: Mapping[str, Mapping[str, Any]] = {
    "random": {"order": "random"},
    "confidence": {"order": "confidence"},
    "margin": {"order": "margin"},
    "entropy": {"order": "entropy"},
    "threshold .9": {"order": "threshold", "threshold": 0.9},
    "threshold .5": {"order": "threshold", "threshold": 0.5},
    "blocks of 8, random": {"order": "random", "block_length": 8},
    "blocks of 8, confidence": {"order": "confidence", "block_length": 8},
    "random, remasking .1": {"order": "random", "remasking": 0.1},
    "blocks of 8, top-p .9": {"order": "confidence", "block_length": 8, "top_p": 0.9},
}
EVERYTHING = {"temperature": 1.0, "top_p": 1.0, "block_length": 0}


def measure(arguments: argparse.Namespace) -> dict[str, list[WrittenText]]:
    """All texts: those to compare with, then those of each sampler."""
    checkpoint = DiffusionCheckpoint.load(exported_weights(arguments.run))
    with Q4Model.from_gguf(arguments.model) as engine:
        checkpoint.check_base(engine.sha256)
        model = DiffusionModel.from_checkpoint(engine, Tokenizer.from_gguf(arguments.model), checkpoint)
        data = load_held_out(checkpoint, model.tokenizer, 4 * arguments.samples, data=arguments.data or ())
        prompts, truths = cut_prompts(
            data.held_out,
            model.tokenizer,
            model.mask_token_id,
            arguments.samples,
            arguments.prompt_length,
            arguments.length,
        )
        print(f"{len(prompts)} prompts of {arguments.prompt_length} tokens, {arguments.length} to write")
        texts = {"": reference_texts(model, prompts, truths, arguments.seed, len(prompts))}
        for name, settings in SAMPLERS.items():
            config = GenerationConfig(**{**EVERYTHING, **settings, "seed": arguments.seed})
            texts[name] = denoised_texts(model, prompts, arguments.length, config, len(prompts))
            print(as_markdown({name: texts[name]}).splitlines()[-1], flush=True)
    return texts


def as_markdown(texts: Mapping[str, list[WrittenText]]) -> str:
    """A row for each sampler and number of steps."""
    lines = [
        "| sampler | steps | passes a text | perplexity under the base | entropy | distinct-2 | repetition "
        "| tokens/s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, several in texts.items():
        for text in several:
            figures, perplexity = text.fluency, text.fluency.perplexity
            cells = [
                name or text.origin,
                "" if text.steps is None else str(text.steps),
                "" if text.forward_passes is None else f"{text.forward_passes:.1f}",
                f"{perplexity.value:.1f} ({perplexity.low:.1f} to {perplexity.high:.1f})",
                f"{figures.entropy.value:.2f}",
                f"{figures.distinct_2.value:.3f}",
                f"{figures.repetition.value:.3f}",
                "" if text.tokens_per_second is None else f"{text.tokens_per_second:.1f}",
            ]
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def draw(texts: Mapping[str, list[WrittenText]], path: Path) -> None:
    """Perplexity and entropy against tokens a second, a line for each sampler."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2)
    for name, several in texts.items():
        for text in several if not name else []:
            style = {
                "color": "#9aa0a6",
                "linestyle": "--" if text.origin == "base" else ":",
                "label": text.origin,
            }
            panels[0].axhline(text.fluency.perplexity.value, **style)
            panels[1].axhline(text.fluency.entropy.value, **style)
        if name:
            speeds = [text.tokens_per_second for text in several]
            panels[0].plot(
                speeds, [text.fluency.perplexity.value for text in several], marker="o", label=name
            )
            panels[1].plot(speeds, [text.fluency.entropy.value for text in several], marker="o", label=name)
    panels[0].set(title="perplexity under the base", xscale="log", yscale="log", xlabel="tokens a second")
    panels[1].set(title="entropy of a text's tokens, nats", xscale="log", xlabel="tokens a second")
    panels[1].legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    figure.savefig(path, dpi=110)


def main() -> None:
    """Parse, measure, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="the GGUF that was converted")
    parser.add_argument("run", type=Path, help="an output folder or adapter.safetensors")
    parser.add_argument("--data", action="append", help="the text of the training (as it was)")
    parser.add_argument("--samples", type=int, default=8, help="texts for each row (8)")
    parser.add_argument("--prompt-length", type=int, default=32, help="tokens of a prompt (32)")
    parser.add_argument("--length", type=int, default=64, help="tokens to write, K (64)")
    parser.add_argument("--seed", type=int, default=0, help="of all draws (0)")
    parser.add_argument("--json", type=Path, help="write all figures there")
    parser.add_argument("--markdown", type=Path, help="write the table there")
    parser.add_argument("--plot", type=Path, help="draw them there; needs matplotlib")
    arguments = parser.parse_args()
    texts = measure(arguments)
    if arguments.json is not None:
        figures = {name or "reference": [asdict(text) for text in several] for name, several in texts.items()}
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if arguments.markdown is not None:
        arguments.markdown.write_text(as_markdown(texts), encoding="utf-8")
    if arguments.plot is not None:
        draw(texts, arguments.plot)
    print(as_markdown(texts))


if __name__ == "__main__":
    run_tool(main)
