// ops.h - the row-wise parts of a transformer: embedding, RMSNorm, RoPE, the gate, what a block adds; each forward with its backward.
#ifndef GGD_OPS_H
#define GGD_OPS_H

#include <math.h>

#include "gemm.h"
#include "include/ggd.h"

// Q, K and V lie side by side in one activation: (M, [Q | K | V]), each part starting at a multiple of GGD_PANEL_COLUMNS.
// The rest is what a layer's attention does with them.
typedef struct {
    const float *cosine, *sine;  // (positions, n_rotated / 2); NULL: none
} ggd_rope_table;
typedef struct {
    size_t layer;
    size_t n_heads, n_kv_heads, head_size;
    size_t k_column, v_column;  // where K and V start
    float score_scale, score_cap;
    size_t window;  // 0: all keys
    ggd_rope_kind rope_kind;
    size_t n_rotated;
    ggd_rope_table rope, long_rope;  // of texts up to the original context, and longer ones; long_rope may have none
    size_t original_context;
    float temperature;  // of queries beyond the original context, see ggd_query_scale
} ggd_heads;

typedef struct {
    ggd_matrix rows;  // (V, C)
    float scale;
} ggd_embedding;

// x (M, C) float32 = scale * (row of each token + its sequence's offset + the mask token's added row).
void ggd_embedding_forward(const ggd_compute *compute, const ggd_embedding *embedding, const ggd_batch *batch,
                           const ggd_adapter *adapter, float *x, size_t ld);
// Sums scale * dx (M, C) over each sequence into grad_offset (B, C), assigned, and over the mask token's rows into the adapter, added.
void ggd_embedding_backward(const ggd_compute *compute, const ggd_embedding *embedding, const ggd_batch *batch,
                            const ggd_adapter *adapter, const float *dx, size_t ld, float *grad_offset);

// y_j = x_j r w_j, r = 1 / sqrt(mean(x^2) + eps), over rows of n; without weight, y = x.
typedef struct {
    const float *weight;  // (n); NULL: no norm
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

// x (M, ld) float32 += scale * norm(block), of a block's output (M, ld) float32.
void ggd_block_forward(const ggd_compute *compute, const ggd_norm *norm, float scale, size_t m, const float *block, float *x,
                       size_t ld);
// d block as activation, from dx (M, ld).
void ggd_block_backward(const ggd_compute *compute, const ggd_norm *norm, float scale, size_t m, const float *dx, size_t ld,
                        ggd_activation dblock);

// Position of a segment's row in its text.
static inline size_t ggd_position(const ggd_batch *batch, const ggd_segment *segment, size_t row) {
    return batch->positions != NULL ? (size_t)batch->positions[(size_t)segment->first_row + row] : row;
}

// float32 queries or keys, (M, n_heads D), to activations: normed in pieces of norm->n, rotated by each row's position.
// norm->scales is (M, pieces).
void ggd_heads_forward(const ggd_compute *compute, const ggd_batch *batch, const ggd_heads *heads, size_t n_heads,
                       const ggd_norm *norm, const float *x, size_t ld, ggd_activation rotated);
// From the gradient of what the norm made (the rotation is undone) to that of its input, in place.
void ggd_heads_backward(const ggd_compute *compute, const ggd_batch *batch, const ggd_heads *heads, size_t n_heads,
                        const ggd_norm *norm, ggd_activation gradient);
// Rotates n_heads heads of a row at a position; direction -1 is the backward.
void ggd_rotate(const ggd_kernels *kernels, const ggd_heads *heads, const ggd_segment *segment, size_t position, float direction,
                size_t n_heads, float *x);

// What a query at a position is multiplied by after its rotation.
static inline float ggd_query_scale(const ggd_heads *heads, size_t position) {
    return heads->temperature != 0 ? 1.0f + heads->temperature * logf((float)(position / heads->original_context + 1)) : 1.0f;
}

// h = gate'(gate) * up with gate' the SiLU or GELU, in int8 too where the operand has room for it.
void ggd_gate_forward(const ggd_compute *compute, ggd_gate kind, size_t m, size_t n, ggd_activation gate, ggd_activation up,
                      ggd_operand h);
// All in place: dh becomes d gate, up becomes d up, gate becomes h.
void ggd_gate_backward(const ggd_compute *compute, ggd_gate kind, size_t m, size_t n, ggd_activation gate, ggd_activation up,
                       ggd_activation dh);

// float32 (M, n) to activation.
void ggd_to_activation(const ggd_compute *compute, size_t m, size_t n, const float *x, size_t ld, ggd_activation y);

// One row's piece as float32: in place where activations are float32, else through `buffer`.
const float *ggd_load_row(const ggd_compute *compute, ggd_activation x, size_t row, size_t column, size_t n, float *buffer);
void ggd_store_row(const ggd_compute *compute, const float *values, ggd_activation x, size_t row, size_t column, size_t n);

#endif
