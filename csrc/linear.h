// linear.h - a frozen, packed linear layer with a bias and a LoRA delta: y = W x + bias + scale * B (A x).
#ifndef GGD_LINEAR_H
#define GGD_LINEAR_H

#include "gemm.h"
#include "include/ggd.h"

// A pair that does not change for a while, as panels of the forward's products; B with the pair's scale.
typedef struct {
    const uint8_t *a, *b;
} ggd_lora_panels;

typedef struct {
    const ggd_matrix *weight;       // (out, in)
    const ggd_lora_pair *lora;      // NULL: none
    const ggd_lora_panels *panels;  // of the pair; NULL: packed on the way
    ggd_activation p;               // (M, R): A x, written by the forward and read by the backward
} ggd_linear;

size_t ggd_lora_panels_bytes(const ggd_compute *compute, const ggd_linear *linear);
// `unpacked` holds GGD_UNPACKED_FLOATS floats, `memory` the panels, aligned to 64.
ggd_lora_panels ggd_lora_pack(const ggd_compute *compute, const ggd_linear *linear, float *unpacked, uint8_t *memory);

// Scratch of the backward, shared by all layers.
typedef struct {
    ggd_int8_rows *dy_int8;     // room for dY (M, out) in int8, to multiply it in int8; or NULL
    ggd_activation q;           // (M, R): scale * dY B
    ggd_activation transposed;  // (R, M)
    float *product;             // (R, ld_product) float32
    size_t ld_product;          // at least the largest of in and out, a multiple of GGD_PANEL_COLUMNS
} ggd_linear_scratch;

// y (M, out) = init + X W^T + scale * (X A^T) B^T; X W^T in int8 where X is given in int8 too and the weight's type
// has an int8 form. A bias is an `init` of one row.
void ggd_linear_forward(const ggd_compute *compute, const ggd_linear *linear, size_t m, ggd_operand x, ggd_addend init,
                        ggd_place y);

// P = X A^T alone, where the layer has a LoRA pair.
void ggd_linear_forward_lora(const ggd_compute *compute, const ggd_linear *linear, size_t m, ggd_activation x);

// dX (M, in) = init + dY W + scale * (dY B) A, and scratch->q = scale * dY B for the LoRA gradients.
void ggd_linear_backward_input(const ggd_compute *compute, const ggd_linear *linear, size_t m, ggd_activation dy,
                               const ggd_linear_scratch *scratch, ggd_addend init, ggd_place dx);

// dB += scale * dY^T (X A^T);  dA += (scale * dY B)^T X. Follows ggd_linear_backward_input of the same layer.
void ggd_linear_backward_lora(const ggd_compute *compute, const ggd_linear *linear, size_t m, ggd_activation x, ggd_activation dy,
                              const ggd_linear_scratch *scratch);

#endif
