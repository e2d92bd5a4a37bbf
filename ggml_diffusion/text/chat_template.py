"""Chat messages as text, by the template that a model's GGUF carries.

A template is a program by an unknown author. It runs in jinja2's immutable sandbox, which keeps it from
Python's internals, inside a process of its own, which can be ended when it takes too long or too much memory.
The names that templates expect are those of the Hugging Face libraries: messages, add_generation_prompt,
tools, documents (None), bos_token, eos_token, unk_token, pad_token, raise_exception, tojson,
strftime_now, break and continue, and generation, which marks an answer and changes no text. Only the clock
stands still, so that the same messages give the same text on every day.

Deliberately not here: which messages are a prompt (prompts.py), tokens (tokenizer.py).
Sources: jinja2's documentation of its sandbox, "Security Considerations"; the documentation of chat templates
of the transformers library, "Writing a chat template".
"""

import contextlib
import datetime
import json
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from ggml_diffusion.child import isolated
from ggml_diffusion.errors import UserError, one_line

START_LIMIT_S = 60.0  # Python and jinja2 on a busy machine
TIME_LIMIT_S = 10.0
MEMORY_LIMIT_BYTES = 1 << 30
_MAX_REPLY_BYTES = 64 << 20
TODAY = (2024, 7, 26)  # for every template: the day that Llama 3's own takes where there is no clock


class ChatTemplate:
    """A template in its process, which starts with the first use; a context manager."""

    def __init__(self, template: str, bos_token: str, eos_token: str, **other_tokens: str) -> None:
        """Keep a template.

        Args:
            template: jinja2 source, a GGUF's tokenizer.chat_template.
            bos_token: how the vocabulary writes it, "" if it has none.
            eos_token: the same for end-of-text.
            other_tokens: the same for other tokens that templates may name, as unk_token and pad_token.

        """
        names = {"bos_token": bos_token, "eos_token": eos_token, **other_tokens}
        self._setup = {"template": template, "names": names}
        self._process: subprocess.Popen[bytes] | None = None

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool,
        tools: Sequence[Any] | None = None,
    ) -> str:
        """The text of messages.

        Args:
            messages: each with "role" and "content".
            add_generation_prompt: end with what opens an answer.
            tools: what the assistant may call, as JSON schemas.

        Raises:
            UserError: the template is no template, refuses the messages, or reaches a limit.

        """
        if self._process is None:
            self._start()
        request = {"messages": list(messages), "add_generation_prompt": add_generation_prompt, "tools": tools}
        return self._ask(request, TIME_LIMIT_S)

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def __enter__(self) -> "ChatTemplate":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _start(self) -> None:
        self._process = subprocess.Popen(
            isolated("ggml_diffusion.text.chat_template", "_serve()"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._ask(self._setup, START_LIMIT_S)

    def _ask(self, request: Mapping[str, Any], time_limit_s: float) -> str:
        assert self._process is not None and self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            self._fail("ended without a word")
        reply = json.loads(self._read_line(time_limit_s))
        if "error" in reply:
            raise UserError(f"the model's chat template fails: {one_line(reply['error'])}")
        return str(reply["text"])

    def _read_line(self, time_limit_s: float) -> bytes:
        assert self._process is not None and self._process.stdout is not None
        descriptor, line = self._process.stdout.fileno(), bytearray()
        end_s = time.monotonic() + time_limit_s
        while not line.endswith(b"\n"):
            if not select.select([descriptor], [], [], max(0.0, end_s - time.monotonic()))[0]:
                self._fail(f"took longer than {time_limit_s:g} s")
            chunk = os.read(descriptor, 1 << 16)
            if not chunk:
                self._fail("ended without a word, as if out of memory")
            line += chunk
            if len(line) > _MAX_REPLY_BYTES:
                self._fail(f"wrote more than {_MAX_REPLY_BYTES >> 20} MB")
        return bytes(line)

    def _fail(self, reason: str) -> NoReturn:
        self.close()
        raise UserError(f"the model's chat template {reason}")


# -- inside the process ----------------------------------------------------------------------------


def _serve() -> None:
    """Answer requests, one JSON line each: first the template, then messages."""
    with contextlib.suppress(ImportError, ValueError, OSError):  # macOS knows no such limit
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT_BYTES, MEMORY_LIMIT_BYTES))
    setup = json.loads(sys.stdin.readline())
    try:
        template = _compile(setup["template"])
        reply = {"text": ""}
    except Exception as error:  # whatever a template can raise is a reply
        template, reply = None, {"error": _reason(error)}
    _write(reply)
    for line in sys.stdin:
        request = json.loads(line)
        try:
            assert template is not None
            text = template.render(documents=None, **setup["names"], **request)
            reply = {"text": text}
        except Exception as error:
            reply = {"error": _reason(error)}
        _write(reply)


def _write(reply: Mapping[str, str]) -> None:
    sys.stdout.write(json.dumps(reply) + "\n")
    sys.stdout.flush()


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _compile(source: str) -> Any:
    """A jinja2 template in the sandbox; imported here, because only the child needs it."""
    from jinja2 import nodes
    from jinja2.exceptions import TemplateError
    from jinja2.ext import Extension
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Generation(Extension):
        """The tag that marks what the assistant writes; what stands inside is written as it is."""

        tags = {"generation"}  # noqa: RUF012 -- as the base class has it

        def parse(self, parser: Any) -> nodes.Node:
            line = next(parser.stream).lineno
            body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
            return nodes.Scope(body, lineno=line)

    def raise_exception(message: object) -> NoReturn:
        raise TemplateError(str(message))

    def to_json(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: Any = None,
        sort_keys: bool = False,
    ) -> str:  # jinja2's own writes HTML
        return json.dumps(
            value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
        )

    def strftime_now(form: str) -> str:
        return datetime.datetime(*TODAY).strftime(form)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, "jinja2.ext.loopcontrols"]
    )
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = strftime_now
    environment.filters["tojson"] = to_json
    return environment.from_string(source)
