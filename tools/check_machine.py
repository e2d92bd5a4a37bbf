"""Tell in one line what this machine lacks for a build; print nothing where nothing is missing.

Run by the Makefile with the system's Python, before there is an environment: it uses the standard library
and the syntax of Python 3.6 only, so that a Python that is too old can say so. Installs nothing.
"""

import importlib.util
import os
import shlex
import shutil
import sys
import sysconfig
from typing import Optional


def install_hint(debian: str, fedora: str, macos: str) -> str:
    """Return the command that installs a missing part on this kind of system."""
    if sys.platform == "darwin":
        return macos
    if shutil.which("apt-get"):
        return f"apt-get install {debian}"
    if shutil.which("dnf"):
        return f"dnf install {fedora}"
    return f"install what Debian calls {debian}"


def missing_part() -> Optional[str]:
    """Return what is missing and the command that installs it, or None."""
    version = "{}.{}".format(*sys.version_info)
    if sys.version_info < (3, 10):
        return f"Python {version} is too old: install Python 3.10 or newer and add PYTHON=python3.x to make"
    if not (importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")):
        hint = install_hint(f"python{version}-venv", "python3-pip", "brew install python3")
        return f"Python {version} lacks its venv module: {hint}"
    if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
        hint = install_hint(f"python{version}-dev", "python3-devel", "brew install python3")
        return f"Python {version} lacks its C headers (Python.h): {hint}"
    for variable, default, language in (("CC", "cc", "C"), ("CXX", "c++", "C++")):
        command = shlex.split(os.environ.get(variable) or default)[0]
        if not shutil.which(command):
            hint = install_hint("build-essential", "gcc gcc-c++", "xcode-select --install")
            return f"no {language} compiler ({command}): {hint}"
    return None


if __name__ == "__main__":
    missing = missing_part()
    if missing:
        sys.exit(f"error: {missing}")
