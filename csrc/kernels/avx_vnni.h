// avx_vnni.h - the kernels of x86-64 with vpdpbusd on 256 bits, which multiplies unsigned bytes (the left operand) by signed ones in each
// 32-bit lane and adds all four products to an int32. Products in float32 are those of AVX2. Included once by each set: the instruction
// has two encodings, and the set defines dot_bytes as one of them. Panels have the common form of kernels.h.
#ifndef GGD_AVX_VNNI_H
#define GGD_AVX_VNNI_H

#include "int8_avx2.h"

// The set's own: sum + the products of four bytes of `a`, unsigned, and of `w`, signed, lane by lane.
static inline __m256i dot_bytes(__m256i sum, __m256i a, __m256i w);

// -128 times the sum of four weights, less what came before.
static inline __m256i correct(__m256i sum, __m256i weights) {
    return dot_bytes(sum, _mm256_set1_epi8(-128), weights);  // 128, unsigned
}

static inline void store_corrections(__m256i sum, uint8_t *target) {
    _mm256_storeu_si256((__m256i *)target, _mm256_sub_epi32(_mm256_setzero_si256(), sum));
}

static inline __attribute__((always_inline)) void int8_pack_strip(const float *source, size_t ld, const size_t rows,
                                                                  uint8_t *target) {
    __m256 largest = largest_of_columns(source, ld, rows), inverse = inverse_or_zero(largest, GGD_INT8_SIZE);
    __m256i sum = _mm256_setzero_si256();
    for (size_t row = 0; row < GGD_INT8_MAX_BLOCK; row += 4, target += 4 * GGD_PANEL_COLUMNS) {
        __m256i group = round_group(source + row * ld, ld, rows > row ? rows - row : 0, inverse);
        _mm256_storeu_si256((__m256i *)target, group);
        sum = correct(sum, group);
    }
    store_corrections(sum, target);
    _mm256_storeu_ps((float *)(target + 4 * GGD_PANEL_COLUMNS), _mm256_div_ps(largest, _mm256_set1_ps(GGD_INT8_SIZE)));
}

static void int8_quantise(const void *source, ggd_element element, size_t n, size_t block, int is_unsigned, uint8_t *quants,
                          float *scales, float *sums) {
    float size = is_unsigned ? GGD_UINT8_SIZE : GGD_INT8_SIZE;
    round_rows(source, element, n, block, size, is_unsigned ? 0 : 128, quants, scales, sums);
}

static void int8_pack(const float *source, size_t ld, size_t rows, int is_unsigned, uint8_t *block) {
    (void)is_unsigned;
    for (size_t column = 0; column < GGD_PANEL_COLUMNS; column += STRIP) {
        if (rows == GGD_INT8_MAX_BLOCK) {  // a constant: no row is asked for its number
            int8_pack_strip(source + column, ld, GGD_INT8_MAX_BLOCK, block + 4 * column);
        } else {
            int8_pack_strip(source + column, ld, rows, block + 4 * column);
        }
    }
}

static void int8_pack_columns(const ggd_int8_format *format, const int8_t *quants, size_t ld, const float *scales,
                              const float *minima, size_t ld_scales, size_t k, uint8_t *panel) {
    for (size_t b = 0; b < k / format->block; b++, panel += ggd_int8_block_bytes(format)) {
        for (size_t column = 0; column < GGD_PANEL_COLUMNS; column += STRIP) {
            const int8_t *source = quants + column * ld + b * format->block;
            uint8_t *target = panel + 4 * column;
            __m256i sum = _mm256_setzero_si256();
            for (size_t i = 0; i < format->block; i += 16) {
                __m256i groups[4];
                load_groups(source + i, ld, groups);
                for (size_t group = 0; group < 4; group++, target += 4 * GGD_PANEL_COLUMNS) {
                    _mm256_storeu_si256((__m256i *)target, groups[group]);
                    sum = correct(sum, groups[group]);
                }
            }
            store_corrections(sum, target);
            _mm256_storeu_ps((float *)target + GGD_PANEL_COLUMNS, load_column(scales + column * ld_scales + b, ld_scales));
            if (format->has_minima) {
                __m256 minimum = load_column(minima + column * ld_scales + b, ld_scales);
                _mm256_storeu_ps((float *)target + 2 * GGD_PANEL_COLUMNS, minimum);
            }
        }
    }
}

// The integer sums take most registers of the older encoding, which has sixteen: the float sums then wait in the first-level cache,
// once a block.
enum { INT8_ROWS = 6, VECTORS = 2 };
static inline __attribute__((always_inline)) void int8_piece(const int rows, const size_t block, const int minima,
                                                             const ggd_int8_tile *t, size_t first_row, size_t column) {
    __m256 sums[INT8_ROWS][VECTORS];
#pragma GCC unroll 6
    for (int row = 0; row < rows; row++) {
        const float *init = t->init + (first_row + (size_t)row) * t->ld_init + column;
        for (size_t v = 0; v < VECTORS; v++) {
            sums[row][v] = t->init != NULL ? _mm256_loadu_ps(init + v * STRIP) : _mm256_setzero_ps();
        }
    }
    const uint8_t *a = t->a.quants + first_row * t->a.ld, *panel = t->panel + 4 * column;
    const float *a_scales = t->a.scales + first_row * t->a.ld_scales, *a_sums = t->a.sums + first_row * t->a.ld_scales;
    const size_t bytes_block = (block + 8 + (minima ? 4 : 0)) * GGD_PANEL_COLUMNS;
    const __m256i corrected = _mm256_set1_epi32(t->a.is_unsigned ? 0 : -1);
    const size_t blocks_scale = block == 16 ? 2 : 1;  // a constant: a division would take as long as half a block
    for (size_t b = 0; b < t->n_blocks; b++, a += block, panel += bytes_block) {
        __m256i products[INT8_ROWS][VECTORS];
        const __m256i *corrections = (const __m256i *)(panel + block * GGD_PANEL_COLUMNS);
        for (size_t v = 0; v < VECTORS; v++) {
            __m256i correction = _mm256_and_si256(_mm256_loadu_si256(corrections + v), corrected);
#pragma GCC unroll 6
            for (int row = 0; row < rows; row++) {
                products[row][v] = correction;
            }
        }
#pragma GCC unroll 16
        for (size_t group = 0; group < block / 4; group++) {
            const __m256i *weights = (const __m256i *)(panel + group * 4 * GGD_PANEL_COLUMNS);
            __m256i left = _mm256_loadu_si256(weights), right = _mm256_loadu_si256(weights + 1);
#pragma GCC unroll 6
            for (int row = 0; row < rows; row++) {
                int32_t four;
                memcpy(&four, a + (size_t)row * t->a.ld + 4 * group, sizeof four);
                products[row][0] = dot_bytes(products[row][0], _mm256_set1_epi32(four), left);
                products[row][1] = dot_bytes(products[row][1], _mm256_set1_epi32(four), right);
            }
        }
        const float *scales = (const float *)(corrections + GGD_PANEL_COLUMNS / STRIP);
#pragma GCC unroll 6
        for (int row = 0; row < rows; row++) {
            size_t at = (size_t)row * t->a.ld_scales + b / blocks_scale;
            for (size_t v = 0; v < VECTORS; v++) {
                __m256 scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(products[row][v]), _mm256_loadu_ps(scales + v * STRIP));
                sums[row][v] = _mm256_fmadd_ps(scaled, _mm256_set1_ps(a_scales[at]), sums[row][v]);
                if (minima) {
                    __m256 minimum = _mm256_loadu_ps(scales + GGD_PANEL_COLUMNS + v * STRIP);
                    sums[row][v] = _mm256_fmadd_ps(minimum, _mm256_set1_ps(a_sums[at]), sums[row][v]);
                }
            }
        }
    }
#pragma GCC unroll 6
    for (int row = 0; row < rows; row++) {
        float *c = (float *)t->c + (first_row + (size_t)row) * t->ld_c + column;
        for (size_t v = 0; v < VECTORS; v++) {
            _mm256_storeu_ps(c + v * STRIP, sums[row][v]);
        }
    }
}

// All pieces of a tile, with the form of their blocks as a constant.
static inline __attribute__((always_inline)) void int8_pieces(const size_t block, const int minima, const ggd_int8_tile *t) {
    for (size_t row = 0; row < t->n_rows; row += INT8_ROWS) {
        size_t rows = t->n_rows - row < INT8_ROWS ? t->n_rows - row : INT8_ROWS;
        for (size_t column = 0; column < GGD_PANEL_COLUMNS; column += VECTORS * STRIP) {
#define PIECE_OF_ROWS(rows) int8_piece(rows, block, minima, t, row, column)
            GGD_ROWS_6(rows, PIECE_OF_ROWS)
        }
    }
}

static void int8_tile(const ggd_int8_tile *t) {
    if (t->format.block == 64) {
        int8_pieces(64, 0, t);
    } else if (t->format.block == 32 && t->format.has_minima) {
        int8_pieces(32, 1, t);
    } else if (t->format.block == 32) {
        int8_pieces(32, 0, t);
    } else {
        int8_pieces(16, 0, t);
    }
}

extern const ggd_kernels ggd_kernels_avx2;
static void tile_f32(const ggd_tile *t) { ggd_kernels_avx2.tile[GGD_ELEMENT_F32](t); }

// A table but for its name.
#define GGD_AVX_VNNI_KERNELS                                                                                                     \
    .fast_element = GGD_ELEMENT_F32, .tile = {tile_f32, NULL}, .pack_columns = {rows_pack_columns_f32, NULL},                    \
    .pack_rows = {rows_pack_rows_f32, NULL}, .pack_rows_from_bf16 = rows_pack_rows_from_bf16, .int8_tile = int8_tile,            \
    .int8_steps = GGD_INT8_ALL_STEPS, .int8_pack = int8_pack, .int8_quantise = int8_quantise,                                    \
    .int8_pack_columns = int8_pack_columns, GGD_ROW_KERNELS

#endif
