"""Drafts for llama-cpp-python: the text is that of `Llama` alone, with fewer calls where drafts are right."""

from __future__ import annotations

from typing import Any

import llama_cpp
import numpy as np
import pytest
from conftest import TinyModel
from test_denoise import MASK, converted
from test_frozen_context import frozen

from ggml_diffusion.engine.cpu.q4_model import Q4Model
from ggml_diffusion.generation import draft_model
from ggml_diffusion.generation.draft_model import DiffusionDraftModel

KINDS = {"frozen": frozen, "adapted": converted}
PROMPT = [30, 31, 32, 40]


@pytest.fixture(scope="module")
def engine(tiny_model: TinyModel) -> Any:
    with Q4Model.from_gguf(tiny_model(L=1, C=32, H=2, G=1, F=32), 1) as opened:
        yield opened


def written(engine: Q4Model, draft: Any, n_tokens: int = 24) -> tuple[list[int], int]:
    """What `Llama` writes greedily, and in how many calls."""
    llama = llama_cpp.Llama(
        str(engine.file.path), n_ctx=128, n_threads=1, verbose=False, draft_model=draft, logits_all=True
    )
    calls, evaluate = 0, llama.eval

    def counted(tokens: Any) -> None:
        nonlocal calls
        calls += 1
        evaluate(tokens)

    llama.eval = counted  # type: ignore[method-assign]
    tokens = []
    for token in llama.generate(PROMPT, temp=0.0, repeat_penalty=1.0):
        tokens.append(int(token))
        if len(tokens) == n_tokens:
            break
    llama.close()
    return tokens, calls


@pytest.mark.parametrize("kind", KINDS)
def test_the_text_is_that_of_llama_alone(engine: Q4Model, kind: str) -> None:
    alone, _ = written(engine, None)
    with_drafts, _ = written(engine, DiffusionDraftModel(KINDS[kind](engine)))
    assert with_drafts == alone


def test_right_drafts_save_calls(engine: Q4Model) -> None:
    """With an adapter of zeros and causal attention the first drafted token is the base's own."""
    model = frozen(engine, causal_ratio=1.0, trained=False)
    alone, n_alone = written(engine, None)
    with_drafts, n_calls = written(engine, DiffusionDraftModel(model, 1))
    assert with_drafts == alone
    assert n_alone == 24 and n_calls <= 13


@pytest.mark.parametrize("kind", KINDS)
def test_a_draft_is_what_fill_writes_at_once_however_the_text_has_grown(
    engine: Q4Model, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draft_model, "_FIRST_ROOM", 8)
    model = KINDS[kind](engine)
    draft = DiffusionDraftModel(model, 3)
    text = np.random.default_rng(0).integers(20, 200, 40).astype(np.intc)
    for n in (4, 9, 30, 12, 40):
        fresh = DiffusionDraftModel(model, 3)
        assert draft(text[:n]).tolist() == fresh(text[:n]).tolist()
        assert len(draft(text[:n])) == 3 and MASK not in draft(text[:n])
        fresh.close()
    draft.close()
    assert draft(text[:4]).shape == (3,)  # it can be used again


def test_no_room_or_a_mask_is_no_draft(engine: Q4Model) -> None:
    draft = DiffusionDraftModel(frozen(engine), 4)
    longest = engine.file.context_length
    assert draft(np.full(longest - 3, 30, np.intc)).shape == (0,)
    assert draft(np.empty(0, np.intc)).shape == (0,)
    assert draft(np.array([30, MASK], np.intc)).shape == (0,)
    with pytest.raises(ValueError, match="at least one token"):
        DiffusionDraftModel(frozen(engine), 0)
