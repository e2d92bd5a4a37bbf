"""Tokens with a role of their own, by a GGUF's metadata: start and end of a text, and the mask token.

An id that lies outside of the vocabulary names no token, as in llama.cpp: some converters write 2^32 - 1 for
"none". Every reader of such an id asks `token_id`.

Deliberately not here: tokens of a text (tokenizer.py), what the engine does with the mask token.
Sources: llama.cpp, src/llama-vocab.cpp (ids and defaults), conversion/base.py, gemma.py, phi.py (which type a
token gets: one that its tokenizer calls special, or that is written <|...|> or <unused...>, is CONTROL, other
added tokens USER_DEFINED, rows without a token UNUSED).
"""

import re
from collections.abc import Iterator, Mapping, Sequence, Set
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggml_diffusion.errors import UserError, quoted

# Values of tokenizer.ggml.token_type.
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = 1, 3, 4, 5, 6

# What llama.cpp takes in a SentencePiece vocabulary that does not say it.
_SENTENCEPIECE_IDS = {"unknown": 0, "bos": 1, "eos": 2}

# Roles of tokens that texts, prompts and answers need.
_ROLES = {
    "eos": "the end-of-text token",
    "bos": "the token that starts a text",
    "eot": "the token that ends a turn",
    "eom": "the token that ends a message",
    "seperator": "the token between sentences",  # spelt so in the format
}

# Names of tokens that vocabularies keep in reserve, and no text of theirs contains: Llama 3 and SmolLM3
# <|reserved_special_token_0|>, Gemma <unused0>, Mistral [control_8] and <SPECIAL_20>, Phi 3 <|placeholder1|>,
# Phi 4 <|dummy_0|>, OLMo 2 <|extra_id_0|>, DeepSeek <|place_holder_no_0|>. SmolLM and Granite took their
# vocabularies from code models; no prose contains the ten markers from <gh_stars> on.
_RESERVED_NAME = re.compile(
    r"reserved|unused|place.?holder|dummy|extra_id|control_\d|special_\d"
    r"|^<(gh_stars|issue_(start|comment|closed)|jupyter_(start|text|code|output|script)|empty_output)>$",
    re.IGNORECASE,
)
_ANY_NAME = re.compile("")
# The same where the type of the token says nothing: strict, because a text might contain the rest.
_UNUSED_NAME = re.compile(r"^<unused_?\d+>$")
# Qwen's marks around pictures and boxes, in vocabularies that models of text alone share.
_PICTURE_NAME = re.compile(r"^<\|(quad|box|object_ref|vision)_(start|end|pad)\|>$|^<\|(image|video)_pad\|>$")
# Marks of code models for infilling and files, and the roles that files give to them.
_CODE_NAME = re.compile(r"fim|^<\|?(repo_?name|file_?(sep|name)|commit_\w+|jupyter_\w+)\|?>$", re.IGNORECASE)

_CODE_ROLES = (
    *(f"fim_{part}" for part in ("pre", "suf", "mid", "pad", "rep", "sep")),
    "prefix",
    "suffix",
    "middle",
)


def token_id(metadata: Mapping[str, Any], role: str) -> int | None:
    """The token of a role, None where the file names none in its vocabulary.

    Args:
        metadata: of the model's GGUF.
        role: as in the key tokenizer.ggml.ROLE_token_id, for example "eos" or "padding".

    """
    n_tokens = len(metadata.get("tokenizer.ggml.tokens", ()))
    named = metadata.get(f"tokenizer.ggml.{role}_token_id")
    if isinstance(named, int) and not isinstance(named, bool) and 0 <= named < n_tokens:
        return named
    kind = metadata.get("tokenizer.ggml.model")  # of any type in a file that is only described
    is_sentencepiece = isinstance(kind, str) and kind == "llama"
    default = _SENTENCEPIECE_IDS.get(role) if is_sentencepiece else None
    return default if default is not None and default < n_tokens else None


def special_ids(metadata: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """The ids of BOS and end-of-text by a GGUF's metadata, None where there is none.

    A token that is both ends texts, and there is no BOS: that is never masked, and the model would not learn
    to end.
    """
    bos_id, eos_id = token_id(metadata, "bos"), token_id(metadata, "eos")
    return (None if bos_id == eos_id else bos_id), eos_id


def choose_mask_token(requested: int | None, metadata: Mapping[str, Any]) -> tuple[int, str]:
    """The token that stands for a masked place, and in a few words why it is that one.

    In this order: the one that is asked for; the vocabulary's own mask token; a control token kept in
    reserve; an unused token; the unknown token, where bytes make sure that no text needs it (Llama 2); a
    mark of pictures; a mark of code infilling. None has another role, and none stands in the chat template.

    Args:
        requested: the config's `mask_token_id`.
        metadata: of the model's GGUF.

    Raises:
        UserError: no vocabulary, `requested` lies outside of it or is needed by texts, or there is no such
            token.

    """
    tokens = metadata.get("tokenizer.ggml.tokens")
    if tokens is None:
        raise UserError("the model holds no vocabulary to choose a mask token from")
    if requested is None:
        return _choose(metadata, tokens)
    if not 0 <= requested < len(tokens):
        raise UserError(f"mask_token_id {requested} is outside of the vocabulary of {len(tokens)} tokens")
    use = _use_of(requested, metadata, tokens)
    if use is not None:
        raise UserError(
            f"mask_token_id {requested}, {quoted(tokens[requested])}, is {use}: {_advice(metadata, tokens)}"
        )
    return requested, "set in the config"


def _choose(metadata: Mapping[str, Any], tokens: Sequence[str]) -> tuple[int, str]:
    own = token_id(metadata, "mask")
    if own is not None and _use_of(own, metadata, tokens) is None:
        return own, "the vocabulary's own mask token"
    for token, reason in _free_tokens(metadata, tokens):
        return token, reason
    raise UserError(
        "this vocabulary has no reserved, unused or unknown token to stand for a mask: set mask_token_id to "
        "one that your text does not contain"
    )


def _free_tokens(metadata: Mapping[str, Any], tokens: Sequence[str]) -> Iterator[tuple[int, str]]:
    """Tokens that no text needs, the best first, each with the reason."""
    types: NDArray[Any] = np.asarray(metadata.get("tokenizer.ggml.token_type", ()))[: len(tokens)]
    roles = dict(_role_ids(metadata))
    in_use = set(roles.values())
    in_use_by_text = {token for role, token in roles.items() if role not in _CODE_ROLES}

    def found(kind: int, name: re.Pattern[str], taken: Set[int] = in_use) -> Iterator[int]:
        for token in np.flatnonzero(types == kind).tolist():
            if (
                token not in taken
                and name.search(tokens[token])
                and not _in_template(tokens[token], metadata)
            ):
                yield token

    for token in found(_CONTROL, _RESERVED_NAME):
        yield token, f"the reserved control token {quoted(tokens[token])}"
    for token in found(_UNUSED, _ANY_NAME):
        yield token, f"the unused token {quoted(tokens[token])}"
    for kind in (_USER_DEFINED, _NORMAL):
        for token in found(kind, _UNUSED_NAME):
            yield token, f"the unused token {quoted(tokens[token])}"
    unknown = token_id(metadata, "unknown")
    if (
        unknown is not None
        and np.count_nonzero(types == _BYTE) == 256
        and _use_of(unknown, metadata, tokens) is None
    ):
        yield unknown, f"the unknown token {quoted(tokens[unknown])}, which no text needs"
    for token in found(_CONTROL, _PICTURE_NAME):
        yield token, f"the control token {quoted(tokens[token])}, which stands for pictures"
    for token in found(_CONTROL, _CODE_NAME, in_use_by_text):
        yield token, f"the control token {quoted(tokens[token])}, which only code infilling needs"


def _use_of(token: int, metadata: Mapping[str, Any], tokens: Sequence[str]) -> str | None:
    """What texts need a token for, None if they do not."""
    for role, use in _ROLES.items():
        if token == token_id(metadata, role):
            return use
    types = metadata.get("tokenizer.ggml.token_type", ())
    is_mark = token < len(types) and types[token] in (_CONTROL, _USER_DEFINED)
    if is_mark and _in_template(tokens[token], metadata):
        return "a mark of the chat template"
    return None


def _advice(metadata: Mapping[str, Any], tokens: Sequence[str]) -> str:
    try:
        token, reason = _choose(metadata, tokens)
    except UserError:
        return "take one that your text does not contain"
    return f"take {token}, {reason}, or leave it unset"


def _role_ids(metadata: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Every role that the file gives to a token, those that have one by default included."""
    named = {match[1] for key in metadata if (match := re.fullmatch(r"tokenizer\.ggml\.(\w+)_token_id", key))}
    for role in sorted(named | _SENTENCEPIECE_IDS.keys()):
        token = token_id(metadata, role)
        if token is not None:
            yield role, token


def _in_template(name: str, metadata: Mapping[str, Any]) -> bool:
    template = metadata.get("tokenizer.chat_template")
    return isinstance(template, str) and name in template
