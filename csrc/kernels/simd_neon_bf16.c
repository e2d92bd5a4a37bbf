// simd_neon_bf16.c - kernels for 64-bit Arm with BFDOT, and SDOT, which multiplies four signed bytes in each 32-bit lane and adds them
// to an int32. The left operand's offset of 128 is taken off first, so it needs no correction.
#include "neon_bf16.h"

static inline __attribute__((always_inline)) void int8_products(const int rows, const ggd_int8_tile *t, const uint8_t *a,
                                                                const uint8_t *panel, size_t column,
                                                                int32x4_t products[][VECTORS]) {
    size_t block = t->format.block;
    for (int row = 0; row < rows; row++) {
        for (int v = 0; v < VECTORS; v++) {
            // the offset of an unsigned operand was no part of it, so what it took away comes back
            int32x4_t correction = vld1q_s32((const int32_t *)(panel + block * GGD_PANEL_COLUMNS) + column + 4 * v);
            products[row][v] = t->a.is_unsigned ? vnegq_s32(correction) : vdupq_n_s32(0);
        }
    }
    for (size_t group = 0; group < block / 4; group++) {
        int8x16_t columns[VECTORS];
        for (int v = 0; v < VECTORS; v++) {
            columns[v] = vld1q_s8((const int8_t *)panel + (group * GGD_PANEL_COLUMNS + column + 4 * (size_t)v) * 4);
        }
        for (int row = 0; row < rows; row++) {
            uint32_t four;
            memcpy(&four, a + (size_t)row * t->a.ld + 4 * group, sizeof four);
            int8x16_t value = vreinterpretq_s8_u32(vdupq_n_u32(four ^ 0x80808080u));
            for (int v = 0; v < VECTORS; v++) {
                products[row][v] = vdotq_s32(products[row][v], value, columns[v]);
            }
        }
    }
}

const ggd_kernels ggd_kernels_neon_bf16 = {.name = "neon_bf16", GGD_NEON_BF16_KERNELS};
