"""Words remembered one by one have the tokens that llama.cpp gives the whole text."""

import random
from pathlib import Path

import numpy as np
import pytest
from gguf_changes import with_vocabulary_keys
from tiny_vocabularies import FAMILIES

from ggml_diffusion.errors import UserError
from ggml_diffusion.formats.model_file import read_gguf
from ggml_diffusion.text import word_cache
from ggml_diffusion.text.tokenizer import Tokenizer
from ggml_diffusion.text.vocabulary_child import VocabularyChild
from ggml_diffusion.text.word_cache import WordCache

# What expressions of pre-tokenizers treat differently, and words that are cut.
PARTS = (
    *"aBzQ09.,'!-_/<>|\t\n\r\u00a0\u3000\u200d\x00\x7f",
    *(" " * 6),
    *("\n" * 4),
    *("\nand", "\nQ", ",\nthe", "\n  in", "\n    Sand", "   the", "\t\n x", "\n\n\n", " \n", ".\n", "\r\na"),
    *(
        "the",
        "Sand",
        "in",
        "SEA",
        "and",
        "'s",
        "'LL",
        "’t",
        "12",
        "1234567",
        "...",
        "),(",
        "\r\n",
        "\n\n",
        "  ",
    ),
    *("ä", "ß", "É", "и", "Ж", "字", "かな", "한", "é", "🙂", "a🙂b", "Ⅻ", "½", "ﬁ", "ʼ"),
    *("<think>", "</s>", "<tool_call>", "|||EMAIL_ADDRESS|||", "<|eos|>", "▁"),
)


def random_text(generator: random.Random) -> str:
    parts = generator.choices(PARTS, k=generator.randint(0, 60))
    return "".join(part + generator.choice(("", " ", " ", " a", "x ")) for part in parts)


def assert_same_tokens(tokenizer: Tokenizer, n_texts: int) -> None:
    cache = WordCache(tokenizer)
    assert cache.cuts
    generator = random.Random(7)
    every_end = "".join(f"{chr(code)} ab {chr(code)}\nQ" for code in range(128))
    texts = [
        (text, continued)
        for text in (every_end, "", *(random_text(generator) for _ in range(n_texts)))
        for continued in (False, True)
    ]
    expected = [tokenizer.encode(text, continued=continued) for text, continued in texts]
    for (text, continued), tokens in zip(texts, expected, strict=True):
        assert np.array_equal(cache.encode(text, continued=continued), tokens), repr(text)
    for (text, _), tokens, found in zip(
        texts, expected, WordCache(tokenizer).encode_each(texts), strict=True
    ):
        assert np.array_equal(found, tokens), repr(text)


def with_tokens_across_blanks(source: Path, path: Path, pre: str) -> Path:
    """A byte-level vocabulary that would merge the end of each word with the blank behind it, and more.

    So where its pre-tokenizer does not end words, text that is cut there has other tokens.
    """
    metadata = read_gguf(source).metadata
    tokens, types = list(metadata["tokenizer.ggml.tokens"]), list(metadata["tokenizer.ggml.token_type"])
    merges = list(metadata["tokenizer.ggml.merges"])
    ends = [chr(code) for code in range(ord("!"), ord("~") + 1)] + ["Ċ"]  # the line feed
    across = [f"{end} Ġ" for end in ends] + ["dĠ s", "dĠs e", "xĠ a", ".Ġ t", "2Ġ a"]
    across += ["ĊĠ a", "ĠĠ a", "Ċ a", "Ċ t", "Ċ B", "Ġ Ġ", "Ċ Ċ"]
    unused = iter(place for place, kind in enumerate(types) if kind == 5)  # UNUSED
    for merge in across:
        if merge not in merges:
            place = next(unused)
            tokens[place], types[place] = merge.replace(" ", ""), 1  # NORMAL
    merges = [*across, *(merge for merge in merges if merge not in across)]
    keys = {"pre": pre, "tokens": tokens, "token_type": [int(kind) for kind in types], "merges": merges}
    return with_vocabulary_keys(source, path, keys)


@pytest.mark.parametrize("kind", ["bpe", "spm", *FAMILIES])
def test_every_family_has_the_tokens_of_the_whole_text(tiny_model, kind):
    assert_same_tokens(Tokenizer.from_gguf(tiny_model(tokenizer=kind, V=512, L=1)), 150)


# One of each expression; the others are slow.
OFTEN = ("default", "gpt-2", "smollm", "falcon", "llama-bpe", "qwen2", "tekken", "gpt-4o")


@pytest.mark.parametrize(
    "pre",
    [
        *OFTEN,
        *(pytest.param(pre, marks=pytest.mark.slow) for pre in sorted(word_cache._CUT_THERE - {"", *OFTEN})),
    ],
)
def test_every_pre_tokenizer_that_is_cut_has_the_tokens_of_the_whole_text(tiny_model, tmp_path, pre):
    path = with_tokens_across_blanks(tiny_model(L=1, V=512), tmp_path / "pre.gguf", pre)
    assert_same_tokens(Tokenizer.from_gguf(path), 40)


def test_a_text_is_learnt_once(tiny_model, monkeypatch):
    tokenizer = Tokenizer.from_gguf(tiny_model(L=1))
    cache = WordCache(tokenizer)
    text = "the sand and the sea\nin the sand " * 50 + "é" * 100 + " x"
    first = cache.encode(text)
    assert max(map(len, cache._words)) <= 64
    calls: list[str] = []
    encode = tokenizer._encode
    monkeypatch.setattr(
        tokenizer, "_encode", lambda texts, *rest: calls.extend(texts) or encode(texts, *rest)
    )
    assert np.array_equal(cache.encode(text), first)
    assert [call for call in calls if call] == [" sand " + "é" * 100 + " x"]
    monkeypatch.setattr(word_cache, "_MAX_WORDS", 4)
    for _ in range(2):
        assert np.array_equal(cache.encode(text), first)  # forgetting changes nothing


def test_many_short_texts_take_few_requests(tiny_model, monkeypatch):
    tokenizer = Tokenizer.from_gguf(tiny_model(L=1))
    generator = random.Random(3)
    texts = [("".join(generator.choices("abcdefgh .\n", k=30)), bool(number % 2)) for number in range(500)]
    n_requests = 0
    tokenize = VocabularyChild.tokenize

    def counted(self, texts, **options):
        nonlocal n_requests
        n_requests += 1
        return tokenize(self, texts, **options)

    monkeypatch.setattr(VocabularyChild, "tokenize", counted)
    found = WordCache(tokenizer).encode_each(texts)
    assert n_requests < 10
    expected = [tokenizer.encode(text, continued=continued) for text, continued in texts]
    assert all(map(np.array_equal, found, expected))


def test_a_text_that_llama_cpp_dies_of_is_named_among_others(tiny_model, monkeypatch):
    tokenizer = Tokenizer.from_gguf(tiny_model(L=1))
    tokenize = VocabularyChild.tokenize

    def deadly(self, texts, **options):
        if b"deadly" in b"".join(texts):
            raise UserError(f"died at {len(texts)}")
        return tokenize(self, texts, **options)

    monkeypatch.setattr(VocabularyChild, "tokenize", deadly)
    with pytest.raises(UserError, match=r"died at 1$"):
        tokenizer.encode_each(["the sand", "deadly", "the sea"])


def test_sentencepiece_with_a_token_across_blanks_is_not_cut(tiny_model, tmp_path):
    source = tiny_model(L=1, V=512, tokenizer="spm")
    tokens = list(read_gguf(source).metadata["tokenizer.ggml.tokens"])
    for place, name in enumerate(("d▁", "d▁a", "\na", "e▁"), start=505):
        tokens[place] = name
    types = [int(kind) for kind in read_gguf(source).metadata["tokenizer.ggml.token_type"]]
    types[505:509] = [1] * 4  # NORMAL
    keys = {"tokens": tokens, "token_type": types}
    tokenizer = Tokenizer.from_gguf(with_vocabulary_keys(source, tmp_path / "spm.gguf", keys))
    assert tokens.index("d▁") in tokenizer.encode("xd q")
    assert not WordCache(tokenizer).cuts


@pytest.mark.parametrize("kind", ["bpe", "spm"])
def test_added_tokens_that_reach_across_a_cut_are_found(tiny_model, tmp_path, kind):
    source = tiny_model(L=1, V=512, tokenizer=kind)
    metadata = read_gguf(source).metadata
    tokens = list(metadata["tokenizer.ggml.tokens"])
    types = [int(one) for one in metadata["tokenizer.ggml.token_type"]]
    # SentencePiece merges to added tokens too, so that those across a line's end let no text be cut.
    ends = ("and\nin", "\nQ") if kind == "bpe" else ("and in", "??")
    names = ("the sand", "sea ", *ends, "!!", " x")
    for place, name in enumerate(names, start=500):
        tokens[place], types[place] = name, 4  # USER_DEFINED
    keys = {"tokens": tokens, "token_type": types}
    tokenizer = Tokenizer.from_gguf(with_vocabulary_keys(source, tmp_path / "added.gguf", keys))
    text = "in the sand, sea and\nin\nQ a!! the x xx!! and sea in a\nQ"
    assert {500, 501, 504, 505} <= set(tokenizer.encode(text).tolist())
    cache = WordCache(tokenizer)
    assert cache.cuts
    for part in (text, *text.split(",")[1:], "a!! the sea", "the x xx!! and", "of a x", "in\na\nQ b"):
        assert np.array_equal(cache.encode(part), tokenizer.encode(part)), part


@pytest.mark.parametrize("pre", ["superbpe", "exaone-moe"])
def test_a_pre_tokenizer_that_ends_no_word_there_is_not_cut(tiny_model, tmp_path, monkeypatch, pre):
    path = with_tokens_across_blanks(tiny_model(L=1, V=512), tmp_path / "pre.gguf", pre)
    tokenizer = Tokenizer.from_gguf(path)
    text = "the sand and the sea"
    expected = tokenizer.encode(text).tolist()
    cache = WordCache(tokenizer)
    assert not cache.cuts
    assert cache.encode(text).tolist() == expected
    monkeypatch.setattr(cache, "cuts", True)  # so that the vocabulary of these tests shows the difference
    assert cache.encode(text).tolist() != expected
