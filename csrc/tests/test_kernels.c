// test_kernels.c - every kernel of every set that this processor runs against its naive twin in reference.c, on random data of many
// sizes. Needs no ggml, so that a static binary also runs under an emulator of another processor. Exit code 1 if any differs.
#include "checks.h"

static const double EXPONENTIAL = 1e-6, BF16_STEP = 1.0 / 256;
int failures = 0, checks = 0;
static uint64_t state = 1;

float uniform(void) {  // [-1, 1), by a linear congruence
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (float)((double)(state >> 11) / 4503599627370496.0 - 1.0);
}

void fill(float *x, size_t n, float scale) {
    for (size_t i = 0; i < n; i++) {
        x[i] = scale * uniform();
    }
}

void expect(const char *set, const char *kernel, size_t n_case, const float *got, const float *expected, size_t n,
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

void expect_bytes(const char *set, const char *kernel, size_t n_case, const void *got, const void *expected, size_t n) {
    checks++;
    if (memcmp(got, expected, n) != 0) {
        printf("%s: %s, case %zu: other bytes than the reference\n", set, kernel, n_case);
        failures++;
    }
}

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
    test_int8_pack_stored(set);
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
