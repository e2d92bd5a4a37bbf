"""Steps over kept keys and values: exact where nothing they hold can have changed, and few rows each.

What is kept of the first layer depends on each token alone. So with one layer the approximation is none, and
with two it is one.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from conftest import TinyModel
from numpy.typing import NDArray
from test_denoise import MASK, converted

from ggml_diffusion.engine.cpu.context import Q4Context
from ggml_diffusion.engine.cpu.q4_model import Q4Model
from ggml_diffusion.engine.interface import Batch
from ggml_diffusion.errors import UserError
from ggml_diffusion.generation.approximate_cache import ApproximateText
from ggml_diffusion.generation.denoise import GenerationConfig
from ggml_diffusion.generation.diffusion_model import DiffusionModel
from ggml_diffusion.objective.output_rows import Prediction, rows_of_positions

T, BLOCK = 24, np.arange(9, 14)
SIZES = {"C": 32, "H": 2, "G": 1, "F": 32}
WINDOWS = {"attention.sliding_window": 5, "attention.sliding_window_pattern": 2}


def text_with_masks() -> NDArray[np.int32]:
    tokens = np.random.default_rng(1).integers(10, 300, T).astype(np.int32)
    tokens[BLOCK] = MASK
    tokens[20:] = MASK  # of a later block
    return tokens


def offset_of(engine: Q4Model, seed: int) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(size=(1, engine.file.C)).astype(np.float32)


def whole(model: DiffusionModel, tokens: NDArray[np.int32], positions: NDArray[np.int64], offset: Any) -> Any:
    select = np.zeros((1, T), bool)
    select[0, rows_of_positions(positions, model.rule.prediction)] = True
    return model.engine.logits(model.rule.batch(tokens[None], offset), model.adapter, select=select)


def two_steps(model: DiffusionModel) -> tuple[list[Any], list[Any]]:
    """Logits of the masks at the first step and at the second one, and of whole passes."""
    tokens, offset = text_with_masks(), offset_of(model.engine, 2)  # type: ignore[arg-type]
    text = ApproximateText(model.engine, T, model.adapter, model.rule)
    found, expected = [], []
    for written in ([], [BLOCK[2], BLOCK[0]]):
        tokens[written] = [77, 78][: len(written)]
        masks = BLOCK[tokens[BLOCK] == MASK]
        found.append(text.logits(tokens, BLOCK, masks, offset, "none"))
        expected.append(whole(model, tokens, masks, offset))
    text.close()
    return found, expected


@pytest.mark.parametrize("prediction", ["shifted", "aligned"])
@pytest.mark.parametrize("ratio", [0.0, 0.3])
@pytest.mark.parametrize("arch", ["llama", "gemma3"])
@pytest.mark.parametrize("sink", [False, True])
def test_with_one_layer_it_is_exact(
    tiny_model: TinyModel, arch: str, ratio: float, prediction: Prediction, sink: bool
) -> None:
    path = tiny_model(L=1, arch=arch, keys=WINDOWS if arch == "gemma3" else None, **SIZES)
    with Q4Model.from_gguf(path, 2, compute="f32") as engine:
        found, expected = two_steps(converted(engine, prediction, causal_ratio=ratio, attention_sink=sink))
    np.testing.assert_array_equal(found[0], expected[0])
    np.testing.assert_allclose(found[1], expected[1], atol=2e-5)


def test_with_two_layers_the_first_step_is_exact_and_the_others_are_near(tiny_model: TinyModel) -> None:
    with Q4Model.from_gguf(tiny_model(L=2, **SIZES), 2, compute="f32") as engine:
        found, expected = two_steps(converted(engine, causal_ratio=0.0))
    np.testing.assert_array_equal(found[0], expected[0])
    error = np.abs(found[1] - expected[1]).max()
    assert 1e-3 < error < 0.5 * np.abs(expected[1]).max()


def test_a_causal_mask_leaves_nothing_to_approximate_in_front(tiny_model: TinyModel) -> None:
    with Q4Model.from_gguf(tiny_model(L=3, **SIZES), 2, compute="f32") as engine:
        found, expected = two_steps(converted(engine, causal_ratio=1.0))
    np.testing.assert_allclose(found[1], expected[1], atol=2e-5)


def test_a_block_takes_one_whole_pass(tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch) -> None:
    refills: list[int] = []
    steps: list[int] = []
    refill, logits = Q4Context.refill, Q4Context.logits

    def counted(self: Q4Context, batch: Batch, *rest: Any, **options: Any) -> Any:
        refills.append(batch.tokens.size)
        return refill(self, batch, *rest, **options)

    def counted_logits(self: Q4Context, groups: Batch, *rest: Any, **options: Any) -> Any:
        steps.append(groups.tokens.size)
        return logits(self, groups, *rest, **options)

    monkeypatch.setattr(Q4Context, "refill", counted)
    monkeypatch.setattr(Q4Context, "logits", counted_logits)
    config = GenerationConfig(length=16, temperature=0.0, approximate_cache=True)
    with Q4Model.from_gguf(tiny_model(L=1, **SIZES), 2, compute="f32") as engine:
        model = converted(engine, causal_ratio=0.0)
        tokens = np.concatenate([text_with_masks()[:9], np.full(16, MASK, np.int32), [30, 31]])
        found = model.fill(tokens, config)
        assert refills == [27, 27] and steps == [9] * 14
        exact = model.fill(tokens, config.model_copy(update={"approximate_cache": False}))
    assert found.tolist() == exact.tolist()
    assert len(refills) == 2


@pytest.mark.parametrize("remasking", [0.0, 0.4])
def test_nothing_but_masks_changes(tiny_model: TinyModel, remasking: float) -> None:
    config = GenerationConfig(length=16, seed=3, remasking=remasking, approximate_cache=True)
    with Q4Model.from_gguf(tiny_model(L=2, **SIZES), 2) as engine:
        model = converted(engine, causal_ratio=0.0)
        tokens = text_with_masks()
        filled = model.fill(tokens, config)
        again = model.fill(tokens, config)
    assert not (filled == MASK).any()
    assert (filled == tokens)[tokens != MASK].all()
    assert filled.tolist() == again.tolist()


def test_logits_that_are_not_finite_are_refused(tiny_model: TinyModel) -> None:
    with Q4Model.from_gguf(tiny_model(L=1, **SIZES), 2) as engine:
        model = converted(engine, causal_ratio=0.0)
        for pair in model.adapter.tensors.values():
            pair[...] = 3e38
        with pytest.raises(UserError, match="NaN or infinite logits: the adapter"):
            # A single mask: the whole pass that fills the cache is all there is.
            model.fill([30, 31, MASK, 33], GenerationConfig(temperature=0.0, approximate_cache=True))
