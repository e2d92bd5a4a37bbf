// matrix.h - the two kinds of matrices that the core multiplies: read-only operands stored by rows in any type that can be unpacked to
// float32 (quantised weights, LoRA matrices, activations), and activations in the element type of the products.
#ifndef GGD_MATRIX_H
#define GGD_MATRIX_H

#include <stddef.h>
#include <stdint.h>

#include "kernels/kernels.h"

typedef struct {
    const uint8_t *data;
    size_t n_rows, n_cols;
    size_t bytes_row;
    ggd_type type;
    size_t block, bytes_block;  // elements and bytes of the smallest piece that can be unpacked
    // Of GGD_OTHER: n elements, whole blocks, to float32. NULL where the kernels unpack the type.
    void (*to_float)(const void *source, float *target, int64_t n);
    int32_t stored;  // ggml's number of the type, of a matrix in a file
} ggd_matrix;

// Activations: (rows, ld) with ld a multiple of GGD_PANEL_COLUMNS. Products always write whole panels, so pad columns may be written.
typedef struct {
    void *data;
    size_t ld;
} ggd_activation;

static inline ggd_matrix ggd_matrix_f32(const float *data, size_t n_rows, size_t n_cols, size_t ld) {
    return (ggd_matrix){(const uint8_t *)data, n_rows, n_cols, ld * sizeof *data, GGD_F32, 1, sizeof *data, NULL, 0};
}

// Activations as an operand.
static inline ggd_matrix ggd_matrix_of(ggd_activation x, size_t n_rows, size_t n_cols, ggd_element element) {
    size_t bytes = ggd_element_bytes(element);
    return (ggd_matrix){x.data, n_rows, n_cols, x.ld * bytes, element == GGD_ELEMENT_BF16 ? GGD_BF16 : GGD_F32, 1,
                        bytes,  NULL,   0};
}

// Rows [first, first + n) of a matrix.
static inline ggd_matrix ggd_matrix_rows(const ggd_matrix *m, size_t first, size_t n) {
    ggd_matrix rows = *m;
    rows.data += first * m->bytes_row;
    rows.n_rows = n;
    return rows;
}

// n elements from the beginning of a block on: the one place that chooses who unpacks.
static inline void ggd_matrix_unpack(const ggd_kernels *kernels, const ggd_matrix *m, const uint8_t *source, float *target,
                                     size_t n) {
    if (m->to_float != NULL) {
        m->to_float(source, target, (int64_t)n);
    } else {
        kernels->unpack[m->type](source, target, n);
    }
}

static inline void ggd_matrix_unpack_row(const ggd_kernels *kernels, const ggd_matrix *m, size_t row, float *target) {
    ggd_matrix_unpack(kernels, m, m->data + row * m->bytes_row, target, m->n_cols);
}

static inline void *ggd_activation_at(ggd_activation x, size_t row, size_t column, ggd_element element) {
    return (uint8_t *)x.data + (row * x.ld + column) * ggd_element_bytes(element);
}

#endif
