"""Chat templates: what they can use, what they cannot reach, and their limits."""

import pytest
from texts import CHATML

from ggml_diffusion.errors import UserError
from ggml_diffusion.text import chat_template
from ggml_diffusion.text.chat_template import ChatTemplate

TALK = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello <you> & é"}]


def render(source: str, messages=TALK, add_generation_prompt=False) -> str:
    with ChatTemplate(source, "<s>", "</s>", unk_token="<unk>") as template:
        return template.render(messages, add_generation_prompt=add_generation_prompt)


def test_messages_become_the_text_of_the_template():
    with ChatTemplate(CHATML, "", "") as template:
        prompt = template.render(TALK[:1], add_generation_prompt=True)
        whole = template.render(TALK, add_generation_prompt=False)
    assert prompt == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert whole == prompt + "Hello <you> & é<|im_end|>\n"


@pytest.mark.parametrize(
    "source, text",
    [
        ("{{ bos_token }}x{{ eos_token }}", "<s>x</s>"),
        ("{{ messages[1] | tojson }}", '{"role": "assistant", "content": "Hello <you> & é"}'),
        ("{% for m in messages %}{{ m.role }}{% break %}{% endfor %}", "user"),
        ("  {% if true %}\nx\n  {% endif %}\ny", "x\ny"),
        ("{{ strftime_now('%d %b %Y') }}", "26 Jul 2024"),
        ("{% if tools is none and documents is none %}none{% endif %}", "none"),
        ("{{ unk_token }}", "<unk>"),
        ("{% if never_given is defined %}x{% else %}y{% endif %}", "y"),
        ("{{ {'b': 1, 'a': 'é'} | tojson(sort_keys=true) }}", '{"a": "é", "b": 1}'),
        ("{{ [1, 2] | tojson(separators=(',', ':')) }}", "[1,2]"),
        ("{{ {'a': 'é'} | tojson(indent=2, ensure_ascii=true) }}", '{\n  "a": "\\u00e9"\n}'),
        (
            "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
            "{% endgeneration %}{% else %}{% continue %}{% endif %}{% endfor %}",
            "Hello <you> & é",
        ),
    ],
)
def test_templates_find_the_names_and_the_white_space_rules_that_they_expect(source, text):
    assert render(source) == text


@pytest.mark.parametrize(
    "source, reason",
    [
        ("{{ raise_exception('Only user and\nassistant') }}", "template fails: Only user and assistant"),
        ("{% for %}", "template fails: "),
        ("{{ messages[0].content.__class__.__mro__ }}", "template fails: .*unsafe"),
        ("{{ cycler.__init__.__globals__.os.system('true') }}", "template fails: .*unsafe"),
        ("{{ messages.append(1) }}", "template fails: .*unsafe"),
        ("{% include 'x' %}", "template fails: no loader"),
        ("{{ nobody.name }}", "template fails: 'nobody' is undefined"),
        ("{{ range(10**9) | length }}", "template fails: .*[Rr]ange"),
        ("{{ ('x' * 10**10) | length }}", "template fails: MemoryError"),
    ],
)
def test_what_a_template_must_not_do_is_refused_in_one_line(source, reason):
    with pytest.raises(UserError, match=reason) as refusal:
        render(source)
    assert "\n" not in str(refusal.value)


def test_a_template_that_never_ends_is_stopped(monkeypatch):
    monkeypatch.setattr(chat_template, "TIME_LIMIT_S", 0.5)
    forever = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
    with pytest.raises(UserError, match=r"took longer than 0\.5 s"):
        render(forever)


def test_a_template_that_writes_without_end_is_stopped(monkeypatch):
    monkeypatch.setattr(chat_template, "_MAX_REPLY_BYTES", 1 << 16)
    with pytest.raises(UserError, match="wrote more than"):
        render("{{ 'x' * 1000000 }}")


def test_the_process_ends_with_the_template():
    template = ChatTemplate(CHATML, "", "")
    template.render(TALK, add_generation_prompt=False)
    process = template._process
    template.close()
    assert process.poll() is not None
    template.close()


def test_one_process_renders_many_messages():
    with ChatTemplate(CHATML, "", "") as template:
        texts = {
            template.render([{"role": "user", "content": str(n)}], add_generation_prompt=False)
            for n in range(200)
        }
    assert len(texts) == 200
