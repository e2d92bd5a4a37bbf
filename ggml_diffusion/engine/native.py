"""The compiled core as cffi's `ffi` and `lib`, checked against the ggml that is loaded.

ggml promises no stable ABI, so the core must run with the very version that it was compiled against: after
another llama-cpp-python was installed the import fails here, in one line, where it would crash later.
Deliberately holds no wrapper: the engines, its only importers, do the work.
"""

from typing import Any

from numpy.typing import NDArray

from ggml_diffusion.errors import UserError

HINT = "run `pip install --no-deps --force-reinstall .` in the source folder of ggml-diffusion"

try:
    from ggml_diffusion import _core
except ImportError as error:
    raise ImportError(f"the compiled core of ggml-diffusion does not load ({error}): {HINT}") from error


def check_ggml_version(compiled: str, loaded: str) -> None:
    """Raise ImportError unless the loaded ggml is the one that the core was compiled against."""
    if compiled != loaded:
        raise ImportError(
            f"ggml-diffusion was compiled against ggml {compiled}, but llama-cpp-python has {loaded}: {HINT}"
        )


ffi: Any = _core.ffi
lib: Any = _core.lib
check_ggml_version(ffi.string(lib.GGD_GGML_VERSION).decode(), ffi.string(lib.ggd_ggml_version()).decode())


def check(status: int) -> None:
    """Raise the core's message as a UserError unless a call succeeded."""
    if status != 0:
        raise UserError(ffi.string(lib.ggd_last_error()).decode(errors="replace"))


def pointer(kind: str, array: NDArray[Any] | None) -> Any:
    """An array's memory as a C pointer of a type, NULL for None; the caller keeps the array."""
    return ffi.NULL if array is None else ffi.cast(kind, array.ctypes.data)
