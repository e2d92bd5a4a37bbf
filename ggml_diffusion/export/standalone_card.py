"""The card of a standalone file: OUT.md beside OUT.gguf, for whoever gets the two.

Deliberately not here: the card of a run (training/model_card.py), the README of a PEFT folder (peft.py).
Source: the front matter is that of Hugging Face's model cards.
"""

from pathlib import Path

from ggml_diffusion.durable import replace_text
from ggml_diffusion.export.comparison import Agreement
from ggml_diffusion.export.standalone import Standalone
from ggml_diffusion.export.targets import DIFFUSION_TWINS
from ggml_diffusion.formats.adapter_file import CheckpointMetadata, DiffusionCheckpoint
from ggml_diffusion.training.model_card import MARK, is_card, markdown_name


def write_standalone_card(
    target: Path, checkpoint: DiffusionCheckpoint, plan: Standalone, found: Agreement
) -> Path | None:
    """Write the card of a standalone file beside it.

    Args:
        target: the GGUF.
        checkpoint: what was merged.
        plan: how.
        found: how near the file is to base and adapter.

    Returns:
        Its path, None where somebody else's file of that name stays.

    Raises:
        UserError: it cannot be written.

    """
    path = target.with_suffix(".md")
    if path.exists() and not is_card(path):
        return None
    replace_text(path, standalone_card(target.name, checkpoint, plan, found))
    return path


def standalone_card(name: str, checkpoint: DiffusionCheckpoint, plan: Standalone, found: Agreement) -> str:
    """The text of a card."""
    metadata, file = checkpoint.metadata, markdown_name(name)
    time = "none" if plan.time is None else f"that of {plan.time:.3g}, folded in"
    row = "i - 1" if metadata.prediction == "shifted" else "i"
    return f"""---
library_name: llama.cpp
tags: [masked-diffusion, infilling, gguf]
---
{MARK}
# {file}: {markdown_name(metadata.base_model)} as a masked-diffusion model

One file without adapter: the weights of the base with what a conversion has learnt merged into them. It
predicts masked tokens from both sides.

| | |
|---|---|
| base | `{markdown_name(metadata.base_model)}`, SHA-256 `{metadata.base_sha256}` |
| conversion | {metadata.conversion_steps} steps, {metadata.training_tokens:,} tokens |
| made by | ggml-diffusion {markdown_name(metadata.version)} |
| architecture | `{plan.arch}` |
| time embedding | {time} |
| mask token | {metadata.mask_token_id} |
| predicts the token at i | from the output at {row} |
| KL from base and adapter | {found.mean_kl:.1e} nats in llama.cpp, mean over {found.n_tokens} tokens |
| the likeliest token is the same | at {found.top1:.0%} of them |

## Use

{_use(plan, file, metadata, row)}
## What it is not

- **Not for sampling token after token.** Ollama, LM Studio, llama-server and koboldcpp load the file or
  refuse it, and none of them denoises: what they write with it is not diffusion, and the text shows it.
- Whatever holds for the base (its license, its languages, what it should not be asked) holds for this.
"""


def _use(plan: Standalone, file: str, metadata: CheckpointMetadata, row: str) -> str:
    if plan.arch in DIFFUSION_TWINS.values():
        return f"""llama.cpp's own program; `-ub` is the length of all:

```
llama-diffusion-cli -m {file} -p "Once upon a time" -ub 64 --diffusion-steps 64 --diffusion-eps 0.001
```

The `Llama` class of llama-cpp-python wants a cache, which llama.cpp does not keep for this architecture:
`ggml-diffusion export standalone --arch same` writes a file for it, of the base's own architecture.
"""
    evaluate = "llama.eval(tokens)"
    if metadata.attention_sink:
        evaluate = "llama.eval(tokens[:1])  # the first token sees itself alone\nllama.eval(tokens[1:])"
    return f"""With llama-cpp-python, one pass over a text with a hole of four tokens:

```python
from llama_cpp import Llama

MASK = {metadata.mask_token_id}
llama = Llama("{file}", n_ctx=256, n_batch=256, n_ubatch=256, logits_all=True, verbose=False)
before = llama.tokenize(b"The keys are", add_bos=False)
after = llama.tokenize(b" so nobody can open the door.", add_bos=False)
tokens = [*before, *[MASK] * 4, *after]
{evaluate}
rows = llama.scores[: len(tokens)].copy()
rows[:, MASK] = -float("inf")
holes = [i for i, token in enumerate(tokens) if token == MASK]
print(llama.detokenize([int(rows[{row}].argmax()) for i in holes]))
```

Denoising is doing that again and again: keep the surest token, clear the memory with `llama.reset()`, repeat.
llama.cpp's own llama-diffusion-cli does not run this architecture.
"""
