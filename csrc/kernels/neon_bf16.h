// neon_bf16.h - the kernels of 64-bit Arm with BFDOT, which multiplies two pairs of bfloat16 in each 32-bit lane and adds both to a
// float32. BFDOT rounds its sums in its own way, within the tolerance of a float32 sum of bfloat16 products. Included once by each set
// that has it; the sets differ in the instruction for int8 only, and each defines int8_products.
#ifndef GGD_NEON_BF16_H
#define GGD_NEON_BF16_H

#include <arm_neon.h>

#include "rows.h"

enum { BLOCK_ROWS = 4, BLOCK_COLUMNS = 16, VECTORS = 4 };

static inline __attribute__((always_inline)) void accumulate(const int rows, float32x4_t sums[][VECTORS], const uint16_t *a,
                                                             size_t ld, size_t k, const uint16_t *panel) {
    for (size_t i = 0; i < k; i += 2) {
        bfloat16x8_t columns[VECTORS];
        for (int v = 0; v < VECTORS; v++) {
            columns[v] = vreinterpretq_bf16_u16(vld1q_u16(panel + i * GGD_PANEL_COLUMNS + 8 * v));
        }
        for (int row = 0; row < rows; row++) {
            uint32_t pair;
            memcpy(&pair, a + (size_t)row * ld + i, sizeof pair);
            bfloat16x8_t value = vreinterpretq_bf16_u32(vdupq_n_u32(pair));
            for (int v = 0; v < VECTORS; v++) {
                sums[row][v] = vbfdotq_f32(sums[row][v], value, columns[v]);
            }
        }
    }
}

static inline __attribute__((always_inline)) void load_rows(const int rows, float32x4_t sums[][VECTORS], const float *init,
                                                            size_t ld_init, size_t first_row, size_t column) {
    for (int row = 0; row < rows; row++) {
        size_t offset = (first_row + (size_t)row) * ld_init + column;
        for (int v = 0; v < VECTORS; v++) {
            sums[row][v] = init != NULL ? vld1q_f32(init + offset + 4 * v) : vdupq_n_f32(0.0f);
        }
    }
}

static inline __attribute__((always_inline)) void store_rows(const int rows, float32x4_t sums[][VECTORS], void *c, size_t ld_c,
                                                             ggd_element element, size_t first_row, size_t column) {
    for (int row = 0; row < rows; row++) {
        size_t offset = (first_row + (size_t)row) * ld_c + column;
        for (int v = 0; v < VECTORS; v++) {
            if (element == GGD_ELEMENT_BF16) {
                vst1_u16((uint16_t *)c + offset + 4 * v, vreinterpret_u16_bf16(vcvt_bf16_f32(sums[row][v])));
            } else {
                vst1q_f32((float *)c + offset + 4 * v, sums[row][v]);
            }
        }
    }
}

static inline __attribute__((always_inline)) void block_of_rows(const int rows, const ggd_tile *t, size_t first_row,
                                                                size_t column) {
    float32x4_t sums[BLOCK_ROWS][VECTORS];
    load_rows(rows, sums, t->init, t->ld_init, first_row, column);
    const uint16_t *panel = (const uint16_t *)t->panel + 2 * column;
    accumulate(rows, sums, (const uint16_t *)t->a1 + first_row * t->ld_a1, t->ld_a1, t->k1, panel);
    if (t->k2 > 0) {
        accumulate(rows, sums, (const uint16_t *)t->a2 + first_row * t->ld_a2, t->ld_a2, t->k2,
                   panel + t->k1 * GGD_PANEL_COLUMNS);
    }
    store_rows(rows, sums, t->c, t->ld_c, t->c_element, first_row, column);
}

#define BLOCK_OF_ROWS(rows) block_of_rows(rows, t, row, column)
static void tile_bf16(const ggd_tile *t) {
    for (size_t row = 0; row < t->n_rows; row += BLOCK_ROWS) {
        size_t rows = t->n_rows - row < BLOCK_ROWS ? t->n_rows - row : BLOCK_ROWS;
        for (size_t column = 0; column < GGD_PANEL_COLUMNS; column += BLOCK_COLUMNS) {
            GGD_ROWS_4(rows, BLOCK_OF_ROWS)
        }
    }
}

static inline uint16_t to_bf16(float value) {
    uint16_t result;
    rows_to_bf16(&value, &result, 1);
    return result;
}

static void pack_columns_bf16(const float *source, size_t ld, size_t k, float scale, void *panel) {
    for (size_t i = 0; i < k; i += 2) {
        uint16_t *target = (uint16_t *)panel + i * GGD_PANEL_COLUMNS;
        for (size_t column = 0; column < GGD_PANEL_COLUMNS; column++) {
            target[2 * column] = to_bf16(source[column * ld + i] * scale);
            target[2 * column + 1] = i + 1 < k ? to_bf16(source[column * ld + i + 1] * scale) : 0;
        }
    }
}

static void pack_rows_bf16(const float *source, size_t ld, size_t k, float scale, void *panel) {
    for (size_t i = 0; i < k; i += 2) {
        uint16_t *target = (uint16_t *)panel + i * GGD_PANEL_COLUMNS;
        for (size_t column = 0; column < GGD_PANEL_COLUMNS; column++) {
            target[2 * column] = to_bf16(source[i * ld + column] * scale);
            target[2 * column + 1] = i + 1 < k ? to_bf16(source[(i + 1) * ld + column] * scale) : 0;
        }
    }
}

// ---- int8: all but the sums of one block ----

// The set's own: the integer sums of one block of `a`, rows of stride t->a.ld, and of the panel, 16 columns from `column` on, without
// the left operand's offset.
static inline void int8_products(const int rows, const ggd_int8_tile *t, const uint8_t *a, const uint8_t *panel, size_t column,
                                 int32x4_t products[][VECTORS]);

static inline __attribute__((always_inline)) void int8_block_of_rows(const int rows, const ggd_int8_tile *t, size_t first_row,
                                                                     size_t column) {
    float32x4_t sums[BLOCK_ROWS][VECTORS];
    load_rows(rows, sums, t->init, t->ld_init, first_row, column);
    const uint8_t *a = t->a.quants + first_row * t->a.ld, *panel = t->panel;
    size_t block = t->format.block, bytes_block = ggd_int8_block_bytes(&t->format), blocks_scale = t->format.a_block / block;
    for (size_t b = 0; b < t->n_blocks; b++, a += block, panel += bytes_block) {
        int32x4_t products[BLOCK_ROWS][VECTORS];
        int8_products(rows, t, a, panel, column, products);
        const float *scales = (const float *)(panel + (block + 4) * GGD_PANEL_COLUMNS) + column,
                    *minima = scales + GGD_PANEL_COLUMNS;
        for (int row = 0; row < rows; row++) {
            size_t at = (first_row + (size_t)row) * t->a.ld_scales + b / blocks_scale;
            for (int v = 0; v < VECTORS; v++) {
                float32x4_t scaled = vmulq_f32(vcvtq_f32_s32(products[row][v]), vld1q_f32(scales + 4 * v));
                sums[row][v] = vfmaq_n_f32(sums[row][v], scaled, t->a.scales[at]);
                if (t->format.has_minima) {
                    sums[row][v] = vfmaq_n_f32(sums[row][v], vld1q_f32(minima + 4 * v), t->a.sums[at]);
                }
            }
        }
    }
    store_rows(rows, sums, t->c, t->ld_c, t->c_element, first_row, column);
}

#define INT8_BLOCK_OF_ROWS(rows) int8_block_of_rows(rows, t, row, column)
static void int8_tile(const ggd_int8_tile *t) {
    for (size_t row = 0; row < t->n_rows; row += BLOCK_ROWS) {
        size_t rows = t->n_rows - row < BLOCK_ROWS ? t->n_rows - row : BLOCK_ROWS;
        for (size_t column = 0; column < GGD_PANEL_COLUMNS; column += BLOCK_COLUMNS) {
            GGD_ROWS_4(rows, INT8_BLOCK_OF_ROWS)
        }
    }
}

extern const ggd_kernels ggd_kernels_neon;
static void tile_f32(const ggd_tile *t) { ggd_kernels_neon.tile[GGD_ELEMENT_F32](t); }

// A table but for its name.
#define GGD_NEON_BF16_KERNELS                                                                                                    \
    .fast_element = GGD_ELEMENT_BF16, .tile = {tile_f32, tile_bf16}, .pack_columns = {rows_pack_columns_f32, pack_columns_bf16}, \
    .pack_rows = {rows_pack_rows_f32, pack_rows_bf16}, .pack_rows_from_bf16 = rows_pack_rows_from_bf16, .int8_tile = int8_tile,  \
    .int8_steps = GGD_INT8_ALL_STEPS, .int8_pack = rows_int8_pack, .int8_quantise = rows_int8_quantise,                          \
    .int8_pack_columns = rows_int8_pack_columns, GGD_ROW_KERNELS

#endif
