// kernels.h - the inner loops of the core as one table per instruction set, chosen at run time. Kernels know rows, tiles and panels;
// they know no model, no threads, no ggml.
//
// A matrix product runs as C = A P: A is row-major activations, P is a panel, 32 columns of the other operand laid out for the tile
// kernel by one of the two packers:
//   float32 panel:  P[k * 32 + column]
//   bfloat16 panel: P[(k / 2) * 64 + column * 2 + k % 2], so that two neighbouring k lie in one 32-bit lane; an odd k is padded by 0
#ifndef GGD_KERNELS_H
#define GGD_KERNELS_H

#include <stddef.h>
#include <stdint.h>

#include "sizes.h"

enum { GGD_PANEL_COLUMNS = 32, GGD_TILE_ROWS = 12, GGD_STRIP_COLUMNS = 8 };

// Element type of activations, panels and products. Sums are float32 in both.
typedef enum { GGD_ELEMENT_F32 = 0, GGD_ELEMENT_BF16 = 1 } ggd_element;

// How the elements of an operand are stored.
typedef enum {
    GGD_F32,
    GGD_F16,
    GGD_BF16,
    GGD_Q8_0,
    GGD_Q4_0,
    GGD_Q4_1,
    GGD_Q5_0,
    GGD_Q5_1,
    GGD_Q4_K,
    GGD_Q5_K,
    GGD_Q6_K,
    GGD_Q2_K,
    GGD_Q3_K,
    GGD_IQ4_NL,
    GGD_IQ4_XS,
    GGD_MXFP4,
    GGD_N_TYPES,             // of those that the kernels unpack
    GGD_OTHER = GGD_N_TYPES  // any other, which the operand's owner unpacks (ggd_matrix)
} ggd_type;

// Which elements of a head turn together: neighbours (2i, 2i + 1), or (i, i + n_rotated / 2).
typedef enum { GGD_ROPE_PAIRS = 0, GGD_ROPE_HALVES = 1 } ggd_rope_kind;

// What the gate goes through before it multiplies: silu(g) = g / (1 + exp(-g)), or GELU by its tanh formula (Hendrycks and Gimpel
// 2016, arXiv:1606.08415): g (1 + tanh(c (g + 0.044715 g^3))) / 2 with c = sqrt(2 / pi).
typedef enum { GGD_GATE_SILU = 0, GGD_GATE_GELU = 1 } ggd_gate;

// A tile C[rows, 32] = init + A1 P1 + A2 P2, where the panel holds P1's k1 rows, then P2's k2 rows (both even for bfloat16).
// A second operand is how a LoRA delta joins the product of the frozen weight without another pass over C.
typedef struct {
    size_t n_rows;  // 1 .. GGD_TILE_ROWS
    const void *a1;
    size_t ld_a1, k1;
    const void *a2;  // may be NULL with k2 = 0
    size_t ld_a2, k2;
    const void *panel;
    const float *init;  // (rows, 32) float32 or NULL for zero; may be c
    size_t ld_init;
    void *c;
    size_t ld_c;
    ggd_element c_element;
} ggd_tile;

// Products in int8: both operands in blocks along the reduction, each block with its own scale; the right one may have a minimum too, as
// the weights of some types do. The left operand is kept as q + 128, unsigned, as the dot-product instructions want it; the panel has
// 128 * sum(q of the column), by which that is taken out again.
//
// A panel of 32 columns is a row of blocks. What lies in a block is the set's own affair (int8_block_bytes); most sets have this form:
//   quants      int8  [block / 4][32][4]   four neighbouring k lie in one 32-bit lane
//   corrections int32 [32]                 -128 * sum(q)
//   scales      float [32]
//   minima      float [32], where the format has them
enum { GGD_INT8_SIZE = 127, GGD_UINT8_SIZE = 255, GGD_INT8_MAX_BLOCK = 64, GGD_INT8_MIN_BLOCK = 16, GGD_INT8_FORWARD_BLOCK = 32 };
typedef struct {
    size_t block;    // k of a block of the panel: 16, 32 or 64
    size_t a_block;  // k of a block of the left operand: the same or a multiple; the same where there are minima
    int has_minima;
    int lowest, highest;  // what the panel's q lie between
} ggd_int8_format;

// Input gradients: the weights' blocks lie across the reduction, so they are made anew (a set may round more coarsely: ggd_int8_steps).
static const ggd_int8_format ggd_int8_backward_format = {64, 64, 0, -GGD_INT8_SIZE, GGD_INT8_SIZE};

// How finely a set rounds in the backward's format: the left operand to -rows .. rows, and weights to -weights .. weights; weights beside
// an unsigned left operand, which is rounded to 0 .. 255, to -weights_of_unsigned .. weights_of_unsigned.
typedef struct {
    int rows, weights, weights_of_unsigned;
} ggd_int8_steps;
#define GGD_INT8_ALL_STEPS {GGD_INT8_SIZE, GGD_INT8_SIZE, GGD_INT8_SIZE}

// Of a block in the form above.
static inline size_t ggd_int8_block_bytes(const ggd_int8_format *f) {
    return (f->block + 8 + (f->has_minima ? 4 : 0)) * (size_t)GGD_PANEL_COLUMNS;
}

// Rows of the left operand. In the backward's format, operands that are never negative may use the whole byte instead, 0 to 255:
// `is_unsigned`.
typedef struct {
    uint8_t *quants;  // (m, ld)
    size_t ld;        // a multiple of GGD_INT8_MAX_BLOCK
    float *scales;    // (m, ld_scales), one a block
    float *sums;      // (m, ld_scales): scale * sum(q); only products with minima read them
    size_t ld_scales;
    int is_unsigned;
} ggd_int8_rows;

// C (rows, 32) = init + sum over blocks of scale_a scale_b (A_block B_block) + sum_a minimum_b
typedef struct {
    ggd_int8_format format;
    size_t n_rows, n_blocks;  // blocks of the panel
    ggd_int8_rows a;
    const uint8_t *panel;
    const float *init;  // float32 or NULL
    size_t ld_init;
    void *c;
    size_t ld_c;
    ggd_element c_element;  // bfloat16 only in sets whose fast_element it is
} ggd_int8_tile;

// What will be read next: `n_rows` pieces of `bytes`, bytes_row apart, to be prefetched a few cache lines at a time between other work. Many
// prefetches at once wait for each other, and the processor does not foresee pieces of several rows by itself.
typedef struct {
    const uint8_t *row;
    size_t n_rows, bytes, bytes_row;
    size_t at;  // asked for so far, of the row
} ggd_fetch;

static inline void ggd_fetch_lines(ggd_fetch *f, size_t n_lines) {
    for (; n_lines > 0 && f->n_rows > 0; n_lines--) {
        __builtin_prefetch((const void *)((uintptr_t)f->row + f->at));
        f->at += 64;
        if (f->at >= f->bytes) {
            f->at = 0;
            f->row += f->bytes_row;
            f->n_rows--;
        }
    }
}

typedef struct {
    const char *name;
    ggd_element fast_element;  // what GGD_COMPUTE_FAST uses with this set

    // n elements, whole blocks, to float32; indexed by ggd_type.
    void (*unpack[GGD_N_TYPES])(const uint8_t *source, float *target, size_t n);

    // Indexed by ggd_element.
    void (*tile[2])(const ggd_tile *tile);
    // Panel columns from 32 rows of `source` (32, k), row stride ld: Y = X W^T.
    void (*pack_columns[2])(const float *source, size_t ld, size_t k, float scale, void *panel);
    // Panel rows from the rows of `source` (k, 32), row stride ld: dX = dY W.
    void (*pack_rows[2])(const float *source, size_t ld, size_t k, float scale, void *panel);

    // pack_rows of bfloat16 rows to a bfloat16 panel, without a detour.
    void (*pack_rows_from_bf16)(const uint16_t *source, size_t ld, size_t k, void *panel);

    // The int8 kernels; int8_tile is NULL in a set that has no instructions for it.
    void (*int8_tile)(const ggd_int8_tile *tile);
    // Bytes of a panel's block: the set's packers and tile share its layout, and nobody else looks inside. NULL: the common form.
    size_t (*int8_block_bytes)(const ggd_int8_format *format);
    ggd_int8_steps int8_steps;
    // One block of the backward's format: 32 columns of `rows` rows of float32, row stride ld; missing rows count as zero.
    // `is_unsigned`: for a left operand that is.
    void (*int8_pack)(const float *source, size_t ld, size_t rows, int is_unsigned, uint8_t *block);
    // n elements of `source`, float32 or bfloat16, padded by zeros to whole blocks, to q + 128; a scale and a scaled sum a block.
    // `is_unsigned`: of elements that are not negative, to 0 .. 255. In the backward's blocks to q + int8_steps.rows + 1.
    void (*int8_quantise)(const void *source, ggd_element element, size_t n, size_t block, int is_unsigned, uint8_t *quants,
                          float *scales, float *sums);
    // n weights of a quantised type as they are stored, one row: q, and a scale and a minimum for each of the type's blocks
    // (ggd_int8_format_of): w = scale q + minimum. NULL for types that have no such blocks.
    void (*int8_unpack[GGD_N_TYPES])(const uint8_t *source, size_t n, int8_t *quants, float *scales, float *minima);
    // k columns of 32 such rows to a panel, from its beginning; row strides ld and ld_scales.
    void (*int8_pack_columns)(const ggd_int8_format *format, const int8_t *quants, size_t ld, const float *scales,
                              const float *minima, size_t ld_scales, size_t k, uint8_t *panel);

    // The forward's int8 products for few rows, where packing is what takes the time: narrow panels of GGD_STRIP_COLUMNS columns, whose
    // weights fit into the first-level cache in whole rows. The bits of int8_tile. NULL in a set that has wide panels only.
    size_t (*int8_strip_bytes)(const ggd_int8_format *format);  // of a block
    void (*int8_pack_strip)(const ggd_int8_format *format, const int8_t *quants, size_t ld, const float *scales,
                            const float *minima, size_t ld_scales, size_t k, uint8_t *strip);
    // int8_unpack and int8_pack_strip in one for types where that is quicker: n k of eight rows of weights as they are stored; asks for
    // the bytes of `next` on the way.
    void (*int8_pack_stored[GGD_N_TYPES])(const uint8_t *source, size_t bytes_row, size_t n, uint8_t *strip, ggd_fetch *next);
    void (*int8_strip)(const ggd_int8_tile *tile);  // C in float32

    void (*to_bf16)(const float *source, uint16_t *target, size_t n);
    void (*from_bf16)(const uint16_t *source, float *target, size_t n);

    // y_j = x_j r w_j with r = 1 / sqrt(mean(x^2) + eps); returns r.
    float (*rmsnorm)(const float *x, const float *w, float eps, float *y, size_t n);
    // dx_j += r (dy_j w_j - x_j r^2 mean(dy w x))
    void (*rmsnorm_backward)(const float *dy, const float *x, const float *w, float r, float *dx, size_t n);
    // Indexed by ggd_rope_kind. Rotates the first n_rotated elements of each head by the angles whose cosine and sine are given
    // (n_rotated / 2 each); `direction` 1 or -1 (the transpose, which is the backward).
    void (*rope[2])(float *x, const float *cosine, const float *sine, float direction, size_t n_heads, size_t head_size,
                    size_t n_rotated);
    // Indexed by ggd_gate: h = gate(g) u.
    void (*gated[2])(const float *g, const float *u, float *h, size_t n);
    // From dh: dg = dh u gate'(g), du = dh gate(g), and h again.
    void (*gated_backward[2])(const float *g, const float *u, const float *dh, float *dg, float *du, float *h, size_t n);
    // x_j = cap tanh(scale x_j / cap)
    void (*soft_cap)(float *x, float scale, float cap, size_t n);
    // d_j *= 1 - (x_j / cap)^2, from the x that soft_cap gave.
    void (*soft_cap_backward)(const float *x, float cap, float *d, size_t n);

    // Scores of one query to probabilities in place: p_j = exp(scale s_j + (j >= first_future ? future_bias : 0) - lse); returns lse.
    float (*attention_softmax)(float *s, size_t n, size_t first_future, float scale, float future_bias);
    // The same with lse known (backward's recomputation), and from dp: ds_j = scale p_j (dp_j - delta), in place.
    void (*attention_gradient)(float *s, float *dp, size_t n, size_t first_future, float scale, float future_bias, float lse,
                               float delta);

    // out_j = exp(x_j - shift); returns the sum.
    float (*exp_sum)(const float *x, float shift, float *out, size_t n);
    float (*max)(const float *x, size_t n);
    float (*dot)(const float *x, const float *y, size_t n);
    void (*add_scaled)(const float *x, float scale, float *y, size_t n);  // y += scale x
    void (*scale)(float *x, float scale, size_t n);
} ggd_kernels;

// How the forward multiplies weights of a type in int8: in their own blocks, or it would be further from exact than llama.cpp. block = 0
// where the type has none. Q2_K has none: its minima come in blocks of 16, and the sums of the activations, by which minima are multiplied,
// in blocks of 32.
static inline ggd_int8_format ggd_int8_format_of(ggd_type type) {
    const size_t a_block = GGD_INT8_FORWARD_BLOCK;
    switch (type) {
    case GGD_Q8_0:
        return (ggd_int8_format){32, a_block, 0, -128, 127};
    case GGD_Q4_0:
        return (ggd_int8_format){32, a_block, 0, -8, 7};
    case GGD_Q5_0:
        return (ggd_int8_format){32, a_block, 0, -16, 15};
    case GGD_IQ4_NL:
    case GGD_IQ4_XS:
        return (ggd_int8_format){32, a_block, 0, -127, 113};
    case GGD_MXFP4:
        return (ggd_int8_format){32, a_block, 0, -12, 12};
    case GGD_Q4_1:
    case GGD_Q4_K:
        return (ggd_int8_format){32, a_block, 1, 0, 15};
    case GGD_Q5_1:
    case GGD_Q5_K:
        return (ggd_int8_format){32, a_block, 1, 0, 31};
    case GGD_Q3_K:
        return (ggd_int8_format){16, a_block, 0, -4, 3};
    case GGD_Q6_K:
        return (ggd_int8_format){16, a_block, 0, -32, 31};
    default:
        return (ggd_int8_format){0};
    }
}

// Bytes of a panel's block in the set's form.
static inline size_t ggd_int8_block_bytes_of(const ggd_kernels *kernels, const ggd_int8_format *format) {
    return kernels->int8_block_bytes != NULL ? kernels->int8_block_bytes(format) : ggd_int8_block_bytes(format);
}

extern const ggd_kernels ggd_kernels_reference;
#ifdef GGD_HAVE_AVX512
extern const ggd_kernels ggd_kernels_avx512;
#endif
#ifdef GGD_HAVE_AVX512_BF16
extern const ggd_kernels ggd_kernels_avx512_bf16;
#endif
#ifdef GGD_HAVE_AVX_VNNI
extern const ggd_kernels ggd_kernels_avx_vnni;
#endif
#ifdef GGD_HAVE_AVX_VNNI_EVEX
extern const ggd_kernels ggd_kernels_avx_vnni_evex;
#endif
#ifdef GGD_HAVE_AVX2
extern const ggd_kernels ggd_kernels_avx2;
#endif
#ifdef GGD_HAVE_NEON_I8MM
extern const ggd_kernels ggd_kernels_neon_i8mm;
#endif
#ifdef GGD_HAVE_NEON_BF16
extern const ggd_kernels ggd_kernels_neon_bf16;
#endif
#ifdef GGD_HAVE_NEON
extern const ggd_kernels ggd_kernels_neon;
#endif

// The sets that this processor runs, fastest first, the reference last; returns how many.
enum { GGD_MAX_KERNEL_SETS = 8 };
size_t ggd_kernels_available(const ggd_kernels *sets[GGD_MAX_KERNEL_SETS]);

// The fastest set that this processor runs, or the reference. The environment variable GGD_KERNELS names another one of the list.
const ggd_kernels *ggd_kernels_choose(int use_simd);

static inline size_t ggd_element_bytes(ggd_element element) { return element == GGD_ELEMENT_BF16 ? 2 : 4; }
// Reduction length in a panel.
static inline size_t ggd_panel_k(ggd_element element, size_t k) { return element == GGD_ELEMENT_BF16 ? ggd_round_up(k, 2) : k; }
// Bytes of a panel over a reduction of k.
static inline size_t ggd_panel_bytes(ggd_element element, size_t k) {
    return ggd_panel_k(element, k) * GGD_PANEL_COLUMNS * ggd_element_bytes(element);
}

static inline uint16_t ggd_bf16_from_float(float value) {  // round to nearest even; a NaN stays one
    union {
        float f;
        uint32_t u;
    } bits = {value};
    if ((bits.u & 0x7fffffffu) > 0x7f800000u) {
        return (uint16_t)((bits.u >> 16) | 64);
    }
    return (uint16_t)((bits.u + 0x7fffu + ((bits.u >> 16) & 1)) >> 16);
}
static inline float ggd_float_from_bf16(uint16_t value) {
    union {
        uint32_t u;
        float f;
    } bits = {(uint32_t)value << 16};
    return bits.f;
}

#endif
