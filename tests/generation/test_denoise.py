"""Denoising: the loop over a predictor that is known exactly, and a converted model on a tiny GGUF."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from texts import CHATML

from ggml_diffusion.config.toml import load_config
from ggml_diffusion.engine.cpu.q4_model import Q4Model
from ggml_diffusion.engine.interface import Batch
from ggml_diffusion.errors import UserError
from ggml_diffusion.formats.lora import LoraAdapter
from ggml_diffusion.generation.denoise import GenerationConfig, denoise
from ggml_diffusion.generation.diffusion_model import DiffusionModel
from ggml_diffusion.generation.reading import ReadingRule
from ggml_diffusion.generation.sampling import RevealOrder
from ggml_diffusion.objective.corruption import NoiseSchedule
from ggml_diffusion.text.chat_template import ChatTemplate
from ggml_diffusion.text.tokenizer import Tokenizer
from ggml_diffusion.training.trainer import ConversionTrainer

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

    def __call__(self, tokens, positions, block):
        assert set(positions) <= set(block)
        assert (tokens[positions] == MASK).all(), "only masked positions may be asked for"
        self.asked.append((tokens.copy(), positions.copy()))
        logits = np.zeros((len(positions), V), dtype=np.float32)
        logits[np.arange(len(positions)), self.answer[positions]] = self.sureness[positions]
        logits[:, MASK] = -np.inf
        return logits


def run(predictor, tokens, **settings):
    options = {name: settings.pop(name) for name in ("stop_token", "hide_later_blocks") if name in settings}
    seen = []
    result = denoise(
        np.array(tokens, dtype=np.int32),
        MASK,
        predictor,
        linear,
        GenerationConfig(**settings),
        on_step=seen.append,
        **options,
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
    assert seen[-1].n_steps == max(steps, n_blocks)
    assert len(seen) <= seen[-1].n_steps
    if order is not RevealOrder.THRESHOLD:
        assert len(seen) == seen[-1].n_steps


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
def test_the_most_certain_positions_are_revealed_first(order):
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


def sureness_of(*probabilities):
    """Logits of the answer that give it these probabilities among V - 1 tokens, the others equal."""
    p = np.array(probabilities)
    return np.log(p / (1 - p) * (V - 2))


def test_the_threshold_order_reveals_all_that_are_sure_and_at_least_one_a_step():
    sureness = sureness_of(0.5, 0.95, 0.91, 0.5, 0.92, 0.7)
    predictor = KnownPredictor([4, 5, 6, 7, 8, 9], sureness)
    result, seen = run(
        predictor, [4, *[MASK] * 5], order="threshold", threshold=0.9, steps=40, temperature=0.0
    )
    revealed = [np.flatnonzero(after.tokens != before).tolist() for before, after in zip_steps(seen)]
    assert revealed == [[1, 2, 4], [5], [3]]
    assert result.tolist() == [4, 5, 6, 7, 8, 9]
    assert len(predictor.asked) == 3


def test_the_last_step_of_the_threshold_order_reveals_all_that_are_left():
    predictor = KnownPredictor(np.full(9, 5), sureness_of(*[0.5] * 9))
    _, seen = run(predictor, [5, *[MASK] * 8], order="threshold", threshold=0.9, steps=3)
    assert [int((step.tokens == MASK).sum()) for step in seen] == [7, 6, 0]


def test_the_threshold_looks_at_the_token_that_was_drawn():
    """The likeliest token has probability .95 everywhere, and at a high temperature others are drawn."""
    predictor = KnownPredictor(np.full(31, 5), sureness_of(*[0.95] * 31))
    _, seen = run(
        predictor, [5, *[MASK] * 30], order="threshold", threshold=0.9, temperature=50.0, top_p=1.0, steps=2
    )
    first = seen[0].tokens[1:]
    assert (first[first != MASK] == 5).all()
    assert 0 < (first == MASK).sum() < 30


def test_the_threshold_order_goes_on_although_tokens_are_masked_again():
    predictor = KnownPredictor(np.full(9, 5), sureness_of(*[0.5] * 9))
    result, seen = run(predictor, [5, *[MASK] * 8], order="threshold", threshold=0.9, remasking=0.5, steps=40)
    assert [int((step.tokens == MASK).sum()) for step in seen] == [7, 6, 5, 4, 3, 2, 1, 0]
    assert (result != MASK).all()


def test_blocks_that_come_later_are_cut_off_if_they_are_to_be_hidden():
    predictor = KnownPredictor(np.full(10, 5))
    _, seen = run(predictor, [5, *[MASK] * 9], block_length=4, steps=9, hide_later_blocks=True)
    assert {len(tokens) for tokens, _ in predictor.asked} == {5, 9, 10}
    for tokens, positions in predictor.asked:
        assert set((positions - 1) // 4) == {(len(tokens) - 2) // 4}
    assert all(len(step.tokens) == 10 for step in seen)
    assert (seen[-1].tokens == 5).all()


def test_text_behind_the_hole_stays_in_sight_even_if_later_blocks_are_to_be_hidden():
    predictor = KnownPredictor(np.full(10, 5))
    run(predictor, [5, *[MASK] * 8, 7], block_length=4, steps=8, hide_later_blocks=True)
    assert {len(tokens) for tokens, _ in predictor.asked} == {10}


def test_no_block_is_begun_after_one_that_holds_the_stop_token():
    answer = [4, 5, 6, 7, END, 8, 9, 10, 11]
    predictor = KnownPredictor(answer)
    result, _ = run(predictor, [4, *[MASK] * 8], block_length=4, steps=4, temperature=0.0, stop_token=END)
    assert result.tolist() == [4, 5, 6, 7, END, MASK, MASK, MASK, MASK]


@pytest.mark.parametrize("order", ["confidence", "threshold"])
def test_what_follows_the_stop_token_is_out_of_sight_and_is_not_written(order):
    sureness = sureness_of(0.5, 0.6, 0.7, 0.95, 0.5, 0.5, 0.5, 0.5)
    predictor = KnownPredictor([4, 5, 6, END, 8, 9, 10, 11], sureness)
    result, _ = run(
        predictor, [4, *[MASK] * 7], order=order, steps=7, temperature=0.0, stop_token=END, threshold=0.9
    )
    assert result.tolist() == [4, 5, 6, END, MASK, MASK, MASK, MASK]
    assert [len(tokens) for tokens, _ in predictor.asked] == [8, 4, 4]


def test_text_behind_the_hole_stays_in_sight_behind_a_stop_token():
    predictor = KnownPredictor([4, 5, END, 7, 8, 9], sureness_of(0.5, 0.6, 0.95, 0.5, 0.5, 0.5))
    result, _ = run(predictor, [4, MASK, MASK, MASK, MASK, 9], steps=4, temperature=0.0, stop_token=END)
    assert result.tolist() == [4, 5, END, 7, 8, 9]
    assert {len(tokens) for tokens, _ in predictor.asked} == {6}


def test_a_stop_token_that_is_taken_back_leaves_no_mask_in_sight():
    """Remasking takes the least sure token, which is the stop token, until the last step."""
    sureness = sureness_of(0.5, 0.9, 0.9, 0.3, 0.9, 0.9, 0.9)
    predictor = KnownPredictor([4, 5, 6, END, 8, 9, 10], sureness)
    result, seen = run(
        predictor, [4, *[MASK] * 6], order="random", steps=6, remasking=0.9, temperature=0.0, stop_token=END
    )
    first_end = result.tolist().index(END)
    assert first_end == 3 and not (result[:first_end] == MASK).any()
    assert len(seen) == 6


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
    [
        {"steps": 0},
        {"length": 0},
        {"temperature": -1.0},
        {"top_p": 0.0},
        {"remasking": 1.0},
        {"sede": 1},
        {"threshold": 0.0},
    ],
)
def test_settings_that_make_no_sense_are_refused(settings):
    with pytest.raises(ValueError, match=next(iter(settings))):
        GenerationConfig(**settings)


# -- a converted model ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def engine(tiny_model):
    with Q4Model.from_gguf(tiny_model(L=1, C=32, H=2, G=1, F=32), 1) as opened:
        yield opened


def converted(
    engine,
    prediction="shifted",
    causal_ratio=0.25,
    trained=True,
    time_offset=None,
    mask=MASK,
    attention_sink=False,
):
    """A conversion with random numbers in it, or with none: then it is the base itself."""
    rng = np.random.default_rng(3)
    pair = {
        "blk.0.attn_q.weight.lora_a": rng.normal(size=(2, 32)).astype(np.float32),
        "blk.0.attn_q.weight.lora_b": rng.normal(size=(32, 2)).astype(np.float32),
    }
    adapter = LoraAdapter(
        4.0,
        pair if trained else {},
        mask,
        rng.normal(size=32).astype(np.float32) if trained else None,
    )
    return DiffusionModel(
        engine,
        adapter,
        Tokenizer.from_gguf(engine.file.path),
        ReadingRule(
            prediction,
            causal_ratio,
            NoiseSchedule("linear"),
            attention_sink=attention_sink,
            time_offset=time_offset,
        ),
    )


def test_a_text_whose_first_token_is_a_sink_is_read_so(engine):
    tokens = np.array([[5, MASK, 300, MASK], [30, 31, MASK, 33]], np.int32)
    model, other = (converted(engine, attention_sink=sink) for sink in (True, False))
    found, alone = model.logits(tokens, 0.5)[:, 0], other.logits(tokens[:, :1], 0.5)[:, 0]
    seen = np.arange(engine.file.V) != MASK
    np.testing.assert_allclose(found[:, seen], alone[:, seen], atol=1e-5)
    assert np.abs(found[:, seen] - other.logits(tokens, 0.5)[:, 0, seen]).max() > 1e-2
    # the token behind it is read from there, in a text that is filled as well
    filled = model.fill(np.array([5, MASK, 300, 301], np.int32), GenerationConfig(temperature=0.0))
    assert filled[1] == np.argmax(alone[0])


@pytest.mark.parametrize("prediction", ["shifted", "aligned"])
def test_logits_are_the_engines_with_the_mask_token_at_minus_infinity(engine, prediction):
    model = converted(engine, prediction)
    tokens = np.array([[5, MASK, 300, MASK], [30, 31, MASK, 33]], np.int32)
    expected = engine.logits(Batch(tokens, 0.25), model.adapter)
    logits = model.logits(tokens, 0.5)
    assert np.isneginf(logits[..., MASK]).all()
    others = np.arange(engine.file.V) != MASK
    assert (logits[..., others] == expected[..., others]).all()
    assert (model.logits(tokens[0], 0.5) == model.logits(tokens[:1], 0.5)[0]).all()


def test_the_time_embedding_is_added_at_the_time_that_fits_the_share_of_masks(engine):
    seen = []

    def offset(t):
        seen.append(float(t[0]))
        return np.zeros((len(t), 32), np.float32)

    model = converted(engine, time_offset=offset)
    model.fill([30, *[MASK] * 4, 31, 32, 33, 34], GenerationConfig(steps=4))
    # a linear schedule; of 8 tokens that may be masked, 4, 3, 2, 1 are
    assert seen == pytest.approx([4 / 8, 3 / 8, 2 / 8, 1 / 8], abs=1e-6)
    # After training on prompts it is the share of what is to be written.
    seen.clear()
    model.rule = replace(model.rule, prompts=True)
    model.fill([30, *[MASK] * 4, 31, 32, 33, 34], GenerationConfig(steps=4))
    assert seen == pytest.approx([1, 3 / 4, 2 / 4, 1 / 4], abs=1e-6)


def test_a_conversion_that_was_trained_in_blocks_writes_in_blocks(engine):
    seen = []

    def offset(t):
        seen.append(float(t[0]))
        return np.zeros((len(t), 32), np.float32)

    lengths = []

    class Watched(DiffusionModel):
        def _predict(self, tokens, positions, block, share_masked, kept):
            lengths.append(len(tokens))
            return super()._predict(tokens, positions, block, share_masked, kept)

    model = converted(engine, time_offset=offset)
    model.__class__, model.rule = Watched, replace(model.rule, block_size=4)
    model.fill([30, 31, *[MASK] * 6], GenerationConfig(steps=6))
    assert lengths == [6, 6, 6, 6, 8, 8]
    # a linear schedule; the share that is masked of a block's own tokens
    assert seen == pytest.approx([1, 3 / 4, 2 / 4, 1 / 4, 1, 1 / 2], abs=1e-6)
    lengths.clear()
    model.fill([30, 31, *[MASK] * 6], GenerationConfig(steps=6, block_length=3))
    assert lengths == [5, 5, 5, 8, 8, 8]
    lengths.clear()
    model.fill([30, 31, *[MASK] * 6], GenerationConfig(steps=2, block_length=0))
    assert lengths == [8, 8]


def test_a_conversion_of_whole_texts_writes_a_token_a_step_in_blocks_of_eight(engine):
    model, steps = converted(engine), []
    written = [model.fill([30, *[MASK] * 12], GenerationConfig(), steps.append)]
    assert len(steps) == steps[0].n_steps == 12
    # the first block is full before the second is begun
    assert [int((step.tokens[9:] != MASK).sum()) for step in steps] == [0] * 8 + [1, 2, 3, 4]
    written += [model.fill([30, *[MASK] * 12], GenerationConfig(steps=12, block_length=n)) for n in (8, 0)]
    assert written[0].tolist() == written[1].tolist() != written[2].tolist()


def test_hidden_blocks_change_what_is_predicted_only_by_what_is_hidden(engine):
    """The first block comes out as if the text ended with it."""
    model = converted(engine)
    model.rule = replace(model.rule, block_size=4)
    settings = GenerationConfig(steps=8, temperature=0.0)
    long = model.fill([30, 31, *[MASK] * 8], settings)
    short = model.fill([30, 31, *[MASK] * 4], settings.model_copy(update={"steps": 4}))
    assert long[:6].tolist() == short.tolist()


def test_with_nothing_trained_and_a_causal_mask_the_last_token_is_the_bases_own_next_one(engine):
    model = converted(engine, trained=False, causal_ratio=1.0)
    context = np.array([40, 50, 60, 70], np.int32)
    logits = engine.logits(Batch(context[None]))[0, -1]
    logits[MASK] = -np.inf
    filled = model.fill([*context, MASK], GenerationConfig(temperature=0.0))
    assert filled.tolist() == [*context, logits.argmax()]


def test_an_aligned_model_reads_a_mask_from_its_own_place(engine):
    model = converted(engine, "aligned")
    tokens = np.array([MASK, 50, MASK, 70], np.int32)
    filled = model.fill(tokens, GenerationConfig(steps=1, temperature=0.0))
    expected = model.logits(tokens, 0.5).argmax(axis=-1)
    assert filled.tolist() == [expected[0], 50, expected[2], 70]


@pytest.mark.parametrize("prediction", ["shifted", "aligned"])
@pytest.mark.parametrize(("prompt", "suffix"), [("", ""), ("the ", ""), ("", " and"), ("the ", " of it")])
def test_a_hole_is_filled_wherever_it_is_and_the_mask_token_is_never_written(
    engine, prediction, prompt, suffix
):
    model = converted(engine, prediction)
    last = []
    text = model.generate(prompt, GenerationConfig(length=9, steps=3, top_p=1.0), last.append, suffix=suffix)
    tokens = last[-1].tokens
    before, after = model.tokenizer.encode(prompt), model.tokenizer.encode(suffix)
    n_start = 1 if prediction == "shifted" and not prompt else len(before)
    assert len(tokens) == n_start + 9 + len(after)
    assert not (tokens == MASK).any()
    assert tokens[len(tokens) - len(after) :].tolist() == after.tolist()
    if prompt:
        assert tokens[:n_start].tolist() == before.tolist()
    elif prediction == "shifted":
        assert tokens[0] == model.tokenizer.bos_id
    assert isinstance(text, str)


def test_a_chat_prompt_is_a_users_message_with_what_opens_the_answer(engine, monkeypatch):
    model = converted(engine)
    opened = ChatTemplate(CHATML, "", "")
    monkeypatch.setattr(model.tokenizer, "open_chat_template", lambda: opened)
    last = []
    model.generate("the cat", GenerationConfig(length=4, steps=1), last.append, suffix=" of", chat=True)
    with ChatTemplate(CHATML, "", "") as template:
        asked = template.render([{"role": "user", "content": "the cat"}], add_generation_prompt=True)
    before = model.tokenizer.encode(asked, special=True)
    assert last[-1].tokens[: len(before)].tolist() == before.tolist()
    assert len(last[-1].tokens) == len(before) + 4 + len(model.tokenizer.encode(" of"))
    assert opened._process is None, "the template's process has to end"


def test_a_chat_prompt_needs_a_chat_template(engine):
    with pytest.raises(UserError, match="no chat template: give the prompt as it is"):
        converted(engine).generate("the", GenerationConfig(length=2), chat=True)


class Scripted(DiffusionModel):
    """A converted model whose predictions are known."""

    script = ()

    def _predict(self, tokens, positions, block, share_masked, kept):
        logits = np.zeros((len(positions), self.engine.file.V), dtype=np.float32)
        logits[np.arange(len(positions)), np.array(self.script)[positions]] = 50.0
        return logits


def test_text_ends_at_the_first_end_of_text(engine):
    plain = converted(engine)
    words, end = plain.tokenizer.encode("the and of"), plain.tokenizer.eos_id
    model = converted(engine)
    model.__class__ = Scripted
    model.script = [30, *words, end, *words, end]
    length = len(model.script) - 1
    assert model.generate("x", GenerationConfig(length=length)) == "the and of"
    # with a suffix the hole is cut and the suffix is not part of the result
    model.script = [30, *words, end, *words, end, 0, 0, 0]
    assert model.generate("x", GenerationConfig(length=length), suffix="zz") == "the and of"


UNUSED = 5  # Gemma's <unused0> in the tiny vocabulary


@pytest.fixture(scope="module")
def spm_engine(tiny_model):
    with Q4Model.from_gguf(tiny_model(L=1, C=32, H=2, G=1, F=32, tokenizer="spm"), 1) as opened:
        yield opened


@pytest.mark.parametrize("prompt, text", [("the sand", " and on"), ("", "and on")])
def test_text_that_follows_text_keeps_its_blank_and_a_suffix_gets_none(spm_engine, prompt, text):
    model = converted(spm_engine)
    model.__class__ = Scripted
    n_before = max(1, len(model.tokenizer.encode(prompt)))
    words, suffix = model.tokenizer.encode("and on"), model.tokenizer.encode("in", continued=True)
    model.script = [0] * n_before + [*words, 0, 0]
    last = []
    written = model.generate(prompt, GenerationConfig(length=len(words)), last.append, suffix="in")
    assert written == text
    assert last[-1].tokens.tolist()[n_before + len(words) :] == suffix.tolist()
    assert len(suffix) == 1  # "in", not a blank and "in"


@pytest.mark.parametrize("prediction", ["shifted", "aligned"])
@pytest.mark.parametrize("prompt", ["", "the sand"])
def test_a_prompt_begins_with_bos_where_the_base_wants_it(tiny_model, prediction, prompt):
    path = tiny_model(L=1, C=32, H=2, G=1, F=32, V=512, tokenizer="gemma3")
    with Q4Model.from_gguf(path, 1) as opened:
        model = converted(opened, prediction, mask=UNUSED)
        last = []
        model.generate(prompt, GenerationConfig(length=2, steps=1), last.append)
    expected = [model.tokenizer.bos_id, *model.tokenizer.encode(prompt)]
    assert last[-1].tokens.tolist()[:-2] == expected


def test_an_answer_ends_where_its_turn_ends_but_other_text_does_not(tiny_model):
    with Q4Model.from_gguf(tiny_model(L=1, C=32, H=2, G=1, F=32, V=512, tokenizer="gemma3"), 1) as opened:
        model = converted(opened, mask=UNUSED)
        model.__class__ = Scripted
        (turn_end,) = model.tokenizer.end_ids - {model.tokenizer.eos_id}
        words = [*model.tokenizer.encode("on"), turn_end, *model.tokenizer.encode("in")]
        chat_length = len(model._chat_tokens("the"))
        texts = {}
        for chat, n_before in (
            (True, chat_length),
            (False, len(model.start_tokens(model.tokenizer.encode("the")))),
        ):
            model.script = [0] * n_before + words
            texts[chat] = model.generate("the", GenerationConfig(length=len(words)), chat=chat)
    assert texts == {True: "on", False: "onin"}


def test_a_prompt_that_contains_the_mask_token_is_refused(engine, monkeypatch):
    model = converted(engine)
    monkeypatch.setattr(model.tokenizer, "encode", lambda text, **_: np.array([30, MASK, 31], dtype=np.int32))
    with pytest.raises(UserError, match=r"contains the mask token, '<\|reserved_\d\|>': leave that out"):
        model.generate("x", GenerationConfig(length=2))


def test_more_tokens_than_the_context_are_refused(tiny_model):
    path = tiny_model(L=1, C=32, H=2, G=1, F=32, context=16)
    with Q4Model.from_gguf(path, 1) as engine, pytest.raises(UserError, match="context of 16"):
        converted(engine).generate("the", GenerationConfig(length=16))


def test_a_mask_in_the_first_place_is_refused_under_a_shifted_prediction(engine):
    with pytest.raises(UserError, match="first token"):
        converted(engine).fill([MASK, 30])


def test_a_token_outside_of_the_vocabulary_is_refused(engine):
    with pytest.raises(UserError, match="vocabulary"):
        converted(engine).fill([engine.file.V, MASK])


def test_an_adapter_without_a_mask_token_is_no_diffusion_model(engine):
    with pytest.raises(UserError, match="mask token"):
        DiffusionModel(
            engine,
            LoraAdapter(1.0, {}),
            Tokenizer.from_gguf(engine.file.path),
            ReadingRule("shifted", 0.0, NoiseSchedule("linear")),
        )


def test_a_conversion_of_another_base_is_refused_unless_allowed(tiny_model, tmp_path):
    base = tiny_model(L=1, C=32, H=2, G=1, F=32)
    other = tiny_model(L=1, C=32, H=2, G=1, F=32, seed=1)
    with Q4Model.from_gguf(base, 1) as engine:
        trainer = ConversionTrainer(engine, load_config(overrides={"model.qlora_rank": 2}))
        weights, _ = trainer.export(tmp_path)
    with pytest.raises(UserError, match="another base"):
        DiffusionModel.load(other, weights)
    DiffusionModel.load(other, weights, allow_other_base=True).engine.close()
