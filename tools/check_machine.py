"""Tell in one line what this machine lacks for a build; print nothing and exit 0 where nothing is missing.

Run by the Makefile with the system's Python before there is an environment. Installs nothing. Written so that any Python 3
can run it, to tell an old one that it is too old.
"""

import importlib.util
import os
import shlex
import shutil
import sys
import sysconfig


def install_hint(debian, fedora, macos):
    """Return the command that installs a missing part on this kind of system."""
    if sys.platform == "darwin":
        return macos
    if shutil.which("apt-get"):
        return "apt-get install " + debian
    if shutil.which("dnf"):
        return "dnf install " + fedora
    return "install what Debian calls " + debian


def missing_part():
    """Return what is missing and how to get it, or None."""
    version = "%d.%d" % sys.version_info[:2]
    if sys.version_info < (3, 10):
        return "Python %s is too old: install Python 3.10 or newer and run make PYTHON=python3.x" % version
    debian_python = "python%s" % version if sys.prefix == "/usr" else "python3"
    if not (importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")):
        hint = install_hint(debian_python + "-venv", "python3-pip", "brew install python3")
        return "Python %s lacks its venv module: %s" % (version, hint)
    if not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
        hint = install_hint(debian_python + "-dev", "python3-devel", "brew install python3")
        return "Python %s lacks its C headers (Python.h): %s" % (version, hint)
    for variable, default, language in (("CC", "cc", "C"), ("CXX", "c++", "C++")):
        command = shlex.split(os.environ.get(variable) or default)[0]
        if not shutil.which(command):
            hint = install_hint("build-essential", "gcc gcc-c++", "xcode-select --install")
            return "no %s compiler (%s): %s" % (language, command, hint)
    return None


if __name__ == "__main__":
    missing = missing_part()
    if missing:
        sys.exit("error: " + missing)
