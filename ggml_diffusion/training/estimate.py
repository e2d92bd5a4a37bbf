"""What a run would need, without running it: memory and disk by arithmetic, time by two real steps.

Writes nothing. Deliberately not here: the figures themselves (requirements.py).
"""

from contextlib import closing
from pathlib import Path

from ggml_diffusion.config.fit import scaled_to_run
from ggml_diffusion.config.settings import ConversionTrainingConfig
from ggml_diffusion.engine.interface import Engine
from ggml_diffusion.formats.model_check import read_model
from ggml_diffusion.machine import processors
from ggml_diffusion.text.tokenizer import Tokenizer
from ggml_diffusion.training.earlier_run import bytes_of_run
from ggml_diffusion.training.int8_gate import choose_int8
from ggml_diffusion.training.requirements import (
    TIMED_STEPS,
    Requirements,
    StepClock,
    check_disk,
    check_memory,
    context_line,
    disk_line,
    memory_line,
    requirements_of,
    time_line,
)
from ggml_diffusion.training.run import (
    RunListener,
    base_and_data,
    describe,
    open_base,
    training_data,
    with_device,
)
from ggml_diffusion.training.trainer import ConversionTrainer
from ggml_diffusion.units import duration, in_bytes


def estimate_run(config: ConversionTrainingConfig, listener: RunListener) -> None:
    """Say what a run of these settings would need of memory, disk and time, and what would need less.

    Args:
        config: with base_model and data set; the disk is that of output, or of the current folder.
        listener: told the figures.

    Raises:
        UserError: a file or a setting cannot be used, or the run would be refused: memory or disk is too
            small.

    """
    base = read_model(base_and_data(config))
    config, _ = scaled_to_run(config)
    config = with_device(config, base, listener)
    output = Path(config.output or ".")
    with closing(open_base(base, config)) as model:
        describe(model, config, listener)
        needs = requirements_of(model, config)
        lines = (memory_line(needs, config), context_line(model, config), disk_line(needs, output))
        for line in filter(None, lines):
            listener.note(line)
        check_memory(needs, config)
        check_disk(needs, output, bytes_of_run(output) if config.output else 0)
        data = training_data(config, Tokenizer.from_file(base), listener)
        trainer = ConversionTrainer(model, config, warn=listener.warn)
        if config.hardware.int8:
            choose_int8(trainer, data.batch_at(0))
        clock = StepClock()
        for step in range(min(TIMED_STEPS, config.total_steps)):
            with clock:
                trainer.train_step(data.batch_at(step))
        listener.note(time_line(clock.step_s, 0, config.total_steps))
        for way in _ways_to_less(needs, config, model, clock.step_s):
            listener.note(way)


def _ways_to_less(
    needs: Requirements, config: ConversionTrainingConfig, model: Engine, step_s: float
) -> list[str]:
    """What would make the run smaller or faster, a line each, with what it would save where that is known."""
    ways, step, rank = [], needs.step, config.qlora.rank
    if step.least_bytes < step.memory_bytes:
        ways.append(
            f"smaller: --memory-mib {-(-step.least_bytes >> 20)} is enough for a step, instead of "
            f"{in_bytes(step.memory_bytes)}; layers are then computed again, about 1.4 times the time"
        )
    if rank > 1:
        ways.append(
            f"smaller: --rank {rank // 2} takes {in_bytes(needs.state // 2)} of memory and "
            f"{in_bytes((needs.disk - needs.metrics) // 2)} of disk less"
        )
    if step.recomputed or step.sequences < config.batch_size:
        ways.append(
            "faster: a larger --memory-mib, so that nothing is computed again and sequences go together"
        )
    if model.n_threads < processors():
        ways.append(f"faster: --threads {processors()}, as many as there are processors")
    if model.has_int8 and not config.hardware.int8:
        ways.append("faster: int8 = true, as far as the gradient allows")
    if config.noise_schedule.complementary:
        ways.append("faster: complementary = false, half of the work a step")
    if config.total_steps > 1:
        fewer = max(1, config.total_steps // 4)
        ways.append(
            f"faster: --steps {fewer}, with annealing and warm-up to match, takes {duration(fewer * step_s)}"
        )
    return ways
