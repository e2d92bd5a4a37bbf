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
    const ggd_embedding *embedding;
    const ggd_batch *batch;
    const ggd_adapter *adapter;
    size_t ld;
    float *x;
    const float *dx;
    float *grad_offset;
} embedding_job;

static void embedding_forward_item(void *context, size_t item, size_t thread) {
    (void)thread;
    const embedding_job *job = context;
    const ggd_kernels *kernels = job->compute->kernels;
    const ggd_segment *segment = &job->batch->segments[item];
    size_t hidden = job->embedding->rows.n_cols;
    const float *offset = job->batch->embedding_offset, *mask_row = job->adapter != NULL ? job->adapter->mask_embedding : NULL;
    for (size_t i = 0; i < (size_t)segment->n_rows; i++) {
        size_t row = (size_t)segment->first_row + i;
        int32_t token = job->batch->tokens[row];
        float *x = job->x + row * job->ld;
        ggd_matrix_unpack_row(kernels, &job->embedding->rows, (size_t)token, x);
        if (offset != NULL) {
            kernels->add_scaled(offset + (size_t)segment->sequence * hidden, 1.0f, x, hidden);
        }
        if (mask_row != NULL && token == job->adapter->mask_token_id) {
            kernels->add_scaled(mask_row, 1.0f, x, hidden);
        }
        if (job->embedding->scale != 1.0f) {
            kernels->scale(x, job->embedding->scale, hidden);
        }
    }
}

void ggd_embedding_forward(const ggd_compute *compute, const ggd_embedding *embedding, const ggd_batch *batch,
                           const ggd_adapter *adapter, float *x, size_t ld) {
    embedding_job job = {.compute = compute, .embedding = embedding, .batch = batch, .adapter = adapter, .ld = ld, .x = x};
    ggd_parallel(compute->threads, "embedding", (size_t)batch->n_segments, embedding_forward_item, &job);
}

// A thread owns a range of columns and adds up the rows in order.
static void embedding_backward_item(void *context, size_t item, size_t thread) {
    (void)thread;
    const embedding_job *job = context;
    size_t hidden = job->embedding->rows.n_cols, column = item * PIECE, n = ggd_min(hidden - column, PIECE);
    const ggd_kernels *kernels = job->compute->kernels;
    float *grad_mask = job->adapter != NULL ? job->adapter->grad_mask_embedding : NULL, scale = job->embedding->scale;
    for (size_t b = 0; job->grad_offset != NULL && b < (size_t)job->batch->n_sequences; b++) {
        memset(job->grad_offset + b * hidden + column, 0, n * sizeof(float));
    }
    for (size_t s = 0; s < (size_t)job->batch->n_segments; s++) {
        const ggd_segment *segment = &job->batch->segments[s];
        for (size_t i = 0; i < (size_t)segment->n_rows; i++) {
            size_t row = (size_t)segment->first_row + i;
            const float *dx = job->dx + row * job->ld + column;
            if (job->grad_offset != NULL) {
                kernels->add_scaled(dx, scale, job->grad_offset + (size_t)segment->sequence * hidden + column, n);
            }
            if (grad_mask != NULL && job->batch->tokens[row] == job->adapter->mask_token_id) {
                kernels->add_scaled(dx, scale, grad_mask + column, n);
            }
        }
    }
}

void ggd_embedding_backward(const ggd_compute *compute, const ggd_embedding *embedding, const ggd_batch *batch,
                            const ggd_adapter *adapter, const float *dx, size_t ld, float *grad_offset) {
    embedding_job job = {.compute = compute,
                         .embedding = embedding,
                         .batch = batch,
                         .adapter = adapter,
                         .ld = ld,
                         .dx = dx,
                         .grad_offset = grad_offset};
    ggd_parallel(compute->threads, "embedding", ggd_ceil_div(embedding->rows.n_cols, PIECE), embedding_backward_item, &job);
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

// y = norm(x); returns r.
static float norm_row(const ggd_compute *compute, const ggd_norm *norm, const float *x, float *y) {
    if (norm->weight != NULL) {
        return compute->kernels->rmsnorm(x, norm->weight, norm->eps, y, norm->n);
    }
    memmove(y, x, norm->n * sizeof *y);
    return 1.0f;
}

// dx += the gradient of x
static void norm_row_backward(const ggd_compute *compute, const ggd_norm *norm, const float *dy, const float *x, float r,
                              float *dx) {
    if (norm->weight != NULL) {
        compute->kernels->rmsnorm_backward(dy, x, norm->weight, r, dx, norm->n);
    } else {
        compute->kernels->add_scaled(dy, 1.0f, dx, norm->n);
    }
}

static void rmsnorm_forward_item(void *context, size_t item, size_t thread) {
    const norm_job *job = context;
    const ggd_norm *norm = job->norm;
    float *buffer = (float *)ggd_scratch(job->compute, thread);
    for (size_t row = item * BLOCK_ROWS; row < block_end(job->m, item); row++) {
        const float *x = job->x + row * job->ld;
        norm->scales[row] = norm_row(job->compute, norm, x, buffer);
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
        norm_row(job->compute, norm, x, buffer);
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
        norm_row_backward(job->compute, norm, job->dy + row * job->ld, x, norm->scales[row], dx);
        ggd_store_row(job->compute, dx, job->y.x, row, 0, norm->n);
    }
}

void ggd_rmsnorm_backward(const ggd_compute *compute, const ggd_norm *norm, size_t m, const float *dy, size_t ld, float *dx,
                          ggd_activation dx_activation) {
    norm_job job = {.compute = compute, .norm = norm, .m = m, .ld = ld, .dy = dy, .dx = dx, .y = {.x = dx_activation}};
    ggd_parallel(compute->threads, "norm", n_blocks(m), rmsnorm_backward_item, &job);
}

// ---- what a block adds to the residual stream ----

typedef struct {
    const ggd_compute *compute;
    const ggd_norm *norm;
    float scale;
    size_t m, ld;
    const float *block, *dx;
    float *x;
    ggd_activation dblock;
} block_job;

static void block_forward_item(void *context, size_t item, size_t thread) {
    const block_job *job = context;
    const ggd_norm *norm = job->norm;
    float *buffer = (float *)ggd_scratch(job->compute, thread);
    for (size_t row = item * BLOCK_ROWS; row < block_end(job->m, item); row++) {
        const float *block = job->block + row * job->ld;
        float r = norm_row(job->compute, norm, block, buffer);
        job->compute->kernels->add_scaled(buffer, job->scale, job->x + row * job->ld, norm->n);
        if (norm->weight != NULL) {
            norm->scales[row] = r;
        }
        if (norm->saved.data != NULL) {
            ggd_store_row(job->compute, block, norm->saved, row, 0, norm->n);
        }
    }
}

void ggd_block_forward(const ggd_compute *compute, const ggd_norm *norm, float scale, size_t m, const float *block, float *x,
                       size_t ld) {
    block_job job = {.compute = compute, .norm = norm, .scale = scale, .m = m, .ld = ld, .block = block, .x = x};
    ggd_parallel(compute->threads, "norm", n_blocks(m), block_forward_item, &job);
}

static void block_backward_item(void *context, size_t item, size_t thread) {
    const block_job *job = context;
    const ggd_norm *norm = job->norm;
    float *buffer = (float *)ggd_scratch(job->compute, thread), *dblock = buffer + norm->n;
    for (size_t row = item * BLOCK_ROWS; row < block_end(job->m, item); row++) {
        int normed = norm->weight != NULL;
        const float *block = normed ? ggd_load_row(job->compute, norm->saved, row, 0, norm->n, buffer) : NULL;
        memset(dblock, 0, norm->n * sizeof *dblock);
        norm_row_backward(job->compute, norm, job->dx + row * job->ld, block, normed ? norm->scales[row] : 1.0f, dblock);
        if (job->scale != 1.0f) {
            job->compute->kernels->scale(dblock, job->scale, norm->n);
        }
        ggd_store_row(job->compute, dblock, job->dblock, row, 0, norm->n);
    }
}

void ggd_block_backward(const ggd_compute *compute, const ggd_norm *norm, float scale, size_t m, const float *dx, size_t ld,
                        ggd_activation dblock) {
    block_job job = {.compute = compute, .norm = norm, .scale = scale, .m = m, .ld = ld, .dx = dx, .dblock = dblock};
    ggd_parallel(compute->threads, "norm", n_blocks(m), block_backward_item, &job);
}

// ---- queries and keys: their norm, and RoPE; its backward, the inverse rotation, happens in attention.c ----

void ggd_rotate(const ggd_kernels *kernels, const ggd_heads *heads, const ggd_segment *segment, size_t position, float direction,
                size_t n_heads, float *x) {
    int is_long = heads->long_rope.cosine != NULL && (size_t)segment->n_positions > heads->original_context;
    const ggd_rope_table *table = is_long ? &heads->long_rope : &heads->rope;
    if (table->cosine != NULL) {
        size_t at = position * (heads->n_rotated / 2);
        kernels->rope[heads->rope_kind](x, table->cosine + at, table->sine + at, direction, n_heads, heads->head_size,
                                        heads->n_rotated);
    }
}

typedef struct {
    const ggd_compute *compute;
    const ggd_batch *batch;
    const ggd_heads *heads;
    const ggd_norm *norm;
    size_t n_heads;
    const float *x;
    size_t ld;
    ggd_activation y;  // what is rotated; in the backward the gradient
} heads_job;

// Norms a row in pieces, in place, and keeps what it was.
static void norm_heads(const heads_job *job, size_t row, size_t n, float *values) {
    const ggd_norm *norm = job->norm;
    size_t pieces = n / norm->n;
    if (norm->saved.data != NULL) {
        ggd_store_row(job->compute, values, norm->saved, row, 0, n);
    }
    for (size_t piece = 0; piece < pieces; piece++) {
        float *values_piece = values + piece * norm->n;
        norm->scales[row * pieces + piece] = norm_row(job->compute, norm, values_piece, values_piece);
    }
}

static void heads_forward_item(void *context, size_t item, size_t thread) {
    const heads_job *job = context;
    const ggd_segment *segment = &job->batch->segments[item];
    size_t n = job->n_heads * job->heads->head_size;
    float *buffer = (float *)ggd_scratch(job->compute, thread);
    for (size_t i = 0; i < (size_t)segment->n_rows; i++) {
        size_t row = (size_t)segment->first_row + i, position = ggd_position(job->batch, segment, i);
        memcpy(buffer, job->x + row * job->ld, n * sizeof *buffer);
        if (job->norm->weight != NULL) {
            norm_heads(job, row, n, buffer);
        }
        ggd_rotate(job->compute->kernels, job->heads, segment, position, 1.0f, job->n_heads, buffer);
        float scale = ggd_query_scale(job->heads, position);
        if (scale != 1.0f) {
            job->compute->kernels->scale(buffer, scale, n);
        }
        ggd_store_row(job->compute, buffer, job->y, row, 0, n);
    }
}

void ggd_heads_forward(const ggd_compute *compute, const ggd_batch *batch, const ggd_heads *heads, size_t n_heads,
                       const ggd_norm *norm, const float *x, size_t ld, ggd_activation rotated) {
    heads_job job = {compute, batch, heads, norm, n_heads, x, ld, rotated};
    ggd_parallel(compute->threads, "rope", (size_t)batch->n_segments, heads_forward_item, &job);
}

static void heads_backward_item(void *context, size_t item, size_t thread) {
    const heads_job *job = context;
    const ggd_norm *norm = job->norm;
    size_t n = job->n_heads * job->heads->head_size, pieces = n / norm->n;
    float *x_buffer = (float *)ggd_scratch(job->compute, thread), *dy_buffer = x_buffer + n, *dx = dy_buffer + n;
    for (size_t row = item * BLOCK_ROWS; row < block_end((size_t)job->batch->n_rows, item); row++) {
        const float *x = ggd_load_row(job->compute, norm->saved, row, 0, n, x_buffer);
        const float *dy = ggd_load_row(job->compute, job->y, row, 0, n, dy_buffer);
        memset(dx, 0, n * sizeof *dx);
        for (size_t at = 0, piece = row * pieces; at < n; at += norm->n, piece++) {
            norm_row_backward(job->compute, norm, dy + at, x + at, norm->scales[piece], dx + at);
        }
        ggd_store_row(job->compute, dx, job->y, row, 0, n);
    }
}

void ggd_heads_backward(const ggd_compute *compute, const ggd_batch *batch, const ggd_heads *heads, size_t n_heads,
                        const ggd_norm *norm, ggd_activation gradient) {
    heads_job job = {.compute = compute, .batch = batch, .heads = heads, .norm = norm, .n_heads = n_heads, .y = gradient};
    ggd_parallel(compute->threads, "norm", n_blocks((size_t)batch->n_rows), heads_backward_item, &job);
}

// ---- the gate: SwiGLU and GEGLU (Shazeer 2020, arXiv:2002.05202) ----

typedef struct {
    const ggd_compute *compute;
    ggd_gate kind;
    size_t m, n;
    ggd_activation gate, up, dh;
    ggd_operand h;
} gate_job;

static void gate_forward_item(void *context, size_t item, size_t thread) {
    const gate_job *job = context;
    float *buffer = (float *)ggd_scratch(job->compute, thread);
    for (size_t row = item * BLOCK_ROWS; row < block_end(job->m, item); row++) {
        for (size_t column = 0; column < job->n; column += PIECE) {
            size_t n = ggd_min(job->n - column, PIECE);
            const float *gate = ggd_load_row(job->compute, job->gate, row, column, n, buffer);
            const float *up = ggd_load_row(job->compute, job->up, row, column, n, buffer + PIECE);
            job->compute->kernels->gated[job->kind](gate, up, buffer + 2 * PIECE, n);
            ggd_store_row(job->compute, buffer + 2 * PIECE, job->h.x, row, column, n);
            store_int8(job->compute, buffer + 2 * PIECE, job->h.int8, row, column, n);
        }
    }
}

void ggd_gate_forward(const ggd_compute *compute, ggd_gate kind, size_t m, size_t n, ggd_activation gate, ggd_activation up,
                      ggd_operand h) {
    gate_job job = {.compute = compute, .kind = kind, .m = m, .n = n, .gate = gate, .up = up, .h = h};
    ggd_parallel(compute->threads, "gate", n_blocks(m), gate_forward_item, &job);
}

static void gate_backward_item(void *context, size_t item, size_t thread) {
    const gate_job *job = context;
    float *buffer = (float *)ggd_scratch(job->compute, thread);
    float *dgate = buffer + 3 * PIECE, *dup = buffer + 4 * PIECE, *h = buffer + 5 * PIECE;
    for (size_t row = item * BLOCK_ROWS; row < block_end(job->m, item); row++) {
        for (size_t column = 0; column < job->n; column += PIECE) {
            size_t n = ggd_min(job->n - column, PIECE);
            const float *gate = ggd_load_row(job->compute, job->gate, row, column, n, buffer);
            const float *up = ggd_load_row(job->compute, job->up, row, column, n, buffer + PIECE);
            const float *dh = ggd_load_row(job->compute, job->dh, row, column, n, buffer + 2 * PIECE);
            job->compute->kernels->gated_backward[job->kind](gate, up, dh, dgate, dup, h, n);
            ggd_store_row(job->compute, dgate, job->dh, row, column, n);
            ggd_store_row(job->compute, dup, job->up, row, column, n);
            ggd_store_row(job->compute, h, job->gate, row, column, n);
        }
    }
}

void ggd_gate_backward(const ggd_compute *compute, ggd_gate kind, size_t m, size_t n, ggd_activation gate, ggd_activation up,
                       ggd_activation dh) {
    gate_job job = {.compute = compute, .kind = kind, .m = m, .n = n, .gate = gate, .up = up, .dh = dh};
    ggd_parallel(compute->threads, "gate", n_blocks(m), gate_backward_item, &job);
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
