"""Prompts and responses: from a JSON record to the tokens that are given and those that are to be learned.

A record is a "prompt" with its "completion", or "messages" whose last one is the assistant's; a chat template
makes text of those. The response ends with one end-of-text, which is learned like any other token; nothing
follows it.

Deliberately not here: files and lines (files.py), the template's process (chat_template.py), masks
(corruption.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ggml_diffusion.errors import UserError
from ggml_diffusion.text.chat_template import ChatTemplate


class TextEncoder(Protocol):
    """What is needed of a tokenizer; `Tokenizer` has it. Plain text needs no more than `encode(text)`."""

    @property
    def eos_id(self) -> int | None:
        """The end-of-text token, None if the vocabulary has none."""

    def open_chat_template(self) -> ChatTemplate | None:
        """The model's chat template, None if it has none."""

    def encode(self, text: str, *, special: bool = False) -> NDArray[np.int32]:
        """The tokens (n,) of a text; with `special` the names of control tokens stand for these."""


@dataclass(frozen=True)
class Example:
    """A prompt and its response, int32 (n,) each; the response ends with end-of-text."""

    prompt: NDArray[np.int32]
    response: NDArray[np.int32]


class ExampleReader:
    """Makes examples of records; a context manager, which ends the chat template's process."""

    def __init__(self, tokenizer: TextEncoder) -> None:
        self._tokenizer = tokenizer
        self._template: ChatTemplate | None = None

    def __enter__(self) -> "ExampleReader":
        return self

    def __exit__(self, *_: object) -> None:
        if self._template is not None:
            self._template.close()

    def read(self, record: Mapping[str, Any]) -> Example | None:
        """The example that a record holds, or None if it is of another kind.

        Raises:
            UserError: the messages are no conversation that ends with an answer, or the template fails.

        """
        if "messages" in record:
            return self._of_messages(record["messages"])
        prompt, completion = record.get("prompt"), record.get("completion")
        if not isinstance(prompt, str) or not isinstance(completion, str):
            return None
        return self._example(self._tokenizer.encode(prompt), self._tokenizer.encode(completion))

    def _of_messages(self, messages: object) -> Example:
        messages = _checked(messages)
        if self._template is None:
            self._template = self._tokenizer.open_chat_template()
        if self._template is None:
            raise UserError(
                'this model has no chat template: give "prompt" and "completion" instead of "messages"'
            )
        prompt = self._template.render(messages[:-1], add_generation_prompt=True)
        whole = self._template.render(messages, add_generation_prompt=False)
        if not whole.startswith(prompt):
            raise UserError(
                "the model's chat template writes the messages before an answer differently once the answer "
                'is there: give "prompt" and "completion" instead of "messages"'
            )
        encode = self._tokenizer.encode
        return self._example(encode(prompt, special=True), encode(whole[len(prompt) :], special=True))

    def _example(self, prompt: NDArray[np.int32], response: NDArray[np.int32]) -> Example:
        """Let the response end with one end-of-text: where the template has put it, or after all of it."""
        end_of_text = self._tokenizer.eos_id
        if end_of_text is None:
            return Example(prompt, response)
        ends = np.flatnonzero(response == end_of_text)
        text = response[: ends[0]] if len(ends) else response
        return Example(prompt, np.append(text, np.int32(end_of_text)))


def _checked(messages: object) -> Sequence[Mapping[str, Any]]:
    if not isinstance(messages, list) or not all(
        isinstance(message, dict)
        and isinstance(message.get("role"), str)
        and isinstance(message.get("content"), str)
        for message in messages
    ):
        raise UserError('"messages" must be a list of objects with strings "role" and "content"')
    if not messages or messages[-1]["role"] != "assistant":
        raise UserError('the last of the "messages" must have the role "assistant": it is what is learned')
    return messages
