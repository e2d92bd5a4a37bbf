"""From text files to batches: nothing lost or doubled, documents keep their bounds, faults name the line."""

import os
import pydoc_data.topics
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from texts import ByteTokenizer, loader_of, tokens_of, write_jsonl

from ggml_diffusion.errors import UserError
from ggml_diffusion.text import files
from ggml_diffusion.text.files import Position, documents
from ggml_diffusion.text.loader import TextDataLoader, TokenBatch
from ggml_diffusion.text.sources import TextFile
from ggml_diffusion.text.tokenizer import Tokenizer


class EndlessTokenizer(ByteTokenizer):
    eos_id = None


def rows_of(batch: TokenBatch) -> list[tuple[int, ...]]:
    return [tuple(row[:length].tolist()) for row, length in zip(batch.tokens, batch.lengths, strict=True)]


@pytest.fixture
def corpus(tmp_path) -> Path:
    """31 documents of 0 to 30 letters."""
    return write_jsonl(tmp_path / "corpus.jsonl", *("abcdefghijklmnopqrstuvwxyzäöü"[:n] for n in range(31)))


def test_documents_are_laid_end_to_end_each_with_an_end_of_text(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", "hello", "wörld!", "x")
    loader = loader_of(path, T=4)
    stream = tokens_of("hello", "wörld!", "x")
    assert [token for sequence in loader.sequences for token in sequence] == stream
    assert [len(sequence) for sequence in loader.sequences] == [4, 4, 4, 4]
    assert loader.n_tokens == len(stream) == 16
    assert loader.n_documents == 3


def test_a_vocabulary_without_an_end_of_text_adds_none(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", "ab", "cd")
    loader = TextDataLoader(path, EndlessTokenizer(), 2, 1)
    assert [list(sequence) for sequence in loader.sequences] == [[98, 99], [100, 101]]
    assert [batch.document_ids.tolist() for batch in loader] == [[[0, 0]], [[0, 0]]]


def test_each_document_begins_with_the_token_that_the_base_wants(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_BLOCK_CHARS", 4)

    class Starting(ByteTokenizer):
        start_id = 500

    path = write_jsonl(tmp_path / "a.jsonl", "one\ntwo\nsix", "", "x")
    loader = TextDataLoader(path, Starting(), 64, 1)
    one, x = tokens_of("one\ntwo\nsix"), tokens_of("x")
    assert loader.sequences[0].tolist() == [500, *one, 500, *x]
    assert (loader.n_documents, loader.n_skipped) == (3, 1)
    assert loader.batch_at(0).document_ids[0, : len(one) + 2].tolist() == [0] * (len(one) + 1) + [1]


@pytest.mark.parametrize("kind", ["bpe", "spm"])
def test_blocks_of_either_vocabulary_have_the_tokens_of_the_whole_text(
    tiny_model, tmp_path, monkeypatch, kind
):
    text = "".join(f"the sand {n}\nand the sea\n" for n in range(100))
    (tmp_path / "a.txt").write_text(text)
    tokenizer = Tokenizer.from_gguf(tiny_model(tokenizer=kind))
    monkeypatch.setattr(files, "_BLOCK_CHARS", 60)
    loader = TextDataLoader(tmp_path / "a.txt", tokenizer, 1 << 14, 1)
    assert loader.sequences[0].tolist() == [*tokenizer.encode(text).tolist(), tokenizer.eos_id]


def test_documents_are_numbered_from_0_in_each_sequence(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", "abcdefghij", "k", "lm")  # 10 + 1, 1 + 1, 2 + 1 tokens: 16
    loader = loader_of(path, T=8, B=8)
    (batch,) = loader
    by_first_token = {row[0]: ids.tolist() for row, ids in zip(batch.tokens, batch.document_ids, strict=True)}
    assert by_first_token == {ord("a") + 1: [0] * 8, ord("i") + 1: [0, 0, 0, 1, 1, 2, 2, 2]}


def test_a_document_that_ends_with_its_sequence_starts_the_next_one_anew(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", "abc", "def")
    (batch,) = loader_of(path, T=4)
    assert (batch.document_ids == 0).all()


def test_the_last_sequence_is_padded_and_says_so(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", "abcdefghij")  # 11 tokens
    (batch,) = loader_of(path, T=4, B=8)
    assert sorted(batch.lengths.tolist()) == [3, 4, 4]
    assert batch.tokens.shape == batch.document_ids.shape == (3, 4)
    assert batch.tokens.dtype == batch.lengths.dtype == batch.document_ids.dtype == np.int32
    short = int(batch.lengths.argmin())
    assert batch.tokens[short, :3].tolist() == tokens_of("ij")
    assert (batch.document_ids == 0).all()
    assert batch.tokens.min() >= 0


def test_a_last_sequence_of_one_token_is_left_out(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", "abcd")  # 5 tokens
    assert [len(sequence) for sequence in loader_of(path, T=4).sequences] == [4]


def test_every_sequence_comes_once_an_epoch(corpus):
    loader = loader_of(corpus, held_out_fraction=0.2)
    assert len(loader) == -(-len(loader.sequences) // 3)
    for _ in range(3):
        batches = list(loader)
        assert len(batches) == len(loader)
        assert all(len(batch) == 3 for batch in batches[:-1])
        seen = sorted(row for batch in batches for row in rows_of(batch))
        assert seen == sorted(tuple(sequence.tolist()) for sequence in loader.sequences)


def test_epochs_have_different_orders_and_seeds_too(corpus):
    loader = loader_of(corpus, seed=1)
    epochs = [[row for batch in loader for row in rows_of(batch)] for _ in range(2)]
    other_seed = [row for batch in loader_of(corpus, seed=2) for row in rows_of(batch)]
    assert epochs[0] != epochs[1]
    assert epochs[0] != other_seed


def test_the_same_seed_gives_the_same_batches(corpus):
    for one, two in zip(loader_of(corpus, seed=5), loader_of(corpus, seed=5), strict=True):
        assert np.array_equal(one.tokens, two.tokens)
        assert np.array_equal(one.document_ids, two.document_ids)


def test_a_batch_can_be_found_by_its_number_in_the_endless_stream(corpus):
    loader = loader_of(corpus)
    stream = [batch for _ in range(3) for batch in loader]
    fresh = loader_of(corpus)
    for index in (len(stream) - 1, 0, len(loader), 1, len(loader) - 1):
        assert np.array_equal(fresh.batch_at(index).tokens, stream[index].tokens)
    assert fresh.epoch == 0  # random access leaves the passes alone
    assert len(fresh.batch_at(1_000_003).tokens) <= 3


def test_training_and_held_out_sequences_share_none_and_leave_none(corpus):
    train = loader_of(corpus, held_out_fraction=0.25)
    held_out, everything = train.with_split("held_out"), train.with_split("all", batch_size=1000)
    assert (len(everything), len(everything.batch_at(0)), train.batch_size) == (1, everything.n_sequences, 3)
    rows = {
        name: sorted(tuple(sequence.tolist()) for sequence in loader.sequences)
        for name, loader in (("train", train), ("held_out", held_out), ("all", everything))
    }
    assert sorted(rows["train"] + rows["held_out"]) == rows["all"]
    assert len(rows["held_out"]) == round(0.25 * len(rows["all"]))
    assert train.n_tokens + held_out.n_tokens == everything.n_tokens


def test_the_split_is_the_same_whatever_the_seed_and_however_it_is_asked_for(corpus):
    one = loader_of(corpus, seed=1, held_out_fraction=0.25).with_split("held_out")
    two = loader_of(corpus, seed=2, held_out_fraction=0.25, split="held_out")
    assert [list(s) for s in one.sequences] == [list(s) for s in two.sequences]


def test_held_out_sequences_lie_all_over_the_text(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", *(f"{n:07d}" for n in range(40)))  # each one sequence
    loader = loader_of(path, held_out_fraction=0.3)
    held_out = loader.with_split("held_out").sequences
    rows = [int("".join(chr(token - 1) for token in sequence[:7])) for sequence in held_out]
    assert len(rows) == 12 and rows == sorted(rows)
    assert np.diff(rows).max() > 1 and rows[0] < 10 and rows[-1] >= 30


def test_something_is_held_out_of_a_small_text_but_never_all_of_it(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", "abcdefghijk")  # 12 tokens
    loader = loader_of(path, T=6, held_out_fraction=0.01)
    assert len(loader.sequences) == len(loader.with_split("held_out").sequences) == 1
    assert len(loader_of(path, T=6, held_out_fraction=0.99).sequences) == 1
    assert len(loader_of(path, T=12, held_out_fraction=0.99).sequences) == 1


def test_without_a_held_out_share_all_is_trained_on(corpus):
    assert len(loader_of(corpus).sequences) == len(loader_of(corpus, split="all").sequences)


def test_sequences_can_be_sliced_and_counted_from_the_end(corpus):
    sequences = loader_of(corpus).sequences
    assert [list(one) for one in sequences[1:3]] == [list(sequences[1]), list(sequences[2])]
    assert list(sequences[-1]) == list(sequences[len(sequences) - 1])
    with pytest.raises(IndexError):
        sequences[len(sequences)]


def test_tokens_are_counted_as_they_come_in_the_split(corpus):
    loader = loader_of(corpus, held_out_fraction=0.3)
    expected = np.bincount(np.concatenate(list(loader.sequences)), minlength=300)
    assert loader.token_counts(300).tolist() == expected.tolist()


def test_empty_documents_are_skipped_and_counted(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", "", "abc", "", "d")
    loader = loader_of(path)
    assert (loader.n_documents, loader.n_skipped) == (4, 2)
    assert loader.sequences[0].tolist() == tokens_of("abc", "d")


def test_the_fingerprint_depends_on_the_text_and_its_bounds_and_on_nothing_else(tmp_path):
    def fingerprint(*texts: str, **options) -> str:
        return loader_of(write_jsonl(tmp_path / "a.jsonl", *texts), **options).fingerprint

    one = fingerprint("abcd", "efgh")
    assert len(one) == 64
    assert one == fingerprint("abcd", "efgh", T=4, B=1, seed=9, held_out_fraction=0.4)
    assert len({one, fingerprint("abcd", "efgi"), fingerprint("abcd"), fingerprint("efgh", "abcd")}) == 4
    no_ends = [
        TextDataLoader(write_jsonl(tmp_path / "a.jsonl", *texts), EndlessTokenizer(), 2, 1).fingerprint
        for texts in (("abcd", "ef"), ("ab", "cdef"))
    ]
    assert no_ends[0] != no_ends[1]


def test_a_text_file_is_one_document_and_a_folder_is_read_in_the_order_of_names(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "b.txt").write_bytes(b"two\nlines\r\n")
    (tmp_path / "a.TXT").write_bytes(b"\xef\xbb\xbfone")
    write_jsonl(tmp_path / "sub" / "c.jsonl", "three", "four")
    (tmp_path / "notes.html").write_text("not read")
    loader = loader_of(tmp_path, T=4)
    expected = tokens_of("one", "two\nlines\n", "three", "four")
    assert [token for sequence in loader.sequences for token in sequence] == expected
    assert loader.n_documents == 4


def test_several_paths_are_read_in_the_given_order(tmp_path):
    paths = [tmp_path / "b.txt", tmp_path / "a.txt"]
    for path in paths:
        path.write_text(path.stem * 3)
    assert loader_of(paths).sequences[0].tolist() == tokens_of("bbb", "aaa")
    assert loader_of([str(path) for path in paths]).fingerprint == loader_of(paths).fingerprint


def test_json_lines_may_have_other_keys_and_empty_lines_and_no_line_feed_at_the_end(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": 1, "text": "ab"}\n\n   \n{"text": "c\\u00e9", "x": NaN}')
    assert loader_of(path).sequences[0].tolist() == tokens_of("ab", "cé")


def test_a_long_document_is_tokenised_in_blocks_and_stays_one_document(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_BLOCK_CHARS", 50)
    blocks: list[str] = []
    continued: list[object] = []

    class Recorder(ByteTokenizer):
        def encode(self, text: str, **options: object) -> np.ndarray:
            blocks.append(text)
            continued.append(options["continued"])
            return super().encode(text)

    text = "".join(f"line {n}\n" + ("\n    indented\n" if n % 3 == 0 else "") for n in range(100))
    (tmp_path / "a.txt").write_text(text)
    loader = TextDataLoader(tmp_path / "a.txt", Recorder(), 8, 1)
    assert "".join(blocks) == text
    assert len(blocks) > 10
    assert continued == [False] + [True] * (len(blocks) - 1)
    assert max(len(block) for block in blocks) <= 50
    assert [token for sequence in loader.sequences for token in sequence] == tokens_of(text)
    assert loader.n_documents == 1
    # The same for the text of a JSON line.
    by_line = TextDataLoader(write_jsonl(tmp_path / "b.jsonl", text), ByteTokenizer(), 8, 1)
    assert by_line.fingerprint == loader.fingerprint


def test_text_that_is_all_indented_is_cut_into_blocks_too(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_BLOCK_CHARS", 10)
    (tmp_path / "a.txt").write_text(" abcde\n" * 100)
    file = TextFile(tmp_path / "a.txt", "text")
    (blocks,) = documents([file], Position())
    assert max(len(block) for block in blocks) <= 10


def test_blocks_have_the_tokens_of_the_whole_text(smollm2_path, tmp_path, monkeypatch):
    text = "\n\n".join(pydoc_data.topics.topics.values())
    (tmp_path / "topics.txt").write_text(text, encoding="utf-8")
    tokenizer = Tokenizer.from_gguf(smollm2_path)
    whole = [*tokenizer.encode(text).tolist(), tokenizer.eos_id]
    monkeypatch.setattr(files, "_BLOCK_CHARS", 20_000)
    loader = TextDataLoader(tmp_path / "topics.txt", tokenizer, 128, 8)
    stream = np.concatenate(loader.sequences).tolist()
    assert stream == whole[: len(stream)]
    assert len(whole) - len(stream) <= 1
    assert len(whole) > 100_000


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.txt", b"fine\nb\xffd\n", "a.txt, line 2: not UTF-8 text at byte 2"),
        ("a.jsonl", b'{"text": "x"}\n{"text": "\xc3"}\n', "a.jsonl, line 2: not UTF-8"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": \n', "a.jsonl, line 3: not valid JSON: Expecting value"),
        ("a.jsonl", b'{"text": "x"} {}\n', "a.jsonl, line 1: not valid JSON: Extra data"),
        ("a.jsonl", b"[" * 100_000 + b"\n", "a.jsonl, line 1: not valid JSON: .*recursion"),
        ("a.jsonl", b'{"text": ' + b"9" * 5000 + b"}\n", "a.jsonl, line 1: not valid JSON: .*digits"),
        ("a.jsonl", b'{"txt": "x"}\n', 'a.jsonl, line 1: not an object with a string "text"'),
        ("a.jsonl", b'{"text": 3}\n', 'a.jsonl, line 1: not an object with a string "text"'),
        ("a.jsonl", b'["text"]\n', 'a.jsonl, line 1: not an object with a string "text"'),
        ("a.jsonl", b'{"text": "ok"}\n{"text": "\\ud83d"}\n', "a.jsonl, line 2: .*surrogate"),
        ("a.txt", b"", "a.txt: no text to train on: 1 documents, 1 of them empty"),
        ("a.jsonl", b"\n", "a.jsonl: no text to train on: 0 documents"),
        ("a.jsonl", b'{"text": ""}\n', "a.jsonl: no text to train on: 1 documents, 1 of them empty"),
        ("a.txt", b"\xff\xfea\0", "a.txt, line 1: UTF-16, not UTF-8 text: save it as UTF-8"),
        ("a.txt", b"one\ntwo\n\xe2\x82", "a.txt, line 3: not UTF-8 text at byte 1"),
        ("a.gguf", b"GGUF\xff", "a.gguf, line 1: not UTF-8 text at byte 5"),
    ],
)  # fmt: skip
def test_faults_name_the_file_and_the_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as refusal:
        loader_of(tmp_path / name)
    assert "\n" not in str(refusal.value)
    assert str(refusal.value).startswith(str(tmp_path))


def test_a_record_that_is_too_long_is_passed_over_without_being_held(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MAX_LINE_BYTES", 2 << 20)
    with open(tmp_path / "a.jsonl", "wb") as file:
        file.write(b'{"text": "short"}\n' * 20)
        file.seek(60 << 20, os.SEEK_CUR)  # a hole, which takes no room on the disk
        file.write(b'\n{"text": "last"}\n')
    tracemalloc.start()
    loader = loader_of(tmp_path / "a.jsonl")
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert loader.refusals == [f"{tmp_path / 'a.jsonl'}, line 21: longer than 2 MB"]
    assert loader.n_documents == 21
    assert peak_bytes < 20 << 20


def test_a_text_of_one_long_line_is_read_in_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "_BLOCK_CHARS", 100)
    monkeypatch.setattr(files, "_READ_BYTES", 64)
    text = "wörter and words " * 100
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    assert loader_of(tmp_path / "a.txt", T=4000).sequences[0].tolist() == tokens_of(text)


def test_paths_that_lead_nowhere_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"missing\.txt: no such file or folder"):
        loader_of(tmp_path / "missing.txt")
    with pytest.raises(UserError, match=r"the folder holds no text: none of \.txt, \.md, "):
        loader_of(tmp_path)
    with pytest.raises(UserError, match="no data: no text to train on"):
        loader_of([])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read anything")
def test_a_file_that_may_not_be_read_is_refused(tmp_path):
    (tmp_path / "a.txt").write_text("abc")
    (tmp_path / "a.txt").chmod(0)
    with pytest.raises(UserError, match=r"a\.txt: cannot be read: Permission denied"):
        loader_of(tmp_path / "a.txt")


def test_text_that_is_too_short_for_a_split_is_refused(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", "abc")
    loader = loader_of(path, T=8, held_out_fraction=0.5)
    with pytest.raises(
        UserError, match="1 sequences of 8 tokens, none of which is left for the split 'held_out'"
    ):
        loader.with_split("held_out")


@pytest.mark.parametrize("T, B", [(1, 1), (0, 1), (8, 0)])
def test_sizes_that_make_no_batch_are_refused(tmp_path, T, B):
    path = write_jsonl(tmp_path / "a.jsonl", "abcdefgh")
    with pytest.raises(UserError, match="sequence_length must be at least 2 and batch_size at least 1"):
        loader_of(path, T=T, B=B)
