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

typedef enum {
    GGD_TIMES_WT,  // op(W) = W^T: C (m, w.n_rows), reduction over w's columns. The forward of a linear layer.
    GGD_TIMES_W    // op(W) = W:   C (m, w.n_cols), reduction over w's rows. The backward of a linear layer.
} ggd_operation;

// The left side of a product, (m, k): activations, and the same in int8 where they are multiplied so, else NULL.
typedef struct {
    ggd_activation x;
    const ggd_int8_rows *int8;
} ggd_operand;

// What a product is added to: (m, ld) float32, or one row for all with ld = 0, or NULL for zero.
typedef struct {
    const float *data;
    size_t ld;
} ggd_addend;

// Where a product goes: (m, ld) with ld a multiple of GGD_PANEL_COLUMNS.
typedef struct {
    void *data;
    size_t ld;
    ggd_element element;
} ggd_place;

typedef struct {
    const char *part;  // what its time counts as
    ggd_operation operation;
    size_t m;       // rows of A and C
    ggd_operand a;  // (m, k); in int8 in the blocks of ggd_gemm_int8_format
    ggd_matrix w;
    ggd_activation a2;  // (m, k2), data NULL for none
    ggd_matrix w2;      // same shape as w across the result's columns
    const uint8_t *panels,
        *panels2;         // of all of op(W) in the element type, and of W2 with its scale for few rows; NULL: packed on the way
    float scale, scale2;  // of W and W2; a product in int8 takes W as it is
    ggd_addend init;      // may be C
    ggd_place c;
} ggd_gemm;

static inline ggd_place ggd_place_f32(float *data, size_t ld) { return (ggd_place){data, ld, GGD_ELEMENT_F32}; }
static inline ggd_place ggd_place_of(const ggd_compute *compute, ggd_activation x) {
    return (ggd_place){x.data, x.ld, compute->element};
}

static inline void *ggd_place_at(const ggd_place *place, size_t row, size_t column) {
    return (uint8_t *)place->data + (row * place->ld + column) * ggd_element_bytes(place->element);
}

void ggd_gemm_run(const ggd_compute *compute, const ggd_gemm *gemm);

// Packs all panels of op(W), in int8 or in the element type, and multiplies nothing: what a product with few rows waits for.
void ggd_gemm_pack(const ggd_compute *compute, ggd_operation operation, const ggd_matrix *w, int int8);

// How W is multiplied in int8; block = 0 where it cannot be.
ggd_int8_format ggd_gemm_int8_format(ggd_operation operation, const ggd_matrix *w);

// X (m, n) to int8 in blocks of `block` columns, or unsigned if `rows` is; sets the strides of `rows`, whose memory holds ggd_int8_ld(n)
// columns.
void ggd_int8_quantise_rows(const ggd_compute *compute, size_t m, size_t n, ggd_activation x, size_t block, ggd_int8_rows *rows);
// n columns of one row, from a multiple of `block` on; the strides are set.
void ggd_int8_quantise_row(const ggd_compute *compute, const void *x, ggd_element element, size_t n, size_t block,
                           const ggd_int8_rows *rows, size_t row, size_t column);

// Row stride of n columns: whole blocks, and not a multiple of the span that falls into one set of the first-level cache.
static inline size_t ggd_int8_ld(size_t n) {
    size_t ld = ggd_round_up(n, GGD_INT8_MAX_BLOCK);
    return ld % 1024 == 0 ? ld + GGD_INT8_MAX_BLOCK : ld;
}
static inline void ggd_int8_set_strides(ggd_int8_rows *rows, size_t n, size_t block) {
    rows->ld = ggd_int8_ld(n);
    rows->ld_scales = rows->ld / block;
}

// Scratch bytes of one thread for a product with this many reduction rows in all over an operand with this block size.
size_t ggd_gemm_bytes_scratch(ggd_element element, size_t reduction, size_t block);

// Packs columns [column, column + 32) of op(W), whose blocks are no longer than that unless W is transposed, into a panel; `unpacked`
// holds GGD_UNPACKED_FLOATS floats.
enum { GGD_UNPACKED_FLOATS = 64 * (256 + 16) };
void ggd_pack_panel(const ggd_compute *compute, ggd_operation operation, const ggd_matrix *w, size_t column, float scale,
                    float *unpacked, void *panel);

// All row tiles of one panel: C (m, 32) = init + A P.
void ggd_multiply_panel(const ggd_compute *compute, size_t m, const ggd_tile *prototype);

static inline uint8_t *ggd_scratch(const ggd_compute *compute, size_t thread) {
    return compute->scratch + thread * compute->bytes_scratch;
}

#endif
