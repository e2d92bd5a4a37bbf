"""A whole conversion run: a GGUF, some text and a config in; an adapter and its evidence out.

`run_conversion` reads top-down: lock the output folder, read base and data, check the engine against
llama.cpp, resume from the last checkpoint or start again, measure, train, save and export, measure again.

The output folder holds adapter.safetensors and adapter.gguf (the exports), metrics.jsonl (one object a step),
config.toml (as resolved), base.json (the base that was read to its end and found sound), evaluation.json (if
it was asked for), checkpoints/ and tokens/ (of the text).

Deliberately not here: what a step does (trainer.py), how it looks on the screen (app/display.py), flags
(app/cli/).
"""

import json
import re
import signal
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any, Protocol

from ggml_diffusion.config.fit import scaled_to_run
from ggml_diffusion.config.settings import ConversionTrainingConfig
from ggml_diffusion.config.toml import to_toml
from ggml_diffusion.durable import replace_text
from ggml_diffusion.engine.interface import Engine
from ggml_diffusion.engine.open import accelerators, open_engine
from ggml_diffusion.errors import UserError
from ggml_diffusion.evaluation.held_out import MaskedScore, Score, as_rows, base_score, masked_scores
from ggml_diffusion.formats.adapter_file import creation_time
from ggml_diffusion.formats.model_check import read_model
from ggml_diffusion.formats.model_file import ModelFile
from ggml_diffusion.formats.safetensors_file import parse_object
from ggml_diffusion.generation.diffusion_model import DiffusionModel
from ggml_diffusion.generation.reading import ReadingRule
from ggml_diffusion.objective.corruption import maskable
from ggml_diffusion.objective.output_rows import Prediction
from ggml_diffusion.regular_file import open_regular
from ggml_diffusion.run_folder import (
    BASE,
    CARD,
    CHECKPOINTS,
    CONFIG,
    EVALUATION,
    EXPORTS,
    METRICS,
    TOKENS,
)
from ggml_diffusion.text.kept_tokens import Reading
from ggml_diffusion.text.loader import TextDataLoader, TokenBatch
from ggml_diffusion.text.tokenizer import Tokenizer
from ggml_diffusion.training.base_watch import BaseWatch
from ggml_diffusion.training.checkpoint import load_latest
from ggml_diffusion.training.earlier_run import bytes_of_run, delete_run, is_half_deleted
from ggml_diffusion.training.identity import check_identity
from ggml_diffusion.training.int8_gate import choose_int8
from ggml_diffusion.training.metrics import MetricsWriter, TrainMetrics
from ggml_diffusion.training.model_card import figures_table, write_card
from ggml_diffusion.training.requirements import (
    StepClock,
    check_disk,
    check_memory,
    context_line,
    disk_line,
    memory_budget,
    memory_line,
    requirements_of,
    time_line,
)
from ggml_diffusion.training.resume import resume_run, roll_back, save_run
from ggml_diffusion.training.run_lock import exclusive
from ggml_diffusion.training.trainer import ConversionTrainer, Diverged

_MAX_VERDICT_BYTES = 1 << 16


class RunListener(Protocol):
    """What a run reports; display.py has one for people."""

    def note(self, text: str) -> None:
        """Something that happened."""

    def warn(self, text: str) -> None:
        """Something that the user should know."""

    def tokenise(self, done_bytes: int, total_bytes: int) -> None:
        """So much of the text has been tokenised: 0 first, all of it last."""

    def start(self, first_step: int, tokens_seen: int, total_steps: int) -> None:
        """The loop begins after `first_step` steps."""

    def step(self, metrics: TrainMetrics) -> None:
        """A step was taken."""

    def stop(self) -> None:
        """The loop has ended."""


@dataclass(frozen=True)
class Evidence:
    """Held-out figures: of the base as it is, before the first step, and after the last.

    Attributes:
        n_sequences: held-out sequences that were measured.
        base: next-token score of the base, causal, on clean text.
        before: masked scores with no adapter, at the final causal ratio.
        after: the same with the conversion.

    """

    n_sequences: int
    base: Score
    before: list[MaskedScore]
    after: list[MaskedScore]


@dataclass(frozen=True)
class Conversion:
    """What a run left behind.

    Attributes:
        output: the folder.
        step: optimizer steps taken, those before a resume included.
        total_steps: steps of the whole run.
        interrupted_by: the signal that ended it early, None if it is complete.
        safetensors, gguf: the exports, None if it was interrupted.
        evidence: None unless it was asked for, and if it was interrupted.

    """

    output: Path
    step: int
    total_steps: int
    interrupted_by: int | None
    safetensors: Path | None = None
    gguf: Path | None = None
    evidence: Evidence | None = None


def run_conversion(
    config: ConversionTrainingConfig, listener: RunListener, *, fresh: bool = False, evaluate_on: int = 0
) -> Conversion:
    """Convert a model, or resume a conversion that was interrupted.

    Args:
        config: with base_model, data and output set.
        listener: told about everything.
        fresh: delete the run that the output folder holds, and start again.
        evaluate_on: held-out sequences to measure before and after; 0 = measure nothing.

    Raises:
        UserError: a file, a setting or the output folder cannot be used; another process is converting into
            the same folder; the folder's run has another base, data or settings; the engine computes the base
            differently from llama.cpp; or the training diverged.

    """
    base_path, output = _paths(config)
    creation_time()  # what the environment says of it is checked before the first step, not at the first save
    base = read_model(base_path)
    watch = BaseWatch(base)
    with exclusive(output, listener.warn):
        config, sentence = scaled_to_run(config)
        if sentence is not None:
            listener.note(sentence)
        config = with_device(config, base, listener)
        with closing(open_base(base, config, _sound_sha256(output))) as model:
            needs = requirements_of(model, config)
            check_memory(needs, config)
            check_disk(needs, output, bytes_of_run(output))
            describe(model, config, listener)
            lines = (memory_line(needs, config), context_line(model, config), disk_line(needs, output))
            for line in filter(None, lines):
                listener.note(line)
            watch.sha256 = (
                model.sha256
            )  # refuses numbers that are not finite before anything is computed with them
            tokenizer = Tokenizer.from_file(base)
            for warning in tokenizer.warnings:
                listener.warn(warning)
            data = training_data(config, tokenizer, listener, output)
            _check_targets(data, config.qlora.prediction, tokenizer.bos_id)
            held_out = _held_out(data, evaluate_on)
            trainer = ConversionTrainer(model, config, data_fingerprint=data.fingerprint, warn=listener.warn)
            listener.note(f"mask token {trainer.mask_token_id}: {trainer.mask_token_reason}")
            listener.note(str(check_identity(model, tokenizer)))
            if fresh or is_half_deleted(output):
                delete_run(output)
            if not _resume(trainer, output, listener) and config.hardware.int8:
                listener.note(str(choose_int8(trainer, data.batch_at(0))))
            data.keep_only_this_text()
            replace_text(output / CONFIG, to_toml(config))
            _write_verdict(output, base, watch.sha256)
            before = None
            if held_out is not None:
                listener.note(f"measuring on {len(held_out)} held-out sequences before the first step")
                before = _measure_before(trainer, tokenizer, held_out)
            signal_number = _train(trainer, data, output, listener, watch)
            if signal_number is not None:
                return Conversion(output, trainer.step_count, config.total_steps, signal_number)
            safetensors, gguf = trainer.export(output)
            evidence = None
            if held_out is not None and before is not None:
                listener.note(f"measuring on {len(held_out)} held-out sequences after the last step")
                evidence = _measure_after(trainer, tokenizer, held_out, *before)
                replace_text(output / EVALUATION, json.dumps(_as_json(evidence), indent=2) + "\n")
            _write_card(output, trainer, evidence, listener)
            return Conversion(
                output, trainer.step_count, config.total_steps, None, safetensors, gguf, evidence
            )


# -- before the loop ---------------------------------------------------------------------------------


def exported_weights(adapter: Path, note: Callable[[str], None] = lambda text: None) -> Path:
    """The file of a conversion that is named by its output folder or by itself.

    Args:
        adapter: where there is no export in a folder, that of the newest whole checkpoint is taken.
        note: told that.

    Raises:
        UserError: a folder holds neither.

    """
    if not adapter.is_dir():
        return adapter
    for name in EXPORTS:
        if (adapter / name).exists():
            return adapter / name
    loaded = load_latest(adapter / CHECKPOINTS)
    if loaded is None:
        raise UserError(f"{adapter}: holds neither {EXPORTS[0]} nor a checkpoint")
    for warning in loaded.warnings:
        note(warning)
    note(
        f"{adapter}: this run is not finished; the conversion is that of its checkpoint of step "
        f"{loaded.state.step}"
    )
    return loaded.folder / EXPORTS[0]


def base_and_data(config: ConversionTrainingConfig) -> Path:
    """The base's file, of a config that names one, and data."""
    if config.base_model is None:
        raise UserError("which model? name a GGUF file")
    if not config.data:
        raise UserError("which text? give --data: a text file, .jsonl, .parquet or a folder of them")
    return Path(config.base_model)


def _paths(config: ConversionTrainingConfig) -> tuple[Path, Path]:
    base = base_and_data(config)
    if config.output is None:
        raise UserError("where to? give --output: a folder for the run")
    return base, Path(config.output)


def open_base(base: ModelFile, config: ConversionTrainingConfig, sound_sha256: str | None = None) -> Engine:
    """The engine of a run; the caller closes it.

    Raises:
        UserError: the file is damaged, or its context is shorter than the sequences.

    """
    if config.sequence_length > base.context_length:
        raise UserError(
            f"sequence_length {config.sequence_length} is longer than the context of {base.path}, "
            f"{base.context_length} tokens"
        )
    hardware = config.hardware
    return open_engine(
        base,
        hardware.num_threads,
        device=hardware.device,
        compute=hardware.compute,
        use_simd=hardware.use_simd,
        memory_budget=memory_budget(base, config),
        sound_sha256=sound_sha256,
    )


def with_device(
    config: ConversionTrainingConfig, base: ModelFile, listener: RunListener
) -> ConversionTrainingConfig:
    """The config with the device that `auto` is: the first that computes the base as llama.cpp does."""
    if config.hardware.device != "auto":
        return config
    tokenizer = Tokenizer.from_file(base)
    for kind in accelerators():
        tried = _on_device(config, kind)
        try:
            with closing(open_base(base, tried)) as model:
                check_identity(model, tokenizer)
        except UserError as error:
            listener.warn(f"device {kind} is left out: {error}")
            continue
        listener.note(f"device: {kind}")
        return tried
    listener.note("device: cpu")
    return _on_device(config, "cpu")


def _on_device(config: ConversionTrainingConfig, kind: str) -> ConversionTrainingConfig:
    hardware = config.hardware.model_copy(update={"device": kind})
    return config.model_copy(update={"hardware": hardware})


def training_data(
    config: ConversionTrainingConfig,
    tokenizer: Tokenizer,
    listener: RunListener,
    output: Path | None = None,
) -> TextDataLoader:
    """The text to train on; one batch is what one optimizer step takes. Its tokens are kept in `output`."""
    data = TextDataLoader(
        config.data,
        tokenizer,
        config.sequence_length,
        config.batch_size * config.gradient_accumulation,
        config.seed,
        split="train",
        held_out_fraction=config.held_out_fraction,
        include=config.include,
        reading=Reading(
            None if output is None else output / TOKENS,
            keep=output is not None,
            strict=config.strict,
            n_processes=config.hardware.num_threads,
            warn=listener.warn,
            on_progress=listener.tokenise,
        ),
    )
    listener.note(
        f"data: {data.n_documents} documents, {data.n_tokens} training tokens in {data.n_sequences} "
        f"sequences of {config.sequence_length}"
    )
    if data.n_refused:
        n_all = data.n_documents + data.n_refused
        listener.warn(
            f"{data.n_refused} of {n_all} documents cannot be used and are left out, the first ones:"
        )
        for refusal in data.refusals:
            listener.note(f"  {refusal}")
    if data.n_skipped:
        listener.warn(f"{data.n_skipped} documents without text were left out")
    if data.n_blank:
        listener.warn(f"{data.n_blank} documents hold nothing but white space or a single character")
    if data.n_too_long:
        listener.warn(f"{data.n_too_long} examples whose prompt alone fills a sequence were left out")
    return data


def _check_targets(data: TextDataLoader, prediction: Prediction, bos_id: int | None) -> None:
    """Refuse a text of which nothing can be masked; in any other one a target is found at once."""
    for number in range(len(data)):
        batch = data.batch_at(number)
        targets = maskable(batch.tokens, batch.document_ids, batch.lengths, prediction, bos_id)
        if (targets if batch.maskable is None else targets & batch.maskable).any():
            return
    raise UserError(
        "there is nothing to learn in this text: no document has a token that could be predicted from "
        "another, and no prompt a response"
    )


def _held_out(data: TextDataLoader, n_sequences: int) -> TokenBatch | None:
    """The sequences to measure on, the same ones whatever the run's seed is."""
    if n_sequences == 0:
        return None
    if data.held_out_fraction == 0.0 and not data.has_own_split:
        raise UserError("held_out_fraction is 0: there is no held-out text to evaluate on")
    return data.with_split("held_out", n_sequences, seed=0).batch_at(0)


def describe(model: Engine, config: ConversionTrainingConfig, listener: RunListener) -> None:
    """Say what the base is, and what of the settings does not fit it well."""
    base, qlora = model.file, config.qlora
    listener.note(f"base: {model.description}")
    bits = _weight_bits(base)
    if bits != qlora.quantization_bits:
        listener.warn(
            f"quantization_bits is {qlora.quantization_bits}, but the layers of {base.path} have {bits} bits "
            f"a weight"
        )
    sizes = {module.value: min(module.weight_shape(base)) for module in qlora.target_modules}
    if too_small := {name: size for name, size in sizes.items() if size < qlora.rank}:
        names = ", ".join(f"{name} ({size})" for name, size in too_small.items())
        listener.warn(
            f"rank {qlora.rank} is more than the smaller dimension of {names}: it adds nothing there"
        )


def _write_verdict(output: Path, base: ModelFile, sha256: str) -> None:
    """Say beside the run which base was read to its end and found sound."""
    verdict = {"file": base.path.name, "sha256": sha256, "all_finite": True}
    replace_text(output / BASE, json.dumps(verdict, indent=2) + "\n")


def _sound_sha256(output: Path) -> str | None:
    """The base that `_write_verdict` spoke of, so that a resumed run need not look at its numbers again."""
    try:
        with open_regular(output / BASE) as file:
            verdict = parse_object(output / BASE, file.read(_MAX_VERDICT_BYTES), "its content")
    except (UserError, OSError):
        return None
    sha256 = verdict.get("sha256")
    return sha256 if isinstance(sha256, str) and verdict.get("all_finite") is True else None


def _weight_bits(base: ModelFile) -> int:
    """Bits a weight of the type that most bytes of the layers' matrices have, by its name: Q4_K has 4."""
    bytes_of_type: Counter[str] = Counter()
    for name, tensor in base.tensors.items():
        if name.startswith("blk.") and len(tensor.shape) == 2:
            bytes_of_type[tensor.type_name] += tensor.n_bytes
    digits = re.search(r"\d+", bytes_of_type.most_common(1)[0][0])
    assert digits is not None
    return int(digits[0])


def _resume(trainer: ConversionTrainer, output: Path, listener: RunListener) -> bool:
    try:
        resumed = resume_run(trainer, output / CHECKPOINTS)
    except UserError as error:
        raise UserError(f"{error}; resume it with what it began with, or start anew with --fresh") from None
    if resumed:
        listener.note(
            f"resuming at step {trainer.step_count} of {trainer.config.total_steps}; --fresh would start anew"
        )
    return resumed


# -- the loop ----------------------------------------------------------------------------------------


def _train(
    trainer: ConversionTrainer,
    data: TextDataLoader,
    output: Path,
    listener: RunListener,
    watch: BaseWatch,
) -> int | None:
    """Take the steps that are left, and save; returns the signal that cut it short, if one did."""
    total_steps, checkpoint_every = trainer.config.total_steps, trainer.config.checkpoint_every
    if trainer.step_count >= total_steps:
        listener.note(f"all {total_steps} steps are done")
        return None
    with (
        _stop_on_signals(listener) as received,
        MetricsWriter(output / METRICS, trainer.step_count, listener.warn) as writer,
    ):
        clock, saved_step = StepClock(), -1
        listener.start(trainer.step_count, trainer.tokens_seen, total_steps)
        try:
            while trainer.step_count < total_steps and not received:
                try:
                    with clock:
                        metrics = trainer.train_step(data.batch_at(trainer.step_count))
                except Diverged as cause:
                    listener.stop()
                    watch.check()  # other weights than those it began with look like it, too
                    roll_back(trainer, output / CHECKPOINTS, cause)
                    writer.rewind(trainer.step_count)
                    listener.start(trainer.step_count, trainer.tokens_seen, total_steps)
                    continue
                writer.write(metrics)
                listener.step(metrics)
                if clock.has_just_timed and trainer.step_count < total_steps:
                    listener.note(time_line(clock.step_s, trainer.step_count, total_steps))
                is_due = bool(checkpoint_every) and trainer.step_count % checkpoint_every == 0
                if is_due and not trainer.is_in_doubt:
                    _save(trainer, output, writer, watch)
                    saved_step = trainer.step_count
        finally:
            listener.stop()
        if saved_step != trainer.step_count:
            _save(trainer, output, writer, watch)
        return received[0] if received and trainer.step_count < total_steps else None


def _save(trainer: ConversionTrainer, output: Path, writer: MetricsWriter, watch: BaseWatch) -> None:
    """Save a checkpoint, and see to it that the metrics of its steps are on the disk."""
    watch.check()
    try:
        writer.sync()
    finally:
        save_run(trainer, output / CHECKPOINTS)


@contextmanager
def _stop_on_signals(listener: RunListener) -> Iterator[list[int]]:
    """Collect the first signal to stop instead of dying of it; a second one kills at once.

    A terminal that closes is such a signal, unless it is ignored, as nohup has it. Only Python's main thread
    can take signals: elsewhere nothing is collected.
    """
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def stop(number: int, frame: FrameType | None) -> None:
        received.append(number)
        for each in before:
            signal.signal(each, signal.SIG_DFL)
        listener.note("stopping after this step; once more stops at once")

    names = ("SIGINT", "SIGTERM", "SIGHUP")  # the last is not everywhere
    signals = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {each: signal.getsignal(each) for each in signals if signal.getsignal(each) != signal.SIG_IGN}
    for each in before:
        signal.signal(each, stop)
    try:
        yield received
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


# -- evidence ----------------------------------------------------------------------------------------


def _measure_before(
    trainer: ConversionTrainer, tokenizer: Tokenizer, held_out: TokenBatch
) -> tuple[Score, list[MaskedScore]]:
    """The base by itself, and read as a diffusion model with nothing trained."""
    rule_now = ReadingRule.of_checkpoint(trainer.checkpoint())
    rule = replace(rule_now, causal_ratio=trainer.config.qlora.mask_annealing.final_causal_ratio)
    model = DiffusionModel(trainer.model, trainer.adapter, tokenizer, rule).untrained()
    batch_size = trainer.config.batch_size
    return base_score(trainer.model, held_out, batch_size), masked_scores(model, held_out, batch_size)


def _measure_after(
    trainer: ConversionTrainer,
    tokenizer: Tokenizer,
    held_out: TokenBatch,
    base: Score,
    before: list[MaskedScore],
) -> Evidence:
    converted = DiffusionModel.from_checkpoint(trainer.model, tokenizer, trainer.checkpoint())
    after = masked_scores(converted, held_out, trainer.config.batch_size)
    return Evidence(len(held_out), base, before, after)


def _write_card(
    output: Path, trainer: ConversionTrainer, evidence: Evidence | None, listener: RunListener
) -> None:
    """The model card, with the figures if there are any."""
    figures = None
    if evidence is not None:
        figures = figures_table(evidence.n_sequences, evidence.base, evidence.before, evidence.after)
    if not write_card(output, trainer.checkpoint(), figures):
        listener.note(f"{output / CARD} is not a card of ours and stays as it is")


def _as_json(evidence: Evidence) -> dict[str, Any]:
    return {
        "n_sequences": evidence.n_sequences,
        "base_next_token": asdict(evidence.base),
        "before": as_rows(evidence.before),
        "after": as_rows(evidence.after),
    }
