"""Paragraphs of plain English out of reStructuredText, Markdown, docstrings and notebooks.

Pure functions from text to text: whatever is not a paragraph of sentences is dropped rather than repaired.
Regular expressions throughout and no parser of the running Python's, so that every version finds the same.
"""

import itertools
import json
import re
import textwrap
from collections.abc import Iterable, Iterator

MIN_WORDS = 12
# In a docstring, shorter ones are what a parameter means.
MIN_DOCSTRING_WORDS = 20
MIN_ALPHABETIC_SHARE = 0.85
MIN_COMMON_SHARE = 0.2
MAX_SYMBOL_SHARE = 0.015
MAX_FOREIGN_SHARE = 0.01

# Directives whose body is text like any other; of the rest (code, math, tables, ...) nothing is kept.
_TEXT_DIRECTIVES = """
note warning tip hint important caution attention danger admonition topic sidebar glossary epigraph
function class method attribute module data exception describe setting option confval envvar directive
role event command program rubric classmethod staticmethod decorator property object django-admin
templatetag templatefilter fieldlookup container dropdown tab-item only
"""
_COMMON_WORDS = """
a about after all also an and any are as at be because been but by can could do does for from had has
have he her him his how i if in into is it its may more most no not of on one only or other our out
shall she should so some such than that the their them then there these they this those to unto up us
use used was we were what when where which while who will with would you your
"""
_COMMON = frozenset(_COMMON_WORDS.split())
_SENTENCES = re.compile(r"[\"'(]?[A-Z].*[.?!][\"')]*", re.DOTALL)
_WORD = re.compile(r"[\"'(]*[A-Za-z]+(?:['/-][A-Za-z]+)*[\"').,;:?!]*")
_FOREIGN = re.compile(
    r"://|www\.|Copyright|[Ll]icen[sc]e[ds]? (?:under|agree)|\.\. |::|"
    r"[\\`{}|~^$<>#*\x00-\x1f]|%\(|%s|\[\]\(|(?<!\w):[\w+-]+:(?!\w)"
)
_DIRECTIVE = re.compile(r"\.\.(?:\s+(?:\|[^|]*\|\s+)?(?:[\w-]+:)*([\w-]+)::.*|\s.*|$)")
_RULER = re.compile(r"""([=\-`:'"~^_*+#<>.])\1{2,}$""")
_TABLE_RULER = re.compile(r"[+|].*[+|]$|[=-]{2,}(?:\s+[=-]{2,})+$")
_LIST_ITEM = re.compile(r"(?:[*+•-]|\(?(?:\d{1,3}|[a-zA-Z#])[.)])\s+(?=\S)")
_FIELD = re.compile(r":[^:`]+:(?:\s|$)|[@\\][a-z]+\s")
_FENCE = re.compile(r"(`{3,}|~{3,}|:{3,})")
_DOCTEST = re.compile(r">>>|\.\.\. |In \[\d+\]|Out\[\d+\]|\$ ")

_MARKUP: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?:\x1b|\\u001b)\[\d*m", ""),
        (r"<!--.*?-->|</?[a-zA-Z][^<>]*>(?!`)", ""),  # HTML
        (r"!\[[^\]]*\]\([^)]*\)", ""),  # an image
        (r"\[([^\]]+)\](?:\([^)\s]*(?:\s[^)]*)?\)|\[[^\]]*\])", r"\1"),  # a link of Markdown
        (r"\s*\[(?:#\w*|\*|\d+|[A-Z][\w-]+)\]_?_(?!\w)|\s*:(?:cite|footcite)[\w:]*:`[^`]*`", ""),
        (r"\s*\[\d+(?:,\s*\d+)*\](?!\w)", ""),  # a reference of numpydoc
        (r":pep:`~?(\d+)[^`]*`", r"PEP \1"),
        (r":rfc:`~?(\d+)[^`]*`", r"RFC \1"),
        (r"(?::[a-zA-Z][\w+-]*(?::[\w+-]+)*:|\{[\w:-]+\})`~(?:[^`<>]*\.)?([^`<>.]+)`", r"\1"),
        (r"(?::[a-zA-Z][\w+-]*(?::[\w+-]+)*:|\{[\w:-]+\})?`!?([^`<>]+?)\s*<[^`<>]*>`_{0,2}", r"\1"),
        (r"(?::[a-zA-Z][\w+-]*(?::[\w+-]+)*:|\{[\w:-]+\})`[!.]?(?:_\w+\.)?([^`]+)`", r"\1"),
        (r"``([^`]+)``(?:_|\b)?", r"\1"),
        (r"`([^`]+)`_{0,2}", r"\1"),
        (r"(?<![\w|])\|([\w. -]+)\|_{0,2}(?![\w|])", r"\1"),  # a substitution
        (r"(?<![\w*])\*{1,3}(?=\S)([^*]+?)(?<=\S)\*{1,3}(?![\w*])", r"\1"),
        (r"(?<![\w_])_(?=[^\W_])([^_]+?)(?<=[^\W_])_(?![\w_])", r"\1"),
        (r"(?<![\w.])([A-Za-z][\w.-]*[A-Za-z0-9])_{1,2}(?=[\s.,;:)]|$)", r"\1"),  # a reference
        (r"\\ |\\(?=[*_`|<>\s])", ""),
        (r"[‘’]", "'"),
        (r"[“”]|``|''", '"'),
        (r"\s*—\s*|\s+---?\s+|(?<=[a-z])---?(?=[a-z])", " - "),
        (r"\s+", " "),
        (r" (?=[.,;:?!)](?:\s|$))|(?<=[(]) ", ""),
        (r"\s*\(\s+\)", ""),
    )
)


def strip_markup(paragraph: str) -> str:
    """The words of a paragraph, on one line: ":func:`~a.b.run`" is "run", "``x``" is "x"."""
    for pattern, replacement in _MARKUP:
        paragraph = pattern.sub(replacement, paragraph)
    return paragraph.strip()


def without_dangling_end(paragraph: str) -> str:
    """Cut a last sentence that ends in a colon: what it announced was dropped."""
    if not paragraph.endswith(":"):
        return paragraph
    whole_sentences = re.match(r"(?:.*[.?!][\"')]*(?=\s+[A-Z\"'(]))?", paragraph, re.DOTALL)
    assert whole_sentences is not None  # an empty text matches too
    return whole_sentences[0]


def is_prose(paragraph: str, min_words: int = MIN_WORDS) -> bool:
    """Whether a paragraph looks like English sentences."""
    words = paragraph.split()
    if len(words) < min_words or not _SENTENCES.fullmatch(paragraph) or _FOREIGN.search(paragraph):
        return False
    if sum(letter in "=_@[]+&/" for letter in paragraph) > MAX_SYMBOL_SHARE * len(paragraph):
        return False
    if sum(not letter.isascii() for letter in paragraph) > MAX_FOREIGN_SHARE * len(paragraph):
        return False
    alphabetic = sum(bool(_WORD.fullmatch(word)) for word in words)
    common = sum(word.strip("\"'().,;:?!").lower() in _COMMON for word in words)
    return alphabetic >= MIN_ALPHABETIC_SHARE * len(words) and common >= MIN_COMMON_SHARE * len(words)


def clean(paragraphs: Iterable[str], min_words: int = MIN_WORDS) -> list[str]:
    """Those paragraphs that are prose, without their markup."""
    plain = (without_dangling_end(strip_markup(paragraph)) for paragraph in paragraphs)
    return [paragraph for paragraph in plain if is_prose(paragraph, min_words)]


def _indent(line: str) -> int:
    return len(line) - len(line.lstrip())


def _without_directives(lines: list[str]) -> list[str]:
    """Drop directives, comments, targets and literal blocks; the body of a text directive moves out."""
    kept: list[str] = []
    place = 0
    while place < len(lines):
        line = lines[place]
        indent, text = _indent(line), line.strip()
        end = place + 1
        while end < len(lines) and (not lines[end].strip() or _indent(lines[end]) > indent):
            end += 1
        body = lines[place + 1 : end]
        if match := _DIRECTIVE.match(text):
            if match[1] in _TEXT_DIRECTIVES.split():
                filled = [each for each in body if each.strip()]
                shift = min(map(_indent, filled), default=0) - indent
                moved = [each[shift:] if each.strip() else "" for each in body]
                kept += ["", *_without_directives(_without_options(moved)), ""]
            else:
                kept.append("")
        elif text.endswith("::") and (not body or not body[0].strip()):
            kept += [line[:-1] if text != "::" else "", ""]
        else:
            kept.append(line)
            end = place + 1
        place = end
    return kept


def _without_options(body: list[str]) -> list[str]:
    """A directive's body after its first lines, as long as these are `:name: value` or further signatures."""
    start = 0
    while start < len(body) and body[start].strip():
        start += 1
    first = [line for line in body[:start] if not re.match(r"\s*:[\w-]+:|.*\)$", line)]
    return first + body[start:]


def _blocks(lines: list[str]) -> Iterator[list[str]]:
    """Lines between blank ones, cut before and after titles; without tables and interactive sessions."""
    block: list[str] = []
    for line in [*lines, ""]:
        text = line.strip()
        if text and not _RULER.match(text):
            block.append(line)
            continue
        if text:
            block = block[:-1]  # the title above its ruler
        if block and not any(
            _TABLE_RULER.match(each.strip()) or _DOCTEST.match(each.strip()) for each in block
        ):
            yield block
        block = []


def _paragraphs_of_block(block: list[str]) -> Iterator[str]:
    """Cut a block at list items and where the indentation changes; without field lists."""
    paragraph: list[str] = []
    left = -1
    is_field = False
    for line in block:
        indent, text = _indent(line), line.strip()
        item = _LIST_ITEM.match(text)
        if paragraph and not item and indent == left:
            paragraph.append(text)
            continue
        if is_field and indent > left:
            continue
        if paragraph:
            yield " ".join(paragraph)
        is_field = bool(_FIELD.match(text))
        left = indent + (item.end() if item else 0)
        paragraph = [] if is_field else [text[item.end() :] if item else text]
        if is_field:
            left = indent
    if paragraph:
        yield " ".join(paragraph)


def rst_paragraphs(text: str) -> Iterator[str]:
    """Paragraphs of reStructuredText or of a docstring, with their inline markup."""
    for block in _blocks(_without_directives(text.expandtabs().splitlines())):
        yield from _paragraphs_of_block(block)


def markdown_paragraphs(text: str) -> Iterator[str]:
    """Paragraphs of Markdown, with their inline markup; code, tables, headings and quotes are left out."""
    lines: list[str] = []
    fence = ""
    for line in text.expandtabs().splitlines():
        stripped = line.strip()
        match = _FENCE.match(stripped)
        if fence:
            if stripped == fence:
                fence = ""
        elif match and not match[1].startswith(":"):
            fence = match[1]
        elif (
            match
            or stripped.startswith(("#", "|", "<", ">"))
            or (_indent(line) >= 4 and lines and not lines[-1])
        ):
            lines.append("")
        else:
            lines.append(line)
    for block in _blocks(lines):
        yield from _paragraphs_of_block(block)


def notebook_paragraphs(text: str) -> Iterator[str]:
    """Paragraphs of a notebook's Markdown cells. ValueError: it is no notebook."""
    for cell in json.loads(text)["cells"]:
        if cell["cell_type"] == "markdown":
            yield from markdown_paragraphs("".join(cell["source"]))


# Comments and strings are read alike, so that a quote inside the one is not taken for the start of the other.
_TOKEN = re.compile(
    r"""#[^\n]*|([a-zA-Z]{0,2})(?:("{3}|'{3})((?:\\.|[^\\])*?)\2|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*')""",
    re.DOTALL,
)


def docstrings(source: str) -> Iterator[str]:
    """Strings in triple quotes that stand at the start of a line of Python, without their indentation."""
    for match in _TOKEN.finditer(source):
        before = source[source.rfind("\n", 0, match.start()) + 1 : match.start()]
        if match[2] and not before.strip() and match[1].lower() in ("", "r", "u"):
            first, _, rest = match[3].expandtabs().partition("\n")
            yield f"{first.strip()}\n{textwrap.dedent(rest)}"


def python_paragraphs(text: str) -> Iterator[str]:
    """Paragraphs of a module's docstrings, with their inline markup."""
    for docstring in docstrings(text):
        yield from rst_paragraphs(docstring)


READERS = {
    "rst": rst_paragraphs,
    "txt": rst_paragraphs,
    "md": markdown_paragraphs,
    "ipynb": notebook_paragraphs,
    "py": python_paragraphs,
}


def bible_chapters(text: str) -> Iterator[list[str]]:
    """One document a chapter, out of one JSON object a verse; a paragraph has about 80 words."""
    verses = map(json.loads, text.splitlines())
    for _, chapter in itertools.groupby(verses, key=lambda verse: (verse["book"], verse["chapter"])):
        paragraphs = [""]
        for verse in chapter:
            if len(paragraphs[-1].split()) >= 80:
                paragraphs.append("")
            paragraphs[-1] = " ".join([*paragraphs[-1].split(), *verse["text"].split()])
        if len(paragraphs) > 1 and len(paragraphs[-1].split()) < 20:
            paragraphs[-2:] = [" ".join(paragraphs[-2:])]
        yield paragraphs


def dictionary_entries(text: str) -> Iterator[list[str]]:
    """One document an entry, out of a JSON list of terms and their senses."""
    for entry in json.loads(text):
        senses = "\n".join(sense["definition"] for sense in entry["senses"])
        without_notes = (re.sub(r"^(?:\d+\.\s+)?(?:\[[^\]]*\]\s*)?", "", line) for line in senses.split("\n"))
        yield clean(without_notes)
