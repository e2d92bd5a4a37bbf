// reference.c - the naive twin of every kernel: the formula, one element after the other. It runs anywhere, is what the fast kernels
// are tested against, and is what `use_simd = false` selects. It deliberately does nothing for speed.
#include <math.h>

#define GGD_NAIVE_UNPACK
#include "kernels.h"
#include "unpack.h"

static float element_at(const void *data, size_t index, ggd_element element) {
    return element == GGD_ELEMENT_BF16 ? ggd_float_from_bf16(((const uint16_t *)data)[index]) : ((const float *)data)[index];
}

static float panel_at(const void *panel, size_t k, size_t column, ggd_element element) {
    size_t index = element == GGD_ELEMENT_BF16 ? (k / 2) * 64 + column * 2 + k % 2 : k * GGD_PANEL_COLUMNS + column;
    return element_at(panel, index, element);
}

static void tile(const ggd_tile *t, ggd_element element) {
    for (size_t row = 0; row < t->n_rows; row++) {
        float sums[GGD_PANEL_COLUMNS];
        for (size_t column = 0; column < GGD_PANEL_COLUMNS; column++) {
            sums[column] = t->init != NULL ? t->init[row * t->ld_init + column] : 0.0f;
        }
        for (size_t k = 0; k < t->k1 + t->k2; k++) {
            float a = k < t->k1 ? element_at(t->a1, row * t->ld_a1 + k, element)
                                : element_at(t->a2, row * t->ld_a2 + (k - t->k1), element);
            for (size_t column = 0; column < GGD_PANEL_COLUMNS; column++) {
                sums[column] += a * panel_at(t->panel, k, column, element);
            }
        }
        for (size_t column = 0; column < GGD_PANEL_COLUMNS; column++) {
            if (t->c_element == GGD_ELEMENT_BF16) {
                ((uint16_t *)t->c)[row * t->ld_c + column] = ggd_bf16_from_float(sums[column]);
            } else {
                ((float *)t->c)[row * t->ld_c + column] = sums[column];
            }
        }
    }
}
static void tile_f32(const ggd_tile *t) { tile(t, GGD_ELEMENT_F32); }
static void tile_bf16(const ggd_tile *t) { tile(t, GGD_ELEMENT_BF16); }

static void pack_columns_f32(const float *source, size_t ld, size_t k, float scale, void *panel) {
    for (size_t row = 0; row < k; row++) {
        for (size_t column = 0; column < GGD_PANEL_COLUMNS; column++) {
            ((float *)panel)[row * GGD_PANEL_COLUMNS + column] = source[column * ld + row] * scale;
        }
    }
}

static void pack_rows_f32(const float *source, size_t ld, size_t k, float scale, void *panel) {
    for (size_t row = 0; row < k; row++) {
        for (size_t column = 0; column < GGD_PANEL_COLUMNS; column++) {
            ((float *)panel)[row * GGD_PANEL_COLUMNS + column] = source[row * ld + column] * scale;
        }
    }
}

static void pack_columns_bf16(const float *source, size_t ld, size_t k, float scale, void *panel) {
    for (size_t row = 0; row < ggd_round_up(k, 2); row++) {
        for (size_t column = 0; column < GGD_PANEL_COLUMNS; column++) {
            float value = row < k ? source[column * ld + row] * scale : 0.0f;
            ((uint16_t *)panel)[(row / 2) * 64 + column * 2 + row % 2] = ggd_bf16_from_float(value);
        }
    }
}

static void pack_rows_bf16(const float *source, size_t ld, size_t k, float scale, void *panel) {
    for (size_t row = 0; row < ggd_round_up(k, 2); row++) {
        for (size_t column = 0; column < GGD_PANEL_COLUMNS; column++) {
            float value = row < k ? source[row * ld + column] * scale : 0.0f;
            ((uint16_t *)panel)[(row / 2) * 64 + column * 2 + row % 2] = ggd_bf16_from_float(value);
        }
    }
}

static void pack_rows_from_bf16(const uint16_t *source, size_t ld, size_t k, void *panel) {
    for (size_t row = 0; row < ggd_round_up(k, 2); row++) {
        for (size_t column = 0; column < GGD_PANEL_COLUMNS; column++) {
            ((uint16_t *)panel)[(row / 2) * 64 + column * 2 + row % 2] = row < k ? source[row * ld + column] : 0;
        }
    }
}

static int32_t quantise(float value, float inverse) { return (int32_t)rintf(value * inverse); }

// A block of elements from `begin` on, padded by zeros; returns the largest magnitude.
static float load_block(const void *source, ggd_element element, size_t n, size_t begin, size_t block, float *values) {
    float largest = 0;
    for (size_t i = 0; i < block; i++) {
        values[i] = begin + i < n ? element_at(source, begin + i, element) : 0.0f;
    }
    for (size_t i = 0; i < block; i++) {
        largest = fmaxf(largest, fabsf(values[i]));
    }
    return largest;
}

static void int8_quantise(const void *source, ggd_element element, size_t n, size_t block, int is_unsigned, uint8_t *quants,
                          float *scales, float *sums) {
    float values[GGD_INT8_MAX_BLOCK], size = is_unsigned ? GGD_UINT8_SIZE : GGD_INT8_SIZE;
    for (size_t b = 0; b * block < n; b++) {
        float largest = load_block(source, element, n, b * block, block, values);
        float inverse = largest > 0 ? size / largest : 0;
        int32_t sum = 0;
        for (size_t i = 0; i < block; i++) {
            int32_t q = quantise(values[i], inverse);
            quants[b * block + i] = (uint8_t)(is_unsigned ? q : 128 + q);
            sum += q;
        }
        scales[b] = largest / size;
        sums[b] = scales[b] * (float)sum;
    }
}

// The parts of a panel's block.
static int8_t *block_quant(uint8_t *block, size_t k, size_t column) {
    return (int8_t *)block + (k / 4 * GGD_PANEL_COLUMNS + column) * 4 + k % 4;
}
static int32_t *block_corrections(uint8_t *block, size_t size) { return (int32_t *)(block + size * GGD_PANEL_COLUMNS); }
static float *block_scales(uint8_t *block, size_t size) { return (float *)(block + (size + 4) * GGD_PANEL_COLUMNS); }
static float *block_minima(uint8_t *block, size_t size) { return (float *)(block + (size + 8) * GGD_PANEL_COLUMNS); }

static void int8_pack(const float *source, size_t ld, size_t rows, int is_unsigned, uint8_t *block) {
    (void)is_unsigned;
    size_t size = ggd_int8_backward_format.block;
    for (size_t column = 0; column < GGD_PANEL_COLUMNS; column++) {
        float largest = 0;
        int32_t sum = 0;
        for (size_t row = 0; row < rows; row++) {
            largest = fmaxf(largest, fabsf(source[row * ld + column]));
        }
        float inverse = largest > 0 ? GGD_INT8_SIZE / largest : 0;
        for (size_t row = 0; row < size; row++) {
            int32_t q = row < rows ? quantise(source[row * ld + column], inverse) : 0;
            *block_quant(block, row, column) = (int8_t)q;
            sum += q;
        }
        block_corrections(block, size)[column] = -128 * sum;
        block_scales(block, size)[column] = largest / GGD_INT8_SIZE;
    }
}

static void int8_pack_columns(const ggd_int8_format *format, const int8_t *quants, size_t ld, const float *scales,
                              const float *minima, size_t ld_scales, size_t k, uint8_t *panel) {
    for (size_t b = 0; b < k / format->block; b++, panel += ggd_int8_block_bytes(format)) {
        for (size_t column = 0; column < GGD_PANEL_COLUMNS; column++) {
            int32_t sum = 0;
            for (size_t i = 0; i < format->block; i++) {
                int8_t q = quants[column * ld + b * format->block + i];
                *block_quant(panel, i, column) = q;
                sum += q;
            }
            block_corrections(panel, format->block)[column] = -128 * sum;
            block_scales(panel, format->block)[column] = scales[column * ld_scales + b];
            if (format->has_minima) {
                block_minima(panel, format->block)[column] = minima[column * ld_scales + b];
            }
        }
    }
}

static float int8_element(const ggd_int8_tile *t, size_t row, size_t column) {
    size_t size = t->format.block;
    float sum = t->init != NULL ? t->init[row * t->ld_init + column] : 0.0f;
    for (size_t b = 0; b < t->n_blocks; b++) {
        uint8_t *block = (uint8_t *)t->panel + b * ggd_int8_block_bytes(&t->format);
        size_t a_block = row * t->a.ld_scales + b * size / t->format.a_block;
        int32_t product = t->a.is_unsigned ? 0 : block_corrections(block, size)[column];
        for (size_t k = 0; k < size; k++) {
            product += t->a.quants[row * t->a.ld + b * size + k] * *block_quant(block, k, column);
        }
        sum += (float)product * block_scales(block, size)[column] * t->a.scales[a_block];
        if (t->format.has_minima) {
            sum += block_minima(block, size)[column] * t->a.sums[a_block];
        }
    }
    return sum;
}

static void int8_tile(const ggd_int8_tile *t) {
    for (size_t row = 0; row < t->n_rows; row++) {
        for (size_t column = 0; column < GGD_PANEL_COLUMNS; column++) {
            float sum = int8_element(t, row, column);
            if (t->c_element == GGD_ELEMENT_BF16) {
                ((uint16_t *)t->c)[row * t->ld_c + column] = ggd_bf16_from_float(sum);
            } else {
                ((float *)t->c)[row * t->ld_c + column] = sum;
            }
        }
    }
}

static void to_bf16(const float *source, uint16_t *target, size_t n) {
    for (size_t i = 0; i < n; i++) {
        target[i] = ggd_bf16_from_float(source[i]);
    }
}

static void from_bf16(const uint16_t *source, float *target, size_t n) {
    for (size_t i = 0; i < n; i++) {
        target[i] = ggd_float_from_bf16(source[i]);
    }
}

static float rmsnorm(const float *x, const float *w, float eps, float *y, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) {
        sum += (double)x[i] * x[i];
    }
    float r = (float)(1.0 / sqrt(sum / (double)n + eps));
    for (size_t i = 0; i < n; i++) {
        y[i] = x[i] * r * w[i];
    }
    return r;
}

static void rmsnorm_backward(const float *dy, const float *x, const float *w, float r, float *dx, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) {
        sum += (double)dy[i] * w[i] * x[i];
    }
    float mean = (float)(sum / (double)n);
    for (size_t i = 0; i < n; i++) {
        dx[i] += r * (dy[i] * w[i] - x[i] * r * r * mean);
    }
}

static void rotate(float *first, float *second, float cosine, float sine) {
    float a = *first, b = *second;
    *first = a * cosine - b * sine;
    *second = a * sine + b * cosine;
}

static void rope_pairs(float *x, const float *cosine, const float *sine, float direction, size_t n_heads, size_t head_size,
                       size_t n_rotated) {
    for (size_t head = 0; head < n_heads; head++, x += head_size) {
        for (size_t i = 0; i < n_rotated / 2; i++) {
            rotate(x + 2 * i, x + 2 * i + 1, cosine[i], direction * sine[i]);
        }
    }
}

static void rope_halves(float *x, const float *cosine, const float *sine, float direction, size_t n_heads, size_t head_size,
                        size_t n_rotated) {
    for (size_t head = 0; head < n_heads; head++, x += head_size) {
        for (size_t i = 0; i < n_rotated / 2; i++) {
            rotate(x + i, x + i + n_rotated / 2, cosine[i], direction * sine[i]);
        }
    }
}

static const float GELU_LINEAR = 0.79788456080286536f, GELU_CUBIC = 0.044715f;  // sqrt(2 / pi)

static void geglu(const float *g, const float *u, float *h, size_t n) {
    for (size_t i = 0; i < n; i++) {
        float inner = GELU_LINEAR * (g[i] + GELU_CUBIC * g[i] * g[i] * g[i]);
        h[i] = 0.5f * g[i] * (1.0f + tanhf(inner)) * u[i];
    }
}

static void geglu_backward(const float *g, const float *u, const float *dh, float *dg, float *du, float *h, size_t n) {
    for (size_t i = 0; i < n; i++) {
        float d = dh[i], gate = g[i], up = u[i];
        float t = tanhf(GELU_LINEAR * (gate + GELU_CUBIC * gate * gate * gate));
        float slope = GELU_LINEAR * (1.0f + 3.0f * GELU_CUBIC * gate * gate);
        float gelu = 0.5f * gate * (1.0f + t);
        h[i] = gelu * up;
        du[i] = d * gelu;
        dg[i] = d * up * (0.5f * (1.0f + t) + 0.5f * gate * (1.0f - t * t) * slope);
    }
}

static void soft_cap(float *x, float scale, float cap, size_t n) {
    for (size_t i = 0; i < n; i++) {
        x[i] = cap * tanhf(scale * x[i] / cap);
    }
}

static void soft_cap_backward(const float *x, float cap, float *d, size_t n) {
    for (size_t i = 0; i < n; i++) {
        d[i] *= 1.0f - x[i] / cap * (x[i] / cap);
    }
}

static void swiglu(const float *g, const float *u, float *h, size_t n) {
    for (size_t i = 0; i < n; i++) {
        h[i] = g[i] / (1.0f + expf(-g[i])) * u[i];
    }
}

static void swiglu_backward(const float *g, const float *u, const float *dh, float *dg, float *du, float *h, size_t n) {
    for (size_t i = 0; i < n; i++) {
        float sigmoid = 1.0f / (1.0f + expf(-g[i]));
        float silu = g[i] * sigmoid, d = dh[i], gate = g[i], up = u[i];
        h[i] = silu * up;
        du[i] = d * silu;
        dg[i] = d * up * sigmoid * (1.0f + gate * (1.0f - sigmoid));
    }
}

static float biased_score(float s, size_t j, size_t first_future, float scale, float future_bias) {
    return j >= first_future ? s * scale + future_bias : s * scale;
}

static float attention_softmax(float *s, size_t n, size_t first_future, float scale, float future_bias) {
    float largest = -INFINITY;
    for (size_t j = 0; j < n; j++) {
        s[j] = biased_score(s[j], j, first_future, scale, future_bias);
        largest = fmaxf(largest, s[j]);
    }
    double sum = 0;
    for (size_t j = 0; j < n; j++) {
        s[j] = expf(s[j] - largest);
        sum += s[j];
    }
    for (size_t j = 0; j < n; j++) {
        s[j] = (float)(s[j] / sum);
    }
    return largest + (float)log(sum);
}

static void attention_gradient(float *s, float *dp, size_t n, size_t first_future, float scale, float future_bias, float lse,
                               float delta) {
    for (size_t j = 0; j < n; j++) {
        s[j] = expf(biased_score(s[j], j, first_future, scale, future_bias) - lse);
        dp[j] = scale * s[j] * (dp[j] - delta);
    }
}

static float exp_sum(const float *x, float shift, float *out, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) {
        out[i] = expf(x[i] - shift);
        sum += out[i];
    }
    return (float)sum;
}

static float max_element(const float *x, size_t n) {
    float largest = -INFINITY;
    for (size_t i = 0; i < n; i++) {
        largest = fmaxf(largest, x[i]);
    }
    return largest;
}

static float dot(const float *x, const float *y, size_t n) {
    double sum = 0;
    for (size_t i = 0; i < n; i++) {
        sum += (double)x[i] * y[i];
    }
    return (float)sum;
}

static void add_scaled(const float *x, float scale, float *y, size_t n) {
    for (size_t i = 0; i < n; i++) {
        y[i] += scale * x[i];
    }
}

static void scale_row(float *x, float scale, size_t n) {
    for (size_t i = 0; i < n; i++) {
        x[i] *= scale;
    }
}

const ggd_kernels ggd_kernels_reference = {
    .name = "reference",
    .fast_element = GGD_ELEMENT_F32,
    GGD_UNPACK_KERNELS,
    .pack_rows_from_bf16 = pack_rows_from_bf16,
    .tile = {tile_f32, tile_bf16},
    .pack_columns = {pack_columns_f32, pack_columns_bf16},
    .pack_rows = {pack_rows_f32, pack_rows_bf16},
    .int8_tile = int8_tile,
    .int8_steps = GGD_INT8_ALL_STEPS,
    .int8_pack = int8_pack,
    .int8_quantise = int8_quantise,
    .int8_pack_columns = int8_pack_columns,
    .to_bf16 = to_bf16,
    .from_bf16 = from_bf16,
    .rmsnorm = rmsnorm,
    .rmsnorm_backward = rmsnorm_backward,
    .rope = {rope_pairs, rope_halves},
    .gated = {swiglu, geglu},
    .gated_backward = {swiglu_backward, geglu_backward},
    .soft_cap = soft_cap,
    .soft_cap_backward = soft_cap_backward,
    .attention_softmax = attention_softmax,
    .attention_gradient = attention_gradient,
    .exp_sum = exp_sum,
    .max = max_element,
    .dot = dot,
    .add_scaled = add_scaled,
    .scale = scale_row,
};
