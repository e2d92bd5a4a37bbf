"""Tokens are made once: found again, made anew if they are damaged or the text changed, never half there."""

import dataclasses
import errno
import hashlib
import json
import os
from pathlib import Path

import pytest
from texts import ByteTokenizer, write_jsonl

from ggml_diffusion.errors import UserError
from ggml_diffusion.text import kept_tokens, text_key, token_store, tokenising
from ggml_diffusion.text.kept_tokens import Reading
from ggml_diffusion.text.loader import TextDataLoader
from ggml_diffusion.text.token_store import FILES, MANIFEST
from ggml_diffusion.text.tokenizer import Tokenizer

LONG_AGO_S = 1_000_000_000


@pytest.fixture(scope="module")
def tokenizer(tiny_model) -> Tokenizer:
    return Tokenizer.from_gguf(tiny_model(L=1))


@pytest.fixture
def text(tmp_path) -> Path:
    """A folder with a long document, short ones and examples; no file was written just now."""
    folder = tmp_path / "text"
    folder.mkdir()
    (folder / "a.txt").write_text("the sand and the sea\n" * 300)
    write_jsonl(folder / "b.jsonl", *(f"document {n} in the sand" for n in range(60)), "")
    examples = [{"prompt": f"the sea {n}?", "completion": " the sand" * (n % 30 + 1)} for n in range(40)]
    (folder / "c.jsonl").write_text("".join(json.dumps(example) + "\n" for example in examples))
    return folder


@pytest.fixture(autouse=True)
def settled(monkeypatch):
    """Files that a test wrote just now are known by their stamps, as those of yesterday are."""
    monkeypatch.setattr(text_key, "_SETTLED_NS", -(10**12))


class Reader:
    """Opens a text with tokens kept in a folder, and notes what that took."""

    def __init__(self, tokenizer: Tokenizer, text: Path, folder: Path, **options):
        self.warnings: list[str] = []
        self.progress: list[tuple[int, int]] = []
        self.reading = Reading(
            folder, keep=True, warn=self.warnings.append,
            on_progress=lambda done, total: self.progress.append((done, total)),
        )  # fmt: skip
        self.arguments = (text, tokenizer, 24, 4)
        self.options = {"held_out_fraction": 0.2, **options}

    def open(self, **changes) -> TextDataLoader:
        self.warnings.clear()
        self.progress.clear()
        reading = dataclasses.replace(self.reading, **changes)
        return TextDataLoader(*self.arguments, **self.options, reading=reading)


@pytest.fixture
def reader(tokenizer, text, tmp_path) -> Reader:
    return Reader(tokenizer, text, tmp_path / "tokens")


def stores(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def contents(loader: TextDataLoader) -> str:
    """All that a loader gives, as one sum."""
    digest = hashlib.sha256(repr((loader.fingerprint, loader.n_documents, loader.n_skipped)).encode())
    for index in range(2 * len(loader)):
        batch = loader.batch_at(index)
        for array in (batch.tokens, batch.lengths, batch.document_ids, batch.maskable):
            digest.update(array.tobytes())
    return digest.hexdigest()


def test_tokens_are_kept_and_found_again_without_reading_the_text(reader, tmp_path, monkeypatch):
    without = contents(reader.open(folder=None, keep=False))
    assert contents(reader.open()) == without
    assert reader.progress[0][0] == 0 and reader.progress[-1][0] == reader.progress[-1][1] > 0
    (name,) = stores(tmp_path / "tokens")
    assert stores(tmp_path / "tokens" / name) == sorted((*FILES, MANIFEST))
    monkeypatch.setattr(kept_tokens, "tokenise", None)
    monkeypatch.setattr(kept_tokens, "describe_sources", None)  # which reads files
    assert contents(reader.open()) == without
    assert (reader.progress, reader.warnings) == ([], [])


def test_a_text_that_was_moved_or_touched_is_known_by_its_content(reader, text, tmp_path, monkeypatch):
    before = contents(reader.open())
    moved = text.rename(tmp_path / "elsewhere")
    os.utime(moved / "a.txt", (LONG_AGO_S, LONG_AGO_S))
    monkeypatch.setattr(kept_tokens, "tokenise", None)
    reader.arguments = (moved, *reader.arguments[1:])
    assert contents(reader.open()) == before
    monkeypatch.setattr(kept_tokens, "describe_sources", None)  # now its new place is known
    assert contents(reader.open()) == before


def test_a_changed_text_gets_tokens_of_its_own_and_the_old_ones_stay_until_they_are_let_go(
    reader, text, tmp_path
):
    old = contents(reader.open())
    same_size = (text / "a.txt").read_text().replace("sand", "sea ", 1)
    (text / "a.txt").write_text(same_size)
    os.utime(text / "a.txt", (LONG_AGO_S, LONG_AGO_S))
    loader = reader.open()
    assert contents(loader) != old
    assert len(stores(tmp_path / "tokens")) == 2
    loader.keep_only_this_text()
    assert len(stores(tmp_path / "tokens")) == 1
    reader.open()
    assert reader.progress == []


def test_a_change_that_keeps_size_and_time_of_change_is_noticed(reader, text, tmp_path):
    old = contents(reader.open())
    times = (text / "a.txt").stat()
    (text / "a.txt").write_text((text / "a.txt").read_text().replace("sand", "sae ", 1))
    os.utime(text / "a.txt", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert contents(reader.open()) != old


def test_a_file_that_was_written_just_now_is_known_by_its_content_only(reader, tmp_path, monkeypatch):
    monkeypatch.setattr(text_key, "_SETTLED_NS", 3 * 10**9)
    reader.open()
    (name,) = stores(tmp_path / "tokens")
    manifest = token_store.read_manifest(tmp_path / "tokens" / name)
    assert {source.stamp for source in manifest.sources} == {text_key.UNKNOWN}
    reader.open()
    assert reader.progress == []


def test_files_in_another_order_are_another_text(reader, text, tokenizer, tmp_path):
    reader.open()
    files = [text / "b.jsonl", text / "a.txt", text / "c.jsonl"]
    other = Reader(tokenizer, files, tmp_path / "tokens").open()
    assert len(stores(tmp_path / "tokens")) == 2
    assert other.fingerprint != reader.open().fingerprint


def test_another_vocabulary_has_tokens_of_its_own(reader, tiny_model, text, tmp_path):
    reader.open()
    other = Reader(Tokenizer.from_gguf(tiny_model(L=1, tokenizer="spm")), text, tmp_path / "tokens")
    other.open()
    assert other.progress and len(stores(tmp_path / "tokens")) == 2


def test_the_same_vocabulary_in_another_file_has_the_same_tokens(tiny_model):
    one, two = (Tokenizer.from_gguf(tiny_model(L=1, seed=seed)) for seed in (0, 1))
    assert one.path != two.path and one.fingerprint == two.fingerprint
    assert one.fingerprint != Tokenizer.from_gguf(tiny_model(L=1, reserved=7)).fingerprint


def test_sequences_of_another_length_come_from_the_same_tokens(reader, text, tokenizer, monkeypatch):
    reader.open()
    expected = TextDataLoader(text, tokenizer, 9, 4, held_out_fraction=0.2)
    assert 0 < expected.n_too_long < 40
    monkeypatch.setattr(kept_tokens, "tokenise", None)
    reader.arguments = (*reader.arguments[:2], 9, 4)
    assert contents(reader.open()) == contents(expected)


@pytest.mark.parametrize("token_bytes", [2, 4])
def test_tokens_take_two_bytes_where_the_vocabulary_allows_it(reader, tmp_path, monkeypatch, token_bytes):
    expected = contents(reader.open(folder=None, keep=False))
    monkeypatch.setattr(token_store, "_SMALL_VOCABULARY", 1 << 16 if token_bytes == 2 else 1)
    loader = reader.open()
    (name,) = stores(tmp_path / "tokens")
    manifest = token_store.read_manifest(tmp_path / "tokens" / name)
    assert (tmp_path / "tokens" / name / "text.bin").stat().st_size == token_bytes * manifest.n_text_tokens
    assert contents(loader) == expected


# -- damage ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*FILES, MANIFEST])
@pytest.mark.parametrize("damage", ["flip", "cut", "longer", "missing"])
def test_damaged_tokens_are_made_anew_with_a_warning(reader, tmp_path, name, damage):
    before = contents(reader.open())
    path = tmp_path / "tokens" / stores(tmp_path / "tokens")[0] / name
    data = bytearray(path.read_bytes())
    assert data
    if damage == "flip":
        data[len(data) // 2] ^= 1
    path.unlink()
    if damage != "missing":
        path.write_bytes({"flip": data, "cut": data[:-1], "longer": data + b"\0"}[damage])
    assert contents(reader.open()) == before
    assert any("damaged" in warning for warning in reader.warnings)
    assert reader.progress
    assert contents(reader.open()) == before
    assert (reader.progress, reader.warnings) == ([], [])
    assert len(stores(tmp_path / "tokens")) == 1


def test_tokens_that_are_cut_short_while_they_are_in_use_are_an_error_in_one_line(reader, tmp_path):
    loader = reader.open()
    os.truncate(tmp_path / "tokens" / stores(tmp_path / "tokens")[0] / "text.bin", 10)
    with pytest.raises(UserError, match=r"text\.bin: cut short while it was in use"):
        for batch in loader:
            assert len(batch)


def test_a_disk_that_fails_while_tokens_are_read_is_an_error_in_one_line(reader, monkeypatch):
    loader = reader.open()

    def fail(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "pread", fail)
    with pytest.raises(UserError, match=r"\.bin: cannot be read: Input/output error"):
        loader.batch_at(0)


@pytest.mark.parametrize("place", ["write", "flush", "fsync", "rename"])
def test_a_disk_that_is_full_leaves_nothing_behind_and_other_tokens_as_they_were(
    reader, text, tmp_path, monkeypatch, place
):
    before = contents(reader.open())
    old = (text / "a.txt").read_text()
    (text / "a.txt").write_text(old + "more")

    def fail(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    target = {
        "write": (token_store.TokenWriter, "add_text"),
        "flush": (token_store.TokenWriter, "finish"),
        "fsync": (os, "fsync"),
        "rename": (os, "rename"),
    }[place]
    with monkeypatch.context() as patch:
        patch.setattr(*target, fail)
        with pytest.raises(UserError, match="could not be written: No space left on device") as refusal:
            reader.open()
    assert "\n" not in str(refusal.value)
    assert len(stores(tmp_path / "tokens")) == 1
    (text / "a.txt").write_text(old)
    assert contents(reader.open()) == before
    assert reader.progress == []


def test_a_disk_without_room_for_the_tokens_is_refused_early_with_numbers(tokenizer, tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text("the sand and the sea\n" * 300_000)
    monkeypatch.setattr(tokenising, "disk_free", lambda folder: 1 << 20)
    reader = Reader(tokenizer, tmp_path / "a.txt", tmp_path / "tokens")
    with pytest.raises(
        UserError, match=r"tokens: the tokens of this text take about \d+ KiB, .* has 1024 KiB left"
    ):
        reader.open()
    assert stores(tmp_path / "tokens") == []
    done, total = reader.progress[-1]
    assert done < total / 2


def test_a_text_that_changes_while_it_is_read_is_refused(reader, text, tmp_path, monkeypatch):
    def tokenise(*arguments, **options):
        (text / "b.jsonl").write_text('{"text": "x"}\n')
        return tokenising.tokenise(*arguments, **options)

    monkeypatch.setattr(kept_tokens, "tokenise", tokenise)
    with pytest.raises(UserError, match=r"b\.jsonl: changed while it was read"):
        reader.open()
    assert stores(tmp_path / "tokens") == []


def test_what_a_killed_process_left_is_deleted(reader, tmp_path):
    (tmp_path / "tokens" / ".unfinished-4711").mkdir(parents=True)
    (tmp_path / "tokens" / ".unfinished-4711" / "text.bin").write_bytes(b"half")
    reader.open()
    assert len(stores(tmp_path / "tokens")) == 1
    assert not stores(tmp_path / "tokens")[0].startswith(".")


def test_who_only_reads_changes_nothing(reader, text, tmp_path):
    expected = contents(reader.open(folder=None, keep=False))
    assert contents(reader.open(keep=False)) == expected
    assert not (tmp_path / "tokens").exists()
    reader.open()
    (name,) = stores(tmp_path / "tokens")
    manifest = (tmp_path / "tokens" / name / MANIFEST).read_bytes()
    assert contents(reader.open(keep=False)) == expected
    assert reader.progress == []
    (text / "a.txt").touch()
    assert contents(reader.open(keep=False)) == expected
    assert reader.progress == []
    (text / "a.txt").write_text("other")
    reader.open(keep=False)
    assert reader.progress
    assert (tmp_path / "tokens" / name / MANIFEST).read_bytes() == manifest
    assert stores(tmp_path / "tokens") == [name]


def test_tokens_that_are_not_kept_leave_no_file(reader, tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    loader = reader.open(folder=None, keep=False)
    assert stores(tmp_path / "temporary") == []
    assert len(loader.batch_at(0)) == 4


def test_a_tokenizer_without_a_fingerprint_keeps_nothing(text, tmp_path):
    TextDataLoader(text / "a.txt", ByteTokenizer(), 8, 1, reading=Reading(tmp_path / "tokens", keep=True))
    assert not (tmp_path / "tokens").exists()


@pytest.mark.parametrize("linked", [False, True])
def test_what_is_somebody_elses_in_the_folder_of_tokens_stays(reader, tmp_path, linked):
    folder = tmp_path / "tokens"
    if linked:
        (tmp_path / "elsewhere").mkdir()
        folder.symlink_to(tmp_path / "elsewhere")
    mine = folder / "experiments"
    mine.mkdir(parents=True)
    (mine / "notes.txt").write_text("mine")
    loader = reader.open()
    loader.keep_only_this_text()
    assert (mine / "notes.txt").read_text() == "mine"
    assert reader.warnings == []


@pytest.mark.parametrize("name", [MANIFEST, *FILES])
def test_a_named_pipe_among_the_kept_tokens_is_not_waited_for(reader, tmp_path, name):
    before = contents(reader.open())
    (store,) = stores(tmp_path / "tokens")
    place = tmp_path / "tokens" / store / name
    place.unlink()
    os.mkfifo(place)
    assert contents(reader.open()) == before
    assert "damaged" in reader.warnings[0]
