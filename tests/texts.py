"""Small texts, a tokenizer of bytes and a chat template, for the tests that read text."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from ggml_diffusion.text.loader import TextDataLoader

EOS = 0
CHATML = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


class ByteTokenizer:
    """One token a byte, shifted up by one to leave 0 for the end of a text."""

    eos_id: int | None = EOS
    start_id: int | None = None

    def encode(
        self, text: str, *, special: bool = False, continued: bool = False, mark: str | None = None
    ) -> np.ndarray:
        return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.int32) + 1

    def is_text(self, token: int) -> bool:
        return token not in (self.eos_id, self.start_id)


def tokens_of(*texts: str) -> list[int]:
    """The stream that documents make, written out once more."""
    stream: list[int] = []
    for text in texts:
        stream += [byte + 1 for byte in text.encode()] + [EOS]
    return stream


def write_jsonl(path: Path, *texts: str) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


def loader_of(path: Path | list[Path], T: int = 8, B: int = 3, seed: int = 0, **options) -> TextDataLoader:
    return TextDataLoader(path, ByteTokenizer(), T, B, seed, **options)
