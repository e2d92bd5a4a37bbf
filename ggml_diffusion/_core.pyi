"""The extension that CMake builds from csrc/; csrc/include/ggd.h declares its functions."""

from typing import Any

ffi: Any
lib: Any
