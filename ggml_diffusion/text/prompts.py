"""A prompt and its response, as tokens: one text, cut at the seam.

Where a token reaches across the seam, the prompt is tokenised by itself, as it is when text is generated, and
the response as text that goes on. Where the base wants a token in front of every text, the prompt begins with
it.

Deliberately not here: which record becomes what (examples.py), chat templates (chat.py), masks
(corruption.py).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from ggml_diffusion.text.chat_template import ChatTemplate


class TextEncoder(Protocol):
    """What is needed of a tokenizer; `Tokenizer` has it. Text without messages needs only what stands before
    `open_chat_template`."""

    @property
    def eos_id(self) -> int | None:
        """The end-of-text token, None if the vocabulary has none."""

    @property
    def start_id(self) -> int | None:
        """The token that the base wants in front of every text, None if there is none."""

    def encode(
        self, text: str, *, special: bool = False, continued: bool = False, mark: str | None = None
    ) -> NDArray[np.int32]:
        """The tokens (n,) of a text.

        With `special` the names of control tokens stand for these, but not where `mark` stands inside. A text
        that is `continued` goes on where other text ended.
        """

    def is_text(self, token: int) -> bool:
        """Whether what stands behind a token goes on with a text."""

    def open_chat_template(self) -> ChatTemplate | None:
        """The model's chat template, None if it has none."""

    @property
    def control_tokens(self) -> Mapping[str, int]:
        """The tokens that no plain text contains, by name."""

    @property
    def end_ids(self) -> frozenset[int]:
        """The tokens that end an answer."""


@dataclass(frozen=True)
class Example:
    """A prompt and its response, int32 (n,) each; the response ends with end-of-text."""

    prompt: NDArray[np.int32]
    response: NDArray[np.int32]


def with_start(tokens: NDArray[np.int32], tokenizer: TextEncoder) -> NDArray[np.int32]:
    """Tokens (n,) of a text behind the token that the base wants in front of it, unless that is there."""
    start = tokenizer.start_id
    if start is None or (len(tokens) and tokens[0] == start):
        return tokens
    return np.concatenate([np.array([start], dtype=np.int32), tokens])


def cut_at_seam(
    prompt: str, response: str, tokenizer: TextEncoder, *, special: bool = False, mark: str | None = None
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """The tokens of a prompt and of the response that follows it; see `TextEncoder.encode`."""
    head = tokenizer.encode(prompt, special=special, mark=mark)
    whole = tokenizer.encode(prompt + response, special=special, mark=mark)
    if np.array_equal(head, whole[: len(head)]):
        return head, whole[len(head) :]
    continued = len(head) > 0 and tokenizer.is_text(int(head[-1]))
    return head, tokenizer.encode(response, special=special, continued=continued, mark=mark)
