"""Text to tokens and back, by the vocabulary inside a GGUF, and the choice of the mask token.

llama.cpp does the work, so that text is cut as the base model was trained to read it. It loads the vocabulary
only, and says nothing on stderr.

Deliberately not here: BOS and end-of-text around a text (loader.py, diffusion_model.py), what a chat template
does (chat_template.py).
Source: the C API of llama.cpp (llama.h), through llama-cpp-python.
"""

import ctypes
import re
import weakref
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
from numpy.typing import NDArray

from ggml_diffusion.errors import UserError, one_line, quoted
from ggml_diffusion.formats.model_file import (
    TOKENIZERS_WITHOUT_VOCABULARY,
    ModelFile,
    check_tokenizer,
    read_gguf,
)
from ggml_diffusion.text.chat_template import ChatTemplate

# Values of tokenizer.ggml.token_type.
_CONTROL, _UNUSED, _BYTE = 3, 5, 6
_NOT_TEXT = llama_cpp.LLAMA_TOKEN_ATTR_CONTROL | llama_cpp.LLAMA_TOKEN_ATTR_UNKNOWN
_ERROR_LEVEL = 4  # GGML_LOG_LEVEL_ERROR

# Control tokens that vocabularies keep in reserve, and no text of theirs contains: Llama 3
# <|reserved_special_token_0|>, Gemma <unused0>, Mistral [control_8] and <SPECIAL_20>, DeepSeek
# <|place_holder_no_0|>. SmolLM took its vocabulary from a code model and trained none of the ten markers from
# <gh_stars> on.
_RESERVED_NAME = re.compile(
    r"reserved|unused|place.?holder|control_\d|special_\d"
    r"|^<(gh_stars|issue_(start|comment|closed)|jupyter_(start|text|code|output|script)|empty_output)>$",
    re.IGNORECASE,
)

_last_errors: list[str] = []


def _keep_error(level: int, text: bytes, user_data: object) -> None:
    if level == _ERROR_LEVEL:
        _last_errors[:] = [text.decode(errors="replace")]


_log_callback = llama_cpp.llama_log_callback(_keep_error)  # llama.cpp keeps a bare pointer to it


class Tokenizer:
    """The vocabulary of a GGUF model.

    Attributes:
        vocab_size: V.
        bos_id: the token that starts a text; None where the vocabulary has none of its own, but uses its
            end-of-text token for that.
        eos_id: the end-of-text token, None if there is none.

    """

    def __init__(self, model: Any, metadata: Mapping[str, Any]) -> None:
        """Take over a loaded llama.cpp model; see `from_gguf`."""
        self._release = weakref.finalize(self, llama_cpp.llama_model_free, model)
        self._vocab = llama_cpp.llama_model_get_vocab(model)
        self._pieces: dict[int, bytes] = {}
        self._starts_with_space = metadata["tokenizer.ggml.model"] == "llama" and metadata.get(
            "tokenizer.ggml.add_space_prefix", True
        )
        self.vocab_size: int = llama_cpp.llama_vocab_n_tokens(self._vocab)
        self.bos_id, self.eos_id = special_ids(metadata)
        template = metadata.get("tokenizer.chat_template")
        self._chat_template: str | None = template if isinstance(template, str) else None

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
        if kind is None or kind in TOKENIZERS_WITHOUT_VOCABULARY:
            file.fail("holds no vocabulary, so it cannot be given text")
        llama_cpp.llama_log_set(_log_callback, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        parameters.vocab_only = True
        _last_errors.clear()
        model = llama_cpp.llama_model_load_from_file(str(file.path).encode(), parameters)
        if not model:
            file.fail(f"llama.cpp cannot load its vocabulary: {one_line(' '.join(_last_errors))}")
        return cls(model, file.metadata)

    def close(self) -> None:
        """Free the vocabulary; the tokenizer is of no use after that."""
        self._release()

    def open_chat_template(self) -> ChatTemplate | None:
        """The chat template of the model's metadata, in a process of its own; None if there is none."""
        if self._chat_template is None:
            return None
        bos, eos = ("" if token is None else self.token_text(token) for token in (self.bos_id, self.eos_id))
        return ChatTemplate(self._chat_template, bos, eos)

    def encode(self, text: str, *, special: bool = False) -> NDArray[np.int32]:
        """The tokens (n,) of a text: no BOS and no end-of-text.

        Args:
            text: any Unicode text.
            special: read the names of control tokens as these, as a chat template writes them; False reads
                them as plain text.

        Raises:
            UserError: the text holds half of a surrogate pair.

        """
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f"character {error.start + 1} of the text is half of a surrogate pair, not Unicode"
            ) from None
        tokens = np.empty(len(data) + 2, dtype=np.int32)  # one a byte at most, and a space in front
        place = tokens.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token))
        n_tokens = llama_cpp.llama_tokenize(self._vocab, data, len(data), place, len(tokens), False, special)
        if n_tokens < 0:
            raise RuntimeError(f"llama.cpp made {-n_tokens} tokens of {len(data)} bytes")
        return tokens[:n_tokens].copy()

    def decode(self, ids: Iterable[int] | NDArray[np.int32], *, special: bool = False) -> str:
        """The text of tokens.

        Bytes that are no whole UTF-8 character, as where a character is spread over tokens that are not all
        there, become U+FFFD.

        Args:
            ids: (n,), each in [0, V).
            special: write control tokens by name, instead of leaving them out.

        Raises:
            UserError: a token outside of the vocabulary.

        """
        pieces = [self._piece(int(token)) for token in ids if special or not self._is_hidden(int(token))]
        if self._starts_with_space and pieces:  # SentencePiece put it there in `encode`
            pieces[0] = pieces[0].removeprefix(b" ")
        return b"".join(pieces).decode(errors="replace")

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
        self._check(token)
        return bool(llama_cpp.llama_vocab_is_control(self._vocab, token))

    def _check(self, token: int) -> None:
        """llama.cpp would abort the process on such a token."""
        if not 0 <= token < self.vocab_size:
            raise UserError(f"token {token} is outside of the vocabulary of {self.vocab_size} tokens")

    def _is_hidden(self, token: int) -> bool:
        self._check(token)
        return bool(llama_cpp.llama_vocab_get_attr(self._vocab, token) & _NOT_TEXT)

    def _piece(self, token: int) -> bytes:
        """The bytes of a token, kept for the next time."""
        self._check(token)
        if token not in self._pieces:
            buffer = ctypes.create_string_buffer(64)
            n_bytes = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, True)
            if n_bytes < 0:
                buffer = ctypes.create_string_buffer(-n_bytes)
                n_bytes = llama_cpp.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, True)
            self._pieces[token] = buffer.raw[:n_bytes]
        return self._pieces[token]


def special_ids(metadata: Mapping[str, Any]) -> tuple[int | None, int | None]:
    """The ids of BOS and end-of-text by a GGUF's metadata, None where there is none.

    A token that is both counts as end-of-text alone: BOS is never masked, and the model would not learn to
    end.
    """
    bos_id = metadata.get("tokenizer.ggml.bos_token_id")
    eos_id = metadata.get("tokenizer.ggml.eos_token_id")
    return (None if bos_id == eos_id else bos_id), eos_id


def choose_mask_token(requested: int | None, metadata: Mapping[str, Any]) -> tuple[int, str]:
    """The token that stands for a masked place, and in a few words why it is that one.

    In this order: the one that is asked for; the vocabulary's own mask token; a control token kept in
    reserve; an unused token; the unknown token, where bytes make sure that no text needs it (Llama 2).

    Args:
        requested: the config's `mask_token_id`.
        metadata: of the model's GGUF.

    Raises:
        UserError: no vocabulary, `requested` lies outside of it, or it has no such token.

    """
    tokens = metadata.get("tokenizer.ggml.tokens")
    if tokens is None:
        raise UserError("the model holds no vocabulary to choose a mask token from")
    if requested is not None:
        if not 0 <= requested < len(tokens):
            raise UserError(f"mask_token_id {requested} is outside of the vocabulary of {len(tokens)} tokens")
        return requested, "set in the config"
    own: int | None = metadata.get("tokenizer.ggml.mask_token_id")
    if own is not None:
        return own, "the vocabulary's own mask token"
    types = np.asarray(metadata.get("tokenizer.ggml.token_type", ()))
    in_use = [value for key, value in metadata.items() if re.fullmatch(r"tokenizer\.ggml\.\w+_token_id", key)]
    for token in np.flatnonzero(types == _CONTROL).tolist():
        if token not in in_use and _RESERVED_NAME.search(tokens[token]):
            return token, f"the reserved control token {quoted(tokens[token])}"
    for token in np.flatnonzero(types == _UNUSED).tolist():
        if token not in in_use:
            return token, f"the unused token {quoted(tokens[token])}"
    unknown: int | None = metadata.get("tokenizer.ggml.unknown_token_id")
    if unknown is not None and np.count_nonzero(types == _BYTE) == 256:
        return unknown, f"the unknown token {quoted(tokens[unknown])}, which no text needs"
    raise UserError(
        "this vocabulary has no reserved, unused or unknown token to stand for a mask: set mask_token_id to "
        "one that your text does not contain"
    )
