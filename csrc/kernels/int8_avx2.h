// int8_avx2.h - what the sets with 256-bit vectors share in int8: bringing activations to int8, and weights into groups of four k.
// Their tiles and panels differ, so they are not here.
#ifndef GGD_INT8_AVX2_H
#define GGD_INT8_AVX2_H

#include <immintrin.h>

#include "rows.h"

enum { STRIP = GGD_STRIP_COLUMNS };  // columns of a vector of 32-bit lanes

static inline float largest_of(__m256 values) {
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(values), _mm256_extractf128_ps(values, 1));
    __m128 two = _mm_max_ps(four, _mm_movehl_ps(four, four));
    return _mm_cvtss_f32(_mm_max_ss(two, _mm_movehdup_ps(two)));
}

static inline int32_t sum_of(__m256i lanes) {
    __m128i four = _mm_add_epi32(_mm256_castsi256_si128(lanes), _mm256_extracti128_si256(lanes, 1));
    __m128i two = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
    return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 0xb1)));
}

static inline __m256 absolute(__m256 values) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), values); }

// Four vectors of eight integers within -128 .. 255 to 32 bytes of either sign, in the order of the integers: packing saturates to the
// wrong range, so it only ever gets 16 bits, and works within halves, so the lanes are put in order after it.
static inline __m256i narrow_32(const __m256i q[4]) {
    const __m256i low_byte = _mm256_set1_epi32(0xff), order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    __m256i first = _mm256_packus_epi32(_mm256_and_si256(q[0], low_byte), _mm256_and_si256(q[1], low_byte));
    __m256i second = _mm256_packus_epi32(_mm256_and_si256(q[2], low_byte), _mm256_and_si256(q[3], low_byte));
    return _mm256_permutevar8x32_epi32(_mm256_packus_epi16(first, second), order);
}

// Whole blocks of float32, to q + offset, q no larger than `size`.
static inline __attribute__((always_inline)) void round_blocks(const float *source, size_t n_blocks, const size_t block,
                                                               float size, int32_t offset, uint8_t *quants, float *scales,
                                                               float *sums) {
    for (size_t b = 0; b < n_blocks; b++, source += block, quants += block) {
        __m256 values[GGD_INT8_MAX_BLOCK / 8], largest = _mm256_setzero_ps();
        for (size_t i = 0; i < block / 8; i++) {
            values[i] = _mm256_loadu_ps(source + 8 * i);
            largest = _mm256_max_ps(largest, absolute(values[i]));
        }
        float top = largest_of(largest);
        __m256 inverse = _mm256_set1_ps(top > 0 ? size / top : 0);
        __m256i sum = _mm256_setzero_si256();
        for (size_t i = 0; i < block / 8; i += 4) {
            __m256i q[4];
            for (size_t j = 0; j < 4; j++) {
                q[j] = _mm256_cvtps_epi32(_mm256_mul_ps(values[i + j], inverse));
                sum = _mm256_add_epi32(sum, q[j]);
                q[j] = _mm256_add_epi32(q[j], _mm256_set1_epi32(offset));
            }
            _mm256_storeu_si256((__m256i *)(quants + 8 * i), narrow_32(q));
        }
        scales[b] = top / size;
        sums[b] = scales[b] * (float)sum_of(sum);
    }
}

static inline void round_rows(const void *source, ggd_element element, size_t n, size_t block, float size, int32_t offset,
                              uint8_t *quants, float *scales, float *sums) {
    size_t whole = 0;
    if (element == GGD_ELEMENT_F32 && block == 32) {
        whole = n / 32;
        round_blocks(source, whole, 32, size, offset, quants, scales, sums);
    } else if (element == GGD_ELEMENT_F32 && block == 64) {
        whole = n / 64;
        round_blocks(source, whole, 64, size, offset, quants, scales, sums);
    }
    if (n > whole * block) {
        const uint8_t *rest = (const uint8_t *)source + whole * block * ggd_element_bytes(element);
        rows_int8_round(rest, element, n - whole * block, block, size, offset, quants + whole * block, scales + whole,
                        sums + whole);
    }
}

// 16 k of eight rows to four groups: group i has k 4i .. 4i + 3 of each row, a row a lane.
static inline void load_groups(const int8_t *quants, size_t ld, __m256i groups[4]) {
    __m256i rows[4];  // row i beside row i + 4
    for (size_t i = 0; i < 4; i++) {
        __m128i low = _mm_loadu_si128((const __m128i *)(quants + i * ld));
        __m128i high = _mm_loadu_si128((const __m128i *)(quants + (i + 4) * ld));
        rows[i] = _mm256_inserti128_si256(_mm256_castsi128_si256(low), high, 1);
    }
    __m256i low01 = _mm256_unpacklo_epi32(rows[0], rows[1]), high01 = _mm256_unpackhi_epi32(rows[0], rows[1]);
    __m256i low23 = _mm256_unpacklo_epi32(rows[2], rows[3]), high23 = _mm256_unpackhi_epi32(rows[2], rows[3]);
    groups[0] = _mm256_unpacklo_epi64(low01, low23);
    groups[1] = _mm256_unpackhi_epi64(low01, low23);
    groups[2] = _mm256_unpacklo_epi64(high01, high23);
    groups[3] = _mm256_unpackhi_epi64(high01, high23);
}

// Largest magnitude of each of eight columns of float32.
static inline __m256 largest_of_columns(const float *source, size_t ld, size_t rows) {
    __m256 tops[4] = {_mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps(), _mm256_setzero_ps()};
    for (size_t row = 0; row < rows; row++) {  // four chains: one would wait for each comparison
        tops[row % 4] = _mm256_max_ps(tops[row % 4], absolute(_mm256_loadu_ps(source + row * ld)));
    }
    return _mm256_max_ps(_mm256_max_ps(tops[0], tops[1]), _mm256_max_ps(tops[2], tops[3]));
}

static inline __m256 inverse_or_zero(__m256 largest, float size) {
    __m256 some = _mm256_cmp_ps(largest, _mm256_setzero_ps(), _CMP_GT_OQ);
    return _mm256_and_ps(some, _mm256_div_ps(_mm256_set1_ps(size), largest));
}

// Four rows of eight columns, times `inverse`, to a group; of `left` rows, those that are missing are zero.
static inline __m256i round_group(const float *source, size_t ld, size_t left, __m256 inverse) {
    // Packing narrows within halves of four columns; there the bytes of a column's four k are brought together.
    const __m256i by_column = _mm256_broadcastsi128_si256(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    __m256i q[4];
    for (size_t i = 0; i < 4; i++) {
        __m256 values = i < left ? _mm256_loadu_ps(source + i * ld) : _mm256_setzero_ps();
        q[i] = _mm256_cvtps_epi32(_mm256_mul_ps(values, inverse));
    }
    __m256i narrow = _mm256_packs_epi16(_mm256_packs_epi32(q[0], q[1]), _mm256_packs_epi32(q[2], q[3]));
    return _mm256_shuffle_epi8(narrow, by_column);
}

// Eight floats ld apart. Written out: a vector loaded from an array of floats just stored would wait for the stores.
static inline __m256 load_column(const float *source, size_t ld) {
    return _mm256_setr_ps(source[0], source[ld], source[2 * ld], source[3 * ld], source[4 * ld], source[5 * ld], source[6 * ld],
                          source[7 * ld]);
}

#endif
