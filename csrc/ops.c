// ops.c - see ops.h. Rows are independent, so threads share them out in blocks; arithmetic is the kernels'.
#include "ops.h"

#include <string.h>

enum { BLOCK_ROWS = 16, PIECE = 512 };

static size_t n_blocks(size_t m) { return ggd_ceil_div(m, BLOCK_ROWS); }
static size_t block_end(size_t m, size_t item) { return ggd_min(m, (item + 1) * BLOCK_ROWS); }

const float *ggd_load_row(const ggd_compute *compute, ggd_activation x, size_t row, size_t column, size_t n, float *buffer) {
    const void *source = ggd_activation_at(x, row, column, compute->element);
    if (compute->element == GGD_ELEMENT_F32) {
        return source;
    }
    compute->kernels->from_bf16(source, buffer, n);
    return buffer;
}

void ggd_store_row(const ggd_compute *compute, const float *values, ggd_activation x, size_t row, size_t column, size_t n) {
    void *target = ggd_activation_at(x, row, column, compute->element);
    if (compute->element == GGD_ELEMENT_BF16) {
        compute->kernels->to_bf16(values, target, n);
    } else if (target != values) {
        memcpy(target, values, n * sizeof *values);
    }
}

// ---- embedding ----

typedef struct {
    const ggd_compute *compute;
    const ggd_matrix *embedding;
    const ggd_batch *batch;
    const ggd_adapter *adapter;
    size_t hidden, ld;
    float *x;
    const float *dx;
    float *grad_offset;
} embedding_job;

static void embedding_forward_item(void *context, size_t item, size_t thread) {
    (void)thread;
    const embedding_job *job = context;
    const ggd_segment *segment = &job->batch->segments[item];
    const float *mask_row = job->adapter != NULL ? job->adapter->mask_embedding : NULL;
    for (size_t i = 0; i < (size_t)segment->n_rows; i++) {
        size_t row = (size_t)segment->first_row + i;
        int32_t token = job->batch->tokens[row];
        float *x = job->x + row * job->ld;
        ggd_matrix_unpack_row(job->compute->kernels, job->embedding, (size_t)token, x);
        if (job->batch->embedding_offset != NULL) {
            job->compute->kernels->add_scaled(job->batch->embedding_offset + (size_t)segment->sequence * job->hidden, 1.0f, x,
                                              job->hidden);
        }
        if (mask_row != NULL && token == job->adapter->mask_token_id) {
            job->compute->kernels->add_scaled(mask_row, 1.0f, x, job->hidden);
        }
    }
}

void ggd_embedding_forward(const ggd_compute *compute, const ggd_matrix *embedding, const ggd_batch *batch,
                           const ggd_adapter *adapter, float *x, size_t ld) {
    embedding_job job = {.compute = compute,
                         .embedding = embedding,
                         .batch = batch,
                         .adapter = adapter,
                         .hidden = embedding->n_cols,
                         .ld = ld,
                         .x = x};
    ggd_parallel(compute->threads, "embedding", (size_t)batch->n_segments, embedding_forward_item, &job);
}

// A thread owns a range of columns and adds up the rows in order.
static void embedding_backward_item(void *context, size_t item, size_t thread) {
    (void)thread;
    const embedding_job *job = context;
    size_t column = item * PIECE, n = ggd_min(job->hidden - column, PIECE);
    const ggd_kernels *kernels = job->compute->kernels;
    float *grad_mask = job->adapter != NULL ? job->adapter->grad_mask_embedding : NULL;
    for (size_t b = 0; job->grad_offset != NULL && b < (size_t)job->batch->n_sequences; b++) {
        memset(job->grad_offset + b * job->hidden + column, 0, n * sizeof(float));
    }
    for (size_t s = 0; s < (size_t)job->batch->n_segments; s++) {
        const ggd_segment *segment = &job->batch->segments[s];
        for (size_t i = 0; i < (size_t)segment->n_rows; i++) {
            size_t row = (size_t)segment->first_row + i;
            const float *dx = job->dx + row * job->ld + column;
            if (job->grad_offset != NULL) {
                kernels->add_scaled(dx, 1.0f, job->grad_offset + (size_t)segment->sequence * job->hidden + column, n);
            }
            if (grad_mask != NULL && job->batch->tokens[row] == job->adapter->mask_token_id) {
                kernels->add_scaled(dx, 1.0f, grad_mask + column, n);
            }
        }
    }
}

void ggd_embedding_backward(const ggd_compute *compute, const ggd_batch *batch, const ggd_adapter *adapter, size_t hidden,
                            const float *dx, size_t ld, float *grad_offset) {
    embedding_job job = {
        .compute = compute, .batch = batch, .adapter = adapter, .hidden = hidden, .ld = ld, .dx = dx, .grad_offset = grad_offset};
    ggd_parallel(compute->threads, "embedding", ggd_ceil_div(hidden, PIECE), embedding_backward_item, &job);
}

// ---- RMSNorm (Zhang and Sennrich 2019, arXiv:1910.07467) ----

typedef struct {
    const ggd_compute *compute;
    const ggd_norm *norm;
    size_t m, ld;
    const float *x, *dy;
    ggd_operand y;
    float *dx;
} norm_job;

// A piece of a row to its place in int8, if that is wanted.
static void store_int8(const ggd_compute *compute, const float *values, const ggd_int8_rows *rows, size_t row, size_t column,
                       size_t n) {
    if (rows != NULL) {
        ggd_int8_quantise_row(compute, values, GGD_ELEMENT_F32, n, GGD_INT8_FORWARD_BLOCK, rows, row, column);
    }
}

static void rmsnorm_forward_item(void *context, size_t item, size_t thread) {
    const norm_job *job = context;
    const ggd_norm *norm = job->norm;
    float *buffer = (float *)ggd_scratch(job->compute, thread);
    for (size_t row = item * BLOCK_ROWS; row < block_end(job->m, item); row++) {
        const float *x = job->x + row * job->ld;
        norm->scales[row] = job->compute->kernels->rmsnorm(x, norm->weight, norm->eps, buffer, norm->n);
        ggd_store_row(job->compute, buffer, job->y.x, row, 0, norm->n);
        store_int8(job->compute, buffer, job->y.int8, row, 0, norm->n);
        if (norm->saved.data != NULL) {
            ggd_store_row(job->compute, x, norm->saved, row, 0, norm->n);
        }
    }
}

void ggd_rmsnorm_forward(const ggd_compute *compute, const ggd_norm *norm, size_t m, const float *x, size_t ld, ggd_operand y) {
    norm_job job = {.compute = compute, .norm = norm, .m = m, .ld = ld, .x = x, .y = y};
    ggd_parallel(compute->threads, "norm", n_blocks(m), rmsnorm_forward_item, &job);
}

static void rmsnorm_repeat_item(void *context, size_t item, size_t thread) {
    const norm_job *job = context;
    const ggd_norm *norm = job->norm;
    float *buffer = (float *)ggd_scratch(job->compute, thread);
    for (size_t row = item * BLOCK_ROWS; row < block_end(job->m, item); row++) {
        const float *x = ggd_load_row(job->compute, norm->saved, row, 0, norm->n, buffer + norm->n);
        job->compute->kernels->rmsnorm(x, norm->weight, norm->eps, buffer, norm->n);
        ggd_store_row(job->compute, buffer, job->y.x, row, 0, norm->n);
    }
}

void ggd_rmsnorm_repeat(const ggd_compute *compute, const ggd_norm *norm, size_t m, ggd_activation y) {
    norm_job job = {.compute = compute, .norm = norm, .m = m, .y = {.x = y}};
    ggd_parallel(compute->threads, "norm", n_blocks(m), rmsnorm_repeat_item, &job);
}

static void rmsnorm_backward_item(void *context, size_t item, size_t thread) {
    const norm_job *job = context;
    const ggd_norm *norm = job->norm;
    float *buffer = (float *)ggd_scratch(job->compute, thread);
    for (size_t row = item * BLOCK_ROWS; row < block_end(job->m, item); row++) {
        const float *x = ggd_load_row(job->compute, norm->saved, row, 0, norm->n, buffer);
        float *dx = job->dx + row * job->ld;
        job->compute->kernels->rmsnorm_backward(job->dy + row * job->ld, x, norm->weight, norm->scales[row], dx, norm->n);
        ggd_store_row(job->compute, dx, job->y.x, row, 0, norm->n);
    }
}

void ggd_rmsnorm_backward(const ggd_compute *compute, const ggd_norm *norm, size_t m, const float *dy, size_t ld, float *dx,
                          ggd_activation dx_activation) {
    norm_job job = {.compute = compute, .norm = norm, .m = m, .ld = ld, .dy = dy, .dx = dx, .y = {.x = dx_activation}};
    ggd_parallel(compute->threads, "norm", n_blocks(m), rmsnorm_backward_item, &job);
}

// ---- RoPE (Su et al. 2021, arXiv:2104.09864); its backward, the inverse rotation, happens in attention.c ----

typedef struct {
    const ggd_compute *compute;
    const ggd_batch *batch;
    const ggd_heads *heads;
    size_t n_heads;
    const float *x;
    size_t ld;
    ggd_activation rotated;
} rope_job;

static void rope_forward_item(void *context, size_t item, size_t thread) {
    const rope_job *job = context;
    const ggd_segment *segment = &job->batch->segments[item];
    const ggd_heads *heads = job->heads;
    const ggd_kernels *kernels = job->compute->kernels;
    size_t half = heads->head_size / 2, n = job->n_heads * heads->head_size;
    float *buffer = (float *)ggd_scratch(job->compute, thread);
    for (size_t i = 0; i < (size_t)segment->n_rows; i++) {
        size_t row = (size_t)segment->first_row + i;
        memcpy(buffer, job->x + row * job->ld, n * sizeof *buffer);
        kernels->rope(buffer, heads->cosine + i * half, heads->sine + i * half, 1.0f, job->n_heads, heads->head_size);
        ggd_store_row(job->compute, buffer, job->rotated, row, 0, n);
    }
}

void ggd_rope_forward(const ggd_compute *compute, const ggd_batch *batch, const ggd_heads *heads, size_t n_heads, const float *x,
                      size_t ld, ggd_activation rotated) {
    rope_job job = {compute, batch, heads, n_heads, x, ld, rotated};
    ggd_parallel(compute->threads, "rope", (size_t)batch->n_segments, rope_forward_item, &job);
}

// ---- SwiGLU (Shazeer 2020, arXiv:2002.05202) ----

typedef struct {
    const ggd_compute *compute;
    size_t m, n;
    ggd_activation gate, up, dh;
    ggd_operand h;
} swiglu_job;

static void swiglu_forward_item(void *context, size_t item, size_t thread) {
    const swiglu_job *job = context;
    float *buffer = (float *)ggd_scratch(job->compute, thread);
    for (size_t row = item * BLOCK_ROWS; row < block_end(job->m, item); row++) {
        for (size_t column = 0; column < job->n; column += PIECE) {
            size_t n = ggd_min(job->n - column, PIECE);
            const float *gate = ggd_load_row(job->compute, job->gate, row, column, n, buffer);
            const float *up = ggd_load_row(job->compute, job->up, row, column, n, buffer + PIECE);
            job->compute->kernels->swiglu(gate, up, buffer + 2 * PIECE, n);
            ggd_store_row(job->compute, buffer + 2 * PIECE, job->h.x, row, column, n);
            store_int8(job->compute, buffer + 2 * PIECE, job->h.int8, row, column, n);
        }
    }
}

void ggd_swiglu_forward(const ggd_compute *compute, size_t m, size_t n, ggd_activation gate, ggd_activation up, ggd_operand h) {
    swiglu_job job = {.compute = compute, .m = m, .n = n, .gate = gate, .up = up, .h = h};
    ggd_parallel(compute->threads, "swiglu", n_blocks(m), swiglu_forward_item, &job);
}

static void swiglu_backward_item(void *context, size_t item, size_t thread) {
    const swiglu_job *job = context;
    float *buffer = (float *)ggd_scratch(job->compute, thread);
    float *dgate = buffer + 3 * PIECE, *dup = buffer + 4 * PIECE, *h = buffer + 5 * PIECE;
    for (size_t row = item * BLOCK_ROWS; row < block_end(job->m, item); row++) {
        for (size_t column = 0; column < job->n; column += PIECE) {
            size_t n = ggd_min(job->n - column, PIECE);
            const float *gate = ggd_load_row(job->compute, job->gate, row, column, n, buffer);
            const float *up = ggd_load_row(job->compute, job->up, row, column, n, buffer + PIECE);
            const float *dh = ggd_load_row(job->compute, job->dh, row, column, n, buffer + 2 * PIECE);
            job->compute->kernels->swiglu_backward(gate, up, dh, dgate, dup, h, n);
            ggd_store_row(job->compute, dgate, job->dh, row, column, n);
            ggd_store_row(job->compute, dup, job->up, row, column, n);
            ggd_store_row(job->compute, h, job->gate, row, column, n);
        }
    }
}

void ggd_swiglu_backward(const ggd_compute *compute, size_t m, size_t n, ggd_activation gate, ggd_activation up,
                         ggd_activation dh) {
    swiglu_job job = {.compute = compute, .m = m, .n = n, .gate = gate, .up = up, .dh = dh};
    ggd_parallel(compute->threads, "swiglu", n_blocks(m), swiglu_backward_item, &job);
}

// ---- conversion ----

typedef struct {
    const ggd_compute *compute;
    size_t m, n, ld;
    const float *x;
    ggd_activation y;
} convert_job;

static void to_activation_item(void *context, size_t item, size_t thread) {
    (void)thread;
    const convert_job *job = context;
    for (size_t row = item * BLOCK_ROWS; row < block_end(job->m, item); row++) {
        ggd_store_row(job->compute, job->x + row * job->ld, job->y, row, 0, job->n);
    }
}

void ggd_to_activation(const ggd_compute *compute, size_t m, size_t n, const float *x, size_t ld, ggd_activation y) {
    convert_job job = {compute, m, n, ld, x, y};
    ggd_parallel(compute->threads, "norm", n_blocks(m), to_activation_item, &job);
}
