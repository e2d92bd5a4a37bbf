"""The vocabulary of a GGUF: tokens and text both ways, silence and faults."""

import os
import subprocess
import sys
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import pytest
from gguf_changes import with_vocabulary_keys

from ggml_diffusion.errors import UserError
from ggml_diffusion.text.tokenizer import Tokenizer

TEXTS = (
    "",
    "The cat sat on the mat, and on the other thing.",
    " leading and trailing ",
    "two\n\nlines\tand a tab\r\n",
    "naïve café — 漢字 🎉👍🏽",
    "nul \0 byte",
    "<|im_end|> and <|eos|> and </s> are plain text",
)


@pytest.fixture(scope="module", params=["bpe", "spm", "smollm2"])
def tokenizer(request, tiny_model) -> Tokenizer:
    if request.param == "smollm2":
        return Tokenizer.from_gguf(request.getfixturevalue("smollm2_path"))
    return Tokenizer.from_gguf(tiny_model(tokenizer=request.param, V=512))


@pytest.mark.parametrize("text", TEXTS)
def test_text_comes_back_from_its_tokens(tokenizer, text):
    tokens = tokenizer.encode(text)
    assert tokens.dtype == np.int32 and tokens.ndim == 1
    assert tokenizer.decode(tokens) == text


@pytest.mark.parametrize("text", TEXTS)
def test_no_token_of_a_text_is_a_control_token(tokenizer, text):
    assert not any(tokenizer.is_control(int(token)) for token in tokenizer.encode(text))


def test_neither_bos_nor_end_of_text_is_added(tokenizer):
    tokens = tokenizer.encode("the").tolist()
    assert len(tokens) >= 1
    assert tokenizer.bos_id not in tokens and tokenizer.eos_id not in tokens


def test_the_same_text_has_the_tokens_that_llama_cpp_python_gives_it(smollm2_path):
    theirs = llama_cpp.Llama(str(smollm2_path), vocab_only=True, verbose=False)
    text = "".join(TEXTS)
    assert Tokenizer.from_gguf(smollm2_path).encode(text).tolist() == theirs.tokenize(
        text.encode(), add_bos=False, special=False
    )


def test_a_character_whose_bytes_are_not_all_there_becomes_the_replacement_character(tokenizer):
    tokens = tokenizer.encode("é漢🎉")
    # Both vocabularies have no token for the emoji: it is spread over bytes, of which the last is cut off.
    assert tokenizer.decode(tokens[:-1]).endswith("�")
    assert tokenizer.decode(tokens) == "é漢🎉"


def test_control_tokens_are_left_out_of_a_text_unless_asked_for(tokenizer):
    word = tokenizer.encode("the")
    tokens = [tokenizer.eos_id, *word.tolist(), tokenizer.eos_id]
    name = tokenizer.token_text(tokenizer.eos_id)
    assert len(name) > 2
    assert tokenizer.decode(tokens) == "the"
    assert tokenizer.decode(tokens, special=True).replace(" ", "") == f"{name}the{name}"


def test_special_tokens_of_smollm2_are_the_files(smollm2_path):
    tokenizer = Tokenizer.from_gguf(smollm2_path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 49152)
    assert tokenizer.token_text(2) == "<|im_end|>"
    assert tokenizer.is_control(7) and not tokenizer.is_control(500)


@pytest.mark.parametrize("token", [-1, 512, 2**31 - 1])
def test_a_token_outside_of_the_vocabulary_is_refused_and_does_not_abort(tiny_model, token):
    tokenizer = Tokenizer.from_gguf(tiny_model(tokenizer="bpe", V=512))
    for use in (tokenizer.token_text, tokenizer.is_control, lambda t: tokenizer.decode([t])):
        with pytest.raises(UserError, match=f"token {token} is outside of the vocabulary of 512"):
            use(token)


def test_half_of_a_surrogate_pair_is_refused(tokenizer):
    with pytest.raises(UserError, match="character 3 of the text"):
        tokenizer.encode("ab\ud83d")


@pytest.mark.parametrize("name", ["missing.gguf", "not_a_model.gguf"])
def test_a_file_that_is_no_model_is_refused_by_name(tmp_path, name):
    (tmp_path / "not_a_model.gguf").write_bytes(b"no GGUF at all")
    with pytest.raises(UserError, match=name):
        Tokenizer.from_gguf(tmp_path / name)


def test_a_model_without_a_vocabulary_is_refused(tiny_model, tmp_path):
    source = tiny_model(tokenizer="bpe").read_bytes()
    # Same lengths, so that nothing else in the file moves: the key is simply not one that is known.
    renamed = source.replace(b"tokenizer.ggml.model", b"tokenizer.ggml.mxdel").replace(
        b"tokenizer.ggml.tokens", b"tokenizer.ggml.txkens"
    )
    path = tmp_path / "mute.gguf"
    path.write_bytes(renamed)
    with pytest.raises(UserError, match="holds no vocabulary"):
        Tokenizer.from_gguf(path)


def test_nothing_is_written_to_stdout_or_stderr(tiny_model):
    program = (
        "import sys; from ggml_diffusion.text.tokenizer import Tokenizer\n"
        "t = Tokenizer.from_gguf(sys.argv[1]); t.decode(t.encode('a text')); t.close()\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(tiny_model(tokenizer="spm"))],
        capture_output=True,
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)},
    )
    assert (run.stdout, run.stderr) == (b"", b"")


# -- text that goes on -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def spm(tiny_model) -> Tokenizer:
    return Tokenizer.from_gguf(tiny_model(tokenizer="spm", V=512))


def names(tokenizer, tokens) -> list[str]:
    return [tokenizer.token_text(int(token)) for token in tokens]


@pytest.mark.parametrize(
    "text, pieces",
    [
        (" and the sea", [" and", " the", " s", "e", "a"]),
        ("nd", ["nd"]),
        ("and", ["a", "nd"]),
        ("  on", [" ", " ", "on"]),
        ("\n on", ["\n", " ", "on"]),
        ("\x01on", ["\x01", "on"]),
        ("", []),
    ],
)
def test_sentencepiece_puts_no_blank_in_front_of_text_that_goes_on(spm, text, pieces):
    tokens = spm.encode(text, continued=True)
    assert names(spm, tokens) == pieces
    assert spm.decode(tokens, continued=True) == text


@pytest.mark.parametrize("text", TEXTS)
def test_text_that_goes_on_comes_back_from_its_tokens(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text, continued=True), continued=True) == text


def test_text_cut_between_words_has_the_tokens_of_the_whole(tokenizer):
    words = ["The", " cat", " sat", " on", " the", "  other", "\nand", " the", " thing."]
    whole = tokenizer.encode("".join(words)).tolist()
    for cut in range(1, len(words)):
        front, back = "".join(words[:cut]), "".join(words[cut:])
        assert [*tokenizer.encode(front), *tokenizer.encode(back, continued=True)] == whole


def test_what_stands_behind_a_control_token_starts_anew(spm):
    the = spm.encode("the", special=True)
    assert spm.encode("</s>the", special=True).tolist() == [spm.eos_id, *the]
    assert not spm.is_text(spm.eos_id) and spm.is_text(int(the[0]))


# -- what a file says about its vocabulary ---------------------------------------------------------


def changed(tiny_model, tmp_path, keys, **options) -> Path:
    """The tiny model with keys of its vocabulary changed; None takes one away."""
    return with_vocabulary_keys(tiny_model(**options), tmp_path / "changed.gguf", keys)


def test_a_vocabulary_without_a_pre_tokenizer_is_warned_of(tiny_model, tmp_path):
    (warning,) = Tokenizer.from_gguf(changed(tiny_model, tmp_path, {"pre": None})).warnings
    assert "names no pre-tokenizer" in warning and "\n" not in warning
    for kind in ("bpe", "spm"):
        assert Tokenizer.from_gguf(tiny_model(tokenizer=kind)).warnings == ()


def test_a_vocabulary_that_lacks_common_characters_is_warned_of(tiny_model, tmp_path):
    """llama.cpp leaves out a byte that has no token, without a word."""
    tokens = list(gguf.GGUFReader(tiny_model()).fields["tokenizer.ggml.tokens"].contents())
    for lacking in ("Q", "\u012a"):  # as byte-level BPE writes the byte 0x88
        tokens[tokens.index(lacking)] = f"<no {lacking}>"
    (warning,) = Tokenizer.from_gguf(changed(tiny_model, tmp_path, {"tokens": tokens})).warnings
    assert "no tokens for 2 common characters, among them 'Q', '\u0108'" in warning


@pytest.mark.parametrize("template", ["", " \n"])
def test_an_empty_chat_template_is_none(tiny_model, tmp_path, template):
    path = changed(tiny_model, tmp_path, {"chat_template": template})
    assert Tokenizer.from_gguf(path).open_chat_template() is None


@pytest.mark.parametrize(
    "kind, key, start",
    [
        ("bpe", True, 1),
        ("bpe", None, None),
        ("bpe", False, None),
        ("spm", True, 1),
        ("spm", None, 1),
        ("spm", False, None),
    ],
)
def test_the_token_in_front_of_a_text_is_the_one_that_llama_cpp_adds(tiny_model, tmp_path, kind, key, start):
    """Where the file does not say it, SentencePiece has it and byte-level BPE has not."""
    path = changed(tiny_model, tmp_path, {"add_bos_token": key}, tokenizer=kind)
    assert Tokenizer.from_gguf(path).start_id == start
    theirs = llama_cpp.Llama(str(path), vocab_only=True, verbose=False).tokenize(b"the", add_bos=True)
    assert (theirs[0] == 1) == (start == 1)


PRE_TOKENIZERS = (
    *("default", "gpt-2", "llama-bpe", "smaug-bpe", "qwen2", "qwen35", "gpt-4o", "dbrx", "refact", "tekken"),
    *("smollm", "starcoder", "stablelm2", "olmo", "deepseek-llm", "falcon3", "phi-2", "pixtral", "command-r"),
)


@pytest.mark.parametrize("pre", PRE_TOKENIZERS)
def test_text_comes_back_whatever_the_pre_tokenizer(tiny_model, tmp_path, pre):
    tokenizer = Tokenizer.from_gguf(changed(tiny_model, tmp_path, {"pre": pre}))
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_a_vocabulary_with_dna_is_read_as_byte_level_bpe(tiny_model, tmp_path):
    tokenizer = Tokenizer.from_gguf(changed(tiny_model, tmp_path, {"model": "hybriddna"}))
    plain = Tokenizer.from_gguf(tiny_model())
    assert tokenizer.encode("the sand").tolist() == plain.encode("the sand").tolist()


@pytest.mark.parametrize("kind", ["bert", "gemma4", "plamo2", "rwkv", "t5", "whitespace", "test", "tiktoken"])
def test_a_kind_of_vocabulary_that_is_not_safe_is_refused_in_one_line(tiny_model, tmp_path, kind):
    path = changed(tiny_model, tmp_path, {"model": kind})
    with pytest.raises(
        UserError, match=rf"changed\.gguf: tokenizer '{kind}' is not supported[:;] "
    ) as refusal:
        Tokenizer.from_gguf(path)
    assert str(refusal.value).isprintable()


def test_an_unknown_pre_tokenizer_is_refused_with_the_words_of_llama_cpp(tiny_model, tmp_path):
    path = changed(tiny_model, tmp_path, {"pre": "unheard of"})
    with pytest.raises(UserError, match=r"cannot load its vocabulary: .*unknown pre-tokenizer type"):
        Tokenizer.from_gguf(path)


def test_ids_outside_of_the_vocabulary_are_none_and_the_model_loads(tiny_model, tmp_path):
    no_token = dict.fromkeys(("padding_token_id", "eos_token_id", "bos_token_id"), 2**32 - 1)
    path = changed(tiny_model, tmp_path, {**no_token, "add_bos_token": True})
    tokenizer = Tokenizer.from_gguf(path)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.start_id) == (None, None, None)
    assert tokenizer.decode(tokenizer.encode("the sand")) == "the sand"


@pytest.mark.parametrize("kind", ["bpe", "spm"])
def test_sizes_of_all_tokens_are_those_of_each(tiny_model, kind):
    tokenizer = Tokenizer.from_gguf(tiny_model(tokenizer=kind))
    tokens = range(tokenizer.vocab_size)
    assert tokenizer.sizes.tolist() == [tokenizer.n_bytes(token) for token in tokens]
    texts = [tokenizer.token_text(token) if tokenizer.n_bytes(token) else "" for token in tokens]
    assert tokenizer.begins_with_blank.tolist() == [text.startswith(" ") for text in texts]
    assert 0 < tokenizer.begins_with_blank.sum() < len(texts)
