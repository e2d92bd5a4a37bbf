"""A device with its memory and its graphs: what owns something in ggml, and gives it back.

A `Runtime` has the device that was asked for and GGML's CPU backend, to which the scheduler gives what the
device lacks. A `Store` is tensors that stay in the device's memory; a `Program` is a graph, allocated once
and run many times. Deliberately no arithmetic: operations.py writes the graphs.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ggml_diffusion.engine.ggml_graph import ggml
from ggml_diffusion.engine.ggml_graph.ggml import ffi, lib
from ggml_diffusion.errors import UserError

Tensor = Any  # a `tensor *`

_DTYPES = {ggml.F32: np.dtype(np.float32), ggml.I32: np.dtype(np.int32)}


class Runtime:
    """Backends of one device, and of the CPU behind it.

    Attributes:
        device: ggml's handle of the device.
        cpu: that of GGML's CPU backend.
        maps_host_memory: whether the device computes with weights where the mapped file has them.
        buffer_type: of the device's memory.

    """

    def __init__(self, device: Any, cpu: Any, n_threads: int, *, maps_host_memory: bool) -> None:
        self.device, self.cpu = device, cpu
        self.maps_host_memory = maps_host_memory
        self._n_threads = n_threads
        self._backends: list[Any] = []
        self.restart()
        self.buffer_type = lib.ggml_backend_dev_buffer_type(device)

    @property
    def on_cpu(self) -> bool:
        """Whether there is nothing but GGML's CPU backend."""
        return len(self._backends) == 1

    def restart(self) -> None:
        """Start the backends, anew if they run; programs must be closed before, stores may stay."""
        self.close()
        lib.ggml_log_set(ggml.quiet, ffi.NULL)  # importing llama_cpp makes ggml talk
        devices = [self.device] if self.device == self.cpu else [self.device, self.cpu]
        self._backends = [_start(one, self._n_threads) for one in devices]

    def close(self) -> None:
        """Free the backends; programs of this runtime must be closed before."""
        while self._backends:
            lib.ggml_backend_free(self._backends.pop())

    def schedule(self, graph_size: int) -> Any:
        """A scheduler over the backends, to be freed by the caller."""
        backends = ffi.new("backend[]", self._backends)
        return lib.ggml_backend_sched_new(backends, ffi.NULL, len(backends), graph_size, False, False)

    def buffer_bytes(self, schedule: Any) -> int:
        """What a scheduler holds for its graph."""
        return sum(lib.ggml_backend_sched_get_buffer_size(schedule, one) for one in self._backends)

    def set(self, tensor: Tensor, values: NDArray[Any]) -> None:
        """Copy an array to a tensor of as many bytes; it is there when the call returns."""
        array = np.ascontiguousarray(values)
        lib.ggml_backend_tensor_set(tensor, ffi.from_buffer(array), 0, array.nbytes)

    def get(self, tensor: Tensor) -> NDArray[Any]:
        """A tensor's values, its slowest dimension first, without dimensions of one at the front."""
        shape = tuple(tensor.ne[i] for i in range(3, -1, -1))
        while len(shape) > 1 and shape[0] == 1:
            shape = shape[1:]
        array = np.empty(shape, _DTYPES[tensor.type])
        lib.ggml_backend_tensor_get(tensor, ffi.from_buffer(array), 0, array.nbytes)
        return array


def _start(device: Any, n_threads: int) -> Any:
    backend = lib.ggml_backend_dev_init(device, ffi.NULL)
    if backend == ffi.NULL:
        properties = ffi.new("dev_props *")
        lib.ggml_backend_dev_get_props(device, properties)
        raise UserError(f"the device {ffi.string(properties.name).decode()} does not start")
    registry = lib.ggml_backend_dev_backend_reg(device)
    function = lib.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_set_n_threads")
    if function != ffi.NULL:
        ffi.cast("void(*)(backend, int)", function)(backend, n_threads)
    return backend


class Store:
    """Tensors that stay in a device's memory until `close`."""

    def __init__(self, runtime: Runtime, n_tensors: int) -> None:
        self._runtime = runtime
        self.context = new_context(n_tensors)
        self._buffer = ffi.NULL

    def new(self, *sizes: int, kind: int = ggml.F32) -> Tensor:
        """A tensor, fastest dimension first; it has memory after `allocate`."""
        return lib.ggml_new_tensor_4d(self.context, kind, *sizes, *[1] * (4 - len(sizes)))

    def allocate(self, *, weights: bool = False) -> None:
        """Give all tensors that have none their memory, filled with zeros.

        Raises:
            UserError: the device has not so much.

        """
        self._buffer = lib.ggml_backend_alloc_ctx_tensors_from_buft(self.context, self._runtime.buffer_type)
        if self._buffer == ffi.NULL:
            raise UserError("the device has too little free memory for this model")
        lib.ggml_backend_buffer_clear(self._buffer, 0)
        if weights:
            lib.ggml_backend_buffer_set_usage(self._buffer, ggml.USAGE_WEIGHTS)

    @property
    def n_bytes(self) -> int:
        """Memory of its own."""
        return 0 if self._buffer == ffi.NULL else int(lib.ggml_backend_buffer_get_size(self._buffer))

    def close(self) -> None:
        """Free the memory."""
        if self._buffer != ffi.NULL:
            lib.ggml_backend_buffer_free(self._buffer)
            self._buffer = ffi.NULL
        if self.context != ffi.NULL:
            lib.ggml_free(self.context)
            self.context = ffi.NULL


class Program:
    """A graph on a runtime: written by `write`, allocated, and run as often as is wanted."""

    def __init__(
        self, runtime: Runtime, graph_size: int, write: Callable[["Graph"], Sequence[Tensor]]
    ) -> None:
        self._runtime = runtime
        self._context = new_context(2 * graph_size, graph_size)
        self._schedule = ffi.NULL
        graph = Graph(self._context, lib.ggml_new_graph_custom(self._context, graph_size, False))
        self.outputs = tuple(write(graph))
        for output in self.outputs:
            lib.ggml_set_output(output)
            graph.expand(output)
        self._graph = graph.nodes
        self._schedule = runtime.schedule(graph_size)
        if not lib.ggml_backend_sched_alloc_graph(self._schedule, self._graph):
            self.close()
            raise UserError("the device has too little free memory for a batch of this size")

    @property
    def n_bytes(self) -> int:
        """Memory of its activations."""
        return self._runtime.buffer_bytes(self._schedule)

    def run(self) -> None:
        """Compute; outputs can be read afterwards.

        Raises:
            UserError: the device failed.

        """
        status = lib.ggml_backend_sched_graph_compute(self._schedule, self._graph)
        if status != 0:
            raise UserError(f"the device failed to compute (status {status})")

    def close(self) -> None:
        """Free its memory."""
        if self._schedule != ffi.NULL:
            lib.ggml_backend_sched_free(self._schedule)
            self._schedule = ffi.NULL
        if self._context != ffi.NULL:
            lib.ggml_free(self._context)
            self._context = ffi.NULL


class Graph:
    """A graph that is being written: the context of its tensors, and the order of their computation."""

    def __init__(self, context: Any, nodes: Any) -> None:
        self.context = context
        self.nodes = nodes

    def expand(self, tensor: Tensor) -> None:
        """Compute a tensor, and what it needs, after all that was expanded before."""
        lib.ggml_build_forward_expand(self.nodes, tensor)


def new_context(n_tensors: int, graph_size: int = 0) -> Any:
    """A ggml context for so many tensors and one graph, without memory for their data."""
    n_bytes = n_tensors * lib.ggml_tensor_overhead()
    if graph_size:
        n_bytes += lib.ggml_graph_overhead_custom(graph_size, False)
    context = lib.ggml_init({"mem_size": n_bytes + 4096, "mem_buffer": ffi.NULL, "no_alloc": True})
    if context == ffi.NULL:
        raise UserError("out of memory for a graph")
    return context
