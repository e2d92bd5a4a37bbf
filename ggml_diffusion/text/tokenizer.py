"""Text to tokens and back, by the vocabulary inside a GGUF.

llama.cpp does the work, so that text is cut as the base model was trained to read it; in a process of its own
(vocabulary_child.py), since some vocabularies and texts end the process that they are in.

SentencePiece writes a blank in front of a text, and llama.cpp another one behind every control token. Text
that goes on where other text ended has none: `continued` says so.

Deliberately not here: BOS and end-of-text around a text (prompts.py, loader.py), the mask token
(special_tokens.py), what a chat template does (chat_template.py).
"""

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggml_diffusion.errors import UserError
from ggml_diffusion.formats.gguf_reader import StringArray
from ggml_diffusion.formats.model_check import BPE_TOKENIZERS, TOKENIZERS_WITHOUT_VOCABULARY, check_tokenizer
from ggml_diffusion.formats.model_file import ModelFile, read_gguf
from ggml_diffusion.text.chat_template import ChatTemplate
from ggml_diffusion.text.cutting import cut, cut_numbers
from ggml_diffusion.text.special_tokens import special_ids, token_id
from ggml_diffusion.text.vocabulary_child import (
    ATTR_CONTROL,
    ATTR_LSTRIP,
    ATTR_RSTRIP,
    ATTR_UNKNOWN,
    ATTR_USER_DEFINED,
    VocabularyChild,
)

_NOT_TEXT = ATTR_CONTROL | ATTR_UNKNOWN
# llama.cpp cuts a text at such tokens, and starts anew behind them.
_CUTS_TEXT = _NOT_TEXT | ATTR_USER_DEFINED
_STRIPS = ATTR_LSTRIP | ATTR_RSTRIP

# One of these stands in front of a text while it is tokenised as one that goes on: no piece contains it, so
# that nothing merges with it.
_ANCHORS = tuple(chr(code) for code in range(1, 9))
_BLANKS = " \t\n\v\f\r"  # isspace of C

_MAX_CHARS = 1 << 18  # of a text that is tokenised at once

# Printable ASCII, and a character with each other byte that UTF-8 text in living scripts has.
_COMMON = (
    "\t\n",
    *map(chr, range(32, 127)),
    *map(chr, range(0xA1, 0xC0)),
    *(bytes([lead, 0xAA]).decode() for lead in range(0xC3, 0xE0)),
    *(bytes([lead, *(0x90 if lead == 0xED else 0xA5, 0xAA)]).decode() for lead in range(0xE0, 0xF0)),
    *(bytes([0xC4, last]).decode() for last in range(0x80, 0xA1)),
    "\N{GRINNING FACE}",
)


class Tokenizer:
    """The vocabulary of a GGUF model.

    Attributes:
        vocab_size: V.
        bos_id: the token that starts a text; None where the vocabulary has none of its own, but uses its
            end-of-text token for that.
        eos_id: the end-of-text token, None if there is none.
        start_id: the token that the base was trained to see in front of every text, None if there is none; it
            may be the end-of-text token.
        kind: as tokenizer.ggml.model names it: "gpt2" merges bytes, "llama" is SentencePiece.
        pre: its pre-tokenizer, as tokenizer.ggml.pre names it, "" if it names none.
        vocabulary: (V,) the names of the tokens, as the file has them.
        writes_blanks: whether a blank comes in front of a text, and behind a token that cuts it.
        path: the GGUF.

    """

    def __init__(self, vocabulary: VocabularyChild, metadata: Mapping[str, Any], path: Path) -> None:
        """Take over a loaded vocabulary; see `from_gguf`."""
        self._vocabulary = vocabulary
        self._metadata = metadata
        self.path = path
        self.kind: str = metadata["tokenizer.ggml.model"]
        self.pre: str = str(metadata.get("tokenizer.ggml.pre", ""))
        self.vocabulary: Sequence[str] = metadata["tokenizer.ggml.tokens"]
        self._fronts: dict[tuple[str, bool], NDArray[np.int32]] = {}  # the tokens of an anchor
        self.writes_blanks = self.kind == "llama" and bool(
            metadata.get("tokenizer.ggml.add_space_prefix", True)
        )
        self.vocab_size: int = vocabulary.n_tokens
        self.bos_id, self.eos_id = special_ids(metadata)
        self.start_id = token_id(metadata, "bos") if vocabulary.adds_bos else None
        self._names_pre_tokenizer = bool(metadata.get("tokenizer.ggml.pre"))
        template = metadata.get("tokenizer.chat_template")
        # An empty template is none.
        self._chat_template = template if isinstance(template, str) and template.strip() else None
        self._names = {
            f"{name}_token": token_id(metadata, role)
            for name, role in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        }

    @cached_property
    def warnings(self) -> tuple[str, ...]:
        """What is in doubt about the vocabulary, a sentence each."""
        if self.kind not in BPE_TOKENIZERS:
            return ()
        found = []
        if not self._names_pre_tokenizer:
            found.append(
                "the model names no pre-tokenizer, so text is cut as llama.cpp does by default, which may "
                "not be how the model was trained: a newer GGUF of it has the key 'tokenizer.ggml.pre'"
            )
        lost = [text for text in _COMMON if self.decode(self.encode(text)) != text]
        if lost:
            found.append(
                f"the model's vocabulary has no tokens for {len(lost)} common characters, among them "
                f"{', '.join(map(repr, lost[:5]))}: a text loses them"
            )
        return tuple(found)

    @classmethod
    def from_gguf(cls, path: str | Path) -> "Tokenizer":
        """Load the vocabulary of a GGUF model; its tensors are not read.

        Raises:
            UserError: the file is missing or malformed, or holds no vocabulary that is supported.

        """
        file = read_gguf(path)
        check_tokenizer(file)
        return cls.from_file(file)

    @classmethod
    def from_file(cls, file: ModelFile) -> "Tokenizer":
        """The same for a header that has been read and checked, as by `read_model`.

        Raises:
            UserError: it holds no vocabulary, or llama.cpp cannot load it.

        """
        kind = file.metadata.get("tokenizer.ggml.model")
        if not isinstance(kind, str) or kind in TOKENIZERS_WITHOUT_VOCABULARY:
            file.fail("holds no vocabulary, so it cannot be given text")
        tokens = file.metadata.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, StringArray):
            file.fail("holds no list of tokens")
        return cls(VocabularyChild(file.path, len(tokens)), file.metadata, file.path)

    def close(self) -> None:
        """End the vocabulary's process."""
        self._vocabulary.close()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all that decides which tokens a text has: the file's keys and llama.cpp's version."""
        digest = hashlib.sha256(f"llama-cpp-python {version('llama-cpp-python')}".encode())
        for key in sorted(self._metadata):
            if key.startswith("tokenizer.") or key == "general.architecture":
                value = self._metadata[key]
                if isinstance(value, StringArray):
                    data = value.data
                else:
                    data = value.tobytes() if isinstance(value, np.ndarray) else repr(value).encode()
                digest.update(f"\n{key} {type(value).__name__} {len(data)}\n".encode())
                digest.update(data)
        return digest.hexdigest()

    def open_chat_template(self) -> ChatTemplate | None:
        """The chat template of the model's metadata, in a process of its own; None if there is none."""
        if self._chat_template is None:
            return None
        names = {name: "" if token is None else self.token_text(token) for name, token in self._names.items()}
        return ChatTemplate(self._chat_template, **names)

    @cached_property
    def control_tokens(self) -> Mapping[str, int]:
        """The tokens that no plain text contains, by name; those of one character are left out."""
        hidden = np.flatnonzero(self._table[0] & _NOT_TEXT).tolist()
        return {name: token for token in hidden if len(name := self.token_text(token)) > 1}

    @cached_property
    def added_tokens(self) -> Sequence[int]:
        """The tokens that llama.cpp looks for in a text before it cuts it into words."""
        found: list[int] = np.flatnonzero(self._table[0] & ATTR_USER_DEFINED).tolist()
        return found

    def strips(self, token: int) -> bool:
        """Whether a token takes blanks beside it away.

        Raises:
            UserError: a token outside of the vocabulary.

        """
        return bool(self._attributes(token) & _STRIPS)

    @cached_property
    def end_ids(self) -> frozenset[int]:
        """The tokens that end an answer: of the text, of a turn, of a message."""
        return frozenset(token for token in self.control_tokens.values() if self._table[1][token])

    def encode(
        self, text: str, *, special: bool = False, continued: bool = False, mark: str | None = None
    ) -> NDArray[np.int32]:
        """The tokens (n,) of a text: no BOS and no end-of-text.

        Args:
            text: any Unicode text.
            special: read the names of control tokens as these, as a chat template writes them; False reads
                them as plain text.
            continued: the text goes on where other text ended.
            mark: with `special`, a character that stands inside the names that are plain text all the same;
                it is taken out.

        Raises:
            UserError: the text holds half of a surrogate pair.

        """
        if special and mark is not None and mark in text:
            return self._encode_marked(text, mark, continued)
        if len(text) > _MAX_CHARS or self.pre == "superbpe":
            parts = cut([text], _MAX_CHARS)
            if self.pre == "superbpe":
                parts = (part for long in parts for part in cut_numbers(long))
            tokens = [
                self._encode_part(part, special, continued or number > 0) for number, part in enumerate(parts)
            ]
            return np.concatenate(tokens) if tokens else np.empty(0, dtype=np.int32)
        return self._encode_part(text, special, continued)

    def encode_each(self, texts: Sequence[str], *, continued: bool = False) -> list[NDArray[np.int32]]:
        """The tokens (n,) of each of many plain texts, as `encode` gives them; short ones in one request.

        Raises:
            UserError: a text holds half of a surrogate pair.

        """
        if self.pre == "superbpe" or any(len(text) > _MAX_CHARS for text in texts):
            return [self.encode(text, continued=continued) for text in texts]
        return self._encode_parts(texts, False, continued)

    def _encode_part(self, text: str, special: bool, continued: bool) -> NDArray[np.int32]:
        return self._encode_parts([text], special, continued)[0]

    def _encode_parts(self, texts: Sequence[str], special: bool, continued: bool) -> list[NDArray[np.int32]]:
        if not continued or not self.writes_blanks:
            return self._encode(texts, special)
        found: dict[int, NDArray[np.int32]] = {}
        for anchor in _ANCHORS:
            if (anchor, special) not in self._fronts:
                (self._fronts[anchor, special],) = self._encode([anchor], special)
            front = self._fronts[anchor, special]
            left = [number for number, text in enumerate(texts) if text and number not in found]
            if not left:
                break
            for number, tokens in zip(
                left, self._encode([anchor + texts[number] for number in left], special), strict=True
            ):
                if np.array_equal(front, tokens[: len(front)]):
                    found[number] = tokens[len(front) :]
        left = [number for number in range(len(texts)) if number not in found]
        found.update(zip(left, self._encode([texts[number] for number in left], special), strict=True))
        return [found[number] for number in range(len(texts))]

    def _encode_marked(self, text: str, mark: str, continued: bool) -> NDArray[np.int32]:
        """What llama.cpp does with control tokens in a text, but for the names with a mark inside."""
        control = self.control_tokens
        names = "|".join(re.escape(name) for name in sorted(control, key=len, reverse=True))
        parts = re.split(f"({names})", text)
        tokens = [np.empty(0, dtype=np.int32)]
        for number, part in enumerate(parts):
            if number % 2:
                tokens.append(np.array([control[part]], dtype=np.int32))
                continue
            if number and self._attributes(control[parts[number - 1]]) & ATTR_RSTRIP:
                part = part.lstrip(_BLANKS)
            if number + 1 < len(parts) and (self._attributes(control[parts[number + 1]]) & ATTR_LSTRIP):
                part = part.rstrip(_BLANKS)
            tokens.append(self.encode(part.replace(mark, ""), continued=continued and number == 0))
        return np.concatenate(tokens)

    def _encode(self, texts: Sequence[str], special: bool) -> list[NDArray[np.int32]]:
        data = [_utf8(text) for text in texts]
        if len(data) < 2:
            return self._vocabulary.tokenize(data, special=special) if data else []
        try:
            return self._vocabulary.tokenize(data, special=special)
        except UserError:  # one by one, so that the message names the one
            return [self._vocabulary.tokenize([text], special=special)[0] for text in data]

    def decode(
        self, ids: Iterable[int] | NDArray[np.int32], *, special: bool = False, continued: bool = False
    ) -> str:
        """The text of tokens.

        Bytes that are no whole UTF-8 character, as where a character is spread over tokens that are not all
        there, become U+FFFD.

        Args:
            ids: (n,), each in [0, V).
            special: write control tokens by name, instead of leaving them out.
            continued: the text goes on where other text ended: it keeps its first blank.

        Raises:
            UserError: a token outside of the vocabulary.

        """
        shown = [int(token) for token in ids if special or not self._is_hidden(int(token))]
        pieces = [self._piece(token) for token in shown]
        if self.writes_blanks and pieces and not continued:  # SentencePiece put it there in `encode`
            pieces[0] = pieces[0].removeprefix(b" ")
        return b"".join(pieces).decode(errors="replace")

    def is_text(self, token: int) -> bool:
        """Whether what stands behind a token goes on with a text: it is no control or added token.

        Raises:
            UserError: a token outside of the vocabulary.

        """
        return not self._attributes(token) & _CUTS_TEXT

    def token_text(self, token: int) -> str:
        """What one token stands for by itself, a control token by its name.

        Raises:
            UserError: a token outside of the vocabulary.

        """
        return self._piece(token).decode(errors="replace")

    def n_bytes(self, token: int) -> int:
        """Bytes of text that a token stands for; a control token stands for none.

        Raises:
            UserError: a token outside of the vocabulary.

        """
        return 0 if self._is_hidden(token) else len(self._piece(token))

    def is_control(self, token: int) -> bool:
        """Whether a token is a control token, which no text contains.

        Raises:
            UserError: a token outside of the vocabulary.

        """
        return bool(self._attributes(token) & ATTR_CONTROL)

    @cached_property
    def _table(self) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        return self._vocabulary.table()

    def _attributes(self, token: int) -> int:
        if not 0 <= token < self.vocab_size:
            raise UserError(f"token {token} is outside of the vocabulary of {self.vocab_size} tokens")
        return int(self._table[0][token])

    def _is_hidden(self, token: int) -> bool:
        return bool(self._attributes(token) & _NOT_TEXT)

    def _piece(self, token: int) -> bytes:
        """The bytes of a token."""
        self._attributes(token)  # refuses what is outside of the vocabulary
        return self.pieces[token]

    @cached_property
    def sizes(self) -> NDArray[np.int64]:
        """(V,) `n_bytes` of every token."""
        sizes = np.array([len(piece) for piece in self.pieces], dtype=np.int64)
        return np.where(self._table[0] & _NOT_TEXT, 0, sizes)

    @cached_property
    def begins_with_blank(self) -> NDArray[np.bool_]:
        """(V,) whether the text that each token stands for begins with a blank."""
        return np.array([piece.startswith(b" ") for piece in self.pieces]) & (self.sizes > 0)

    @cached_property
    def pieces(self) -> Sequence[bytes]:
        """The bytes of every token, (V,): all at once, since each question takes as long as many tokens."""
        return self._vocabulary.pieces(range(self.vocab_size))


def _utf8(text: str) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"character {error.start + 1} of the text is half of a surrogate pair, not Unicode"
        ) from None
