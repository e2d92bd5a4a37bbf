"""A model file that is truncated while it is mapped: one line and exit code 2, on any thread."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TinyModel, sizes_for

PROGRAM = """
import os, sys
import numpy as np
from ggml_diffusion.engine.cpu.q4_model import Q4Model
from ggml_diffusion.engine.interface import Batch
path, way = sys.argv[1:]
closed = Q4Model.from_gguf(path, 1)
model = Q4Model.from_gguf(path, 2)
closed.close()
if way == "truncated":
    os.truncate(path, 4096)
else:
    with open(path, "wb") as file:
        file.write(b"GGUF")
model.logits(Batch(np.arange(32, dtype=np.int32)[None]))
print("computed")
"""


@pytest.mark.parametrize("way", ["truncated", "written anew"])
def test_a_file_that_is_truncated_under_its_map_is_one_line(
    tiny_model: TinyModel, tmp_path: Path, way: str
) -> None:
    path = tmp_path / "model.gguf"
    shutil.copy(tiny_model(type="Q4_K", **sizes_for("Q4_K")), path)
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(path), way],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    expected = f"error: {path}: the file was truncated or replaced while it was in use\n"
    assert (run.returncode, run.stdout, run.stderr) == (2, "", expected)


LLAMA_PROGRAM = """
import os, sys
import numpy as np
from ggml_diffusion.engine.interface import Batch
from ggml_diffusion.engine.llama_engine import LlamaEngine
from ggml_diffusion.formats.model_check import read_model
path = sys.argv[1]
LlamaEngine(read_model(path), 1).close()
model = LlamaEngine(read_model(path), 1)
os.truncate(path, 4096)
model.logits(Batch(np.arange(32, dtype=np.int32)[None]))
print("computed")
"""


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="only Linux says what is mapped where")
def test_a_file_that_is_truncated_under_llama_cpp_is_one_line(tiny_model: TinyModel, tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    shutil.copy(tiny_model(type="F32", L=2, C=256), path)
    run = subprocess.run(
        [sys.executable, "-c", LLAMA_PROGRAM, str(path)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    expected = f"error: {path}: the file was truncated or replaced while it was in use\n"
    assert (run.returncode, run.stdout, run.stderr) == (2, "", expected)


def test_what_is_not_ours_dies_as_before(tiny_model: TinyModel) -> None:
    program = (
        "import mmap, os, sys, tempfile; from ggml_diffusion.engine.cpu.q4_model import Q4Model\n"
        "model = Q4Model.from_gguf(sys.argv[1], 1)\n"
        "file = tempfile.TemporaryFile(); file.write(bytes(1 << 16)); file.flush()\n"
        "data = mmap.mmap(file.fileno(), 0); os.ftruncate(file.fileno(), 0); data[5000]\n"
    )
    run = subprocess.run([sys.executable, "-c", program, str(tiny_model())], capture_output=True, check=False)
    assert (run.returncode, run.stderr) == (-7, b"")
