"""Whether what a run exported does elsewhere what it does here: each export in the runtime that will load it.

Logits are compared on the built-in text of comparison.py. How far they may be apart follows from what a
runtime rounds: nothing but the order of sums on float32 weights; activations to 16 or 8 bits beside weights
of 16 bits or packed ones; and a standalone file's weights were rounded once more when they were merged.

Deliberately not here: the runtimes (llama_runtime.py, runtimes.py) and how it is shown (app/cli/verify.py).
"""

import math
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ggml_diffusion.engine.interface import Engine
from ggml_diffusion.errors import UserError, quoted
from ggml_diffusion.export.comparison import Agreement, Reference
from ggml_diffusion.export.llama_runtime import bidirectional_logits
from ggml_diffusion.export.runtimes import diffusion_cli_text, has_peft, peft_logits
from ggml_diffusion.export.standalone import STANDALONE_KEY, TIME_KEY
from ggml_diffusion.export.targets import DIFFUSION_TWINS
from ggml_diffusion.formats.adapter_file import DiffusionCheckpoint, is_gguf, load_adapter
from ggml_diffusion.formats.model_file import ModelFile, read_gguf
from ggml_diffusion.formats.peft_folder import CONFIG_NAME
from ggml_diffusion.generation.reading import ReadingRule
from ggml_diffusion.generation.sampling import log_softmax
from ggml_diffusion.objective.output_rows import rows_of_positions
from ggml_diffusion.text.prompts import with_start
from ggml_diffusion.text.tokenizer import Tokenizer
from ggml_diffusion.training.identity import mean_kl_divergence

# Mean KL in nats, by the widest rounding of a file's matrices.
FLOAT32_LIMIT, FLOAT16_LIMIT = 1e-6, 1e-3
PACKED_ADAPTER_LIMIT, PACKED_STANDALONE_LIMIT = 1e-2, 2e-2
PEFT_LIMIT = 1e-6  # transformers unpacks the same weights and computes in float32
BASE_LIMIT = 1e-4  # beyond that, transformers has read another model out of the GGUF
_FLOATS = ("F32", "F16", "BF16")
# Nats a token by which what llama-diffusion-cli writes is less likely here than the likeliest tokens: it
# prints no logits, and where all is masked, tokens are often as likely as each other.
FLOAT_REGRET, PACKED_REGRET = 0.01, 0.5
N_CANDIDATES = 64
PROMPT, N_WRITTEN = "The harbour was quiet before the boats came in, and the first of them", 16


class Decoder(Protocol):
    """What tells how a token looks; `Tokenizer` does."""

    def decode(self, tokens: NDArray[np.int32], *, continued: bool = False) -> str:
        """The text of tokens (n,)."""


@dataclass(frozen=True)
class Check:
    """One export in one runtime.

    Attributes:
        export: the file or folder, by its name in the run's folder.
        runtime: what loaded it.
        status: "ok", "failed" = beyond the limit or not loaded, "skipped" = no such runtime here.
        found: what was measured, or why nothing was.
        limit: what it may be at most, or at least; "" where nothing was measured.

    """

    export: str
    runtime: str
    status: Literal["ok", "failed", "skipped"]
    found: str
    limit: str = ""


@dataclass(frozen=True)
class Runtimes:
    """Where to find programs that are not part of the installation; None = where they usually are."""

    diffusion_cli: Path | None = None
    peft_python: Path | None = None


def verify_run(
    folder: Path, engine: Engine, checkpoint: DiffusionCheckpoint, runtimes: Runtimes
) -> Iterator[Check]:
    """Check every export in a run's folder, one after the other.

    Args:
        folder: of the run.
        engine: the base, in float32.
        checkpoint: the conversion.
        runtimes: programs to use.

    Raises:
        UserError: the folder holds no export, or the conversion does not fit the base.

    """
    checkpoint.check_shapes(engine.file)
    verifier = _Verifier(engine, checkpoint, runtimes)
    n_found = 0
    for path in sorted(folder.iterdir()):
        for check in verifier.checks(path):
            n_found += 1
            yield check
    if not n_found:
        raise UserError(f"{folder}: holds no export that another program loads")


class _Verifier:
    def __init__(self, engine: Engine, checkpoint: DiffusionCheckpoint, runtimes: Runtimes) -> None:
        self._engine, self._checkpoint, self._runtimes = engine, checkpoint, runtimes
        self._tokenizer = Tokenizer.from_file(engine.file)
        self._reference = Reference(engine, self._tokenizer, checkpoint)

    def checks(self, path: Path) -> Iterator[Check]:
        """What can be said of one name in the folder; nothing if it is no export."""
        if path.is_dir():
            if (path / CONFIG_NAME).is_file():
                yield self._guarded(path, "transformers + peft", self._peft)
            return
        if not is_gguf(path):
            return
        try:
            file = read_gguf(path)
        except UserError as error:
            yield Check(path.name, "-", "failed", _reason(path, error))
            return
        if file.optional("general.type", "model") == "adapter":
            yield self._guarded(path, "llama-cpp-python", self._adapter)
        elif file.optional(STANDALONE_KEY, False):
            yield self._guarded(path, "llama-cpp-python", self._standalone)
            if file.arch in DIFFUSION_TWINS.values():
                yield self._guarded(path, "llama-diffusion-cli", self._cli)

    def _guarded(self, path: Path, runtime: str, check: Callable[[Path], Check]) -> Check:
        """A check, or the line with which the runtime refused the export."""
        try:
            return check(path)
        except UserError as error:
            return Check(path.name, runtime, "failed", _reason(path, error))

    def _adapter(self, path: Path) -> Check:
        load_adapter(path, self._engine.file.arch).check(self._engine.file)  # llama.cpp aborts on a bad one
        if (ratio := self._checkpoint.metadata.final_causal_ratio) > 0:
            found = f"the conversion is at causal ratio {ratio:g}, which llama.cpp cannot compute"
            return Check(path.name, "llama-cpp-python", "skipped", found)
        logits = bidirectional_logits(
            self._engine.file.path,
            self._reference.llama_embeddings,
            adapter=path,
            attention_sink=self._checkpoint.metadata.attention_sink,
            n_threads=self._engine.n_threads,
        )
        limit = _limit(self._engine.file, PACKED_ADAPTER_LIMIT)
        return _judged(path, "llama-cpp-python", self._reference.agreement(logits), limit)

    def _standalone(self, path: Path) -> Check:
        file = read_gguf(path)
        reference = self._reference
        if (time := file.optional(TIME_KEY, -1.0)) >= 0:
            reference = Reference(self._engine, self._tokenizer, self._checkpoint, time)
        logits = bidirectional_logits(
            path,
            reference.tokens,
            attention_sink=self._checkpoint.metadata.attention_sink,
            n_threads=self._engine.n_threads,
        )
        if logits.shape != reference.logits.shape:
            raise UserError(f"{path}: has {logits.shape[1]} tokens, the base {reference.logits.shape[1]}")
        limit = _limit(file, PACKED_STANDALONE_LIMIT)
        return _judged(path, "llama-cpp-python", reference.agreement(logits), limit)

    def _peft(self, path: Path) -> Check:
        runtime, python = "transformers + peft", self._runtimes.peft_python
        if python is None and not has_peft():
            return Check(path.name, runtime, "skipped", "not installed; see --peft-python")
        reference = self._reference
        logits, base = peft_logits(path, self._engine.file.path, reference.tokens, reference.time, python)
        same_shape = base.shape == reference.base_logits.shape
        apart = mean_kl_divergence(reference.base_logits, base) if same_shape else np.inf
        if not apart <= BASE_LIMIT:  # written so that NaN fails
            found = f"transformers reads another model out of this GGUF: the base alone is {apart:.1e} apart"
            return Check(path.name, runtime, "skipped", found)
        return _judged(path, runtime, reference.agreement(logits), PEFT_LIMIT)

    def _cli(self, path: Path) -> Check:
        runtime, program = "llama-diffusion-cli", self._runtimes.diffusion_cli
        if program is None and (found := shutil.which(runtime)) is not None:
            program = Path(found)
        if program is None:
            return Check(path.name, runtime, "skipped", "not found; see --diffusion-cli")
        if self._checkpoint.metadata.prompts:
            return Check(path.name, runtime, "skipped", "puts prompts into a chat template: not comparable")
        file = read_gguf(path)
        before = with_start(self._tokenizer.encode(PROMPT), self._tokenizer)
        n_tokens = len(before) + N_WRITTEN
        text = diffusion_cli_text(program, path, PROMPT, n_tokens, self._engine.n_threads, n_steps=1)
        log_p = self._log_probabilities(before, file.optional(TIME_KEY, 0.0))
        regret = least_regret(text, log_p, self._tokenizer)
        limit = PACKED_REGRET if _is_packed(file) else FLOAT_REGRET
        if not regret < math.inf:
            found = f"it writes what is not among the {N_CANDIDATES} likeliest: {quoted(text)}"
            return Check(path.name, runtime, "failed", found)
        status: Literal["ok", "failed"] = "ok" if regret <= limit else "failed"
        found = f"{regret:.2f} nats a token behind the likeliest"
        return Check(path.name, runtime, status, found, f"{limit:g}")

    def _log_probabilities(self, before: NDArray[np.int32], time: float) -> NDArray[np.float64]:
        """Of the tokens behind a text, all of them masked, (N, V)."""
        rule, mask = ReadingRule.of_checkpoint(self._checkpoint), self._checkpoint.metadata.mask_token_id
        tokens = np.concatenate([before, np.full(N_WRITTEN, mask, np.int32)])
        offset = rule.embedding_offset(np.array([time], np.float32))
        logits = self._engine.logits(rule.batch(tokens[None], offset), self._checkpoint.adapter())[0]
        rows = rows_of_positions(np.arange(len(before), len(tokens)), rule.prediction)
        return log_softmax(logits[rows])


def least_regret(text: str, log_p: NDArray[np.float64], tokenizer: Decoder) -> float:
    """How much less likely a text is than the likeliest tokens, in nats a token.

    A program that prints text does not say which tokens it chose: of all ways to write it with one token a
    place, the likeliest counts. Infinite where there is none with the likeliest tokens of each place.

    Args:
        text: what was written.
        log_p: (N, V), of the N places.
        tokenizer: tells what each token looks like.

    """
    shown: dict[int, str] = {}
    best = {0: 0.0}  # characters that are written -> the largest sum of log p so far
    for row in log_p:
        after: dict[int, float] = {}
        for token in np.argsort(-row)[:N_CANDIDATES].tolist():
            if token not in shown:
                shown[token] = tokenizer.decode(np.array([token], np.int32), continued=True)
            for start, value in best.items():
                if text.startswith(shown[token], start):
                    end = start + len(shown[token])
                    after[end] = max(after.get(end, -math.inf), value + row[token])
        best = after
    return (float(log_p.max(axis=1).sum()) - best.get(len(text), -math.inf)) / len(log_p)


def _is_packed(file: ModelFile) -> bool:
    return any(one.type_name not in _FLOATS for one in file.tensors.values())


def _limit(file: ModelFile, packed_limit: float) -> float:
    """What a file's matrices allow."""
    if _is_packed(file):
        return packed_limit
    is_float32 = all(one.type_name == "F32" for one in file.tensors.values())
    return FLOAT32_LIMIT if is_float32 else FLOAT16_LIMIT


def _judged(path: Path, runtime: str, agreement: Agreement, limit: float) -> Check:
    status: Literal["ok", "failed"] = "ok" if agreement.mean_kl <= limit else "failed"
    found = f"KL {agreement.mean_kl:.1e}, likeliest token {agreement.top1:.0%}"
    return Check(path.name, runtime, status, found, f"KL {limit:.0e}")


def _reason(path: Path, error: UserError) -> str:
    return str(error).removeprefix(f"{path}: ")
