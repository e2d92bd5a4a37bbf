"""Messages with parts, tools and null content: written where the template can, refused where it cannot."""

import json
from types import MappingProxyType

import numpy as np
import pytest
from texts import CHATML, ByteTokenizer

from ggml_diffusion.errors import UserError
from ggml_diffusion.text.chat_template import ChatTemplate
from ggml_diffusion.text.examples import ExampleReader
from ggml_diffusion.text.loader import TextDataLoader

EOS = 0
# Written as Qwen's and Hermes' templates do, in few words.
TOOLS = """{%- if tools %}{{ '<|im_start|>tools\\n' }}
{%- for t in tools %}{{ t | tojson }}{% endfor %}{{ '<|im_end|>\\n' }}{% endif %}
{%- for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.content %}{{ m.content }}{% endif %}
{%- for call in m.tool_calls or [] %}{% set f = call.function or call %}
{{- '<call>' + f.name + ' ' + (f.arguments | tojson) + '</call>' }}{% endfor %}{{ '<|im_end|>\\n' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
# As templates of models that see pictures: content is a list of parts.
PARTS = """{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}
{%- for part in m.content %}
{%- if part.type == 'text' %}{{ part.text }}{% else %}{{ '<image>' }}{% endif %}{% endfor %}
{{- '<|im_end|>\\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
# Leaves out what it does not know.
PLAIN = """{% for m in messages %}{% if m.role in ('user', 'assistant') %}
{{- '<|im_start|>' + m.role + '\\n' + m.content }}{{ '<|im_end|>\\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""


class ChatTokenizer(ByteTokenizer):
    """A byte a token, but "<|im_end|>" is the end of a text where control tokens are read."""

    control_tokens = MappingProxyType({"<|im_end|>": EOS})
    end_ids = frozenset([EOS])

    def __init__(self, template: str = CHATML) -> None:
        self.template = template

    def open_chat_template(self) -> ChatTemplate:
        return ChatTemplate(self.template, "", "")

    def encode(self, text, *, special=False, continued=False, mark=None) -> np.ndarray:
        parts = text.split("<|im_end|>") if special else [text]
        tokens: list[int] = []
        for number, part in enumerate(parts):
            tokens += [EOS] * (number > 0) + super().encode(part.replace(mark or "\0", "")).tolist()
        return np.array(tokens, dtype=np.int32)


def written(record: dict[str, object], template: str = CHATML) -> tuple[str, str]:
    """Prompt and response of a record as text, each end of a message as "|"."""

    def text(tokens: np.ndarray) -> str:
        return bytes(ord("|") if token == EOS else token - 1 for token in tokens.tolist()).decode()

    with ExampleReader(ChatTokenizer(template)) as reader:
        example = reader.read(record)
    return text(example.prompt), text(example.response)


def say(role: str, content: object = None, **more: object) -> dict[str, object]:
    return {"role": role, "content": content, **more}


def part(text: str) -> dict[str, str]:
    return {"type": "text", "text": text}


CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
ASKED = [
    say("user", "sum?"),
    say("assistant", None, tool_calls=[CALL]),
    say("tool", "it is 2", tool_call_id="1"),
]


@pytest.mark.parametrize("template", [CHATML, PARTS, TOOLS, PLAIN])
@pytest.mark.parametrize(
    "content", ["Hi you", [part("Hi"), part(" you")], ["Hi", " you"], [{"text": "Hi you"}]]
)
def test_content_in_parts_is_the_text_of_its_parts_whatever_the_template_wants(template, content):
    prompt, response = written(
        {"messages": [say("user", content), say("assistant", [part("Yes.")])]}, template
    )
    assert prompt == "<|im_start|>user\nHi you|\n<|im_start|>assistant\n"
    assert response == "Yes.|"


@pytest.mark.parametrize("kind", ["image", "image_url", "input_audio"])
@pytest.mark.parametrize("template", [CHATML, PARTS])
def test_a_part_that_is_no_text_is_refused(template, kind):
    record = {"messages": [say("user", [{"type": kind, kind: "x"}, part("a")]), say("assistant", "b")]}
    with pytest.raises(UserError, match=f"message 1 has a part of type '{kind}': only text can be learned"):
        written(record, template)


def test_calls_and_answers_of_tools_are_written():
    prompt, response = written(
        {"messages": [*ASKED, say("assistant", "2.")], "tools": [{"name": "add"}]}, TOOLS
    )
    assert prompt == (
        '<|im_start|>tools\n{"name": "add"}|\n<|im_start|>user\nsum?|\n'
        '<|im_start|>assistant\n<call>add {"a": 1}</call>|\n'
        "<|im_start|>tool\nit is 2|\n<|im_start|>assistant\n"
    )
    assert response == "2.|"


@pytest.mark.parametrize("call", [CALL, {"name": "add", "arguments": {"a": 1}}])
def test_a_call_can_be_the_answer(call):
    _, response = written({"messages": [say("user", "sum?"), say("assistant", tool_calls=[call])]}, TOOLS)
    assert response == '<call>add {"a": 1}</call>|'


def test_tools_as_a_text_of_json_are_tools():
    record = {"messages": [say("user", "a"), say("assistant", "b")], "tools": json.dumps([{"name": "add"}])}
    assert written(record, TOOLS)[0].startswith('<|im_start|>tools\n{"name": "add"}|')


def test_names_of_control_tokens_in_calls_and_tools_are_plain_text():
    call = {"function": {"name": "f", "arguments": {"x": "<|im_end|>"}}}
    record = {"messages": [say("user", "a"), say("assistant", tool_calls=[call])], "tools": ["<|im_end|>"]}
    prompt, response = written(record, TOOLS)
    assert "<|im_end|>" in prompt and response == '<call>f {"x": "<|im_end|>"}</call>|'


@pytest.mark.parametrize(
    "messages, words",
    [
        ([*ASKED, say("assistant", "2.")], "does not write calls of tools, as 'add'"),
        ([say("user", "a"), say("tool", "it is 2"), say("assistant", "b")], "of the role 'tool'"),
        (
            [say("user", "sum?"), say("assistant", "I call", tool_calls=[CALL])],
            "not write calls of tools, as 'add'",
        ),
        ([say("developer", "be brief"), say("user", "a"), say("assistant", "b")], "of the role 'developer'"),
    ],
)
def test_what_a_template_leaves_out_is_refused(messages, words):
    with pytest.raises(UserError, match=words):
        written({"messages": messages}, PLAIN)


@pytest.mark.parametrize(
    "messages, words",
    [
        ([say("user"), say("assistant", "b")], "message 1 has no content, and calls no tool"),
        ([say("user", "a"), say("assistant", tool_calls=[])], "message 2 has no content, and calls no tool"),
        (
            [say("user", "a"), say("assistant", tool_calls=[{"name": 3}])],
            '"tool_calls" of message 2 must be a list',
        ),
        ([say("user", "a"), say("assistant", tool_calls="add")], '"tool_calls" of message 2 must be a list'),
        (
            [say("user", {"a": 1}), say("assistant", "b")],
            '"content" of message 1 must be a string, a list of parts',
        ),
    ],
)
def test_messages_without_text_are_refused(messages, words):
    with pytest.raises(UserError, match=words):
        written({"messages": messages}, TOOLS)


def test_tools_that_are_no_list_are_refused():
    with pytest.raises(UserError, match='"tools" must be a list'):
        written({"messages": [say("user", "a"), say("assistant", "b")], "tools": {"name": "add"}}, TOOLS)


def test_such_records_are_left_out_and_named(tmp_path):
    good = {"messages": [say("user", "a"), say("assistant", "b")]}
    bad = {"messages": [say("user", [{"type": "image"}]), say("assistant", "b")]}
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in [*[good] * 15, bad, *[good] * 15]))
    loader = TextDataLoader(path, ChatTokenizer(), 64, 4)
    assert (loader.n_examples, loader.n_refused) == (30, 1)
    assert loader.refusals == [
        f"{path}, line 16: message 1 has a part of type 'image': only text can be learned"
    ]
