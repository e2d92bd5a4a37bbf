// rows.h - the row kernels in a form that the compiler turns into vectors, included once by each simd_*.c under its own instruction
// set. The formulas stand in kernels.h, their naive twins in reference.c. Reductions use `omp simd`: the lanes' partial sums have a fixed
// order for a given build, so a result does not depend on threads.
#ifndef GGD_ROWS_H
#define GGD_ROWS_H

#include <math.h>
#include <string.h>

#include "kernels.h"
#include "unpack.h"

// Calls a tile function with its number of rows as a constant, so that the compiler keeps the sums of each case in registers:
// CALL(rows) for rows in 1 .. 4, 6 or 12.
#define GGD_ROWS_4(n, CALL)                                                                                                      \
    switch (n) {                                                                                                                 \
    case 4:                                                                                                                      \
        CALL(4);                                                                                                                 \
        break;                                                                                                                   \
    case 3:                                                                                                                      \
        CALL(3);                                                                                                                 \
        break;                                                                                                                   \
    case 2:                                                                                                                      \
        CALL(2);                                                                                                                 \
        break;                                                                                                                   \
    default:                                                                                                                     \
        CALL(1);                                                                                                                 \
        break;                                                                                                                   \
    }
#define GGD_ROWS_6(n, CALL)                                                                                                      \
    switch (n) {                                                                                                                 \
    case 6:                                                                                                                      \
        CALL(6);                                                                                                                 \
        break;                                                                                                                   \
    case 5:                                                                                                                      \
        CALL(5);                                                                                                                 \
        break;                                                                                                                   \
    default:                                                                                                                     \
        GGD_ROWS_4(n, CALL)                                                                                                      \
    }
#define GGD_ROWS_12(n, CALL)                                                                                                     \
    switch (n) {                                                                                                                 \
    case 12:                                                                                                                     \
        CALL(12);                                                                                                                \
        break;                                                                                                                   \
    case 11:                                                                                                                     \
        CALL(11);                                                                                                                \
        break;                                                                                                                   \
    case 10:                                                                                                                     \
        CALL(10);                                                                                                                \
        break;                                                                                                                   \
    case 9:                                                                                                                      \
        CALL(9);                                                                                                                 \
        break;                                                                                                                   \
    case 8:                                                                                                                      \
        CALL(8);                                                                                                                 \
        break;                                                                                                                   \
    case 7:                                                                                                                      \
        CALL(7);                                                                                                                 \
        break;                                                                                                                   \
    default:                                                                                                                     \
        GGD_ROWS_6(n, CALL)                                                                                                      \
    }

// exp(x) to about 1 ulp: x = n ln 2 + r, |r| <= ln 2 / 2, a degree-6 Taylor polynomial with its last coefficients fitted by the
// remainder's bound (r^7 / 5040 < 1.2e-7), scaled by 2^n through the exponent bits. Below -87 the result is 0, so that exp(-inf) is; a NaN stays one.
static inline float fast_exp(float x) {
    float clamped = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float n = rintf(clamped * 1.44269504088896341f);
    float r = fmaf(n, -0.693145751953125f, clamped);
    r = fmaf(n, -1.42860682030941723e-6f, r);
    float p = 1.0f / 5040.0f;
    p = fmaf(p, r, 1.0f / 720.0f);
    p = fmaf(p, r, 1.0f / 120.0f);
    p = fmaf(p, r, 1.0f / 24.0f);
    p = fmaf(p, r, 1.0f / 6.0f);
    p = fmaf(p, r, 0.5f);
    p = fmaf(p, r, 1.0f);
    p = fmaf(p, r, 1.0f);
    int32_t bits = ((int32_t)n + 127) << 23;
    float power;
    memcpy(&power, &bits, sizeof power);
    return x < -87.0f ? 0.0f : p * power;
}

static void rows_to_bf16(const float *restrict source, uint16_t *restrict target, size_t n) {
    for (size_t i = 0; i < n; i++) {
        uint32_t bits;
        memcpy(&bits, source + i, sizeof bits);
        uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16;
        uint32_t nan = (bits >> 16) | 64;
        target[i] = (uint16_t)((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
    }
}

static void rows_from_bf16(const uint16_t *restrict source, float *restrict target, size_t n) {
    for (size_t i = 0; i < n; i++) {
        uint32_t bits = (uint32_t)source[i] << 16;
        memcpy(target + i, &bits, sizeof bits);
    }
}

static float rows_rmsnorm(const float *restrict x, const float *restrict w, float eps, float *restrict y, size_t n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (size_t i = 0; i < n; i++) {
        sum += x[i] * x[i];
    }
    float r = 1.0f / sqrtf(sum / (float)n + eps);
    for (size_t i = 0; i < n; i++) {
        y[i] = x[i] * r * w[i];
    }
    return r;
}

static void rows_rmsnorm_backward(const float *restrict dy, const float *restrict x, const float *restrict w, float r,
                                  float *restrict dx, size_t n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (size_t i = 0; i < n; i++) {
        sum += dy[i] * w[i] * x[i];
    }
    float factor = r * r * (sum / (float)n);
    for (size_t i = 0; i < n; i++) {
        dx[i] += r * (dy[i] * w[i] - x[i] * factor);
    }
}

static void rows_rope_pairs(float *x, const float *restrict cosine, const float *restrict sine, float direction, size_t n_heads,
                            size_t head_size, size_t n_rotated) {
    for (size_t head = 0; head < n_heads; head++) {
        float *restrict pairs = x + head * head_size;
        for (size_t i = 0; i < n_rotated / 2; i++) {
            float first = pairs[2 * i], second = pairs[2 * i + 1], s = direction * sine[i];
            pairs[2 * i] = first * cosine[i] - second * s;
            pairs[2 * i + 1] = first * s + second * cosine[i];
        }
    }
}

static void rows_rope_halves(float *x, const float *restrict cosine, const float *restrict sine, float direction, size_t n_heads,
                             size_t head_size, size_t n_rotated) {
    for (size_t head = 0; head < n_heads; head++) {
        float *restrict low = x + head * head_size, *restrict high = low + n_rotated / 2;
        for (size_t i = 0; i < n_rotated / 2; i++) {
            float first = low[i], second = high[i], s = direction * sine[i];
            low[i] = first * cosine[i] - second * s;
            high[i] = first * s + second * cosine[i];
        }
    }
}

static void rows_swiglu(const float *restrict g, const float *restrict u, float *restrict h, size_t n) {
    for (size_t i = 0; i < n; i++) {
        h[i] = g[i] / (1.0f + fast_exp(-g[i])) * u[i];
    }
}

static void rows_swiglu_backward(const float *restrict g, const float *restrict u, const float *restrict dh, float *restrict dg,
                                 float *restrict du, float *restrict h, size_t n) {
    for (size_t i = 0; i < n; i++) {
        float sigmoid = 1.0f / (1.0f + fast_exp(-g[i]));
        float silu = g[i] * sigmoid;
        h[i] = silu * u[i];
        du[i] = dh[i] * silu;
        dg[i] = dh[i] * u[i] * sigmoid * (1.0f + g[i] * (1.0f - sigmoid));
    }
}

// (1 + tanh(z)) / 2 = 1 / (1 + exp(-2 z)), so GELU is g sigmoid(2 c (g + 0.044715 g^3)).
static const float rows_gelu_linear = 1.59576912160573071f, rows_gelu_cubic = 0.044715f;  // 2 sqrt(2 / pi)

static void rows_geglu(const float *restrict g, const float *restrict u, float *restrict h, size_t n) {
    for (size_t i = 0; i < n; i++) {
        float twice = rows_gelu_linear * (g[i] + rows_gelu_cubic * g[i] * g[i] * g[i]);
        h[i] = g[i] / (1.0f + fast_exp(-twice)) * u[i];
    }
}

static void rows_geglu_backward(const float *restrict g, const float *restrict u, const float *restrict dh, float *restrict dg,
                                float *restrict du, float *restrict h, size_t n) {
    for (size_t i = 0; i < n; i++) {
        float twice = rows_gelu_linear * (g[i] + rows_gelu_cubic * g[i] * g[i] * g[i]);
        float slope = rows_gelu_linear * (1.0f + 3.0f * rows_gelu_cubic * g[i] * g[i]);
        float sigmoid = 1.0f / (1.0f + fast_exp(-twice));
        float gelu = g[i] * sigmoid;
        h[i] = gelu * u[i];
        du[i] = dh[i] * gelu;
        dg[i] = dh[i] * u[i] * (sigmoid + gelu * (1.0f - sigmoid) * slope);
    }
}

static void rows_soft_cap(float *restrict x, float scale, float cap, size_t n) {
    float twice = 2.0f * scale / cap;
    for (size_t i = 0; i < n; i++) {
        x[i] = cap - 2.0f * cap / (1.0f + fast_exp(twice * x[i]));
    }
}

static void rows_soft_cap_backward(const float *restrict x, float cap, float *restrict d, size_t n) {
    float inverse = 1.0f / cap;
    for (size_t i = 0; i < n; i++) {
        float t = x[i] * inverse;
        d[i] *= 1.0f - t * t;
    }
}

static float rows_max(const float *restrict x, size_t n) {
    float largest = -INFINITY;
#pragma omp simd reduction(max : largest)
    for (size_t i = 0; i < n; i++) {
        largest = x[i] > largest ? x[i] : largest;
    }
    return largest;
}

static float rows_exp_sum(const float *restrict x, float shift, float *restrict out, size_t n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (size_t i = 0; i < n; i++) {
        out[i] = fast_exp(x[i] - shift);
        sum += out[i];
    }
    return sum;
}

static void rows_scale(float *restrict x, float scale, size_t n) {
    for (size_t i = 0; i < n; i++) {
        x[i] *= scale;
    }
}

// A score as the softmax has it. The bias is masked, not chosen: of a choice GCC makes two loops, the second of them no vectors.
static inline float biased(const float *s, uint32_t j, uint32_t first_future, float scale, float future_bias) {
    uint32_t bits;
    memcpy(&bits, &future_bias, sizeof bits);
    bits &= 0u - (uint32_t)(j >= first_future);
    float bias;
    memcpy(&bias, &bits, sizeof bias);
    return s[j] * scale + bias;
}

static float rows_attention_softmax(float *s, size_t n, size_t first_future, float scale, float future_bias) {
    float largest = -INFINITY, sum = 0;
#pragma omp simd reduction(max : largest)
    for (uint32_t j = 0; j < (uint32_t)n; j++) {
        s[j] = biased(s, j, (uint32_t)first_future, scale, future_bias);
        largest = s[j] > largest ? s[j] : largest;
    }
#pragma omp simd reduction(+ : sum)
    for (size_t j = 0; j < n; j++) {
        s[j] = fast_exp(s[j] - largest);
        sum += s[j];
    }
    rows_scale(s, 1.0f / sum, n);
    return largest + logf(sum);
}

static void rows_attention_gradient(float *restrict s, float *restrict ds, size_t n, size_t first_future, float scale,
                                    float future_bias, float lse, float delta) {
    for (uint32_t j = 0; j < (uint32_t)n; j++) {
        s[j] = fast_exp(biased(s, j, (uint32_t)first_future, scale, future_bias) - lse);
        ds[j] = scale * s[j] * (ds[j] - delta);
    }
}

static float rows_dot(const float *restrict x, const float *restrict y, size_t n) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (size_t i = 0; i < n; i++) {
        sum += x[i] * y[i];
    }
    return sum;
}

static void rows_add_scaled(const float *restrict x, float scale, float *restrict y, size_t n) {
    for (size_t i = 0; i < n; i++) {
        y[i] += scale * x[i];
    }
}

static inline void rows_pack_rows_f32(const float *restrict source, size_t ld, size_t k, float scale, void *restrict panel) {
    for (size_t row = 0; row < k; row++) {
        for (size_t column = 0; column < GGD_PANEL_COLUMNS; column++) {
            ((float *)panel)[row * GGD_PANEL_COLUMNS + column] = source[row * ld + column] * scale;
        }
    }
}

static inline void rows_pack_columns_f32(const float *restrict source, size_t ld, size_t k, float scale, void *restrict panel) {
    for (size_t column = 0; column < GGD_PANEL_COLUMNS; column++) {
        for (size_t row = 0; row < k; row++) {
            ((float *)panel)[row * GGD_PANEL_COLUMNS + column] = source[column * ld + row] * scale;
        }
    }
}

static inline void rows_pack_rows_from_bf16(const uint16_t *restrict source, size_t ld, size_t k, void *restrict panel) {
    for (size_t row = 0; row < k; row += 2) {
        uint16_t *target = (uint16_t *)panel + row * GGD_PANEL_COLUMNS;
        for (size_t column = 0; column < GGD_PANEL_COLUMNS; column++) {
            target[2 * column] = source[row * ld + column];
            target[2 * column + 1] = row + 1 < k ? source[(row + 1) * ld + column] : 0;
        }
    }
}

// To q + offset, q no larger than `size`.
static inline void rows_int8_round(const void *restrict source, ggd_element element, size_t n, size_t block, float size,
                                   int32_t offset, uint8_t *restrict quants, float *restrict scales, float *restrict sums) {
    for (size_t begin = 0, b = 0; begin < n; begin += block, b++) {
        size_t length = n - begin < block ? n - begin : block;
        float values[GGD_INT8_MAX_BLOCK] = {0}, largest = 0;
        int32_t sum = 0;
        if (element == GGD_ELEMENT_BF16) {
            rows_from_bf16((const uint16_t *)source + begin, values, length);
        } else {
            memcpy(values, (const float *)source + begin, length * sizeof *values);
        }
        for (size_t i = 0; i < block; i++) {
            largest = fabsf(values[i]) > largest ? fabsf(values[i]) : largest;
        }
        float inverse = largest > 0 ? size / largest : 0;
        for (size_t i = 0; i < block; i++) {
            int32_t q = (int32_t)rintf(values[i] * inverse);
            quants[begin + i] = (uint8_t)(offset + q);
            sum += q;
        }
        scales[b] = largest / size;
        sums[b] = scales[b] * (float)sum;
    }
}

static inline void rows_int8_quantise(const void *restrict source, ggd_element element, size_t n, size_t block, int is_unsigned,
                                      uint8_t *restrict quants, float *restrict scales, float *restrict sums) {
    float size = is_unsigned ? GGD_UINT8_SIZE : GGD_INT8_SIZE;
    rows_int8_round(source, element, n, block, size, is_unsigned ? 0 : 128, quants, scales, sums);
}

static inline void rows_int8_pack(const float *restrict source, size_t ld, size_t rows, int is_unsigned,
                                  uint8_t *restrict block) {
    (void)is_unsigned;
    size_t size = ggd_int8_backward_format.block;
    int8_t (*quants)[GGD_PANEL_COLUMNS][4] = (int8_t (*)[GGD_PANEL_COLUMNS][4])block;
    int32_t *corrections = (int32_t *)(block + size * GGD_PANEL_COLUMNS);
    float *scales = (float *)(corrections + GGD_PANEL_COLUMNS);
    float inverse[GGD_PANEL_COLUMNS], largest[GGD_PANEL_COLUMNS] = {0};
    int32_t sums[GGD_PANEL_COLUMNS] = {0};
    for (size_t row = 0; row < rows; row++) {
        for (size_t column = 0; column < GGD_PANEL_COLUMNS; column++) {
            float absolute = fabsf(source[row * ld + column]);
            largest[column] = absolute > largest[column] ? absolute : largest[column];
        }
    }
    for (size_t column = 0; column < GGD_PANEL_COLUMNS; column++) {
        inverse[column] = largest[column] > 0 ? GGD_INT8_SIZE / largest[column] : 0;
        scales[column] = largest[column] / GGD_INT8_SIZE;
    }
    memset(quants, 0, size * GGD_PANEL_COLUMNS);
    for (size_t row = 0; row < rows; row++) {
        for (size_t column = 0; column < GGD_PANEL_COLUMNS; column++) {
            int32_t q = (int32_t)rintf(source[row * ld + column] * inverse[column]);
            quants[row / 4][column][row % 4] = (int8_t)q;
            sums[column] += q;
        }
    }
    for (size_t column = 0; column < GGD_PANEL_COLUMNS; column++) {
        corrections[column] = -128 * sums[column];
    }
}

// Scales and minima of one block of 32 rows side by side, behind its quants and corrections.
static inline void rows_int8_pack_scales(const ggd_int8_format *format, const float *restrict scales,
                                         const float *restrict minima, size_t ld_scales, uint8_t *restrict block) {
    float *target = (float *)(block + (format->block + 4) * GGD_PANEL_COLUMNS);
    for (size_t column = 0; column < GGD_PANEL_COLUMNS; column++) {
        target[column] = scales[column * ld_scales];
    }
    for (size_t column = 0; format->has_minima && column < GGD_PANEL_COLUMNS; column++) {
        target[GGD_PANEL_COLUMNS + column] = minima[column * ld_scales];
    }
}

static inline void rows_int8_pack_columns(const ggd_int8_format *format, const int8_t *restrict quants, size_t ld,
                                          const float *restrict scales, const float *restrict minima, size_t ld_scales, size_t k,
                                          uint8_t *restrict panel) {
    for (size_t b = 0; b < k / format->block; b++, panel += ggd_int8_block_bytes(format)) {
        int32_t *corrections = (int32_t *)(panel + format->block * GGD_PANEL_COLUMNS);
        for (size_t column = 0; column < GGD_PANEL_COLUMNS; column++) {
            const int8_t *source = quants + column * ld + b * format->block;
            int32_t sum = 0;
            for (size_t i = 0; i < format->block; i += 4) {
                memcpy(panel + (i * GGD_PANEL_COLUMNS + 4 * column), source + i, 4);
                sum += source[i] + source[i + 1] + source[i + 2] + source[i + 3];
            }
            corrections[column] = -128 * sum;
        }
        rows_int8_pack_scales(format, scales + b, minima + b, ld_scales, panel);
    }
}

// The row kernels of a table; the includer adds name, fast_element, tiles and the bfloat16 packers.
#define GGD_ROW_KERNELS                                                                                                          \
    GGD_UNPACK_KERNELS, .to_bf16 = rows_to_bf16, .from_bf16 = rows_from_bf16, .rmsnorm = rows_rmsnorm,                           \
        .rmsnorm_backward = rows_rmsnorm_backward, .rope = {rows_rope_pairs, rows_rope_halves},                                  \
        .gated = {rows_swiglu, rows_geglu}, .gated_backward = {rows_swiglu_backward, rows_geglu_backward},                       \
        .soft_cap = rows_soft_cap, .soft_cap_backward = rows_soft_cap_backward, .attention_softmax = rows_attention_softmax,     \
        .attention_gradient = rows_attention_gradient, .exp_sum = rows_exp_sum, .max = rows_max, .dot = rows_dot,                \
        .add_scaled = rows_add_scaled, .scale = rows_scale

#endif
