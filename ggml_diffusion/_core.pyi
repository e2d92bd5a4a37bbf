"""The extension that CMake builds from csrc/ (see csrc/cffi_build.py); its functions are declared in csrc/include/ggd.h."""

from typing import Any

ffi: Any
lib: Any
