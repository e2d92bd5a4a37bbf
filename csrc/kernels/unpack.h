// unpack.h - packed weights to float32, one function a type, in loops that the compiler turns into vectors: included by reference.c, where it
// is the naive twin, and by each simd_*.c under its own instruction set. All give the same bits.
//
// The layouts are GGUF's: a block holds its scale(s) as float16, then the quants (ggml's ggml-common.h; the tests compare with the gguf
// package's own dequantisation). Bytes are read by offset, since blocks are not aligned.
#ifndef GGD_UNPACK_H
#define GGD_UNPACK_H

#include <string.h>
#ifdef __F16C__
#include <immintrin.h>
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

// ---- types whose blocks are quicker to take apart as int8 first ----

// y = scale q + minimum, sixteen at a time, as they were stored: a wider load would wait for two stores. Not inlined, or GCC 12 takes the
// arrays of its callers apart into scalars.
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
GGD_UNPACK_BY_INT8(q5_0, 8 * 22, scale_16(q + i, scales[i / 32], y + i))
GGD_UNPACK_BY_INT8(q5_1, 8 * 24, scale_16_minimum(q + i, scales[i / 32], minima[i / 32], y + i))
GGD_UNPACK_BY_INT8(q6_k, 210, scale_16(q + i, scales[i / 16], y + i))

#define GGD_UNPACK_KERNELS                                                                                                       \
    .unpack =                                                                                                                    \
        {                                                                                                                        \
            [GGD_F32] = unpack_f32,   [GGD_F16] = unpack_f16,   [GGD_BF16] = unpack_bf16, [GGD_Q8_0] = unpack_q8_0,              \
            [GGD_Q4_0] = unpack_q4_0, [GGD_Q4_1] = unpack_q4_1, [GGD_Q5_0] = unpack_q5_0, [GGD_Q5_1] = unpack_q5_1,              \
            [GGD_Q4_K] = unpack_q4_k, [GGD_Q5_K] = unpack_q5_k, [GGD_Q6_K] = unpack_q6_k,                                        \
        },                                                                                                                       \
    .int8_unpack = {                                                                                                             \
        [GGD_Q8_0] = int8_unpack_q8_0, [GGD_Q4_0] = int8_unpack_q4_0, [GGD_Q4_1] = int8_unpack_q4_1,                             \
        [GGD_Q5_0] = int8_unpack_q5_0, [GGD_Q5_1] = int8_unpack_q5_1, [GGD_Q4_K] = int8_unpack_q4_k,                             \
        [GGD_Q5_K] = int8_unpack_q5_k, [GGD_Q6_K] = int8_unpack_q6_k,                                                            \
    }

#endif
