"""The gradients of everything that is trained are right: against the float64 oracle under autograd.

The oracle's own gradients are held against finite differences in test_oracle.py. Errors are |g - g*| / |g*|
of each tensor. Quantised models are compared on their unpacked weights.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import oracle
import pytest
from cases import (
    MASK,
    engine_batch,
    lora_adapter,
    packed_batch,
    random_adapter,
    random_batch,
    relative_error,
    relative_errors,
)
from conftest import TinyModel, sizes_for
from numpy.typing import NDArray

from ggml_diffusion.config.groups import QLoraConversionConfig, TimeEmbeddingConfig
from ggml_diffusion.config.settings import ConversionTrainingConfig
from ggml_diffusion.engine.cpu.q4_model import Q4Model
from ggml_diffusion.engine.interface import Batch, Engine, Int8, LossResult
from ggml_diffusion.formats.lora import TargetModule
from ggml_diffusion.objective.optim import AdamW, clip_by_global_norm
from ggml_diffusion.training.trainer import ConversionTrainer

# float32 sums over C, F and V are right to 1e-6 or so of their size; a tensor's gradient is a sum of terms of
# both signs, which leaves 1e-5. A forgotten factor or term anywhere is 1e-2 and more.
TOLERANCE = {"f32": 1e-4, "fast": 1e-1}
# the loss is a sum of cross-entropies, each from logits that are right to 1e-5 (bf16 products: 1e-2)
LOSS_TOLERANCE = {"f32": 1e-5, "fast": 2e-2}

Array32 = NDArray[np.float32]
OpenEngine = Callable[[Path], AbstractContextManager[Engine]]


@dataclass(frozen=True)
class Case:
    """A model, what is trained, and a batch."""

    options: dict[str, Any]  # of make_tiny_gguf
    batch: Callable[[int], oracle.Batch]  # of V
    causal_ratio: float = 0.3
    rank: int = 3
    bernoulli_seed: int | None = None
    prediction: str = "aligned"

    def make(self, tiny_model: TinyModel) -> tuple[oracle.OracleModel, oracle.Adapter, oracle.Batch]:
        model = oracle.load_model(tiny_model(**self.options))
        batch = self.batch(model.V)
        targets, weights = oracle.output_rows(batch.targets, batch.weights, self.prediction)
        batch = replace(batch, targets=targets, weights=weights)
        return model, random_adapter(model, rank=self.rank, B=len(batch.tokens)), batch


def engine_result(
    model: Engine, adapter: oracle.Adapter, batch: oracle.Batch, case: Case, *, int8: Int8 = "none"
) -> tuple[LossResult, dict[str, Array32]]:
    """The engine's loss and its gradients in the oracle's names."""
    lora = lora_adapter(adapter)
    gradients = {
        name: np.zeros(value.shape, np.float32)
        for name, value in adapter.parameters.items()
        if name != "embedding_offset"
    }
    result = model.loss_and_gradients(
        engine_batch(batch, case.causal_ratio, adapter, case.bernoulli_seed),
        batch.targets,
        batch.weights,
        lora,
        gradients,
        int8=int8,
    )
    assert result.offset_gradient is not None
    return result, {**gradients, "embedding_offset": result.offset_gradient}


_expected: dict[str, oracle.Result] = {}


def check(
    tiny_model: TinyModel,
    case: Case,
    compute: str,
    batch_name: str,
    *,
    use_simd: bool = True,
    open_engine: OpenEngine | None = None,
) -> None:
    """Hold loss, row losses and every gradient of the engine against the oracle's, which is computed once.

    `compute` says how close they must be, and how `Q4Model` computes, where no other engine is opened.
    """
    reference, adapter, batch = case.make(tiny_model)
    key = f"{batch_name} {replace(case, batch=str)}"
    if key not in _expected:
        _expected[key] = oracle.loss_and_gradients(
            reference, adapter, batch, case.causal_ratio, case.bernoulli_seed
        )
    expected = _expected[key]
    path = tiny_model(**case.options)
    opened = (
        open_engine(path) if open_engine else Q4Model.from_gguf(path, 2, compute=compute, use_simd=use_simd)
    )
    with opened as model:
        result, gradients = engine_result(model, adapter, batch, case)
    rows = max(1, np.count_nonzero(batch.weights))
    assert abs(result.loss - expected.loss) <= LOSS_TOLERANCE[compute] * rows
    np.testing.assert_allclose(result.row_loss, expected.row_loss, atol=20 * LOSS_TOLERANCE[compute])
    errors = relative_errors(gradients, expected.gradients)
    print(f"worst relative error {max(errors.values()):.2e}")
    assert not {name: error for name, error in errors.items() if not error < TOLERANCE[compute]}


def packed(V: int) -> oracle.Batch:
    return packed_batch(V, B=3, T=13)


def whole(V: int) -> oracle.Batch:
    return random_batch(V, B=2, T=17, seed=4)


@pytest.mark.parametrize("causal_ratio", [1.0, 0.7, 0.25, 0.0])
@pytest.mark.parametrize("compute", TOLERANCE)
def test_every_type_at_every_causal_ratio(
    tiny_model: TinyModel, each_type: str, causal_ratio: float, compute: str
) -> None:
    case = Case({"type": each_type, **sizes_for(each_type)}, packed, causal_ratio)
    check(tiny_model, case, compute, "packed")


@pytest.mark.parametrize("compute", TOLERANCE)
def test_every_type_with_the_portable_kernels(tiny_model: TinyModel, each_type: str, compute: str) -> None:
    case = Case({"type": each_type, **sizes_for(each_type)}, packed, 0.7)
    check(tiny_model, case, compute, "packed", use_simd=False)


SHAPES: dict[str, dict[str, Any]] = {
    "one head": {"H": 1, "G": 1, "C": 32, "L": 1},
    "no grouping": {"H": 2, "G": 2, "C": 32},
    "one key head for three, odd sizes": {"H": 3, "G": 1, "C": 48, "F": 71, "V": 313},
    "heads wider than C": {"H": 2, "G": 1, "C": 40, "D": 32, "F": 33, "V": 311},
    "tied": {"tied": True},
    "RoPE factors": {"rope_freqs": True},
    "large eps": {"eps": 0.02},
    "mixed types": {"type": "Q4_1", "overrides": {"token_embd": "Q8_0", "attn_v": "F16", "ffn_down": "F32"}},
}
# the fast mode differs from f32 where weights are packed, in blocks of 32
PACKED_SHAPES: dict[str, dict[str, Any]] = {
    "one packed head": {"type": "Q8_0", "H": 1, "G": 1, "C": 32, "L": 1},
    "one packed key head for three": {"type": "Q4_0", "H": 3, "G": 1, "C": 96, "F": 160, "V": 313},
    "packed heads wider than C": {"type": "Q5_1", "H": 2, "G": 1, "C": 64, "D": 64, "F": 32, "V": 311},
    "packed and tied": {"type": "Q4_1", "tied": True},
    "packed, other embedding": {"type": "Q4_1", "tied": True, "overrides": {"token_embd": "Q8_0"}},
    "packed, RoPE factors": {"type": "Q5_0", "rope_freqs": True},
    # enough panels for groups of three, were it not for the blocks of two panels each
    "packed in blocks of 64": {"type": "NVFP4", "C": 64, "F": 3072, "H": 2, "G": 1, "L": 1},
}


@pytest.mark.parametrize("rank", [1, 32])
@pytest.mark.parametrize("shape", [*SHAPES, *PACKED_SHAPES])
def test_every_shape_at_every_rank(tiny_model: TinyModel, shape: str, rank: int) -> None:
    check(tiny_model, Case({**SHAPES, **PACKED_SHAPES}[shape], whole, 0.4, rank), "f32", "whole")


@pytest.mark.parametrize("rank", [1, 32])
@pytest.mark.parametrize("shape", PACKED_SHAPES)
def test_every_shape_at_every_rank_in_the_fast_mode(tiny_model: TinyModel, shape: str, rank: int) -> None:
    check(tiny_model, Case(PACKED_SHAPES[shape], whole, 0.4, rank), "fast", "whole")


def _one_token(V: int) -> oracle.Batch:
    batch = random_batch(V, B=1, T=1)
    batch.weights[...] = 1.0
    return batch


def _all_masked(V: int) -> oracle.Batch:
    batch = random_batch(V, B=2, T=9)
    batch.tokens[...] = MASK
    batch.weights[...] = 0.5
    return batch


def _one_of_many(V: int) -> oracle.Batch:
    batch = random_batch(V, B=3, T=9)
    batch.weights[...] = 0.0
    batch.weights[1, 4] = 1.0
    return batch


BATCHES: dict[str, Callable[[int], oracle.Batch]] = {
    "packed and ragged": packed,
    "one token": _one_token,
    "one sequence": lambda V: random_batch(V, B=1, T=23),
    "all masked": _all_masked,
    "one row used": _one_of_many,
    "longer than a tile": lambda V: random_batch(V, B=2, T=150),
    "packed, with sinks": lambda V: replace(packed(V), attention_sink=True),
    "one sequence, with a sink": lambda V: replace(random_batch(V, B=1, T=23), attention_sink=True),
}


@pytest.mark.parametrize("seed", [None, 77], ids=["soft", "bernoulli"])
@pytest.mark.parametrize("name", BATCHES)
@pytest.mark.parametrize("compute", TOLERANCE)
def test_every_kind_of_batch(tiny_model: TinyModel, name: str, seed: int | None, compute: str) -> None:
    case = Case({"type": "Q4_1"}, BATCHES[name], 0.6, bernoulli_seed=seed)
    check(tiny_model, case, compute, name)


@pytest.mark.parametrize("compute", TOLERANCE)
def test_nothing_masked_gives_no_loss_and_zero_gradients(tiny_model: TinyModel, compute: str) -> None:
    def unused(V: int) -> oracle.Batch:
        batch = random_batch(V, B=2, T=6)
        batch.weights[...] = 0.0
        return batch

    case = Case({}, unused)
    _, adapter, batch = case.make(tiny_model)
    with Q4Model.from_gguf(tiny_model(), 2, compute=compute) as model:
        result, gradients = engine_result(model, adapter, batch, case)
    assert result.loss == 0.0 and not result.row_loss.any() and not result.row_correct.any()
    assert all(not value.any() for value in gradients.values())


def test_some_projections_adapted_alone_get_their_own_gradients(tiny_model: TinyModel) -> None:
    case = Case({}, packed)
    reference, everything, batch = case.make(tiny_model)
    with Q4Model.from_gguf(tiny_model(), 2, compute="f32") as model:
        for part in ("attn_q", "attn_v", "ffn_gate", "ffn_down", "blk.1.attn_k"):
            kept = {name: value for name, value in everything.parameters.items() if part in name}
            kept["embedding_offset"] = everything.parameters["embedding_offset"]
            adapter = replace(everything, parameters=kept)
            expected = oracle.loss_and_gradients(reference, adapter, batch, case.causal_ratio)
            _, gradients = engine_result(model, adapter, batch, case)
            errors = relative_errors(gradients, expected.gradients)
            assert max(errors.values()) < TOLERANCE["f32"]


def test_gradients_are_added_to_what_is_there_and_the_loss_alone_is_the_same(tiny_model: TinyModel) -> None:
    case = Case({"type": "Q4_0"}, packed)
    _, adapter, batch = case.make(tiny_model)
    lora = lora_adapter(adapter)
    with Q4Model.from_gguf(tiny_model(**case.options), 2) as model:
        result, once = engine_result(model, adapter, batch, case)
        twice = {name: value.copy() for name, value in once.items() if name != "embedding_offset"}
        again = model.loss_and_gradients(
            engine_batch(batch, case.causal_ratio, adapter),
            batch.targets,
            batch.weights,
            lora,
            twice,
        )
        alone = model.loss(
            engine_batch(batch, case.causal_ratio, adapter),
            batch.targets,
            batch.weights,
            lora,
        )
    for name, value in twice.items():
        # one more rounding of a float32 sum
        np.testing.assert_allclose(value, 2 * once[name], rtol=1e-5, atol=1e-6 * np.abs(once[name]).max())
    for other in (again, alone):
        assert other.loss == result.loss
        assert np.array_equal(other.row_loss, result.row_loss)
        assert np.array_equal(other.row_correct, result.row_correct)
    assert again.offset_gradient is not None
    assert np.array_equal(again.offset_gradient, once["embedding_offset"])
    assert alone.offset_gradient is None


def test_a_row_is_correct_where_its_most_probable_token_is_the_target(tiny_model: TinyModel) -> None:
    path = tiny_model()
    reference = oracle.load_model(path)
    batch = random_batch(reference.V, B=2, T=30)
    logits = np.array(oracle.batch_logits(reference, batch.tokens, 0.5))
    logits[..., MASK] = -np.inf
    batch.targets[:, ::2] = logits.argmax(axis=2)[:, ::2]
    adapter = oracle.Adapter({}, mask_token_id=MASK)
    expected = oracle.loss_and_gradients(reference, adapter, batch, 0.5)
    with Q4Model.from_gguf(path, 2, compute="f32") as model:
        result = model.loss(Batch(batch.tokens, 0.5), batch.targets, batch.weights, lora_adapter(adapter))
    assert 5 < expected.row_correct.sum() < np.count_nonzero(batch.weights)
    assert np.array_equal(result.row_correct, expected.row_correct)
    assert result.row_loss.dtype == np.float32 and result.row_correct.dtype == np.bool_


@pytest.mark.parametrize("compute", TOLERANCE)
@pytest.mark.parametrize("keep", ["without-ffn", "boundaries"])
def test_what_is_kept_for_the_backward_pass_changes_no_bit_of_the_gradients(
    tiny_model: TinyModel, keep: str, compute: str
) -> None:
    case = Case({"type": "Q4_1", "L": 3}, packed, rank=5)
    _, adapter, batch = case.make(tiny_model)
    results = []
    for one in ("all", keep):
        with Q4Model.from_gguf(tiny_model(**case.options), 2, compute=compute, keep=one) as model:
            results.append(engine_result(model, adapter, batch, case)[1])
    for name, value in results[0].items():
        assert np.array_equal(value, results[1][name]), name


@pytest.mark.parametrize("compute", TOLERANCE)
def test_any_number_of_threads_gives_the_same_gradients_bit_for_bit(
    tiny_model: TinyModel, compute: str
) -> None:
    case = Case({"type": "Q4_1"}, lambda V: packed_batch(V, B=3, T=70), rank=5)
    _, adapter, batch = case.make(tiny_model)
    results = []
    for n_threads in (1, 2, 3):
        with Q4Model.from_gguf(tiny_model(**case.options), n_threads, compute=compute) as model:
            results.append(engine_result(model, adapter, batch, case))
            results.append(engine_result(model, adapter, batch, case))
    for result, gradients in results[1:]:
        assert result.loss == results[0][0].loss
        for name, value in gradients.items():
            assert np.array_equal(value, results[0][1][name]), name


# -- the trainer: the row shift, and the projection of the time ---------------------------------------


@pytest.fixture
def trainer_case(tiny_model: TinyModel) -> tuple[oracle.OracleModel, oracle.Adapter, oracle.Batch, Array32]:
    """Model, adapter with a time projection, batch by target position, and times."""
    model = oracle.load_model(tiny_model(type="Q4_0"))
    batch = random_batch(model.V, B=3, T=11)
    batch.weights[:, 0] = 0.0
    batch.weights[1, 7:] = 0.0
    times = np.array([0.031, 0.5, 1.0], np.float32)
    features = oracle.time_features(times.astype(np.float64), 16, 100)
    batch = replace(batch, lengths=np.array([11, 7, 11], np.int32), time_features=features)
    adapter = random_adapter(model, rank=4, B=3)
    rng = np.random.default_rng(8)
    parameters = {name: value for name, value in adapter.parameters.items() if name != "embedding_offset"}
    parameters["time_embedding.weight"] = (0.03 * rng.standard_normal((model.C, 16))).astype(np.float32)
    parameters["time_embedding.bias"] = (0.03 * rng.standard_normal(model.C)).astype(np.float32)
    return model, replace(adapter, parameters=parameters), batch, times


def make_trainer(
    model: Engine, adapter: oracle.Adapter, prediction: str, **options: Any
) -> ConversionTrainer:
    config = ConversionTrainingConfig(
        qlora=QLoraConversionConfig(
            rank=4,
            alpha=adapter.alpha,
            target_modules=tuple(TargetModule),
            # one learning rate for all, as the oracle's AdamW has
            time_embedding=TimeEmbeddingConfig(dim=16, max_timesteps=100, rate_factor=1.0),
            prediction=prediction,  # type: ignore[arg-type]
            mask_token_id=MASK,
        ),
        **options,
    )
    trainer = ConversionTrainer(model, config)
    assert trainer.parameters.views.keys() == adapter.parameters.keys()
    for name, view in trainer.parameters.views.items():
        view[...] = adapter.parameters[name]
    return trainer


@pytest.mark.parametrize("prediction", ["shifted", "aligned"])
@pytest.mark.parametrize("compute", TOLERANCE)
def test_the_trainer_reads_each_target_from_its_row_and_trains_the_time_projection(
    tiny_model: TinyModel,
    trainer_case: tuple[oracle.OracleModel, oracle.Adapter, oracle.Batch, Array32],
    prediction: str,
    compute: str,
) -> None:
    reference, adapter, batch, times = trainer_case
    targets, weights = oracle.output_rows(batch.targets, batch.weights, prediction)
    rows = replace(batch, targets=targets, weights=weights)
    expected = oracle.loss_and_gradients(reference, adapter, rows, 0.4)
    with Q4Model.from_gguf(tiny_model(type="Q4_0"), 2, compute=compute) as model:
        trainer = make_trainer(model, adapter, prediction)
        loss, gradients = trainer.loss_and_gradients(
            batch.targets, batch.tokens, batch.weights, times, 0.4, batch.lengths
        )
    assert loss == pytest.approx(expected.loss, rel=LOSS_TOLERANCE[compute])
    errors = relative_errors(gradients, expected.gradients)
    assert not {name: error for name, error in errors.items() if not error < TOLERANCE[compute]}


# -- ten steps ----------------------------------------------------------------------------------------

STEPS: dict[str, Any] = {"steps": 10, "learning_rate": 3e-3, "weight_decay": 0.1, "max_grad_norm": 1.0}


def test_ten_adamw_steps_follow_the_oracle_on_its_own_gradients() -> None:
    rng = np.random.default_rng(2)
    start = {
        "w": rng.standard_normal((7, 5)),
        "bias": rng.standard_normal(5),
        "v": rng.standard_normal((3, 9)),
    }
    start = {name: value.astype(np.float32).astype(np.float64) for name, value in start.items()}

    def gradients_at(values: dict[str, oracle.Array]) -> dict[str, oracle.Array]:
        return {name: np.sin(3 * value) + 0.1 * value for name, value in values.items()}  # of norm 3 to 6

    expected = oracle.adamw(start, gradients_at, **STEPS)
    flat = np.concatenate([value.ravel() for value in start.values()]).astype(np.float32)
    places = {"w": slice(0, 35), "bias": slice(35, 40), "v": slice(40, 67)}
    optimizer = AdamW(flat, [places["w"], places["v"]], weight_decay=STEPS["weight_decay"])
    for _ in range(STEPS["steps"]):
        now = {name: flat[places[name]].reshape(start[name].shape).astype(np.float64) for name in start}
        gradient = np.concatenate([g.ravel() for g in gradients_at(now).values()]).astype(np.float32)
        clip_by_global_norm(gradient, STEPS["max_grad_norm"])
        optimizer.step(gradient, STEPS["learning_rate"])
    for name, value in expected.items():
        # float32 parameters of size 1 are rounded to 6e-8 at each of ten steps
        np.testing.assert_allclose(flat[places[name]].reshape(value.shape), value, atol=2e-6)


def test_ten_adamw_steps_on_the_engines_gradients_follow_the_oracle(
    tiny_model: TinyModel,
    trainer_case: tuple[oracle.OracleModel, oracle.Adapter, oracle.Batch, Array32],
) -> None:
    reference, adapter, batch, times = trainer_case
    targets, weights = oracle.output_rows(batch.targets, batch.weights, "shifted")
    rows = replace(batch, targets=targets, weights=weights)

    def gradients_at(values: dict[str, oracle.Array]) -> dict[str, oracle.Array]:
        return oracle.loss_and_gradients(reference, replace(adapter, parameters=values), rows, 0.4).gradients

    start = {name: np.asarray(value, np.float64) for name, value in adapter.parameters.items()}
    expected = oracle.adamw(start, gradients_at, **STEPS)
    with Q4Model.from_gguf(tiny_model(type="Q4_0"), 2, compute="f32") as model:
        trainer = make_trainer(model, adapter, "shifted", weight_decay=STEPS["weight_decay"])
        slices = trainer.parameters.slices
        for _ in range(STEPS["steps"]):
            _, gradients = trainer.loss_and_gradients(
                batch.targets, batch.tokens, batch.weights, times, 0.4, batch.lengths
            )
            flat = np.zeros_like(trainer.parameters.flat)
            for name, g in gradients.items():
                flat[slices[name]] = g.ravel()
            clip_by_global_norm(flat, STEPS["max_grad_norm"])
            trainer.optimizer.step(flat, STEPS["learning_rate"])
        for name, value in expected.items():
            # AdamW first moves by the signs of the gradient: an entry that is 0 but for rounding may go the
            # other way, so the movement as a whole is compared, not entry by entry
            moved = trainer.parameters.views[name] - start[name]
            assert relative_error(moved, value - start[name]) < 1e-2, name
