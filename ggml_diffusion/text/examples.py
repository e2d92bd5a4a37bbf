"""From a JSON record to an example: the tokens that are given and those that are to be learned.

A record is a "prompt" with its "completion", or "messages" whose last one is the assistant's.

The response ends with one end-of-text, which is learned like any other token; nothing follows it. A template
that ends an answer with a token of its own keeps that in front of it.

Deliberately not here: files and lines (files.py), how messages become text (chat.py).
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggml_diffusion.errors import UserError
from ggml_diffusion.text.chat import Chat, Conversation
from ggml_diffusion.text.prompts import Example, TextEncoder, cut_at_seam, with_start


class ExampleReader:
    """Makes examples of records; a context manager, which ends the chat template's process."""

    def __init__(self, tokenizer: TextEncoder) -> None:
        self._tokenizer = tokenizer
        self._chat: Chat | None = None

    def __enter__(self) -> "ExampleReader":
        return self

    def __exit__(self, *_: object) -> None:
        if self._chat is not None:
            self._chat.__exit__()

    def read(self, record: Mapping[str, Any]) -> Example | None:
        """The example that a record holds, or None if it is of another kind.

        Raises:
            UserError: the messages are no conversation that ends with an answer, or the template fails.

        """
        if record.get("messages") is not None:
            return self._of_messages(record["messages"], record.get("tools"))
        prompt, completion = record.get("prompt"), record.get("completion")
        if not isinstance(prompt, str) or not isinstance(completion, str):
            return None
        head, response = cut_at_seam(prompt, completion, self._tokenizer)
        return self._ended(with_start(head, self._tokenizer), response)

    def _of_messages(self, messages: object, tools: object) -> Example:
        conversation = Conversation.of_record(messages, tools)
        if self._chat is None:
            template = self._tokenizer.open_chat_template()
            if template is None:
                raise UserError(
                    'this model has no chat template: give "prompt" and "completion" instead of "messages"'
                )
            self._chat = Chat(template, self._tokenizer)
        example = self._chat.example(conversation)
        return self._ended(example.prompt, example.response)

    def _ended(self, prompt: NDArray[np.int32], response: NDArray[np.int32]) -> Example:
        """Let the response end with one end-of-text: where the template has put it, or after all of it."""
        end_of_text = -1 if self._tokenizer.eos_id is None else self._tokenizer.eos_id
        is_end = response == end_of_text
        text = response[: int(np.argmax(is_end))] if is_end.any() else response
        if len(text) == 0:
            raise UserError("the response is empty: there is nothing to learn")
        return Example(prompt, text if end_of_text < 0 else np.append(text, np.int32(end_of_text)))
