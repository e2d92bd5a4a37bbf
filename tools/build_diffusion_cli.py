"""Build llama.cpp's own llama-diffusion-cli from the source package of the installed llama-cpp-python.

    python tools/build_diffusion_cli.py        # prints the program's path, after some minutes the first time

The tests that run a standalone file in it use what this leaves: a folder in the user's cache with the program
and the ggml that it was linked to. CMake and a C++ compiler are needed, and an index for pip to ask.
"""

import fcntl
import os
import shutil
import subprocess
import sys
import tarfile
from importlib.metadata import version
from importlib.util import find_spec
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
    folder = cache / f"{NAME}-{version(PACKAGE)}"
    cache.mkdir(parents=True, exist_ok=True)
    with (cache / f"{NAME}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / NAME).exists():
            with TemporaryDirectory(dir=cache) as work:
                built = _build(Path(work))
                shutil.rmtree(folder, ignore_errors=True)
                built.rename(folder)
    return folder / NAME


def _build(work: Path) -> Path:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    _run([*pip, "--no-binary", PACKAGE, f"{PACKAGE}=={version(PACKAGE)}", "-d", str(work)])
    (package,) = work.glob("*.tar.gz")
    with tarfile.open(package) as archive:
        archive.extractall(work / "source", filter="data")
    (source,) = (work / "source").glob("*/vendor/llama.cpp")
    installed = find_spec("llama_cpp")
    if installed is None or installed.origin is None:
        raise UserError(f"{PACKAGE} is not installed")
    library = Path(installed.origin).parent / "lib"
    options = {
        "CMAKE_BUILD_TYPE": "Release",
        "LLAMA_USE_SYSTEM_GGML": "ON",  # that of llama-cpp-python: a third of the time
        "ggml_DIR": library.parents[1] / "lib" / "cmake" / "ggml",
        "BUILD_SHARED_LIBS": "OFF",
        "CMAKE_BUILD_WITH_INSTALL_RPATH": "ON",
        "CMAKE_INSTALL_RPATH": "$ORIGIN",
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
    folder = work / "folder"
    folder.mkdir()
    for each in [build / "bin" / NAME, *library.glob("libggml*")]:
        shutil.copy2(each, folder)
    return folder


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
