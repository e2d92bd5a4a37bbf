"""Draw a text while its holes are filled, as an animated SVG: every state is one of a real run.

    python tools/make_fill_svg.py MODEL.gguf RUN TEXT.md --output docs/fill.svg

The holes of TEXT.md are marked as for `infill`. Their lengths are found first; then they are filled
together, and each token appears with the step that wrote it. Where motion is not wanted, or not shown, the
filled text stands there. Colours follow the reader's light or dark setting; no script, and no font but the
reader's own.
"""

import argparse
import textwrap
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

from tool_errors import run_tool

from ggml_diffusion.durable import replace_text
from ggml_diffusion.generation.denoise import DenoisingStep
from ggml_diffusion.generation.diffusion_model import DiffusionModel
from ggml_diffusion.generation.infill import infill
from ggml_diffusion.text.marked_holes import find_holes, texts_between

COLUMNS, COLUMN, LINE, MARGIN = 76, 9.05, 24, 20  # of text, and their sizes in pixels
STEP_S, BEFORE_S, AFTER_S = 0.9, 1.6, 4.0


@dataclass(frozen=True)
class Part:
    """A piece of the filled text.

    Attributes:
        text: as it stands there in the end.
        step: that wrote it, from 1; 0 = it stood there before.

    """

    text: str
    step: int = 0


def parts_of(model: DiffusionModel, texts: list[str], lengths: list[int | None]) -> list[Part]:
    """The text in pieces: what stood there, and each token of the holes with its step."""
    found = [len(hole.tokens) for hole in infill(model, texts, lengths)]
    steps: list[DenoisingStep] = []
    holes = infill(model, texts, list(found), on_step=lambda step: steps.append(step.denoising))
    written = [list[int]() for _ in holes]  # the step of each token
    masks = [step.tokens == model.mask_token_id for step in steps]
    is_hole = masks[0] | (steps[0].scores > 0)
    left = [int(mask.sum()) for mask in masks]
    if sum(found) != int(is_hole.sum()) or left != sorted(left, reverse=True):
        raise SystemExit("the holes are not filled together: take a shorter text")
    order = [1 + sum(bool(mask[place]) for mask in masks) for place in is_hole.nonzero()[0]]
    for numbers, hole in zip(written, holes, strict=True):
        numbers += order[: len(hole.tokens)]
        del order[: len(hole.tokens)]
    parts = [Part(texts[0])]
    for hole, numbers, text in zip(holes, written, texts[1:], strict=True):
        shown = ""
        for n, number in enumerate(numbers, 1):
            whole = (
                hole.text if n == len(numbers) else model.tokenizer.decode(hole.tokens[:n], continued=True)
            )
            whole = whole if hole.text.startswith(" ") else whole.lstrip()
            parts.append(Part(whole[len(shown) :], number))
            shown = whole
        parts.append(Part(text))
    return [part for part in parts if part.text]


def drawing(parts: list[Part], title: str, description: str) -> str:
    """The SVG."""
    lines, n_steps = _laid_out(parts), max(part.step for part in parts)
    width, height = 2 * MARGIN + COLUMNS * COLUMN, 2 * MARGIN + LINE * len(lines)
    whole_s = BEFORE_S + STEP_S * n_steps + AFTER_S
    body = []
    for row, line in enumerate(lines):
        y, whole = MARGIN + LINE * row, "".join(part.text for part in line)
        column = len(whole.lstrip()) - len(whole)  # a line begins with its first word
        for part in line:
            x, n = MARGIN + column * COLUMN, len(part.text.rstrip())
            column += len(part.text)
            blanks = len(part.text) - len(part.text.lstrip())
            place = f'x="{x + blanks * COLUMN:.1f}" textLength="{(n - blanks) * COLUMN:.1f}"'
            text = f'<text {place} y="{y + 17}"{{}}>{escape(part.text.strip())}</text>'
            if part.step:
                left, across = x + blanks * COLUMN - 1.5, (n - blanks) * COLUMN + 3
                box = f'x="{left:.1f}" y="{y + 1}" width="{across:.1f}" height="21"'
                body.append(f'<rect class="found" {box} rx="4"/>')
                body.append(text.format(f' class="new s{part.step}"'))
                body.append(f'<rect class="mask m{part.step}" {box} rx="4"/>')
            elif part.text.strip():
                body.append(text.format(""))
    moves = []
    for step in range(1, n_steps + 1):
        at = 100 * (BEFORE_S + STEP_S * (step - 1)) / whole_s
        for name, before, after in (("s", 0, 1), ("m", 1, 0)):
            moves.append(
                f"@keyframes {name}{step} {{ 0%, {at:.2f}% {{ opacity: {before} }} "
                f"{at + 2:.2f}%, 97% {{ opacity: {after} }} 100% {{ opacity: {before} }} }}\n"
                f".{name}{step} {{ animation: {name}{step} {whole_s:.1f}s infinite }}"
            )
    style = _STYLE.replace("MOVES", "\n".join(moves))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height}" role="img" '
        f'aria-labelledby="title description">\n<title id="title">{escape(title)}</title>\n'
        f'<desc id="description">{escape(description)}</desc>\n<style>{style}</style>\n'
        f'<rect class="page" width="{width:.0f}" height="{height}" rx="10"/>\n'
        + "\n".join(body)
        + "\n</svg>\n"
    )


_STYLE = """
text { fill: #1f2328; white-space: pre; font: 15px ui-monospace, Menlo, Consolas, monospace }
.page { fill: #f6f8fa }
.found { fill: #dff2e3 } .new { fill: #116329; font-weight: 600 } .mask { fill: #c4ccd5; opacity: 0 }
@media (prefers-color-scheme: dark) {
  .page { fill: #151b23 } text { fill: #d1d7e0 }
  .found { fill: #1c3a26 } .new { fill: #7ee787 } .mask { fill: #454d57 }
}
@media (prefers-reduced-motion: no-preference) {
MOVES
}
"""


def _laid_out(parts: list[Part]) -> list[list[Part]]:
    """The pieces in lines, broken as the whole text is."""
    whole = "".join(part.text for part in parts)
    lines: list[list[Part]] = []
    rest = list(parts)
    for paragraph in whole.split("\n"):
        for line in textwrap.wrap(paragraph, COLUMNS, drop_whitespace=False) or [""]:
            lines.append(_take(rest, len(line)))
        if rest:
            _take(rest, 1)  # the end of the line
    return lines


def _take(rest: list[Part], n_chars: int) -> list[Part]:
    """Pieces of so many characters from the front of what is left."""
    taken: list[Part] = []
    while n_chars > 0 and rest:
        first = rest.pop(0)
        if len(first.text) > n_chars:
            rest.insert(0, Part(first.text[n_chars:], first.step))
        taken.append(Part(first.text[:n_chars], first.step))
        n_chars -= len(taken[-1].text)
    return taken


def main() -> None:
    """Fill and draw."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("run", type=Path)
    parser.add_argument("text", type=Path)
    parser.add_argument("--output", type=Path, default=Path("fill.svg"))
    given = parser.parse_args()
    model = DiffusionModel.load(given.model, given.run / "adapter.safetensors")
    document = given.text.read_bytes().rstrip(b"\n")
    holes = find_holes(document)
    parts = parts_of(model, texts_between(document, holes), [hole.length for hole in holes])
    title = f"{len(holes)} holes in a text are filled, the surest token first"
    filled = "".join(part.text for part in parts)
    replace_text(given.output, drawing(parts, title, f"In the end it reads: {filled}"))


if __name__ == "__main__":
    run_tool(main)
