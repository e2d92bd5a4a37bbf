// strip_types.h - eight rows of stored weights straight to a strip, type by type: the rows' 16-byte pieces are transposed as they lie, and only then
// taken apart, so that each instruction works on eight rows. The values are those of int8_unpack (unpack.h has the layouts). Included by each
// set with 256-bit vectors, which defines store_strip: a block of 32 or two of 16 k to its place, whose end it returns.
#ifndef GGD_STRIP_TYPES_H
#define GGD_STRIP_TYPES_H

#include "int8_avx2.h"

// 32 k of eight rows: groups of four k, a row a lane; a scale for each 16 k, or the first for all.
typedef struct {
    __m256i groups[8];
    __m256 scales[2], minima;
} strip_block;

static inline uint8_t *store_strip(const ggd_int8_format *format, const strip_block *block, uint8_t *target);

// Cache lines to ask for with each 32 k of eight rows: as many as there are in blocks of four bits.
enum { LINES_A_BLOCK = 3 };

static inline int32_t load_word(const uint8_t *source) {
    int32_t word;
    memcpy(&word, source, sizeof word);
    return word;
}

// Four bytes of each of eight rows.
static inline __m256i load_words(const uint8_t *source, size_t ld) {
    return _mm256_setr_epi32(load_word(source), load_word(source + ld), load_word(source + 2 * ld), load_word(source + 3 * ld),
                             load_word(source + 4 * ld), load_word(source + 5 * ld), load_word(source + 6 * ld),
                             load_word(source + 7 * ld));
}

// The float16 in the low and in the high half of each lane.
static inline void halves_of_words(__m256i words, __m256 *low, __m256 *high) {
    __m256i packed = _mm256_packus_epi32(_mm256_and_si256(words, _mm256_set1_epi32(0xffff)), _mm256_srli_epi32(words, 16));
    packed = _mm256_permute4x64_epi64(packed, 0xd8);  // packing works within halves
    *low = _mm256_cvtph_ps(_mm256_castsi256_si128(packed));
    *high = _mm256_cvtph_ps(_mm256_extracti128_si256(packed, 1));
}

static inline __m256i bits_of(__m256i bytes, int shift, int mask) {
    return _mm256_and_si256(_mm256_srli_epi16(bytes, shift), _mm256_set1_epi8((char)mask));
}

// Byte `index` of each lane as a float.
static inline __m256 unsigned_byte(__m256i lanes, int index) {
    return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(lanes, 8 * index), _mm256_set1_epi32(0xff)));
}
static inline __m256 signed_byte(__m256i lanes, int index) {
    return _mm256_cvtepi32_ps(_mm256_srai_epi32(_mm256_slli_epi32(lanes, 24 - 8 * index), 24));
}

// 16 bytes a row, two quants in each: the low ones are the first 16 k.
static inline void nibbles(const uint8_t *source, size_t ld, int offset, __m256i groups[8]) {
    __m256i bytes[4];
    load_groups((const int8_t *)source, ld, bytes);
    for (size_t i = 0; i < 4; i++) {
        groups[i] = _mm256_sub_epi8(bits_of(bytes[i], 0, 15), _mm256_set1_epi8((char)offset));
        groups[4 + i] = _mm256_sub_epi8(bits_of(bytes[i], 4, 15), _mm256_set1_epi8((char)offset));
    }
}

static void strip_q4_0(const uint8_t *source, size_t bytes_row, size_t n, uint8_t *strip, ggd_fetch *next) {
    const ggd_int8_format format = ggd_int8_format_of(GGD_Q4_0);
    for (size_t b = 0; b < n / 32; b++, source += 18) {
        strip_block block;
        __m256 after;
        halves_of_words(load_words(source, bytes_row), block.scales, &after);
        nibbles(source + 2, bytes_row, 8, block.groups);
        strip = store_strip(&format, &block, strip);
        ggd_fetch_lines(next, LINES_A_BLOCK);
    }
}

static void strip_q4_1(const uint8_t *source, size_t bytes_row, size_t n, uint8_t *strip, ggd_fetch *next) {
    const ggd_int8_format format = ggd_int8_format_of(GGD_Q4_1);
    for (size_t b = 0; b < n / 32; b++, source += 20) {
        strip_block block;
        halves_of_words(load_words(source, bytes_row), block.scales, &block.minima);
        nibbles(source + 4, bytes_row, 0, block.groups);
        strip = store_strip(&format, &block, strip);
        ggd_fetch_lines(next, LINES_A_BLOCK);
    }
}

static void strip_q8_0(const uint8_t *source, size_t bytes_row, size_t n, uint8_t *strip, ggd_fetch *next) {
    const ggd_int8_format format = ggd_int8_format_of(GGD_Q8_0);
    for (size_t b = 0; b < n / 32; b++, source += 34) {
        strip_block block;
        __m256 after;
        halves_of_words(load_words(source, bytes_row), block.scales, &after);
        load_groups((const int8_t *)source + 2, bytes_row, block.groups);
        load_groups((const int8_t *)source + 18, bytes_row, block.groups + 4);
        strip = store_strip(&format, &block, strip);
        ggd_fetch_lines(next, 2 * LINES_A_BLOCK);
    }
}

// The first 16 bytes of a super-block of Q4_K or Q5_K: the scales of its scales and minima, and those, of six bits each.
static inline void load_group_scales(const uint8_t *source, size_t bytes_row, __m256 scales[8], __m256 minima[8]) {
    __m256i words[4], low[2], high[2];
    __m256 d, dmin;
    load_groups((const int8_t *)source, bytes_row, words);
    halves_of_words(words[0], &d, &dmin);
    dmin = _mm256_xor_ps(dmin, _mm256_set1_ps(-0.0f));
    low[0] = bits_of(words[1], 0, 63);
    low[1] = bits_of(words[2], 0, 63);
    high[0] = _mm256_or_si256(bits_of(words[3], 0, 15), _mm256_slli_epi16(bits_of(words[1], 6, 3), 4));
    high[1] = _mm256_or_si256(bits_of(words[3], 4, 15), _mm256_slli_epi16(bits_of(words[2], 6, 3), 4));
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        scales[i] = _mm256_mul_ps(d, unsigned_byte(low[0], i));
        minima[i] = _mm256_mul_ps(dmin, unsigned_byte(low[1], i));
        scales[4 + i] = _mm256_mul_ps(d, unsigned_byte(high[0], i));
        minima[4 + i] = _mm256_mul_ps(dmin, unsigned_byte(high[1], i));
    }
}

// Q4_K, or Q5_K, whose 32 bytes of fifth bits lie before the nibbles.
static inline __attribute__((always_inline)) void strip_of_k(const ggd_type type, const uint8_t *source, size_t bytes_row,
                                                             size_t n, uint8_t *strip, ggd_fetch *next) {
    const ggd_int8_format format = ggd_int8_format_of(type);
    const size_t bytes_fifth = type == GGD_Q5_K ? 32 : 0;
    for (size_t b = 0; b < n / 256; b++, source += 144 + bytes_fifth) {
        __m256 scales[8], minima[8];
        __m256i fifth[8];
        load_group_scales(source, bytes_row, scales, minima);
        for (size_t half = 0; half < bytes_fifth / 16; half++) {
            load_groups((const int8_t *)source + 16 + 16 * half, bytes_row, fifth + 4 * half);
        }
        for (size_t pair = 0; pair < 4; pair++) {
            strip_block blocks[2];
            for (size_t half = 0; half < 2; half++) {
                __m256i bytes[4];
                load_groups((const int8_t *)source + 16 + bytes_fifth + 32 * pair + 16 * half, bytes_row, bytes);
                for (size_t i = 0; i < 4; i++) {
                    size_t group = 4 * half + i;
                    blocks[0].groups[group] = bits_of(bytes[i], 0, 15);
                    blocks[1].groups[group] = bits_of(bytes[i], 4, 15);
                    for (size_t j = 0; j < 2 && bytes_fifth > 0; j++) {
                        __m256i bit = _mm256_slli_epi16(bits_of(fifth[group], (int)(2 * pair + j), 1), 4);
                        blocks[j].groups[group] = _mm256_or_si256(blocks[j].groups[group], bit);
                    }
                }
            }
            for (size_t j = 0; j < 2; j++) {
                blocks[j].scales[0] = scales[2 * pair + j];
                blocks[j].minima = minima[2 * pair + j];
                strip = store_strip(&format, &blocks[j], strip);
                ggd_fetch_lines(next, LINES_A_BLOCK);
            }
        }
    }
}

static void strip_q4_k(const uint8_t *source, size_t bytes_row, size_t n, uint8_t *strip, ggd_fetch *next) {
    strip_of_k(GGD_Q4_K, source, bytes_row, n, strip, next);
}

static void strip_q5_k(const uint8_t *source, size_t bytes_row, size_t n, uint8_t *strip, ggd_fetch *next) {
    strip_of_k(GGD_Q5_K, source, bytes_row, n, strip, next);
}

static void strip_q6_k(const uint8_t *source, size_t bytes_row, size_t n, uint8_t *strip, ggd_fetch *next) {
    const ggd_int8_format format = ggd_int8_format_of(GGD_Q6_K);
    for (size_t b = 0; b < n / 256; b++, source += 210) {
        __m256i factors[4];
        __m256 before, d;
        load_groups((const int8_t *)source + 192, bytes_row, factors);
        halves_of_words(load_words(source + 206, bytes_row), &before, &d);  // the last two bytes
        for (size_t group = 0; group < 8; group++) {
            const uint8_t *low = source + group / 4 * 64 + group % 2 * 32, *high = source + 128 + group / 4 * 32;
            strip_block block;
            for (size_t half = 0; half < 2; half++) {
                __m256i low_bytes[4], high_bytes[4];
                load_groups((const int8_t *)low + 16 * half, bytes_row, low_bytes);
                load_groups((const int8_t *)high + 16 * half, bytes_row, high_bytes);
                for (size_t i = 0; i < 4; i++) {
                    __m256i top = _mm256_slli_epi16(bits_of(high_bytes[i], (int)(group % 4 * 2), 3), 4);
                    __m256i q = _mm256_or_si256(bits_of(low_bytes[i], (int)(group % 4 / 2 * 4), 15), top);
                    block.groups[4 * half + i] = _mm256_sub_epi8(q, _mm256_set1_epi8(32));
                }
                block.scales[half] = _mm256_mul_ps(d, signed_byte(factors[group / 2], (int)(group % 2 * 2 + half)));
            }
            strip = store_strip(&format, &block, strip);
            ggd_fetch_lines(next, 2 * LINES_A_BLOCK);
        }
    }
}

#define GGD_STRIP_TYPES                                                                                                          \
    .int8_pack_stored = {                                                                                                        \
        [GGD_Q8_0] = strip_q8_0, [GGD_Q4_0] = strip_q4_0, [GGD_Q4_1] = strip_q4_1,                                               \
        [GGD_Q4_K] = strip_q4_k, [GGD_Q5_K] = strip_q5_k, [GGD_Q6_K] = strip_q6_k,                                               \
    }

#endif
