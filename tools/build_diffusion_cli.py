"""Build llama.cpp's own llama-diffusion-cli from the source package of the installed llama-cpp-python.

    python tools/build_diffusion_cli.py        # prints the program's path, after some minutes the first time

The tests that run a standalone file in it use what this leaves in the user's cache. Its ggml is compiled
along, for any processor with AVX2: one made for this very processor may use AMX, which some virtual machines
show and forbid. CMake and a C++ compiler are needed, and an index for pip to ask.
"""

import fcntl
import os
import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from tool_errors import run_tool

from ggml_diffusion.errors import UserError

PACKAGE, NAME = "llama-cpp-python", "llama-diffusion-cli"


def build_diffusion_cli() -> Path:
    """The program, built unless it is in the cache.

    Raises:
        UserError: a tool is missing, or a step failed; the message has its last line.

    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ggml-diffusion"
    program = cache / f"{NAME}-{version(PACKAGE)}-any" / NAME
    program.parent.mkdir(parents=True, exist_ok=True)
    with (cache / f"{NAME}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not program.exists():
            with TemporaryDirectory(dir=cache) as work:
                _build(Path(work)).rename(program)
    return program


def _build(work: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    _run([*pip, "--no-binary", PACKAGE, f"{PACKAGE}=={version(PACKAGE)}", "-d", str(work)])
    (package,) = work.glob("*.tar.gz")
    with tarfile.open(package) as archive:
        archive.extractall(work / "source", filter="data")
    (source,) = (work / "source").glob("*/vendor/llama.cpp")
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "GGML_NATIVE": "OFF",
        "BUILD_SHARED_LIBS": "OFF",
        "LLAMA_BUILD_EXAMPLES": "ON",
        "LLAMA_BUILD_TESTS": "OFF",
        "LLAMA_BUILD_TOOLS": "OFF",
        "LLAMA_BUILD_SERVER": "OFF",
        "LLAMA_CURL": "OFF",
        "LLAMA_OPENSSL": "OFF",
    }
    tools = Path(sys.executable).parent
    cmake = shutil.which("cmake", path=f"{tools}:{os.environ.get('PATH', '')}")
    ninja = shutil.which("ninja", path=f"{tools}:{os.environ.get('PATH', '')}")
    if cmake is None or ninja is None:
        raise UserError("needs cmake and ninja: make setup installs them")
    build = work / "build"
    defines = [f"-D{key}={value}" for key, value in options.items()]
    _run(
        [cmake, "-S", str(source), "-B", str(build), "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={ninja}", *defines]
    )
    _run([cmake, "--build", str(build), "--target", NAME])
    return build / "bin" / NAME


def _run(command: list[str]) -> None:
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode != 0:
        said = (run.stderr.strip() or run.stdout.strip() or "nothing").splitlines()[-1]
        raise UserError(f"{Path(command[0]).name} failed: {said}")


def main() -> None:
    """Build, and print where it is."""
    print(build_diffusion_cli())


if __name__ == "__main__":
    run_tool(main)
