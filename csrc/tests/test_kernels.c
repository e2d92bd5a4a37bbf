// test_kernels.c - every kernel of every set that this processor runs against its naive twin in reference.c, on random data of many
// sizes. Needs no ggml, so that a static binary also runs under an emulator of another processor. Exit code 1 if any differs.
//
// Tolerances: both sides sum float32 products of the same operands in another order, so they differ by rounding: 2e-6 of the sum of
// the terms' magnitudes, n up to 600. A bfloat16 output is such a sum, which may then fall on the other side of a rounding step,
// 2^-8. The vector exponential is within 3e-7 of expf.
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../kernels/kernels.h"

enum { MAX_N = 600, LD = 640 };

static const double ROUNDING = 2e-6, EXPONENTIAL = 1e-6, BF16_STEP = 1.0 / 256;
static int failures = 0, checks = 0;
static uint64_t state = 1;

static float uniform(void) {  // [-1, 1), by a linear congruence
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (float)((double)(state >> 11) / 4503599627370496.0 - 1.0);
}

static void fill(float *x, size_t n, float scale) {
    for (size_t i = 0; i < n; i++) {
        x[i] = scale * uniform();
    }
}

// |got - expected| <= tolerance * size for every element; a NaN fails.
static void expect(const char *set, const char *kernel, size_t n_case, const float *got, const float *expected, size_t n,
                   double tolerance, double size) {
    checks++;
    for (size_t i = 0; i < n; i++) {
        double difference = fabs((double)got[i] - expected[i]);
        if (got[i] != expected[i] && !(difference <= tolerance * size)) {
            printf("%s: %s, case %zu, element %zu: %.9g, not %.9g\n", set, kernel, n_case, i, got[i], expected[i]);
            failures++;
            return;
        }
    }
}

static void expect_bytes(const char *set, const char *kernel, size_t n_case, const void *got, const void *expected, size_t n) {
    checks++;
    if (memcmp(got, expected, n) != 0) {
        printf("%s: %s, case %zu: other bytes than the reference\n", set, kernel, n_case);
        failures++;
    }
}

static const ggd_kernels *reference = &ggd_kernels_reference;

static void test_packing(const ggd_kernels *set, ggd_element element) {
    static float source[64 * LD];
    static uint8_t got[4 * LD * GGD_PANEL_COLUMNS], expected[4 * LD * GGD_PANEL_COLUMNS];
    const size_t sizes[] = {1, 2, 3, 15, 16, 17, 31, 32, 33, 64, 255, 256};
    fill(source, 64 * LD, 3.0f);
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        size_t k = sizes[i], bytes = ggd_panel_k(element, k) * GGD_PANEL_COLUMNS * ggd_element_bytes(element);
        memset(got, 0xff, sizeof got);
        set->pack_columns[element](source, LD, k, 0.5f, got);
        reference->pack_columns[element](source, LD, k, 0.5f, expected);
        expect_bytes(set->name, "pack_columns", k, got, expected, bytes);
        if (k <= 64 && element == GGD_ELEMENT_BF16) {
            memset(got, 0xff, sizeof got);
            set->pack_rows_from_bf16((const uint16_t *)source, LD, k, got);
            reference->pack_rows_from_bf16((const uint16_t *)source, LD, k, expected);
            expect_bytes(set->name, "pack_rows_from_bf16", k, got, expected, bytes);
        }
        if (k <= 64) {
            memset(got, 0xff, sizeof got);
            set->pack_rows[element](source, LD, k, 0.5f, got);
            reference->pack_rows[element](source, LD, k, 0.5f, expected);
            expect_bytes(set->name, "pack_rows", k, got, expected, bytes);
        }
    }
}

// Random bytes as blocks; all sets must give the same values, of many blocks and of one where they have 32 elements.
static int has_blocks_of_256(int type) {
    return type == GGD_Q2_K || type == GGD_Q3_K || type == GGD_Q4_K || type == GGD_Q5_K || type == GGD_Q6_K || type == GGD_IQ4_XS;
}
static void test_unpacking(const ggd_kernels *set) {
    static uint8_t source[8 * LD];
    static float got[2 * 256], expected[2 * 256];
    for (size_t i = 0; i < sizeof source; i++) {
        source[i] = (uint8_t)(128 * (1 + uniform()));
    }
    const size_t sizes[] = {2 * 256, 256, 96, 32};
    for (int type = 0; type < GGD_N_TYPES; type++) {
        for (size_t c = 0; c < (has_blocks_of_256(type) ? 2 : 4); c++) {
            size_t n = sizes[c];
            set->unpack[type](source, got, n);
            reference->unpack[type](source, expected, n);
            for (size_t i = 0; i < n; i++) {  // of two NaN operands either may be the result
                if (isnan(got[i]) && isnan(expected[i])) {
                    got[i] = expected[i] = 0;
                }
            }
            expect(set->name, "unpack", (size_t)type, got, expected, n, 0.0, 0.0);
        }
    }
}

// The int8 form of weights must say what their float32 form says: both round once or twice, of numbers below 2^6 times their scale.
static void test_int8_unpacking(const ggd_kernels *set) {
    static uint8_t source[2 * 256 * 4];
    static int8_t quants[2][2 * 256];
    static float scales[2][2 * 256 / GGD_INT8_MIN_BLOCK], minima[2][2 * 256 / GGD_INT8_MIN_BLOCK], values[2 * 256], got[2 * 256];
    const ggd_kernels *both[2] = {set, reference};
    for (size_t i = 0; i < sizeof source; i++) {
        source[i] = (uint8_t)(128 * (1 + uniform()));
    }
    for (int type = 0; type < GGD_N_TYPES; type++) {
        ggd_int8_format format = ggd_int8_format_of((ggd_type)type);
        if (format.block == 0) {
            checks++;
            failures += set->int8_unpack[type] != NULL;
            continue;
        }
        memset(minima, 0, sizeof minima);
        for (int i = 0; i < 2; i++) {
            both[i]->int8_unpack[type](source, 2 * 256, quants[i], scales[i], minima[i]);
        }
        expect_bytes(set->name, "int8_unpack", (size_t)type, quants[0], quants[1], sizeof quants[0]);
        for (size_t i = 0; i < 2 * 256; i++) {
            checks++;
            failures += quants[0][i] < format.lowest || quants[0][i] > format.highest;
        }
        reference->unpack[type](source, values, 2 * 256);
        for (size_t i = 0; i < 2 * 256; i++) {
            size_t block = i / format.block;
            got[i] = scales[0][block] * quants[0][i] + minima[0][block];
            if (!isfinite(got[i]) || !isfinite(values[i])) {
                got[i] = values[i] = 0;  // a random scale may be infinite or no number
            }
            double size = 64.0 * fabs((double)scales[0][block]) + fabs((double)minima[0][block]);
            expect(set->name, "int8_unpack", (size_t)type, got + i, values + i, 1, 2e-7, isfinite(size) ? size : 0);
        }
    }
}

// How finely a set rounds the left operand in blocks of this size.
static int steps_of_rows(const ggd_kernels *set, size_t block, int is_unsigned) {
    return is_unsigned ? GGD_UINT8_SIZE : block == ggd_int8_backward_format.block ? set->int8_steps.rows : GGD_INT8_SIZE;
}

// n elements to int8 by the definition: q within -size .. size, zeros up to whole blocks.
static void round_row(const float *source, size_t n, size_t block, int size, int32_t *quants, float *scales, float *sums) {
    for (size_t b = 0; b * block < n; b++) {
        size_t length = n - b * block < block ? n - b * block : block;
        float largest = 0;
        int32_t sum = 0;
        for (size_t i = 0; i < length; i++) {
            largest = fmaxf(largest, fabsf(source[b * block + i]));
        }
        float inverse = largest > 0 ? (float)size / largest : 0;
        for (size_t i = 0; i < block; i++) {
            quants[b * block + i] = i < length ? (int32_t)rintf(source[b * block + i] * inverse) : 0;
            sum += quants[b * block + i];
        }
        scales[b] = largest / (float)size;
        sums[b] = scales[b] * (float)sum;
    }
}

static void test_int8_quantising(const ggd_kernels *set, size_t n, ggd_element element, size_t block, int is_unsigned) {
    static float source[LD], scales[2][LD / GGD_INT8_MIN_BLOCK], sums[2][LD / GGD_INT8_MIN_BLOCK];
    static uint16_t source_bf16[LD];
    static uint8_t quants[2][LD];
    static int32_t rounded[LD];
    size_t n_blocks = (n + block - 1) / block;
    int size = steps_of_rows(set, block, is_unsigned);
    fill(source, LD, 2.0f);
    memset(source, 0, 32 * sizeof *source);  // a block of zeros has no scale
    for (size_t i = 0; is_unsigned && i < LD; i++) {
        source[i] = fabsf(source[i]);
    }
    reference->to_bf16(source, source_bf16, LD);
    const void *from = element == GGD_ELEMENT_BF16 ? (const void *)source_bf16 : source;
    set->int8_quantise(from, element, n, block, is_unsigned, quants[0], scales[0], sums[0]);
    if (element == GGD_ELEMENT_BF16) {
        reference->from_bf16(source_bf16, source, LD);
    }
    round_row(source, n, block, size, rounded, scales[1], sums[1]);
    for (size_t i = 0; i < n_blocks * block; i++) {
        quants[1][i] = (uint8_t)(rounded[i] + (is_unsigned ? 0 : size + 1));
    }
    expect_bytes(set->name, "int8_quantise", n, quants[0], quants[1], n_blocks * block);
    expect_bytes(set->name, "int8_quantise's scales", n, scales[0], scales[1], n_blocks * sizeof(float));
    expect_bytes(set->name, "int8_quantise's sums", n, sums[0], sums[1], n_blocks * sizeof(float));
}

// What one rounding to -size .. size makes of 64 rows of a column, by the definition: the twin of int8_pack for sets that round to fewer
// steps than the reference.
static void round_column(const float *weights, size_t rows, int size, int8_t *quants, float *scale) {
    float largest = 0;
    for (size_t k = 0; k < rows; k++) {
        largest = fmaxf(largest, fabsf(weights[k * GGD_PANEL_COLUMNS]));
    }
    float inverse = largest > 0 ? (float)size / largest : 0;
    for (size_t k = 0; k < 64; k++) {
        quants[k] = k < rows ? (int8_t)rintf(weights[k * GGD_PANEL_COLUMNS] * inverse) : 0;
    }
    *scale = largest / (float)size;
}

enum { N_SCALES = 40 };
static float int8_weights[LD * GGD_PANEL_COLUMNS], int8_scales[GGD_PANEL_COLUMNS * N_SCALES],
    int8_minima[GGD_PANEL_COLUMNS * N_SCALES];
static int8_t int8_quants[GGD_PANEL_COLUMNS * LD];

// Quants within the format's range, or at its ends: all at one, all at the other, and both in turn.
static void fill_quants(const ggd_int8_format *format, int extreme) {
    for (size_t i = 0; i < sizeof int8_quants; i++) {
        int range = format->highest - format->lowest, column = (int)(i / LD);
        int share = (int)((1 + uniform()) / 2 * (float)(range + 1));
        int end = column % 3 == 0 || (column % 3 == 1 && i % 2 == 0) ? format->lowest : format->highest;
        int8_quants[i] = (int8_t)(extreme ? end : format->lowest + (share < range ? share : range));
    }
    fill(int8_scales, GGD_PANEL_COLUMNS * N_SCALES, 0.001f);
    fill(int8_minima, GGD_PANEL_COLUMNS * N_SCALES, 0.1f);
}

// The same of weights that int8_pack rounds.
static void fill_weights(int extreme) {
    fill(int8_weights, LD * GGD_PANEL_COLUMNS, 0.1f);
    for (size_t i = 0; extreme && i < LD * GGD_PANEL_COLUMNS; i++) {
        size_t column = i % GGD_PANEL_COLUMNS, k = i / GGD_PANEL_COLUMNS;
        int8_weights[i] = column % 3 == 0 || (column % 3 == 1 && k % 2 == 0) ? -0.1f : 0.1f;
    }
}

// Panels of the set's own packer and of the reference's.
static void int8_panels(const ggd_kernels *set, const ggd_int8_format *format, size_t n, int is_unsigned, int extreme,
                        uint8_t *own, uint8_t *twin) {
    size_t n_blocks = (n + format->block - 1) / format->block, bytes_block = ggd_int8_block_bytes_of(set, format);
    int is_backward = format->block == ggd_int8_backward_format.block;
    int size = is_unsigned ? set->int8_steps.weights_of_unsigned : set->int8_steps.weights;
    fill_quants(format, extreme);
    fill_weights(extreme);
    for (size_t b = 0; is_backward && b < n_blocks; b++) {
        size_t rows = n - b * 64 < 64 ? n - b * 64 : 64;
        const float *weights = int8_weights + b * 64 * GGD_PANEL_COLUMNS;
        set->int8_pack(weights, GGD_PANEL_COLUMNS, rows, is_unsigned, own + b * bytes_block);
        for (size_t column = 0; column < GGD_PANEL_COLUMNS; column++) {
            round_column(weights + column, rows, size, int8_quants + column * LD + b * 64, int8_scales + column * N_SCALES + b);
        }
    }
    reference->int8_pack_columns(format, int8_quants, LD, int8_scales, int8_minima, N_SCALES, n_blocks * format->block, twin);
    if (!is_backward) {
        set->int8_pack_columns(format, int8_quants, LD, int8_scales, int8_minima, N_SCALES, n_blocks * format->block, own);
    }
    if (set->int8_block_bytes == NULL) {
        expect_bytes(set->name, "int8 panel", n, own, twin, n_blocks * bytes_block);
    }
}

// Twelve rows as they are rounded, in the set's form and in the reference's; or, of each four, one at the top, one at the bottom, one
// between both in turn and one as it is.
static void fill_rows(const ggd_kernels *set, const ggd_int8_format *format, size_t n, int extreme, const float *source,
                      ggd_int8_rows *own, ggd_int8_rows *twin) {
    int size = steps_of_rows(set, format->block, own->is_unsigned), lowest = own->is_unsigned ? 0 : -size;
    for (size_t row = 0; row < GGD_TILE_ROWS; row++) {
        int32_t q[LD] = {0};
        float *scales = own->scales + row * own->ld_scales, *sums = own->sums + row * own->ld_scales;
        round_row(source + row * LD, n, format->a_block, size, q, scales, sums);
        for (size_t i = 0; extreme && row % 4 != 3 && i < LD; i++) {
            q[i] = row % 4 == 0 || (row % 4 == 2 && i % 2 == 0) ? size : lowest;
        }
        for (size_t b = 0; b * format->a_block < n; b++) {  // a set may take a part of the quants' sum from here
            int32_t sum = 0;
            for (size_t i = 0; i < format->a_block; i++) {
                sum += q[b * format->a_block + i];
            }
            sums[b] = scales[b] * (float)sum;
        }
        for (size_t i = 0; i < LD; i++) {
            own->quants[row * LD + i] = (uint8_t)(q[i] + (own->is_unsigned ? 0 : size + 1));
            twin->quants[row * LD + i] = (uint8_t)(q[i] + (own->is_unsigned ? 0 : 128));
        }
    }
}

static void test_int8_tile(const ggd_kernels *set, const ggd_int8_format *format, size_t n, int is_unsigned, int extreme) {
    static float source[GGD_TILE_ROWS * LD], scales[GGD_TILE_ROWS * 20], sums[GGD_TILE_ROWS * 20];
    static uint8_t quants[2][GGD_TILE_ROWS * LD], own[LD * GGD_PANEL_COLUMNS * 4], twin[LD * GGD_PANEL_COLUMNS * 4];
    static float got[GGD_TILE_ROWS * GGD_PANEL_COLUMNS], expected[GGD_TILE_ROWS * GGD_PANEL_COLUMNS];
    static uint16_t got_bf16[GGD_TILE_ROWS * GGD_PANEL_COLUMNS], rounded[GGD_TILE_ROWS * GGD_PANEL_COLUMNS];
    ggd_int8_rows a = {quants[0], LD, scales, sums, 20, is_unsigned}, a_twin = {quants[1], LD, scales, sums, 20, is_unsigned};
    int8_panels(set, format, n, is_unsigned, extreme, own, twin);
    fill(source, GGD_TILE_ROWS * LD, 2.0f);
    for (size_t i = 0; is_unsigned && i < GGD_TILE_ROWS * LD; i++) {
        source[i] = fabsf(source[i]);
    }
    fill_rows(set, format, n, extreme, source, &a, &a_twin);
    for (size_t rows = 1; rows <= GGD_TILE_ROWS; rows++) {
        ggd_int8_tile tile = {.format = *format,
                              .n_rows = rows,
                              .n_blocks = (n + format->block - 1) / format->block,
                              .a = a,
                              .panel = own,
                              .init = rows % 2 != 0 ? source : NULL,
                              .ld_init = LD,
                              .c = got,
                              .ld_c = GGD_PANEL_COLUMNS,
                              .c_element = GGD_ELEMENT_F32};
        set->int8_tile(&tile);
        tile.c = expected;
        tile.panel = twin;
        tile.a = a_twin;
        reference->int8_tile(&tile);
        expect(set->name, "int8_tile", rows, got, expected, rows * GGD_PANEL_COLUMNS, ROUNDING, 0.3 * (double)n + 2);
        if (set->fast_element == GGD_ELEMENT_BF16) {
            tile.c = got_bf16;  // the same sums, rounded
            tile.c_element = GGD_ELEMENT_BF16;
            tile.panel = own;
            tile.a = a;
            set->int8_tile(&tile);
            reference->to_bf16(got, rounded, rows * GGD_PANEL_COLUMNS);
            expect_bytes(set->name, "int8_tile to bfloat16", rows, got_bf16, rounded, rows * GGD_PANEL_COLUMNS * sizeof *rounded);
        }
    }
}

// Strips beside the panel of which they are columns: the bits of the set's own tile, which is held to the reference.
static void test_int8_strip(const ggd_kernels *set, const ggd_int8_format *format, size_t n, int extreme) {
    static float source[GGD_TILE_ROWS * LD], scales[GGD_TILE_ROWS * 20], sums[GGD_TILE_ROWS * 20];
    static uint8_t quants[2][GGD_TILE_ROWS * LD], panel[LD * GGD_PANEL_COLUMNS * 4], strip[LD * GGD_STRIP_COLUMNS * 4];
    static float got[GGD_TILE_ROWS * GGD_PANEL_COLUMNS], expected[GGD_TILE_ROWS * GGD_PANEL_COLUMNS];
    ggd_int8_rows a = {quants[0], LD, scales, sums, 20, 0}, a_twin = {quants[1], LD, scales, sums, 20, 0};
    size_t k = n / format->block * format->block;
    fill(source, GGD_TILE_ROWS * LD, 2.0f);
    fill_quants(format, extreme);
    fill_rows(set, format, n, extreme, source, &a, &a_twin);
    set->int8_pack_columns(format, int8_quants, LD, int8_scales, int8_minima, N_SCALES, k, panel);
    for (size_t rows = 1; rows <= GGD_TILE_ROWS; rows++) {
        ggd_int8_tile tile = {.format = *format,
                              .n_rows = rows,
                              .n_blocks = k / format->block,
                              .a = a,
                              .panel = panel,
                              .init = rows % 2 != 0 ? source : NULL,
                              .ld_init = LD,
                              .c = expected,
                              .ld_c = GGD_PANEL_COLUMNS,
                              .c_element = GGD_ELEMENT_F32};
        set->int8_tile(&tile);
        tile.panel = strip;
        for (size_t column = 0; column < GGD_PANEL_COLUMNS; column += GGD_STRIP_COLUMNS) {
            size_t at = column * N_SCALES;
            set->int8_pack_strip(format, int8_quants + column * LD, LD, int8_scales + at, int8_minima + at, N_SCALES, k, strip);
            tile.init = rows % 2 != 0 ? source + column : NULL;
            tile.c = got + column;
            set->int8_strip(&tile);
        }
        expect_bytes(set->name, "int8_strip", rows, got, expected, rows * GGD_PANEL_COLUMNS * sizeof *got);
    }
}

static void test_int8(const ggd_kernels *set, size_t n) {
    for (int element = 0; element < 2; element++) {
        test_int8_quantising(set, n, (ggd_element)element, 32, 0);
        test_int8_quantising(set, n, (ggd_element)element, 64, 0);
        test_int8_quantising(set, n, (ggd_element)element, 64, 1);
    }
    for (int extreme = 0; extreme < 2; extreme++) {
        test_int8_tile(set, &ggd_int8_backward_format, n, 0, extreme);
        test_int8_tile(set, &ggd_int8_backward_format, n, 1, extreme);
        for (int type = 0; type < GGD_N_TYPES; type++) {
            ggd_int8_format format = ggd_int8_format_of((ggd_type)type);
            if (format.block != 0) {
                test_int8_tile(set, &format, n, 0, extreme);
            }
            if (format.block != 0 && set->int8_strip != NULL) {
                test_int8_strip(set, &format, n, extreme);
            }
        }
    }
}

// Strips of stored weights beside the two steps that they replace.
static void test_int8_pack_stored(const ggd_kernels *set, ggd_type type) {
    enum { N = 512, ROW = 2 * N + 6 };
    static uint8_t source[GGD_STRIP_COLUMNS * ROW], got[N * GGD_STRIP_COLUMNS * 4], expected[N * GGD_STRIP_COLUMNS * 4];
    static int8_t quants[GGD_STRIP_COLUMNS * N];
    static float scales[GGD_STRIP_COLUMNS * N / 16], minima[GGD_STRIP_COLUMNS * N / 16];
    const ggd_int8_format format = ggd_int8_format_of(type);
    for (size_t i = 0; i < sizeof source; i++) {
        source[i] =
            (uint8_t)(128 * (1 + uniform())) & (i % 2 != 0 ? 0xbf : 0xff);  // no float16 so large that its scale is no number
    }
    for (size_t row = 0; row < GGD_STRIP_COLUMNS; row++) {
        set->int8_unpack[type](source + row * ROW, N, quants + row * N, scales + row * N / 16, minima + row * N / 16);
    }
    memset(got, 0, sizeof got);
    memset(expected, 0, sizeof expected);
    set->int8_pack_strip(&format, quants, N, scales, minima, N / 16, N, expected);
    ggd_fetch next = {.row = source, .n_rows = GGD_STRIP_COLUMNS, .bytes = ROW, .bytes_row = ROW};
    set->int8_pack_stored[type](source, ROW, N, got, &next);
    expect_bytes(set->name, "int8_pack_stored", (size_t)type, got, expected, sizeof got);
}

static void compare_tile(const ggd_kernels *set, ggd_element element, ggd_tile tile, size_t n_case) {
    static float got[GGD_TILE_ROWS * LD], expected[GGD_TILE_ROWS * LD];
    static uint16_t got_bf16[GGD_TILE_ROWS * LD], expected_bf16[GGD_TILE_ROWS * LD];
    tile.ld_c = LD;
    tile.c_element = GGD_ELEMENT_F32;
    tile.c = got;
    set->tile[element](&tile);
    tile.c = expected;
    reference->tile[element](&tile);
    for (size_t row = 0; row < tile.n_rows; row++) {
        size_t n = tile.k1 + tile.k2 + 1;
        expect(set->name, "tile", n_case, got + row * LD, expected + row * LD, GGD_PANEL_COLUMNS, ROUNDING, (double)n);
    }
    if (element != GGD_ELEMENT_BF16) {
        return;
    }
    tile.c_element = GGD_ELEMENT_BF16;
    tile.c = got_bf16;
    set->tile[element](&tile);
    tile.c = expected_bf16;
    reference->tile[element](&tile);
    for (size_t row = 0; row < tile.n_rows; row++) {
        for (size_t i = 0; i < GGD_PANEL_COLUMNS; i++) {
            float value = ggd_float_from_bf16(got_bf16[row * LD + i]), twin = ggd_float_from_bf16(expected_bf16[row * LD + i]);
            double sum_size = (double)(tile.k1 + tile.k2 + 1);
            expect(set->name, "tile to bfloat16", n_case, &value, &twin, 1, 1.0, BF16_STEP * fabs(twin) + ROUNDING * sum_size);
        }
    }
}

static void test_tile(const ggd_kernels *set, ggd_element element) {
    static float values[GGD_TILE_ROWS * LD], init[GGD_TILE_ROWS * LD], panel_values[2 * LD * GGD_PANEL_COLUMNS];
    static uint16_t a_bf16[GGD_TILE_ROWS * LD], panel_bf16[2 * LD * GGD_PANEL_COLUMNS];
    fill(values, GGD_TILE_ROWS * LD, 1.0f);
    fill(init, GGD_TILE_ROWS * LD, 1.0f);
    fill(panel_values, 2 * LD * GGD_PANEL_COLUMNS, 1.0f);
    reference->to_bf16(values, a_bf16, GGD_TILE_ROWS * LD);
    reference->to_bf16(panel_values, panel_bf16, 2 * LD * GGD_PANEL_COLUMNS);
    const void *a = element == GGD_ELEMENT_BF16 ? (const void *)a_bf16 : values;
    const void *panel = element == GGD_ELEMENT_BF16 ? (const void *)panel_bf16 : panel_values;
    const size_t sizes[][2] = {{2, 0}, {32, 0}, {64, 2}, {250, 32}, {600, 0}, {30, 600}};
    for (size_t rows = 1; rows <= GGD_TILE_ROWS; rows++) {
        for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
            ggd_tile tile = {
                .n_rows = rows, .a1 = a, .ld_a1 = LD, .k1 = sizes[i][0], .k2 = sizes[i][1], .ld_a2 = LD, .panel = panel};
            tile.a2 = tile.k2 > 0 ? a : NULL;
            compare_tile(set, element, tile, rows * 10 + i);
            tile.init = init;
            tile.ld_init = LD;
            compare_tile(set, element, tile, rows * 10 + i);
        }
    }
}

static void test_conversion(const ggd_kernels *set, size_t n) {
    static float x[MAX_N], back[MAX_N], twin[MAX_N];
    static uint16_t got[MAX_N], expected[MAX_N];
    fill(x, n, 1e3f);
    x[0] = NAN;
    x[n / 2] = -INFINITY;
    x[n - 1] = 1.00390625f;  // half a step: to even
    set->to_bf16(x, got, n);
    reference->to_bf16(x, expected, n);
    expect_bytes(set->name, "to_bf16", n, got, expected, n * sizeof *got);
    set->from_bf16(expected, back, n);
    reference->from_bf16(expected, twin, n);
    expect_bytes(set->name, "from_bf16", n, back, twin, n * sizeof *back);
}

static void test_norm_and_rope(const ggd_kernels *set, size_t n) {
    static float x[MAX_N], w[MAX_N], dy[MAX_N], got[MAX_N], expected[MAX_N];
    fill(x, n, 2.0f);
    fill(w, n, 1.0f);
    fill(dy, n, 1.0f);
    float r = set->rmsnorm(x, w, 1e-5f, got, n), twin = reference->rmsnorm(x, w, 1e-5f, expected, n);
    expect(set->name, "rmsnorm's factor", n, &r, &twin, 1, ROUNDING, fabs(twin));
    expect(set->name, "rmsnorm", n, got, expected, n, ROUNDING, 4.0 * twin);
    fill(got, n, 1.0f);
    memcpy(expected, got, sizeof got);
    set->rmsnorm_backward(dy, x, w, twin, got, n);
    reference->rmsnorm_backward(dy, x, w, twin, expected, n);
    expect(set->name, "rmsnorm_backward", n, got, expected, n, ROUNDING, 4.0 + 8.0 * twin * (1 + twin * twin));
    size_t head_size = n >= 64 ? 64 : n >= 2 ? n / 2 * 2 : 0, n_heads = head_size > 0 ? n / head_size : 0;
    fill(got, n, 2.0f);
    memcpy(expected, got, sizeof got);
    for (int kind = 0; kind < 2; kind++) {
        for (size_t part = 1; part <= 2 && head_size / part >= 2; part++) {  // all elements of a head, or the first half
            size_t n_rotated = head_size / part / 2 * 2;
            set->rope[kind](got, w, dy, part == 1 ? -1.0f : 1.0f, n_heads, head_size, n_rotated);
            reference->rope[kind](expected, w, dy, part == 1 ? -1.0f : 1.0f, n_heads, head_size, n_rotated);
            expect(set->name, kind == GGD_ROPE_PAIRS ? "rope of pairs" : "rope of halves", n, got, expected, n, ROUNDING, 8.0);
        }
    }
}

// Within the exponential's error: tanh by one of it differs from tanhf by twice that, times the cap.
static void test_soft_cap(const ggd_kernels *set, size_t n) {
    static float got[MAX_N], expected[MAX_N], d[MAX_N], d_twin[MAX_N];
    fill(got, n, 200.0f);
    got[n / 2] = 0.0f;
    memcpy(expected, got, sizeof got);
    set->soft_cap(got, 0.5f, 30.0f, n);
    reference->soft_cap(expected, 0.5f, 30.0f, n);
    expect(set->name, "soft_cap", n, got, expected, n, EXPONENTIAL, 30.0);
    fill(d, n, 1.0f);
    memcpy(d_twin, d, sizeof d);
    set->soft_cap_backward(expected, 30.0f, d, n);
    reference->soft_cap_backward(expected, 30.0f, d_twin, n);
    expect(set->name, "soft_cap_backward", n, d, d_twin, n, ROUNDING, 1.0);
}

static void test_gate(const ggd_kernels *set, ggd_gate gate, size_t n) {
    static float g[MAX_N], u[MAX_N], dh[MAX_N], got[3][MAX_N], expected[3][MAX_N];
    fill(g, n, 30.0f);
    fill(u, n, 1.0f);
    fill(dh, n, 1.0f);
    g[0] = 0.0f;
    g[n / 2] = -200.0f;
    set->gated[gate](g, u, got[0], n);
    reference->gated[gate](g, u, expected[0], n);
    expect(set->name, "gated", n, got[0], expected[0], n, EXPONENTIAL, 30.0);
    set->gated_backward[gate](g, u, dh, got[0], got[1], got[2], n);
    reference->gated_backward[gate](g, u, dh, expected[0], expected[1], expected[2], n);
    for (int i = 0; i < 3; i++) {
        expect(set->name, "gated_backward", n, got[i], expected[i], n, EXPONENTIAL, 30.0);
    }
}

static void test_attention(const ggd_kernels *set, size_t n) {
    static float scores[MAX_N], got[MAX_N], expected[MAX_N], dp[MAX_N], dp_twin[MAX_N];
    const float biases[] = {0.0f, -0.7f, -INFINITY};
    const size_t first_futures[] = {1, n / 2 + 1, n};
    for (size_t i = 0; i < 9; i++) {
        float bias = biases[i % 3];
        size_t first = first_futures[i / 3];
        fill(scores, n, 20.0f);
        memcpy(got, scores, sizeof got);
        memcpy(expected, scores, sizeof got);
        float lse = set->attention_softmax(got, n, first, 0.3f, bias);
        float twin = reference->attention_softmax(expected, n, first, 0.3f, bias);
        expect(set->name, "attention_softmax's lse", n, &lse, &twin, 1, EXPONENTIAL, fabs(twin) + 1);
        expect(set->name, "attention_softmax", n, got, expected, n, EXPONENTIAL * 10, 1.0);
        memcpy(got, scores, sizeof got);
        memcpy(expected, scores, sizeof got);
        fill(dp, n, 1.0f);
        memcpy(dp_twin, dp, sizeof dp);
        set->attention_gradient(got, dp, n, first, 0.3f, bias, twin, 0.2f);
        reference->attention_gradient(expected, dp_twin, n, first, 0.3f, bias, twin, 0.2f);
        expect(set->name, "attention_gradient's probabilities", n, got, expected, n, EXPONENTIAL * 10, 1.0);
        expect(set->name, "attention_gradient", n, dp, dp_twin, n, EXPONENTIAL * 10, 1.0);
    }
}

static void test_vectors(const ggd_kernels *set, size_t n) {
    static float x[MAX_N], y[MAX_N], got[MAX_N], expected[MAX_N];
    fill(x, n, 50.0f);
    fill(y, n, 1.0f);
    float sum = set->exp_sum(x, 50.0f, got, n), twin = reference->exp_sum(x, 50.0f, expected, n);
    expect(set->name, "exp_sum", n, got, expected, n, EXPONENTIAL, 1.0);
    expect(set->name, "exp_sum's sum", n, &sum, &twin, 1, EXPONENTIAL, twin + 1e-30);
    float largest = set->max(x, n), largest_twin = reference->max(x, n);
    expect(set->name, "max", n, &largest, &largest_twin, 1, 0.0, 0.0);
    float dot = set->dot(x, y, n), dot_twin = reference->dot(x, y, n);
    expect(set->name, "dot", n, &dot, &dot_twin, 1, ROUNDING, 50.0 * (double)n);
    memcpy(got, y, sizeof got);
    memcpy(expected, y, sizeof got);
    set->add_scaled(x, 0.3f, got, n);
    reference->add_scaled(x, 0.3f, expected, n);
    expect(set->name, "add_scaled", n, got, expected, n, ROUNDING, 50.0);
    set->scale(got, 0.7f, n);
    reference->scale(expected, 0.7f, n);
    expect(set->name, "scale", n, got, expected, n, ROUNDING, 50.0);
}

static void test_set(const ggd_kernels *set) {
    const size_t sizes[] = {1, 2, 3, 7, 16, 31, 64, 65, 128, 255, 576, 599, MAX_N};
    test_unpacking(set);
    test_int8_unpacking(set);
    for (int type = 0; type < GGD_N_TYPES; type++) {
        if (set->int8_pack_stored[type] != NULL) {
            test_int8_pack_stored(set, (ggd_type)type);
        }
    }
    for (int element = 0; element < 2; element++) {
        if (set->tile[element] != NULL) {
            test_packing(set, element);
            test_tile(set, element);
        }
    }
    for (size_t i = 0; i < sizeof sizes / sizeof *sizes; i++) {
        if (set->int8_tile != NULL) {
            test_int8(set, sizes[i]);
        }
        test_conversion(set, sizes[i]);
        test_norm_and_rope(set, sizes[i]);
        test_gate(set, GGD_GATE_SILU, sizes[i]);
        test_gate(set, GGD_GATE_GELU, sizes[i]);
        test_soft_cap(set, sizes[i]);
        test_attention(set, sizes[i]);
        test_vectors(set, sizes[i]);
    }
}

int main(void) {
    const ggd_kernels *sets[GGD_MAX_KERNEL_SETS];
    size_t n = ggd_kernels_available(sets);
    for (size_t i = 0; i < n; i++) {
        int before = failures, done = checks;
        test_set(sets[i]);
        printf("%s: %d checks, %d failed\n", sets[i]->name, checks - done, failures - before);
    }
    return failures > 0;
}
