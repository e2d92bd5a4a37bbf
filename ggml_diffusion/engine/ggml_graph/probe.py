"""What a device computes of all that the graphs ask for: operations, and types of weights.

Only asks the device; nothing is computed, and no model is needed.
"""

from collections.abc import Callable, Mapping
from typing import Any

from ggml_diffusion.engine.ggml_graph import ggml
from ggml_diffusion.engine.ggml_graph.devices import Device
from ggml_diffusion.engine.ggml_graph.ggml import ffi, lib
from ggml_diffusion.engine.ggml_graph.runtime import Tensor, new_context
from ggml_diffusion.engine.ggml_graph.weights import device_takes
from ggml_diffusion.formats.tensor_types import TENSOR_TYPES

# Elements of a row that are whole blocks of every type.
_ROW = 512


def _rope(c: Any, x: Tensor, i: Tensor) -> Tensor:
    heads = lib.ggml_reshape_4d(c, x, 64, 8, 64, 1)
    return lib.ggml_rope_ext(c, heads, i, ffi.NULL, 64, ggml.ROPE_PAIRS, 0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0)


# By name: (context, a float32 matrix (512, 64), 64 int32 numbers) -> the operation on them.
OPERATIONS: Mapping[str, Callable[[Any, Tensor, Tensor], Tensor]] = {
    "add": lambda c, x, i: lib.ggml_add(c, x, x),
    "sub": lambda c, x, i: lib.ggml_sub(c, x, x),
    "mul": lambda c, x, i: lib.ggml_mul(c, x, x),
    "div": lambda c, x, i: lib.ggml_div(c, x, x),
    "scale": lambda c, x, i: lib.ggml_scale(c, x, 2.0),
    "scale_bias": lambda c, x, i: lib.ggml_scale_bias(c, x, 2.0, 1.0),
    "sqr": lambda c, x, i: lib.ggml_sqr(c, x),
    "sqrt": lambda c, x, i: lib.ggml_sqrt(c, x),
    "tanh": lambda c, x, i: lib.ggml_tanh(c, x),
    "sigmoid": lambda c, x, i: lib.ggml_sigmoid(c, x),
    "sum_rows": lambda c, x, i: lib.ggml_sum_rows(c, x),
    "argmax": lambda c, x, i: lib.ggml_argmax(c, x),
    "concat": lambda c, x, i: lib.ggml_concat(c, x, x, 0),
    "rms_norm": lambda c, x, i: lib.ggml_rms_norm(c, x, 1e-5),
    "mul_mat": lambda c, x, i: lib.ggml_mul_mat(c, x, x),
    "cont": lambda c, x, i: lib.ggml_cont(c, lib.ggml_transpose(c, x)),
    "cpy": lambda c, x, i: lib.ggml_cpy(c, x, lib.ggml_new_tensor_2d(c, ggml.F32, _ROW, 64)),
    "get_rows": lambda c, x, i: lib.ggml_get_rows(c, x, i),
    "set_rows": lambda c, x, i: lib.ggml_set_rows(c, lib.ggml_new_tensor_2d(c, ggml.F32, _ROW, 64), x, i),
    "soft_max": lambda c, x, i: lib.ggml_soft_max_ext(c, x, ffi.NULL, 1.0, 0.0),
    "rope": _rope,
}


def missing_operations(device: Device) -> list[str]:
    """The operations that a device leaves to the CPU, by ggml's names."""
    missing = []
    for name, write in OPERATIONS.items():
        context = new_context(16)
        x = lib.ggml_new_tensor_2d(context, ggml.F32, _ROW, 64)
        numbers = lib.ggml_new_tensor_4d(context, ggml.I32, 64, 1, 1, 1)
        if not lib.ggml_backend_dev_supports_op(device.handle, write(context, x, numbers)):
            missing.append(name)
        lib.ggml_free(context)
    return missing


def types_taken(device: Device) -> tuple[list[str], list[str]]:
    """The types of weights that a device multiplies and unpacks, and those that it leaves to the CPU."""
    taken: list[str] = []
    left: list[str] = []
    for name, kind in TENSOR_TYPES.items():
        (taken if device_takes(device.handle, kind.id, _ROW) else left).append(name)
    return taken, left
