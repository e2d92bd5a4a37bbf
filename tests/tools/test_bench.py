"""The benchmark runs end to end on tiny models, and its arithmetic is right; no test looks at a speed."""

from __future__ import annotations

import json
import math
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import bench
import bench_architectures
import bench_context
import bench_few_rows
import bench_packing
import bench_sections
import bench_worker
import numpy as np
import pytest
from bench_architectures import step_operations, visible_pairs, windows_of
from bench_arms import Arm, ArmFailed, alternate
from bench_projection import SEED_STEP_S, StepCost, cost_of_layers, cost_of_step, project, scaling
from bench_report import show
from bench_sections import ProductShape, Settings, Work, our_arm
from conftest import TinyModel
from make_large_gguf import make_large_gguf
from rich.console import Console

from ggml_diffusion.engine.cpu.q4_model import Q4Model
from ggml_diffusion.engine.ggml_graph.devices import find_device
from ggml_diffusion.engine.interface import Batch
from ggml_diffusion.formats.model_check import read_model

SMALL = {"L": 2, "C": 256, "H": 4, "G": 2, "F": 512, "V": 600}
SMALL_HEADS = {"C": 64, "H": 4, "G": 2, "D": 16, "F": 96}


@pytest.fixture(autouse=True)
def _short(monkeypatch: pytest.MonkeyPatch) -> None:
    """No figure is looked at, so none has to be good."""
    monkeypatch.setattr(bench_sections, "PEAK_TIME_S", 0.01)
    monkeypatch.setattr(bench_sections, "DENOISING_STEPS", (1, 3))
    monkeypatch.setattr(bench_few_rows, "REPEATS", 1)
    monkeypatch.setattr(bench_context, "TEXT_TOKENS", 40)
    monkeypatch.setattr(bench_context, "WRITTEN_TOKENS", 9)
    monkeypatch.setattr(bench_context, "PROMPT_TOKENS", 8)


def settings_for(folder: Path, model: Path) -> Settings:
    return Settings(model, folder, n_threads=2, n_rounds=1, peer_python=None, peer_dtype="bf16", work="")


# -- the models that it makes ----------------------------------------------------------------------


@pytest.mark.parametrize("type_name", ["Q4_0", "Q4_K", "Q6_K", "BF16"])
def test_a_generated_model_loads_and_is_neither_dead_nor_chaotic(tmp_path: Path, type_name: str) -> None:
    path = make_large_gguf(tmp_path / "made.gguf", type=type_name, **SMALL)
    file = read_model(path)
    assert {letter: getattr(file, letter) for letter in SMALL} == SMALL
    assert {tensor.type_name for tensor in file.tensors.values() if len(tensor.shape) == 2} == {type_name}
    with Q4Model.from_gguf(path, 1) as model:
        tokens = np.random.default_rng(0).integers(0, model.file.V, (1, 32))
        logits = model.logits(Batch(tokens, 0.5))
    assert np.isfinite(logits).all()
    # the head's gain is 2, and a normed row has the root mean square of the norm's weights, about 1
    assert 1.0 < logits.std() < 4.0


def test_a_generated_model_can_have_a_tied_head_and_is_the_same_every_time(tmp_path: Path) -> None:
    first, second = (
        make_large_gguf(tmp_path / name, tied=True, **SMALL) for name in ("first.gguf", "second.gguf")
    )
    assert read_model(first).tied_head
    assert first.read_bytes() == second.read_bytes()
    with Q4Model.from_gguf(first, 1) as model:
        assert 1.0 < model.logits(Batch(np.arange(32)[None], 0.5)).std() < 4.0


def test_a_shape_that_a_type_cannot_have_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Q4_K needs rows in multiples of 256"):
        make_large_gguf(tmp_path / "made.gguf", type="Q4_K", **{**SMALL, "F": 320})


# -- the sections ----------------------------------------------------------------------------------


def test_the_benchmark_of_a_tiny_model_gives_tables_and_json(
    tmp_path: Path, tiny_model: TinyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    model, written = tiny_model(type="Q4_1", V=600), tmp_path / "figures.json"
    options = ["--model", str(model), "--rounds", "1", "--n-threads", "2", "--folder", str(tmp_path)]
    sections = ["--machine", "--step", "--generation", "--few-rows", "--context", "--work", "keep boundaries"]
    assert bench.main([*sections, *options, "--json", str(written)]) == 0
    shown = capsys.readouterr().out
    figures = json.loads(written.read_text())
    for title in ("Machine", "Training step", "Shares of the step's time", "Generation", "few rows"):
        assert title in shown
    assert figures["machine"]["kernels"] and len(figures["machine"]["peak_gflops"]) >= 2
    (step,) = figures["step"]
    (ours,) = step["arms"]
    assert step["work"] == "q,k,v,o 8x256, keep boundaries"
    assert ours["tokens_per_s"]["median"] > 0.0
    assert 0 < ours["first_loss"] < 2.0 * math.log(600)
    if sys.platform == "linux":
        assert 0 < ours["model_bytes"] <= model.stat().st_size + 4096
        assert ours["peak_bytes"] > ours["model_bytes"]
    # every part of the time is counted once
    parallel = sum(ours["share_of_time"].values())
    assert parallel + ours["serial_share"] == pytest.approx(1.0, abs=1e-9)
    assert 0.0 < ours["optimizer_share"] <= ours["serial_share"]
    assert [row["steps"] for row in figures["generation"]] == [1, 3]
    assert [arm["context"] for arm in figures["context"]["arms"]] == ["frozen", "adapted"]
    assert all(figures["context"]["ratio"][name]["median"] > 0 for name in ("step", "writing"))
    assert [row["n_rows"] for row in figures["few-rows"]] == [1, 4, 8, 16, 32]
    assert all(
        row["time_s"]["median"] > 0 and row["peer_time_s"]["median"] > 0 for row in figures["few-rows"]
    )


def test_a_device_takes_the_steps_that_the_processor_takes(
    tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    # GGML's CPU backend stands in for an accelerator
    monkeypatch.setattr(bench_worker, "find_device", lambda kind: find_device("cpu"))
    job = {"model": str(tiny_model(type="Q4_1")), "n_threads": 1, "compute": "f32", "keep": "auto", "rank": 2}
    job |= {"memory_mib": None, "int8": True, "batch_size": 2, "sequence_length": 16, "train": True}
    replies = {}
    for device in ("cpu", "vulkan"):
        worker = bench_worker.Worker({**job, "device": device, "targets": bench_sections.ALL_TARGETS})
        assert ("ggml graphs" in worker.describe()["model"]) == (device == "vulkan")
        replies[device] = worker.step()
        assert worker.memory()["planned_bytes"] > 0
        worker.model.close()
    assert replies["vulkan"]["loss"] == pytest.approx(replies["cpu"]["loss"], rel=1e-4)
    assert 0.0 < replies["vulkan"]["engine_s"] <= replies["vulkan"]["time_s"]
    assert "parts_s" in replies["cpu"] and "parts_s" not in replies["vulkan"]


def test_steps_on_a_device_are_shown_as_multiples_of_the_processors() -> None:
    def arm(name: str, tokens_per_s: float, ratio: float) -> dict[str, Any]:
        figures = {"tokens_per_s": tokens_per_s, "speed_ratio": ratio}
        spread = {key: dict.fromkeys(("median", "min", "max"), value) for key, value in figures.items()}
        return {"name": name, "first_loss": 3.0, **spread}

    rows = [{"work": "8x256", "arms": [arm("cpu", 100.0, 1.0), arm("cuda", 2500.0, 0.04)]}]
    written = StringIO()
    show(Console(file=written, width=120), "device", rows)
    assert "2,500" in written.getvalue() and "25.0" in written.getvalue()


def test_a_section_with_nothing_to_measure_says_so(
    tmp_path: Path, tiny_model: TinyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--model", str(tiny_model()), "--folder", str(tmp_path)]
    assert bench.main(["--step", "--work", "no such work", *options]) == 0
    assert "step: nothing of that to measure here" in capsys.readouterr().out


def test_threads_are_compared_and_projected(
    tmp_path: Path, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_sections, "SHAPE_7B", SMALL)
    for n_threads, scalings in ((1, ["ideal"]), (2, ["ideal", "as measured"])):
        settings = replace(settings_for(tmp_path, tiny_model(V=600)), n_threads=n_threads)
        result = bench_sections.threads(settings)
        show(Console(file=StringIO()), "threads", result)
        assert [len(work["arms"]) for work in result["works"]] == [n_threads, n_threads + 1]
        assert [row["scaling"] for row in result["projection"]] == scalings * 2
        assert result["projection"][0]["speedup"] == 16 / n_threads


def test_products_are_rated_by_their_own_operations(tmp_path: Path, tiny_model: TinyModel) -> None:
    shape = ProductShape("small", {**SMALL, "V": 512}, batch_size=2, sequence_length=24)
    settings = settings_for(tmp_path, tiny_model())
    rows = bench_sections.products(settings, [shape])
    assert [row["type"] for row in rows] == list(bench_sections.PRODUCT_TYPES)
    for row in rows:
        for figure in ("forward_gflops", "backward_gflops", "peak_gflops"):
            assert row[figure]["median"] > 0.0
    # q and output (256, 256), k and v (128, 256), gate and up (512, 256), down (256, 512), 48 rows
    weights = 2 * 256 * 256 + 2 * 128 * 256 + 3 * 512 * 256
    assert shape.flops_layer == 2 * 48 * weights
    narrow = ProductShape("narrow", {**SMALL, "C": 320}, 1, 8)
    assert [name for name in bench_sections.PRODUCT_TYPES if narrow.allows(name)] == ["Q4_0", "Q4_1", "Q8_0"]


def test_packing_is_measured_beside_q4_k(
    tmp_path: Path, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_packing, "PACKING_SIZES", {**SMALL, "L": 1})
    monkeypatch.setattr(bench_packing, "PACKING_TIME_S", 0.001)
    monkeypatch.setattr(bench_packing, "PACKING_TYPES", ("Q4_K", "MXFP4", "TQ2_0"))
    options = ["--model", str(tiny_model()), "--rounds", "2", "--folder", str(tmp_path)]
    assert bench.main(["--packing", *options, "--json", str(tmp_path / "figures.json")]) == 0
    rows = json.loads((tmp_path / "figures.json").read_text())["packing"]
    assert [(row["type"], row["own_kernels"]) for row in rows] == [
        ("Q4_K", True),
        ("MXFP4", True),
        ("TQ2_0", False),
    ]
    for direction in ("forward", "backward"):
        assert rows[0][f"{direction}_of_base"] == {"median": 1.0, "min": 1.0, "max": 1.0}
        assert all(row[f"{direction}_gweights"]["min"] > 0.0 for row in rows)
    assert "Packing" in capsys.readouterr().out


def test_architectures_are_measured_beside_llama(
    tmp_path: Path, tiny_model: TinyModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_architectures, "SIZES", {**SMALL_HEADS, "V": 600})
    monkeypatch.setattr(bench_architectures, "SEQUENCE_LENGTH", 48)
    options = ["--model", str(tiny_model()), "--rounds", "2", "--folder", str(tmp_path), "--work", "window"]
    assert bench.main(["--architectures", *options, "--json", str(tmp_path / "figures.json")]) == 0
    (row,) = json.loads((tmp_path / "figures.json").read_text())["architectures"]
    assert (row["architecture"], row["layers"]) == ("gemma3, window 64", 6)
    ratio, rates = row["time_ratio"], (row["gops"], row["base_gops"])
    assert 0.0 < ratio["min"] <= ratio["median"] <= ratio["max"]
    assert row["processor_ratio"]["min"] > 0.0
    # windows of 64 hide nothing of 48 tokens: as many operations as llama's, so the rates tell the ratio
    for end, ours, base in (("max", "min", "max"), ("min", "max", "min")):
        bound = rates[1][base] / rates[0][ours]
        assert ratio[end] == pytest.approx(bound) or (ratio[end] < bound) == (end == "max")
    assert row["planned_bytes"] > row["base_planned_bytes"] > 0  # the inputs of six more norms a layer
    assert {"frozen forward", "attention forward", "norm"} <= row["more_of_base_time"].keys()
    if sys.platform == "linux":
        assert row["peak_bytes"] > row["planned_bytes"]
    shown = capsys.readouterr().out
    assert "Architectures beside llama" in shown and "Of the step more than in llama" in shown


@pytest.mark.parametrize("window", [0, 1, 3, 7, 8, 20])
def test_pairs_that_attend_to_each_other_are_counted(window: int) -> None:
    n_tokens = 7
    distances = np.abs(np.subtract.outer(np.arange(n_tokens), np.arange(n_tokens)))
    assert visible_pairs(n_tokens, window) == (distances < (window or n_tokens)).sum()


def test_the_operations_of_a_step_are_those_of_its_products(tiny_model: TinyModel) -> None:
    sizes = {"C": 32, "H": 4, "G": 2, "D": 8, "F": 64, "V": 384}
    keys = {"attention.sliding_window": 5}
    gemma, llama = (
        read_model(tiny_model(arch=arch, L=2, keys=keys, **sizes)) for arch in ("gemma2", "llama")
    )
    assert windows_of(gemma) == [5, 0] and windows_of(llama) == [0, 0]  # llama ignores the key
    work = Work("", 3, 10, targets=("q_proj", "down_proj"))
    # two directions of each frozen product: q, k, v, output, gate and up, down
    frozen = 2 * (32 * 32 + 2 * 16 * 32 + 32 * 32 + 3 * 64 * 32)
    # each half of a pair: its output, its input's gradient, its own
    pairs = 3 * bench_architectures.RANK * ((32 + 32) + (64 + 32))
    head = 2 * 384 * 32 * 15  # half of 30 rows
    seven = 7 * 4 * 8 * 3  # products, heads, head size, sequences
    expected = 2 * (30 * 2 * (frozen + pairs) + head + seven * 2 * 100)
    assert step_operations(llama, work) == expected
    # the layer with a window: 9 + 8 + 7 + 6 + ... of 10 x 10
    assert step_operations(gemma, work) == expected - 2 * seven * (100 - (10 + 2 * (9 + 8 + 7 + 6)))


def test_measuring_the_packing_rate_leaves_the_session_as_it_was(tiny_model: TinyModel) -> None:
    tokens = np.arange(12)[None]
    with Q4Model.from_gguf(tiny_model(type="Q4_0"), 1) as model:
        first_rate = model.packing_rate(backward=False, time_s=0.01)  # before any call has reserved memory
        expected = model.logits(Batch(tokens, 0.5))
        model.reset_profile()
        rates = [model.packing_rate(backward=backward, time_s=0.01) for backward in (False, True)]
        assert model.profile()["packing"] > 0.0
        assert np.array_equal(model.logits(Batch(tokens, 0.5)), expected)
    assert min(first_rate, *rates) > 0.0


def test_a_generated_model_is_made_once(tmp_path: Path, tiny_model: TinyModel) -> None:
    settings = settings_for(tmp_path, tiny_model())
    first = bench_sections.generated_model(settings, "Q4_0", SMALL)
    made_at = first.stat().st_mtime_ns
    assert bench_sections.generated_model(settings, "Q4_0", SMALL) == first
    assert first.stat().st_mtime_ns == made_at
    assert [path.name for path in tmp_path.glob("random*")] == [first.name]


# -- the arms --------------------------------------------------------------------------------------


def test_a_kernel_set_can_be_chosen_for_one_arm(tmp_path: Path, tiny_model: TinyModel) -> None:
    work = Work("", 1, 8)
    settings = settings_for(tmp_path, tiny_model())
    with our_arm(settings, "ours", settings.model, work, train=False, kernels="reference") as arm:
        assert arm.about["kernels"] == "reference"


def test_an_arm_that_fails_says_why_in_one_place(
    tmp_path: Path, tiny_model: TinyModel, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = settings_for(tmp_path, tiny_model())
    with pytest.raises(ArmFailed, match=r"missing\.gguf"):
        our_arm(settings, "ours", tmp_path / "missing.gguf", Work("", 1, 8))
    assert bench.main(["--generation", "--model", str(tmp_path / "missing.gguf")]) == 2
    assert "missing.gguf" in capsys.readouterr().err


@pytest.mark.peer
@pytest.mark.parametrize("type_name", ["Q4_1", "Q8_0"])
def test_the_pytorch_arm_takes_the_same_step(tmp_path: Path, tiny_model: TinyModel, type_name: str) -> None:
    for name in ("torch", "transformers", "peft"):
        pytest.importorskip(name)
    model = tiny_model(type=type_name, V=600, L=3)
    settings = settings_for(tmp_path, model)
    work = Work("", 2, 40)
    job: dict[str, Any] = {"model": str(model), "dtype": "f32", "n_threads": 1, "rank": 4}
    job["targets"] = list(work.targets)
    with (
        our_arm(settings, "ours", model, work, compute="f32") as ours,
        Arm("peer", sys.executable, "peer_torch_step.py", job) as peer,
    ):
        ((our_step,), (peer_step,)) = alternate([ours, peer], 1, "step", noise=str(tmp_path / "noise.npz"))
    # both compute in float32 on the same weights and masks; every adapter is still 0
    assert our_step["loss"] == pytest.approx(peer_step["loss"], rel=1e-5)
    assert our_step["n_tokens"] == peer_step["n_tokens"] == 80


# -- the arithmetic --------------------------------------------------------------------------------


def test_a_projection_multiplies_layers_and_divides_the_parallel_part_only() -> None:
    # 10 s a step: 8 in parallel loops, 0.5 serial in the engine, 1.5 outside of it
    one = cost_of_step({"time_s": {"median": 10.0}, "serial_share": 0.2, "optimizer_share": 0.15})
    assert (one.parallel_s, one.serial_s, one.optimizer_s) == pytest.approx((8.0, 0.5, 1.5))
    # a layer: 5, 0.1 and 1; what is no layer: 3, 0.4 and 0.5
    whole = cost_of_layers(one, StepCost(13.0, 0.6, 2.5), 32)
    assert (whole.parallel_s, whole.serial_s, whole.optimizer_s) == pytest.approx((163.0, 3.6, 32.5))
    projected = project(StepCost(16.0, 0.5, 2.0), 8.0, 1024, 4)
    assert projected["step_s"] == pytest.approx(4 * (2.0 + 0.5) + 2.0)
    assert projected["tokens_step"] == 4096
    assert projected["serial_share"] == pytest.approx((4 * 0.5 + 2.0) / 12.0)
    assert projected["run_hours"] == pytest.approx(50_000 * 12.0 / 3600.0)
    assert projected["tokens_in_seed_step"] == pytest.approx(1024 * (SEED_STEP_S - 2.0) / 2.5)


def test_noise_that_makes_two_layers_faster_than_one_gives_no_negative_time() -> None:
    whole = cost_of_layers(StepCost(1.0, 0.2, 0.1), StepCost(0.9, 0.1, 0.3), 32)
    assert whole.parallel_s == 1.0 and whole.serial_s == 0.2
    assert whole.optimizer_s == pytest.approx(32 * 0.2)


def test_scaling_goes_on_by_the_same_factor_a_doubling() -> None:
    assert scaling(1.9, 2, 16) == pytest.approx(1.9**3)  # 2 -> 4 -> 8 -> 16
    assert scaling(3.4, 4, 16) == pytest.approx(3.4)  # as far again as from 1 to 4
    assert scaling(2.0, 2, 2) == 1.0
