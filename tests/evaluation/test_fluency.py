"""Figures of written text against direct formulas, and which texts are compared."""

import numpy as np
import pytest
from planted import NoVocabulary, PlantedEngine, batch_of, planted_model

from ggml_diffusion.errors import UserError
from ggml_diffusion.evaluation.fluency import (
    compare_texts,
    cut_prompts,
    distinct_share,
    fluency,
    step_counts,
    token_entropy,
    writing_tokens,
)
from ggml_diffusion.generation.denoise import GenerationConfig
from ggml_diffusion.generation.sampling import RevealOrder

V, MASK = 9, 0


def successor(tokens, causal_ratio, has_adapter):
    """The next token is likely to be one more; after a mask nothing is likelier than anything else."""
    follows = np.arange(V) == (tokens[:, None] + 1) % V
    return np.where(follows & (tokens[:, None] != MASK), 2.0, 0.0)


def test_entropy_distinct_pairs_and_repetition_are_those_of_the_texts_own_tokens():
    text = np.array([1, 2, 1, 2, 1, 2, 3, 4])
    share = np.array([3, 3, 1, 1]) / 8
    assert token_entropy(text) == pytest.approx(-(share * np.log(share)).sum())
    assert token_entropy(np.arange(16)) == pytest.approx(np.log(16))
    assert token_entropy(np.full(5, 7)) == 0.0
    # pairs: 12 21 12 21 12 23 34 -> 4 of 7
    assert distinct_share(text, 2) == pytest.approx(4 / 7)
    # fours: 1212 2121 1212 2123 1234 -> one came before
    assert 1 - distinct_share(text, 4) == pytest.approx(1 / 5)
    assert distinct_share(np.array([1]), 2) == 1.0


def test_perplexity_is_the_exponential_of_the_mean_over_all_tokens_given_the_prompts():
    engine = PlantedEngine(V, successor)
    prompts = [np.array([1, 2], np.int32), np.array([4], np.int32)]
    texts = [np.array([3, 4], np.int32), np.array([5, 5], np.int32)]  # three that follow, one that does not
    follows, not_so = -2.0 + np.log(np.exp(2) + V - 1), np.log(np.exp(2) + V - 1)
    figures = fluency(engine, prompts, texts, 1)
    assert figures.perplexity.value == pytest.approx(np.exp((3 * follows + not_so) / 4), rel=1e-5)
    assert figures.entropy.value == pytest.approx(np.log(2) / 2)
    assert figures.distinct_2.value == 1.0
    assert (figures.n_samples, figures.sample_length) == (2, 2)


def test_steps_are_8_and_shares_of_the_length():
    assert step_counts(64) == [8, 16, 32, 64]
    assert step_counts(32) == [8, 16, 32]
    assert step_counts(4) == [1, 2, 4]
    assert step_counts(1) == [1]


def test_prompts_are_beginnings_of_documents_that_have_room_for_both():
    tokens = np.arange(1, 31).reshape(3, 10)
    held_out = batch_of(tokens, [10, 10, 6], [[0] * 10, [0] * 3 + [1] * 7, [0] * 10])
    prompts, truths = cut_prompts(held_out, NoVocabulary(), MASK, 5, 3, 4)
    assert [prompt.tolist() for prompt in prompts] == [[1, 2, 3], [14, 15, 16]]
    assert [truth.tolist() for truth in truths] == [[4, 5, 6, 7], [17, 18, 19, 20]]
    assert len(cut_prompts(held_out, NoVocabulary(), MASK, 1, 3, 4)[0]) == 1


def test_without_a_prompt_texts_start_from_the_token_that_starts_a_text():
    prompts, truths = cut_prompts(batch_of([[5, 6, 7]]), NoVocabulary(), MASK, 5, 0, 2)
    assert prompts[0].tolist() == [NoVocabulary.eos_id]
    assert truths[0].tolist() == [5, 6]


def test_a_text_that_begins_with_the_starting_token_does_not_get_it_twice():
    prompts, truths = cut_prompts(batch_of([[NoVocabulary.eos_id, 5, 6]]), NoVocabulary(), MASK, 5, 0, 2)
    assert prompts[0].tolist() == [NoVocabulary.eos_id]
    assert truths[0].tolist() == [5, 6]


def test_texts_that_are_too_short_are_refused_in_one_line():
    with pytest.raises(UserError, match="no held-out text has 3 tokens of prompt and 9"):
        cut_prompts(batch_of([[1, 2, 3, 4]]), NoVocabulary(), MASK, 5, 3, 9)


def test_texts_of_every_origin_are_written_from_the_same_prompts():
    engine = PlantedEngine(V, successor)
    prompts = [np.array([1, 2], np.int32), np.array([6, 7], np.int32)]
    truths = [np.array([3, 4, 5, 6], np.int32), np.array([8, 0, 1, 2], np.int32)]
    told = []
    config = GenerationConfig(order=RevealOrder.CONFIDENCE, temperature=0.0)
    texts = compare_texts(
        planted_model(engine, MASK), prompts, truths, config, batch_size=2, on_tokens=told.append
    )
    assert [(text.origin, text.steps) for text in texts] == [
        ("held-out text", None),
        ("base", None),
        ("converted", 1),
        ("converted", 2),
        ("converted", 4),
    ]
    assert texts[0].example == [3, 4, 5, 6]
    assert texts[0].tokens_per_second is None
    assert [text.forward_passes for text in texts] == [None, 4, 1, 2, 4]
    assert all(text.tokens_per_second > 0 for text in texts[1:])
    # one token a step, the likeliest: it counts on, and the base finds that as likely as it finds anything
    assert texts[-1].example == [3, 4, 5, 6]
    assert texts[-1].fluency.perplexity.value < texts[1].fluency.perplexity.value
    assert sum(told) == writing_tokens(prompts, 4)


def test_passes_that_were_not_needed_are_not_counted():
    sure = PlantedEngine(
        V, lambda tokens, ratio, on: 9.0 * successor(tokens, ratio, on) + 20.0 * np.eye(V)[3]
    )
    config = GenerationConfig(order=RevealOrder.THRESHOLD, threshold=0.5, temperature=0.0)
    prompts, truths = [np.array([1], np.int32)], [np.arange(2, 8, dtype=np.int32)]
    told = []
    texts = compare_texts(
        planted_model(sure, MASK), prompts, truths, config, batch_size=1, on_tokens=told.append
    )
    assert [text.steps for text in texts[2:]] == [1, 3, 6]
    assert [text.forward_passes for text in texts[2:]] == [1, 1, 1]
    assert sum(told) < writing_tokens(prompts, 6)


def test_samples_differ_and_the_seed_decides():
    engine = PlantedEngine(V, lambda tokens, ratio, on: np.zeros((len(tokens), V)))
    prompts, truths = [np.array([1], np.int32)] * 2, [np.arange(1, 9, dtype=np.int32)] * 2

    def examples(seed):
        config = GenerationConfig(order=RevealOrder.RANDOM, seed=seed)
        texts = compare_texts(planted_model(engine, MASK), prompts, truths, config, batch_size=2)
        return [text.example for text in texts]

    assert examples(0) == examples(0)
    assert examples(0)[1:] != examples(1)[1:]
