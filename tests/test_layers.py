"""The directions of imports, in Python and in C.

`WINGS` names the folders of the package from the top down: a file may use its own wing and those below it,
never one above, and no two files may use each other. A new Python file belongs to the wing of its folder; a
new C file has to be given a place in `C_LAYERS`. Reads the sources only; imports and compiles nothing.
"""

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "ggml_diffusion"

WINGS = (
    "app",
    "export",
    "training",
    "config",
    "evaluation",
    "generation",
    "objective",
    "engine",
    "text",
    "formats",
)
PYTHON_LAYERS = (
    {"__init__", "__main__", "llama_cpp"},
    *({wing} for wing in WINGS),
    {"child", "durable", "machine", "randomness", "regular_file", "run_folder", "units"},
    {"errors", "_core"},
)
# Wings that do not know each other, though the order would let the upper ones see the lower ones.
APART = ("objective", "engine", "text")
C_LAYERS = (
    {"api", "tests/test_kernels", "tests/test_int8", "tests/checks", "tests/fuzz_load"},
    {"session", "transformer", "peak", "held"},
    {"linear", "attention", "ops", "loss"},
    {"load", "context"},
    {"rope"},
    {"arch", "keys", "model"},
    {"gemm", "few_rows"},
    {"matrix", "kernels", "threads"},
    {"bus", "error", "include/ggd"},
)
GGML_USERS = {"load", "keys", "context", "tests/fuzz_load"}


def module_name(path: Path) -> str:
    """Return a module's name inside the package: `errors`, `text` (for its __init__), `text.loader`."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def place(module: str) -> str:
    """What a module's place depends on: its wing, or its own name where it lies above or below the wings."""
    return module.partition(".")[0]


def python_modules() -> dict[str, Path]:
    """Every module of the package with its file; the extension stands in by its stub."""
    files = [*PACKAGE.rglob("*.py"), PACKAGE / "_core.pyi"]
    return {module_name(path): path for path in files}


def python_imports(source: str, path: Path, modules: dict[str, Path]) -> set[str]:
    """Modules of the package which a file's source imports, inside functions too."""
    package = ["ggml_diffusion", *path.relative_to(PACKAGE).parts[:-1]]
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


def first_sentence(wing: str) -> str:
    """What a wing's `__init__.py` says first."""
    face = ast.get_docstring(ast.parse((PACKAGE / wing / "__init__.py").read_text(encoding="utf-8")))
    assert face is not None
    return face.partition("\n\n")[0].replace("\n", " ")


def c_uses() -> dict[str, set[str]]:
    uses: dict[str, set[str]] = {}
    for path in c_files():
        uses.setdefault(c_unit(path), set()).update(c_units_used(path))
    return uses


def test_the_sources_are_found():
    assert {"engine.native", "errors"} <= python_modules().keys()
    assert "include/ggd" in c_uses()


def test_python_modules_import_their_own_wing_or_lower_ones():
    uses: dict[str, set[str]] = {}
    for module, used in python_uses().items():
        uses.setdefault(place(module), set()).update(place(other) for other in used)
    assert layer_faults(PYTHON_LAYERS, uses) == []


def test_no_python_modules_import_each_other():
    TopologicalSorter(python_uses()).prepare()  # CycleError names the cycle


def test_every_folder_of_the_package_is_a_wing_with_a_face():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(WINGS)
    assert all((PACKAGE / wing / "__init__.py").is_file() for wing in WINGS)


def test_the_formulas_the_engine_and_the_text_do_not_know_each_other():
    uses = python_uses()
    assert {
        name: others
        for name, used in uses.items()
        if place(name) in APART
        and (others := {other for other in used if place(other) in APART and place(other) != place(name)})
    } == {}


def test_only_the_engines_import_the_compiled_extension():
    uses = python_uses()
    assert {name for name, used in uses.items() if "_core" in used} == {"engine.native"}
    users = {name for name, used in uses.items() if "engine.native" in used}
    # beside the engines, what watches the maps of another one
    packages = {name.rpartition(".")[0] for name in users - {"engine.foreign_maps"}}
    assert packages == {"engine.cpu", "engine.ggml_graph"}


def test_only_one_place_declares_the_c_api_of_ggml():
    users = {name for name, used in python_uses().items() if "engine.ggml_graph.ggml" in used}
    assert {name.rpartition(".")[0] for name in users} == {"engine.ggml_graph"}


@pytest.mark.parametrize(
    "engine, others",
    {
        "engine.cpu": {"engine.open", "__init__"},  # the latter hands the public name on
        "engine.ggml_graph": {"engine.open", "app.devices"},  # which shows what there is
    }.items(),
)
def test_only_the_opening_of_a_model_names_an_implementation_of_the_engine(engine, others):
    outside = {name: used for name, used in python_uses().items() if not name.startswith(engine)}
    users = {name for name, used in outside.items() if any(one.startswith(engine) for one in used)}
    assert users == others


def test_the_page_on_the_architecture_shows_the_wings_in_this_order_with_their_first_sentences():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = re.search(r"^\| wing, top down \|.*\n\|---.*\n((?:\|.*\n)+)", page, re.MULTILINE)
    assert table is not None
    assert table[1].splitlines() == [f"| `{wing}` | {first_sentence(wing)} |" for wing in WINGS]


def test_the_page_on_the_architecture_shows_the_layers_of_c():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    table = re.search(r"^\| C, top down \|.*\n\|---.*\n((?:\|.*\n)+)", page, re.MULTILINE)
    assert table is not None
    rows = [set(re.findall(r"`([^`]+)`", line.split("|")[1])) for line in table[1].splitlines()]
    assert rows == [{unit for unit in layer if not unit.startswith("tests/")} for layer in C_LAYERS]


def test_every_file_that_the_page_on_the_architecture_names_is_there():
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    links = re.findall(r"\]\((\.\./[^)#]+)\)", page)
    names = re.findall(r"`(\w+(?:/\w+)+\.py)`", page)
    assert links and names
    assert [link for link in links if not (ROOT / "docs" / link).exists()] == []
    assert [name for name in names if not (PACKAGE / name).exists() and not (ROOT / name).exists()] == []


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
    path = PACKAGE / "text" / "sample_that_does_not_exist.py"
    source = (
        "import ggml_diffusion.errors\nfrom . import loader\nfrom ggml_diffusion.formats import lora\n"
        "def f():\n    from ..durable import replace_file\n"
    )
    assert python_imports(source, path, modules) == {"errors", "text.loader", "formats.lora", "durable"}
