// simd_avx2.c - kernels for x86-64 with AVX2 and FMA: sixteen registers, so a tile is worked off in pieces, of 6 rows x 16 columns in
// float32. In int8 there are no instructions that add to 32 bits: products are added up in 16 bits as far as their range allows it.
#include "strip_types.h"

enum { BLOCK_ROWS = 6, BLOCK_COLUMNS = 16 };

static inline __attribute__((always_inline)) void accumulate(const int rows, __m256 sums[][2], const float *a, size_t ld,
                                                             size_t k, const float *panel) {
    for (size_t i = 0; i < k; i++) {
        __m256 left = _mm256_loadu_ps(panel + i * GGD_PANEL_COLUMNS);
        __m256 right = _mm256_loadu_ps(panel + i * GGD_PANEL_COLUMNS + 8);
#pragma GCC unroll 6
        for (int row = 0; row < rows; row++) {
            __m256 value = _mm256_set1_ps(a[(size_t)row * ld + i]);
            sums[row][0] = _mm256_fmadd_ps(value, left, sums[row][0]);
            sums[row][1] = _mm256_fmadd_ps(value, right, sums[row][1]);
        }
    }
}

static inline __attribute__((always_inline)) void block_of_rows(const int rows, const ggd_tile *t, size_t first_row,
                                                                size_t column) {
    __m256 sums[BLOCK_ROWS][2];
#pragma GCC unroll 6
    for (int row = 0; row < rows; row++) {
        size_t offset = (first_row + (size_t)row) * t->ld_init + column;
        sums[row][0] = t->init != NULL ? _mm256_loadu_ps(t->init + offset) : _mm256_setzero_ps();
        sums[row][1] = t->init != NULL ? _mm256_loadu_ps(t->init + offset + 8) : _mm256_setzero_ps();
    }
    const float *panel = (const float *)t->panel + column;
    accumulate(rows, sums, (const float *)t->a1 + first_row * t->ld_a1, t->ld_a1, t->k1, panel);
    if (t->k2 > 0) {
        accumulate(rows, sums, (const float *)t->a2 + first_row * t->ld_a2, t->ld_a2, t->k2, panel + t->k1 * GGD_PANEL_COLUMNS);
    }
#pragma GCC unroll 6
    for (int row = 0; row < rows; row++) {
        float *c = (float *)t->c + (first_row + (size_t)row) * t->ld_c + column;
        _mm256_storeu_ps(c, sums[row][0]);
        _mm256_storeu_ps(c + 8, sums[row][1]);
    }
}

#define BLOCK_OF_ROWS(rows) block_of_rows(rows, t, row, column)
static void tile_f32(const ggd_tile *t) {
    for (size_t row = 0; row < t->n_rows; row += BLOCK_ROWS) {
        size_t rows = t->n_rows - row < BLOCK_ROWS ? t->n_rows - row : BLOCK_ROWS;
        for (size_t column = 0; column < GGD_PANEL_COLUMNS; column += BLOCK_COLUMNS) {
            GGD_ROWS_6(rows, BLOCK_OF_ROWS)
        }
    }
}

// ---- int8 ----
//
// vpmaddubsw multiplies unsigned bytes (the left operand, a + offset) by signed ones (the weights w), adds neighbours and stores 16 bits,
// saturated; two of them make a group of four k in a 32-bit lane. Nothing else here saturates: sums of 16 bits wrap, so of the groups that
// are added up in 16 bits (a chunk) only the result must fit, not what comes on the way. Each chunk starts from -offset sum(w), which
// takes the offset out again, so the result is sum(a w) of the chunk's pairs. Hence, with |w| <= W, |a| <= A and a + offset <= U:
//   no pair saturates:       2 U W <= 32767
//   a chunk of n k fits:     n / 2 A W <= 32767
// Forward: A = 127, offset 128, U = 255.
//   blocks of 32, W = 16:    16 * 127 * 16 = 32512, a whole block of weights of 4 and 5 bits, centred
//   blocks of 16, W = 32:     8 * 127 * 32 = 32512, a whole block of weights of 6 bits
//   weights of 8 bits are two planes: w = 16 high + low, high in -8 .. 7, low in 0 .. 15
// Backward: one operand has 8 bits, the other 7, of which eight k fit.
//   W = 127, A = 63:          4 * 63 * 127 = 32004, 2 * 127 * 127 = 32258 with the offset 64. The rows are coarser, since their errors
//                            average out in gradients that are summed over them; errors of the weights do not.
//   unsigned rows, W = 63:    4 * 128 * 63 = 32256, 2 * 255 * 63 = 32130. The offset is 128 here too (a = u - 128); the block's sum
//                            gets 128 sum(w) back at its end.
//
// A panel's block lies in four strips of eight columns, each of them
//   planes x chunks x { corrections int16 [8][2]; quants int8 [chunk / 4][8][4] }
//   scales float [8]
//   minima float [8], where the format has them; in the backward's format int32 [8]: 128 sum(w), of unsigned rows
enum { COARSE_SIZE = 63, COARSE_OFFSET = 64, OFFSET = 128, PLANE_SIZE = 16, CHUNK_OF_64 = 8, INT8_ROWS = 6 };

typedef struct {
    size_t block, chunk, planes;
    int has_minima, is_backward;
} int8_layout;

// What is taken off the quants, to be of either sign; what it took away goes to the minima.
static inline int centre_of(const ggd_int8_format *format) {
    return format->has_minima ? (format->lowest + format->highest + 1) / 2 : 0;
}

static inline int8_layout layout_of(const ggd_int8_format *format) {
    int8_layout layout = {format->block, format->block, 1, format->has_minima, format->block == ggd_int8_backward_format.block};
    int centre = centre_of(format), below = centre - format->lowest, above = format->highest - centre;
    if (layout.is_backward) {
        layout.chunk = CHUNK_OF_64;
    } else if ((below > above ? below : above) * (int)format->block > PLANE_SIZE * GGD_INT8_FORWARD_BLOCK) {
        layout.planes = 2;
    }
    return layout;
}

static void int8_quantise(const void *source, ggd_element element, size_t n, size_t block, int is_unsigned, uint8_t *quants,
                          float *scales, float *sums) {
    if (is_unsigned) {
        round_rows(source, element, n, block, GGD_UINT8_SIZE, 0, quants, scales, sums);
    } else if (block == ggd_int8_backward_format.a_block) {
        round_rows(source, element, n, block, COARSE_SIZE, COARSE_OFFSET, quants, scales, sums);
    } else {
        round_rows(source, element, n, block, GGD_INT8_SIZE, OFFSET, quants, scales, sums);
    }
}

static inline size_t strip_bytes(const int8_layout l) {
    size_t bytes_lanes = STRIP * sizeof(int32_t);
    return l.planes * (l.block / l.chunk) * (1 + l.chunk / 4) * bytes_lanes + (1 + (l.has_minima || l.is_backward)) * bytes_lanes;
}

static size_t int8_block_bytes(const ggd_int8_format *format) {
    return strip_bytes(layout_of(format)) * (GGD_PANEL_COLUMNS / STRIP);
}

// A chunk's groups to its place, behind their correction; returns its end.
static inline uint8_t *store_chunk(const __m256i *groups, size_t n_groups, int offset, uint8_t *target) {
    __m256i *vectors = (__m256i *)target, correction = _mm256_setzero_si256();
    for (size_t i = 0; i < n_groups; i++) {
        correction = _mm256_sub_epi16(correction, _mm256_maddubs_epi16(_mm256_set1_epi8((char)offset), groups[i]));
        _mm256_storeu_si256(vectors + 1 + i, groups[i]);
    }
    _mm256_storeu_si256(vectors, correction);
    return target + (1 + n_groups) * sizeof *vectors;
}

// Shifts do not know bytes: what comes from the neighbour is masked off.
static inline void split_planes(__m256i *groups, size_t n_groups, __m256i *high) {
    const __m256i nibble = _mm256_set1_epi8(15), eight = _mm256_set1_epi8(8);
    for (size_t i = 0; i < n_groups; i++) {
        __m256i above = _mm256_and_si256(_mm256_srli_epi16(groups[i], 4), nibble);  // 0 .. 15, its top bit the sign
        high[i] = _mm256_sub_epi8(_mm256_xor_si256(above, eight), eight);
        groups[i] = _mm256_and_si256(groups[i], nibble);
    }
}

// The groups of a block of eight columns, its scales and minima to their place, whose end it returns; the groups are changed.
static inline uint8_t *store_block(const ggd_int8_format *format, const int8_layout l, __m256i *groups, __m256 scales,
                                   __m256 minima, uint8_t *target) {
    int centre = centre_of(format);
    __m256i high[GGD_INT8_FORWARD_BLOCK / 4];
    size_t n_groups = l.block / 4;
    for (size_t i = 0; centre != 0 && i < n_groups; i++) {
        groups[i] = _mm256_sub_epi8(groups[i], _mm256_set1_epi8((char)centre));
    }
    if (l.planes == 2) {
        split_planes(groups, n_groups, high);
    }
    target = store_chunk(groups, n_groups, OFFSET, target);
    if (l.planes == 2) {
        target = store_chunk(high, n_groups, OFFSET, target);
    }
    _mm256_storeu_ps((float *)target, scales);
    target += sizeof scales;
    if (l.has_minima) {  // w = scale q + minimum = scale (q - centre) + (minimum + centre scale)
        _mm256_storeu_ps((float *)target, _mm256_fmadd_ps(_mm256_set1_ps((float)centre), scales, minima));
        target += sizeof minima;
    }
    return target;
}

static void pack_strip(const ggd_int8_format *format, const int8_layout l, const int8_t *quants, size_t ld, __m256 scales,
                       __m256 minima, uint8_t *target) {
    __m256i groups[GGD_INT8_FORWARD_BLOCK / 4];
    for (size_t i = 0; i < l.block / 4; i += 4) {
        load_groups(quants + 4 * i, ld, groups + i);
    }
    store_block(format, l, groups, scales, minima, target);
}

static inline uint8_t *store_strip(const ggd_int8_format *format, const strip_block *block, uint8_t *target) {
    const int8_layout layout = layout_of(format);
    __m256i groups[8];
    memcpy(groups, block->groups, sizeof groups);
    target = store_block(format, layout, groups, block->scales[0], block->minima, target);
    return layout.block == 32 ? target : store_block(format, layout, groups + 4, block->scales[1], block->minima, target);
}

static inline void pack_strips(const ggd_int8_format *format, const int8_t *quants, size_t ld, const float *scales,
                               const float *minima, size_t ld_scales, size_t k, size_t n_strips, uint8_t *panel) {
    int8_layout layout = layout_of(format);
    size_t bytes_strip = strip_bytes(layout);
    for (size_t b = 0; b < k / format->block; b++) {
        for (size_t column = 0; column < n_strips * STRIP; column += STRIP, panel += bytes_strip) {
            __m256 minimum = _mm256_setzero_ps(), scale = load_column(scales + column * ld_scales + b, ld_scales);
            if (layout.has_minima) {
                minimum = load_column(minima + column * ld_scales + b, ld_scales);
            }
            pack_strip(format, layout, quants + column * ld + b * format->block, ld, scale, minimum, panel);
        }
    }
}

static void int8_pack_columns(const ggd_int8_format *format, const int8_t *quants, size_t ld, const float *scales,
                              const float *minima, size_t ld_scales, size_t k, uint8_t *panel) {
    pack_strips(format, quants, ld, scales, minima, ld_scales, k, GGD_PANEL_COLUMNS / STRIP, panel);
}

static void int8_pack_strip(const ggd_int8_format *format, const int8_t *quants, size_t ld, const float *scales,
                            const float *minima, size_t ld_scales, size_t k, uint8_t *strip) {
    pack_strips(format, quants, ld, scales, minima, ld_scales, k, 1, strip);
}

static inline __attribute__((always_inline)) void round_strip(const float *source, size_t ld, const size_t rows, int is_unsigned,
                                                              uint8_t *target) {
    float size = is_unsigned ? COARSE_SIZE : GGD_INT8_SIZE;
    __m256 largest = largest_of_columns(source, ld, rows), inverse = inverse_or_zero(largest, size);
    __m256i total = _mm256_setzero_si256();
    for (size_t row = 0; row < GGD_INT8_MAX_BLOCK; row += CHUNK_OF_64) {
        __m256i groups[CHUNK_OF_64 / 4];
        for (size_t i = 0; i < CHUNK_OF_64 / 4; i++) {
            size_t first = row + 4 * i;
            groups[i] = round_group(source + first * ld, ld, rows > first ? rows - first : 0, inverse);
        }
        __m256i correction;  // of four w: within 4 * 128 * 63 = 32256 or 4 * 64 * 127 = 32512, so it did not wrap
        uint8_t *end = store_chunk(groups, CHUNK_OF_64 / 4, is_unsigned ? OFFSET : COARSE_OFFSET, target);
        memcpy(&correction, target, sizeof correction);
        total = _mm256_sub_epi32(total, _mm256_madd_epi16(correction, _mm256_set1_epi16(1)));
        target = end;
    }
    _mm256_storeu_ps((float *)target, _mm256_div_ps(largest, _mm256_set1_ps(size)));
    _mm256_storeu_si256((__m256i *)target + 1, total);
}

static void int8_pack(const float *source, size_t ld, size_t rows, int is_unsigned, uint8_t *block) {
    size_t bytes_strip = strip_bytes(layout_of(&ggd_int8_backward_format));
    for (size_t column = 0; column < GGD_PANEL_COLUMNS; column += STRIP, block += bytes_strip) {
        if (rows == GGD_INT8_MAX_BLOCK) {  // a constant: no row is asked for its number
            round_strip(source + column, ld, GGD_INT8_MAX_BLOCK, is_unsigned, block);
        } else {
            round_strip(source + column, ld, rows, is_unsigned, block);
        }
    }
}

// Keeps a sum as it is written: GCC would make a tree of a chain of integer additions, and run out of registers.
static inline __m256i in_order(__m256i sum) {
    __asm__("" : "+x"(sum));
    return sum;
}

// The sums of 16 bits of a chunk, from its correction on.
static inline __attribute__((always_inline)) void add_chunk(const int rows, const size_t chunk, const uint8_t *a, size_t ld,
                                                            const uint8_t *panel, __m256i sums[INT8_ROWS]) {
    const __m256i *vectors = (const __m256i *)panel;
#pragma GCC unroll 6
    for (int row = 0; row < rows; row++) {
        sums[row] = _mm256_loadu_si256(vectors);
    }
#pragma GCC unroll 8
    for (size_t group = 0; group < chunk / 4; group++) {
        __m256i weights = _mm256_loadu_si256(vectors + 1 + group);
#pragma GCC unroll 6
        for (int row = 0; row < rows; row++) {
            int32_t four;
            memcpy(&four, a + (size_t)row * ld + 4 * group, sizeof four);
            sums[row] = in_order(_mm256_add_epi16(sums[row], _mm256_maddubs_epi16(_mm256_set1_epi32(four), weights)));
        }
    }
}

// The integer sums of a block; returns where its scales are.
static inline __attribute__((always_inline)) const float *int8_products(const int rows, const int8_layout l, int is_unsigned,
                                                                        const uint8_t *a, size_t ld, const uint8_t *panel,
                                                                        __m256i products[INT8_ROWS]) {
    const size_t bytes_chunk = (1 + l.chunk / 4) * sizeof(__m256i), n_parts = l.planes * (l.block / l.chunk);
    const float *scales = (const float *)(panel + n_parts * bytes_chunk);
#pragma GCC unroll 8
    for (size_t part = 0; part < n_parts; part++) {
        __m256i sums[INT8_ROWS];
        add_chunk(rows, l.chunk, a + part * l.chunk % l.block, ld, panel + part * bytes_chunk, sums);
        const __m256i factor = _mm256_set1_epi16(l.planes == 2 && part > 0 ? 16 : 1);
#pragma GCC unroll 6
        for (int row = 0; row < rows; row++) {
            __m256i sum = _mm256_madd_epi16(sums[row], factor);
            products[row] = in_order(part > 0 ? _mm256_add_epi32(products[row], sum) : sum);
        }
    }
    if (l.is_backward && is_unsigned) {
        for (int row = 0; row < rows; row++) {
            products[row] = _mm256_add_epi32(products[row], _mm256_loadu_si256((const __m256i *)(scales + STRIP)));
        }
    }
    return scales;
}

// Eight columns of a panel in whose blocks `n_strips` strips lie.
static inline __attribute__((always_inline)) void strip_of_rows(const int rows, const int8_layout l, const int is_unsigned,
                                                                const size_t n_strips, const ggd_int8_tile *t, size_t first_row,
                                                                size_t column) {
    __m256 sums[INT8_ROWS];
#pragma GCC unroll 6
    for (int row = 0; row < rows; row++) {
        const float *init = t->init + (first_row + (size_t)row) * t->ld_init + column;
        sums[row] = t->init != NULL ? _mm256_loadu_ps(init) : _mm256_setzero_ps();
    }
    const uint8_t *a = t->a.quants + first_row * t->a.ld, *panel = t->panel + column / STRIP * strip_bytes(l);
    const float *a_scales = t->a.scales + first_row * t->a.ld_scales, *a_sums = t->a.sums + first_row * t->a.ld_scales;
    const size_t bytes_block = strip_bytes(l) * n_strips, blocks_scale = l.block == 16 ? 2 : 1;
    for (size_t b = 0; b < t->n_blocks; b++, a += l.block, panel += bytes_block) {
        __m256i products[INT8_ROWS];
        const float *scales = int8_products(rows, l, is_unsigned, a, t->a.ld, panel, products);
#pragma GCC unroll 6
        for (int row = 0; row < rows; row++) {
            size_t at = (size_t)row * t->a.ld_scales + b / blocks_scale;
            __m256 scaled = _mm256_mul_ps(_mm256_cvtepi32_ps(products[row]), _mm256_loadu_ps(scales));
            sums[row] = _mm256_fmadd_ps(scaled, _mm256_set1_ps(a_scales[at]), sums[row]);
            if (l.has_minima) {
                sums[row] = _mm256_fmadd_ps(_mm256_loadu_ps(scales + STRIP), _mm256_set1_ps(a_sums[at]), sums[row]);
            }
        }
    }
#pragma GCC unroll 6
    for (int row = 0; row < rows; row++) {
        _mm256_storeu_ps((float *)t->c + (first_row + (size_t)row) * t->ld_c + column, sums[row]);
    }
}

// All strips of a tile, with their layout as a constant.
static inline __attribute__((always_inline)) void int8_strips(const int8_layout l, const int is_unsigned, const size_t n_strips,
                                                              const ggd_int8_tile *t) {
    for (size_t row = 0; row < t->n_rows; row += INT8_ROWS) {
        size_t rows = t->n_rows - row < INT8_ROWS ? t->n_rows - row : INT8_ROWS;
        for (size_t column = 0; column < n_strips * STRIP; column += STRIP) {
#define STRIP_OF_ROWS(rows) strip_of_rows(rows, l, is_unsigned, n_strips, t, row, column)
            GGD_ROWS_6(rows, STRIP_OF_ROWS)
        }
    }
}

// The forward's formats, their layouts as constants.
static inline __attribute__((always_inline)) void forward_strips(const size_t n_strips, const ggd_int8_tile *t) {
    int8_layout layout = layout_of(&t->format);
    if (layout.block == 16) {
        int8_strips((int8_layout){16, 16, 1, 0, 0}, 0, n_strips, t);
    } else if (layout.planes == 2) {
        int8_strips((int8_layout){32, 32, 2, 0, 0}, 0, n_strips, t);
    } else if (layout.has_minima) {
        int8_strips((int8_layout){32, 32, 1, 1, 0}, 0, n_strips, t);
    } else {
        int8_strips((int8_layout){32, 32, 1, 0, 0}, 0, n_strips, t);
    }
}

static void int8_tile(const ggd_int8_tile *t) {
    enum { STRIPS = GGD_PANEL_COLUMNS / STRIP };
    if (!layout_of(&t->format).is_backward) {
        forward_strips(STRIPS, t);
    } else if (t->a.is_unsigned) {
        int8_strips((int8_layout){64, CHUNK_OF_64, 1, 0, 1}, 1, STRIPS, t);
    } else {
        int8_strips((int8_layout){64, CHUNK_OF_64, 1, 0, 1}, 0, STRIPS, t);
    }
}

static void int8_strip(const ggd_int8_tile *t) { forward_strips(1, t); }

static size_t int8_strip_bytes(const ggd_int8_format *format) { return strip_bytes(layout_of(format)); }

const ggd_kernels ggd_kernels_avx2 = {
    .name = "avx2",
    .fast_element = GGD_ELEMENT_F32,
    .tile = {tile_f32, NULL},
    .pack_columns = {rows_pack_columns_f32, NULL},
    .pack_rows = {rows_pack_rows_f32, NULL},
    .pack_rows_from_bf16 = rows_pack_rows_from_bf16,
    .int8_tile = int8_tile,
    .int8_block_bytes = int8_block_bytes,
    .int8_steps = {COARSE_SIZE, GGD_INT8_SIZE, COARSE_SIZE},
    .int8_pack = int8_pack,
    .int8_quantise = int8_quantise,
    .int8_pack_columns = int8_pack_columns,
    .int8_strip_bytes = int8_strip_bytes,
    .int8_pack_strip = int8_pack_strip,
    .int8_strip = int8_strip,
    GGD_STRIP_TYPES,
    GGD_ROW_KERNELS,
};
