"""Write the C source of the extension module `ggml_diffusion._core`.

The declarations are those of `include/ggd.h` between `/* cffi: begin */` and `/* cffi: end */`, so that the
header stays the only place where the C API is declared. cffi works in API mode: the compiler checks every
declaration against the header. Compiles nothing; CMake does.

Usage: python csrc/cffi_build.py csrc/include/ggd.h OUTPUT.c
"""

import re
import sys
from pathlib import Path

from cffi import FFI

# The version of ggml that was compiled against, from CMake; ggd_ggml_version() tells the loaded one.
COMPILED_VERSION = "static char *const GGD_GGML_VERSION;"
MARKED_PART = re.compile(r"/\* cffi: begin \*/(.*?)/\* cffi: end \*/", re.DOTALL)


def declarations(header: str) -> str:
    """Return the marked parts of a header, joined; ValueError where there is none."""
    parts = MARKED_PART.findall(header)
    if not parts:
        raise ValueError("ggd.h has no part between /* cffi: begin */ and /* cffi: end */")
    return "\n".join(parts)


def write_module(header: Path, output: Path) -> None:
    """Write the module's C source for a header."""
    ffi = FFI()
    ffi.cdef(declarations(header.read_text(encoding="utf-8")) + COMPILED_VERSION)
    ffi.set_source("ggml_diffusion._core", '#include "ggd.h"')
    ffi.emit_c_code(str(output))
    output.touch()  # cffi leaves an unchanged file alone, and each build would ask for it again


if __name__ == "__main__":
    write_module(Path(sys.argv[1]), Path(sys.argv[2]))
