"""A conversion as a PEFT folder that can denoise: LoRA pairs, what else was trained, and a program.

    adapter_config.json, adapter_model.safetensors   what peft loads (formats/peft_folder.py)
    embeddings.safetensors                           mask and time embeddings, which peft has no place for
    diffusion_config.json                            how the outputs are to be read
    denoise.py, README.md                            a program, and what it is

Deliberately not here: the program itself (denoise_with_peft.py, a file of its own that is copied).
"""

import json
import re
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from ggml_diffusion.durable import replace_file, replace_text
from ggml_diffusion.errors import UserError, quoted
from ggml_diffusion.formats.adapter_file import CheckpointMetadata, DiffusionCheckpoint
from ggml_diffusion.formats.model_file import ModelFile
from ggml_diffusion.formats.peft_folder import write_peft_folder
from ggml_diffusion.formats.tensor_names import MASK_EMBEDDING, TIME_BIAS, TIME_WEIGHT
from ggml_diffusion.generation.reading import ReadingRule

EMBEDDINGS_NAME, RULE_NAME = "embeddings.safetensors", "diffusion_config.json"
_NAME = re.compile(r"(?:https://huggingface\.co/)?([\w.-]+/[\w.-]+)")
DENOISE_PROGRAM = Path(__file__).with_name("denoise_with_peft.py")


def export_peft(folder: Path, checkpoint: DiffusionCheckpoint, base: ModelFile) -> None:
    """Write the folder, which is made; each file is whole or not there.

    Raises:
        UserError: the conversion does not fit the base, has a frozen context, or writing failed.

    """
    checkpoint.check_merges()
    checkpoint.check_shapes(base)
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder}: cannot be made: {error.strerror}") from None
    name = _hugging_face_name(base)
    write_peft_folder(folder, checkpoint.adapter(), base, name)
    others = {
        key: np.ascontiguousarray(checkpoint.tensors[key])
        for key in (MASK_EMBEDDING, TIME_WEIGHT, TIME_BIAS)
        if key in checkpoint.tensors
    }

    def write(temporary: Path) -> None:
        temporary.write_bytes(save(others, {"format": "pt"}))

    replace_file(folder / EMBEDDINGS_NAME, write)
    replace_text(folder / RULE_NAME, json.dumps(_rule(checkpoint), indent=2) + "\n")
    replace_text(folder / "denoise.py", DENOISE_PROGRAM.read_text(encoding="utf-8"))
    replace_text(folder / "README.md", _readme(checkpoint.metadata, name))


def _hugging_face_name(base: ModelFile) -> str | None:
    """The base's name there, where its file says it: "HuggingFaceTB/SmolLM2-135M-Instruct"."""
    for key in ("general.repo_url", "general.source.huggingface.repository", "general.source.repo_url"):
        value = base.metadata.get(key)
        if isinstance(value, str) and (match := _NAME.fullmatch(value)):
            return match[1]
    return None


def _rule(checkpoint: DiffusionCheckpoint) -> dict[str, object]:
    rule, metadata = ReadingRule.of_checkpoint(checkpoint), checkpoint.metadata
    return {
        "mask_token_id": metadata.mask_token_id,
        "prediction": rule.prediction,
        "causal_ratio": rule.causal_ratio,
        "attention_sink": rule.attention_sink,
        "noise_schedule": rule.noise_schedule.type,
        "time_max_timesteps": metadata.time_max_timesteps,
        "block_size": rule.block_size,
        "prompts": rule.prompts,
        "base_model": metadata.base_model,
        "base_sha256": metadata.base_sha256,
        "conversion_steps": metadata.conversion_steps,
        "version": metadata.version,
    }


def _readme(metadata: CheckpointMetadata, name: str | None) -> str:
    base = name or "BASE"
    row = "at i - 1" if metadata.prediction == "shifted" else "at i"
    sink = ", except from the first token, which sees itself alone" if metadata.attention_sink else ""
    return f"""# A masked-diffusion adapter

LoRA for {quoted(metadata.base_model)}, trained for {metadata.conversion_steps} steps by ggml-diffusion
so that the model fills masked tokens from both sides. SHA-256 of the GGUF:
`{metadata.base_sha256}`.

```
pip install torch transformers peft
python denoise.py {base} --prompt "The keys are" --suffix " so nobody can open the door." --length 6
```

The first argument is the Hugging Face model that the GGUF was made from, a name or a folder, or the GGUF
itself (`pip install gguf`). On other weights than those of the GGUF the adapter is only as good as the two
are alike.

From Python:

```python
import torch
from transformers import AutoTokenizer
from denoise import Denoiser

denoiser = Denoiser(".", "{base}")
tokenizer = AutoTokenizer.from_pretrained("{base}")
before = tokenizer("Once upon a time")["input_ids"]
tokens = torch.tensor(before + [denoiser.mask] * 16)
print(tokenizer.decode(denoiser.fill(tokens)))
```

`PeftModel.from_pretrained` alone loads the pairs. It leaves the attention causal, the mask token without its
embedding and the time untold, and sampling that token after token is not diffusion. `denoise.py` adds:

- **Attention**: a mask of shape (1, 1, T, T) that hides nothing{sink}.
- **Mask embedding** (`{EMBEDDINGS_NAME}`): added to the embedding of token {metadata.mask_token_id}.
- **Time embedding**, where there is one: added to every embedding; it tells which share is masked.
- **The token at i** is read from the output {row}, with the mask token left out.

In models with sliding windows (Gemma 2 and 3, OLMo 3) that mask shows all of a text to every layer, so a text
should not be longer than the window.
"""
