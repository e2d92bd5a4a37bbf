// simd_avx2.c - kernels for x86-64 with AVX2 and FMA: products in float32, sixteen registers, so a tile is worked off in blocks of
// 6 rows x 16 columns.
#include <immintrin.h>

#include "rows.h"

enum { BLOCK_ROWS = 6, BLOCK_COLUMNS = 16 };

static inline __attribute__((always_inline)) void accumulate(const int rows, __m256 sums[][2], const float *a, size_t ld,
                                                             size_t k, const float *panel) {
    for (size_t i = 0; i < k; i++) {
        __m256 left = _mm256_loadu_ps(panel + i * GGD_PANEL_COLUMNS);
        __m256 right = _mm256_loadu_ps(panel + i * GGD_PANEL_COLUMNS + 8);
#pragma GCC unroll 6
        for (int row = 0; row < rows; row++) {
            __m256 value = _mm256_set1_ps(a[(size_t)row * ld + i]);
            sums[row][0] = _mm256_fmadd_ps(value, left, sums[row][0]);
            sums[row][1] = _mm256_fmadd_ps(value, right, sums[row][1]);
        }
    }
}

static inline __attribute__((always_inline)) void block_of_rows(const int rows, const ggd_tile *t, size_t first_row,
                                                                size_t column) {
    __m256 sums[BLOCK_ROWS][2];
#pragma GCC unroll 6
    for (int row = 0; row < rows; row++) {
        size_t offset = (first_row + (size_t)row) * t->ld_init + column;
        sums[row][0] = t->init != NULL ? _mm256_loadu_ps(t->init + offset) : _mm256_setzero_ps();
        sums[row][1] = t->init != NULL ? _mm256_loadu_ps(t->init + offset + 8) : _mm256_setzero_ps();
    }
    const float *panel = (const float *)t->panel + column;
    accumulate(rows, sums, (const float *)t->a1 + first_row * t->ld_a1, t->ld_a1, t->k1, panel);
    if (t->k2 > 0) {
        accumulate(rows, sums, (const float *)t->a2 + first_row * t->ld_a2, t->ld_a2, t->k2, panel + t->k1 * GGD_PANEL_COLUMNS);
    }
#pragma GCC unroll 6
    for (int row = 0; row < rows; row++) {
        float *c = (float *)t->c + (first_row + (size_t)row) * t->ld_c + column;
        _mm256_storeu_ps(c, sums[row][0]);
        _mm256_storeu_ps(c + 8, sums[row][1]);
    }
}

#define BLOCK_OF_ROWS(rows) block_of_rows(rows, t, row, column)
static void tile_f32(const ggd_tile *t) {
    for (size_t row = 0; row < t->n_rows; row += BLOCK_ROWS) {
        size_t rows = t->n_rows - row < BLOCK_ROWS ? t->n_rows - row : BLOCK_ROWS;
        for (size_t column = 0; column < GGD_PANEL_COLUMNS; column += BLOCK_COLUMNS) {
            GGD_ROWS_6(rows, BLOCK_OF_ROWS)
        }
    }
}

const ggd_kernels ggd_kernels_avx2 = {
    .name = "avx2",
    .fast_element = GGD_ELEMENT_F32,
    .tile = {tile_f32, NULL},
    .pack_columns = {rows_pack_columns_f32, NULL},
    .pack_rows = {rows_pack_rows_f32, NULL},
    .pack_rows_from_bf16 = rows_pack_rows_from_bf16,
    GGD_ROW_KERNELS,
};
