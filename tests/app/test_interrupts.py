"""An interrupt at any moment of the start ends the program with 130 and not a word."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import TinyModel

# Interrupts the process when the module of the first argument is looked for.
INTERRUPTED = """
import os, signal, sys
wanted, sys.argv[1:] = sys.argv[1], sys.argv[2:]
class Interrupt:
    def find_spec(self, name, path=None, target=None):
        if name == wanted:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupt())
from ggml_diffusion.__main__ import main
main()
print("not interrupted")
"""


@pytest.mark.parametrize(
    "module, arguments",
    [
        ("ggml_diffusion.app.cli.main", ["--help"]),
        ("typer", ["--help"]),
        ("numpy", ["inspect", "none.gguf"]),
        ("numpy._core._multiarray_umath", ["inspect", "none.gguf"]),
        ("pydantic_core", ["inspect", "none.gguf"]),
        ("ggml_diffusion.app.cli.generate", ["generate", "--help"]),
        ("ggml_diffusion.app.inspect", ["inspect", "none.gguf"]),
        ("ggml_diffusion.training.run", ["generate", "none.gguf", "none"]),
        ("ggml_diffusion._core", ["generate", "none.gguf", "none"]),
        ("ggml_diffusion.app.display", ["convert", "none.gguf", "--data", "x", "--output", "y"]),
    ],
)
def test_an_interrupt_while_a_module_is_imported(module: str, arguments: list[str]) -> None:
    run = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, module, *arguments], capture_output=True, check=False, timeout=120
    )
    assert (run.returncode, run.stdout, run.stderr) == (130, b"", b"")


@pytest.mark.slow
@pytest.mark.parametrize("delay_s", [0.3 + 0.1 * i for i in range(12)])
def test_an_interrupt_at_any_moment(tiny_model: TinyModel, delay_s: float) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "ggml_diffusion", "inspect", str(tiny_model())],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )
    time.sleep(delay_s)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    # 0: it had been done by then; the signal: Python had not begun, of which a shell says 130, too
    assert process.returncode in (0, 130, -signal.SIGINT) and errors == b""
