"""Write the lists of models and tensor types in README.md and docs/models.md from the tables of the reader.

It fills what stands between `<!-- models: begin -->` and `<!-- models: end -->` in README and leaves the rest
of it alone; docs/models.md is written whole.

usage: make_model_docs.py [--check]   (--check writes nothing and fails if a page is not up to date)
"""

import re
import sys
import textwrap
from pathlib import Path

from ggml_diffusion.formats.architectures import ARCHITECTURES, Architecture, Feature, Gate, refusals
from ggml_diffusion.formats.tensor_types import TENSOR_TYPES

ROOT = Path(__file__).resolve().parents[1]
README, PAGE = ROOT / "README.md", ROOT / "docs" / "models.md"
MARKED = re.compile(r"(<!-- models: begin[^>]*-->\n).*?(<!-- models: end -->)", re.DOTALL)
FEATURES = {
    Feature.POST_NORMS: "norms behind both blocks",
    Feature.HEAD_NORMS: "norms of queries and keys",
    Feature.GATE_IN_UP: "gate and up in one tensor",
    Feature.EMBEDDING_BY_WIDTH: "scaled embeddings",
    Feature.SCALE_KEYS: "scales of embeddings, residual, scores and logits",
    Feature.SCORE_CAP: "soft-capped scores",
    Feature.LOGIT_CAP: "soft-capped logits",
    Feature.YARN_KEYS: "query temperature beyond the original context",
}
HEAD = """# Models and tensor types

<!-- written by tools/make_model_docs.py from formats/architectures.py and formats/tensor_types.py -->

A file works if its architecture (`general.architecture`) and its tensor types stand here, in one file or in
parts (`NAME-00001-of-00003.gguf`: name any of them). `ggml-diffusion inspect FILE` says what a file has, and
if it cannot be converted, why.

## Architectures

| architecture | models | beyond Llama |
|---|---|---|
"""
REFUSED = """
Biases are used where a file has them, and so are tensors that hold queries, keys and values together.

What is refused, by a part of the architecture's name:

| name | reason |
|---|---|
"""
NOTES = """
## Sliding windows

In Gemma 2 and 3 and OLMo 3 most layers see a window: a query sees the keys that are nearer than its width.
When the attention is bidirectional the window keeps that width on both sides. llama.cpp without a causal mask
bounds the past alone and shows all of the future, so its logits differ from these on texts that are longer
than the window; on shorter ones, and causally on any, they agree.

## RoPE

Scalings `none`, `linear`, `yarn` and `longrope`, and frequency factors. LongRoPE (Phi) has two sets of
factors: a sequence up to the original context takes the short ones, a longer one the long ones. llama.cpp
chooses by the size of its context, whatever the text.

## Gemma's gate

The engine computes GELU by its formula. llama.cpp reads it from a table in half precision on the CPU, so its
logits of Gemma are further from exact than those of other models: 1e-8 to 4e-7 nats on tiny models in F32.

## Tensor types

| type | bits a weight | unpacked by |
|---|---|---|
"""


def _list(names: list[str]) -> str:
    return f"{', '.join(names[:-1])} and {names[-1]}" if len(names) > 1 else "".join(names)


def _item(text: str) -> str:
    """One item of a list, at README's width."""
    wrapped = textwrap.fill(
        text, 118, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False, break_long_words=False
    )
    return wrapped + "\n"


def readme_part() -> str:
    """What README says of both."""
    own = [kind.name for kind in TENSOR_TYPES.values() if kind.own_kernels]
    others = [kind.name for kind in TENSOR_TYPES.values() if not kind.own_kernels]
    families = "; ".join(f"{entry.models} (`{name}`)" for name, entry in ARCHITECTURES.items())
    models = _item(
        f"**Model:** a GGUF, in one file or in parts, of one of these families: {families}. Whatever the "
        "engine would compute wrongly is refused with a sentence."
    )
    types = _item(
        f"**Tensor types:** {_list(own)}; slower, unpacked through ggml: {_list(others)}. "
        "Both tables: [docs/models.md](docs/models.md)."
    )
    return models + types


def _beyond(entry: Architecture) -> str:
    words = [text for feature, text in FEATURES.items() if feature in entry.features]
    if Feature.PRE_NORMS not in entry.features:
        words.insert(0, "no norms in front of the blocks")
    if entry.gate is Gate.GELU:
        words.append("GELU gate")
    if entry.window_period:
        words.append(f"windows in {entry.window_period - 1} of {entry.window_period} layers")
    if entry.no_rope_period:
        words.append(f"no RoPE in 1 of {entry.no_rope_period} layers")
    return ", ".join(words)


def page() -> str:
    """The whole of docs/models.md."""
    models = [f"| `{name}` | {entry.models} | {_beyond(entry)} |" for name, entry in ARCHITECTURES.items()]
    refused = [f"| `{part}` | it {reason} |" for part, reason in refusals().items()]
    types = [
        f"| {kind.name} | {kind.bits:.4g} | "
        f"{'own kernels' if kind.own_kernels else 'ggml: slower, and no int8 products in the forward'} |"
        for kind in TENSOR_TYPES.values()
    ]
    lines = [HEAD.rstrip(), *models, REFUSED.rstrip(), *refused, NOTES.rstrip(), *types]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Write both, or compare them."""
    readme = README.read_text(encoding="utf-8")
    texts = {README: MARKED.sub(lambda match: match[1] + readme_part() + match[2], readme), PAGE: page()}
    if "--check" not in sys.argv[1:]:
        for path, text in texts.items():
            path.write_text(text, encoding="utf-8")
        return 0
    stale = [path for path, text in texts.items() if not path.exists() or path.read_text("utf-8") != text]
    for path in stale:
        print(f"{path} is not up to date: run `python tools/make_model_docs.py`", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
