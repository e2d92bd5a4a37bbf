"""What the engine promises beside its arithmetic: memory policies, bits, plans, profiles."""

import numpy as np
import oracle
import pytest
from cases import lora_adapter, offset_of, packed_batch, random_adapter
from conftest import TinyModel
from numpy.typing import NDArray

from ggml_diffusion.engine import Keep, LossResult, Q4Model

POLICIES: tuple[Keep, ...] = ("all", "without-ffn", "boundaries")


def step(path: str, keep: Keep, n_threads: int = 2) -> tuple[LossResult, dict[str, NDArray[np.float32]]]:
    reference = oracle.load_model(path)
    batch = packed_batch(reference.V, B=3, T=21)
    adapter = random_adapter(reference, rank=3, B=3)
    lora = lora_adapter(adapter)
    assert lora.mask_embedding is not None
    arrays = {**lora.tensors, "mask_embedding": lora.mask_embedding}
    gradients = {name: np.zeros_like(value) for name, value in arrays.items()}
    with Q4Model.from_gguf(path, n_threads, keep=keep) as model:
        result = model.loss_and_gradients(
            batch.tokens,
            batch.targets,
            batch.weights,
            0.4,
            lora,
            gradients,
            offset_of(adapter),
            lengths=batch.lengths,
            document_ids=batch.document_ids,
        )
    return result, gradients


@pytest.mark.parametrize("keep", POLICIES[1:])
@pytest.mark.parametrize("n_threads", [1, 3])
def test_what_is_kept_for_the_backward_changes_no_bit(
    tiny_model: TinyModel, keep: Keep, n_threads: int
) -> None:
    path = str(tiny_model(type="Q4_1", L=3))
    expected, expected_gradients = step(path, "all")
    result, gradients = step(path, keep, n_threads)
    assert result.loss == expected.loss
    for name, gradient in expected_gradients.items():
        assert gradient.any()
        np.testing.assert_array_equal(gradients[name], gradient, err_msg=name)
    np.testing.assert_array_equal(result.offset_gradient, expected.offset_gradient)


def test_keeping_less_plans_less_memory(tiny_model: TinyModel) -> None:
    planned = []
    for keep in POLICIES:
        with Q4Model.from_gguf(tiny_model(type="Q4_1", L=3), 1, keep=keep) as model:
            planned.append(model.memory_bytes(512, 128, rank=8))
            assert model.memory_bytes(512, 128, rank=8, gradients=False) < planned[-1]
    assert planned[0] > planned[1] > planned[2]


def test_the_profile_counts_parts_of_the_work(tiny_model: TinyModel) -> None:
    tokens = np.full((1, 8), 20, np.int32)
    with Q4Model.from_gguf(tiny_model(type="Q4_1"), 1) as model:
        model.logits(tokens)
        assert {"frozen forward", "attention forward", "head logits"} <= set(model.profile())
        assert all(time_s > 0 for time_s in model.profile().values())
        model.reset_profile()
        assert model.profile() == {}


def test_a_closed_model_says_so(tiny_model: TinyModel) -> None:
    model = Q4Model.from_gguf(tiny_model(type="Q4_1"), 1)
    model.close()
    model.close()
    with pytest.raises(ValueError, match="closed"):
        model.logits(np.zeros((1, 2), np.int32))
