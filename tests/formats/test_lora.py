"""The adapter's names, shapes, start values and checks."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest

from ggml_diffusion.errors import UserError
from ggml_diffusion.formats.lora import (
    LoraAdapter,
    ParameterStore,
    TargetModule,
    init_lora,
    lora_ranks,
    lora_shapes,
)

DIMS = SimpleNamespace(L=2, C=12, H=4, G=2, D=5, F=7, V=30)  # H * D differs from C, as in some models
# (out, in) of each projection, written out by hand.
WEIGHT_SHAPES = {
    "attn_q": (20, 12),
    "attn_k": (10, 12),
    "attn_v": (10, 12),
    "attn_output": (12, 20),
    "ffn_gate": (7, 12),
    "ffn_up": (7, 12),
    "ffn_down": (12, 7),
}


def adapter(rank: int = 3, seed: int = 0) -> LoraAdapter:
    generator = np.random.default_rng(seed)
    shapes = lora_shapes(DIMS, TargetModule, rank)
    tensors = {name: generator.standard_normal(shape, dtype=np.float32) for name, shape in shapes.items()}
    return LoraAdapter(6.0, tensors, 4, np.ones(12, np.float32))


def test_shapes_follow_the_projections_layer_by_layer_and_a_before_b():
    expected = {}
    for layer in range(2):
        for name, (out_size, in_size) in WEIGHT_SHAPES.items():
            expected[f"blk.{layer}.{name}.weight.lora_a"] = (3, in_size)
            expected[f"blk.{layer}.{name}.weight.lora_b"] = (out_size, 3)
    assert list(lora_shapes(DIMS, TargetModule, 3).items()) == list(expected.items())


def test_only_the_wanted_projections_get_an_adapter():
    shapes = lora_shapes(DIMS, [TargetModule.DOWN_PROJ, TargetModule.KEY_PROJ], 1)
    assert [name.split(".")[2] for name in shapes] == ["attn_k", "attn_k", "ffn_down", "ffn_down"] * 2


def test_target_modules_are_spelled_as_in_the_settings():
    assert [TargetModule(name).gguf_name for name in ("q_proj", "o_proj", "down_proj")] == [
        "attn_q",
        "attn_output",
        "ffn_down",
    ]


def test_the_parameter_store_shares_one_vector_with_its_views():
    store = ParameterStore({"a": (2, 3), "b": (4,), "c": (1, 1)})
    assert store.flat.dtype == np.float32
    assert store.flat.shape == (11,)
    assert not store.flat.any()
    store.flat[:] = np.arange(11)
    assert np.array_equal(store.views["a"], [[0, 1, 2], [3, 4, 5]])
    assert np.array_equal(store.views["b"], [6, 7, 8, 9])
    store.views["c"][0, 0] = -1
    assert store.flat[10] == -1
    assert all(np.array_equal(store.flat[store.slices[name]], store.views[name].ravel()) for name in "abc")
    assert all(view.flags.c_contiguous for view in store.views.values())


def test_an_adapter_starts_uniform_in_a_and_at_zero_in_b():
    store = ParameterStore(lora_shapes(DIMS, TargetModule, 64) | {"mask_embedding": (12,)})
    store.flat[:] = 9.0
    init_lora(store.views, np.random.default_rng(0))
    for name, view in store.views.items():
        if name.endswith("lora_a"):
            bound = view.shape[1] ** -0.5
            assert abs(view).max() <= bound
            # The standard deviation of a uniform variable is bound / sqrt(3); 448 draws or more: 3% a sigma.
            assert view.std() == pytest.approx(bound / 3**0.5, rel=0.12)
        elif name.endswith("lora_b"):
            assert not view.any()
        else:
            assert (view == 9.0).all()


def test_the_start_values_depend_on_the_generator_alone():
    stores = [ParameterStore(lora_shapes(DIMS, TargetModule, 2)) for _ in range(3)]
    for store, seed in zip(stores, (5, 5, 6), strict=True):
        init_lora(store.views, np.random.default_rng(seed))
    assert np.array_equal(stores[0].flat, stores[1].flat)
    assert not np.array_equal(stores[0].flat, stores[2].flat)


def test_a_fitting_adapter_passes_and_shows_its_ranks():
    adapter().check(DIMS)
    assert set(lora_ranks(adapter().tensors).values()) == {3}
    mixed = adapter(2).tensors | {
        name: array for name, array in adapter(1).tensors.items() if name.startswith("blk.1")
    }
    LoraAdapter(1.0, mixed).check(DIMS)
    LoraAdapter(1.0, {}).check(DIMS)


Q_A, Q_B = "blk.0.attn_q.weight.lora_a", "blk.0.attn_q.weight.lora_b"
ONES = np.ones((3, 12), np.float32)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({Q_A: None}, "'blk.0.attn_q.weight.lora_b' has no partner"),
        ({Q_B: None}, "'blk.0.attn_q.weight.lora_a' has no partner"),
        ({"blk.0.attn_q.weight": ONES}, "ends neither in .lora_a nor in .lora_b"),
        ({Q_A: ONES[:2]}, "has a pair of shapes"),
        ({Q_A: ONES[0]}, "has a pair of shapes"),
        ({Q_A: ONES[:0], Q_B: np.ones((20, 0), np.float32)}, "has a pair of shapes"),
        ({Q_A: ONES[:, :11].copy()}, "has shape (3, 11), but the model needs (3, 12)"),
        ({Q_B: np.ones((21, 3), np.float32)}, "has shape (21, 3), but the model needs (20, 3)"),
        ({Q_A: ONES.astype(np.float64)}, "must be a contiguous float32 array"),
        ({Q_A: np.ones((12, 3), np.float32).T}, "must be a contiguous float32 array"),
        ({Q_A: ONES * np.nan}, "'blk.0.attn_q.weight.lora_a' holds NaN"),
        (
            {"blk.2.attn_q.weight.lora_a": ONES, "blk.2.attn_q.weight.lora_b": ONES.T},
            "is no projection of a model",
        ),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_and_the_tensor_named(change: dict, fault: str):
    broken = adapter()
    broken.tensors = {name: array for name, array in (broken.tensors | change).items() if array is not None}
    with pytest.raises(UserError) as caught:
        broken.check(DIMS)
    assert fault in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "fault"),
    [
        ({"alpha": float("nan")}, "alpha is nan"),
        ({"mask_token_id": 30}, "mask token 30 is outside of the vocabulary of 30"),
        ({"mask_token_id": -1}, "mask token -1 is outside"),
        ({"mask_token_id": None}, "does not say which token is the mask token"),
        ({"mask_embedding": np.ones(11, np.float32)}, "'mask_embedding' has shape (11,)"),
        ({"mask_embedding": np.full(12, np.inf, np.float32)}, "'mask_embedding' holds NaN or infinite"),
    ],
)
def test_a_mask_token_or_scale_that_cannot_be_is_refused(fields: dict, fault: str):
    broken = adapter()
    for name, value in fields.items():
        setattr(broken, name, value)
    with pytest.raises(UserError) as caught:
        broken.check(DIMS)
    assert fault in str(caught.value)
