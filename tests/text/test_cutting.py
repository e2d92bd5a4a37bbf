"""Long texts: cut where no token reaches across, and runs that overflow llama.cpp's stack are tokenised."""

import itertools
import re
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from gguf_changes import with_vocabulary_keys
from tiny_vocabularies import _byte_characters

from ggml_diffusion.text import cutting
from ggml_diffusion.text import tokenizer as tokenizers
from ggml_diffusion.text.cutting import BOUNDARIES, cut, cut_numbers
from ggml_diffusion.text.tokenizer import Tokenizer

# A pre-tokenizer of each list of regular expressions in llama.cpp, with the others that share it.
# Those of raw UTF-8 (gemma4, granite-embed-multi-311m, sarvam-moe) need another kind of vocabulary.
PRE_TOKENIZERS = {
    "llama-bpe": (
        "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano",
    ),
    "dbrx": ("smaug-bpe", "chatglm-bpe", "glm4", "glm5"),
    "jais-2": (),
    "deepseek-llm": (),
    "deepseek-v3": ("hunyuan-dense", "joyai-llm", "hy_v4"),
    "spark2_5": (),
    "youtu": (),
    "deepseek-coder": (),
    "falcon": (),
    "smollm": ("starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b", "mellum2"),
    "gpt-2": (
        "phi-2", "jina-es", "jina-de", "gigachat", "jina-v2-es", "jina-v2-de", "a.x-4.0", "mellum",
        "modern-bert", "jina-v1-en", "jina-v2-code", "roberta-bpe", "mpt", "olmo", "jais", "exaone4",
        "trillion", "granite-docling",
    ),
    "qwen2": (
        "deepseek-r1-qwen", "kormo", "f2llmv2", "stablelm2", "hunyuan", "megrez", "solar-open",
    ),
    "qwen35": (),
    "bloom": ("poro-chat", "gpt3-finnish"),
    "viking": (),
    "tekken": (),
    "chameleon": (),
    "gpt-4o": ("llama4", "kanana2", "talkie", "minimax-m2"),
    "granite-embed-multi-97m": (),
    "tiny_aya": ("cohere2moe",),
    "kimi-k2": (),
    "superbpe": (),
    "bailingmoe": ("bailingmoe2", "llada-moe"),
    "seed-coder": (),
    "ufakzeka": (),
    "grok-2": (),
    "afmoe": (),
    "laguna": (),
    "exaone-moe": (),
    "minicpm5": (),
    "default": (),
}  # fmt: skip
RUNS = {
    "letters": "a", "capitals": "A", "digits": "1", "blanks": " ", "line feeds": "\n", "tabs": "\t",
    "dashes": "-", "quotes": "'", "Chinese": "漢", "Hindi": "नमस्ते", "Thai": "ภาษา", "emoji": "🎉",
    "marks": "\u0301",
    "no-break": "\u00a0", "joiners": "\u200d", "control": "\x01", "words": "ab cd ", "returns": "\r\n",
}  # fmt: skip
# Every two of these merge, in words as in anything else, so that a cut inside of a word shows.
ALPHABET = "aB1 .-'/\n,é"


@pytest.fixture(scope="module")
def merging(tiny_model, tmp_path_factory):
    """A function (pre-tokenizer) -> a tokenizer in which every two characters of ALPHABET merge."""
    folder = tmp_path_factory.mktemp("merging")
    letters = [*(_byte_characters()[byte] for byte in sorted({byte for byte in ALPHABET.encode()}))]
    merges = [f"{one} {two}" for one, two in itertools.product(letters, letters)]
    control = ["<|unk|>", "<|bos|>", "<|eos|>"]
    tokens = [*control, *_byte_characters(), *(merge.replace(" ", "") for merge in merges)]
    source = tiny_model(V=len(tokens), L=1)
    kinds = [int(gguf.TokenType.CONTROL)] * 3 + [int(gguf.TokenType.NORMAL)] * (len(tokens) - 3)
    made: dict[str, Tokenizer] = {}

    def make(pre: str) -> Tokenizer:
        if pre not in made:
            keys = {"tokens": tokens, "merges": merges, "token_type": kinds, "pre": pre}
            made[pre] = Tokenizer.from_gguf(with_vocabulary_keys(source, folder / f"{pre}.gguf", keys))
        return made[pre]

    return make


def joined(tokenizer: Tokenizer, parts: list[str]) -> list[int]:
    return [
        token for n, part in enumerate(parts) for token in tokenizer.encode(part, continued=n > 0).tolist()
    ]


def random_texts(n: int) -> list[str]:
    """Words, blanks, numbers and marks in any order."""
    generator = np.random.default_rng(0)
    words = [
        *ALPHABET,
        "the",
        " sea",
        "\n",
        " and",
        "123",
        "'s",
        "漢字",
        "。",
        "😀",
        "e\u0301",
        "\nTwo",
        "x.",
        "-- ",
    ]
    return ["".join(generator.choice(words, generator.integers(2, 25))) for _ in range(n)]


def check_boundaries(tokenizer: Tokenizer, boundaries: tuple[re.Pattern[str], ...], n_texts: int) -> None:
    n_cuts = 0
    for text in random_texts(n_texts):
        whole = tokenizer.encode(text).tolist()
        for boundary in boundaries:
            for place in boundary.finditer(text):
                parts = [text[: place.start()], text[place.start() :]]
                assert joined(tokenizer, parts) == whole, (boundary, parts)
                n_cuts += 1
    assert n_cuts > n_texts / 2


@pytest.mark.parametrize("pre", [name for name in PRE_TOKENIZERS if name != "superbpe"])
def test_no_token_reaches_across_a_boundary(merging, pre):
    """What `exaone-moe` takes for a word holds blanks; every other boundary is one there too."""
    check_boundaries(merging(pre), BOUNDARIES[:2] if pre == "exaone-moe" else BOUNDARIES, 60)


@pytest.mark.slow
@pytest.mark.parametrize("pre", [*PRE_TOKENIZERS, *itertools.chain(*PRE_TOKENIZERS.values())])
def test_no_token_reaches_across_a_boundary_whatever_the_pre_tokenizer(merging, pre):
    if pre != "superbpe":
        check_boundaries(merging(pre), BOUNDARIES[:2] if pre == "exaone-moe" else BOUNDARIES, 300)


def test_no_token_of_sentencepiece_reaches_across_a_boundary(tiny_model):
    check_boundaries(Tokenizer.from_gguf(tiny_model(tokenizer="spm")), BOUNDARIES, 300)


def test_a_cut_inside_of_a_word_would_show(merging):
    """The vocabularies of these tests see what they are made to see."""
    tokenizer = merging("gpt-2")
    assert joined(tokenizer, ["aB aa", "B 11"]) != tokenizer.encode("aB aaB 11").tolist()


# -- cut -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 7, 40, 1000])
def test_parts_are_the_text_and_no_longer_than_asked_for_whatever_the_pieces(size):
    text = "".join(random_texts(40)) + "-" * 100
    parts = list(cut([text], size))
    assert "".join(parts) == text
    assert all(size // 2 < len(part) <= size for part in parts[:-1]) and 0 < len(parts[-1]) <= size
    for length in (1, 3, 50):
        pieces = [text[start : start + length] for start in range(0, len(text), length)]
        assert list(cut(pieces, size)) == parts
    assert list(cut([], size)) == list(cut([""], size)) == []


@pytest.mark.parametrize(
    "text, first",
    [
        ("one, and two\nsix. ten and more words", "one, and two\n"),
        ("one, and two six. ten and more words", "one, and two six"),
        ("one and two six ten and more words", "one and two six ten"),
        ("--------------(((((aaaaaaaaa", "--------------((((("),
        ("aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa", "aaaaaaaaaaaaaaaaaaaa"),
    ],
)
def test_the_best_boundary_in_reach_is_taken_and_the_last_of_its_kind(text, first):
    assert next(cut([text], 20)) == first


# -- long runs -------------------------------------------------------------------------------------

PROGRAM = """
import sys
from ggml_diffusion.text.tokenizer import Tokenizer
text = open(sys.argv[1], encoding="utf-8", newline="").read()
for path in sys.argv[2:]:
    tokenizer = Tokenizer.from_gguf(path)
    assert tokenizer.decode(tokenizer.encode(text)) == text, path
print("all of them")
"""


def check_long_runs(tiny_model, folder: Path, names: list[str]) -> None:
    """In a process of its own, since a stack that overflows ends it."""
    text = folder / "runs.txt"
    runs = ("the" + unit * (30_000 // len(unit)) + "end\n" for unit in RUNS.values())
    text.write_text("".join(runs), encoding="utf-8", newline="")
    models = [with_vocabulary_keys(tiny_model(L=1), folder / f"{name}.gguf", {"pre": name}) for name in names]
    command = [sys.executable, "-c", PROGRAM, str(text), *map(str, models)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "all of them\n"), done.stderr


def test_long_runs_of_any_kind_are_tokenised(tiny_model, tmp_path):
    check_long_runs(tiny_model, tmp_path, ["tekken", "exaone-moe"])


@pytest.mark.slow
def test_long_runs_of_any_kind_are_tokenised_whatever_the_pre_tokenizer(tiny_model, tmp_path):
    check_long_runs(tiny_model, tmp_path, [*PRE_TOKENIZERS, *itertools.chain(*PRE_TOKENIZERS.values())])


@pytest.mark.parametrize("pre", ["tekken", "gpt-2"])
@pytest.mark.parametrize("continued", [False, True])
def test_a_text_that_is_tokenised_in_parts_has_the_tokens_of_the_whole(merging, monkeypatch, pre, continued):
    text = " ".join("the sand, and the sea" for _ in range(20))
    whole = merging(pre).encode(text, continued=continued).tolist()
    lengths = []
    encode_part = Tokenizer._encode_part
    monkeypatch.setattr(tokenizers, "_MAX_CHARS", 50)
    monkeypatch.setattr(
        Tokenizer,
        "_encode_part",
        lambda self, text, *rest: (lengths.append(len(text)), encode_part(self, text, *rest))[1],
    )
    assert merging(pre).encode(text, continued=continued).tolist() == whole
    assert len(lengths) > 5 and max(lengths) <= 50


def test_sentencepiece_in_parts_has_the_tokens_of_the_whole(tiny_model, monkeypatch):
    tokenizer = Tokenizer.from_gguf(tiny_model(tokenizer="spm"))
    text = " ".join("the sand, and the sea" for _ in range(20))
    whole, going_on = (tokenizer.encode(text, continued=continued).tolist() for continued in (False, True))
    monkeypatch.setattr(tokenizers, "_MAX_CHARS", 50)
    assert tokenizer.encode(text).tolist() == whole
    assert tokenizer.encode(text, continued=True).tolist() == going_on != whole


def test_long_numbers_are_cut_where_superbpe_groups_their_digits(merging, monkeypatch):
    monkeypatch.setattr(cutting, "_LONG_NUMBER", re.compile("[0-9]{7,}"))
    monkeypatch.setattr(cutting, "_DIGITS", 6)
    tokenizer = merging("superbpe")
    for n_digits in range(1, 30):
        text = f"a B{'1' * n_digits}.a {'1' * 3} 1"
        parts = list(cut_numbers(text))
        assert "".join(parts) == text
        assert joined(tokenizer, parts) == tokenizer._encode([text], False)[0].tolist()
        assert (len(parts) > 1) == (n_digits > 6)
