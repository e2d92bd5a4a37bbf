"""Vocabularies and texts of which llama.cpp dies: one line, and the process that asked lives on."""

from __future__ import annotations

import os
import pickle
import signal
from pathlib import Path

import numpy as np
import pytest
from conftest import TinyModel
from conversions import refusal
from gguf_bytes import I32, STRING, Gguf, array, scalar, tiny_llama, write_gguf
from gguf_changes import with_vocabulary_keys

from ggml_diffusion.app.inspect import describe_file
from ggml_diffusion.errors import UserError
from ggml_diffusion.formats.model_check import read_model
from ggml_diffusion.text.tokenizer import Tokenizer
from ggml_diffusion.text.vocabulary_child import VocabularyChild

TOKENS = [*"abcdefgh", "ab", "é", "<end>", ""]

# All names that llama.cpp knows (src/llama-vocab.cpp), but for those of the kinds of vocabulary that are
# refused.
PRE_TOKENIZERS = (
    *(
        "a.x-4.0",
        "afmoe",
        "bailingmoe",
        "bailingmoe2",
        "bloom",
        "chameleon",
        "chatglm-bpe",
        "codeshell",
        "cohere2moe",
    ),
    *(
        "command-r",
        "dbrx",
        "deepseek-coder",
        "deepseek-llm",
        "deepseek-r1-qwen",
        "deepseek-v3",
        "default",
        "exaone",
    ),
    *(
        "exaone-moe",
        "exaone4",
        "f2llmv2",
        "falcon",
        "falcon-h1",
        "falcon3",
        "gemma4",
        "gigachat",
        "glm4",
        "glm5",
    ),
    *(
        "gpt-2",
        "gpt-4o",
        "gpt3-finnish",
        "granite-docling",
        "grok-2",
        "hunyuan",
        "hunyuan-dense",
        "jais",
        "jais-2",
    ),
    *(
        "jina-de",
        "jina-es",
        "jina-v1-en",
        "jina-v2-code",
        "jina-v2-de",
        "jina-v2-es",
        "joyai-llm",
        "kanana2",
        "kimi-k2",
    ),
    *(
        "kormo",
        "lfm2",
        "llada-moe",
        "llama-bpe",
        "llama-v3",
        "llama3",
        "llama4",
        "megrez",
        "mellum",
        "midm-2.0",
    ),
    *(
        "minerva-7b",
        "minimax-m2",
        "modern-bert",
        "mpt",
        "olmo",
        "phi-2",
        "pixtral",
        "poro-chat",
        "qwen2",
        "qwen35",
    ),
    *("refact", "roberta-bpe", "sarvam-moe", "seed-coder", "smaug-bpe", "smollm", "solar-open", "stablelm2"),
    *("starcoder", "superbpe", "talkie", "tekken", "tiny_aya", "trillion", "viking", "whitespace", "youtu"),
)
# Long runs of one class of letters recurse once a letter in some pre-tokenizers.
RUN = 60_000
TEXTS = [letter * RUN for letter in ("-", "a", "1", " ", "\n", "é", "漢", "🎉", "\u0301", "aB")] + [
    "\0\x01\x7f\ufffd\ufeff\u2028" * 1000,
    "".join(map(chr, range(0x20, 0xD000, 7))),
]


def with_vocabulary(path: Path, tokens: list[str | bytes], **keys: bytes) -> Path:
    """The tiny model with other tokens, of which there must be as many, and other keys of its vocabulary."""
    file: Gguf = tiny_llama().set("tokenizer.ggml.tokens", array(STRING, list(tokens)))
    for key, value in keys.items():
        file.set(f"tokenizer.ggml.{key}", value)
    return write_gguf(path, file)


@pytest.mark.parametrize(
    "change, fault",
    [
        ({0: b"a\0b"}, "token 0 of its vocabulary holds a NUL byte"),
        ({8: b"a\0x", 9: b"a\0y"}, "token 8 of its vocabulary holds a NUL byte"),
        ({11: b"\0"}, "token 11 of its vocabulary holds a NUL byte"),
        ({9: b"[EMPTY_11]"}, "holds the same token twice"),
        ({9: b"a"}, "holds the same token twice"),
    ],
)
def test_tokens_that_are_equal_for_llama_cpp_are_refused_by_name(
    tmp_path: Path, change: dict[int, bytes], fault: str
) -> None:
    tokens: list[str | bytes] = [change.get(index, text) for index, text in enumerate(TOKENS)]
    path = with_vocabulary(tmp_path / "model.gguf", tokens)
    for reader in (read_model, Tokenizer.from_gguf):
        assert fault in refusal(lambda reader=reader: reader(path))
    (verdict,) = [
        section.rows[0][1] for section in describe_file(path).sections if section.title == "Conversion"
    ]
    assert verdict.startswith("no: ") and fault in verdict


def test_a_vocabulary_of_which_llama_cpp_dies_is_no_for_inspect_and_one_line_for_all_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`whitespace` aborts at the first blank. The check that knows it is taken away, as if it did not."""
    path = with_vocabulary(tmp_path / "model.gguf", list(TOKENS), pre=scalar(STRING, "whitespace"))
    assert "'whitespace' is not supported" in refusal(lambda: read_model(path))
    for module in (
        "ggml_diffusion.formats.model_check",
        "ggml_diffusion.text.tokenizer",
        "ggml_diffusion.app.inspect",
    ):
        monkeypatch.setattr(f"{module}.check_tokenizer", lambda file: None)
    message = refusal(lambda: Tokenizer.from_gguf(path))
    assert message.startswith(f"{path}: llama.cpp died of SIGABRT: ")
    (verdict,) = [
        section.rows[0][1] for section in describe_file(path).sections if section.title == "Conversion"
    ]
    assert verdict.startswith("no: llama.cpp died of SIGABRT: ")


@pytest.mark.parametrize(
    "keys, fault",
    [
        ({"pre": array(STRING, ["default"])}, "of type arr[str], expected str"),
        ({"pre": array(I32, [1, 2])}, "of type arr[i32], expected str"),
        ({"add_bos_token": scalar(STRING, "yes")}, "of type str, expected bool"),
        ({"add_space_prefix": array(I32, [1, 2])}, "of type arr[i32], expected bool"),
        ({"token_type": array(I32, [1] * 11)}, "has 11 entries for 12 tokens"),
        ({"token_type": array(I32, [])}, "has 0 entries for 12 tokens"),
    ],
)
def test_keys_of_a_vocabulary_have_types(tmp_path: Path, keys: dict[str, bytes], fault: str) -> None:
    path = with_vocabulary(tmp_path / "model.gguf", list(TOKENS), **keys)
    assert fault in refusal(lambda: read_model(path))
    describe_file(path)


@pytest.mark.parametrize("kind", ["bpe", "spm"])
def test_the_process_is_started_anew_after_its_death_and_says_what_it_died_of(
    tiny_model: TinyModel, kind: str
) -> None:
    path = tiny_model(tokenizer=kind)
    tokenizer = Tokenizer.from_gguf(path)
    expected = tokenizer.encode("the sand")
    child = tokenizer._vocabulary._child
    assert child is not None
    os.kill(child._process.pid, signal.SIGSEGV)
    child._process.wait(30)
    message = refusal(lambda: tokenizer.encode("the sand"))
    assert message.startswith(f"{path}: llama.cpp died of SIGSEGV at a text of ") and "the sand'" in message
    assert np.array_equal(tokenizer.encode("the sand"), expected)


def test_a_tokenizer_can_be_pickled(tiny_model: TinyModel) -> None:
    tokenizer = Tokenizer.from_gguf(tiny_model(tokenizer="spm"))
    other = pickle.loads(pickle.dumps(tokenizer))
    assert np.array_equal(
        other.encode("the sand", continued=True), tokenizer.encode("the sand", continued=True)
    )
    assert (other.eos_id, other.start_id, other.control_tokens) == (
        tokenizer.eos_id,
        tokenizer.start_id,
        tokenizer.control_tokens,
    )


def test_several_texts_at_once_have_the_tokens_of_each_alone(tiny_model: TinyModel) -> None:
    path = tiny_model(tokenizer="bpe")
    texts = [b"the sand", b"", b" and the sea", b"a" * 5000]
    vocabulary = VocabularyChild(path, read_model(path).V)
    together = vocabulary.tokenize(texts)
    assert [one.tolist() for one in together] == [vocabulary.tokenize([text])[0].tolist() for text in texts]
    assert vocabulary.tokenize([]) == []


@pytest.mark.parametrize("reply", [b"", b"\0" * 8, b"\1" * 8, b"\x02" + b"\0" * 7 + b"\xff" * 8, b"\0" * 3])
def test_an_answer_that_makes_no_sense_is_refused(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, reply: bytes
) -> None:
    path = tiny_model()
    vocabulary = VocabularyChild(path, read_model(path).V)
    monkeypatch.setattr(vocabulary, "_ask", lambda *_: reply)
    asked = [lambda: vocabulary.table(), lambda: vocabulary.pieces([1, 2])]
    if reply != b"\0" * 8:  # one text without tokens
        asked.append(lambda: vocabulary.tokenize([b"a"]))
    for ask in asked:
        assert "makes no sense" in refusal(ask)


def changed_pre(tiny_model: TinyModel, tmp_path: Path, pre: str) -> Path:
    return with_vocabulary_keys(tiny_model(), tmp_path / "changed.gguf", {"pre": pre})


@pytest.mark.parametrize("pre", ["tekken", "default", "llama-bpe"])
def test_a_long_run_of_one_class_of_letters_is_tokenised_or_named(
    tiny_model: TinyModel, tmp_path: Path, pre: str
) -> None:
    tokenizer = Tokenizer.from_gguf(changed_pre(tiny_model, tmp_path, pre))
    for text in TEXTS[:2]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.slow
@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_any_text_of_any_pre_tokenizer_is_tokenised_or_refused_in_one_line(
    tiny_model: TinyModel, tmp_path: Path, pre: str
) -> None:
    path = changed_pre(tiny_model, tmp_path, pre)
    try:
        tokenizer = Tokenizer.from_gguf(path)
    except UserError as error:
        assert str(error).isprintable() and pre in ("gemma4", "sarvam-moe", "whitespace")
        return
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text
