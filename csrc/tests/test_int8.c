// test_int8.c - the int8 kernels against their naive twins: bringing to int8, panels, strips, tiles. Part of test_kernels.
#include "checks.h"

// The int8 form of weights must say what their float32 form says: both round once or twice, of numbers below 2^6 times their scale.
void test_int8_unpacking(const ggd_kernels *set) {
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

void test_int8(const ggd_kernels *set, size_t n) {
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
static void test_pack_stored(const ggd_kernels *set, ggd_type type) {
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

void test_int8_pack_stored(const ggd_kernels *set) {
    for (int type = 0; type < GGD_N_TYPES; type++) {
        if (set->int8_pack_stored[type] != NULL) {
            test_pack_stored(set, (ggd_type)type);
        }
    }
}
