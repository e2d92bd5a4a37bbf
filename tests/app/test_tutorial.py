"""The tutorial's commands, one after the other in a shell, on a tiny model in the place of the demo's."""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import TinyModel

PAGE = Path(__file__).resolve().parents[2] / "docs" / "tutorial.md"
BLOCKS = re.compile(r"(<!-- test: the model is there -->\n)?```bash\n(.*?)```", re.DOTALL)


@pytest.mark.slow
@pytest.mark.skipif(
    shutil.which("bash") is None or shutil.which("curl") is None, reason="needs bash and curl"
)
def test_the_tutorial_goes_through(tiny_model: TinyModel, tmp_path: Path) -> None:
    pytest.importorskip("uvicorn")
    shutil.copy(tiny_model(L=1, C=32, H=2, G=1, F=32, type="Q4_0"), tmp_path / "model.gguf")
    blocks = [block for is_given, block in BLOCKS.findall(PAGE.read_text(encoding="utf-8")) if not is_given]
    assert len(blocks) >= 8
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
    script = "set -euo pipefail\nset -m\n" + "\n".join(blocks).replace("8012", str(port))
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    run = subprocess.run(
        ["bash", "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=900
    )
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-2000:]
    page = (tmp_path / "page.md").read_text()
    assert "___" not in page and page.startswith('The "break" statement may only occur nested in')
    assert '"content":' in run.stdout and "+The" in run.stdout
    assert (tmp_path / "my_run" / "evaluation" / "evaluation.json").exists()
