"""Messages as tokens, by a model's chat template.

What a template can write is written, the rest is refused: a part of a message that is no text, a call of a
tool or what a tool answered where the template leaves it out. Content in parts is given as one text, or text
as parts, as the template wants it; content that is null beside calls of tools is empty.

Deliberately not here: the template's process (chat_template.py), which message is learned (examples.py).
Sources: the documentation of chat templates of the transformers library, "Tool use"; OpenAI's chat format, in
which arguments of calls are JSON in a string, where templates take objects.
"""

import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggml_diffusion.errors import UserError, quoted
from ggml_diffusion.text.chat_template import ChatTemplate
from ggml_diffusion.text.prompts import Example, TextEncoder, cut_at_seam, with_start

_FIRST_MARK = 0xF0000  # from here on Unicode gives no character a meaning
_PROBE = "a message of the user"
_USUAL_ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Conversation:
    """Messages whose content is text, and the tools that the assistant may call, if any."""

    messages: list[dict[str, Any]]
    tools: list[Any] | None = None

    @classmethod
    def of_record(cls, messages: object, tools: object = None) -> "Conversation":
        """Check what a record holds.

        Raises:
            UserError: it is no conversation of text that ends with an answer.

        """
        if not isinstance(messages, list) or not all(
            isinstance(message, dict) and isinstance(message.get("role"), str) for message in messages
        ):
            raise UserError('"messages" must be a list of objects with strings "role" and "content"')
        if not messages or messages[-1]["role"] != "assistant":
            raise UserError(
                'the last of the "messages" must have the role "assistant": it is what is learned'
            )
        if isinstance(tools, str):
            tools = _parsed(tools)
        if tools is not None and not isinstance(tools, list):
            raise UserError('"tools" must be a list')
        return cls([_checked(message, n) for n, message in enumerate(messages, start=1)], tools or None)


class Chat:
    """A chat template that writes tokens; a context manager, which ends the template's process.

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
        mark, marked = self._marked(Conversation([dict(message) for message in messages]))
        text = self._render(marked.messages, None, is_open=True)
        return with_start(self._tokenizer.encode(text, special=True, mark=mark), self._tokenizer)

    def example(self, conversation: Conversation) -> Example:
        """All but the last message with what opens it, and the last one up to the token that ends it.

        Raises:
            UserError: the template refuses the messages, leaves calls or answers of tools out, or writes
                those before the answer differently once the answer is there; or the answer is empty.

        """
        mark, marked = self._marked(conversation)
        prompt = self._render(marked.messages[:-1], marked.tools, is_open=True)
        whole = self._render(marked.messages, marked.tools, is_open=False)
        if not whole.startswith(prompt):
            raise UserError(
                "the model's chat template writes the messages before an answer differently once the answer "
                'is there: give "prompt" and "completion" instead of "messages"'
            )
        _check_written(marked.messages, whole)
        head, response = cut_at_seam(prompt, whole[len(prompt) :], self._tokenizer, special=True, mark=mark)
        ends = np.flatnonzero(np.isin(response, list(self._tokenizer.end_ids)))
        if len(ends):
            if ends[0] == 0:
                raise UserError("the answer is empty: there is nothing to learn")
            response = response[: ends[0] + 1]
        return Example(with_start(head, self._tokenizer), response)

    def _render(self, messages: Sequence[dict[str, Any]], tools: list[Any] | None, *, is_open: bool) -> str:
        if self._wants_parts:
            messages = [{**message, "content": _as_parts(message["content"])} for message in messages]
        return self._template.render(messages, add_generation_prompt=is_open, tools=tools)

    @cached_property
    def _wants_parts(self) -> bool:
        """Whether the template writes content in parts only, as those of models that see pictures."""

        def writes(content: object) -> bool:
            try:
                text = self._template.render(
                    [{"role": "user", "content": content}], add_generation_prompt=False
                )
            except UserError:
                return False
            return _PROBE in text and "'type'" not in text

        return not writes(_PROBE) and writes(_as_parts(_PROBE))

    def _marked(self, conversation: Conversation) -> tuple[str | None, Conversation]:
        """The same with a mark inside the names of control tokens; None where there is no such name."""
        names, everything = self._names, [conversation.messages, conversation.tools]
        if names is None or not any(names.search(text) for text in _strings(everything)):
            return None, conversation
        text = json.dumps(everything, ensure_ascii=False)
        mark = next(chr(code) for code in range(_FIRST_MARK, sys.maxunicode) if chr(code) not in text)

        def put(value: Any) -> Any:
            if isinstance(value, str):
                return names.sub(lambda start: start[0] + mark, value)
            if isinstance(value, list):
                return [put(item) for item in value]
            return {key: put(item) for key, item in value.items()} if isinstance(value, dict) else value

        return mark, Conversation(put(conversation.messages), put(conversation.tools))


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


def _checked(message: Mapping[str, Any], number: int) -> dict[str, Any]:
    """A message with its content as text, and its calls as templates take them."""
    checked = dict(message)
    calls = message.get("tool_calls") or None
    if calls is not None:
        checked["tool_calls"] = [
            _call(call, number) for call in (calls if isinstance(calls, list) else [None])
        ]
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_text_of_part(part, number) for part in content)
    elif content is None:
        if calls is None:
            raise UserError(f"message {number} has no content, and calls no tool")
        content = ""
    elif not isinstance(content, str):
        raise UserError(f'"content" of message {number} must be a string, a list of parts or null')
    try:
        content.encode()
    except UnicodeEncodeError:
        raise UserError(f'"content" of message {number} holds half of a surrogate pair') from None
    return {**checked, "content": content}


def _text_of_part(part: object, number: int) -> str:
    if isinstance(part, str):
        return part
    kind = part.get("type", "text") if isinstance(part, dict) else type(part).__name__
    text = part.get("text") if isinstance(part, dict) else None
    if kind != "text" or not isinstance(text, str):
        raise UserError(f"message {number} has a part of type {quoted(str(kind))}: only text can be learned")
    return text


def _call(call: object, number: int) -> dict[str, Any]:
    """A call of a tool with its arguments as an object."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if (
        not isinstance(call, dict)
        or not isinstance(function, dict)
        or not isinstance(function.get("name"), str)
    ):
        raise UserError(f'"tool_calls" of message {number} must be a list of objects with a "function"')
    arguments = function.get("arguments")
    parsed = _parsed(arguments) if isinstance(arguments, str) else arguments
    function = {**function, "arguments": parsed if isinstance(parsed, dict) else arguments}
    return {**call, "function": function} if "function" in call else function


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def _as_parts(content: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": content}]


def _check_written(messages: Sequence[Mapping[str, Any]], text: str) -> None:
    """Refuse messages that the template left out, as it may for tools and for roles that it does not know."""
    for message in messages:
        role, content = message["role"], message["content"].strip()
        as_json = json.dumps(content, ensure_ascii=False)[1:-1]
        if role not in _USUAL_ROLES and content not in text and as_json not in text:
            raise UserError(f"the model's chat template does not write messages of the role {quoted(role)}")
        for call in message.get("tool_calls") or ():
            name = call.get("function", call)["name"]
            if name not in text:
                raise UserError(f"the model's chat template does not write calls of tools, as {quoted(name)}")
