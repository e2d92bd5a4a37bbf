"""The directions of imports, in Python and in C.

Each list names the layers from the top down. A file may use its own layer and those below it, never one
above, and no two files may use each other. A new file has to be given a place here. Reads the sources only;
imports and compiles nothing.
"""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

NUMERICS = {"corruption", "block_diffusion", "annealing", "time_embedding", "optim", "sampling"}
COMPONENTS = {"engine", "data", "metrics", *NUMERICS}
MEASURES = {
    f"evaluation.{name}" for name in ("estimates", "scoring", "likelihood", "masked", "infilling")
} | {
    "evaluation.fluency",
    "evaluation.continuation",
}
PYTHON_LAYERS = (
    {"__init__", "__main__"},
    {"cli"},
    {"demo", "display", "evaluation.tables", "evaluation.plots"},
    {"convert", "evaluation.suite"},
    {"evaluate", "evaluation.results"},
    {"evaluation", *MEASURES},
    {"trainer", "generate", "identity", "int8_gate", "diffusion_model", "inspect"},
    {"noisy_batch"},
    {"config"},
    {"config_groups"},
    COMPONENTS,
    {"adapter_file", "checkpoint", "gguf_adapter", "native_structs"},
    {"prompts"},
    {"lora", "_native", "model_file", "gguf_reader", "safetensors_file", "tokenizer"},
    {"chat_template"},
    {"durable", "output_rows", "segments", "memory_plan", "tensor_types"},
    {"errors", "_core"},
)
C_LAYERS = (
    {"api", "tests/test_kernels"},
    {"session", "transformer", "peak"},
    {"linear", "attention", "ops", "loss"},
    {"model", "arch"},
    {"gemm"},
    {"matrix", "kernels", "threads"},
    {"error", "include/ggd"},
)
CONFIG_READERS = {"__init__", "cli", "convert", "trainer", "noisy_batch"}
GGML_USERS = {"model"}


def module_name(path: Path) -> str:
    """Return a module's name inside the package: `cli`, `export` (for its __init__), `export.inspect`."""
    parts = path.relative_to(ROOT / "ggml_diffusion").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def python_modules() -> dict[str, Path]:
    """Every module of the package with its file; the extension stands in by its stub."""
    files = [*(ROOT / "ggml_diffusion").rglob("*.py"), ROOT / "ggml_diffusion" / "_core.pyi"]
    return {module_name(path): path for path in files}


def python_imports(source: str, path: Path, modules: dict[str, Path]) -> set[str]:
    """Modules of the package which a file's source imports, inside functions too."""
    package = ["ggml_diffusion", *path.relative_to(ROOT / "ggml_diffusion").parts[:-1]]
    full_names: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            full_names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            for alias in node.names:
                name = f"{origin}.{alias.name}"
                is_module = name.removeprefix("ggml_diffusion.") in modules
                full_names.add(name if is_module else origin)
    inside = {name for name in full_names if name.split(".")[0] == "ggml_diffusion"}
    return {name.partition(".")[2] or "__init__" for name in inside} - {module_name(path)}


def c_unit(path: Path) -> str:
    """Name of a C file's unit: `model` for model.c and model.h, `kernels` for all of kernels/."""
    relative = path.relative_to(ROOT / "csrc").with_suffix("")
    return "kernels" if relative.parts[0] == "kernels" else relative.as_posix()


def c_files() -> list[Path]:
    return sorted(path for path in (ROOT / "csrc").rglob("*") if path.suffix in {".c", ".h"})


def c_includes(path: Path) -> list[str]:
    """Names that a file includes, as written, without quotes or brackets."""
    return re.findall(r'^\s*#\s*include\s+["<]([^">]+)[">]', path.read_text(encoding="utf-8"), re.MULTILINE)


def c_file_included(name: str, path: Path) -> Path | None:
    """Return the file of csrc/ that an include of a file means, or None for a header from elsewhere."""
    folders = (path.parent, ROOT / "csrc", ROOT / "csrc" / "include")
    return next(((folder / name).resolve() for folder in folders if (folder / name).is_file()), None)


def c_units_used(path: Path) -> set[str]:
    """Units of csrc/ which a file includes."""
    found = (c_file_included(name, path) for name in c_includes(path))
    return {c_unit(included) for included in found if included} - {c_unit(path)}


def layer_faults(layers: tuple[set[str], ...], uses: dict[str, set[str]]) -> list[str]:
    """One sentence for each file without a place and for each use of a layer above."""
    level = {name: depth for depth, names in enumerate(layers) for name in names}
    faults = [
        f"{name} has no place in the layers of tests/test_layers.py" for name in sorted(uses.keys() - level)
    ]
    for name in sorted(uses.keys() & level):
        above = sorted(other for other in uses[name] if level.get(other, level[name]) < level[name])
        faults += [f"{name} uses {other}, which is above it" for other in above]
    return faults


def python_uses() -> dict[str, set[str]]:
    modules = python_modules()
    return {
        name: python_imports(path.read_text(encoding="utf-8"), path, modules)
        for name, path in modules.items()
    }


def c_uses() -> dict[str, set[str]]:
    uses: dict[str, set[str]] = {}
    for path in c_files():
        uses.setdefault(c_unit(path), set()).update(c_units_used(path))
    return uses


def test_the_sources_are_found():
    assert {"_native", "errors"} <= python_modules().keys()
    assert "include/ggd" in c_uses()


def test_python_modules_import_their_own_layer_or_lower_ones():
    assert layer_faults(PYTHON_LAYERS, python_uses()) == []


def test_no_python_modules_import_each_other():
    TopologicalSorter(python_uses()).prepare()  # CycleError names the cycle


def test_config_is_seen_by_the_command_line_convert_and_the_trainers_wiring_only():
    readers = {name for name, used in python_uses().items() if "config" in used}
    assert readers <= CONFIG_READERS


def test_the_components_below_the_trainer_do_not_import_each_other():
    uses = python_uses()
    assert {
        name: uses[name] & COMPONENTS for name in COMPONENTS & uses.keys() if uses[name] & COMPONENTS
    } == {}


def test_only_the_engine_imports_the_compiled_extension():
    uses = python_uses()
    assert {name for name, used in uses.items() if "_core" in used} == {"_native"}
    assert {name for name, used in uses.items() if "_native" in used} == {"engine", "native_structs"}
    assert {name for name, used in uses.items() if "native_structs" in used} == {"engine"}


def test_c_files_include_their_own_layer_or_lower_ones():
    assert layer_faults(C_LAYERS, c_uses()) == []


def test_no_c_headers_include_each_other():
    headers = [path for path in c_files() if path.suffix == ".h"]
    uses = {
        path: {found for name in c_includes(path) if (found := c_file_included(name, path))}
        for path in headers
    }
    TopologicalSorter(uses).prepare()


def test_kernels_include_nothing_of_the_core_but_themselves():
    assert c_uses()["kernels"] == set()


def test_only_the_model_and_the_unpacking_of_quants_include_ggml():
    users = {
        c_unit(path)
        for path in c_files()
        for name in c_includes(path)
        if re.match(r"(ggml|gguf|llama)", name)
    }
    assert users <= GGML_USERS


def test_a_use_of_a_layer_above_is_reported():
    layers = ({"top"}, {"middle"}, {"bottom"})
    uses = {"top": {"bottom"}, "middle": {"bottom"}, "bottom": {"top"}, "stray": set()}
    assert layer_faults(layers, uses) == [
        "stray has no place in the layers of tests/test_layers.py",
        "bottom uses top, which is above it",
    ]


def test_imports_are_read_in_every_form():
    modules = python_modules()
    path = ROOT / "ggml_diffusion" / "sample_that_does_not_exist.py"
    source = "import ggml_diffusion.errors\nfrom . import lora\ndef f():\n    from .errors import UserError\n"
    assert python_imports(source, path, modules) == {"errors", "lora"}
