"""The vocabulary of a GGUF in a process of its own: what of llama.cpp turns text into tokens, and no more.

llama.cpp loads the vocabulary only. It says nothing on the screen; what it says goes to the child's log,
whose first error is the reason that is given when it dies.

`VocabularyChild` is this process's side, `_Vocabulary` the other. Requests and replies are numbers in the
machine's own order, since both sides are on one machine.
Deliberately not here: what the tokens mean (tokenizer.py), processes and their limits (child.py).
Source: the C API of llama.cpp (llama.h), through llama-cpp-python.
"""

import ctypes
import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggml_diffusion.child import START_LIMIT_S, Child
from ggml_diffusion.errors import UserError

# Of llama_token_attr.
ATTR_UNKNOWN, ATTR_CONTROL, ATTR_USER_DEFINED = 1 << 0, 1 << 3, 1 << 4
ATTR_LSTRIP, ATTR_RSTRIP = 1 << 7, 1 << 8
_ERROR_LEVEL = 4  # GGML_LOG_LEVEL_ERROR

# Of address space: its stack and NumPy's threads reserve much that they never use.
MEMORY_LIMIT_BYTES = 16 << 30
_TOKENIZE, _TABLE, _PIECES = range(3)
_REQUEST, _HELLO = struct.Struct("=BBq"), struct.Struct("=qB")  # operation, special, count; tokens, add_bos

# Loaded vocabularies tokenise this at once, so that one that cannot run is refused before any work is done.
PROBE = (
    "".join(chr(code) for code in range(1, 128))
    + " The don't  12345   \n\n\t I'LL\r\n ...!? é漢字かな한국어 ไทย 🎉👍🏽 \u200d\ufeff\U0010ffff "
    "ACGTACGTAA<DNA> aaaaaaaaaaaaaaaa ̈́́ \n \n\n"
)


class VocabularyChild:
    """A vocabulary that may die of a text without harm: the next request starts it anew. It can be pickled.

    For one thread at a time; several that tokenise at once each take one of their own.

    Attributes:
        n_tokens: V.
        adds_bos: whether the base was trained with a token in front of every text.

    """

    def __init__(self, path: Path, n_tokens: int) -> None:
        """Load the vocabulary and try it on a short text with letters of all kinds.

        Args:
            path: the GGUF, checked by `check_tokenizer`.
            n_tokens: V, that the file says.

        Raises:
            UserError: llama.cpp cannot load it, or dies of it.

        """
        self._path = path
        self.n_tokens = n_tokens
        self._child: Child | None = None
        self.adds_bos = self._start()

    def __reduce__(self) -> tuple[Any, ...]:
        return VocabularyChild, (self._path, self.n_tokens)

    def close(self) -> None:
        """End the process; another request would start one."""
        if self._child is not None:
            self._child.close()
            self._child = None

    def tokenize(self, texts: Sequence[bytes], *, special: bool = False) -> list[NDArray[np.int32]]:
        """The tokens (n,) of each text, in UTF-8.

        Raises:
            UserError: llama.cpp died of a text or took too long.

        """
        lengths = np.array([len(text) for text in texts], dtype=np.int64)
        request = _REQUEST.pack(_TOKENIZE, special, len(texts)) + lengths.tobytes() + b"".join(texts)
        n_bytes = int(lengths.sum())
        about = (
            f" at a text of {n_bytes} bytes, which begins {texts[0][:40].decode(errors='replace')!r}"
            if texts
            else ""
        )
        reply = self._ask(request, 60.0 + n_bytes / 20_000, about)
        self._check(len(reply) % 4 == 0 and len(reply) >= 8 * len(texts))
        counts = np.frombuffer(reply, np.int64, len(texts))
        tokens = np.frombuffer(reply, np.int32, -1, 8 * len(texts))
        self._check(bool((counts >= 0).all()) and int(counts.sum()) == len(tokens))
        self._check(len(tokens) == 0 or bool(tokens.min() >= 0 and tokens.max() < self.n_tokens))
        ends = np.cumsum(counts)
        return [tokens[end - count : end].copy() for end, count in zip(ends, counts, strict=True)]

    def table(self) -> tuple[NDArray[np.int32], NDArray[np.bool_]]:
        """Of every token its attributes (V,), and whether it ends an answer (V,)."""
        reply = self._ask(_REQUEST.pack(_TABLE, 0, 0), START_LIMIT_S, " at the table of its tokens")
        self._check(len(reply) == 5 * self.n_tokens)
        attributes = np.frombuffer(reply, np.int32, self.n_tokens).copy()
        return attributes, np.frombuffer(reply, np.uint8, self.n_tokens, 4 * self.n_tokens) != 0

    def pieces(self, tokens: Sequence[int]) -> list[bytes]:
        """The bytes that each token stands for, control tokens by their names; each in [0, V)."""
        ids = np.array(tokens, dtype=np.int32)
        request = _REQUEST.pack(_PIECES, 0, len(ids)) + ids.tobytes()
        reply = self._ask(request, START_LIMIT_S, " at the names of its tokens")
        self._check(len(reply) >= 8 * len(ids))
        counts = np.frombuffer(reply, np.int64, len(ids))
        self._check(bool((counts >= 0).all()) and int(counts.sum()) == len(reply) - 8 * len(ids))
        ends = (8 * len(ids) + np.cumsum(counts)).tolist()
        return [reply[end - count : end] for end, count in zip(ends, counts.tolist(), strict=True)]

    def _start(self) -> bool:
        child = Child(
            _Vocabulary,
            os.fsencode(self._path),
            f"{self._path}: llama.cpp",
            memory_limit_bytes=MEMORY_LIMIT_BYTES,
        )
        if len(child.hello) != _HELLO.size or _HELLO.unpack(child.hello)[0] != self.n_tokens:
            child.close()
            raise UserError(
                f"{self._path}: llama.cpp reads another vocabulary from this file than its header says"
            )
        self._child = child
        return bool(_HELLO.unpack(child.hello)[1])

    def _ask(self, request: bytes, time_limit_s: float, about: str) -> bytes:
        if self._child is None or not self._child.is_alive:
            self._start()
        assert self._child is not None
        return self._child.ask(request, time_limit_s, about)

    def _check(self, holds: object) -> None:
        """Refuse a reply that makes no sense: the process may have been taken over by what it read."""
        if not holds:
            self.close()
            raise UserError(f"{self._path}: llama.cpp gave an answer that makes no sense")


# -- inside the process ------------------------------------------------------------------------------


class _Vocabulary:
    """A loaded vocabulary; made with the path of its file."""

    def __init__(self, path: bytes) -> None:
        import llama_cpp

        self._api: Any = llama_cpp
        self._errors: list[str] = []
        self._callback = llama_cpp.llama_log_callback(self._log)  # llama.cpp keeps a bare pointer to it
        self._api.llama_log_set(self._callback, ctypes.c_void_p(0))
        self._api.llama_backend_init()
        parameters = self._api.llama_model_default_params()
        parameters.vocab_only = True
        model = self._api.llama_model_load_from_file(path, parameters)
        if not model:
            raise ValueError(f"cannot load its vocabulary: {' '.join(self._errors)}")
        self._vocab = self._api.llama_model_get_vocab(model)
        self._n_tokens: int = self._api.llama_vocab_n_tokens(self._vocab)
        for special in (False, True):
            self._tokens_of(PROBE.encode(), special)
        self.hello = _HELLO.pack(self._n_tokens, self._api.llama_vocab_get_add_bos(self._vocab))

    def _log(self, level: int, text: bytes, user_data: object) -> None:
        if level == _ERROR_LEVEL and not self._errors:
            self._errors.append(text.decode(errors="replace"))  # the first one names the fault

    def answer(self, request: bytes) -> bytes:
        operation, special, count = _REQUEST.unpack_from(request)
        if operation == _TOKENIZE:
            return self._tokenize(request[_REQUEST.size :], count, bool(special))
        if operation == _TABLE:
            return self._table()
        return self._pieces(np.frombuffer(request, np.int32, count, _REQUEST.size))

    def _tokenize(self, data: bytes, count: int, special: bool) -> bytes:
        lengths = np.frombuffer(data, np.int64, count).tolist()
        found, place = [], 8 * count
        for length in lengths:
            found.append(self._tokens_of(data[place : place + length], special))
            place += length
        counts = np.array([len(tokens) for tokens in found], dtype=np.int64)
        return counts.tobytes() + b"".join(tokens.tobytes() for tokens in found)

    def _tokens_of(self, text: bytes, special: bool) -> NDArray[np.int32]:
        tokens = np.empty(2 * len(text) + 2, dtype=np.int32)  # one a byte at most, and blanks in front
        place = tokens.ctypes.data_as(ctypes.POINTER(self._api.llama_token))
        n_tokens = self._api.llama_tokenize(self._vocab, text, len(text), place, len(tokens), False, special)
        if n_tokens < 0:
            raise ValueError(f"made {-n_tokens} tokens of {len(text)} bytes")
        return tokens[:n_tokens]

    def _table(self) -> bytes:
        ids = range(self._n_tokens)
        attributes = np.array(
            [self._api.llama_vocab_get_attr(self._vocab, token) for token in ids], dtype=np.int32
        )
        ends = np.array([self._api.llama_vocab_is_eog(self._vocab, token) for token in ids], dtype=np.uint8)
        return attributes.tobytes() + ends.tobytes()

    def _pieces(self, ids: NDArray[np.int32]) -> bytes:
        pieces = [self._piece(token) for token in ids.tolist()]
        counts = np.array([len(piece) for piece in pieces], dtype=np.int64)
        return counts.tobytes() + b"".join(pieces)

    def _piece(self, token: int) -> bytes:
        buffer = ctypes.create_string_buffer(64)
        n_bytes = self._api.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, True)
        if n_bytes < 0:
            buffer = ctypes.create_string_buffer(-n_bytes)
            n_bytes = self._api.llama_token_to_piece(self._vocab, token, buffer, len(buffer), 0, True)
        return buffer.raw[:n_bytes]
