"""What a run needs, against what it takes; and the refusals where there is less."""

import gzip
import os
import random
from datetime import datetime
from types import SimpleNamespace

import pytest
from conversions import refusal
from trainers import SMALL, make_trainer

from ggml_diffusion.config.toml import load_config
from ggml_diffusion.engine.cpu.q4_model import Q4Model
from ggml_diffusion.formats.model_check import read_model
from ggml_diffusion.training import requirements
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
from ggml_diffusion.training.resume import save_run
from ggml_diffusion.units import in_bytes

MIB = 1 << 20


@pytest.fixture(scope="module")
def path(tiny_model):
    return tiny_model(L=2, type="Q4_0")


@pytest.fixture
def machine(monkeypatch):
    """A machine of 1000 MiB, all available, with as much disk; the test may change it."""
    sizes = SimpleNamespace(limit=1000 * MIB, available=1000 * MIB, free=1000 * MIB)
    monkeypatch.setattr(requirements, "memory_limit", lambda: sizes.limit)
    monkeypatch.setattr(requirements, "memory_available", lambda: sizes.available)
    monkeypatch.setattr(requirements, "disk_free", lambda folder: sizes.free)
    return sizes


def small(**changes):
    return load_config(
        overrides={**SMALL, **{key.replace("__", "."): value for key, value in changes.items()}}
    )


def needs_of(path, config):
    base = read_model(path)
    with Q4Model(base, 1, memory_budget=memory_budget(base, config)) as model:
        return requirements_of(model, config)


def test_the_size_of_checkpoints_and_exports_is_foretold(path, tmp_path):
    config = small(model__qlora_rank=16)
    with Q4Model.from_gguf(path, 1) as model:
        needs = requirements_of(model, config)
        trainer = make_trainer(model, model__qlora_rank=16)
        saved = save_run(trainer, tmp_path / "checkpoints")
        exports = trainer.export(tmp_path)
    checkpoint = sum(file.stat().st_size for file in saved.iterdir())
    both, larger = sum(file.stat().st_size for file in exports), max(file.stat().st_size for file in exports)
    # Too little would be found out in the middle of a run; much more would refuse what there is room for.
    assert checkpoint <= needs.checkpoint <= checkpoint + 64 * 1024
    assert both + larger <= needs.exports <= both + larger + 128 * 1024


def test_a_frozen_context_says_what_a_step_takes_where_half_is_masked(path):
    sizes = {"training__sequence_length": 64, "training__batch_size": 4, "model__context": "frozen"}
    config = small(**sizes, model__margin=0)
    holes = small(**sizes, model__margin=2, holes__share=0.5, holes__longest=8)
    with Q4Model.from_gguf(path, 1) as model:
        whole, half, hole = (model.describe_step(4, n, config.qlora.rank).memory_bytes for n in (64, 32, 12))
        line = context_line(model, config)
        assert context_line(model, small()) is None
        assert "--no-attention-sink" in context_line(model, small(model__attention_sink=True))
        assert context_line(model, small(**sizes, model__margin=2)) is None  # all is in sight of a mask
        of_holes = context_line(model, holes)
    kept = 4 * 2 * 2 * 2 * 16 * 4  # float32, keys and values, layers, heads, head size, sequences
    assert half < half + 32 * kept < whole
    assert line.endswith(f"half is masked takes about {in_bytes(half + 32 * kept)}")
    assert of_holes.endswith(f"texts with a hole of 8 takes about {in_bytes(hole + 56 * kept)}")


def test_the_tokens_of_a_large_text_count(path, machine, tmp_path):
    (tmp_path / "a.txt").write_text("The miller told his children of the mill. " * 50_000)
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress(random.Random(0).randbytes(600_000)))
    config = small().model_copy(update={"data": (str(tmp_path), "-")})
    needs = needs_of(path, config)
    assert 1_050_000 <= needs.tokens - 900_000 <= 1_060_000  # two bytes for four of text
    assert needs.disk - needs.tokens == needs_of(path, small()).disk
    machine.free = needs.disk - 1
    message = refusal(lambda: check_disk(needs, tmp_path, 0))
    assert "tokens of the text about 1905 KiB" in message and message.endswith("or less text")
    machine.free = needs.disk
    check_disk(needs, tmp_path, 0)


@pytest.mark.parametrize(
    ("change", "part"),
    [
        ({"model__qlora_rank": 10_000_000}, "lower the rank"),
        ({"model__qlora_rank": 10**18}, "lower the rank"),
        ({"training__batch_size": 10**9}, "lower batch_size"),
        ({"training__gradient_accumulation": 10**15}, "lower batch_size"),
        ({"training__sequence_length": 2 * 10**9}, "lower sequence_length"),
        ({"time_embedding__dim": 10**12}, "lower the rank"),
    ],
)
def test_a_run_that_needs_more_memory_than_there_is_is_refused_with_numbers(path, machine, change, part):
    config = small(**change)
    message = refusal(lambda: check_memory(needs_of(path, config), config))
    assert message.startswith("not enough memory: the run needs ")
    assert "1000 MiB of 1000 MiB are available" in message
    assert part in message


def test_what_is_taken_by_others_is_not_available(path, machine):
    config = small()
    check_memory(needs_of(path, config), config)
    machine.available = 1 << 10
    assert "1024 bytes of 1000 MiB are available" in refusal(
        lambda: check_memory(needs_of(path, config), config)
    )


def test_a_step_that_would_fit_if_it_computed_more_again_is_told_the_setting(path, machine):
    config = small(training__batch_size=64, training__sequence_length=64)
    needs = needs_of(path, config)
    machine.available = needs.memory - 1
    message = refusal(lambda: check_memory(needs, config))
    mib = int(message.partition("--memory-mib ")[2].partition(",")[0])
    tighter = small(training__batch_size=64, training__sequence_length=64, hardware__memory_mib=mib)
    check_memory(needs_of(path, tighter), tighter)


def test_a_budget_that_no_step_fits_is_refused_with_one_that_does(path, machine):
    config = small(training__sequence_length=200, hardware__memory_mib=1)
    message = refusal(lambda: check_memory(needs_of(path, config), config))
    assert message.startswith("memory_mib is 1, but a training step needs ")
    mib = int(message.partition("needs ")[2].split()[0])
    enough = small(training__sequence_length=200, hardware__memory_mib=mib)
    check_memory(needs_of(path, enough), enough)
    too_little = small(training__sequence_length=200, hardware__memory_mib=mib - 1)
    refusal(lambda: check_memory(needs_of(path, too_little), too_little))


def test_the_budget_is_half_of_the_machine_or_what_the_rest_leaves(path, machine):
    base = read_model(path)
    assert memory_budget(base, small()) == 500 * MIB
    assert memory_budget(base, small(hardware__memory_mib=7)) == 7 * MIB
    machine.available = 0  # what others take now changes nothing: a run is resumed with the same bits
    assert memory_budget(base, small()) == 500 * MIB
    large = small(model__qlora_rank=30_000)
    left = 1000 * MIB - requirements._state_bytes(base, large)
    assert 0 < left < 500 * MIB
    assert left - MIB < memory_budget(base, large) < left
    assert memory_budget(base, small(model__qlora_rank=10_000_000)) == 0


@pytest.mark.parametrize("already", [0, 20 * 1024])
def test_a_disk_without_room_for_the_checkpoints_is_refused_with_numbers(path, machine, tmp_path, already):
    needs = needs_of(path, small())
    machine.free = 64 * 1024
    message = refusal(lambda: check_disk(needs, tmp_path, already))
    assert message.startswith(f"{tmp_path}: not enough disk: the run needs ")
    assert "64 KiB are free" in message
    assert message.endswith("lower the rank")


def test_a_run_of_so_many_steps_that_their_metrics_fill_the_disk_is_refused(path, machine, tmp_path):
    needs = needs_of(path, small(training__total_steps=10**12))
    assert refusal(lambda: check_disk(needs, tmp_path, 0)).endswith("or fewer steps")


def test_what_a_run_will_replace_counts_as_free(path, machine, tmp_path):
    needs = needs_of(path, small())
    machine.free = 0
    check_disk(needs, tmp_path, needs.disk)
    refusal(lambda: check_disk(needs, tmp_path, needs.disk - 1))


def test_a_disk_that_does_not_say_what_is_free_is_believed(path, tmp_path, monkeypatch):
    def unknown(folder):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(requirements, "disk_free", unknown)
    needs = needs_of(path, small(model__qlora_rank=8))
    check_disk(needs, tmp_path, 0)
    assert "unknown" in disk_line(needs, tmp_path)


def test_the_lines_name_all_that_is_needed(path, machine, tmp_path):
    config = small()
    needs = needs_of(path, config)
    line = memory_line(needs, config)
    for part in ("of 1000 MiB available", "model ", "LoRA state ", "batches ", "a step ", "2 of 2 sequences"):
        assert part in line
    for part in ("of 1000 MiB free", "3 checkpoints of ", "exports ", "metrics "):
        assert part in disk_line(needs, tmp_path)


def test_time_is_told_with_the_date_of_the_end():
    now = datetime(2025, 1, 31, 23, 0)
    assert (
        time_line(1.5, 2, 2402, now)
        == "time: 1.5 s a step, 2400 steps in 1:00:00, done about 2025-02-01 00:00"
    )
    assert time_line(1.5, 0, 10**18, now).endswith("done about never")


def test_the_clock_takes_the_quicker_of_two_steps(monkeypatch):
    ticks = iter([0.0, 9.0, 10.0, 12.0, 20.0])
    monkeypatch.setattr(requirements.time, "perf_counter", lambda: next(ticks))
    clock = StepClock()
    done = []
    for _ in range(3):
        with clock:
            pass
        done.append(clock.has_just_timed)
    assert clock.step_s == 2.0
    assert done == [False, True, False]


@pytest.mark.skipif(not hasattr(os, "statvfs"), reason="needs POSIX")
def test_the_real_machine_has_room_for_a_tiny_run(path, tmp_path):
    config = small()
    needs = needs_of(path, config)
    check_memory(needs, config)
    check_disk(needs, tmp_path, 0)
