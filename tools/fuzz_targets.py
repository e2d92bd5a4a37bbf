"""Who reads the fuzzer's inputs: everything in this process that takes a file of somebody else's.

A target returns where the input was accepted, raises UserError where it was refused, and anything else is a
fault. llama.cpp reads vocabularies in a process of its own (child.py), so here its death in a fork is no
fault but counted.

Deliberately not here: the inputs (fuzz_inputs.py), processes and limits (fuzz.py).
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggml_diffusion.app import inspect
from ggml_diffusion.config.toml import load_config, to_toml
from ggml_diffusion.engine.cpu.q4_model import Q4Model
from ggml_diffusion.engine.interface import Batch
from ggml_diffusion.errors import UserError, is_unicode
from ggml_diffusion.formats.adapter_file import DiffusionCheckpoint, load_adapter
from ggml_diffusion.formats.model_check import read_model
from ggml_diffusion.formats.model_file import ModelFile
from ggml_diffusion.generation.reading import ReadingRule
from ggml_diffusion.text.loader import TextDataLoader
from ggml_diffusion.text.special_tokens import choose_mask_token
from ggml_diffusion.text.vocabulary_child import _Vocabulary

_TOKENS = np.arange(8, dtype=np.int32)
LIMIT_S = 1.0


class Fault(Exception):
    """A refusal that is none: no line that can be printed."""


class Targets:
    """The targets, with what they share; made once, before the workers are forked."""

    def __init__(self, base: Path, folder: Path) -> None:
        self._base = read_model(base)
        self._folder = folder
        self.vocabularies = self.deaths = 0
        self.every_vocabulary = 8
        importlib.import_module("llama_cpp")  # once, not in each fork
        # What is described is not given to llama.cpp here.
        inspect.Tokenizer = _NoTokenizer  # type: ignore[attr-defined, assignment]

    def read(self, kind: str, path: Path, number: int) -> None:
        """Read an input as a user's command would.

        Raises:
            UserError: it is refused.

        """
        _TARGETS[kind](self, path, number)

    def _model(self, path: Path, number: int) -> None:
        _describe(path)
        file = read_model(path)
        _choose_mask(file)
        if number % self.every_vocabulary == 0 and "tokenizer.ggml.tokens" in file.metadata:
            self.vocabularies += 1
            self.deaths += _dies(lambda: _Vocabulary(os.fsencode(path)))
        with Q4Model(file, 1) as model:
            assert len(model.sha256) == 64
            model.logits(Batch(_TOKENS[None] % file.V))

    def _adapter(self, path: Path, number: int) -> None:
        refusals = [_refusal(lambda: _describe(path)), _refusal(lambda: load_adapter(path, "llama"))]
        checkpoint = DiffusionCheckpoint.load(path)
        if refusals[0] is not None:
            raise Fault(f"can be loaded, but not be described: {refusals[0]}")
        _ = checkpoint.settings
        rule = ReadingRule.of_checkpoint(checkpoint)
        rule.embedding_offset(np.array([0.0, 0.3, 1.0], dtype=np.float32))
        checkpoint.save(self._folder / f"{os.getpid()}.safetensors")
        checkpoint.check_shapes(self._base)
        checkpoint.save_gguf(self._folder / f"{os.getpid()}.adapter.gguf", self._base)
        with Q4Model(self._base, 1) as model:
            model.logits(Batch(_TOKENS[None], rule.causal_ratio), checkpoint.adapter())

    def _data(self, path: Path, number: int) -> None:
        for batch in TextDataLoader(path, _Letters(), 8, 2, split="all"):
            assert batch.tokens.shape[1] == 8

    def _toml(self, path: Path, number: int) -> None:
        config = load_config(path)
        written = path.with_suffix(".again.toml")
        written.write_text(to_toml(config), encoding="utf-8")
        if load_config(written) != config:
            raise Fault("is not read back as it was written")


_TARGETS: dict[str, Callable[[Targets, Path, int], None]] = {
    "model": Targets._model,
    "gguf-adapter": Targets._adapter,
    "safetensors": Targets._adapter,
    "data": Targets._data,
    "toml": Targets._toml,
}


def _refusal(action: Callable[[], object]) -> str | None:
    try:
        action()
    except UserError as error:
        return str(error)
    return None


def _describe(path: Path) -> None:
    for section in inspect.describe_file(path).sections:
        for name, value in section.rows:
            if not (name + value).isprintable():
                raise Fault(f"the description of {name!r} cannot be printed")


def _choose_mask(file: ModelFile) -> None:
    _refusal(lambda: choose_mask_token(None, file.metadata))


def _dies(action: Callable[[], object]) -> bool:
    """Whether a fork of this process dies of an action."""
    child = os.fork()
    if child == 0:
        try:
            action()
        except Exception:
            os._exit(1)
        os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


class _NoTokenizer:
    """Stands in for the vocabulary."""

    @classmethod
    def from_file(cls, file: ModelFile) -> _NoTokenizer:
        return cls()

    def close(self) -> None:
        pass


class _Letters:
    """A tokenizer without llama.cpp: a token a byte."""

    eos_id, start_id = 256, None
    control_tokens: dict[str, int] = {"<eos>": 256}  # noqa: RUF012
    end_ids = frozenset({256})

    def encode(
        self, text: str, *, special: bool = False, continued: bool = False, mark: str | None = None
    ) -> NDArray[np.int32]:
        if not is_unicode(text):
            raise UserError("the text is no Unicode")
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def is_text(self, token: int) -> bool:
        return token != 256

    def open_chat_template(self) -> Any:
        return None
