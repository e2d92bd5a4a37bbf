"""Prompts and responses: one end-of-text, learned; prompts never; examples stay whole."""

import json
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest
from texts import CHATML, ByteTokenizer, loader_of, tokens_of, write_jsonl
from trainers import make_trainer

from ggml_diffusion.config.toml import load_config
from ggml_diffusion.engine.cpu.q4_model import Q4Model
from ggml_diffusion.errors import UserError
from ggml_diffusion.formats.lora import TargetModule
from ggml_diffusion.generation.denoise import GenerationConfig
from ggml_diffusion.generation.diffusion_model import DiffusionModel
from ggml_diffusion.objective.corruption import maskable
from ggml_diffusion.text.chat_template import ChatTemplate
from ggml_diffusion.text.examples import ExampleReader
from ggml_diffusion.text.loader import TextDataLoader
from ggml_diffusion.text.tokenizer import Tokenizer
from ggml_diffusion.training.resume import resume_run, save_run
from ggml_diffusion.training.trainer import ConversionTrainer

EOS = 0


def bytes_of(text: str) -> list[int]:
    return [byte + 1 for byte in text.encode()]


class ChatTokenizer(ByteTokenizer):
    """A byte a token, but "<|im_end|>" is the end of a text where control tokens are read."""

    template: str | None = CHATML
    control_tokens = MappingProxyType({"<|im_end|>": EOS})
    end_ids = frozenset([EOS])

    def open_chat_template(self) -> ChatTemplate | None:
        return None if self.template is None else ChatTemplate(self.template, "", "")

    def encode(
        self, text: str, *, special: bool = False, continued: bool = False, mark: str | None = None
    ) -> np.ndarray:
        parts = text.split("<|im_end|>") if special else [text]
        tokens: list[int] = []
        for number, part in enumerate(parts):
            tokens += [EOS] * (number > 0) + bytes_of(part.replace(mark or "\0", ""))
        return np.array(tokens, dtype=np.int32)


def write_records(path: Path, *records: object) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")
    return path


def pair(prompt: str, completion: str) -> dict[str, str]:
    return {"prompt": prompt, "completion": completion}


def talk(*contents: str) -> dict[str, object]:
    roles = ["user", "assistant"] * len(contents)
    return {
        "messages": [{"role": role, "content": text} for role, text in zip(roles, contents, strict=False)]
    }


def read(record: dict[str, object], tokenizer: ChatTokenizer | None = None):
    with ExampleReader(tokenizer or ChatTokenizer()) as reader:
        return reader.read(record)


def test_a_completion_ends_with_one_end_of_text():
    example = read(pair("ab", "cd"))
    assert example.prompt.tolist() == bytes_of("ab")
    assert example.response.tolist() == [*bytes_of("cd"), EOS]


def test_the_names_of_control_tokens_in_prompt_and_completion_are_plain_text():
    example = read(pair("<|im_end|>", "<|im_end|>"))
    assert EOS not in example.prompt
    assert (example.response == EOS).sum() == 1


def test_the_last_message_is_the_response_and_all_before_it_the_prompt():
    example = read(talk("Hi", "Yes?", "Why", "So."))
    user, assistant = (bytes_of(f"<|im_start|>{role}\n") for role in ("user", "assistant"))
    line_feed = bytes_of("\n")
    assert example.prompt.tolist() == [
        *user, *bytes_of("Hi"), EOS, *line_feed, *assistant, *bytes_of("Yes?"), EOS, *line_feed,
        *user, *bytes_of("Why"), EOS, *line_feed, *assistant,
    ]  # fmt: skip
    # The template ends the answer itself; the line feed behind that is not learned.
    assert example.response.tolist() == [*bytes_of("So."), EOS]


@pytest.mark.parametrize("record", [pair("a", ""), talk("a", "")])
def test_a_response_without_text_is_refused(record):
    with pytest.raises(UserError, match="is empty: there is nothing to learn"):
        read(record)


def test_an_end_of_text_is_added_where_the_template_has_none():
    tokenizer = ChatTokenizer()
    tokenizer.template = "{% for m in messages %}{{ m.content }}|{% endfor %}"
    assert read(talk("a", "b"), tokenizer).response.tolist() == [*bytes_of("b|"), EOS]


def test_a_vocabulary_without_an_end_of_text_has_none_to_learn():
    tokenizer = ChatTokenizer()
    tokenizer.eos_id = None
    assert read(pair("a", "b"), tokenizer).response.tolist() == bytes_of("b")


@pytest.mark.parametrize(
    "record, message",
    [
        ({"messages": "hi"}, 'must be a list of objects with strings "role" and "content"'),
        ({"messages": [{"content": "a"}]}, 'must be a list of objects with strings "role" and "content"'),
        (
            {"messages": [{"role": "user"}, *talk("a", "b")["messages"]]},
            "message 1 has no content, and calls",
        ),
        (
            {"messages": [{"role": "user", "content": 3}, *talk("a", "b")["messages"]]},
            "of message 1 must be a",
        ),
        (talk("a", "\ud83d"), '"content" of message 2 holds half of a surrogate pair'),
        ({"messages": []}, 'must have the role "assistant"'),
        (talk("a", "b", "c"), 'must have the role "assistant"'),
    ],
)
def test_messages_that_teach_no_answer_are_refused(record, message):
    with pytest.raises(UserError, match=message):
        read(record)


def test_a_model_without_a_chat_template_and_one_that_cannot_be_used_are_refused_with_a_way_out():
    tokenizer = ChatTokenizer()
    tokenizer.template = None
    with pytest.raises(UserError, match='no chat template: give "prompt" and "completion"'):
        read(talk("a", "b"), tokenizer)
    tokenizer.template = "{{ messages | length }}{{ messages[0].content }}"
    with pytest.raises(UserError, match='differently once the answer is there: give "prompt"'):
        read(talk("a", "b"), tokenizer)


@pytest.mark.parametrize("kind", ["bpe", "spm"])
@pytest.mark.parametrize(
    "prompt, completion",
    [("the sa", "nd"), ("the sand", " and the sea"), ("the", "re"), ("", "on")],
)
def test_prompt_and_completion_are_one_text(tiny_model, kind, prompt, completion):
    """Together they are the text, and the prompt is tokenised as it is when text is generated."""
    tokenizer = Tokenizer.from_gguf(tiny_model(tokenizer=kind))
    example = read(pair(prompt, completion), tokenizer)
    assert example.prompt.tolist() == tokenizer.encode(prompt).tolist()
    assert tokenizer.decode([*example.prompt, *example.response]) == prompt + completion
    assert example.response[-1] == tokenizer.eos_id
    if (prompt, completion) != ("the", "re"):  # no token reaches across the seam
        whole = [*tokenizer.encode(prompt + completion).tolist(), tokenizer.eos_id]
        assert [*example.prompt, *example.response] == whole


@pytest.mark.parametrize("starts_itself", [True, False])
def test_a_prompt_begins_once_with_the_token_that_the_base_wants(starts_itself):
    class Starting(ChatTokenizer):
        start_id = 600
        template = "{{ 'X' }}" * starts_itself + CHATML

        def encode(self, text, **options):
            tokens = super().encode(text, **options)
            return np.where(tokens == ord("X") + 1, self.start_id, tokens)

    tokenizer = Starting()
    for record in (pair("ab", "cd"), pair("", "cd"), talk("a", "b")):
        example = read(record, tokenizer)
        assert example.prompt[0] == 600
        assert 600 not in example.prompt[1:] and 600 not in example.response


def test_an_answer_ends_with_the_token_that_ends_its_turn_and_nothing_else_before_the_end_of_text():
    tokenizer = ChatTokenizer()
    tokenizer.end_ids = frozenset([EOS, ord("|") + 1])
    tokenizer.template = "{% for m in messages %}{{ m.content }}|\n{% endfor %}"
    assert read(talk("a", "b"), tokenizer).response.tolist() == [*bytes_of("b|"), EOS]


# -- in the loader -------------------------------------------------------------------------------------


def chat_loader(path: Path, T: int = 8, B: int = 8, **options) -> TextDataLoader:
    return TextDataLoader(path, ChatTokenizer(), T, B, **options)


def test_each_example_is_a_sequence_and_only_its_response_may_be_masked(tmp_path):
    path = write_records(tmp_path / "a.jsonl", pair("ab", "cde"), pair("f", "g"), pair("", "hi"))
    loader = chat_loader(path)
    batch = loader.batch_at(0)
    rows = {
        tuple(tokens[:length].tolist()): may.tolist()
        for tokens, length, may in zip(batch.tokens, batch.lengths, batch.maskable, strict=True)
    }
    assert rows == {
        tuple(tokens_of("abcde")): [False] * 2 + [True] * 6,
        tuple(tokens_of("fg")): [False] + [True] * 7,
        tuple(tokens_of("hi")): [True] * 8,
    }
    assert (batch.document_ids == 0).all()
    assert (loader.n_examples, loader.n_documents, loader.n_tokens) == (3, 3, 12)


def test_padding_behind_a_response_is_never_a_target(tmp_path):
    """The end of the text is learned once: what `maskable` of the objective leaves is the response alone."""
    path = write_records(tmp_path / "a.jsonl", pair("ab", "cde"))
    batch = chat_loader(path, T=16).batch_at(0)
    targets = batch.maskable & maskable(batch.tokens, batch.document_ids, batch.lengths, "shifted", None)
    assert batch.tokens[targets].tolist() == [*bytes_of("cde"), EOS]


def test_a_response_that_is_too_long_is_cut_without_an_end_and_a_prompt_that_is_too_long_left_out(tmp_path):
    path = write_records(
        tmp_path / "a.jsonl", pair("ab", "cdefghijk"), pair("abcdefgh", "i"), pair("abcdefg", "h")
    )
    loader = chat_loader(path)
    assert [sequence.tolist() for sequence in loader.sequences] == [
        bytes_of("abcdefgh"),
        bytes_of("abcdefgh"),
    ]
    assert (loader.n_examples, loader.n_too_long, loader.n_documents) == (2, 1, 3)
    with pytest.raises(UserError, match="and 1 prompts that leave no room for a response in 8 tokens"):
        chat_loader(write_records(tmp_path / "b.jsonl", pair("abcdefgh", "i")))


def test_text_and_examples_go_together_text_first(tmp_path):
    path = write_records(tmp_path / "a.jsonl", pair("a", "b"), {"text": "cdefghijk"}, talk("x", "y"))
    loader = chat_loader(path, T=64)
    sequences = [sequence.tolist() for sequence in loader.sequences]
    assert sequences[:2] == [tokens_of("cdefghijk"), tokens_of("ab")]
    assert sequences[2][-2:] == [*bytes_of("y"), EOS]
    may = loader.batch_at(0).maskable
    assert sorted(may.sum(axis=1)) == [64 - len(sequences[2]) + 2, 63, 64]


def test_text_alone_has_no_restriction(tmp_path):
    assert loader_of(write_jsonl(tmp_path / "a.jsonl", "abcdefgh")).batch_at(0).maskable is None


def test_examples_are_held_out_whole_and_the_fingerprint_sees_where_responses_begin(tmp_path):
    records = [pair("ab", f"c{n}") for n in range(20)]
    train = chat_loader(write_records(tmp_path / "a.jsonl", *records), held_out_fraction=0.25)
    held_out = train.with_split("held_out")
    assert (train.n_sequences, held_out.n_sequences) == (15, 5)
    assert all(sequence[-1] == EOS for sequence in held_out.sequences)
    other = chat_loader(write_records(tmp_path / "b.jsonl", *[pair("a", f"bc{n}") for n in range(20)]))
    assert np.array_equal(np.sort(np.concatenate(other.sequences)),
                          np.sort(np.concatenate(train.with_split("all").sequences)))  # fmt: skip
    assert other.fingerprint != train.fingerprint


@pytest.mark.parametrize(
    "record, message",
    [
        (
            {"prompt": "a"},
            'line 2: not an object with a string "text", with strings "prompt" and "completion"',
        ),
        ({"prompt": "a", "completion": 3}, "line 2: not an object"),
        (talk("a"), 'line 2: the last of the "messages" must have the role "assistant"'),
        (pair("a", "\ud83d"), "line 2: .*surrogate"),
    ],
)
def test_faults_of_records_name_the_file_and_the_line(tmp_path, smollm2_tokenizer, record, message):
    path = write_records(tmp_path / "a.jsonl", pair("x", "y"), record)
    with pytest.raises(UserError, match=message) as refusal:
        TextDataLoader(path, smollm2_tokenizer, 8, 1)
    assert str(refusal.value).startswith(f"{path}, ")
    assert "\n" not in str(refusal.value)


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2_path) -> Tokenizer:
    return Tokenizer.from_gguf(smollm2_path)


def test_the_template_of_a_real_model_teaches_an_answer_and_its_end(tmp_path, smollm2_tokenizer):
    path = write_records(tmp_path / "a.jsonl", talk("What is 2 + 2?", "4, of course."))
    batch = TextDataLoader(path, smollm2_tokenizer, 64, 1).batch_at(0)
    length = int(batch.lengths[0])
    learned = batch.tokens[0, :length][batch.maskable[0, :length]]
    given = batch.tokens[0, :length][~batch.maskable[0, :length]]
    text = smollm2_tokenizer.decode(given, special=True)
    assert text.endswith("<|im_start|>user\nWhat is 2 + 2?<|im_end|>\n<|im_start|>assistant\n")
    assert given[0] == smollm2_tokenizer.bos_id  # a control token, not its letters
    assert smollm2_tokenizer.decode(learned) == "4, of course."
    assert (learned == smollm2_tokenizer.eos_id).tolist() == [False] * (len(learned) - 1) + [True]


def drawn_masks(engine, path, n_steps=40, **changes):
    """Masks of many steps on one batch of examples: (batch, noisy batch, which tokens are masks) each."""
    batch = chat_loader(path, T=12, B=4).batch_at(0)
    trainer = make_trainer(engine, training__batch_size=4, model__prediction="aligned", **changes)
    for step in range(n_steps):
        trainer.step_count = step
        noisy = trainer.corrupt(batch)
        in_sequence = np.arange(12) < noisy.lengths[:, None]
        yield batch, noisy, (noisy.noisy == trainer.mask_token_id) & in_sequence


@pytest.fixture(scope="module")
def engine(tiny_model):
    with Q4Model.from_gguf(tiny_model(L=1, C=32, H=2, G=1, F=32), 1) as opened:
        yield opened


def test_behind_a_masked_end_there_may_be_more_masks_which_are_no_targets(engine, tmp_path):
    path = write_records(tmp_path / "a.jsonl", *[pair("ab", "cdefg"[:n]) for n in range(1, 5)])
    seen = set()
    for batch, noisy, masks in drawn_masks(engine, path, 100):
        for b, length in enumerate(batch.lengths):
            n_more = noisy.lengths[b] - length
            seen.add((int(length), int(n_more)))
            if masks[b, length - 1]:
                assert masks[b, length : noisy.lengths[b]].all()
            else:
                assert n_more == 0
            assert not noisy.weights[b, length:].any() and not masks[b, :2].any()
    assert {n_more for length, n_more in seen if length == 4} == set(range(9))
    assert {n_more for length, n_more in seen if length == 7} == set(range(6))


def test_a_last_block_with_a_masked_end_is_filled_up_with_masks(engine, tmp_path):
    path = write_records(tmp_path / "a.jsonl", *[pair("ab", "cdefg"[:n]) for n in range(1, 5)])
    blocks = {"block_diffusion__enabled": True, "block_diffusion__growth_share": 0.0}
    ends = set()
    for batch, noisy, masks in drawn_masks(
        engine, path, **blocks, block_diffusion__initial_size=4, block_diffusion__final_size=4
    ):
        for b, length in enumerate(batch.lengths):
            is_end = noisy.lengths[b] >= length and masks[b, length - 1]
            ends.add((int(noisy.lengths[b]), bool(is_end)))
            # The response starts at 2: blocks end at 6 and 10.
            assert noisy.lengths[b] in ((6, 10) if is_end else (6, length))
    assert {(6, True), (10, True)} <= ends


@pytest.mark.parametrize("suffix", ["safetensors", "gguf"])
def test_a_conversion_says_whether_it_was_trained_on_prompts_also_after_a_resume(engine, tmp_path, suffix):
    path = write_records(tmp_path / "a.jsonl", pair("ab", "cde"))
    trainer = make_trainer(engine)
    trainer.export(tmp_path)
    assert not DiffusionModel.load(engine.file.path, tmp_path / f"adapter.{suffix}").rule.prompts
    trainer.train_step(chat_loader(path).batch_at(0))
    save_run(trainer, tmp_path / "checkpoints")
    resumed = make_trainer(engine)
    assert resume_run(resumed, tmp_path / "checkpoints")
    resumed.export(tmp_path)
    assert DiffusionModel.load(engine.file.path, tmp_path / f"adapter.{suffix}").rule.prompts


BLOCKS = {"block_diffusion.enabled": True, "block_diffusion.initial_size": 2, "block_diffusion.final_size": 4}


@pytest.mark.parametrize("blocks", [{}, BLOCKS], ids=["whole", "blocks"])
def test_responses_and_their_ends_are_learned_by_heart(tiny_model, tmp_path, blocks):
    """Four prompts, whose responses have different lengths: each is written, and ends where it should."""
    responses = {"the cat": " sat on the mat", "one and": " two", "in the": " house", "to be": " or not"}
    path = write_records(tmp_path / "a.jsonl", *[pair(*item) for item in responses.items()])
    n_steps = 500
    overrides = {
        "training.batch_size": 4,
        "training.gradient_accumulation": 1,
        "training.total_steps": n_steps,
        "training.warmup_steps": 10,
        "training.learning_rate": 3e-3,
        "training.weight_decay": 0.0,
        "model.target_modules": [module.value for module in TargetModule],
        "mask_annealing.total_steps": n_steps // 5,
        "noise_schedule.type": "linear",
        **blocks,
    }
    base = tiny_model(L=2, C=64, H=4, G=2, F=128)
    tokenizer = Tokenizer.from_gguf(base)
    data = TextDataLoader(path, tokenizer, 24, 4)
    with Q4Model.from_gguf(base, 1) as engine:
        trainer = ConversionTrainer(engine, load_config(overrides=overrides))
        for step in range(n_steps):
            trainer.train_step(data.batch_at(step))
        converted = DiffusionModel.from_checkpoint(engine, tokenizer, trainer.checkpoint())
        settings = GenerationConfig(length=16, steps=16, temperature=0.0)
        assert {prompt: converted.generate(prompt, settings) for prompt in responses} == responses
