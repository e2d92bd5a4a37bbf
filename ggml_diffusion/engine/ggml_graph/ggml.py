"""ggml's C API as far as the engine uses it, and the libraries. What packs tensors is in formats/packing.py.

The libraries are those inside llama-cpp-python, whose version is checked when the core is loaded (a process
holds one ggml). cffi in ABI mode: nothing is compiled, so an installation with other backends needs no build.
Deliberately no arithmetic and no ownership: runtime.py has both.
Source: ggml.h, ggml-backend.h of the pinned version.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Any

from cffi import FFI

from ggml_diffusion.engine.native import lib as core

_DECLARATIONS = """
typedef struct ggml_context ggml_context;
typedef struct ggml_cgraph ggml_cgraph;
typedef struct ggml_backend_buffer_type *buffer_type;
typedef struct ggml_backend_buffer *buffer;
typedef struct ggml_backend *backend;
typedef struct ggml_backend_device *device;
typedef struct ggml_backend_reg *registry;
typedef struct ggml_backend_sched *sched;

typedef struct ggml_tensor {
    int type;
    buffer buffer;
    int64_t ne[4];
    size_t nb[4];
    int op;
    int32_t op_params[16];
    int32_t flags;
    struct ggml_tensor *src[10];
    struct ggml_tensor *view_src;
    size_t view_offs;
    void *data;
    char name[64];
    void *extra;
    char padding[8];
} tensor;

typedef struct { size_t mem_size; void *mem_buffer; bool no_alloc; } init_params;
typedef struct {
    const char *name, *description;
    size_t memory_free, memory_total;
    int type;
    const char *device_id;
    bool async, host_buffer, buffer_from_host_ptr, events, mmap_support;
} dev_props;

size_t ggml_tensor_overhead(void);
size_t ggml_graph_overhead_custom(size_t size, bool grads);
ggml_context *ggml_init(init_params params);
void ggml_free(ggml_context *ctx);
size_t ggml_nbytes(const tensor *t);
size_t ggml_row_size(int type, int64_t ne);
const char *ggml_type_name(int type);
const char *ggml_op_desc(const tensor *t);
bool ggml_is_contiguous(const tensor *t);
void ggml_set_input(tensor *t);
void ggml_set_output(tensor *t);
tensor *ggml_new_tensor_4d(ggml_context *, int type, int64_t, int64_t, int64_t, int64_t);
tensor *ggml_new_tensor_2d(ggml_context *, int type, int64_t, int64_t);
ggml_cgraph *ggml_new_graph_custom(ggml_context *, size_t size, bool grads);
void ggml_build_forward_expand(ggml_cgraph *, tensor *);
tensor *ggml_graph_node(ggml_cgraph *, int i);

tensor *ggml_add(ggml_context *, tensor *, tensor *);
tensor *ggml_sub(ggml_context *, tensor *, tensor *);
tensor *ggml_mul(ggml_context *, tensor *, tensor *);
tensor *ggml_div(ggml_context *, tensor *, tensor *);
tensor *ggml_sqr(ggml_context *, tensor *);
tensor *ggml_sqrt(ggml_context *, tensor *);
tensor *ggml_tanh(ggml_context *, tensor *);
tensor *ggml_sigmoid(ggml_context *, tensor *);
tensor *ggml_sum_rows(ggml_context *, tensor *);
tensor *ggml_argmax(ggml_context *, tensor *);
tensor *ggml_concat(ggml_context *, tensor *, tensor *, int dim);
tensor *ggml_rms_norm(ggml_context *, tensor *, float eps);
tensor *ggml_mul_mat(ggml_context *, tensor *, tensor *);
bool ggml_prec_set_acc(tensor *, int prec);
tensor *ggml_scale(ggml_context *, tensor *, float s);
tensor *ggml_scale_bias(ggml_context *, tensor *, float s, float b);
tensor *ggml_cont(ggml_context *, tensor *);
tensor *ggml_cpy(ggml_context *, tensor *, tensor *);
tensor *ggml_reshape_4d(ggml_context *, tensor *, int64_t, int64_t, int64_t, int64_t);
tensor *ggml_view_1d(ggml_context *, tensor *, int64_t, size_t offset);
tensor *ggml_view_2d(ggml_context *, tensor *, int64_t, int64_t, size_t nb1, size_t offset);
tensor *ggml_view_3d(ggml_context *, tensor *, int64_t, int64_t, int64_t, size_t nb1, size_t nb2,
                     size_t offset);
tensor *ggml_permute(ggml_context *, tensor *, int, int, int, int);
tensor *ggml_transpose(ggml_context *, tensor *);
tensor *ggml_get_rows(ggml_context *, tensor *, tensor *);
tensor *ggml_set_rows(ggml_context *, tensor *, tensor *, tensor *);
tensor *ggml_soft_max_ext(ggml_context *, tensor *, tensor *mask, float scale, float max_bias);
tensor *ggml_rope_ext(ggml_context *, tensor *, tensor *positions, tensor *factors, int n_dims, int mode,
                      int n_ctx_orig, float freq_base, float freq_scale, float ext_factor, float attn_factor,
                      float beta_fast, float beta_slow);

size_t ggml_backend_buft_get_alignment(buffer_type);
size_t ggml_backend_buft_get_alloc_size(buffer_type, const tensor *);
buffer ggml_backend_alloc_ctx_tensors_from_buft(ggml_context *, buffer_type);
void ggml_backend_buffer_free(buffer);
size_t ggml_backend_buffer_get_size(buffer);
void ggml_backend_buffer_clear(buffer, uint8_t value);
void ggml_backend_buffer_set_usage(buffer, int usage);
int ggml_backend_tensor_alloc(buffer, tensor *, void *addr);
void ggml_backend_tensor_set(tensor *, const void *data, size_t offset, size_t size);
void ggml_backend_tensor_get(const tensor *, void *data, size_t offset, size_t size);
void ggml_backend_tensor_set_async(backend, tensor *, const void *data, size_t offset, size_t size);
void ggml_backend_tensor_get_async(backend, const tensor *, void *data, size_t offset, size_t size);
void ggml_backend_tensor_memset(tensor *, uint8_t value, size_t offset, size_t size);
void ggml_backend_synchronize(backend);
void ggml_backend_free(backend);

size_t ggml_backend_dev_count(void);
device ggml_backend_dev_get(size_t index);
void ggml_backend_dev_get_props(device, dev_props *);
registry ggml_backend_dev_backend_reg(device);
backend ggml_backend_dev_init(device, const char *params);
buffer_type ggml_backend_dev_buffer_type(device);
buffer ggml_backend_dev_buffer_from_host_ptr(device, void *ptr, size_t size, size_t max_tensor_size);
bool ggml_backend_dev_supports_op(device, const tensor *);
const char *ggml_backend_reg_name(registry);
void *ggml_backend_reg_get_proc_address(registry, const char *name);
void ggml_backend_load_all(void);

sched ggml_backend_sched_new(backend *, buffer_type *, int n, size_t graph_size, bool parallel,
                             bool op_offload);
void ggml_backend_sched_free(sched);
void ggml_backend_sched_reserve_size(sched, ggml_cgraph *, size_t *sizes);
size_t ggml_backend_sched_get_buffer_size(sched, backend);
backend ggml_backend_sched_get_tensor_backend(sched, tensor *);
bool ggml_backend_sched_alloc_graph(sched, ggml_cgraph *);
int ggml_backend_sched_graph_compute(sched, ggml_cgraph *);

void ggml_log_set(void (*log)(int level, const char *text, void *data), void *data);
"""

F32, F16, BF16, I32 = 0, 1, 30, 26  # enum ggml_type
CPU, GPU, INTEGRATED_GPU, ACCELERATOR = 0, 1, 2, 3  # enum ggml_backend_dev_type
USAGE_WEIGHTS = 1  # enum ggml_backend_buffer_usage
PRECISION_F32 = 10  # enum ggml_prec
ROPE_PAIRS, ROPE_HALVES = 0, 2  # GGML_ROPE_TYPE_NORMAL, GGML_ROPE_TYPE_NEOX

ffi = FFI()
ffi.cdef(_DECLARATIONS)


def library_folder() -> Path:
    """Where llama-cpp-python keeps ggml's libraries."""
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise ImportError("llama-cpp-python is not installed")
    return Path(spec.origin).parent / "lib"


@ffi.callback("void(int, const char *, void *)")  # type: ignore[untyped-decorator]
def quiet(level: int, text: Any, _: Any) -> None:
    """Warnings and errors of ggml go to the standard error, its chatter nowhere."""
    if level in (3, 4):
        sys.stderr.write(ffi.string(text).decode(errors="replace"))


def _load() -> Any:
    core.ggd_ggml_version()  # the core's import has checked the version of what is loaded here
    suffix = "dylib" if sys.platform == "darwin" else "so"
    loaded = ffi.dlopen(str(library_folder() / f"libggml.{suffix}"))
    if ffi.sizeof("tensor") + 32 != loaded.ggml_tensor_overhead():  # 32: struct ggml_object before it
        raise ImportError("this ggml lays its tensors out differently from the one that is declared here")
    loaded.ggml_log_set(quiet, ffi.NULL)
    loaded.ggml_backend_load_all()
    return loaded


lib: Any = _load()
