// avx_vnni.h - the kernels of x86-64 with vpdpbusd on 256 bits, which multiplies unsigned bytes (the left operand) by signed ones in each
// 32-bit lane and adds all four products to an int32. Products in float32 are those of AVX2. Included once by each set: the instruction
// has two encodings, and the set defines dot_bytes as one of them. Panels have the common form of kernels.h.
#ifndef GGD_AVX_VNNI_H
#define GGD_AVX_VNNI_H

#include "int8_vnni.h"

static inline __attribute__((always_inline)) void round_strip(const float *source, size_t ld, const size_t rows,
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
            round_strip(source + column, ld, GGD_INT8_MAX_BLOCK, block + 4 * column);
        } else {
            round_strip(source + column, ld, rows, block + 4 * column);
        }
    }
}

static void int8_pack_columns(const ggd_int8_format *format, const int8_t *quants, size_t ld, const float *scales,
                              const float *minima, size_t ld_scales, size_t k, uint8_t *panel) {
    vnni_pack_columns(GGD_PANEL_COLUMNS, format, quants, ld, scales, minima, ld_scales, k, panel);
}

static void int8_tile(const ggd_int8_tile *t) { vnni_tile(GGD_PANEL_COLUMNS, 2, t); }

extern const ggd_kernels ggd_kernels_avx2;
static void tile_f32(const ggd_tile *t) { ggd_kernels_avx2.tile[GGD_ELEMENT_F32](t); }

// A table but for its name.
#define GGD_AVX_VNNI_KERNELS                                                                                                     \
    .fast_element = GGD_ELEMENT_F32, .tile = {tile_f32, NULL}, .pack_columns = {rows_pack_columns_f32, NULL},                    \
    .pack_rows = {rows_pack_rows_f32, NULL}, .pack_rows_from_bf16 = rows_pack_rows_from_bf16, .int8_tile = int8_tile,            \
    .int8_steps = GGD_INT8_ALL_STEPS, .int8_pack = int8_pack, .int8_quantise = int8_quantise,                                    \
    .int8_pack_columns = int8_pack_columns, .int8_strip_bytes = vnni_strip_bytes, .int8_pack_strip = vnni_pack_strip,            \
    .int8_strip = vnni_strip, GGD_STRIP_TYPES, GGD_ROW_KERNELS

#endif
