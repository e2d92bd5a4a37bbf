"""The machine and the versions that figures were measured with, so that a table can be read later.

It measures nothing, and names no user and no host.
Source: proc(5).
"""

from __future__ import annotations

import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ggml_diffusion.machine import processors

PACKAGES = ("ggml-diffusion", "llama-cpp-python", "numpy")


def describe_machine() -> dict[str, Any]:
    """Plain data for table and JSON."""
    return {
        "processor": _first_of("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": processors(),
        "memory_bytes": _memory_bytes(),
        "system": f"{platform.system()} {platform.release()}",
        "load_average": os.getloadavg()[0],
        "commit": _commit(),
        "versions": {"Python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
    }


def _first_of(path: str, key: str) -> str | None:
    """The value of the first "key : value" line of a file."""
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), None)


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _commit() -> str:
    """The commit that is checked out, marked where sources differ from it."""

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        changed = " with changes" if git("status", "--porcelain", "--untracked-files=no") else ""
        return git("rev-parse", "--short=12", "HEAD") + changed
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
