// ops.h - the row-wise parts of a transformer: embedding, RMSNorm, RoPE, SwiGLU; each forward with its backward.
#ifndef GGD_OPS_H
#define GGD_OPS_H

#include "gemm.h"
#include "include/ggd.h"

// Q, K and V lie side by side in one activation: (M, [Q | K | V]), each part starting at a multiple of GGD_PANEL_COLUMNS.
typedef struct {
    size_t n_heads, n_kv_heads, head_size;
    size_t k_column, v_column;   // where K and V start
    const float *cosine, *sine;  // (positions, D / 2)
} ggd_heads;

// x (M, C) float32 = embedding of each token + its sequence's offset + the mask token's added row.
void ggd_embedding_forward(const ggd_compute *compute, const ggd_matrix *embedding, const ggd_batch *batch,
                           const ggd_adapter *adapter, float *x, size_t ld);
// Sums dx (M, C) over each sequence into grad_offset (B, C), assigned, and over the mask token's rows into the adapter, added.
void ggd_embedding_backward(const ggd_compute *compute, const ggd_batch *batch, const ggd_adapter *adapter, size_t hidden,
                            const float *dx, size_t ld, float *grad_offset);

// y_j = x_j r w_j, r = 1 / sqrt(mean(x^2) + eps), over rows of n.
typedef struct {
    const float *weight;  // (n)
    float eps;
    size_t n;
    float *scales;         // (M): r of each row, written by the forward and read by the backward
    ggd_activation saved;  // (M, n): x, likewise; without memory where no backward follows
} ggd_norm;

// x (M, ld) float32 to an operand, in int8 too where the operand has room for it.
void ggd_rmsnorm_forward(const ggd_compute *compute, const ggd_norm *norm, size_t m, const float *x, size_t ld, ggd_operand y);
// y again from the saved x.
void ggd_rmsnorm_repeat(const ggd_compute *compute, const ggd_norm *norm, size_t m, ggd_activation y);
// dx (M, ld) float32 += the norm's input gradient from dy (M, ld); dx again as activation for the products that follow.
void ggd_rmsnorm_backward(const ggd_compute *compute, const ggd_norm *norm, size_t m, const float *dy, size_t ld, float *dx,
                          ggd_activation dx_activation);

// float32 queries or keys, (M, n_heads D), to activations, rotated by each row's place in its segment.
void ggd_rope_forward(const ggd_compute *compute, const ggd_batch *batch, const ggd_heads *heads, size_t n_heads, const float *x,
                      size_t ld, ggd_activation rotated);

// h = silu(gate) * up, in int8 too where the operand has room for it.
void ggd_swiglu_forward(const ggd_compute *compute, size_t m, size_t n, ggd_activation gate, ggd_activation up, ggd_operand h);
// All in place: dh becomes d gate, up becomes d up, gate becomes h.
void ggd_swiglu_backward(const ggd_compute *compute, size_t m, size_t n, ggd_activation gate, ggd_activation up,
                         ggd_activation dh);

// float32 (M, n) to activation.
void ggd_to_activation(const ggd_compute *compute, size_t m, size_t n, const float *x, size_t ld, ggd_activation y);

// One row's piece as float32: in place where activations are float32, else through `buffer`.
const float *ggd_load_row(const ggd_compute *compute, ggd_activation x, size_t row, size_t column, size_t n, float *buffer);
void ggd_store_row(const ggd_compute *compute, const float *values, ggd_activation x, size_t row, size_t column, size_t n);

#endif
