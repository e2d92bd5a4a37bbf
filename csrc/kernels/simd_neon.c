// simd_neon.c - kernels for 64-bit Arm: products in float32; a tile is worked off in blocks of 4 rows x 16 columns.
#include <arm_neon.h>

#include "rows.h"

enum { BLOCK_ROWS = 4, BLOCK_COLUMNS = 16, VECTORS = 4 };

static inline __attribute__((always_inline)) void accumulate(const int rows, float32x4_t sums[][VECTORS], const float *a,
                                                             size_t ld, size_t k, const float *panel) {
    for (size_t i = 0; i < k; i++) {
        float32x4_t columns[VECTORS];
        for (int v = 0; v < VECTORS; v++) {
            columns[v] = vld1q_f32(panel + i * GGD_PANEL_COLUMNS + 4 * v);
        }
        for (int row = 0; row < rows; row++) {
            float32x4_t value = vdupq_n_f32(a[(size_t)row * ld + i]);
            for (int v = 0; v < VECTORS; v++) {
                sums[row][v] = vfmaq_f32(sums[row][v], value, columns[v]);
            }
        }
    }
}

static inline __attribute__((always_inline)) void block_of_rows(const int rows, const ggd_tile *t, size_t first_row,
                                                                size_t column) {
    float32x4_t sums[BLOCK_ROWS][VECTORS];
    for (int row = 0; row < rows; row++) {
        size_t offset = (first_row + (size_t)row) * t->ld_init + column;
        for (int v = 0; v < VECTORS; v++) {
            sums[row][v] = t->init != NULL ? vld1q_f32(t->init + offset + 4 * v) : vdupq_n_f32(0.0f);
        }
    }
    const float *panel = (const float *)t->panel + column;
    accumulate(rows, sums, (const float *)t->a1 + first_row * t->ld_a1, t->ld_a1, t->k1, panel);
    if (t->k2 > 0) {
        accumulate(rows, sums, (const float *)t->a2 + first_row * t->ld_a2, t->ld_a2, t->k2, panel + t->k1 * GGD_PANEL_COLUMNS);
    }
    for (int row = 0; row < rows; row++) {
        float *c = (float *)t->c + (first_row + (size_t)row) * t->ld_c + column;
        for (int v = 0; v < VECTORS; v++) {
            vst1q_f32(c + 4 * v, sums[row][v]);
        }
    }
}

#define BLOCK_OF_ROWS(rows) block_of_rows(rows, t, row, column)
static void tile_f32(const ggd_tile *t) {
    for (size_t row = 0; row < t->n_rows; row += BLOCK_ROWS) {
        size_t rows = t->n_rows - row < BLOCK_ROWS ? t->n_rows - row : BLOCK_ROWS;
        for (size_t column = 0; column < GGD_PANEL_COLUMNS; column += BLOCK_COLUMNS) {
            GGD_ROWS_4(rows, BLOCK_OF_ROWS)
        }
    }
}

const ggd_kernels ggd_kernels_neon = {
    .name = "neon",
    .fast_element = GGD_ELEMENT_F32,
    .tile = {tile_f32, NULL},
    .pack_columns = {rows_pack_columns_f32, NULL},
    .pack_rows = {rows_pack_rows_f32, NULL},
    .pack_rows_from_bf16 = rows_pack_rows_from_bf16,
    GGD_ROW_KERNELS,
};
