"""Denoising: the loop over a predictor that is known exactly, and a converted model on a tiny GGUF."""

import itertools

import numpy as np
import pytest

from ggml_diffusion.generate import GenerationConfig, denoise
from ggml_diffusion.sampling import RevealOrder

V, MASK, END = 12, 3, 2
ORDERS = list(RevealOrder)


def linear(t):
    return np.asarray(t, dtype=np.float64)


class KnownPredictor:
    """Predicts a known text, surer of some positions than of others; remembers what it was asked."""

    def __init__(self, answer, sureness=None):
        self.answer = np.asarray(answer)
        self.sureness = np.full(len(answer), 9.0) if sureness is None else np.asarray(sureness)
        self.asked = []

    def __call__(self, tokens, positions):
        assert (tokens[positions] == MASK).all(), "only masked positions may be asked for"
        self.asked.append((tokens.copy(), positions.copy()))
        logits = np.zeros((len(positions), V), dtype=np.float32)
        logits[np.arange(len(positions)), self.answer[positions]] = self.sureness[positions]
        logits[:, MASK] = -np.inf
        return logits


def run(predictor, tokens, **settings):
    stop_token = settings.pop("stop_token", None)
    seen = []
    result = denoise(
        np.array(tokens, dtype=np.int32),
        MASK,
        predictor,
        linear,
        GenerationConfig(**settings),
        stop_token=stop_token,
        on_step=seen.append,
    )
    return result, seen


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("steps", [1, 3, 10, 40])
@pytest.mark.parametrize("block_length", [0, 1, 4])
@pytest.mark.parametrize("remasking", [0.0, 0.5])
def test_every_mask_is_filled_and_the_context_stays(order, steps, block_length, remasking):
    tokens = [5, 6, *[MASK] * 6, 7, MASK, MASK, MASK, 8]
    answer = np.arange(len(tokens)) % 4 + 4
    result, seen = run(
        KnownPredictor(answer),
        tokens,
        order=order,
        steps=steps,
        block_length=block_length,
        remasking=remasking,
        temperature=1.0,
    )
    was_mask = np.array(tokens) == MASK
    assert not (result == MASK).any()
    assert (result[~was_mask] == np.array(tokens)[~was_mask]).all()
    assert (seen[-1].tokens == result).all()
    n_blocks = 1 if block_length == 0 else -(-9 // block_length)
    assert len(seen) == seen[-1].n_steps == max(steps, n_blocks)


def test_what_the_model_knows_is_what_is_written():
    answer = [5, 6, 7, 8, 9, 10]
    result, _ = run(KnownPredictor(answer), [5, *[MASK] * 5], steps=2, temperature=0.0)
    assert result.tolist() == answer


def test_a_text_without_masks_is_left_alone_and_costs_nothing():
    predictor = KnownPredictor([4, 5])
    result, seen = run(predictor, [4, 5])
    assert result.tolist() == [4, 5]
    assert seen == []
    assert predictor.asked == []


def test_the_input_is_not_written_to():
    tokens = np.array([4, MASK], dtype=np.int32)
    denoise(tokens, MASK, KnownPredictor([4, 5]), linear, GenerationConfig())
    assert tokens.tolist() == [4, MASK]


@pytest.mark.parametrize("order", [RevealOrder.CONFIDENCE, RevealOrder.MARGIN, RevealOrder.ENTROPY])
def test_the_surest_positions_are_revealed_first(order):
    predictor = KnownPredictor([4, 5, 6, 7, 8, 9], sureness=[0, 1, 5, 3, 4, 2])
    _, seen = run(predictor, [4, *[MASK] * 5], order=order, steps=5, temperature=0.0)
    revealed = [int(np.flatnonzero(after.tokens != before)[0]) for before, after in zip_steps(seen)]
    assert revealed == [2, 4, 3, 5, 1]


def zip_steps(seen):
    states = [np.array([4, *[MASK] * 5]), *(step.tokens for step in seen)]
    return zip(states, seen, strict=False)


def test_random_order_asks_the_model_only_for_what_it_reveals():
    predictor = KnownPredictor(np.full(13, 5))
    run(predictor, [5, *[MASK] * 12], order="random", steps=4)
    assert [len(positions) for _, positions in predictor.asked] == [3, 3, 3, 3]


def test_steps_that_reveal_nothing_run_no_model():
    predictor = KnownPredictor([4, 5, 6])
    _, seen = run(predictor, [4, MASK, MASK], steps=30)
    assert len(seen) == 30
    assert len(predictor.asked) == 2


def test_blocks_are_finished_from_left_to_right():
    predictor = KnownPredictor(np.full(9, 5))
    run(predictor, [5, *[MASK] * 8], block_length=4, steps=8)
    for tokens, positions in predictor.asked:
        first_masked = int(np.flatnonzero(tokens == MASK)[0])
        block = (first_masked - 1) // 4
        assert set((positions - 1) // 4) == {block}
        assert (tokens[1 + 4 * (block + 1) :] == MASK).all()


def test_remasking_takes_back_the_least_sure_and_ends_with_no_mask():
    predictor = KnownPredictor(np.full(17, 5), sureness=np.linspace(9, 1, 17))
    result, seen = run(predictor, [5, *[MASK] * 16], steps=8, remasking=0.25, order="random", temperature=0.0)
    # counts still follow the schedule: 2 masks fewer after each step
    assert [int((step.tokens == MASK).sum()) for step in seen] == [14, 12, 10, 8, 6, 4, 2, 0]
    came_back = [
        int(((before.tokens != MASK) & (after.tokens == MASK)).sum())
        for before, after in itertools.pairwise(seen)
    ]
    assert sum(came_back) > 0
    assert (result == 5).all()


def test_no_block_is_begun_after_one_that_holds_the_stop_token():
    answer = [4, 5, END, 6, 7, 8, 9, 10, 11]
    predictor = KnownPredictor(answer)
    result, _ = run(predictor, [4, *[MASK] * 8], block_length=4, steps=4, temperature=0.0, stop_token=END)
    assert result.tolist() == [4, 5, END, 6, 7, MASK, MASK, MASK, MASK]


def test_the_same_seed_writes_the_same_text_and_another_seed_another():
    flat = np.zeros(31)
    texts = [
        run(KnownPredictor(np.full(31, 5), flat), [5, *[MASK] * 30], seed=seed, top_p=1.0)[0].tolist()
        for seed in (0, 0, 1)
    ]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


@pytest.mark.parametrize(
    "settings",
    [{"steps": 0}, {"length": 0}, {"temperature": -1.0}, {"top_p": 0.0}, {"remasking": 1.0}, {"sede": 1}],
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        GenerationConfig(**settings)
