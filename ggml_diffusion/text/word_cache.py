"""Plain text to tokens, each word of it once: the tokens that llama.cpp gives, several times as fast.

llama.cpp cuts a text into words before it merges bytes to tokens, so no token reaches from one word into the
next; with SentencePiece, which cuts nothing, the vocabulary shows whether one could. So a word has the same
tokens wherever it stands, and most of a text is words that came before. Text is cut behind printable ASCII,
in front of a blank with an ASCII letter, or of such a letter at the beginning of the next line: there all
pre-tokenizers in `_CUT_THERE` begin a new word. What could have other tokens when it is cut goes to llama.cpp
as a whole.

Deliberately not here: what llama.cpp does with a word (tokenizer.py).
Sources: llama.cpp, src/llama-vocab.cpp (regular expressions of the pre-tokenizers, text around added tokens)
and src/unicode.cpp.
"""

import re
from collections.abc import Collection, Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from ggml_diffusion.text.tokenizer import Tokenizer

_SPM_BLANK = "\u2581"
# Where words begin: with a blank in front of a letter, or with a letter at the beginning of a line.
_CUTS = re.compile(r"(?<=[!-~])(?= [A-Za-z])|(?<=[!-~]\n)(?=[A-Za-z])")
_FOLLOWED = re.compile(r"[!-~]\n?\Z")  # a word that another one may follow
_LINE, _BEGIN = " x\n", "x"  # for the second kind: what may stand in front of a word, and behind it
# A name in which a text could be cut, whatever follows it.
_CUT_INSIDE = re.compile(r"[!-~] (?:[A-Za-z]|\Z)|(?:\A|[!-~])\n[A-Za-z]")
# A token of SentencePiece's across a cut.
_ACROSS = re.compile(f"[!-~]{_SPM_BLANK}|\n[A-Za-z]")
_MAX_CHARS = 64  # of a word that is remembered
_MAX_WORDS, _MAX_HEADS = 1 << 18, 1 << 14  # some 50 MB; then words are learnt anew
_MAX_NAMES = 256
_LEARNT_CHARS = 1 << 16  # of words that are encoded as one text

# Values of tokenizer.ggml.pre whose expressions end a word in front of such a blank: they take letters, or
# digits, or other characters that are no blanks, in a run; what follows is one blank and the letters behind.
_CUT_THERE = frozenset({
    # GPT-2's expression, as it is or behind others that cut the text further
    "", "default", "gpt-2", "phi-2", "jina-es", "jina-de", "jina-v2-es", "jina-v2-de", "jina-v1-en",
    "jina-v2-code", "roberta-bpe", "gigachat", "a.x-4.0", "mellum", "mellum2", "modern-bert", "exaone",
    "exaone4", "mpt", "olmo", "jais", "trillion", "granite-docling", "starcoder", "refact", "command-r",
    "smollm", "codeshell", "minerva-7b", "falcon",
    # Llama 3's
    "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "jina-v5-nano",
    "dbrx", "smaug-bpe", "chatglm-bpe", "glm4",
    # Qwen 2's
    "qwen2", "stablelm2", "deepseek-r1-qwen", "kormo", "f2llmv2", "megrez", "hunyuan", "solar-open", "grok-2",
    # with capitals apart
    "tekken", "gpt-4o", "llama4", "kanana2", "talkie",
})  # fmt: skip


class WordCache:
    """Encodes plain text as its tokenizer does, and remembers words.

    Attributes:
        cuts: whether text is cut into words at all.

    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        # Tokens as the bytes of int32: of words, and of what stands in front of a text's first one.
        self._words: dict[str, bytes] = {}
        self._heads: dict[tuple[str, bool], bytes] = {}
        self.cuts = _is_cut(tokenizer)
        names = sorted(set(_names_to_keep_whole(tokenizer))) if self.cuts else []
        self.cuts &= len(names) <= _MAX_NAMES  # each is looked for in every text
        self._kept_whole = re.compile("|".join(map(re.escape, names))) if names else None

    def encode(self, text: str, *, continued: bool = False) -> NDArray[np.int32]:
        """The tokens (n,) of a text; see `Tokenizer.encode`."""
        return self.encode_each([(text, continued)])[0]

    def encode_each(self, texts: Sequence[tuple[str, bool]]) -> list[NDArray[np.int32]]:
        """The tokens (n,) of each text, and whether it is continued: in few requests for many short ones."""
        cut = [self._cut(text) for text, _ in texts]
        heads = self._heads_of([(parts[0], goes_on) for parts, (_, goes_on) in zip(cut, texts, strict=True)])
        words = {word for parts in cut for word in parts[1:]}
        new = words.difference(self._words)
        if len(self._words) + len(new) > _MAX_WORDS:
            self._words.clear()
            new = words
        self._learn_all(new)
        found = [
            np.frombuffer(b"".join([head, *map(self._words.__getitem__, parts[1:])]), dtype=np.int32)
            for head, parts in zip(heads, cut, strict=True)
        ]
        for word in new:
            if len(word) > _MAX_CHARS:  # hardly comes again
                del self._words[word]
        return found

    def _cut(self, text: str) -> list[str]:
        """What stands in front of a text's first word, and its words; or all of it, where it is not cut."""
        if not self.cuts or (self._kept_whole is not None and self._kept_whole.search(text)):
            return [text]
        return _CUTS.split(text)

    def _heads_of(self, heads: Sequence[tuple[str, bool]]) -> list[bytes]:
        """The tokens of texts that nothing stands in front of, or text that they continue."""
        found = {head: self._heads[head] for head in heads if head in self._heads}
        for continued in (False, True):
            new = list({head for head in heads if head[1] == continued} - found.keys())
            encoded = self._tokenizer.encode_each([text for text, _ in new], continued=continued)
            found.update(zip(new, (tokens.tobytes() for tokens in encoded), strict=True))
        for head, tokens in found.items():
            if len(head[0]) <= _MAX_CHARS and len(self._heads) < _MAX_HEADS:
                self._heads[head] = tokens
        return [found[head] for head in heads]

    def _learn_all(self, words: Collection[str]) -> None:
        """Encode words in few requests, since each of them takes its time."""
        followed: list[str] = []
        n_chars = 0
        for word in words:
            if _FOLLOWED.search(word):
                followed.append(word)
                n_chars += len(word)
            if n_chars > _LEARNT_CHARS:
                self._learn(followed)
                followed, n_chars = [], 0
        self._learn(followed)
        # The last one of a text may end otherwise, and is no text with others.
        last = [word for word in words if not _FOLLOWED.search(word)]
        laid_out = [list(_laid_out(word)) for word in last]
        encoded = self._tokenizer.encode_each(["".join(parts) for parts in laid_out], continued=True)
        for word, parts, tokens in zip(last, laid_out, encoded, strict=True):
            if not self._take_apart(parts, tokens):
                self._words[word] = self._tokenizer.encode(word, continued=True).tobytes()

    def _take_apart(self, laid_out: list[str], tokens: NDArray[np.int32]) -> bool:
        """Remember each word's part of the tokens of all, if it is clear which that is."""
        ends = _ends_of_words(laid_out, self._tokenizer.sizes[tokens])
        if ends is None:
            return False
        data = tokens.tobytes()
        for word, start, end in zip(laid_out, [0, *ends[:-1]], ends, strict=True):
            self._words[word] = data[4 * start : 4 * end]
        return True

    def _learn(self, words: list[str]) -> None:
        """Encode words that may follow each other as one text."""
        if not words:
            return
        laid_out = [part for word in words for part in _laid_out(word)]
        if self._take_apart(laid_out, self._tokenizer.encode("".join(laid_out), continued=True)):
            return
        if len(words) == 1:
            self._words[words[0]] = self._tokenizer.encode(words[0], continued=True).tobytes()
        else:
            self._learn(words[: len(words) // 2])
            self._learn(words[len(words) // 2 :])


def _laid_out(word: str) -> Iterator[str]:
    """A word between others that may stand there."""
    if word[0] != " ":
        yield _LINE
    yield word
    if word[-1] == "\n":
        yield _BEGIN


def _ends_of_words(words: list[str], sizes: NDArray[np.int64]) -> list[int] | None:
    """How many tokens come up to the end of each word, given the bytes of text that each token stands for.

    None if that is not clear: a token stands for no text, or a character is none of the vocabulary's.
    """
    token_ends = np.cumsum(sizes)
    word_ends = np.cumsum([len(word.encode()) for word in words])
    if not sizes.all() or len(sizes) == 0 or token_ends[-1] != word_ends[-1]:
        return None
    last = np.searchsorted(token_ends, word_ends)
    return (last + 1).tolist() if np.array_equal(token_ends[last], word_ends) else None


def _is_cut(tokenizer: Tokenizer) -> bool:
    """Whether no token of this vocabulary reaches across the blank between two words."""
    if tokenizer.kind == "llama":
        return not any(_ACROSS.search(token) for token in tokenizer.vocabulary)
    return tokenizer.kind == "gpt2" and tokenizer.pre in _CUT_THERE


def _names_to_keep_whole(tokenizer: Tokenizer) -> Iterator[str]:
    """The added tokens with one of which a text is not cut.

    llama.cpp finds them in the text first, wherever they stand. They matter where a text could be cut inside
    them; where they take blanks beside them away; and where SentencePiece writes a blank of its own behind
    them, so that what follows is no text that goes on.
    """
    for token in tokenizer.added_tokens:
        for name in {tokenizer.vocabulary[token], tokenizer.vocabulary[token].replace(_SPM_BLANK, " ")}:
            goes_on = tokenizer.writes_blanks and re.search(r"[!-~]\Z", name)
            if name and (_CUT_INSIDE.search(name) or goes_on or tokenizer.strips(token)):
                yield name
