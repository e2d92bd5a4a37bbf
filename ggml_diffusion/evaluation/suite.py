"""All measures of a conversion on one held-out split, in the order of their cost.

`evaluate_conversion` reads top-down: base, NELBO, masked tokens, infilling, writing, and that the base is
what it was. Its cost is known before it begins (`planned_tokens`: tokens that go through the model).

Deliberately not here: the measures (the files beside this one), their settings and what comes out
(results.py), how it looks (tables.py, plots.py).
Letters: B sequences, T tokens, V vocabulary.
"""

import math
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ggml_diffusion.engine.interface import Batch, Engine
from ggml_diffusion.engine.open import open_engine
from ggml_diffusion.errors import UserError
from ggml_diffusion.evaluation.fluency import compare_texts, cut_prompts, writing_tokens
from ggml_diffusion.evaluation.infilling import (
    SPAN_LENGTHS,
    Hole,
    compare_infilling,
    cut_holes,
    infilling_tokens,
)
from ggml_diffusion.evaluation.likelihood import Likelihood, likelihood, nelbo_totals, unigram_losses
from ggml_diffusion.evaluation.masked import MASKED_SHARES, compare_arms, random_masks
from ggml_diffusion.evaluation.results import BaseCheck, Evaluation
from ggml_diffusion.evaluation.scoring import OnTokens, TokenScores, scorable, score_base
from ggml_diffusion.evaluation.settings import EvaluationSettings
from ggml_diffusion.formats.adapter_file import DiffusionCheckpoint
from ggml_diffusion.formats.lora import LoraAdapter
from ggml_diffusion.formats.model_check import read_model
from ggml_diffusion.formats.model_file import file_sha256
from ggml_diffusion.generation.diffusion_model import DiffusionModel
from ggml_diffusion.run_folder import TOKENS
from ggml_diffusion.text.kept_tokens import Reading
from ggml_diffusion.text.loader import TextDataLoader, TokenBatch
from ggml_diffusion.text.sources import STANDARD_INPUT
from ggml_diffusion.text.tokenizer import Tokenizer


class EvaluationListener(Protocol):
    """What an evaluation reports while it runs; tables.py has one for people."""

    def note(self, text: str) -> None:
        """Something that happened."""

    def tokenise(self, done_bytes: int, total_bytes: int) -> None:
        """So much of the text has been tokenised: 0 first, all of it last."""

    def start(self, n_tokens: int) -> None:
        """So many tokens, at most, are to go through the model."""

    def advance(self, part: str, n_tokens: int) -> None:
        """So many more tokens of a part have."""

    def stop(self) -> None:
        """All is measured."""


@dataclass(frozen=True)
class EvaluationInputs:
    """The files of an evaluation, and how they are read.

    Attributes:
        base: the GGUF that was converted.
        adapter: the conversion.
        control: a conversion of the same base that was trained at causal ratio 1, or None.
        data, sequence_length, held_out_fraction: see `load_held_out`.
        n_threads: None = as many as there are cores.
        device: "cpu", "metal", "cuda" or "vulkan".
        allow_other_base: measure on a base that the conversion was not trained on.

    """

    base: Path
    adapter: Path
    control: Path | None = None
    data: tuple[str | Path, ...] = ()
    sequence_length: int | None = None
    held_out_fraction: float | None = None
    n_threads: int | None = None
    device: str = "cpu"
    allow_other_base: bool = False


@dataclass(frozen=True)
class HeldOutData:
    """What is measured on.

    Attributes:
        held_out: sequences (B, T).
        training_counts: (V,) how often each token comes in the training split.
        fingerprint: SHA-256 of all of the text's tokens.
        fraction: share of the text that is held out.

    """

    held_out: TokenBatch
    training_counts: NDArray[np.int64]
    fingerprint: str
    fraction: float


def run_evaluation(
    inputs: EvaluationInputs, settings: EvaluationSettings, listener: EvaluationListener
) -> Evaluation:
    """Open the files and measure.

    Raises:
        UserError: a file is missing, malformed or of another base; or as `evaluate_conversion`.

    """
    checkpoint = DiffusionCheckpoint.load(inputs.adapter)
    control_checkpoint = None if inputs.control is None else DiffusionCheckpoint.load(inputs.control)
    base = read_model(inputs.base)
    with closing(open_engine(base, inputs.n_threads, device=inputs.device)) as engine:
        listener.note(f"base: {engine.description}")
        tokenizer = Tokenizer.from_file(base)
        conversions = [one for one in (checkpoint, control_checkpoint) if one is not None]
        for one in conversions:
            one.check_base(engine.sha256, allow_other_base=inputs.allow_other_base)
        models = [DiffusionModel.from_checkpoint(engine, tokenizer, one) for one in conversions]
        if len(models) == 2 and models[1].mask_token_id != models[0].mask_token_id:
            raise UserError(
                f"{inputs.control}: its mask token is {models[1].mask_token_id}, the conversion's is "
                f"{models[0].mask_token_id}: they cannot have the same masks"
            )
        data = load_held_out(
            checkpoint,
            tokenizer,
            settings.sequences,
            data=inputs.data,
            sequence_length=inputs.sequence_length,
            held_out_fraction=inputs.held_out_fraction,
            reading=Reading(
                inputs.adapter.parent / TOKENS,
                n_processes=inputs.n_threads,
                warn=listener.note,
                on_progress=listener.tokenise,
            ),
        )
        listener.note(
            f"data: {len(data.held_out)} held-out sequences of {data.held_out.tokens.shape[1]} tokens"
        )
        control = models[1] if len(models) == 2 else None
        return evaluate_conversion(models[0], checkpoint, data, settings, listener, control)


def load_held_out(
    checkpoint: DiffusionCheckpoint,
    tokenizer: Tokenizer,
    n_sequences: int,
    *,
    data: Sequence[str | Path] = (),
    sequence_length: int | None = None,
    held_out_fraction: float | None = None,
    reading: Reading | None = None,
) -> HeldOutData:
    """Read the held-out split that a conversion was not trained on.

    Args:
        checkpoint: the conversion; what is left out below is as it was in its training.
        tokenizer: of the base.
        n_sequences: B at most, always the same ones.
        data: files and folders.
        sequence_length: T.
        held_out_fraction: of the text. With another fraction or sequence length than in training, the split
            is another one, and the model may have seen some of it.
        reading: where tokens of the text may have been kept, and who is told of progress.

    Raises:
        UserError: no data are known, none is held out, or a file cannot be read.

    """
    trained = checkpoint.settings
    paths = list(data) or list(trained.data or [])
    if not paths or (not data and STANDARD_INPUT in paths):
        raise UserError(
            "which text? give --data: the text of the training, whose held-out part is measured on"
        )
    length = sequence_length or trained.sequence_length or 128
    fraction = (trained.held_out_fraction or 0.0) if held_out_fraction is None else held_out_fraction
    loader = TextDataLoader(
        paths,
        tokenizer,
        length,
        n_sequences,
        split="train",
        held_out_fraction=fraction if 0.0 < fraction < 1.0 else 0.0,
        include=trained.include or [],
        reading=reading,
    )
    if loader.held_out_fraction == 0.0 and not loader.has_own_split:
        raise UserError(
            "the conversion held nothing out of its text: give --held-out-fraction, above 0 and below 1, and "
            "text that it was not trained on"
        )
    counts = loader.token_counts(tokenizer.vocab_size)
    held_out = loader.with_split("held_out")
    fraction = (
        held_out.n_sequences / (held_out.n_sequences + loader.n_sequences)
        if loader.has_own_split
        else fraction
    )
    return HeldOutData(held_out.batch_at(0), counts, loader.fingerprint, fraction)


def evaluate_conversion(
    model: DiffusionModel,
    checkpoint: DiffusionCheckpoint,
    data: HeldOutData,
    settings: EvaluationSettings,
    listener: EvaluationListener,
    control: DiffusionModel | None = None,
) -> Evaluation:
    """Measure a conversion.

    Args:
        model: the conversion, made from `checkpoint`.
        checkpoint: for what it says of the training.
        data: what is measured on.
        settings: how much is measured.
        listener: told about progress.
        control: a conversion of the same base, trained at causal ratio 1 throughout, for form (c) of the
            future-context gain.

    Raises:
        UserError: the held-out text has nothing that can be predicted.

    """
    started_s = time.perf_counter()
    engine, held_out = model.engine, data.held_out
    may_mask = scorable(held_out, model.tokenizer.bos_id, model.mask_token_id)
    if not may_mask.any():
        raise UserError("the held-out text has no token with another one to its left: give more text")
    holes = _all_holes(model, held_out, settings, listener)
    prompts, truths = _prompts(model, held_out, settings, listener)
    listener.start(
        planned_tokens(held_out, may_mask, holes, prompts, settings, has_control=control is not None)
    )
    try:
        before = _probe(engine, held_out, None), engine.sha256
        base = score_base(engine, held_out, may_mask, settings.batch_size, _teller(listener, "base"))
        likelihoods = _likelihoods(model, data, may_mask, base, settings, _teller(listener, "NELBO"))
        masked = compare_arms(
            _arms(model, control),
            base,
            held_out,
            may_mask,
            n_seeds=settings.seeds,
            n_one_by_one=settings.one_by_one,
            seed=settings.seed,
            batch_size=settings.batch_size,
            on_tokens=_teller(listener, "masked tokens"),
        )
        infilling = [
            compare_infilling(
                model,
                several,
                settings.candidates,
                seed=settings.seed,
                batch_size=settings.batch_size,
                on_tokens=_teller(listener, "infilling"),
            )
            for several in holes
        ]
        texts = []
        if prompts:
            texts = compare_texts(
                model,
                prompts,
                truths,
                settings.generation_config(model.rule.block_size),
                batch_size=settings.batch_size,
                on_tokens=_teller(listener, "writing"),
            )
        check = _check_base(engine, held_out, before, checkpoint)
    finally:
        listener.stop()
    return Evaluation(
        _about(model, checkpoint, data, may_mask, settings),
        math.log(engine.file.V),
        likelihoods,
        masked,
        infilling,
        texts,
        check,
        time.perf_counter() - started_s,
    )


def planned_tokens(
    held_out: TokenBatch,
    may_mask: NDArray[np.bool_],
    holes: list[list[Hole]],
    prompts: list[NDArray[np.int32]],
    settings: EvaluationSettings,
    *,
    has_control: bool,
) -> int:
    """At most how many tokens go through the model; fewer where candidates for a span are equal."""
    n_tokens, n_arms = int(held_out.lengths.sum()), 5 if has_control else 4
    total = n_tokens * (1 + 2 * settings.seeds + len(MASKED_SHARES) * settings.seeds * n_arms)
    for share in MASKED_SHARES:
        n_masked = int(random_masks(may_mask, share, settings.seed, 0).sum())
        total += min(settings.one_by_one, n_masked) * int(held_out.lengths.max())
    total += sum(infilling_tokens(several, settings.candidates) for several in holes)
    return total + (writing_tokens(prompts, settings.length) if prompts else 0)


def _teller(listener: EvaluationListener, part: str) -> OnTokens:
    return lambda n_tokens: listener.advance(part, n_tokens)


def _arms(model: DiffusionModel, control: DiffusionModel | None) -> dict[str, tuple[DiffusionModel, float]]:
    """The arms of the masked measures; each reads at the ratio it stands for."""
    step_0 = model.untrained()
    arms = {
        "converted": (model, model.rule.causal_ratio),
        "converted_causal": (model, 1.0),
        "step_0": (step_0, model.rule.causal_ratio),
        "step_0_causal": (step_0, 1.0),
    }
    if control is not None:
        arms["control"] = (control, 1.0)
    return arms


def _likelihoods(
    model: DiffusionModel,
    data: HeldOutData,
    may_mask: NDArray[np.bool_],
    base: TokenScores,
    settings: EvaluationSettings,
    on_tokens: OnTokens,
) -> dict[str, Likelihood]:
    tokens = data.held_out.tokens
    n_tokens = may_mask.sum(axis=1)
    known, place = np.unique(tokens, return_inverse=True)
    byte_counts = np.array([model.tokenizer.n_bytes(int(token)) for token in known])
    n_bytes = (byte_counts[place.reshape(tokens.shape)] * may_mask).sum(axis=1)
    by_name: dict[str, NDArray[np.float64]] = {
        name: nelbo_totals(
            one,
            data.held_out,
            may_mask,
            n_seeds=settings.seeds,
            seed=settings.seed,
            batch_size=settings.batch_size,
            on_tokens=on_tokens,
        )
        for name, one in (("converted", model), ("step_0", model.untrained()))
    }
    by_name["base"] = base.loss.sum(axis=1, dtype=np.float64)
    by_name["unigram"] = unigram_losses(data.training_counts, tokens, may_mask).sum(axis=1)
    return {name: likelihood(nats, n_tokens, n_bytes) for name, nats in by_name.items()}


def _all_holes(
    model: DiffusionModel, held_out: TokenBatch, settings: EvaluationSettings, listener: EvaluationListener
) -> list[list[Hole]]:
    """The holes of each length; lengths for which no text has room are left out, with a note."""
    if settings.spans == 0:
        return []
    found = []
    for length in SPAN_LENGTHS:
        holes = cut_holes(held_out, length, settings.spans, model.mask_token_id, settings.seed)
        if holes:
            found.append(holes)
        else:
            listener.note(f"no held-out text has room for spans of {length}: they are left out")
    return found


def _prompts(
    model: DiffusionModel, held_out: TokenBatch, settings: EvaluationSettings, listener: EvaluationListener
) -> tuple[list[NDArray[np.int32]], list[NDArray[np.int32]]]:
    """Prompts and how they went on; if no text has room for them none, with a note."""
    if settings.samples == 0:
        return [], []
    prompts = settings.samples, settings.prompt_length, settings.length
    try:
        return cut_prompts(held_out, model.tokenizer, model.mask_token_id, *prompts)
    except UserError as error:
        listener.note(f"no texts are written: {error}")
        return [], []


def _probe(engine: Engine, held_out: TokenBatch, adapter: LoraAdapter | None) -> NDArray[np.float32]:
    """All logits of the base on the beginning of the first sequence."""
    n_tokens = min(16, int(held_out.lengths[0]))
    return engine.logits(Batch(held_out.tokens[:1, :n_tokens]), adapter)


def _check_base(
    engine: Engine,
    held_out: TokenBatch,
    before: tuple[NDArray[np.float32], str],
    checkpoint: DiffusionCheckpoint,
) -> BaseCheck:
    logits, sha256 = before
    return BaseCheck(
        same_logits=_probe(engine, held_out, None).tobytes() == logits.tobytes(),
        same_with_nothing_trained=_probe(engine, held_out, LoraAdapter(1.0, {})).tobytes()
        == logits.tobytes(),
        same_file=file_sha256(engine.file.path) == sha256,
        trained_on_this_file=checkpoint.metadata.base_sha256 == sha256,
        sha256=sha256,
    )


def _about(
    model: DiffusionModel,
    checkpoint: DiffusionCheckpoint,
    data: HeldOutData,
    may_mask: NDArray[np.bool_],
    settings: EvaluationSettings,
) -> dict[str, Any]:
    return {
        "base": model.engine.file.path.name,
        "conversion": checkpoint.metadata.model_dump(exclude={"base_sha256"}),
        "data_sha256": data.fingerprint,
        "held_out_fraction": data.fraction,
        "n_sequences": len(data.held_out),
        "sequence_length": int(data.held_out.tokens.shape[1]),
        "n_tokens_predicted": int(may_mask.sum()),
        "compute": model.engine.compute,
        "settings": settings.model_dump(mode="json"),
    }
