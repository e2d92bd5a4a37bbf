"""Where text comes from: files of every kind, folders, standard input, records of Python, given splits."""

import gzip
import io
import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
from texts import ByteTokenizer, loader_of, tokens_of, write_jsonl

from ggml_diffusion.errors import UserError
from ggml_diffusion.text import files as files_module
from ggml_diffusion.text.kept_tokens import Reading
from ggml_diffusion.text.loader import TextDataLoader
from ggml_diffusion.text.sources import Records, find_sources


def tokens_in(data, T: int = 1 << 12, **options) -> list[int]:
    """All tokens that data give, in order."""
    loader = TextDataLoader(data, ByteTokenizer(), T, 1, split="all", **options)
    return [token for sequence in loader.sequences for token in sequence]


def names_in(folder: Path, include=()) -> list[str]:
    return [file.path.relative_to(folder).as_posix() for file in find_sources(folder, include).files]


def make_files(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"text of {name}\n")
    return folder


# -- kinds of files --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["README", "notes.md", "page.rst", "code.py", "table.csv", "A.TXT", ".hidden"]
)
def test_any_file_of_text_can_be_named(tmp_path, name):
    make_files(tmp_path, name)
    assert tokens_in(tmp_path / name) == tokens_of(f"text of {name}\n")


@pytest.mark.parametrize("name", ["a.txt.gz", "a.md.GZ", "readme.gz"])
def test_text_is_unpacked(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress("größe\r\nzwei\n".encode()))
    assert tokens_in(tmp_path / name) == tokens_of("größe\nzwei\n")


def test_json_lines_are_unpacked(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", "one", "two")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress((tmp_path / "a.jsonl").read_bytes()))
    assert tokens_in(tmp_path / "a.jsonl.gz") == tokens_of("one", "two")


@pytest.mark.parametrize("name, data", [("a.txt.gz", b"no gzip"), ("a.jsonl.gz", None), ("b.txt.gz", None)])
def test_what_cannot_be_unpacked_is_one_line(tmp_path, name, data):
    whole = gzip.compress(b'{"text": "one"}\n' * 10_000)
    (tmp_path / name).write_bytes(data or whole[: len(whole) // 2])
    with pytest.raises(UserError, match=f"{name}: cannot be unpacked"):
        tokens_in(tmp_path / name)


def write_parquet(path: Path, rows: list[dict]) -> Path:
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def test_rows_of_parquet_are_documents(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [{"id": n, "text": f"row {n}"} for n in range(600)])
    assert tokens_in(path) == tokens_of(*(f"row {n}" for n in range(600)))


def test_rows_of_parquet_are_examples(tmp_path):
    path = write_parquet(tmp_path / "a.parquet", [{"prompt": "ab", "completion": "cd"}] * 3)
    loader = loader_of(path, T=16)
    assert loader.n_examples == 3 and loader.sequences[0].tolist() == tokens_of("abcd")


def test_messages_of_parquet_have_no_keys_of_other_messages(tmp_path):
    """Parquet gives every message the keys of all: those that are null go, but for the content."""
    rows = [
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "calls": "f"}]}
    ]
    source = find_sources(write_parquet(tmp_path / "a.parquet", rows))
    (record,) = files_module.documents(source.files, files_module.Position())
    assert record.value["messages"] == [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": None, "calls": "f"},
    ]


def test_rows_of_parquet_that_cannot_be_used_are_named(tmp_path):
    rows = [{"text": f"row {n}"} for n in range(20)] + [{"text": None}]
    loader = loader_of(write_parquet(tmp_path / "a.parquet", rows))
    assert loader.n_refused == 1 and loader.refusals[0].startswith(
        f"{tmp_path / 'a.parquet'}, row 21: not an "
    )


def test_a_damaged_parquet_file_and_a_missing_library_are_one_line(tmp_path, monkeypatch):
    pytest.importorskip("pyarrow")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    with pytest.raises(UserError, match=r"a\.parquet: cannot be read as parquet: "):
        tokens_in(tmp_path / "a.parquet")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(
        UserError, match=r"a\.parquet: parquet needs pyarrow: pip install 'ggml-diffusion\[data\]'"
    ):
        tokens_in(tmp_path / "a.parquet")


@pytest.mark.parametrize("read_bytes", [1, 2, 3, 7])
def test_ends_of_lines_and_characters_may_lie_anywhere(tmp_path, monkeypatch, read_bytes):
    monkeypatch.setattr(files_module, "_READ_BYTES", read_bytes)
    (tmp_path / "a.txt").write_bytes("\ufeffä\r\n\r\r\n漢\rz\r".encode())
    assert tokens_in(tmp_path / "a.txt") == tokens_of("ä\n\r\n漢\rz\r")
    (tmp_path / "b.txt").write_bytes(b"one\n\xc3\xa4\ntwo \xff")
    with pytest.raises(UserError, match="line 3: not UTF-8 text at byte 5"):
        tokens_in(tmp_path / "b.txt")


# -- folders ---------------------------------------------------------------------------------------


def test_a_folder_is_searched_for_known_kinds_and_for_what_is_included(tmp_path):
    make_files(
        tmp_path, "b.txt", "a.md", "sub/c.rst", "x.py", "sub/y.py", "z.html", "sub/w.py.gz", "p.txt.gz"
    )
    write_jsonl(tmp_path / "d.jsonl", "x")
    known = ["a.md", "b.txt", "d.jsonl", "p.txt.gz", "sub/c.rst"]
    assert names_in(tmp_path) == known
    assert names_in(tmp_path, ["*.py"]) == sorted([*known, "sub/w.py.gz", "sub/y.py", "x.py"])
    assert names_in(tmp_path, ["sub/*.py", "*.html"]) == sorted([*known, "sub/w.py.gz", "sub/y.py", "z.html"])


def test_hidden_files_and_folders_are_passed_over(tmp_path):
    make_files(tmp_path, "a.txt", "._a.txt", ".git/b.txt", "sub/.c.jsonl")
    assert names_in(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("run", ["run", "."])
def test_what_a_conversion_has_written_is_passed_over(tmp_path, run):
    make_files(tmp_path, "a.txt")
    own = ("config.toml", "metrics.jsonl", "checkpoints/x.txt", "tokens/y.txt", "evaluation.json")
    make_files(tmp_path / run, *own)
    assert names_in(tmp_path) == ["a.txt"]
    make_files(tmp_path, "sub/config.toml", "sub/b.txt")  # a configuration alone makes no run
    assert names_in(tmp_path) == ["a.txt", "sub/b.txt"]


def test_links_to_folders_are_followed_once(tmp_path):
    make_files(tmp_path / "elsewhere", "a.txt", "deep/b.txt")
    data = make_files(tmp_path / "data", "real/c.txt")
    (data / "1").symlink_to(tmp_path / "elsewhere")
    (data / "2").symlink_to(tmp_path / "elsewhere")
    (data / "a loop").symlink_to(data)
    (data / "another name").symlink_to(data / "real")
    (data / "leads nowhere.txt").symlink_to(tmp_path / "missing.txt")
    (tmp_path / "elsewhere" / "back").symlink_to(data)
    assert names_in(data) == ["1/a.txt", "1/deep/b.txt", "real/c.txt"]


def test_a_pipe_is_refused_and_one_in_a_folder_passed_over(tmp_path):
    make_files(tmp_path, "a.txt")
    os.mkfifo(tmp_path / "pipe.txt")
    assert names_in(tmp_path) == ["a.txt"]
    with pytest.raises(UserError, match=r"pipe\.txt: a named pipe, not a file or folder"):
        tokens_in(tmp_path / "pipe.txt")


# -- a split of its own ----------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_train_and_valid_are_the_split(tmp_path, suffix):
    for name, texts in (("train", ["abcdefghi", "jk"]), ("valid", ["lmnop"]), ("test", ["never"])):
        write_jsonl(tmp_path / f"{name}.jsonl", *texts)
        if suffix == ".jsonl.gz":
            path = tmp_path / f"{name}.jsonl"
            (tmp_path / f"{name}.jsonl.gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    make_files(tmp_path, "README.md")
    train = loader_of(tmp_path, T=4, held_out_fraction=0.5)
    held_out = train.with_split("held_out")
    assert train.has_own_split and train.n_documents == 3
    assert [token for sequence in train.sequences for token in sequence] == tokens_of("abcdefghi", "jk")[:12]
    assert [token for sequence in held_out.sequences for token in sequence] == tokens_of("lmnop")
    everything = train.with_split("all", batch_size=99)
    assert [s.tolist() for s in everything.sequences] == [
        s.tolist() for s in (*train.sequences, *held_out.sequences)
    ]
    batch = everything.batch_at(0)
    assert sorted(batch.lengths.tolist()) == [2, 4, 4, 4, 4]
    assert (batch.document_ids[:, 0] == 0).all()
    write_jsonl(tmp_path / "valid.jsonl", "lmnoq")
    if suffix == ".jsonl":
        assert loader_of(tmp_path, T=4).fingerprint != train.fingerprint


def test_examples_of_a_split_of_its_own_keep_their_prompts(tmp_path):
    for name, completion in (("train", "cd"), ("valid", "efg")):
        record = {"prompt": "ab", "completion": completion}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(record) + "\n")
    loader = loader_of(tmp_path, T=8)
    for split, n_learned in (("train", 6), ("held_out", 6)):
        assert loader.with_split(split).batch_at(0).maskable.sum() == n_learned
    assert loader.with_split("held_out").sequences[0].tolist() == tokens_of("abefg")


def test_a_folder_with_train_alone_is_a_folder_like_any_other(tmp_path):
    write_jsonl(tmp_path / "train.jsonl", "abcdefgh" * 10)
    loader = loader_of(tmp_path, held_out_fraction=0.5)
    assert not loader.has_own_split and loader.with_split("held_out").n_sequences == 5


def test_tokens_of_both_halves_are_kept(tmp_path, tiny_model):
    from ggml_diffusion.text.tokenizer import Tokenizer

    (tmp_path / "data").mkdir()
    write_jsonl(tmp_path / "data" / "train.jsonl", "the sand and the sea " * 20)
    write_jsonl(tmp_path / "data" / "valid.jsonl", "the shore " * 20)
    tokenizer = Tokenizer.from_gguf(tiny_model())
    reading = Reading(tmp_path / "tokens", keep=True)
    loaders = []
    for _ in range(2):
        loader = TextDataLoader(tmp_path / "data", tokenizer, 16, 2, reading=reading)
        loader.keep_only_this_text()
        loaders.append(loader)
        assert len(list((tmp_path / "tokens").iterdir())) == 2
    assert loaders[0].fingerprint == loaders[1].fingerprint


# -- standard input and Python ---------------------------------------------------------------------


def with_input(monkeypatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


@pytest.mark.parametrize(
    "data, texts",
    [
        (b"a text\r\nof lines\n", ["a text\nof lines\n"]),
        (b'\n{"text": "one"}\n{"text": "two"}\n', ["one", "two"]),
        (b"[1, 2]\n", ["[1, 2]\n"]),
        (b"{no json}\n", ["{no json}\n"]),
    ],
)
def test_standard_input_is_a_text_or_json_lines(monkeypatch, data, texts):
    with_input(monkeypatch, data)
    assert tokens_in("-") == tokens_of(*texts)


def test_faults_of_standard_input_name_it(monkeypatch):
    with_input(monkeypatch, b"fine\n\xff")
    with pytest.raises(UserError, match=r"^standard input, line 2: not UTF-8"):
        tokens_in("-")
    with pytest.raises(UserError, match="can only be read once"):
        tokens_in(["-", "-"])
    with_input(monkeypatch, b"")
    with pytest.raises(UserError, match=r"^standard input: no text to train on"):
        tokens_in(["-"])


def test_strings_and_records_of_python_are_documents():
    assert tokens_in(Records(["one", "two"])) == tokens_of("one", "two")
    assert tokens_in(text for text in ("one", "two")) == tokens_of("one", "two")
    records = [{"text": "a", "id": object()}, {"prompt": "ab", "completion": "cd"}]
    assert tokens_in(records) == [*tokens_of("a"), *tokens_of("abcd")]
    assert tokens_in([np.str_("one"), {"text": "x"}]) == tokens_of("one", "x")


def test_a_set_of_rows_with_a_length_is_read_by_its_rows():
    """As a `datasets.Dataset` is."""

    class Rows:
        def __len__(self) -> int:
            return 3

        def __getitem__(self, n: int) -> dict[str, object]:
            if n >= 3:
                raise IndexError
            return {"text": f"row {n}", "embedding": np.zeros(3)}

    assert tokens_in(Rows()) == tokens_of("row 0", "row 1", "row 2")


def test_faults_of_records_name_their_number(tmp_path):
    good = [{"text": "abcdefgh"}] * 30
    loader = loader_of([*good, {"text": 3}, None, *good])
    assert loader.n_documents == 60 and loader.n_refused == 2
    assert [refusal.partition(":")[0] for refusal in loader.refusals] == [
        "the records, number 31",
        "the records, number 32",
    ]


def test_records_longer_than_a_line_may_be_are_read(monkeypatch):
    monkeypatch.setattr(files_module, "MAX_LINE_BYTES", 100)
    assert tokens_in(Records(["a" * 200])) == tokens_of("a" * 200)


def test_what_was_kept_goes_when_it_is_not_used_any_more(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    tokens_in(Records(["one", "two"]))
    assert list(tmp_path.iterdir()) == []


# -- documents that cannot be used -----------------------------------------------------------------


def write_mixed(path: Path, n_good: int, n_bad: int) -> Path:
    lines = ['{"text": "abcdefgh"}'] * n_good + ['{"txt": 1}'] * n_bad
    path.write_text("\n".join(lines) + "\n")
    return path


def test_up_to_a_tenth_are_left_out_counted_and_named(tmp_path):
    loader = loader_of(write_mixed(tmp_path / "a.jsonl", 90, 10))
    assert (loader.n_documents, loader.n_refused, len(loader.refusals)) == (90, 10, 5)
    assert loader.refusals[0].startswith(f"{tmp_path / 'a.jsonl'}, line 91: not an object with")
    with pytest.raises(UserError, match=r"line 91: .* \(11 of 101 documents cannot be used\)"):
        loader_of(write_mixed(tmp_path / "a.jsonl", 90, 11))


def test_a_strict_reading_stops_at_the_first(tmp_path):
    with pytest.raises(UserError, match=r"line 100: not an object .*\"messages\"$"):
        loader_of(write_mixed(tmp_path / "a.jsonl", 99, 1), reading=Reading(strict=True))


def test_a_text_file_that_is_no_text_is_left_out_as_a_whole(tmp_path):
    make_files(tmp_path, *(f"{n:02}.txt" for n in range(20)))
    (tmp_path / "10.txt").write_bytes(b"good\n" * 1000 + b"\xff")
    loader = loader_of(tmp_path)
    assert loader.n_documents == 19
    assert loader.refusals == [f"{tmp_path / '10.txt'}, line 1001: not UTF-8 text at byte 1"]


def test_kept_tokens_remember_what_was_left_out(tmp_path, tiny_model):
    from ggml_diffusion.text.tokenizer import Tokenizer

    path = write_mixed(tmp_path / "a.jsonl", 99, 1)
    tokenizer = Tokenizer.from_gguf(tiny_model())
    for _ in range(2):
        loader = TextDataLoader(path, tokenizer, 8, 1, reading=Reading(tmp_path / "tokens", keep=True))
        assert loader.n_refused == 1 and "line 100" in loader.refusals[0]
    with pytest.raises(UserError, match="line 100"):
        TextDataLoader(path, tokenizer, 8, 1, reading=Reading(tmp_path / "tokens", keep=True, strict=True))


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.gz"])
def test_a_file_that_unpacks_to_what_no_text_does_is_refused_before_all_of_it_is_read(tmp_path, name):
    line = b'{"text": "' + b"a" * 100_000 + b'"}\n'
    (tmp_path / name).write_bytes(gzip.compress(line * 400, compresslevel=9))
    assert (tmp_path / name).stat().st_size < 1 << 18
    with pytest.raises(UserError, match="unpacks to more than 100 times its size"):
        tokens_in(tmp_path / name)
    sound = b"".join(b'{"text": "%d"}\n' % number for number in range(5_000))
    (tmp_path / name).write_bytes(gzip.compress(sound))
    assert len(tokens_in(tmp_path / name)) > 0
