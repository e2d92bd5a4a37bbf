"""The benchmark's figures as tables; the same figures as JSON are bench.py's business.

Every speed is a median, with the smallest and the largest behind it where rounds differ.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from bench_projection import SEED_CORES, SEED_STEP_S, SEED_STEPS
from rich.console import Console
from rich.table import Table

Row = Mapping[str, Any]


def figure(values: Mapping[str, float], form: str = ",.0f") -> str:
    """Median (smallest to largest), or the median alone where all are equal."""
    middle = format(values["median"], form)
    if values["min"] == values["max"]:
        return middle
    return f"{middle} ({values['min']:{form}} to {values['max']:{form}})"


def mebibytes(n_bytes: int | None) -> str:
    """Memory in MiB."""
    return "?" if n_bytes is None else f"{n_bytes / 2**20:,.0f}"


def table_of(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    """A table whose first column is text and whose others are numbers."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        table.add_row(*row)
    return table


def machine_tables(result: Row) -> list[Table]:
    """What it was measured on."""
    versions = {**result["versions"], **result.get("peer", {}).get("versions", {})}
    rows = [
        ["processor", f"{result['processor']}, {result['cores']} cores"],
        ["memory", f"{result['memory_bytes'] / 2**30:.0f} GiB"],
        ["system", result["system"]],
        ["load before", f"{result['load_average']:.1f}"],
        ["commit", result["commit"]],
        ["versions", ", ".join(f"{name} {number}" for name, number in versions.items())],
        ["kernels", result["kernels"]],
    ]
    rows += [[f"peak, {name}", f"{figure(peak)} GFLOP/s"] for name, peak in result["peak_gflops"].items()]
    return [table_of("Machine", ["", ""], rows)]


def product_tables(result: Sequence[Row]) -> list[Table]:
    """Matrix products."""
    columns = ["weights", "elements"]
    for direction in ("forward", "dX"):
        columns += [f"{direction} GFLOP/s", "of peak", "of PyTorch"]
    tables = []
    for shape in dict.fromkeys(row["shape"] for row in result):
        found = [row for row in result if row["shape"] == shape]
        peak = found[0]["peak_gflops"]
        cells = []
        for row in found:
            cells.append([row["type"], row["element"]])
            for direction in ("forward", "backward"):
                speed, of_peer = row[f"{direction}_gflops"], row.get(f"{direction}_of_peer")
                cells[-1] += [figure(speed), f"{speed['median'] / peak['median']:.0%}"]
                cells[-1].append("" if of_peer is None else figure(of_peer, ".0%"))
        title = f"Matrix products, {shape}, {found[0]['rows']} rows; peak {figure(peak)} GFLOP/s"
        tables.append(table_of(title, columns, cells))
    return tables


def packing_tables(result: Sequence[Row]) -> list[Table]:
    """Packing alone."""
    columns = ["weights", "unpacked by"]
    for direction in ("forward", "dX"):
        columns += [f"{direction} Gweights/s", "of Q4_K"]
    rows = []
    for row in result:
        rows.append([row["type"], "own kernels" if row["own_kernels"] else "ggml"])
        for direction in ("forward", "backward"):
            rate, ratio = row[f"{direction}_gweights"], row[f"{direction}_of_base"]
            rows[-1] += [figure(rate, ".2f"), figure(ratio, ".0%")]
    return [table_of(f"Packing, {result[0]['kernels']}, to {result[0]['element']}", columns, rows)]


def step_tables(title: str, result: Sequence[Row]) -> list[Table]:
    """Training steps and where their time goes."""
    columns = [
        "step",
        "runtime",
        "tokens/s",
        "ours faster by",
        "MiB",
        "ours takes",
        "mapped model",
        "first loss",
    ]
    rows = []
    for row in result:
        for index, arm in enumerate(row["arms"]):
            is_peer = index > 0
            rows.append(
                [
                    "" if is_peer else row["work"],
                    arm["name"],
                    figure(arm["tokens_per_s"], ",.1f"),
                    figure(arm["speed_ratio"], ".2f") if is_peer else "",
                    mebibytes(arm["peak_bytes"]),
                    f"{1.0 / arm['memory_ratio']:.0%}" if is_peer and "memory_ratio" in arm else "",
                    "" if is_peer else mebibytes(arm["model_bytes"]),
                    f"{arm['first_loss']:.3f}",
                ]
            )
    return [table_of(title, columns, rows), share_table(result)]


def device_tables(result: Sequence[Row]) -> list[Table]:
    """Training steps on a device, and how much faster each runtime is than the core on the processor."""
    rows = [
        [
            "" if index else row["work"],
            arm["name"],
            figure(arm["tokens_per_s"], ",.0f"),
            f"{1.0 / arm['speed_ratio']['median']:.1f}" if index else "",
            f"{arm['first_loss']:.3f}",
        ]
        for row in result
        for index, arm in enumerate(row["arms"])
    ]
    columns = ["step", "runtime", "tokens/s", "times the processor", "first loss"]
    return [table_of("Training step on a device", columns, rows)]


def share_table(result: Sequence[Row]) -> Table:
    """Where the time of our steps goes, one column a step, the largest part of the first one on top."""
    ours = {row["work"]: row["arms"][0] for row in result}
    shares = [arm["share_of_time"] for arm in ours.values()]
    parts = sorted(shares[0], key=lambda part: -float(shares[0][part]))
    rows = [[part, *(f"{share.get(part, 0.0):.1%}" for share in shares)] for part in parts]
    rows.append(["serial", *(f"{arm['serial_share']:.1%}" for arm in ours.values())])
    rows.append(["of it noise, AdamW", *(f"{arm['optimizer_share']:.1%}" for arm in ours.values())])
    return table_of("Shares of the step's time", ["part", *ours], rows)


def architecture_tables(result: Sequence[Row]) -> list[Table]:
    """Architectures beside llama, and the parts of the step that take more or less than in llama."""
    columns = ["architecture", "layers", "elements", "G op/s", "llama", "time, llama 1", "processors'"]
    columns += ["MiB", "planned", "llama"]
    rows = [
        [
            row["architecture"],
            str(row["layers"]),
            row["element"],
            figure(row["gops"]),
            figure(row["base_gops"]),
            figure(row["time_ratio"], ".3f"),
            figure(row["processor_ratio"], ".3f"),
            *(mebibytes(row[f"{name}_bytes"]) for name in ("peak", "planned", "base_planned")),
        ]
        for row in result
    ]
    parts = dict.fromkeys(part for row in result for part in row["more_of_base_time"])
    differences = [
        [part, *(f"{row['more_of_base_time'].get(part, 0.0):+.1%}" for row in result)] for part in parts
    ]
    names = [row["architecture"] for row in result]
    return [
        table_of("Architectures beside llama: time an operation, memory", columns, rows),
        table_of("Of the step more than in llama, as a share of llama's", ["part", *names], differences),
    ]


def thread_tables(result: Row) -> list[Table]:
    """Threads and the projection."""
    rows = []
    for row in result["works"]:
        for arm in row["arms"]:
            rows.append(
                [
                    row["work"],
                    arm["name"],
                    figure(arm["tokens_per_s"], ",.1f"),
                    f"{1.0 / arm['speed_ratio']['median']:.2f}",
                    f"{arm['serial_share']:.1%}",
                ]
            )
    threads = table_of("Threads", ["step", "arm", "tokens/s", "times the first", "serial share"], rows)
    projected = [
        [
            f"{row['tokens_step']:,}",
            row["scaling"],
            f"{row['speedup']:.2f}",
            f"{row['step_s']:.1f}",
            f"{row['serial_share']:.1%}",
            f"{row['run_hours']:,.0f}",
            f"{row['tokens_in_seed_step']:,.0f}",
        ]
        for row in result["projection"]
    ]
    columns = [
        "tokens a step",
        "scaling",
        "speedup",
        "s a step",
        "serial share",
        f"hours for {SEED_STEPS:,} steps",
        f"tokens in {SEED_STEP_S} s",
    ]
    title = f"Projection to a 7B model on {SEED_CORES} cores, from {result['n_threads']} threads"
    return [threads, table_of(title, columns, projected)]


def generation_tables(result: Sequence[Row]) -> list[Table]:
    """Denoising."""
    rows = [
        [str(row["steps"]), figure(row["tokens_per_s"], ",.1f"), figure(row["step_s"], ".3f")]
        for row in result
    ]
    first = result[0]
    title = f"Generation of {first['written_tokens']} tokens after {first['prompt_tokens']}"
    return [table_of(title, ["steps", "tokens/s", "s a step"], rows)]


def context_tables(result: Row) -> list[Table]:
    """Filling and writing over text that stands."""
    rows = [
        [
            arm["context"],
            *(_milliseconds(arm[name]) for name in ("first_step_s", "step_s")),
            figure(arm["tokens_per_s"], ".1f"),
        ]
        for arm in result["arms"]
    ]
    times = [figure(result["ratio"][name], ".1f") for name in ("step", "writing")]
    rows.append(["of it, times", "", *times])
    hole = f"a hole of {result['hole_tokens']} in {result['text_tokens']:,} tokens"
    title = (
        f"{result['kernels']}: {hole}, ms; {result['written_tokens']} written after {result['prompt_tokens']}"
    )
    return [table_of(title, ["context", "first step", "a step", "tokens/s"], rows)]


def few_rows_tables(result: Sequence[Row]) -> list[Table]:
    """A pass of a few rows beside llama.cpp's."""
    rows = [
        [
            str(row["n_rows"]),
            *(_milliseconds(row[name]) for name in ("time_s", "peer_time_s")),
            figure(row["ratio"], ".2f"),
        ]
        for row in result
    ]
    title = f"A pass of few rows, {result[0]['kernels']}, ms"
    return [table_of(title, ["rows", "ggml-diffusion", "llama.cpp", "of it"], rows)]


def _milliseconds(values: Mapping[str, float]) -> str:
    return figure({name: 1e3 * value for name, value in values.items()}, ".1f")


TABLES: Mapping[str, Callable[[Any], list[Table]]] = {
    "machine": machine_tables,
    "products": product_tables,
    "packing": packing_tables,
    "step": lambda result: step_tables("Training step", result),
    "architectures": architecture_tables,
    "threads": thread_tables,
    "kernels": lambda result: step_tables("Kernels switched off, float32", result),
    "generation": generation_tables,
    "few-rows": few_rows_tables,
    "context": context_tables,
    "device": device_tables,
    "large": lambda result: step_tables("A whole 7B model", result),
}


def show(console: Console, section: str, result: Any) -> None:
    """Print a section's tables."""
    if not result:
        console.print(f"{section}: nothing of that to measure here")
        return
    for table in TABLES[section](result):
        console.print(table)
