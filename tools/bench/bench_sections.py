"""What bench.py measures: each section drives child processes and returns plain data.

Figures are medians over rounds in which all arms of a comparison take turns; a ratio is the median of the
rounds' own ratios. Every arm has taken one uncounted round before. It neither prints nor judges.

Letters: B sequences, T tokens, C hidden size, H query heads, G key/value heads, F feed-forward size,
V vocabulary, L layers.
"""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from bench_arms import Arm, Reply, alternate
from bench_machine import describe_machine
from bench_projection import SEED_CORES, cost_of_layers, cost_of_step, project, scaling
from make_large_gguf import SHAPE_7B, make_large_gguf

from ggml_diffusion.formats.lora import TargetModule
from ggml_diffusion.formats.tensor_types import TENSOR_TYPES

Row = dict[str, Any]

RANK = 32
ATTENTION = tuple(module.value for module in TargetModule)[:4]
ALL_TARGETS = tuple(module.value for module in TargetModule)
PRODUCT_TYPES = ("Q4_0", "Q4_1", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
PEAK_TIME_S = 0.5
FAST, F32 = "fast", "f32"

# Kernel set (environment variable GGD_KERNELS) -> what holds PyTorch to the same instructions. MKL, which
# multiplies its float32 matrices, obeys on Intel processors only.
KERNEL_SETS: Mapping[str, Mapping[str, str]] = {
    "avx512": {
        "ONEDNN_MAX_CPU_ISA": "AVX512_CORE",
        "ATEN_CPU_CAPABILITY": "avx512",
        "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    },
    "avx_vnni": {
        "ONEDNN_MAX_CPU_ISA": "AVX2_VNNI",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
    "avx2": {
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    },
}


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        model: GGUF of the steps that are not of 7B shape.
        folder: where generated models are kept.
        n_threads: of every arm that says nothing else.
        n_rounds: counted rounds of each comparison.
        peer_python: interpreter with PyTorch and PEFT, None = no peer.
        peer_dtype: "bf16" or "f32".
        work: only steps whose name contains this.
        peer_llama: interpreter with another llama-cpp-python, None = this one.
        device: kind of device of the section on devices, None = no such section.

    """

    model: Path
    folder: Path
    n_threads: int
    n_rounds: int
    peer_python: Path | None
    peer_dtype: str
    work: str
    peer_llama: Path | None = None
    device: str | None = None


@dataclass(frozen=True)
class ProductShape:
    """Sizes of a model for its matrix products, and the batch."""

    name: str
    sizes: Mapping[str, int]
    batch_size: int
    sequence_length: int

    @property
    def weights(self) -> list[tuple[int, int]]:
        """Shape (out, in) of each projection of a layer."""
        C, F = self.sizes["C"], self.sizes["F"]
        keys = C // self.sizes["H"] * self.sizes["G"]
        return [(C, C), (keys, C), (keys, C), (C, C), (F, C), (F, C), (C, F)]

    @property
    def n_rows(self) -> int:
        """Tokens of the batch."""
        return self.batch_size * self.sequence_length

    @property
    def flops_layer(self) -> float:
        """Operations of a layer's products in one direction."""
        return 2.0 * self.n_rows * sum(out_size * in_size for out_size, in_size in self.weights)

    def allows(self, type_name: str) -> bool:
        """Whether rows consist of whole blocks of the type."""
        return all(in_size % TENSOR_TYPES[type_name].block == 0 for _, in_size in self.weights)


# The vocabulary has no part in these products. Eight small layers do not fit the cache, as thirty do not.
PRODUCT_SHAPES = (
    ProductShape("SmolLM2-135M", {"L": 8, "C": 576, "H": 9, "G": 3, "F": 1536, "V": 512}, 8, 256),
    ProductShape("7B", {**SHAPE_7B, "L": 1, "V": 512}, 8, 128),
)


@dataclass(frozen=True)
class Work:
    """One kind of training step.

    Attributes:
        name: for tables and --work.
        batch_size: B.
        sequence_length: T.
        layer_type: one layer of 7B shape of this type; None = the settings' model.
        targets: projections with LoRA pairs.
        keep: activations kept for the backward; auto = what fits the budget.
        memory_mib: budget of a step beside the mapped model; None = no limit.
        int8: True = products in int8 as a run decides it on its first batch, False = none; or by name.
        has_peer: whether PyTorch takes the same step.

    """

    name: str
    batch_size: int
    sequence_length: int
    layer_type: str | None = None
    targets: tuple[str, ...] = ATTENTION
    keep: str = "auto"
    memory_mib: int | None = None
    int8: bool | str = True
    has_peer: bool = True

    @property
    def n_tokens(self) -> int:
        """Tokens of the step."""
        return self.batch_size * self.sequence_length


WORKS = (
    Work("q,k,v,o 8x256", 8, 256),
    Work("q,k,v,o 8x256, 300 MiB", 8, 256, memory_mib=300),
    Work("q,k,v,o 8x256, 700 MiB", 8, 256, memory_mib=700),
    Work("q,k,v,o 8x256, no int8", 8, 256, int8=False, has_peer=False),
    Work("q,k,v,o 8x256, keep without-ffn", 8, 256, keep="without-ffn", has_peer=False),
    Work("q,k,v,o 8x256, keep boundaries", 8, 256, keep="boundaries", has_peer=False),
    Work("all seven 8x256, 350 MiB", 8, 256, targets=ALL_TARGETS, memory_mib=350),
    Work("q,k,v,o 8x512, 650 MiB", 8, 512, memory_mib=650),
    Work("7B layer Q4_0 8x128", 8, 128, "Q4_0"),
    Work("7B layer Q4_0 8x128, 80 MiB", 8, 128, "Q4_0", memory_mib=80),
    Work("7B layer Q4_0 8x256, 200 MiB", 8, 256, "Q4_0", memory_mib=200),
    Work("7B layer Q4_K 8x128", 8, 128, "Q4_K"),
    Work("7B layer Q4_K 8x128, 110 MiB", 8, 128, "Q4_K", memory_mib=110),
    Work("7B layer Q4_K 8x256, 200 MiB", 8, 256, "Q4_K", memory_mib=200),
)


def spread(values: Iterable[float]) -> dict[str, float]:
    """Median, smallest and largest of some figures."""
    found = list(values)
    return {"median": statistics.median(found), "min": min(found), "max": max(found)}


def generated_model(settings: Settings, type_name: str, sizes: Mapping[str, Any]) -> Path:
    """A random model of these sizes, made if it is not in the folder yet."""
    name = re.sub(r"[^\w.]+", "-", "_".join(f"{letter}{size}" for letter, size in sizes.items()))
    path = settings.folder / f"random_{name}_{type_name}.gguf"
    if not path.exists():
        unfinished = path.with_suffix(".unfinished")
        make_large_gguf(unfinished, type=type_name, **sizes)
        unfinished.rename(path)
    return path


def our_arm(
    settings: Settings,
    name: str,
    model: Path,
    work: Work,
    *,
    n_threads: int | None = None,
    compute: str = FAST,
    train: bool = True,
    kernels: str | None = None,
    device: str = "cpu",
) -> Arm:
    """A process of this project."""
    job = {
        "model": str(model),
        "device": device,
        "n_threads": n_threads or settings.n_threads,
        "compute": compute,
        "keep": work.keep,
        "memory_mib": work.memory_mib,
        "int8": work.int8,
        "batch_size": work.batch_size,
        "sequence_length": work.sequence_length,
        "rank": RANK,
        "targets": work.targets,
        "train": train,
    }
    environment = {} if kernels is None else {"GGD_KERNELS": kernels}
    return Arm(name, sys.executable, "bench_worker.py", job, environment)


def peer_arm(
    settings: Settings,
    model: Path | None,
    targets: Sequence[str],
    dtype: str,
    environment: Mapping[str, str] | None = None,
    *,
    device: str = "cpu",
) -> Arm:
    """A process of PyTorch + PEFT; without a model, for matrix products only."""
    job = {
        "model": None if model is None else str(model),
        "dtype": dtype,
        "device": device,
        "n_threads": settings.n_threads,
        "rank": RANK,
        "targets": targets,
    }
    assert settings.peer_python is not None
    return Arm(f"PyTorch {dtype}", settings.peer_python, "peer_torch_step.py", job, environment)


# -- matrix products -------------------------------------------------------------------------------


def products(settings: Settings, shapes: Sequence[ProductShape] = PRODUCT_SHAPES) -> list[Row]:
    """Rate of the products with packed weights, forward and dX, beside the peak and the peer's GEMM."""
    return [row for shape in shapes for row in _products_of_shape(settings, shape)]


def _products_of_shape(settings: Settings, shape: ProductShape) -> list[Row]:
    types = [type_name for type_name in PRODUCT_TYPES if shape.allows(type_name)]
    times_s, peaks, element = _product_times(settings, shape, types)
    gemm = {"bfloat16": "PyTorch bf16", "float32": "PyTorch f32"}[element]  # what ours are compared with
    rows = []
    for name, found in times_s.items():
        row: Row = {
            "shape": shape.name,
            "rows": shape.n_rows,
            "type": name,
            "element": element if name in types else "",
            "peak_gflops": spread(peaks),
        }
        flops = shape.flops_layer * (shape.sizes["L"] if name in types else 1)
        for direction in ("forward_s", "backward_s"):
            rates = [1e-9 * flops / reply[direction] for reply in found]
            row[direction.replace("_s", "_gflops")] = spread(rates)
            if gemm in times_s:
                peers = [1e-9 * shape.flops_layer / reply[direction] for reply in times_s[gemm]]
                ratios = (rate / peer for rate, peer in zip(rates, peers, strict=True))
                row[direction.replace("_s", "_of_peer")] = spread(ratios)
        rows.append(row)
    return rows


def _product_times(
    settings: Settings, shape: ProductShape, types: Sequence[str]
) -> tuple[dict[str, list[Reply]], list[float], str]:
    """Counted replies of each type and of the peer's element types; peaks; element type of ours."""
    work = Work(shape.name, shape.batch_size, shape.sequence_length)
    times_s: dict[str, list[Reply]] = {}
    peaks: list[float] = []
    with ExitStack() as stack:
        ours = {
            name: stack.enter_context(
                our_arm(settings, name, generated_model(settings, name, shape.sizes), work, train=False)
            )
            for name in types
        }
        peer = stack.enter_context(peer_arm(settings, None, (), "bf16")) if settings.peer_python else None
        first = next(iter(ours.values()))
        for round_number in range(settings.n_rounds + 1):
            replies = {name: arm.ask("products") for name, arm in ours.items()}
            peak = first.ask("peak", time_s=PEAK_TIME_S)["gflops"]
            for dtype in ("bf16", "f32") if peer else ():
                assert peer is not None
                replies[f"PyTorch {dtype}"] = peer.ask(
                    "products", shapes=shape.weights, n_rows=shape.n_rows, dtype=dtype
                )
            if round_number > 0:
                peaks.append(peak)
                for name, reply in replies.items():
                    times_s.setdefault(name, []).append(reply)
    return times_s, peaks, first.about["element"]


# -- the training step -----------------------------------------------------------------------------


def step_figures(replies: Sequence[Reply], memory: Reply) -> Row:
    """What an arm's steps amount to; shares are of the steps' whole time."""
    row: Row = {
        "tokens_per_s": spread(reply["n_tokens"] / reply["time_s"] for reply in replies),
        "time_s": spread(reply["time_s"] for reply in replies),
        "peak_bytes": memory["peak_bytes"],
        "model_bytes": memory["model_bytes"],
    }
    if "parts_s" in replies[0]:
        whole_s = sum(reply["time_s"] for reply in replies)
        engine_s = sum(reply["engine_s"] for reply in replies)
        parts_s = {
            part: sum(reply["parts_s"].get(part, 0.0) for reply in replies) for part in replies[-1]["parts_s"]
        }
        row["share_of_time"] = {part: time_s / whole_s for part, time_s in parts_s.items()}
        row["serial_share"] = 1.0 - sum(parts_s.values()) / whole_s
        row["optimizer_share"] = 1.0 - engine_s / whole_s
    return row


def compare_steps(settings: Settings, arms: Sequence[Arm]) -> list[Row]:
    """The figures of arms that take the same steps in turn; the first is ours and draws the noise.

    All adapters are 0 in the uncounted step, so that the arms' losses of it show whether they do the same.
    """
    noise = str(settings.folder / "noise.npz")
    warm_up = alternate(arms, 1, "step", noise=noise)
    replies = alternate(arms, settings.n_rounds, "step", noise=noise)
    rows: list[Row] = []
    for arm, (first_step,), found in zip(arms, warm_up, replies, strict=True):
        row = {"name": arm.name, "about": arm.about, "first_loss": first_step["loss"]}
        row.update(step_figures(found, arm.ask("memory")))
        pairs = zip(replies[0], found, strict=True)
        row["speed_ratio"] = spread(reply["time_s"] / first["time_s"] for first, reply in pairs)
        if row["peak_bytes"] is not None:
            row["memory_ratio"] = row["peak_bytes"] / (rows[0] if rows else row)["peak_bytes"]
        rows.append(row)
    return rows


def model_of(settings: Settings, work: Work) -> Path:
    """The GGUF that a work is done on."""
    if work.layer_type is None:
        return settings.model
    return generated_model(settings, work.layer_type, {**SHAPE_7B, "L": 1})


def steps(settings: Settings) -> list[Row]:
    """Training steps of all works, each beside the peer if there is one."""
    rows = []
    for work in WORKS:
        if settings.work not in work.name:
            continue
        model = model_of(settings, work)
        with ExitStack() as stack:
            arms = [stack.enter_context(our_arm(settings, "ggml-diffusion", model, work))]
            if settings.peer_python and work.has_peer:
                arms.append(stack.enter_context(peer_arm(settings, model, work.targets, settings.peer_dtype)))
            rows.append({"work": work.name, "model": model.name, "arms": compare_steps(settings, arms)})
    return rows


def kernels(settings: Settings) -> list[Row]:
    """The first work with kernels switched off, beside PyTorch in float32 on the same instructions."""
    work, rows = WORKS[0], []
    for name, environment in KERNEL_SETS.items():
        with ExitStack() as stack:
            ours = our_arm(settings, "ggml-diffusion", settings.model, work, kernels=name)
            arms = [stack.enter_context(ours)]
            if ours.about["kernels"] != name:
                continue  # this processor does not have them
            if settings.peer_python:
                peer = peer_arm(settings, settings.model, work.targets, F32, environment)
                arms.append(stack.enter_context(peer))
            rows.append({"work": f"{work.name}, {name}", "arms": compare_steps(settings, arms)})
    return rows


def large(settings: Settings) -> list[Row]:
    """One step of a whole model of 7B shape, only layer boundaries kept; its peak memory."""
    work = Work("7B whole Q4_0 8x128, keep boundaries", 8, 128, keep="boundaries")
    with our_arm(settings, "ggml-diffusion", generated_model(settings, "Q4_0", SHAPE_7B), work) as arm:
        arm.ask("step", batch_size=1, sequence_length=16)  # maps the whole file
        reply = arm.ask("step")
        figures = {"name": arm.name, "about": arm.about, "first_loss": reply["loss"]}
        figures.update(step_figures([reply], arm.ask("memory")))
    return [{"work": work.name, "arms": [figures]}]


# -- threads ---------------------------------------------------------------------------------------


def threads(settings: Settings) -> Row:
    """One thread against all: the first work, and one layer of 7B shape; projection to a whole 7B model."""
    layer = Work("7B layer Q4_0 8x128", 8, 128, "Q4_0")
    counts = sorted({1, settings.n_threads})
    two_layers = generated_model(settings, "Q4_0", {**SHAPE_7B, "L": 2})
    wanted = {
        WORKS[0]: [(_threads(count), settings.model, count) for count in counts],
        layer: [
            *((_threads(count), model_of(settings, layer), count) for count in counts),
            (f"{_threads(counts[-1])}, two layers", two_layers, counts[-1]),
        ],
    }
    rows: list[Row] = []
    for work, arms_wanted in wanted.items():
        with ExitStack() as stack:
            arms = [
                stack.enter_context(our_arm(settings, name, model, work, n_threads=count))
                for name, model, count in arms_wanted
            ]
            rows.append({"work": work.name, "arms": compare_steps(settings, arms)})
    costs = [cost_of_step(arm) for arm in rows[1]["arms"]]
    one, two = costs[-2:]
    cost = cost_of_layers(one, two, SHAPE_7B["L"])
    speedups = {"ideal": SEED_CORES / counts[-1]}
    if len(counts) > 1:
        measured = costs[0].parallel_s / one.parallel_s
        speedups["as measured"] = scaling(measured, counts[-1], SEED_CORES)
    return {
        "n_threads": counts[-1],
        "works": rows,
        "cost_7b": asdict(cost),
        "projection": [
            {"scaling": name, **project(cost, speedup, layer.n_tokens, micro_batches)}
            for micro_batches in (1, 4)
            for name, speedup in speedups.items()
        ],
    }


def _threads(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


# -- generation ------------------------------------------------------------------------------------

PROMPT_TOKENS, WRITTEN_TOKENS = 64, 64
DENOISING_STEPS = (8, 16, 32, 64)


def generation(settings: Settings) -> list[Row]:
    """Denoising of one hole after a prompt, at several numbers of steps."""
    times_s: dict[int, list[float]] = {steps: [] for steps in DENOISING_STEPS}
    with our_arm(settings, "ggml-diffusion", settings.model, WORKS[0]) as arm:
        for round_number in range(settings.n_rounds + 1):
            for n_steps, counted in times_s.items():
                reply = arm.ask("generate", prompt_length=PROMPT_TOKENS, length=WRITTEN_TOKENS, steps=n_steps)
                if round_number > 0:
                    counted.append(reply["time_s"])
    return [
        {
            "steps": n_steps,
            "prompt_tokens": PROMPT_TOKENS,
            "written_tokens": WRITTEN_TOKENS,
            "tokens_per_s": spread(WRITTEN_TOKENS / time_s for time_s in found),
            "step_s": spread(time_s / n_steps for time_s in found),
        }
        for n_steps, found in times_s.items()
    ]


# -- the machine -----------------------------------------------------------------------------------


def machine(settings: Settings) -> Row:
    """What it is measured on: processor, memory, versions, and the kernels' own peak in GFLOP/s."""
    work, peaks, about = WORKS[0], {}, {}
    for compute in (FAST, F32):
        for n_threads in sorted({1, settings.n_threads}):
            with our_arm(
                settings, "", settings.model, work, n_threads=n_threads, compute=compute, train=False
            ) as arm:
                about[compute] = arm.about
                peaks[f"{arm.about['element']}, {_threads(n_threads)}"] = spread(
                    arm.ask("peak", time_s=PEAK_TIME_S)["gflops"] for _ in range(settings.n_rounds)
                )
    row = {**describe_machine(), "kernels": about[FAST]["kernels"], "peak_gflops": peaks}
    if settings.peer_python:
        with peer_arm(settings, None, (), settings.peer_dtype) as peer:
            row["peer"] = peer.about
    return row
