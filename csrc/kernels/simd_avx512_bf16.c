// simd_avx512_bf16.c - kernels for x86-64 with AVX-512 and its bfloat16 dot product, which multiplies two pairs of bfloat16 in each
// 32-bit lane and adds both to a float32: twice the float32 rate.
#include "int8_vnni.h"

static inline __m512bh as_bf16(__m512i lanes) { return (__m512bh)lanes; }

static inline __attribute__((always_inline)) void accumulate(const int rows, __m512 sums[][2], const uint16_t *a, size_t ld,
                                                             size_t k, const uint16_t *panel) {
    for (size_t i = 0; i < k; i += 2) {
        __m512bh left = as_bf16(_mm512_loadu_si512(panel + i * GGD_PANEL_COLUMNS));
        __m512bh right = as_bf16(_mm512_loadu_si512(panel + i * GGD_PANEL_COLUMNS + 32));
#pragma GCC unroll 12
        for (int row = 0; row < rows; row++) {
            int32_t pair;
            memcpy(&pair, a + (size_t)row * ld + i, sizeof pair);
            __m512bh value = as_bf16(_mm512_set1_epi32(pair));
            sums[row][0] = _mm512_dpbf16_ps(sums[row][0], value, left);
            sums[row][1] = _mm512_dpbf16_ps(sums[row][1], value, right);
        }
    }
}

static inline __attribute__((always_inline)) void tile_of_rows(const int rows, const ggd_tile *t) {
    __m512 sums[GGD_TILE_ROWS][2];
#pragma GCC unroll 12
    for (int row = 0; row < rows; row++) {
        size_t offset = (size_t)row * t->ld_init;
        sums[row][0] = t->init != NULL ? _mm512_loadu_ps(t->init + offset) : _mm512_setzero_ps();
        sums[row][1] = t->init != NULL ? _mm512_loadu_ps(t->init + offset + 16) : _mm512_setzero_ps();
    }
    const uint16_t *panel = t->panel;
    accumulate(rows, sums, t->a1, t->ld_a1, t->k1, panel);
    if (t->k2 > 0) {
        accumulate(rows, sums, t->a2, t->ld_a2, t->k2, panel + t->k1 * GGD_PANEL_COLUMNS);
    }
    if (t->c_element == GGD_ELEMENT_BF16) {
#pragma GCC unroll 12
        for (int row = 0; row < rows; row++) {
            uint16_t *c = (uint16_t *)t->c + (size_t)row * t->ld_c;
            _mm512_storeu_si512(c, (__m512i)_mm512_cvtne2ps_pbh(sums[row][1], sums[row][0]));
        }
    } else {
#pragma GCC unroll 12
        for (int row = 0; row < rows; row++) {
            float *c = (float *)t->c + (size_t)row * t->ld_c;
            _mm512_storeu_ps(c, sums[row][0]);
            _mm512_storeu_ps(c + 16, sums[row][1]);
        }
    }
}

#define TILE_OF_ROWS(rows) tile_of_rows(rows, t)
static void tile_bf16(const ggd_tile *t) { GGD_ROWS_12(t->n_rows, TILE_OF_ROWS) }

// Transposes a 16 x 16 block of 32-bit lanes: first within 128-bit quarters, then the quarters among each other.
static inline void transpose_lanes(__m512i rows[16]) {
    __m512i half[16];
    for (int i = 0; i < 16; i += 4) {
        __m512i low01 = _mm512_unpacklo_epi32(rows[i], rows[i + 1]), high01 = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
        __m512i low23 = _mm512_unpacklo_epi32(rows[i + 2], rows[i + 3]), high23 = _mm512_unpackhi_epi32(rows[i + 2], rows[i + 3]);
        half[i] = _mm512_unpacklo_epi64(low01, low23);
        half[i + 1] = _mm512_unpackhi_epi64(low01, low23);
        half[i + 2] = _mm512_unpacklo_epi64(high01, high23);
        half[i + 3] = _mm512_unpackhi_epi64(high01, high23);
    }
    for (int i = 0; i < 4; i++) {
        __m512i even_a = _mm512_shuffle_i32x4(half[i], half[i + 4], 0x88),
                odd_a = _mm512_shuffle_i32x4(half[i], half[i + 4], 0xdd);
        __m512i even_b = _mm512_shuffle_i32x4(half[i + 8], half[i + 12], 0x88);
        __m512i odd_b = _mm512_shuffle_i32x4(half[i + 8], half[i + 12], 0xdd);
        rows[i] = _mm512_shuffle_i32x4(even_a, even_b, 0x88);
        rows[i + 8] = _mm512_shuffle_i32x4(even_a, even_b, 0xdd);
        rows[i + 4] = _mm512_shuffle_i32x4(odd_a, odd_b, 0x88);
        rows[i + 12] = _mm512_shuffle_i32x4(odd_a, odd_b, 0xdd);
    }
}

// 16 panel columns by 32 k: each source row becomes 16 pairs, the transpose turns columns of pairs into panel rows.
static inline void pack_block(const float *source, size_t ld, size_t k, __m512 scale, uint16_t *panel) {
    __m512i rows[16];
    __mmask16 low = (__mmask16)(k >= 16 ? 0xffff : (1u << k) - 1);
    __mmask16 high = (__mmask16)(k >= 32 ? 0xffff : k > 16 ? (1u << (k - 16)) - 1 : 0);
    for (int row = 0; row < 16; row++) {
        const float *values = source + (size_t)row * ld;
        __m512 first = _mm512_mul_ps(_mm512_maskz_loadu_ps(low, values), scale);
        __m512 second = _mm512_mul_ps(_mm512_maskz_loadu_ps(high, values + 16), scale);
        rows[row] = (__m512i)_mm512_cvtne2ps_pbh(second, first);
    }
    transpose_lanes(rows);
    size_t n_pairs = (k + 1) / 2 < 16 ? (k + 1) / 2 : 16;
    for (size_t pair = 0; pair < n_pairs; pair++) {
        _mm512_storeu_si512(panel + pair * 2 * GGD_PANEL_COLUMNS, rows[pair]);
    }
}

static void pack_columns_bf16(const float *source, size_t ld, size_t k, float scale, void *panel) {
    __m512 factor = _mm512_set1_ps(scale);
    for (size_t i = 0; i < k; i += 32) {
        uint16_t *target = (uint16_t *)panel + i * GGD_PANEL_COLUMNS;
        pack_block(source + i, ld, k - i, factor, target);
        pack_block(source + 16 * ld + i, ld, k - i, factor, target + 32);
    }
}

// Two rows of 32 bfloat16 interleave into one row of pairs.
static inline void store_pairs(__m512i first, __m512i second, uint16_t *panel) {
    const __m512i interleave_low = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6,
                                                    37, 5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
    const __m512i interleave_high = _mm512_add_epi16(interleave_low, _mm512_set1_epi16(16));
    _mm512_storeu_si512(panel, _mm512_permutex2var_epi16(first, interleave_low, second));
    _mm512_storeu_si512(panel + 32, _mm512_permutex2var_epi16(first, interleave_high, second));
}

static void pack_rows_from_bf16(const uint16_t *source, size_t ld, size_t k, void *panel) {
    for (size_t i = 0; i < k; i += 2) {
        __m512i first = _mm512_loadu_si512(source + i * ld);
        __m512i second = i + 1 < k ? _mm512_loadu_si512(source + (i + 1) * ld) : _mm512_setzero_si512();
        store_pairs(first, second, (uint16_t *)panel + i * GGD_PANEL_COLUMNS);
    }
}

static void pack_rows_bf16(const float *source, size_t ld, size_t k, float scale, void *panel) {
    __m512 factor = _mm512_set1_ps(scale);
    for (size_t i = 0; i < k; i += 2) {
        __m512i rows[2] = {_mm512_setzero_si512(), _mm512_setzero_si512()};
        for (size_t r = 0; r < 2 && i + r < k; r++) {
            const float *values = source + (i + r) * ld;
            __m512 left = _mm512_mul_ps(_mm512_loadu_ps(values), factor),
                   right = _mm512_mul_ps(_mm512_loadu_ps(values + 16), factor);
            rows[r] = (__m512i)_mm512_cvtne2ps_pbh(right, left);
        }
        store_pairs(rows[0], rows[1], (uint16_t *)panel + i * GGD_PANEL_COLUMNS);
    }
}

// ---- int8 ----

static inline __m512 load_element(const void *source, ggd_element element, size_t at, size_t n) {
    size_t left = at < n ? n - at : 0;
    __mmask16 mask = (__mmask16)(left >= 16 ? 0xffff : (1u << left) - 1);
    if (element == GGD_ELEMENT_F32) {
        return _mm512_maskz_loadu_ps(mask, (const float *)source + at);
    }
    __m256i values = _mm256_maskz_loadu_epi16(mask, (const uint16_t *)source + at);
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(values), 16));
}

static inline __attribute__((always_inline)) void int8_quantise_blocks(const void *source, const ggd_element element, size_t n,
                                                                       const size_t block, int is_unsigned, uint8_t *quants,
                                                                       float *scales, float *sums) {
    const float size = is_unsigned ? GGD_UINT8_SIZE : GGD_INT8_SIZE;
    const __m512i offset = _mm512_set1_epi32(is_unsigned ? 0 : 128);
    for (size_t begin = 0, b = 0; begin < n; begin += block, b++) {
        __m512 values[GGD_INT8_MAX_BLOCK / 16], largest = _mm512_setzero_ps();
        __m512i sum = _mm512_setzero_si512();
        for (size_t i = 0; i < block / 16; i++) {
            values[i] = load_element(source, element, begin + 16 * i, n);
            largest = _mm512_max_ps(largest, _mm512_abs_ps(values[i]));
        }
        float top = _mm512_reduce_max_ps(largest);
        __m512 inverse = _mm512_set1_ps(top > 0 ? size / top : 0);
        for (size_t i = 0; i < block / 16; i++) {
            __m512i q = _mm512_cvtps_epi32(_mm512_mul_ps(values[i], inverse));
            __m128i bytes = _mm512_cvtusepi32_epi8(_mm512_add_epi32(q, offset));
            _mm_storeu_si128((__m128i *)(quants + begin + 16 * i), bytes);
            sum = _mm512_add_epi32(sum, q);
        }
        scales[b] = top / size;
        sums[b] = scales[b] * (float)_mm512_reduce_add_epi32(sum);
    }
}

static void int8_quantise(const void *source, ggd_element element, size_t n, size_t block, int is_unsigned, uint8_t *quants,
                          float *scales, float *sums) {
    if (element == GGD_ELEMENT_F32 && block == 32) {
        int8_quantise_blocks(source, GGD_ELEMENT_F32, n, 32, is_unsigned, quants, scales, sums);
    } else if (element == GGD_ELEMENT_BF16 && block == 32) {
        int8_quantise_blocks(source, GGD_ELEMENT_BF16, n, 32, is_unsigned, quants, scales, sums);
    } else if (element == GGD_ELEMENT_BF16 && block == 64) {
        int8_quantise_blocks(source, GGD_ELEMENT_BF16, n, 64, is_unsigned, quants, scales, sums);
    } else {
        rows_int8_quantise(source, element, n, block, is_unsigned, quants, scales, sums);
    }
}

static inline __attribute__((always_inline)) void int8_pack_half(const float *source, size_t ld, const size_t rows, size_t column,
                                                                 uint8_t *block) {
    size_t size = ggd_int8_backward_format.block;
    __m512 tops[4] = {_mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps(), _mm512_setzero_ps()};
    for (size_t row = 0; row < rows; row++) {  // four chains: one would wait for each comparison
        tops[row % 4] = _mm512_max_ps(tops[row % 4], _mm512_abs_ps(_mm512_loadu_ps(source + row * ld + column)));
    }
    __m512 largest = _mm512_max_ps(_mm512_max_ps(tops[0], tops[1]), _mm512_max_ps(tops[2], tops[3]));
    __mmask16 some = _mm512_cmp_ps_mask(largest, _mm512_setzero_ps(), _CMP_GT_OQ);
    __m512 inverse = _mm512_maskz_div_ps(some, _mm512_set1_ps(GGD_INT8_SIZE), largest);
    // Packing narrows within quarters of four columns; there the bytes of a column's four k are brought together.
    const __m512i by_column = _mm512_broadcast_i32x4(_mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
    __m512i sum = _mm512_setzero_si512();
    uint8_t *target = block + 4 * column;
    for (size_t group = 0; group < size / 4; group++, target += 4 * GGD_PANEL_COLUMNS) {
        __m512i q[4];
        for (size_t i = 0; i < 4; i++) {
            size_t row = group * 4 + i;
            __m512 values = row < rows ? _mm512_loadu_ps(source + row * ld + column) : _mm512_setzero_ps();
            q[i] = _mm512_cvtps_epi32(_mm512_mul_ps(values, inverse));
        }
        __m512i narrow = _mm512_packs_epi16(_mm512_packs_epi32(q[0], q[1]), _mm512_packs_epi32(q[2], q[3]));
        __m512i four = _mm512_shuffle_epi8(narrow, by_column);
        sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(-128), four);  // 128, unsigned
        _mm512_storeu_si512(target, four);
    }
    _mm512_storeu_si512(target, _mm512_sub_epi32(_mm512_setzero_si512(), sum));
    _mm512_storeu_ps(target + 4 * GGD_PANEL_COLUMNS, _mm512_div_ps(largest, _mm512_set1_ps(GGD_INT8_SIZE)));
}

static void int8_pack(const float *source, size_t ld, size_t rows, int is_unsigned, uint8_t *block) {
    (void)is_unsigned;
    for (size_t column = 0; column < GGD_PANEL_COLUMNS; column += 16) {
        if (rows == 64) {  // a constant: no row is asked for its number
            int8_pack_half(source, ld, 64, column, block);
        } else {
            int8_pack_half(source, ld, rows, column, block);
        }
    }
}

// 16 panel columns by 64 k: each source row is 16 lanes of four k, the transpose turns columns of lanes into panel rows.
static inline void int8_pack_piece(const ggd_int8_format *format, const int8_t *quants, size_t ld, size_t k, uint8_t *panel) {
    __m512i rows[16], sum = _mm512_setzero_si512();
    __mmask64 mask = k >= 64 ? ~(__mmask64)0 : ((__mmask64)1 << k) - 1;
    for (size_t row = 0; row < 16; row++) {
        rows[row] = _mm512_maskz_loadu_epi8(mask, quants + row * ld);
    }
    transpose_lanes(rows);
    size_t groups_block = format->block / 4;
    for (size_t group = 0; group < 16 && group * 4 < k; group++) {
        uint8_t *block = panel + group / groups_block * ggd_int8_block_bytes(format);
        _mm512_storeu_si512(block + group % groups_block * 4 * GGD_PANEL_COLUMNS, rows[group]);
        sum = _mm512_dpbusd_epi32(sum, _mm512_set1_epi8(-128), rows[group]);  // 128, unsigned
        if (group % groups_block == groups_block - 1) {
            _mm512_storeu_si512(block + format->block * GGD_PANEL_COLUMNS, _mm512_sub_epi32(_mm512_setzero_si512(), sum));
            sum = _mm512_setzero_si512();
        }
    }
}

static void int8_pack_columns(const ggd_int8_format *format, const int8_t *quants, size_t ld, const float *scales,
                              const float *minima, size_t ld_scales, size_t k, uint8_t *panel) {
    for (size_t i = 0; i < k; i += 64) {
        uint8_t *target = panel + i / format->block * ggd_int8_block_bytes(format);
        int8_pack_piece(format, quants + i, ld, k - i, target);
        int8_pack_piece(format, quants + 16 * ld + i, ld, k - i, target + 64);
    }
    for (size_t b = 0; b < k / format->block; b++) {
        rows_int8_pack_scales(format, scales + b, minima + b, ld_scales, panel + b * ggd_int8_block_bytes(format));
    }
}

// Rows x 32 integer sums of a block and as many float sums fill the registers; more rows than 6 would also fall into one set of the
// first-level cache where a row is a power of two long.
enum { INT8_ROWS = 6 };
static inline __attribute__((always_inline)) void int8_tile_of(const int rows, const size_t block, const int minima,
                                                               const ggd_int8_tile *t, size_t first_row) {
    __m512 sums[INT8_ROWS][2];
#pragma GCC unroll 6
    for (int row = 0; row < rows; row++) {
        const float *init = t->init + (first_row + (size_t)row) * t->ld_init;
        sums[row][0] = t->init != NULL ? _mm512_loadu_ps(init) : _mm512_setzero_ps();
        sums[row][1] = t->init != NULL ? _mm512_loadu_ps(init + 16) : _mm512_setzero_ps();
    }
    const uint8_t *a = t->a.quants + first_row * t->a.ld, *panel = t->panel;
    const float *a_scales = t->a.scales + first_row * t->a.ld_scales, *a_sums = t->a.sums + first_row * t->a.ld_scales;
    size_t bytes_block = ggd_int8_block_bytes(&t->format);
    __mmask16 corrected = t->a.is_unsigned ? 0 : 0xffff;
    const size_t blocks_scale = block == 16 ? 2 : 1;  // a constant: a division would take as long as half a block
    for (size_t b = 0; b < t->n_blocks; b++, a += block, panel += bytes_block) {
        __m512i products[INT8_ROWS][2];
        const uint8_t *corrections = panel + block * GGD_PANEL_COLUMNS;
#pragma GCC unroll 6
        for (int row = 0; row < rows; row++) {
            products[row][0] = _mm512_maskz_loadu_epi32(corrected, corrections);
            products[row][1] = _mm512_maskz_loadu_epi32(corrected, corrections + 64);
        }
#pragma GCC unroll 16
        for (size_t group = 0; group < block / 4; group++) {
            __m512i left = _mm512_loadu_si512(panel + group * 4 * GGD_PANEL_COLUMNS);
            __m512i right = _mm512_loadu_si512(panel + group * 4 * GGD_PANEL_COLUMNS + 64);
#pragma GCC unroll 6
            for (int row = 0; row < rows; row++) {
                int32_t four;
                memcpy(&four, a + (size_t)row * t->a.ld + 4 * group, sizeof four);
                products[row][0] = _mm512_dpbusd_epi32(products[row][0], _mm512_set1_epi32(four), left);
                products[row][1] = _mm512_dpbusd_epi32(products[row][1], _mm512_set1_epi32(four), right);
            }
        }
        const float *scales = (const float *)(corrections + 128);
#pragma GCC unroll 6
        for (int row = 0; row < rows; row++) {
            size_t at = (size_t)row * t->a.ld_scales + b / blocks_scale;
            for (size_t half = 0; half < 2; half++) {
                __m512 scaled = _mm512_mul_ps(_mm512_cvtepi32_ps(products[row][half]), _mm512_loadu_ps(scales + 16 * half));
                sums[row][half] = _mm512_fmadd_ps(scaled, _mm512_set1_ps(a_scales[at]), sums[row][half]);
                if (minima) {
                    __m512 minimum = _mm512_loadu_ps(scales + GGD_PANEL_COLUMNS + 16 * half);
                    sums[row][half] = _mm512_fmadd_ps(minimum, _mm512_set1_ps(a_sums[at]), sums[row][half]);
                }
            }
        }
    }
#pragma GCC unroll 6
    for (int row = 0; row < rows; row++) {
        size_t offset = (first_row + (size_t)row) * t->ld_c;
        if (t->c_element == GGD_ELEMENT_BF16) {
            _mm512_storeu_si512((uint16_t *)t->c + offset, (__m512i)_mm512_cvtne2ps_pbh(sums[row][1], sums[row][0]));
        } else {
            _mm512_storeu_ps((float *)t->c + offset, sums[row][0]);
            _mm512_storeu_ps((float *)t->c + offset + 16, sums[row][1]);
        }
    }
}

static void int8_tile(const ggd_int8_tile *t) {
    for (size_t row = 0; row < t->n_rows; row += INT8_ROWS) {
        size_t rows = t->n_rows - row;
#define INT8_TILE_64(rows) int8_tile_of(rows, 64, 0, t, row)
#define INT8_TILE_32_MINIMA(rows) int8_tile_of(rows, 32, 1, t, row)
#define INT8_TILE_32(rows) int8_tile_of(rows, 32, 0, t, row)
#define INT8_TILE_16(rows) int8_tile_of(rows, 16, 0, t, row)
        rows = rows < INT8_ROWS ? rows : INT8_ROWS;
        if (t->format.block == 64) {
            GGD_ROWS_6(rows, INT8_TILE_64)
        } else if (t->format.block == 32 && t->format.has_minima) {
            GGD_ROWS_6(rows, INT8_TILE_32_MINIMA)
        } else if (t->format.block == 32) {
            GGD_ROWS_6(rows, INT8_TILE_32)
        } else {
            GGD_ROWS_6(rows, INT8_TILE_16)
        }
    }
}

static inline __m256i dot_bytes(__m256i sum, __m256i a, __m256i w) { return _mm256_dpbusd_epi32(sum, a, w); }

extern const ggd_kernels ggd_kernels_avx512;
static void tile_f32(const ggd_tile *t) { ggd_kernels_avx512.tile[GGD_ELEMENT_F32](t); }

const ggd_kernels ggd_kernels_avx512_bf16 = {
    .name = "avx512_bf16",
    .fast_element = GGD_ELEMENT_BF16,
    .tile = {tile_f32, tile_bf16},
    .pack_columns = {rows_pack_columns_f32, pack_columns_bf16},
    .pack_rows = {rows_pack_rows_f32, pack_rows_bf16},
    .pack_rows_from_bf16 = pack_rows_from_bf16,
    .int8_tile = int8_tile,
    .int8_steps = GGD_INT8_ALL_STEPS,
    .int8_pack = int8_pack,
    .int8_quantise = int8_quantise,
    .int8_pack_columns = int8_pack_columns,
    .int8_strip_bytes = vnni_strip_bytes,
    .int8_pack_strip = vnni_pack_strip,
    .int8_strip = vnni_strip,
    GGD_STRIP_TYPES,
    GGD_ROW_KERNELS,
};
