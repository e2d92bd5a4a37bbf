// context.c - the memory of a context, and its rows in three types: float32, bfloat16 and ggml's Q8_0, 32 quants with a float16 scale.
#include "context.h"

#include <stdlib.h>
#include <string.h>

#include "error.h"
#include "ggml.h"

enum { Q8_BLOCK = 32, Q8_BYTES = 34 };

static size_t row_bytes(int32_t type, size_t n) {
    return type == GGD_CONTEXT_F32    ? n * sizeof(float)
           : type == GGD_CONTEXT_BF16 ? n * sizeof(uint16_t)
                                      : n / Q8_BLOCK * Q8_BYTES;
}

int ggd_context_plan(const ggd_model *model, int32_t type, int32_t n_rows, size_t *bytes) {
    const ggd_shape *shape = &model->shape;
    size_t n = (size_t)shape->n_kv_heads * (size_t)shape->head_size;
    if (type < GGD_CONTEXT_F32 || type > GGD_CONTEXT_Q8_0 || n_rows < 1) {
        return ggd_fail("cannot plan a context of %d rows of type %d", n_rows, type);
    }
    if (type == GGD_CONTEXT_Q8_0 && shape->head_size % Q8_BLOCK != 0) {
        return ggd_fail("a context in q8_0 needs heads of a multiple of %d, not of %d", Q8_BLOCK, shape->head_size);
    }
    *bytes = (size_t)n_rows * ((size_t)shape->n_layers * 2 * row_bytes(type, n) + sizeof(int32_t));
    return 0;
}

int ggd_context_create(const ggd_model *model, int32_t type, int32_t n_rows, ggd_context **context) {
    size_t bytes = 0;
    *context = NULL;
    if (ggd_context_plan(model, type, n_rows, &bytes)) {
        return -1;
    }
    ggd_context *c = calloc(1, sizeof *c);
    if (c == NULL) {
        return ggd_fail("out of memory for a context");
    }
    c->model = model;
    c->type = type;
    c->n_columns = (size_t)model->shape.n_kv_heads * (size_t)model->shape.head_size;
    c->bytes_row = row_bytes(type, c->n_columns);
    c->capacity = (size_t)n_rows;
    c->positions = malloc(c->capacity * sizeof *c->positions);
    c->data = malloc(bytes);
    if (c->positions == NULL || c->data == NULL) {
        ggd_context_free(c);
        return ggd_fail("out of memory: a context of %d rows needs %zu MiB", n_rows, bytes >> 20);
    }
    *context = c;
    return 0;
}

void ggd_context_free(ggd_context *context) {
    if (context != NULL) {
        free(context->positions);
        free(context->data);
        free(context);
    }
}

int32_t ggd_context_rows(const ggd_context *context) { return (int32_t)context->n_rows; }

void ggd_context_truncate(ggd_context *context, int32_t n_rows) {
    if (n_rows >= 0 && (size_t)n_rows < context->n_rows) {
        context->n_rows = (size_t)n_rows;
    }
}

static uint8_t *row_at(const ggd_context *c, size_t layer, ggd_context_part part, size_t row) {
    return c->data + (((2 * layer + (size_t)part) * c->capacity) + row) * c->bytes_row;
}

// ---- rows ----

typedef struct {
    const ggd_context *context;
    const ggd_compute *compute;
    size_t layer;
    ggd_context_part part;
    const int32_t *rows;
    ggd_activation x;
} store_job;

static void store_item(void *data, size_t item, size_t thread) {
    const store_job *job = data;
    const ggd_context *c = job->context;
    const ggd_kernels *kernels = job->compute->kernels;
    float *buffer = (float *)ggd_scratch(job->compute, thread);
    uint8_t *target = row_at(c, job->layer, job->part, c->n_rows + item);
    size_t row = job->rows != NULL ? (size_t)job->rows[item] : item;
    const void *source = ggd_activation_at(job->x, row, 0, job->compute->element);
    if (job->compute->element == GGD_ELEMENT_BF16 && c->type == GGD_CONTEXT_BF16) {
        memcpy(target, source, c->bytes_row);
        return;
    }
    const float *values = source;
    if (job->compute->element == GGD_ELEMENT_BF16) {
        kernels->from_bf16(source, buffer, c->n_columns);
        values = buffer;
    }
    if (c->type == GGD_CONTEXT_F32) {
        memcpy(target, values, c->bytes_row);
    } else if (c->type == GGD_CONTEXT_BF16) {
        kernels->to_bf16(values, (uint16_t *)target, c->n_columns);
    } else {
        ggml_quantize_chunk(GGML_TYPE_Q8_0, values, target, 0, 1, (int64_t)c->n_columns, NULL);
    }
}

void ggd_context_store(ggd_context *context, const ggd_compute *compute, size_t layer, ggd_context_part part, size_t n,
                       const int32_t *rows, ggd_activation x) {
    store_job job = {context, compute, layer, part, rows, x};
    ggd_parallel(compute->threads, "context", n, store_item, &job);
}

void ggd_context_load(const ggd_context *context, const ggd_compute *compute, size_t layer, ggd_context_part part, size_t row,
                      size_t column, size_t n, float *buffer, void *target) {
    const ggd_kernels *kernels = compute->kernels;
    const uint8_t *source = row_at(context, layer, part, row) + row_bytes(context->type, column);
    int is_bf16 = compute->element == GGD_ELEMENT_BF16;
    if (context->type == (is_bf16 ? GGD_CONTEXT_BF16 : GGD_CONTEXT_F32)) {
        memcpy(target, source, n * ggd_element_bytes(compute->element));
        return;
    }
    static const ggd_type types[] = {GGD_F32, GGD_BF16, GGD_Q8_0};
    float *values = is_bf16 ? buffer : target;
    kernels->unpack[types[context->type]](source, values, n);
    if (is_bf16) {
        kernels->to_bf16(values, target, n);
    }
}
