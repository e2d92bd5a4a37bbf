// simd_avx512.c - kernels for x86-64 with AVX-512 F, BW, VL, DQ: products in float32.
#include <immintrin.h>

#include "rows.h"

// One operand's share of a tile: rows x 32 accumulators live in registers, two panel vectors are loaded for each k and meet one
// broadcast element of every row.
static inline __attribute__((always_inline)) void accumulate(const int rows, __m512 sums[][2], const float *a, size_t ld,
                                                             size_t k, const float *panel) {
    for (size_t i = 0; i < k; i++) {
        __m512 left = _mm512_loadu_ps(panel + i * GGD_PANEL_COLUMNS);
        __m512 right = _mm512_loadu_ps(panel + i * GGD_PANEL_COLUMNS + 16);
#pragma GCC unroll 12
        for (int row = 0; row < rows; row++) {
            __m512 value = _mm512_set1_ps(a[(size_t)row * ld + i]);
            sums[row][0] = _mm512_fmadd_ps(value, left, sums[row][0]);
            sums[row][1] = _mm512_fmadd_ps(value, right, sums[row][1]);
        }
    }
}

static inline __attribute__((always_inline)) void tile_of_rows(const int rows, const ggd_tile *t) {
    __m512 sums[GGD_TILE_ROWS][2];
#pragma GCC unroll 12
    for (int row = 0; row < rows; row++) {
        size_t offset = (size_t)row * t->ld_init;
        sums[row][0] = t->init != NULL ? _mm512_loadu_ps(t->init + offset) : _mm512_setzero_ps();
        sums[row][1] = t->init != NULL ? _mm512_loadu_ps(t->init + offset + 16) : _mm512_setzero_ps();
    }
    const float *panel = t->panel;
    accumulate(rows, sums, t->a1, t->ld_a1, t->k1, panel);
    if (t->k2 > 0) {
        accumulate(rows, sums, t->a2, t->ld_a2, t->k2, panel + t->k1 * GGD_PANEL_COLUMNS);
    }
#pragma GCC unroll 12
    for (int row = 0; row < rows; row++) {
        float *c = (float *)t->c + (size_t)row * t->ld_c;
        _mm512_storeu_ps(c, sums[row][0]);
        _mm512_storeu_ps(c + 16, sums[row][1]);
    }
}

#define TILE_OF_ROWS(rows) tile_of_rows(rows, t)
static void tile_f32(const ggd_tile *t) { GGD_ROWS_12(t->n_rows, TILE_OF_ROWS) }

const ggd_kernels ggd_kernels_avx512 = {
    .name = "avx512",
    .fast_element = GGD_ELEMENT_F32,
    .tile = {tile_f32, NULL},
    .pack_columns = {rows_pack_columns_f32, NULL},
    .pack_rows = {rows_pack_rows_f32, NULL},
    .pack_rows_from_bf16 = rows_pack_rows_from_bf16,
    GGD_ROW_KERNELS,
};
