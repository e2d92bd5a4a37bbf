// unpack.h - packed weights to float32, one function a type, in loops that the compiler turns into vectors: included by reference.c, where it
// is the naive twin, and by each simd_*.c under its own instruction set. All give the same bits. Where the compiler makes no good vectors
// the sets have instructions of their own, and GGD_NAIVE_UNPACK keeps the plain loop for the twin.
//
// The layouts are GGUF's: a block holds its scale(s) as float16, then the quants (ggml's ggml-common.h; the tests compare with the gguf
// package's own dequantisation). Bytes are read by offset, since blocks are not aligned.
#ifndef GGD_UNPACK_H
#define GGD_UNPACK_H

#include <string.h>
#if defined(__F16C__) || defined(__SSSE3__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "kernels.h"

static inline float unpack_half(const uint8_t *source) {
    uint16_t half;
    memcpy(&half, source, sizeof half);
#ifdef __F16C__
    return _cvtsh_ss(half);
#else
    uint32_t sign = (uint32_t)(half & 0x8000) << 16, exponent = half >> 10 & 0x1f, fraction = half & 0x3ff, bits;
    if (exponent == 0) {  // zero or subnormal: fraction * 2^-24
        float value = (float)fraction * 5.9604644775390625e-8f;
        return sign != 0 ? -value : value;
    }
    bits = exponent == 31 ? sign | 0x7f800000u | fraction << 13 : sign | (exponent + 112) << 23 | fraction << 13;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
#endif
}

static void unpack_f32(const uint8_t *restrict source, float *restrict y, size_t n) { memcpy(y, source, n * sizeof *y); }

static void unpack_f16(const uint8_t *restrict source, float *restrict y, size_t n) {
    for (size_t i = 0; i < n; i++) {
        y[i] = unpack_half(source + 2 * i);
    }
}

static void unpack_bf16(const uint8_t *restrict source, float *restrict y, size_t n) {
    for (size_t i = 0; i < n; i++) {
        uint16_t value;
        memcpy(&value, source + 2 * i, sizeof value);
        uint32_t bits = (uint32_t)value << 16;
        memcpy(y + i, &bits, sizeof bits);
    }
}

// Vectors of AVX2 hold fewer floats than these loops read bytes at once, and GCC 12 then computes them one by one: they go by int8.
#if defined(__AVX2__) && !defined(__AVX512F__) && !defined(GGD_NAIVE_UNPACK)
#define GGD_UNPACK_Q4_BY_INT8
#else
static void unpack_q4_0(const uint8_t *restrict source, float *restrict y, size_t n) {
    for (size_t block = 0; block < n / 32; block++, source += 18, y += 32) {
        float d = unpack_half(source);
        const uint8_t *restrict q = source + 2;
        for (int i = 0; i < 16; i++) {
            y[i] = (float)((q[i] & 15) - 8) * d;
        }
        for (int i = 0; i < 16; i++) {
            y[16 + i] = (float)((q[i] >> 4) - 8) * d;
        }
    }
}

static void unpack_q4_1(const uint8_t *restrict source, float *restrict y, size_t n) {
    for (size_t block = 0; block < n / 32; block++, source += 20, y += 32) {
        float d = unpack_half(source), m = unpack_half(source + 2);
        const uint8_t *restrict q = source + 4;
        for (int i = 0; i < 16; i++) {
            y[i] = (float)(q[i] & 15) * d + m;
        }
        for (int i = 0; i < 16; i++) {
            y[16 + i] = (float)(q[i] >> 4) * d + m;
        }
    }
}
#endif

static void unpack_q8_0(const uint8_t *restrict source, float *restrict y, size_t n) {
    for (size_t block = 0; block < n / 32; block++, source += 34, y += 32) {
        float d = unpack_half(source);
        const int8_t *restrict q = (const int8_t *)source + 2;
        for (int i = 0; i < 32; i++) {
            y[i] = (float)q[i] * d;
        }
    }
}

// Scale and minimum of each of a super-block's eight groups of 32, six bits each in twelve bytes.
static inline void unpack_group_scales(const uint8_t *restrict source, float d, float dmin, float scales[8], float minima[8]) {
    const uint8_t *restrict s = source;
    for (int i = 0; i < 4; i++) {
        scales[i] = d * (float)(s[i] & 63);
        minima[i] = dmin * (float)(s[i + 4] & 63);
        scales[i + 4] = d * (float)((s[i + 8] & 15) | (s[i] >> 6) << 4);
        minima[i + 4] = dmin * (float)(s[i + 8] >> 4 | (s[i + 4] >> 6) << 4);
    }
}

static void unpack_q4_k(const uint8_t *restrict source, float *restrict y, size_t n) {
    for (size_t block = 0; block < n / 256; block++, source += 144, y += 256) {
        float scales[8], minima[8];
        unpack_group_scales(source + 4, unpack_half(source), unpack_half(source + 2), scales, minima);
        for (int group = 0; group < 8; group++) {
            const uint8_t *restrict q = source + 16 + group / 2 * 32;
            int shift = group % 2 * 4;
            for (int i = 0; i < 32; i++) {
                y[group * 32 + i] = scales[group] * (float)(q[i] >> shift & 15) - minima[group];
            }
        }
    }
}

static void unpack_q5_k(const uint8_t *restrict source, float *restrict y, size_t n) {
    for (size_t block = 0; block < n / 256; block++, source += 176, y += 256) {
        float scales[8], minima[8];
        const uint8_t *restrict high = source + 16;
        unpack_group_scales(source + 4, unpack_half(source), unpack_half(source + 2), scales, minima);
        for (int group = 0; group < 8; group++) {
            const uint8_t *restrict q = source + 48 + group / 2 * 32;
            int shift = group % 2 * 4;
            for (int i = 0; i < 32; i++) {
                int quant = (q[i] >> shift & 15) | (high[i] >> group & 1) << 4;
                y[group * 32 + i] = scales[group] * (float)quant - minima[group];
            }
        }
    }
}

// ---- the same blocks as int8: w = scale q + minimum ----

static void int8_unpack_q8_0(const uint8_t *restrict source, size_t n, int8_t *restrict q, float *restrict scales,
                             float *restrict minima) {
    (void)minima;
    for (size_t block = 0; block < n / 32; block++, source += 34) {
        scales[block] = unpack_half(source);
        memcpy(q + 32 * block, source + 2, 32);
    }
}

// Sixteen bytes at a time as a vector of the compiler's: plain loops over them it unrolls and then computes one by one.
typedef uint8_t bytes16 __attribute__((vector_size(16)));
static inline bytes16 load_bytes16(const uint8_t *source) {
    bytes16 bytes;
    memcpy(&bytes, source, sizeof bytes);
    return bytes;
}

// 32 quants less their offset; `fifth` holds their fifth bits, or is NULL.
static inline void int8_unpack_nibbles(const uint8_t *source, const uint8_t *fifth, uint8_t offset, int8_t *q) {
    bytes16 bytes = load_bytes16(source), low = bytes & 15, high = bytes >> 4;
    if (fifth != NULL) {
        const bytes16 bit = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
        uint8_t a = fifth[0], b = fifth[1], c = fifth[2], d = fifth[3];
        bytes16 first = {a, a, a, a, a, a, a, a, b, b, b, b, b, b, b, b},
                second = {c, c, c, c, c, c, c, c, d, d, d, d, d, d, d, d};
        low |= (bytes16)((first & bit) != 0) & 16;
        high |= (bytes16)((second & bit) != 0) & 16;
    }
    low -= offset;
    high -= offset;
    memcpy(q, &low, sizeof low);
    memcpy(q + 16, &high, sizeof high);
}

static void int8_unpack_q4_0(const uint8_t *restrict source, size_t n, int8_t *restrict q, float *restrict scales,
                             float *restrict minima) {
    (void)minima;
    for (size_t block = 0; block < n / 32; block++, source += 18) {
        scales[block] = unpack_half(source);
        int8_unpack_nibbles(source + 2, NULL, 8, q + 32 * block);
    }
}

static void int8_unpack_q4_1(const uint8_t *restrict source, size_t n, int8_t *restrict q, float *restrict scales,
                             float *restrict minima) {
    for (size_t block = 0; block < n / 32; block++, source += 20) {
        scales[block] = unpack_half(source);
        minima[block] = unpack_half(source + 2);
        int8_unpack_nibbles(source + 4, NULL, 0, q + 32 * block);
    }
}

static void int8_unpack_q5_0(const uint8_t *restrict source, size_t n, int8_t *restrict q, float *restrict scales,
                             float *restrict minima) {
    (void)minima;
    for (size_t block = 0; block < n / 32; block++, source += 22) {
        scales[block] = unpack_half(source);
        int8_unpack_nibbles(source + 6, source + 2, 16, q + 32 * block);
    }
}

static void int8_unpack_q5_1(const uint8_t *restrict source, size_t n, int8_t *restrict q, float *restrict scales,
                             float *restrict minima) {
    for (size_t block = 0; block < n / 32; block++, source += 24) {
        scales[block] = unpack_half(source);
        minima[block] = unpack_half(source + 2);
        int8_unpack_nibbles(source + 8, source + 4, 0, q + 32 * block);
    }
}

static void int8_unpack_q4_k(const uint8_t *restrict source, size_t n, int8_t *restrict q, float *restrict scales,
                             float *restrict minima) {
    for (size_t block = 0; block < n / 256; block++, source += 144, q += 256, scales += 8, minima += 8) {
        unpack_group_scales(source + 4, unpack_half(source), -unpack_half(source + 2), scales, minima);
        for (int pair = 0; pair < 4; pair++) {
            const uint8_t *restrict quants = source + 16 + pair * 32;
            for (int i = 0; i < 32; i++) {
                q[pair * 64 + i] = (int8_t)(quants[i] & 15);
                q[pair * 64 + 32 + i] = (int8_t)(quants[i] >> 4);
            }
        }
    }
}

static void int8_unpack_q5_k(const uint8_t *restrict source, size_t n, int8_t *restrict q, float *restrict scales,
                             float *restrict minima) {
    for (size_t block = 0; block < n / 256; block++, source += 176, q += 256, scales += 8, minima += 8) {
        const uint8_t *restrict high = source + 16;
        unpack_group_scales(source + 4, unpack_half(source), -unpack_half(source + 2), scales, minima);
        for (int pair = 0; pair < 4; pair++) {
            const uint8_t *restrict quants = source + 48 + pair * 32;
            for (int i = 0; i < 32; i++) {
                q[pair * 64 + i] = (int8_t)((quants[i] & 15) | (high[i] >> (2 * pair) & 1) << 4);
                q[pair * 64 + 32 + i] = (int8_t)(quants[i] >> 4 | (high[i] >> (2 * pair + 1) & 1) << 4);
            }
        }
    }
}

static void int8_unpack_q6_k(const uint8_t *restrict source, size_t n, int8_t *restrict q, float *restrict scales,
                             float *restrict minima) {
    (void)minima;
    for (size_t block = 0; block < n / 256; block++, source += 210, q += 256, scales += 16) {
        const int8_t *restrict factors = (const int8_t *)source + 192;
        float d = unpack_half(source + 208);
        for (int i = 0; i < 16; i++) {
            scales[i] = d * (float)factors[i];
        }
        for (int group = 0; group < 8; group++) {
            const uint8_t *restrict low = source + group / 4 * 64 + group % 2 * 32, *restrict high =
                                                                                        source + 128 + group / 4 * 32;
            int low_shift = group % 4 / 2 * 4, high_shift = group % 4 * 2;
            for (int i = 0; i < 32; i++) {
                q[group * 32 + i] = (int8_t)(((low[i] >> low_shift & 15) | (high[i] >> high_shift & 3) << 4) - 32);
            }
        }
    }
}

// y = scale q + minimum, sixteen at a time, as they were stored: a wider load would wait for two stores. In plain loops not inlined, or
// GCC 12 takes the arrays of its callers apart into scalars.
#if defined(__AVX512F__) && !defined(GGD_NAIVE_UNPACK)
static inline __m512 floats_of_16(const int8_t *q) {
    return _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)q)));
}
static inline void scale_16(const int8_t *q, float scale, float *y) {
    _mm512_storeu_ps(y, _mm512_mul_ps(floats_of_16(q), _mm512_set1_ps(scale)));
}
static inline void scale_16_minimum(const int8_t *q, float scale, float minimum, float *y) {
    _mm512_storeu_ps(y, _mm512_add_ps(_mm512_mul_ps(floats_of_16(q), _mm512_set1_ps(scale)), _mm512_set1_ps(minimum)));
}
#elif defined(__AVX2__) && !defined(GGD_NAIVE_UNPACK)
static inline __m256 floats_of_8(const int8_t *q) {
    return _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i *)q)));
}
static inline void scale_16(const int8_t *q, float scale, float *y) {
    __m256 factor = _mm256_set1_ps(scale);
    _mm256_storeu_ps(y, _mm256_mul_ps(floats_of_8(q), factor));
    _mm256_storeu_ps(y + 8, _mm256_mul_ps(floats_of_8(q + 8), factor));
}
static inline void scale_16_minimum(const int8_t *q, float scale, float minimum, float *y) {
    __m256 factor = _mm256_set1_ps(scale), offset = _mm256_set1_ps(minimum);
    _mm256_storeu_ps(y, _mm256_add_ps(_mm256_mul_ps(floats_of_8(q), factor), offset));
    _mm256_storeu_ps(y + 8, _mm256_add_ps(_mm256_mul_ps(floats_of_8(q + 8), factor), offset));
}
#else
static __attribute__((noinline)) void scale_16(const int8_t *restrict q, float scale, float *restrict y) {
    for (int i = 0; i < 16; i++) {
        y[i] = (float)q[i] * scale;
    }
}
static __attribute__((noinline)) void scale_16_minimum(const int8_t *restrict q, float scale, float minimum, float *restrict y) {
    for (int i = 0; i < 16; i++) {
        y[i] = (float)q[i] * scale + minimum;
    }
}
#endif

// Sixteen four-bit codes as the values of a table. The naive twin and processors without a byte shuffle look each up.
static inline bytes16 lookup_16(const int8_t table[16], bytes16 codes) {
    bytes16 values;
#if defined(__SSSE3__) && !defined(GGD_NAIVE_UNPACK)
    values = (bytes16)_mm_shuffle_epi8(_mm_loadu_si128((const __m128i *)table), (__m128i)codes);
#elif defined(__aarch64__) && !defined(GGD_NAIVE_UNPACK)
    values = (bytes16)vqtbl1q_s8(vld1q_s8(table), (uint8x16_t)codes);
#else
    for (int i = 0; i < 16; i++) {
        values[i] = (uint8_t)table[codes[i]];
    }
#endif
    return values;
}

static inline void int8_unpack_codes(const uint8_t *source, const int8_t table[16], int8_t *q) {
    bytes16 bytes = load_bytes16(source), low = lookup_16(table, bytes & 15), high = lookup_16(table, bytes >> 4);
    memcpy(q, &low, sizeof low);
    memcpy(q + 16, &high, sizeof high);
}

// The values of IQ4_NL's and IQ4_XS's codes, and MXFP4's e2m1 numbers doubled.
static const int8_t values_iq4[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
static const int8_t values_e2m1[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// 2^(e - 128): half of what an e8m0 exponent stands for. Below 2 it is subnormal.
static inline float unpack_half_e8m0(uint8_t e) {
    uint32_t bits = e < 2 ? 0x00200000u << e : (uint32_t)(e - 1) << 23;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static void int8_unpack_iq4_nl(const uint8_t *restrict source, size_t n, int8_t *restrict q, float *restrict scales,
                               float *restrict minima) {
    (void)minima;
    for (size_t block = 0; block < n / 32; block++, source += 18) {
        scales[block] = unpack_half(source);
        int8_unpack_codes(source + 2, values_iq4, q + 32 * block);
    }
}

static void int8_unpack_mxfp4(const uint8_t *restrict source, size_t n, int8_t *restrict q, float *restrict scales,
                              float *restrict minima) {
    (void)minima;
    for (size_t block = 0; block < n / 32; block++, source += 17) {
        scales[block] = unpack_half_e8m0(source[0]);
        int8_unpack_codes(source + 1, values_e2m1, q + 32 * block);
    }
}

static void int8_unpack_iq4_xs(const uint8_t *restrict source, size_t n, int8_t *restrict q, float *restrict scales,
                               float *restrict minima) {
    (void)minima;
    for (size_t block = 0; block < n / 256; block++, source += 136, q += 256, scales += 8) {
        float d = unpack_half(source);
        uint32_t high = (uint32_t)source[2] | (uint32_t)source[3] << 8;
        for (int group = 0; group < 8; group++) {
            int low = source[4 + group / 2] >> group % 2 * 4 & 15;
            scales[group] = d * (float)((low | (int)(high >> 2 * group & 3) << 4) - 32);
            int8_unpack_codes(source + 8 + 16 * group, values_iq4, q + 32 * group);
        }
    }
}

// Sixteen scales of six bits in twelve bytes, eight at a time in a word: the low four bits of the first eight and of the second lie in the
// nibbles of the first eight bytes, the high two of every fourth scale in one of the last four.
static inline void unpack_q3_k_scales(const uint8_t *source, float d, float scales[16]) {
    const uint64_t low_bits = 0x0f0f0f0f0f0f0f0fu, high_bits = 0x0303030303030303u;
    uint64_t low, words[2];
    uint32_t high;
    memcpy(&low, source, sizeof low);
    memcpy(&high, source + 8, sizeof high);
    uint64_t shifted = high | (uint64_t)(high >> 2) << 32;
    words[0] = (low & low_bits) | (shifted & high_bits) << 4;
    words[1] = (low >> 4 & low_bits) | (shifted >> 4 & high_bits) << 4;
    bytes16 factors = load_bytes16((const uint8_t *)words) - 32;
    scale_16((const int8_t *)&factors, d, scales);
}

// Thirty-two bytes are two vectors where the processor has none so wide.
typedef uint8_t bytes32 __attribute__((vector_size(32)));

static void int8_unpack_q3_k(const uint8_t *restrict source, size_t n, int8_t *restrict q, float *restrict scales,
                             float *restrict minima) {
    (void)minima;
    for (size_t block = 0; block < n / 256; block++, source += 110, q += 256, scales += 16) {
        bytes32 high, low[2];
        memcpy(&high, source, sizeof high);
        memcpy(low, source + 32, sizeof low);
        unpack_q3_k_scales(source + 96, unpack_half(source + 108), scales);
        for (int group = 0; group < 8; group++) {
            uint8_t low_shift = (uint8_t)(group % 4 * 2), high_shift = (uint8_t)group;
            bytes32 quants = (low[group / 4] >> low_shift & 3) + ((high >> high_shift & 1) << 2) - 4;
            memcpy(q + 32 * group, &quants, sizeof quants);
        }
    }
}

// Of use to unpack_q2_k only: products in int8 take no minima of 16 (ggd_int8_format_of).
static void int8_unpack_q2_k(const uint8_t *restrict source, size_t n, int8_t *restrict q, float *restrict scales,
                             float *restrict minima) {
    for (size_t block = 0; block < n / 256; block++, source += 84, q += 256, scales += 16, minima += 16) {
        bytes16 factors = load_bytes16(source) & 15, offsets = load_bytes16(source) >> 4;
        bytes32 low[2];
        memcpy(low, source + 16, sizeof low);
        scale_16((const int8_t *)&factors, unpack_half(source + 80), scales);
        scale_16((const int8_t *)&offsets, -unpack_half(source + 82), minima);
        for (int group = 0; group < 8; group++) {
            uint8_t shift = (uint8_t)(group % 4 * 2);
            bytes32 quants = low[group / 4] >> shift & 3;
            memcpy(q + 32 * group, &quants, sizeof quants);
        }
    }
}

// ---- types whose blocks are quicker to take apart as int8 first ----

// Elements at a time, whole blocks of every type.
enum { UNPACK_PIECE = 256 };
#define GGD_UNPACK_BY_INT8(name, bytes_piece, scale)                                                                             \
    static void unpack_##name(const uint8_t *restrict source, float *restrict y, size_t n) {                                     \
        int8_t q[UNPACK_PIECE];                                                                                                  \
        float scales[UNPACK_PIECE / 16], minima[UNPACK_PIECE / 16];                                                              \
        for (size_t begin = 0; begin < n; begin += UNPACK_PIECE, source += bytes_piece, y += UNPACK_PIECE) {                     \
            size_t length = n - begin < UNPACK_PIECE ? n - begin : UNPACK_PIECE;                                                 \
            int8_unpack_##name(source, length, q, scales, minima);                                                               \
            for (size_t i = 0; i < length; i += 16) {                                                                            \
                scale;                                                                                                           \
            }                                                                                                                    \
        }                                                                                                                        \
    }
#ifdef GGD_UNPACK_Q4_BY_INT8
GGD_UNPACK_BY_INT8(q4_0, 8 * 18, scale_16(q + i, scales[i / 32], y + i))
GGD_UNPACK_BY_INT8(q4_1, 8 * 20, scale_16_minimum(q + i, scales[i / 32], minima[i / 32], y + i))
#endif
GGD_UNPACK_BY_INT8(q5_0, 8 * 22, scale_16(q + i, scales[i / 32], y + i))
GGD_UNPACK_BY_INT8(q5_1, 8 * 24, scale_16_minimum(q + i, scales[i / 32], minima[i / 32], y + i))
GGD_UNPACK_BY_INT8(q6_k, 210, scale_16(q + i, scales[i / 16], y + i))
GGD_UNPACK_BY_INT8(q3_k, 110, scale_16(q + i, scales[i / 16], y + i))
GGD_UNPACK_BY_INT8(q2_k, 84, scale_16_minimum(q + i, scales[i / 16], minima[i / 16], y + i))
GGD_UNPACK_BY_INT8(iq4_nl, 8 * 18, scale_16(q + i, scales[i / 32], y + i))
GGD_UNPACK_BY_INT8(iq4_xs, 136, scale_16(q + i, scales[i / 32], y + i))
GGD_UNPACK_BY_INT8(mxfp4, 8 * 17, scale_16(q + i, scales[i / 32], y + i))

#define GGD_UNPACK_KERNELS                                                                                                       \
    .unpack =                                                                                                                    \
        {                                                                                                                        \
            [GGD_F32] = unpack_f32,   [GGD_F16] = unpack_f16,       [GGD_BF16] = unpack_bf16,     [GGD_Q8_0] = unpack_q8_0,      \
            [GGD_Q4_0] = unpack_q4_0, [GGD_Q4_1] = unpack_q4_1,     [GGD_Q5_0] = unpack_q5_0,     [GGD_Q5_1] = unpack_q5_1,      \
            [GGD_Q4_K] = unpack_q4_k, [GGD_Q5_K] = unpack_q5_k,     [GGD_Q6_K] = unpack_q6_k,     [GGD_Q2_K] = unpack_q2_k,      \
            [GGD_Q3_K] = unpack_q3_k, [GGD_IQ4_NL] = unpack_iq4_nl, [GGD_IQ4_XS] = unpack_iq4_xs, [GGD_MXFP4] = unpack_mxfp4,    \
        },                                                                                                                       \
    .int8_unpack = {                                                                                                             \
        [GGD_Q8_0] = int8_unpack_q8_0,     [GGD_Q4_0] = int8_unpack_q4_0,     [GGD_Q4_1] = int8_unpack_q4_1,                     \
        [GGD_Q5_0] = int8_unpack_q5_0,     [GGD_Q5_1] = int8_unpack_q5_1,     [GGD_Q4_K] = int8_unpack_q4_k,                     \
        [GGD_Q5_K] = int8_unpack_q5_k,     [GGD_Q6_K] = int8_unpack_q6_k,     [GGD_Q3_K] = int8_unpack_q3_k,                     \
        [GGD_IQ4_NL] = int8_unpack_iq4_nl, [GGD_IQ4_XS] = int8_unpack_iq4_xs, [GGD_MXFP4] = int8_unpack_mxfp4,                   \
    }

#endif
