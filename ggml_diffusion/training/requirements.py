"""What a run needs of memory and disk, known before its first step, and the refusal where there is less; and
of time, once two steps were timed.

Memory and disk are arithmetic on the header, the settings and the engine's plan of a step. Deliberately not
here: the plan itself (engine/memory_plan.py), what the machine has (machine.py).
"""

import math
import time
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

from ggml_diffusion.config.settings import ConversionTrainingConfig
from ggml_diffusion.engine.interface import Engine, StepDescription
from ggml_diffusion.errors import UserError
from ggml_diffusion.formats.model_file import ModelFile
from ggml_diffusion.machine import disk_free, memory_available, memory_limit
from ggml_diffusion.text.sources import STANDARD_INPUT, find_sources
from ggml_diffusion.text.token_store import token_bytes
from ggml_diffusion.training.checkpoint import KEPT
from ggml_diffusion.training.trainer import trained_shapes
from ggml_diffusion.units import duration, in_bytes

# float32 vectors of all parameters: parameters, gradients and two moments are kept; the three that a
# checkpoint has are copied while it is written.
_VECTORS_IN_MEMORY, _VECTORS_IN_STATE = 4 + 3, 3
# Arrays of a step by token, the loader's and the noise's among them, with int64 and float64 temporaries.
_BATCH_BYTES_A_TOKEN = 64
_METRICS_BYTES_A_STEP = 256
# A token is some four bytes of English and three of code; gzip makes a third of text.
_TEXT_BYTES_A_TOKEN, _COMPRESSION = 4, 3
# Header, settings and manifest of a file, and its last block; its header names each tensor.
_FILE_BYTES, _HEADER_BYTES_A_TENSOR = 16 << 10, 128
TIMED_STEPS = 2


@dataclass(frozen=True)
class Requirements:
    """Bytes of memory and disk.

    Attributes:
        model: the mapped file; in memory, since every step reads all of it.
        state: what is trained, with gradients, moments and the copy that a checkpoint is written from.
        batches: of an optimizer step.
        step: the engine's plan of a step.
        checkpoint: one of those that are kept; a further one is there while it is written.
        exports: both adapters, and the copy that replaces one of them.
        metrics: a line a step.
        tokens: of the text, kept in the run's folder; a guess from the size of its files.

    """

    model: int
    state: int
    batches: int
    step: StepDescription
    checkpoint: int
    exports: int
    metrics: int
    tokens: int

    @property
    def memory(self) -> int:
        """All that is in memory at once."""
        return self.model + self.state + self.batches + self.step.memory_bytes

    @property
    def disk(self) -> int:
        """All that is on the disk at once."""
        return (KEPT + 1) * self.checkpoint + self.exports + self.metrics + self.tokens


def requirements_of(engine: Engine, config: ConversionTrainingConfig) -> Requirements:
    """What a run of these settings needs."""
    base = engine.file
    step = engine.describe_step(
        config.batch_size,
        config.sequence_length,
        config.qlora.rank,
        teacher=config.distillation_weight > 0.0,
    )
    n_tensors, n_parameters = _trained(base, config)
    adapter = 4 * n_parameters + _HEADER_BYTES_A_TENSOR * n_tensors + _FILE_BYTES
    # Where the output matrix is its own, the mask embedding is a pair of the size of the vocabulary as well.
    gguf = adapter + (0 if base.tied_head else 4 * (base.V + base.C))
    return Requirements(
        model=_model_bytes(base),
        state=_state_bytes(base, config),
        batches=_batch_bytes(config),
        step=step,
        checkpoint=4 * _VECTORS_IN_STATE * n_parameters + adapter + 2 * _FILE_BYTES,
        exports=adapter + 2 * gguf,
        metrics=config.total_steps * _METRICS_BYTES_A_STEP,
        tokens=_token_bytes(base, config),
    )


def memory_budget(base: ModelFile, config: ConversionTrainingConfig) -> int | None:
    """Bytes for a training step: as set, else half of the machine's memory, or what the rest of the run
    leaves; None on a device of its own, which knows what it has.

    It depends on the size of the machine, and not on what else is running: another budget may round sums in
    another order, and a run must be resumed with the same bits.
    """
    if config.hardware.memory_mib is not None:
        return config.hardware.memory_mib << 20
    if config.hardware.device != "cpu":
        return None
    limit = memory_limit()
    rest = limit - _model_bytes(base) - _state_bytes(base, config) - _batch_bytes(config)
    return max(0, min(limit // 2, rest))


def memory_line(needs: Requirements, config: ConversionTrainingConfig) -> str:
    """What of memory is needed for what, beside what is available."""
    recomputed = f", {needs.step.recomputed} computed again" if needs.step.recomputed else ""
    return (
        f"memory: {in_bytes(needs.memory)} of {in_bytes(memory_available())} available: {_parts(needs)}; "
        f"{needs.step.sequences} of {config.batch_size} sequences at a time{recomputed}"
    )


def context_line(engine: Engine, config: ConversionTrainingConfig) -> str | None:
    """What a frozen context saves of a step's memory, and what an attention sink rules out; None without.

    The plan of a step is for a text that is all masked, which comes up; half of it is usual. A margin takes
    in what stands between scattered masks, so that only holes are left to save.
    """
    has_margin, holes = config.margin > 0, config.holes
    if config.attention_sink:
        return (
            "attention sink: the first token of a text sees itself alone, as in the base; a conversion that "
            "llama-diffusion-cli can run needs --no-attention-sink"
        )
    if config.qlora.context != "frozen" or (has_margin and holes.share == 0.0):
        return None
    base, T = engine.file, config.sequence_length
    n_masked, what = max(1, T // 2), "a text of which half is masked"
    if has_margin:
        n_masked, what = min(T, holes.longest), f"texts with a hole of {holes.longest}"
    n_noisy = min(T, n_masked + 2 * config.margin)
    needs = engine.describe_step(config.batch_size, n_noisy, config.qlora.rank)
    kept = 4 * 2 * base.L * base.G * base.D * needs.sequences * (T - n_masked)
    return (
        "frozen context: tokens that stand are computed without gradients and keep their keys and values "
        f"alone, so that a step on {what} takes about {in_bytes(needs.memory_bytes + kept)}"
    )


def disk_line(needs: Requirements, output: Path) -> str:
    """What of disk is needed for what, beside what is free."""
    try:
        free = f"{in_bytes(disk_free(output))} free"
    except OSError:
        free = "an unknown number free"
    return (
        f"disk: {in_bytes(needs.disk)} of {free}: {KEPT + 1} checkpoints of {in_bytes(needs.checkpoint)}, "
        f"exports {in_bytes(needs.exports)}, metrics {in_bytes(needs.metrics)}, tokens of the text about "
        f"{in_bytes(needs.tokens)}"
    )


def check_memory(needs: Requirements, config: ConversionTrainingConfig) -> None:
    """Refuse a run that memory is too small for.

    Raises:
        UserError: what is needed for what, what there is, and what would need less.

    """
    memory_mib, step = config.hardware.memory_mib, needs.step
    if memory_mib is not None and step.memory_bytes > memory_mib << 20:
        raise UserError(
            f"memory_mib is {memory_mib}, but a training step needs {-(-step.least_bytes >> 20)} with one "
            f"sequence of {config.sequence_length} tokens at a time and layers computed again: set it to "
            f"that or more, or lower sequence_length"
        )
    available = memory_available()
    on_device = config.hardware.device != "cpu"  # a step then takes the device's memory, in parts that fit
    if needs.memory - (step.memory_bytes if on_device else 0) > available:
        raise UserError(
            f"not enough memory: the run needs {in_bytes(needs.memory)} ({_parts(needs)}), and "
            f"{in_bytes(available)} of {in_bytes(memory_limit())} are available: {smaller(needs, available)}"
        )


def check_disk(needs: Requirements, output: Path, already: int) -> None:
    """Refuse a run whose checkpoints and exports the disk has no room for.

    Args:
        needs: of the run.
        output: its folder.
        already: bytes of what it will replace there.

    Raises:
        UserError: what is needed and what there is.

    """
    try:
        free = disk_free(output)
    except OSError:
        return  # no reason to believe that there is too little
    if needs.disk > free + already:
        raise UserError(
            f"{output}: not enough disk: the run needs {in_bytes(needs.disk)} ({KEPT + 1} checkpoints of "
            f"{in_bytes(needs.checkpoint)}, exports {in_bytes(needs.exports)}, metrics "
            f"{in_bytes(needs.metrics)}, tokens of the text about {in_bytes(needs.tokens)}), and "
            f"{in_bytes(free)} are free: choose another disk, or {_less_disk(needs)}"
        )


class StepClock:
    """Times the first steps of a run; a context manager around each step.

    Attributes:
        step_s: seconds of the quickest so far; the first one also reads the model from the disk.
        has_just_timed: whether the step before was the last that is timed.

    """

    def __init__(self) -> None:
        self.step_s = math.inf
        self._n_steps = 0

    @property
    def has_just_timed(self) -> bool:
        """Whether the estimate can be made now."""
        return self._n_steps == TIMED_STEPS

    def __enter__(self) -> None:
        self._started_s = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._n_steps += 1
        if self._n_steps <= TIMED_STEPS:
            self.step_s = min(self.step_s, time.perf_counter() - self._started_s)


def time_line(step_s: float, step: int, total_steps: int, now: datetime | None = None) -> str:
    """How long the steps after `step` will take, and when they will be done.

    Args:
        step_s: seconds a step.
        step: steps taken.
        total_steps: of the run.
        now: None = the time that it is.

    """
    left = total_steps - step
    try:
        end = ((now or datetime.now().astimezone()) + timedelta(seconds=step_s * left)).strftime(
            "%Y-%m-%d %H:%M"
        )
    except (OverflowError, ValueError):
        end = "never"
    return f"time: {step_s:.3g} s a step, {left} steps in {duration(step_s * left)}, done about {end}"


def smaller(needs: Requirements, available: int) -> str:
    """What would need less memory, in words: about the largest part of it that can be changed."""
    step_mib = (available - needs.memory + needs.step.memory_bytes) >> 20
    if step_mib << 20 >= needs.step.least_bytes:
        return f"set --memory-mib {step_mib}, which computes more a second time"
    advice = (
        (needs.state, "lower the rank, or choose fewer target modules"),
        (needs.batches, "lower batch_size or gradient_accumulation"),
        (needs.step.least_bytes, "lower sequence_length"),
        (needs.model, "take a smaller model, or one of fewer bits a weight"),
    )
    return max(advice)[1]


def _parts(needs: Requirements) -> str:
    return (
        f"model {in_bytes(needs.model)}, LoRA state {in_bytes(needs.state)}, batches "
        f"{in_bytes(needs.batches)}, a step {in_bytes(needs.step.memory_bytes)}"
    )


def _less_disk(needs: Requirements) -> str:
    """What would need less of the disk."""
    if 2 * needs.metrics > needs.disk:
        return "fewer steps"
    return "less text" if 2 * needs.tokens > needs.disk else "lower the rank"


def _token_bytes(base: ModelFile, config: ConversionTrainingConfig) -> int:
    """The tokens of the files that can be told the size of before they are read."""
    paths = [path for path in config.data if path != STANDARD_INPUT]
    sources = find_sources(paths, config.include)
    n_bytes = 0
    for file in (*sources.files, *sources.held_out):
        n_bytes += file.path.stat().st_size * (_COMPRESSION if file.is_compressed else 1)
    return n_bytes // _TEXT_BYTES_A_TOKEN * token_bytes(base.V)


def _trained(base: ModelFile, config: ConversionTrainingConfig) -> tuple[int, int]:
    """Number of tensors and of parameters."""
    shapes = trained_shapes(base, config.qlora).values()
    return len(shapes), sum(math.prod(shape) for shape in shapes)


def _model_bytes(base: ModelFile) -> int:
    return sum(tensor.n_bytes for tensor in base.tensors.values())


def _state_bytes(base: ModelFile, config: ConversionTrainingConfig) -> int:
    return 4 * _VECTORS_IN_MEMORY * _trained(base, config)[1]


def _batch_bytes(config: ConversionTrainingConfig) -> int:
    sequences = config.batch_size * config.gradient_accumulation
    copies = 2 if config.noise_schedule.complementary else 1
    copies *= config.holes.draws if config.holes.share > 0.0 else 1
    return sequences * copies * config.sequence_length * _BATCH_BYTES_A_TOKEN
