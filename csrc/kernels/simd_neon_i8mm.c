// simd_neon_i8mm.c - kernels for 64-bit Arm with BFDOT, and USMMLA, which multiplies 2 rows x 8 unsigned bytes by 8 x 2 columns of
// signed ones and adds the products to four int32: twice the work of SDOT.
#include "neon_bf16.h"

enum { ROW_PAIRS = BLOCK_ROWS / 2, COLUMN_PAIRS = 2 * VECTORS };

// 8 k of 16 columns, two columns a vector: the panel keeps four k of a column in a lane, so the lanes of two groups are interleaved.
static inline __attribute__((always_inline)) void load_columns(const int8_t *panel, int8x16_t columns[COLUMN_PAIRS]) {
    for (int v = 0; v < VECTORS; v++) {
        int32x4_t first = vreinterpretq_s32_s8(vld1q_s8(panel + 16 * v)),
                  second = vreinterpretq_s32_s8(vld1q_s8(panel + 4 * GGD_PANEL_COLUMNS + 16 * v));
        columns[2 * v] = vreinterpretq_s8_s32(vzip1q_s32(first, second));
        columns[2 * v + 1] = vreinterpretq_s8_s32(vzip2q_s32(first, second));
    }
}

// A square is what USMMLA adds to: of a pair of rows and a pair of columns, first row first.
static inline __attribute__((always_inline)) void int8_products(const int rows, const ggd_int8_tile *t, const uint8_t *a,
                                                                const uint8_t *panel, size_t column,
                                                                int32x4_t products[][VECTORS]) {
    int64x2_t squares[ROW_PAIRS][COLUMN_PAIRS];
    const int32_t *corrections = (const int32_t *)(panel + t->format.block * GGD_PANEL_COLUMNS) + column;
    for (int pair = 0; 2 * pair < rows; pair++) {
        for (int v = 0; v < VECTORS; v++) {
            int32x4_t correction = t->a.is_unsigned ? vdupq_n_s32(0) : vld1q_s32(corrections + 4 * v);
            squares[pair][2 * v] = vdupq_laneq_s64(vreinterpretq_s64_s32(correction), 0);
            squares[pair][2 * v + 1] = vdupq_laneq_s64(vreinterpretq_s64_s32(correction), 1);
        }
    }
    for (size_t k = 0; k < t->format.block; k += 8) {
        int8x16_t columns[COLUMN_PAIRS];
        load_columns((const int8_t *)panel + k * GGD_PANEL_COLUMNS + 4 * column, columns);
        for (int pair = 0; 2 * pair < rows; pair++) {
            const uint8_t *first = a + (size_t)(2 * pair) * t->a.ld + k;
            // an odd last row is multiplied twice, and the second product left
            uint8x16_t two = vcombine_u8(vld1_u8(first), vld1_u8(2 * pair + 1 < rows ? first + t->a.ld : first));
            for (int j = 0; j < COLUMN_PAIRS; j++) {
                int32x4_t square = vreinterpretq_s32_s64(squares[pair][j]);
                squares[pair][j] = vreinterpretq_s64_s32(vusmmlaq_s32(square, two, columns[j]));
            }
        }
    }
    for (int row = 0; row < rows; row++) {
        for (int v = 0; v < VECTORS; v++) {
            int64x2_t left = squares[row / 2][2 * v], right = squares[row / 2][2 * v + 1];
            products[row][v] = vreinterpretq_s32_s64(row % 2 == 0 ? vzip1q_s64(left, right) : vzip2q_s64(left, right));
        }
    }
}

const ggd_kernels ggd_kernels_neon_i8mm = {.name = "neon_i8mm", GGD_NEON_BF16_KERNELS};
