// int8_vnni.h - int8 panels and products by vpdpbusd on 256 bits, which multiplies unsigned bytes (the left operand) by signed ones in each
// 32-bit lane and adds all four products to an int32. The instruction has two encodings: the including set defines dot_bytes as one of them.
// A panel has the common form of kernels.h with `width` columns in the place of 32.
#ifndef GGD_INT8_VNNI_H
#define GGD_INT8_VNNI_H

#include "strip_types.h"

// The set's own: sum + the products of four bytes of `a`, unsigned, and of `w`, signed, lane by lane.
static inline __m256i dot_bytes(__m256i sum, __m256i a, __m256i w);

// -128 times the sum of four weights, less what came before.
static inline __m256i correct(__m256i sum, __m256i weights) {
    return dot_bytes(sum, _mm256_set1_epi8(-128), weights);  // 128, unsigned
}

static inline void store_corrections(__m256i sum, uint8_t *target) {
    _mm256_storeu_si256((__m256i *)target, _mm256_sub_epi32(_mm256_setzero_si256(), sum));
}

static inline size_t vnni_block_bytes(size_t block, int has_minima, size_t width) {
    return (block + 8 + (has_minima ? 4 : 0)) * width;
}

static inline __attribute__((always_inline)) void vnni_pack_columns(const size_t width, const ggd_int8_format *format,
                                                                    const int8_t *quants, size_t ld, const float *scales,
                                                                    const float *minima, size_t ld_scales, size_t k,
                                                                    uint8_t *panel) {
    for (size_t b = 0; b < k / format->block; b++, panel += vnni_block_bytes(format->block, format->has_minima, width)) {
        for (size_t column = 0; column < width; column += STRIP) {
            const int8_t *source = quants + column * ld + b * format->block;
            uint8_t *target = panel + 4 * column;
            __m256i sum = _mm256_setzero_si256();
            for (size_t i = 0; i < format->block; i += 16) {
                __m256i groups[4];
                load_groups(source + i, ld, groups);
                for (size_t group = 0; group < 4; group++, target += 4 * width) {
                    _mm256_storeu_si256((__m256i *)target, groups[group]);
                    sum = correct(sum, groups[group]);
                }
            }
            store_corrections(sum, target);
            _mm256_storeu_ps((float *)target + width, load_column(scales + column * ld_scales + b, ld_scales));
            if (format->has_minima) {
                __m256 minimum = load_column(minima + column * ld_scales + b, ld_scales);
                _mm256_storeu_ps((float *)target + 2 * width, minimum);
            }
        }
    }
}

// The integer sums take most registers of the older encoding, which has sixteen: the float sums then wait in the first-level cache,
// once a block.
enum { VNNI_ROWS = 6, MAX_VECTORS = 2 };
static inline __attribute__((always_inline)) void vnni_piece(const int rows, const size_t width, const size_t n_vectors,
                                                             const size_t block, const int minima, const ggd_int8_tile *t,
                                                             size_t first_row, size_t column) {
    __m256 sums[VNNI_ROWS][MAX_VECTORS];
#pragma GCC unroll 6
    for (int row = 0; row < rows; row++) {
        const float *init = t->init + (first_row + (size_t)row) * t->ld_init + column;
        for (size_t v = 0; v < n_vectors; v++) {
            sums[row][v] = t->init != NULL ? _mm256_loadu_ps(init + v * STRIP) : _mm256_setzero_ps();
        }
    }
    const uint8_t *a = t->a.quants + first_row * t->a.ld, *panel = t->panel + 4 * column;
    const float *a_scales = t->a.scales + first_row * t->a.ld_scales, *a_sums = t->a.sums + first_row * t->a.ld_scales;
    const size_t bytes_block = vnni_block_bytes(block, minima, width);
    const __m256i corrected = _mm256_set1_epi32(t->a.is_unsigned ? 0 : -1);
    const size_t blocks_scale = block == 16 ? 2 : 1;  // a constant: a division would take as long as half a block
    for (size_t b = 0; b < t->n_blocks; b++, a += block, panel += bytes_block) {
        __m256i products[VNNI_ROWS][MAX_VECTORS];
        const __m256i *corrections = (const __m256i *)(panel + block * width);
        for (size_t v = 0; v < n_vectors; v++) {
            __m256i correction = _mm256_and_si256(_mm256_loadu_si256(corrections + v), corrected);
#pragma GCC unroll 6
            for (int row = 0; row < rows; row++) {
                products[row][v] = correction;
            }
        }
#pragma GCC unroll 16
        for (size_t group = 0; group < block / 4; group++) {
            const __m256i *weights = (const __m256i *)(panel + group * 4 * width);
#pragma GCC unroll 6
            for (int row = 0; row < rows; row++) {
                int32_t four;
                memcpy(&four, a + (size_t)row * t->a.ld + 4 * group, sizeof four);
#pragma GCC unroll 2
                for (size_t v = 0; v < n_vectors; v++) {
                    __m256i columns = _mm256_loadu_si256(weights + v);
                    products[row][v] = dot_bytes(products[row][v], _mm256_set1_epi32(four), columns);
                }
            }
        }
        const float *scales = (const float *)(corrections + width / STRIP);
#pragma GCC unroll 6
        for (int row = 0; row < rows; row++) {
            size_t at = (size_t)row * t->a.ld_scales + b / blocks_scale;
            for (size_t v = 0; v < n_vectors; v++) {
                __m256 scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(products[row][v]), _mm256_loadu_ps(scales + v * STRIP));
                sums[row][v] = _mm256_fmadd_ps(scaled, _mm256_set1_ps(a_scales[at]), sums[row][v]);
                if (minima) {
                    __m256 minimum = _mm256_loadu_ps(scales + width + v * STRIP);
                    sums[row][v] = _mm256_fmadd_ps(minimum, _mm256_set1_ps(a_sums[at]), sums[row][v]);
                }
            }
        }
    }
#pragma GCC unroll 6
    for (int row = 0; row < rows; row++) {
        float *c = (float *)t->c + (first_row + (size_t)row) * t->ld_c + column;
        for (size_t v = 0; v < n_vectors; v++) {
            _mm256_storeu_ps(c + v * STRIP, sums[row][v]);
        }
    }
}

// All pieces of a tile, with the form of their blocks as a constant.
static inline __attribute__((always_inline)) void vnni_pieces(const size_t width, const size_t n_vectors, const size_t block,
                                                              const int minima, const ggd_int8_tile *t) {
    for (size_t row = 0; row < t->n_rows; row += VNNI_ROWS) {
        size_t rows = t->n_rows - row < VNNI_ROWS ? t->n_rows - row : VNNI_ROWS;
        for (size_t column = 0; column < width; column += n_vectors * STRIP) {
#define PIECE_OF_ROWS(rows) vnni_piece(rows, width, n_vectors, block, minima, t, row, column)
            GGD_ROWS_6(rows, PIECE_OF_ROWS)
        }
    }
}

static inline __attribute__((always_inline)) void vnni_tile(const size_t width, const size_t n_vectors, const ggd_int8_tile *t) {
    if (t->format.block == 64) {
        vnni_pieces(width, n_vectors, 64, 0, t);
    } else if (t->format.block == 32 && t->format.has_minima) {
        vnni_pieces(width, n_vectors, 32, 1, t);
    } else if (t->format.block == 32) {
        vnni_pieces(width, n_vectors, 32, 0, t);
    } else {
        vnni_pieces(width, n_vectors, 16, 0, t);
    }
}

// ---- strips ----

static size_t vnni_strip_bytes(const ggd_int8_format *format) {
    return vnni_block_bytes(format->block, format->has_minima, STRIP);
}

static void vnni_pack_strip(const ggd_int8_format *format, const int8_t *quants, size_t ld, const float *scales,
                            const float *minima, size_t ld_scales, size_t k, uint8_t *strip) {
    vnni_pack_columns(STRIP, format, quants, ld, scales, minima, ld_scales, k, strip);
}

static inline uint8_t *store_strip(const ggd_int8_format *format, const strip_block *block, uint8_t *target) {
    const size_t groups_block = format->block / 4;
    __m256i sum = _mm256_setzero_si256();
#pragma GCC unroll 8
    for (size_t i = 0; i < 8; i++, target += sizeof sum) {
        _mm256_storeu_si256((__m256i *)target, block->groups[i]);
        sum = correct(sum, block->groups[i]);
        if (i % groups_block == groups_block - 1) {
            store_corrections(sum, target + sizeof sum);
            _mm256_storeu_ps((float *)target + 2 * STRIP, block->scales[i / groups_block]);
            target += 2 * sizeof sum;
            sum = _mm256_setzero_si256();
        }
    }
    if (format->has_minima) {
        _mm256_storeu_ps((float *)target, block->minima);
        target += sizeof block->minima;
    }
    return target;
}

static void vnni_strip(const ggd_int8_tile *t) { vnni_tile(STRIP, 1, t); }

#endif
