"""A model's weights on a device: packed as they are in the file, mapped or uploaded once.

The core reads the file (csrc/load.c) and says what each architecture is; here its matrices become ggml
tensors. A device that computes in the host's memory uses the mapped file itself; to another one they are
copied. A matrix whose type the device cannot multiply or unpack stays on the host, where the scheduler then
computes with it.
Deliberately not here: what is computed (network.py).
"""

import os
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ggml_diffusion.engine.ggml_graph import ggml
from ggml_diffusion.engine.ggml_graph.ggml import ffi, lib
from ggml_diffusion.engine.ggml_graph.operations import Weight
from ggml_diffusion.engine.ggml_graph.runtime import Runtime, Store, Tensor, new_context
from ggml_diffusion.engine.native import check, pointer
from ggml_diffusion.engine.native import ffi as core_ffi
from ggml_diffusion.engine.native import lib as core
from ggml_diffusion.engine.segments import token_array
from ggml_diffusion.errors import UserError
from ggml_diffusion.formats.lora import TargetModule
from ggml_diffusion.formats.model_file import ModelFile

N_NORMS = 6
ATTENTION_NORM, ATTENTION_POST, FFN_NORM, FFN_POST, QUERY_NORM, KEY_NORM = range(N_NORMS)
PROJECTIONS = tuple(TargetModule)  # in the order of the core's GGD_ATTN_Q ... GGD_FFN_DOWN


@dataclass(frozen=True, eq=False)
class LayerWeights:
    """One layer: its projections, its norms (None = it has none), which RoPE it takes, and its window."""

    projections: dict[TargetModule, Weight]
    norms: tuple[Tensor | None, ...]
    rope: int  # -1 = none
    window: int  # 0 = none


class ModelWeights:
    """The core's model of a file, and its tensors on a device.

    Attributes:
        network: the core's `ggd_network`: scales, caps, frequencies.
        layers: by layer.
        head: (C, V).
        output_norm: (C), times what logits are scaled by.
        row_numbers: 0, 1, 2, ... as many as the largest matrix has rows.
        periods: of each kind of RoPE 1 / frequency (n_rotated / 2), None where the model has none.
        n_quantised: matrices whose rows are packed in blocks.
        on_host: tensors of the file that the device cannot compute with, by type.

    """

    def __init__(self, file: ModelFile, runtime: Runtime) -> None:
        self._file, self._runtime = file, runtime
        self._model: Any = core_ffi.NULL
        self._maps: dict[tuple[int, bool], Any] = {}
        self._largest_bytes = max(info.n_bytes for info in file.tensors.values())
        self._mapped_context: Any = ffi.NULL
        self.on_host: dict[str, int] = {}
        self.n_quantised = 0
        model = core_ffi.new("ggd_model **")
        paths = [core_ffi.new("char[]", os.fsencode(part)) for part in file.parts]
        try:
            check(core.ggd_model_load(core_ffi.new("char *[]", paths), len(paths), model))
        except UserError as error:
            file.fail(str(error))
        self._model = model[0]
        self.network = core_ffi.new("ggd_network *")
        core.ggd_model_network(self._model, self.network)
        self._store = Store(runtime, 20 * file.L + 16)
        self._uploads: list[tuple[Tensor, Any, int]] = []
        self._mapped_context = new_context(8 * file.L + 16)
        try:
            self._bind()
        except UserError:
            self.close()
            raise

    def _bind(self) -> None:
        network = self.network
        self.layers = [self._layer(index) for index in range(self._file.L)]
        self.head = self._weight(network.head)
        self.output_norm = self._vector(network.output_norm, self._file.C)
        self.periods = [
            None if network.frequencies[kind] == core_ffi.NULL else self._store.new(network.n_rotated // 2)
            for kind in range(3)
        ]
        n_rows = max(self.head.n_out, *(w.n_out for one in self.layers for w in one.projections.values()))
        self.row_numbers = self._store.new(n_rows, kind=ggml.I32)
        self._store.allocate(weights=True)
        for tensor, data, n_bytes in self._uploads:
            lib.ggml_backend_tensor_set(tensor, ffi.cast("void *", data), 0, n_bytes)
        self._uploads.clear()
        self._runtime.set(self.row_numbers, np.arange(n_rows, dtype=np.int32))
        for kind, tensor in enumerate(self.periods):
            if tensor is not None:
                n_bytes = 4 * (network.n_rotated // 2)
                frequencies = core_ffi.buffer(network.frequencies[kind], n_bytes)
                self._runtime.set(tensor, 1.0 / np.frombuffer(frequencies, dtype=np.float32))

    def _layer(self, index: int) -> LayerWeights:
        native = core_ffi.new("ggd_layer_weights *")
        check(core.ggd_model_layer(self._model, index, native))
        file, wide = self._file, bool(self.network.wide_head_norms)
        sizes = [file.C] * 4 + [file.D * (file.H if wide else 1), file.D * (file.G if wide else 1)]
        norms = tuple(
            None if native.norms[norm] == core_ffi.NULL else self._vector(native.norms[norm], sizes[norm])
            for norm in range(N_NORMS)
        )
        projections = {
            target: self._weight(native.projections[number]) for number, target in enumerate(PROJECTIONS)
        }
        return LayerWeights(projections, norms, int(native.rope), int(native.window))

    def _vector(self, data: Any, n: int) -> Tensor:
        tensor = self._store.new(n)
        self._uploads.append((tensor, int(core_ffi.cast("uintptr_t", data)), 4 * n))
        return tensor

    def _weight(self, native: Any) -> Weight:
        bias = None if native.bias == core_ffi.NULL else self._vector(native.bias, native.n_rows)
        address = int(core_ffi.cast("uintptr_t", native.data))
        usable = self._device_takes(native.type, native.n_cols)
        self.n_quantised += native.type not in (ggml.F32, ggml.F16, ggml.BF16)
        if usable and not self._runtime.maps_host_memory:
            tensor = self._store.new(native.n_cols, native.n_rows, kind=native.type)
            self._uploads.append((tensor, address, lib.ggml_nbytes(tensor)))
            return Weight(tensor, bias)
        if not usable:
            name = ffi.string(lib.ggml_type_name(native.type)).decode()
            self.on_host[name] = self.on_host.get(name, 0) + 1
        tensor = lib.ggml_new_tensor_2d(self._mapped_context, native.type, native.n_cols, native.n_rows)
        buffer = self._map(native.part, on_device=usable)
        lib.ggml_backend_tensor_alloc(buffer, tensor, ffi.cast("void *", address))
        return Weight(tensor, bias)

    def _map(self, part: int, *, on_device: bool) -> Any:
        """A buffer over a mapped file, of the device or of the host."""
        if (part, on_device) not in self._maps:
            data, n_bytes = core_ffi.new("const void **"), core_ffi.new("size_t *")
            check(core.ggd_model_part(self._model, part, data, n_bytes))
            address = ffi.cast("void *", int(core_ffi.cast("uintptr_t", data[0])))
            device = self._runtime.device if on_device else self._runtime.cpu
            largest = self._largest_bytes
            buffer = lib.ggml_backend_dev_buffer_from_host_ptr(device, address, n_bytes[0], largest)
            if buffer == ffi.NULL:
                self._file.fail("the device cannot compute with the mapped file")
            lib.ggml_backend_buffer_set_usage(buffer, ggml.USAGE_WEIGHTS)
            self._maps[part, on_device] = buffer
        return self._maps[part, on_device]

    def _device_takes(self, kind: int, n_cols: int) -> bool:
        """Whether the device multiplies and unpacks rows of a type."""
        return device_takes(self._runtime.device, kind, n_cols)

    @property
    def n_bytes(self) -> int:
        """Memory on the device."""
        return self._store.n_bytes

    def embed(self, tokens: ArrayLike) -> NDArray[np.float32]:
        """Rows of the token embedding, (..., C); see `Engine`."""
        ids = np.ascontiguousarray(token_array(tokens), dtype=np.int32)
        rows = np.empty((*ids.shape, self._file.C), dtype=np.float32)
        ids_pointer, rows_pointer = pointer("const int32_t *", ids), pointer("float *", rows)
        check(core.ggd_model_embed(self._model, ids.size, ids_pointer, rows_pointer))
        return rows

    def close(self) -> None:
        """Free the device's memory and the file's map."""
        self._store.close()
        while self._maps:
            lib.ggml_backend_buffer_free(self._maps.popitem()[1])
        if self._mapped_context != ffi.NULL:
            lib.ggml_free(self._mapped_context)
            self._mapped_context = ffi.NULL
        core.ggd_model_free(self._model)
        self._model = core_ffi.NULL


def device_takes(device: Any, kind: int, n_cols: int) -> bool:
    """Whether a device multiplies rows of a type by float32, and unpacks them."""
    context = new_context(8)
    rows = lib.ggml_new_tensor_2d(context, kind, n_cols, 64)
    numbers = lib.ggml_new_tensor_4d(context, ggml.I32, 64, 1, 1, 1)
    product = lib.ggml_mul_mat(context, rows, lib.ggml_new_tensor_2d(context, ggml.F32, n_cols, 64))
    needed = [product] if kind == ggml.F32 else [product, lib.ggml_get_rows(context, rows, numbers)]
    takes = all(lib.ggml_backend_dev_supports_op(device, one) for one in needed)
    lib.ggml_free(context)
    return takes
