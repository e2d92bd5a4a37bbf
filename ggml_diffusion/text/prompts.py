"""Prompts and responses: from a JSON record to the tokens that are given and those that are to be learned.

A record is a "prompt" with its "completion", or "messages" whose last one is the assistant's; a chat template
makes text of those. Where the base wants a token in front of every text, the prompt begins with it. Prompt
and response are tokenised as one text and cut at the seam; where a token reaches across the seam, the prompt
is tokenised by itself, as it is when text is generated, and the response as text that goes on.

The response ends with one end-of-text, which is learned like any other token; nothing follows it. A template
that ends an answer with a token of its own keeps that in front of it.

Deliberately not here: files and lines (files.py), the template's process (chat_template.py), masks
(corruption.py).
"""

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ggml_diffusion.errors import UserError
from ggml_diffusion.text.chat_template import ChatTemplate

_FIRST_MARK = 0xF0000  # from here on Unicode gives no character a meaning


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


class Chat:
    """Messages as tokens, by a model's chat template; a context manager, which ends the template's process.

    What a message holds is plain text: only the template's own marks become control tokens. So the names of
    control tokens in messages get a character inside that no message contains, before the template is filled.
    """

    def __init__(self, template: ChatTemplate, tokenizer: TextEncoder) -> None:
        self._template = template
        self._tokenizer = tokenizer
        names = "|".join(re.escape(name) for name in tokenizer.control_tokens)
        self._names = re.compile(f"(?=(?:{names})).", re.DOTALL) if names else None  # the first character

    def __enter__(self) -> "Chat":
        return self

    def __exit__(self, *_: object) -> None:
        self._template.close()

    def opening(self, messages: Sequence[Mapping[str, Any]]) -> NDArray[np.int32]:
        """The tokens (n,) of messages and of what opens the answer to them.

        Raises:
            UserError: the template refuses the messages.

        """
        mark, marked = self._marked(messages)
        text = self._template.render(marked, add_generation_prompt=True)
        return with_start(self._tokenizer.encode(text, special=True, mark=mark), self._tokenizer)

    def example(self, messages: Sequence[Mapping[str, Any]]) -> Example:
        """All but the last message with what opens it, and the last one up to the token that ends it.

        Raises:
            UserError: the template refuses the messages, or writes those before the answer differently once
                the answer is there.

        """
        mark, marked = self._marked(messages)
        prompt = self._template.render(marked[:-1], add_generation_prompt=True)
        whole = self._template.render(marked, add_generation_prompt=False)
        if not whole.startswith(prompt):
            raise UserError(
                "the model's chat template writes the messages before an answer differently once the answer "
                'is there: give "prompt" and "completion" instead of "messages"'
            )
        head, response = cut_at_seam(prompt, whole[len(prompt) :], self._tokenizer, special=True, mark=mark)
        ends = np.flatnonzero(np.isin(response, list(self._tokenizer.end_ids)))
        if len(ends):
            response = response[: ends[0] + 1]
        return Example(with_start(head, self._tokenizer), response)

    def _marked(self, messages: Sequence[Mapping[str, Any]]) -> tuple[str | None, list[Any]]:
        """The messages with a mark inside the names of control tokens; None where there is no such name."""
        names = self._names
        if names is None or not any(names.search(text) for text in _strings(messages)):
            return None, list(messages)
        everything = json.dumps(messages, ensure_ascii=False)
        mark = next(chr(code) for code in range(_FIRST_MARK, sys.maxunicode) if chr(code) not in everything)

        def put(value: Any) -> Any:
            if isinstance(value, str):
                return names.sub(lambda start: start[0] + mark, value)
            if isinstance(value, list):
                return [put(item) for item in value]
            return {key: put(item) for key, item in value.items()} if isinstance(value, dict) else value

        return mark, put(list(messages))


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
        if "messages" in record:
            return self._of_messages(record["messages"])
        prompt, completion = record.get("prompt"), record.get("completion")
        if not isinstance(prompt, str) or not isinstance(completion, str):
            return None
        head, response = cut_at_seam(prompt, completion, self._tokenizer)
        return self._ended(with_start(head, self._tokenizer), response)

    def _of_messages(self, messages: object) -> Example:
        messages = _checked(messages)
        if self._chat is None:
            template = self._tokenizer.open_chat_template()
            if template is None:
                raise UserError(
                    'this model has no chat template: give "prompt" and "completion" instead of "messages"'
                )
            self._chat = Chat(template, self._tokenizer)
        example = self._chat.example(messages)
        return self._ended(example.prompt, example.response)

    def _ended(self, prompt: NDArray[np.int32], response: NDArray[np.int32]) -> Example:
        """Let the response end with one end-of-text: where the template has put it, or after all of it."""
        end_of_text = self._tokenizer.eos_id
        if end_of_text is None:
            return Example(prompt, response)
        ends = np.flatnonzero(response == end_of_text)
        text = response[: ends[0]] if len(ends) else response
        return Example(prompt, np.append(text, np.int32(end_of_text)))


def _strings(value: object) -> Iterator[str]:
    """Every string in messages, but for the names of their keys."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _strings(item)
    elif isinstance(value, Sequence):
        for item in value:
            yield from _strings(item)


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
