"""What comes out of an evaluation: all of its figures.

Deliberately not here: what is asked for (settings.py), how figures are measured (suite.py and the
measures), how they look (tables.py, plots.py).
Letters: V vocabulary.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ggml_diffusion.durable import replace_file
from ggml_diffusion.evaluation.fluency import WrittenText
from ggml_diffusion.evaluation.infilling import InfillComparison
from ggml_diffusion.evaluation.likelihood import Likelihood
from ggml_diffusion.evaluation.masked import MaskedComparison

FORMAT = 1


@dataclass(frozen=True)
class BaseCheck:
    """Whether the base is bit for bit what it was, with the adapter off.

    Attributes:
        same_logits: logits after the whole evaluation equal those before it.
        same_with_nothing_trained: so do those with an adapter that has no pairs.
        same_file: the file's SHA-256 is that of before.
        trained_on_this_file: it is also the one that the conversion was trained on.
        sha256: of the file.

    """

    same_logits: bool
    same_with_nothing_trained: bool
    same_file: bool
    trained_on_this_file: bool
    sha256: str

    @property
    def unchanged(self) -> bool:
        """All that can be said of the base alone."""
        return self.same_logits and self.same_with_nothing_trained and self.same_file


@dataclass(frozen=True)
class Evaluation:
    """All figures.

    Attributes:
        about: what was measured on what, as plain values.
        ln_vocabulary: ln V, nats a token of a model that knows nothing.
        likelihoods: by name: "converted" and "step_0" are NELBOs, "base" and "unigram" are exact.
        masked: at each share.
        infilling: for each length of span; empty if it was left out.
        texts: empty if they were left out.
        base_check: the base itself.
        seconds: that it took.

    """

    about: dict[str, Any]
    ln_vocabulary: float
    likelihoods: dict[str, Likelihood]
    masked: list[MaskedComparison]
    infilling: list[InfillComparison]
    texts: list[WrittenText]
    base_check: BaseCheck
    seconds: float

    def as_json(self) -> str:
        """All of it; what has no value is null."""
        document = {"format": FORMAT, **asdict(self)}
        document["base_check"]["unchanged"] = self.base_check.unchanged
        return json.dumps(_without_nan(document), indent=2) + "\n"

    def save(self, path: Path) -> None:
        """Write the JSON.

        Raises:
            UserError: it could not be written.

        """

        def write(temporary: Path) -> None:
            temporary.write_text(self.as_json(), encoding="utf-8")

        replace_file(path, write)


def _without_nan(value: Any) -> Any:
    """Plain values with None for NaN, which JSON has no word for."""
    if isinstance(value, dict):
        return {key: _without_nan(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
