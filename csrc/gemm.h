// gemm.h - matrix products of activations with packed operands, streamed through cache-sized panels: C = init + A op(W) + A2 op(W2).
#ifndef GGD_GEMM_H
#define GGD_GEMM_H

#include "matrix.h"
#include "threads.h"

// What every part of the network needs to compute: kernels, element type, workers and their scratch memory.
typedef struct {
    const ggd_kernels *kernels;
    ggd_element element;
    ggd_threads *threads;
    uint8_t *scratch;  // (n_threads, bytes_scratch): panels, unpacked pieces, rows
    size_t bytes_scratch;
} ggd_compute;

// Activations in int8: q + 128, blocks of GGD_INT8_BLOCK columns, each with its scale.
typedef struct {
    uint8_t *quants;  // (m, ld)
    size_t ld;        // a multiple of GGD_INT8_BLOCK
    float *scales;    // (m, ld / GGD_INT8_BLOCK)
} ggd_int8_rows;

typedef enum {
    GGD_TIMES_TRANSPOSE,  // op(W) = W^T: C (m, w.n_rows), reduction over w's columns. The forward of a linear layer.
    GGD_TIMES_PLAIN       // op(W) = W:   C (m, w.n_cols), reduction over w's rows. The backward of a linear layer.
} ggd_operation;

typedef struct {
    const char *part;  // what its time counts as
    ggd_operation operation;
    size_t m;                     // rows of A and C
    ggd_activation a;             // (m, k)
    const ggd_int8_rows *a_int8;  // A again in int8, to multiply by W in int8 (GGD_TIMES_PLAIN only); or NULL
    ggd_matrix w;
    ggd_activation a2;    // (m, k2), data NULL for none
    ggd_matrix w2;        // same shape as w across the result's columns
    float scale, scale2;  // of W and W2
    const float *init;    // (m, n) float32 or NULL; may be C
    size_t ld_init;
    void *c;  // (m, ld_c), ld_c a multiple of GGD_PANEL_COLUMNS
    size_t ld_c;
    ggd_element c_element;
} ggd_gemm;

void ggd_gemm_run(const ggd_compute *compute, const ggd_gemm *gemm);

void ggd_int8_quantise_rows(const ggd_compute *compute, size_t m, size_t n, ggd_activation x, ggd_int8_rows rows);

// Scratch bytes of one thread for a product with this many reduction rows in all over an operand with this block size.
size_t ggd_gemm_bytes_scratch(ggd_element element, size_t reduction, size_t block);

// Packs columns [column, column + 32) of op(W) into a panel; `unpacked` holds GGD_UNPACKED_FLOATS floats.
enum { GGD_UNPACKED_FLOATS = 64 * 256 };
void ggd_pack_panel(const ggd_compute *compute, ggd_operation operation, const ggd_matrix *w, size_t column, float scale,
                    float *unpacked, void *panel);

// All row tiles of one panel: C (m, 32) = init + A P.
void ggd_multiply_panel(const ggd_compute *compute, size_t m, const ggd_tile *prototype);

static inline uint8_t *ggd_scratch(const ggd_compute *compute, size_t thread) {
    return compute->scratch + thread * compute->bytes_scratch;
}

#endif
