"""Held-out figures against direct computations from full logits."""

import numpy as np
import pytest

from ggml_diffusion.engine.cpu.q4_model import Q4Model
from ggml_diffusion.engine.interface import Batch
from ggml_diffusion.evaluation.held_out import MaskedScore, Score, as_rows, base_score, masked_scores
from ggml_diffusion.evaluation.masked import MASKED_SHARES, random_masks
from ggml_diffusion.evaluation.scoring import scorable
from ggml_diffusion.formats.lora import LoraAdapter
from ggml_diffusion.generation.diffusion_model import DiffusionModel
from ggml_diffusion.generation.reading import ReadingRule
from ggml_diffusion.objective.corruption import NoiseSchedule
from ggml_diffusion.text.loader import TokenBatch
from ggml_diffusion.text.tokenizer import Tokenizer

MASK = 3


@pytest.fixture(scope="module")
def path(tiny_model):
    return tiny_model(L=1, C=32, H=2, G=1, F=32)


@pytest.fixture(scope="module")
def engine(path):
    with Q4Model.from_gguf(path, 1, compute="f32") as opened:
        yield opened


def converted(engine, prediction="shifted", schedule="linear", time_offset=None, causal_ratio=0.25):
    rng = np.random.default_rng(3)
    adapter = LoraAdapter(
        4.0,
        {
            "blk.0.attn_q.weight.lora_a": rng.normal(size=(2, 32)).astype(np.float32),
            "blk.0.attn_q.weight.lora_b": rng.normal(size=(32, 2)).astype(np.float32),
        },
        MASK,
        rng.normal(size=32).astype(np.float32),
    )
    return DiffusionModel(
        engine,
        adapter,
        Tokenizer.from_gguf(engine.file.path),
        ReadingRule(prediction, causal_ratio, NoiseSchedule(schedule), time_offset=time_offset),
    )


@pytest.fixture(scope="module")
def held_out():
    tokens = np.random.default_rng(0).integers(20, 300, (5, 11)).astype(np.int32)
    documents = np.zeros((5, 11), np.int32)
    documents[1, 4:] = 1
    return TokenBatch(tokens, np.array([11, 11, 6, 11, 2], np.int32), documents)


def cross_entropies(logits, targets):
    """Cross-entropy and first guess of each row, from logits (..., V)."""
    top = logits.max(axis=-1, keepdims=True)
    log_p = logits - top - np.log(np.exp(logits - top).sum(axis=-1, keepdims=True))
    return -np.take_along_axis(log_p, targets[..., None].astype(int), -1)[..., 0], logits.argmax(-1)


@pytest.mark.parametrize("prediction", ["shifted", "aligned"])
def test_masked_scores_are_what_full_logits_say(engine, held_out, prediction):
    model = converted(engine, prediction)
    scores = masked_scores(model, held_out, batch_size=2, seed=4)
    assert [one.share for one in scores] == list(MASKED_SHARES)
    for one in scores:
        masked = random_masks(scorable(held_out, model.tokenizer.bos_id, MASK), one.share, 4, 0)
        noisy = np.where(masked, MASK, held_out.tokens)
        for ratio, score in ((0.25, one.visible), (1.0, one.right_hidden)):
            logits = engine.logits(
                Batch(noisy, ratio, lengths=held_out.lengths, document_ids=held_out.document_ids),
                model.adapter,
            ).astype(np.float64)
            logits[..., MASK] = -np.inf
            if prediction == "shifted":
                logits = np.concatenate([logits[:, :1], logits[:, :-1]], axis=1)
            losses, guesses = cross_entropies(logits[masked], held_out.tokens[masked])
            assert score.n_tokens == masked.sum()
            # the engine's row losses and its logits are float32 sums in different orders
            assert score.cross_entropy == pytest.approx(losses.mean(), rel=1e-4)
            assert score.accuracy == pytest.approx((guesses == held_out.tokens[masked]).mean())
        assert one.future_context_gain == pytest.approx(
            one.right_hidden.cross_entropy - one.visible.cross_entropy
        )


def test_the_base_is_scored_causally_on_every_token_with_one_to_its_left(engine, held_out):
    logits = engine.logits(
        Batch(held_out.tokens, lengths=held_out.lengths, document_ids=held_out.document_ids)
    ).astype(np.float64)
    losses = []
    for b, length in enumerate(held_out.lengths):
        for i in range(1, length):
            if held_out.document_ids[b, i] == held_out.document_ids[b, i - 1]:
                losses.append(cross_entropies(logits[b, i - 1], held_out.tokens[b, i])[0])
    score = base_score(engine, held_out, batch_size=3)
    assert score.n_tokens == len(losses) == 10 + 9 + 5 + 10 + 1
    assert score.cross_entropy == pytest.approx(np.mean(losses), rel=1e-4)


def test_first_tokens_and_padding_are_not_predicted_whatever_the_prediction_is(held_out):
    scored = scorable(held_out, None, MASK)
    assert not scored[:, 0].any()
    assert not scored[1, 4]
    assert not scored[2, 6:].any()
    assert scored.sum() == 10 + 9 + 5 + 10 + 1


def test_the_batch_size_changes_no_figure(engine, held_out):
    one, other = (masked_scores(converted(engine), held_out, batch_size=n) for n in (1, 5))
    for a, b in zip(one, other, strict=True):
        assert a.visible.cross_entropy == pytest.approx(b.visible.cross_entropy, rel=1e-5)
        assert a.visible.n_tokens == b.visible.n_tokens


def test_the_time_embedding_gets_the_time_at_which_the_schedule_masks_that_share(engine, held_out):
    seen = []

    def offset(t):
        seen.append(np.unique(t))
        return np.zeros((len(t), 32), np.float32)

    masked_scores(converted(engine, schedule="cosine", time_offset=offset), held_out, batch_size=5)
    times = [float(t[0]) for t in seen[::2]]
    assert [1 - np.cos(np.pi / 2 * t) for t in times] == pytest.approx(MASKED_SHARES, abs=1e-6)


def test_a_batch_with_nothing_to_predict_has_no_score(engine):
    alone = TokenBatch(np.full((2, 1), 30, np.int32), np.ones(2, np.int32), np.zeros((2, 1), np.int32))
    score = base_score(engine, alone, batch_size=2)
    assert score.n_tokens == 0
    assert np.isnan(score.cross_entropy)


def test_rows_for_json_hold_the_gain():
    row = as_rows([MaskedScore(0.5, Score(2.0, 0.5, 7), Score(2.75, 0.25, 7))])[0]
    assert row["future_context_gain"] == 0.75
    assert row["visible"] == {"cross_entropy": 2.0, "accuracy": 0.5, "n_tokens": 7}
