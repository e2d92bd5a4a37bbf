"""The model card of a run: README.md beside its exports, for whoever gets the folder; or of one adapter file.

Only what the files themselves say goes into it. Deliberately not here: the cards of other forms (export/).
Source: the front matter is that of Hugging Face's model cards.
"""

from pathlib import Path

from ggml_diffusion.durable import replace_text
from ggml_diffusion.errors import UserError
from ggml_diffusion.evaluation.held_out import MaskedScore, Score
from ggml_diffusion.formats.adapter_file import CheckpointMetadata, DiffusionCheckpoint
from ggml_diffusion.regular_file import open_regular
from ggml_diffusion.run_folder import CARD

# In the front of every card of ours: a README.md without it is somebody else's, and stays.
MARK = "<!-- model card by ggml-diffusion -->"
_FRONT_BYTES = 1 << 16
_RUN_FILES = """`adapter.safetensors` is everything that was trained, `adapter.gguf` the same for llama.cpp.
`config.toml` has every setting; `ggml-diffusion convert --config config.toml` is the command."""


def write_card(folder: Path, checkpoint: DiffusionCheckpoint, figures: str | None) -> bool:
    """Write the card, unless there is a README.md that is not ours; returns whether it was.

    Args:
        folder: of the run.
        checkpoint: what it exported.
        figures: from `figures_table`; None = nothing was measured.

    Raises:
        UserError: it cannot be written.

    """
    path = folder / CARD
    if path.exists() and not is_card(path):
        return False
    replace_text(path, card(checkpoint, figures))
    return True


def write_adapter_card(target: Path, checkpoint: DiffusionCheckpoint) -> Path | None:
    """Write the card of an adapter that was exported by itself, beside it; one in a run's folder has one.

    Args:
        target: the adapter.
        checkpoint: what is in it.

    Returns:
        Its path, None where it was not written: the folder has a card, or somebody else's file is there.

    Raises:
        UserError: it cannot be written.

    """
    path = target.with_suffix(".md")
    if is_card(target.parent / CARD) or (path.exists() and not is_card(path)):
        return None
    replace_text(path, card(checkpoint, None, target.name))
    return path


def is_card(path: Path) -> bool:
    """Whether a file is a card of ours."""
    try:
        with open_regular(path) as file:
            return MARK.encode() in file.read(_FRONT_BYTES)
    except UserError:
        return False


def figures_table(n_sequences: int, base: Score, before: list[MaskedScore], after: list[MaskedScore]) -> str:
    """Held-out figures as a table; arguments as in `Evidence`."""
    lines = [
        f"On {n_sequences} held-out sequences, the same masks in both columns:",
        "",
        "| | before | after |",
        "|---|---|---|",
    ]
    for one, other in zip(before, after, strict=True):
        ce, accuracy = one.visible.cross_entropy, one.visible.accuracy
        lines += [
            f"| cross-entropy of masked tokens, {one.share:.0%} masked, nats | {ce:.3f} | "
            f"{other.visible.cross_entropy:.3f} |",
            f"| accuracy, {one.share:.0%} masked | {accuracy:.3f} | {other.visible.accuracy:.3f} |",
        ]
    lines += [
        "",
        f"The base itself predicts the next token of clean text with {base.cross_entropy:.3f} nats.",
    ]
    return "\n".join(lines)


def card(checkpoint: DiffusionCheckpoint, figures: str | None, file: str | None = None) -> str:
    """The text of a card, of a run's folder or of one adapter file."""
    adapter = "." if file is None else markdown_name(file)
    metadata, settings = checkpoint.metadata, checkpoint.settings
    is_frozen = metadata.context == "frozen"
    # Where the text lay on somebody's disk is nobody's business.
    data = ", ".join(f"`{markdown_name(Path(name).name)}`" for name in settings.data or ["unknown"])
    model = markdown_name(Path(settings.base_model or metadata.base_model).name)
    near = f", and on a second look at the {metadata.margin} tokens beside them" if metadata.margin else ""
    context = (
        f"acts on masks alone{near}; text that stands is the base's own, computed once (`--context frozen`)"
        if is_frozen
        else "acts on all tokens, each of which sees all others (`--context adapted`)"
        + (
            ", but for the first, which sees itself alone (`--attention-sink`)"
            if metadata.attention_sink
            else ""
        )
    )
    return f"""---
library_name: ggml-diffusion
tags: [masked-diffusion, infilling, lora, gguf]
---
{MARK}
# A masked-diffusion adapter for {markdown_name(metadata.base_model)}

It makes an autoregressive model fill masked tokens from both sides. The adapter
{context}.

| | |
|---|---|
| base | `{markdown_name(metadata.base_model)}`, not changed and not in here |
| its GGUF's SHA-256 | `{metadata.base_sha256}` |
| trained on | {data} |
| | {metadata.conversion_steps} steps, {metadata.training_tokens:,} tokens |
| predicts the token at i | from the output at {"i - 1" if metadata.prediction == "shifted" else "i"} |
| mask token | {metadata.mask_token_id} |
| causal ratio of the attention | {metadata.final_causal_ratio:g} |
| made by | ggml-diffusion {markdown_name(metadata.version)}, {markdown_name(metadata.created_at)} |

{_RUN_FILES if file is None else f"`{adapter}` is everything that was trained."}

## Figures

{figures or "Nothing was measured: `ggml-diffusion evaluate` does, beside the base."}

## Use

```
ggml-diffusion infill {model} {adapter} notes.md --diff        # fills ___ and [[...]] in a text
ggml-diffusion generate {model} {adapter} --prompt "The keys are" --suffix " so stay here." --length 6
```

{_other_programs(metadata, model, adapter)}

## What it is not

- **Not for sampling token after token.** llama-server, koboldcpp and others load `adapter.gguf` and then
  write causally. That is not diffusion, and the text shows it.
- **Not a better writer than its base.** What it can do, and the base cannot, is use the text behind a hole.
- Whatever holds for the base (its license, its languages, what it should not be asked) holds for this.
"""


def _other_programs(metadata: CheckpointMetadata, model: str, adapter: str) -> str:
    if metadata.context == "frozen":
        return """Other programs apply an adapter to all of a text, so they cannot run this one: it has no
standalone file and no PEFT folder. A conversion with `--context adapted` has both. Over llama.cpp it drafts:
`ggml-diffusion generate ... --runtime llama.cpp --verify`."""
    one_file = f"""
- `ggml-diffusion export standalone {model} {adapter} standalone.gguf`: one file without adapter, which
  llama-diffusion-cli runs. Ollama (which refuses `ADAPTER` with a GGUF) and LM Studio (which has no adapters)
  can only be given that file, and do not denoise."""
    if metadata.attention_sink:
        one_file = """
- llama-diffusion-cli cannot let the first token see itself alone: a conversion for it needs
  `--no-attention-sink`."""
    alone = (
        " but for the first token, which is decoded by itself before it" if metadata.attention_sink else ""
    )
    return f"""Other programs take other forms:
{one_file}
- `ggml-diffusion export peft {model} {adapter} peft`: a folder for transformers and peft, with a program.
- llama-cpp-python, on whatever device its build has:

```python
from ggml_diffusion.llama_cpp import load

model = load("{model}", "{"adapter.safetensors" if adapter == "." else adapter}", n_gpu_layers=-1)
print(model.generate("The keys are", suffix=" so stay here."))
```

A program of one's own loads the adapter as a GGUF, or the standalone file: attention not causal, the whole
text in one micro-batch{alone}, and the memory cleared before each step."""


def markdown_name(text: str) -> str:
    """A name out of a file, safe in Markdown."""
    return "".join(
        letter if letter.isprintable() and letter not in "`|<>[]" else "?" for letter in text[:200]
    )
