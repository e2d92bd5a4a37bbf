"""Tiny vocabularies for the models of make_tiny_gguf.py: plain ones, and one of the shape of each family.

They really tokenise and round-trip English. A family has the names and types of its control tokens, its
keys, and a chat template of the shape that its files have, in few lines.

It does not copy any family's pieces or merges: all have the few of `BPE_MERGES` or `SPM_PIECES`.

Sources: llama.cpp `src/llama-vocab.cpp` for what a vocabulary must hold, `conversion/*.py` for the type that
a family's tokens get.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import gguf

_Kind = gguf.TokenType

BPE_MERGES = ("Ġ t", "h e", "Ġ a", "i n", "Ġt he", "r e", "o n", "n d", "Ġa nd", "in g", "Ġ s", "Ġ o", "Ġo f")
SPM_PIECES = ("▁t", "he", "▁a", "in", "▁the", "re", "on", "nd", "▁and", "ing", "▁s", "▁o", "▁of")


@dataclass(frozen=True)
class Vocabulary:
    """What a GGUF's `tokenizer.*` keys hold; `merges` for byte-level BPE, `scores` for SentencePiece.

    ids: the token of each role, as "bos" in tokenizer.ggml.bos_token_id. What is None has no key.
    """

    model: str
    pre: str
    tokens: list[str]
    types: list[int]
    ids: dict[str, int]
    merges: list[str] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    add_bos: bool | None = False
    add_space_prefix: bool | None = None
    chat_template: str | None = None
    name: str | None = None


@dataclass(frozen=True)
class Family:
    """The tokens and keys of a family, but for its text.

    roles: names of tokens by role. user_defined: tokens that plain text may write as well.
    """

    model: str  # "gpt2" or "llama"
    pre: str
    control: Sequence[str]
    roles: Mapping[str, str]
    template: str
    user_defined: Sequence[str] = ()
    add_bos: bool | None = False
    add_space_prefix: bool | None = None
    name: str | None = None


# A system message of its own where there is none, and the list of tools behind it.
_QWEN25 = """{%- if messages[0].role == 'system' %}{% set system = messages[0].content %}
{%- else %}{% set system = 'You help.' %}{% endif %}
{{- '<|im_start|>system\\n' + system }}
{%- if tools %}{{ '\\n<tools>' }}
{%- for tool in tools %}{{ tool | tojson }}{% endfor %}{{ '</tools>' }}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- for m in messages %}{% if m.role != 'system' %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
# Thoughts stand in the last answer only, and an empty place for them in one without.
_QWEN3 = """{%- set ns = namespace(last=-1) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}{% set content = m.content %}
{%- if m.role == 'assistant' %}{% set thoughts = '' %}
{%- if '</think>' in content %}
{%- set thoughts = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}
{%- endif %}
{%- if loop.index0 > ns.last %}
{%- set content = '<think>\\n' + thoughts + '\\n</think>\\n\\n' + content %}
{%- endif %}
{%- endif %}
{{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\\n\\n</think>\\n\\n' }}{% endif %}
{%- endif %}"""
# The system message goes into the first turn of the user; turns must alternate.
_GEMMA = """{{ bos_token }}
{%- set system = messages[0].content + '\\n\\n' if messages[0].role == 'system' else '' %}
{%- set turns = messages[1:] if messages[0].role == 'system' else messages %}
{%- for m in turns %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Roles must alternate user/assistant/user/assistant') }}
{%- endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' }}
{{- (system if loop.first else '') + m.content | trim }}{{ '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"""
_PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\\n' + m.content + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)
_PHI4 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '<|im_sep|>' + m.content + '<|im_end|>' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
)
_GRANITE = """{%- if messages[0].role != 'system' %}
{{- '<|start_of_role|>system<|end_of_role|>Date: ' + strftime_now('%B %d, %Y') + '.' }}
{%- if documents %}{{ ' Use the documents.' }}{% endif %}
{{- '<|end_of_text|>\\n' }}
{%- endif %}
{%- for m in messages %}
{{- '<|start_of_role|>' + m.role + '<|end_of_role|>' + m.content + '<|end_of_text|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"""
# The answer stands between tags that mark it for training.
_SMOLLM3 = """{{- '<|im_start|>system\\nToday: ' + strftime_now('%d %B %Y') + '<|im_end|>\\n' }}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- generation %}{{ '<|im_start|>assistant\\n' + m.content + '<|im_end|>\\n' }}{% endgeneration %}
{%- elif m.role == 'system' %}{% continue %}
{%- else %}{{ '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}
{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
_LLAMA3 = """{{- bos_token }}
{%- if not date_string is defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday: ' + date_string }}
{%- if tools is not none %}{{ '\\nTools: ' + tools | tojson(indent=4) }}{% endif %}
{{- '<|eot_id|>' }}
{%- for m in messages %}
{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"""
# Marks of a turn are plain text in the oldest files, tokens in those of today.
_MISTRAL = """{{ bos_token }}
{%- for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}
{%- if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}
{%- else %}{{ ' ' + m.content + eos_token }}{% endif %}
{%- endfor %}"""
_OLMO2 = """{{ bos_token }}
{%- for m in messages %}
{{- '<|' + m.role + '|>\\n' + m.content }}
{%- if m.role == 'assistant' and loop.last %}{{ eos_token }}{% else %}{{ '\\n' }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"""

_CHATML_NAMES = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_QWEN_NAMES = (*_CHATML_NAMES, "<|object_ref_start|>", "<|image_pad|>", "<|fim_prefix|>", "<|fim_pad|>")
_QWEN_ROLES = {"bos": "<|endoftext|>", "eos": "<|im_end|>", "padding": "<|endoftext|>"}
_LLAMA3_NAMES = ("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>")

FAMILIES: Mapping[str, Family] = {
    "qwen2.5": Family(
        "gpt2", "qwen2", _QWEN_NAMES, _QWEN_ROLES, _QWEN25, user_defined=("<tool_call>", "</tool_call>")
    ),
    "qwen3": Family("gpt2", "qwen2", _QWEN_NAMES, _QWEN_ROLES, _QWEN3, user_defined=("<think>", "</think>")),
    "gemma3": Family(
        "llama",
        "default",
        ("<pad>", "<eos>", "<bos>", "<mask>", "<unused0>", "<unused1>", "<start_of_turn>", "<end_of_turn>"),
        {"bos": "<bos>", "eos": "<eos>", "unknown": "<unk>", "padding": "<pad>"},
        _GEMMA,
        add_bos=True,
        add_space_prefix=False,
    ),
    "phi3": Family(
        "llama",
        "default",
        ("<s>", "<|endoftext|>", "<|assistant|>", "<|placeholder1|>", "<|system|>", "<|end|>", "<|user|>"),
        {"bos": "<s>", "eos": "<|endoftext|>", "unknown": "<unk>", "padding": "<|endoftext|>"},
        _PHI3,
        user_defined=("</s>",),
        name="Tiny Phi-3",  # llama.cpp takes blanks away behind the control tokens of such a name
    ),
    "phi4": Family(
        "gpt2",
        "dbrx",
        ("<|dummy_0|>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|im_sep|>", "<|dummy_1|>"),
        {"bos": "<|endoftext|>", "eos": "<|im_end|>", "padding": "<|dummy_0|>"},
        _PHI4,
    ),
    "granite3": Family(
        "gpt2",
        "refact",
        (
            "<|end_of_text|>",
            "<fim_prefix>",
            "<filename>",
            "<gh_stars>",
            "<reponame>",
            "<|start_of_role|>",
            "<|end_of_role|>",
            "<|tool_call|>",
        ),
        dict.fromkeys(("bos", "eos", "unknown", "padding"), "<|end_of_text|>"),
        _GRANITE,
    ),
    "smollm3": Family(
        "gpt2",
        "smaug-bpe",
        (*_LLAMA3_NAMES, "<|im_start|>", "<|im_end|>"),
        {"bos": "<|begin_of_text|>", "eos": "<|im_end|>"},
        _SMOLLM3,
        user_defined=("<think>", "</think>"),
    ),
    "llama3": Family(
        "gpt2",
        "llama-bpe",
        (*_LLAMA3_NAMES, "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        {"bos": "<|begin_of_text|>", "eos": "<|eot_id|>"},
        _LLAMA3,
        add_bos=None,  # llama.cpp adds it for this pre-tokenizer
    ),
    "mistral": Family(
        "llama",
        "default",
        ("<s>", "</s>", "[INST]", "[/INST]", "[control_8]"),
        {"bos": "<s>", "eos": "</s>", "unknown": "<unk>"},
        _MISTRAL,
        add_bos=True,
    ),
    "olmo2": Family(
        "gpt2",
        "dbrx",
        ("<|endoftext|>", "<|fim_prefix|>", "<|im_start|>", "<|im_end|>", "<|extra_id_0|>", "<|pad|>"),
        {"bos": "<|endoftext|>", "eos": "<|endoftext|>", "padding": "<|pad|>"},
        _OLMO2,
        user_defined=("|||EMAIL_ADDRESS|||",),
    ),
}
TOKENIZERS = ("bpe", "spm", *FAMILIES)


def make_vocabulary(tokenizer: str, V: int, reserved: int) -> Vocabulary:
    """One of TOKENIZERS with V tokens; the plain ones have some `reserved` control tokens.

    ValueError: V is too small.
    """
    if tokenizer == "bpe":
        return bpe_vocabulary(V, reserved)
    return spm_vocabulary(V, reserved) if tokenizer == "spm" else family_vocabulary(FAMILIES[tokenizer], V)


def bpe_vocabulary(V: int, reserved: int) -> Vocabulary:
    """Byte-level BPE: unk, bos, eos, `reserved` control tokens, 256 bytes, a few merges, UNUSED up to V."""
    control = ["<|unk|>", "<|bos|>", "<|eos|>", *(f"<|reserved_{i}|>" for i in range(reserved))]
    ids = {"bos": 1, "eos": 2, "unknown": 0}
    tokens, types = _bpe_tokens(control)
    return _padded(Vocabulary("gpt2", "gpt-2", tokens, types, ids, list(BPE_MERGES)), V)


def spm_vocabulary(V: int, reserved: int) -> Vocabulary:
    """SentencePiece with byte fallback, as Llama 2: unk, bos, eos, 256 bytes, ASCII, a few pieces, UNUSED."""
    control = ["<s>", "</s>", *(f"<reserved_{i}>" for i in range(reserved))]
    ids = {"bos": 1, "eos": 2, "unknown": 0}
    tokens, types, scores = _spm_tokens(control)
    return _padded(Vocabulary("llama", "default", tokens, types, ids, [], scores), V)


def family_vocabulary(family: Family, V: int) -> Vocabulary:
    """The vocabulary of a family: its control and user-defined tokens first, then text, UNUSED up to V."""
    names = list(family.control)
    scores: list[float] = []
    if family.model == "gpt2":
        tokens, types = _bpe_tokens(names, family.user_defined)
    else:
        tokens, types, scores = _spm_tokens(names, family.user_defined)
    vocabulary = Vocabulary(
        family.model,
        family.pre,
        tokens,
        types,
        {role: tokens.index(name) for role, name in family.roles.items()},
        list(BPE_MERGES) if family.model == "gpt2" else [],
        scores,
        family.add_bos,
        family.add_space_prefix,
        family.template,
        family.name,
    )
    return _padded(vocabulary, V, "[PAD{}]")


def _bpe_tokens(control: Sequence[str], user_defined: Sequence[str] = ()) -> tuple[list[str], list[int]]:
    normal = [*_byte_characters(), *(merge.replace(" ", "") for merge in BPE_MERGES)]
    kinds = (
        [_Kind.CONTROL] * len(control)
        + [_Kind.USER_DEFINED] * len(user_defined)
        + [_Kind.NORMAL] * len(normal)
    )
    return [*control, *user_defined, *normal], [int(kind) for kind in kinds]


def _spm_tokens(
    control: Sequence[str], user_defined: Sequence[str] = ()
) -> tuple[list[str], list[int], list[float]]:
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = ["▁", *(chr(c) for c in range(ord("!"), ord("~") + 1)), *SPM_PIECES]
    kinds = [
        _Kind.UNKNOWN,
        *[_Kind.CONTROL] * len(control),
        *[_Kind.USER_DEFINED] * len(user_defined),
        *[_Kind.BYTE] * 256,
        *[_Kind.NORMAL] * len(pieces),
    ]
    tokens = ["<unk>", *control, *user_defined, *byte_tokens, *pieces]
    # a pair merges into the piece of the highest score, so earlier pieces of SPM_PIECES merge first
    scores = [-float(max(0, i - len(tokens) + len(SPM_PIECES))) for i in range(len(tokens))]
    return tokens, [int(kind) for kind in kinds], scores


def _byte_characters() -> list[str]:
    """The printable character that byte-level BPE (GPT-2) writes for each of the 256 bytes."""
    printable = {*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]


def _padded(vocabulary: Vocabulary, V: int, name: str = "<unused_{}>") -> Vocabulary:
    padding = V - len(vocabulary.tokens)
    if padding < 0:
        raise ValueError(
            f"this vocabulary has {len(vocabulary.tokens)} tokens: V must not be smaller than that"
        )
    vocabulary.tokens.extend(name.format(i) for i in range(padding))
    vocabulary.types.extend([int(_Kind.UNUSED)] * padding)
    if vocabulary.scores:
        vocabulary.scores.extend([-1000.0] * padding)
    return vocabulary
