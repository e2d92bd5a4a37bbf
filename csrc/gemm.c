// gemm.c - C = init + A op(W) + A2 op(W2): a thread unpacks 32 columns of op(W) (more where the blocks are longer) into a panel that stays
// in its cache, and all rows of A stream past it. W is never unpacked whole. Every element of C is summed by one thread in the order
// of k, so the bits do not depend on how the work is split.
#include "gemm.h"

#include <string.h>

#include "few_rows.h"

enum {
    PIECE = 256,             // elements unpacked at a time along a row; a multiple of every block
    ROWS_PIECE = 64,         // rows unpacked at a time across; an int8 block
    UNPACKED_PADDING = 16,   // floats between such rows, or they would fall into a few sets of the first-level cache
    NEAR_ROWS_BYTES = 1024,  // closer rows the processor fetches by itself
    MIN_CHUNK_ROWS = 96,     // below this, packing would cost more than the product
    QUANTISE_ROWS = 16       // activations brought to int8 at a time
};

static size_t result_columns(const ggd_gemm *g) { return g->operation == GGD_TIMES_WT ? g->w.n_rows : g->w.n_cols; }
static size_t reduction_of(ggd_operation operation, const ggd_matrix *w) {
    return operation == GGD_TIMES_WT ? w->n_cols : w->n_rows;
}

// Panels that are packed together. Along the rows of W: as many as whole blocks span, and a few where there are many, or each row's cache
// line would be fetched again for the next 32 columns. (Where there are few, groups would leave threads idle.)
enum { GROUP_PANELS = 4, GROUPS_A_THREAD = 16 };
static size_t panels_a_group(const ggd_gemm *g, size_t n_panels, size_t n_threads) {
    if (g->operation == GGD_TIMES_WT || g->w.block == 1) {
        return 1;
    }
    size_t group = ggd_min(n_panels / (GROUPS_A_THREAD * n_threads), GROUP_PANELS),
           block = ggd_ceil_div(g->w.block, GGD_PANEL_COLUMNS);
    return block > group ? block : group / block * block;
}

size_t ggd_gemm_bytes_scratch(ggd_element element, size_t reduction, size_t block) {
    size_t panels = ggd_max(block / GGD_PANEL_COLUMNS, GROUP_PANELS);
    size_t bytes_panels = panels * (reduction + 4) * GGD_PANEL_COLUMNS * ggd_element_bytes(element);
    return ggd_round_up(bytes_panels, 64) + GGD_UNPACKED_FLOATS * sizeof(float);
}

// Bytes of a row's next piece to ask for ahead of their use: rows that are far apart the processor does not foresee.
static size_t bytes_to_fetch(const ggd_matrix *w, size_t n) {
    return w->bytes_row > NEAR_ROWS_BYTES ? n / w->block * w->bytes_block : 0;
}
static inline void fetch_early(const uint8_t *data, size_t bytes) {
    for (size_t i = 0; i < bytes; i += 64) {
        __builtin_prefetch((const void *)((uintptr_t)data + i));
    }
}

// op(W) = W^T: panel columns are rows of W.
static void pack_columns_of_wt(const ggd_compute *compute, const ggd_matrix *w, size_t column, float scale, float *unpacked,
                               uint8_t *panel) {
    size_t n = ggd_min(w->n_rows - column, GGD_PANEL_COLUMNS), bytes_row = w->bytes_row;
    size_t bytes_piece = PIECE / w->block * w->bytes_block, bytes_early = bytes_to_fetch(w, PIECE);
    if (n < GGD_PANEL_COLUMNS) {
        memset(unpacked, 0, GGD_PANEL_COLUMNS * PIECE * sizeof *unpacked);
    }
    for (size_t k = 0; k < w->n_cols; k += PIECE) {
        size_t length = ggd_min(w->n_cols - k, PIECE);
        const uint8_t *source = w->data + column * bytes_row + k / w->block * w->bytes_block;
        for (size_t i = 0; i < n; i++, source += bytes_row) {
            fetch_early(source + bytes_piece, bytes_early);
            ggd_matrix_unpack(compute->kernels, w, source, unpacked + i * PIECE, length);
        }
        void *target = panel + k * GGD_PANEL_COLUMNS * ggd_element_bytes(compute->element);
        compute->kernels->pack_columns[compute->element](unpacked, PIECE, length, scale, target);
    }
}

// The same in int8, in W's own blocks.
static void pack_columns_of_wt_int8(const ggd_compute *compute, const ggd_matrix *w, size_t column, const ggd_int8_format *format,
                                    float *unpacked, uint8_t *panel) {
    enum { BLOCKS = PIECE / GGD_INT8_MIN_BLOCK };
    size_t n = ggd_min(w->n_rows - column, GGD_PANEL_COLUMNS), bytes_row = w->bytes_row;
    size_t bytes_piece = PIECE / w->block * w->bytes_block, bytes_early = bytes_to_fetch(w, PIECE);
    float *scales = unpacked, *minima = scales + GGD_PANEL_COLUMNS * BLOCKS;
    int8_t *quants = (int8_t *)(minima + GGD_PANEL_COLUMNS * BLOCKS);
    if (n < GGD_PANEL_COLUMNS) {
        memset(unpacked, 0, GGD_PANEL_COLUMNS * (2 * BLOCKS * sizeof *scales + PIECE));
    }
    for (size_t k = 0; k < w->n_cols; k += PIECE) {
        size_t length = ggd_min(w->n_cols - k, PIECE);
        const uint8_t *source = w->data + column * bytes_row + k / w->block * w->bytes_block;
        for (size_t i = 0; i < n; i++, source += bytes_row) {
            fetch_early(source + bytes_piece, bytes_early);
            compute->kernels->int8_unpack[w->type](source, length, quants + i * PIECE, scales + i * BLOCKS, minima + i * BLOCKS);
        }
        uint8_t *target = panel + k / format->block * ggd_int8_block_bytes_of(compute->kernels, format);
        compute->kernels->int8_pack_columns(format, quants, PIECE, scales, minima, BLOCKS, length, target);
    }
}

// op(W) = W: panel columns are columns of W. `n_panels` neighbouring panels, `bytes_panel` apart, are packed together, as int8 blocks
// for the given rows or in the element type. Of each piece of rows as many columns are unpacked at a time as one block of W spans, so that they stay in the
// first-level cache until they are packed.
static void pack_rows_of_w(const ggd_compute *compute, const ggd_matrix *w, size_t column, size_t n_panels, float scale,
                           const ggd_int8_rows *int8, float *unpacked, uint8_t *panel, size_t bytes_panel) {
    if (w->type == GGD_BF16 && compute->element == GGD_ELEMENT_BF16 && scale == 1.0f && n_panels == 1 && int8 == NULL &&
        w->n_cols - column >= GGD_PANEL_COLUMNS) {
        const uint16_t *source = (const uint16_t *)w->data + column;
        compute->kernels->pack_rows_from_bf16(source, w->bytes_row / sizeof *source, w->n_rows, panel);
        return;
    }
    size_t width = ggd_max(w->block, GGD_PANEL_COLUMNS), n_pieces = n_panels * GGD_PANEL_COLUMNS / width;
    size_t ld = width > GGD_PANEL_COLUMNS ? width + UNPACKED_PADDING : width;
    size_t bytes_rows = int8 != NULL ? ggd_int8_block_bytes_of(compute->kernels, &ggd_int8_backward_format)
                                     : ggd_panel_bytes(compute->element, ROWS_PIECE);
    size_t bytes_row = w->bytes_row, bytes_early = bytes_to_fetch(w, width);
    for (size_t item = 0; item < ggd_ceil_div(w->n_rows, ROWS_PIECE) * n_pieces; item++) {
        size_t k = item / n_pieces * ROWS_PIECE, first = item % n_pieces * width;
        size_t rows = ggd_min(w->n_rows - k, ROWS_PIECE);
        size_t left = w->n_cols - column > first ? w->n_cols - column - first : 0, n = ggd_min(left, width);
        if (n < width) {
            memset(unpacked, 0, ROWS_PIECE * ld * sizeof *unpacked);
        }
        const uint8_t *source = w->data + k * bytes_row + (column + first) / w->block * w->bytes_block;
        for (size_t i = 0; n > 0 && i < rows; i++, source += bytes_row) {
            fetch_early(source + ROWS_PIECE * bytes_row, bytes_early);
            ggd_matrix_unpack(compute->kernels, w, source, unpacked + i * ld, n);
        }
        for (size_t c = 0; c < width; c += GGD_PANEL_COLUMNS) {
            uint8_t *target = panel + (first + c) / GGD_PANEL_COLUMNS * bytes_panel + k / ROWS_PIECE * bytes_rows;
            if (int8 != NULL) {
                compute->kernels->int8_pack(unpacked + c, ld, rows, int8->is_unsigned, target);
            } else {
                compute->kernels->pack_rows[compute->element](unpacked + c, ld, rows, scale, target);
            }
        }
    }
}

void ggd_pack_panel(const ggd_compute *compute, ggd_operation operation, const ggd_matrix *w, size_t column, float scale,
                    float *unpacked, void *panel) {
    if (operation == GGD_TIMES_WT) {
        pack_columns_of_wt(compute, w, column, scale, unpacked, panel);
    } else {
        pack_rows_of_w(compute, w, column, 1, scale, NULL, unpacked, panel, 0);
    }
}

void ggd_multiply_panel(const ggd_compute *compute, size_t m, const ggd_tile *prototype) {
    ggd_tile tile = *prototype;
    size_t bytes = ggd_element_bytes(compute->element), bytes_c = ggd_element_bytes(tile.c_element);
    for (size_t row = 0; row < m; row += GGD_TILE_ROWS) {
        tile.n_rows = ggd_min(m - row, GGD_TILE_ROWS);
        compute->kernels->tile[compute->element](&tile);
        tile.a1 = (const uint8_t *)tile.a1 + GGD_TILE_ROWS * tile.ld_a1 * bytes;
        tile.a2 = tile.a2 != NULL ? (const uint8_t *)tile.a2 + GGD_TILE_ROWS * tile.ld_a2 * bytes : NULL;
        tile.init = tile.init != NULL ? tile.init + GGD_TILE_ROWS * tile.ld_init : NULL;
        tile.c = (uint8_t *)tile.c + GGD_TILE_ROWS * tile.ld_c * bytes_c;
    }
}

typedef struct {
    const ggd_compute *compute;
    const ggd_gemm *gemm;
    size_t n_panels, group;       // panels in all; packed together
    size_t n_chunks, rows_chunk;  // pieces of the rows
    size_t k1, k2;                // rows of a panel from W and from W2
    size_t bytes_w, bytes_panel;  // of a panel's part from W, and of all of it
    ggd_int8_format format;       // of the part from W, where that is in int8
} gemm_job;

static void pack_group(const gemm_job *job, size_t first_panel, size_t n_panels, uint8_t *panels, float *unpacked) {
    const ggd_gemm *g = job->gemm;
    size_t column = first_panel * GGD_PANEL_COLUMNS;
    if (g->operation == GGD_TIMES_WT && g->a.int8 != NULL) {
        pack_columns_of_wt_int8(job->compute, &g->w, column, &job->format, unpacked, panels);
    } else if (g->operation == GGD_TIMES_WT) {
        pack_columns_of_wt(job->compute, &g->w, column, g->scale, unpacked, panels);
    } else {
        pack_rows_of_w(job->compute, &g->w, column, n_panels, g->scale, g->a.int8, unpacked, panels, job->bytes_panel);
    }
    for (size_t p = 0; job->k2 > 0 && p < n_panels; p++) {
        ggd_pack_panel(job->compute, g->operation, &g->w2, column + p * GGD_PANEL_COLUMNS, g->scale2, unpacked,
                       panels + p * job->bytes_panel + job->bytes_w);
    }
}

// All row tiles of one panel in int8; a second operand goes first, in the element type, by way of a small float32 tile.
static void multiply_panel_int8(const gemm_job *job, size_t first_row, size_t rows, size_t column, const uint8_t *panel) {
    const ggd_gemm *g = job->gemm;
    const ggd_kernels *kernels = job->compute->kernels;
    ggd_element element = job->compute->element;
    float second[GGD_TILE_ROWS * GGD_PANEL_COLUMNS];
    for (size_t row = first_row; row < first_row + rows; row += GGD_TILE_ROWS) {
        size_t n_rows = ggd_min(first_row + rows - row, GGD_TILE_ROWS);
        const float *init = g->init.data != NULL ? g->init.data + row * g->init.ld + column : NULL;
        if (job->k2 > 0) {
            ggd_tile tile = {.n_rows = n_rows,
                             .a1 = ggd_activation_at(g->a2, row, 0, element),
                             .ld_a1 = g->a2.ld,
                             .k1 = job->k2,
                             .panel = panel + job->bytes_w,
                             .init = init,
                             .ld_init = g->init.ld,
                             .c = second,
                             .ld_c = GGD_PANEL_COLUMNS,
                             .c_element = GGD_ELEMENT_F32};
            kernels->tile[element](&tile);
            init = second;
        }
        ggd_int8_rows a = *g->a.int8;
        a.quants += row * a.ld;
        a.scales += row * a.ld_scales;
        a.sums += row * a.ld_scales;
        ggd_int8_tile tile = {.format = job->format,
                              .n_rows = n_rows,
                              .n_blocks = job->k1 / job->format.block,
                              .a = a,
                              .panel = panel,
                              .init = init,
                              .ld_init = job->k2 > 0 ? GGD_PANEL_COLUMNS : g->init.ld,
                              .c = ggd_place_at(&g->c, row, column),
                              .ld_c = g->c.ld,
                              .c_element = g->c.element};
        kernels->int8_tile(&tile);
    }
}

static void multiply_panel(const gemm_job *job, size_t first_row, size_t rows, size_t column, const uint8_t *panel) {
    const ggd_gemm *g = job->gemm;
    ggd_element element = job->compute->element;
    ggd_tile tile = {
        .a1 = ggd_activation_at(g->a.x, first_row, 0, element),
        .ld_a1 = g->a.x.ld,
        .k1 = job->k1,
        .a2 = job->k2 > 0 ? ggd_activation_at(g->a2, first_row, 0, element) : NULL,
        .ld_a2 = g->a2.ld,
        .k2 = job->k2,
        .panel = panel,
        .init = g->init.data != NULL ? g->init.data + first_row * g->init.ld + column : NULL,
        .ld_init = g->init.ld,
        .c = ggd_place_at(&g->c, first_row, column),
        .ld_c = g->c.ld,
        .c_element = g->c.element,
    };
    ggd_multiply_panel(job->compute, rows, &tile);
}

static void gemm_item(void *context, size_t item, size_t thread) {
    const gemm_job *job = context;
    size_t first_panel = item / job->n_chunks * job->group, first_row = item % job->n_chunks * job->rows_chunk;
    size_t n_panels = ggd_min(job->n_panels - first_panel, job->group);
    size_t rows = ggd_min(job->gemm->m - first_row, job->rows_chunk);
    uint8_t *scratch = ggd_scratch(job->compute, thread) + GGD_UNPACKED_FLOATS * sizeof(float);
    const uint8_t *panels = scratch;
    if (job->gemm->panels != NULL) {
        panels = job->gemm->panels + first_panel * job->bytes_panel;
    } else {
        pack_group(job, first_panel, n_panels, scratch, (float *)ggd_scratch(job->compute, thread));
    }
    for (size_t p = 0; p < n_panels; p++) {
        size_t column = (first_panel + p) * GGD_PANEL_COLUMNS;
        if (job->gemm->a.int8 != NULL) {
            multiply_panel_int8(job, first_row, rows, column, panels + p * job->bytes_panel);
        } else {
            multiply_panel(job, first_row, rows, column, panels + p * job->bytes_panel);
        }
    }
}

// Rows are split too where there are too few panels to keep the threads busy; each chunk then packs its panels again.
static void split_rows(gemm_job *job, size_t n_groups) {
    size_t wanted = 4 * ggd_threads_count(job->compute->threads);
    size_t chunks = ggd_threads_count(job->compute->threads) == 1 ? 1 : ggd_ceil_div(wanted, n_groups);
    chunks = ggd_max(ggd_min(chunks, job->gemm->m / MIN_CHUNK_ROWS), 1);
    job->rows_chunk = ggd_round_up(ggd_ceil_div(job->gemm->m, chunks), GGD_TILE_ROWS);
    job->n_chunks = ggd_ceil_div(job->gemm->m, job->rows_chunk);
}

static gemm_job job_of(const ggd_compute *compute, const ggd_gemm *gemm) {
    gemm_job job = {.compute = compute, .gemm = gemm, .n_chunks = 1};
    job.n_panels = ggd_ceil_div(result_columns(gemm), GGD_PANEL_COLUMNS);
    job.group = panels_a_group(gemm, job.n_panels, ggd_threads_count(compute->threads));
    size_t reduction = reduction_of(gemm->operation, &gemm->w),
           bytes_row = GGD_PANEL_COLUMNS * ggd_element_bytes(compute->element);
    job.k1 = ggd_panel_k(compute->element, reduction);
    job.k2 = gemm->a2.data != NULL ? ggd_panel_k(compute->element, reduction_of(gemm->operation, &gemm->w2)) : 0;
    job.bytes_w = job.k1 * bytes_row;
    if (gemm->a.int8 != NULL) {
        job.format = ggd_gemm_int8_format(gemm->operation, &gemm->w);
        job.k1 = ggd_round_up(reduction, job.format.block);
        job.bytes_w = job.k1 / job.format.block * ggd_int8_block_bytes_of(compute->kernels, &job.format);
    }
    job.bytes_panel = job.bytes_w + job.k2 * bytes_row;
    return job;
}

void ggd_gemm_run(const ggd_compute *compute, const ggd_gemm *gemm) {
    if (gemm->m == 0) {
        return;
    }
    if (ggd_is_few_rows(compute, gemm)) {
        ggd_few_rows_run(compute, gemm);
        return;
    }
    gemm_job job = job_of(compute, gemm);
    size_t n_groups = ggd_ceil_div(job.n_panels, job.group);
    split_rows(&job, n_groups);
    ggd_parallel(compute->threads, gemm->part, n_groups * job.n_chunks, gemm_item, &job);
}

void ggd_gemm_pack(const ggd_compute *compute, ggd_operation operation, const ggd_matrix *w, int int8) {
    const ggd_int8_rows no_rows = {0};
    ggd_gemm gemm = {.operation = operation, .w = *w, .scale = 1.0f, .a.int8 = int8 ? &no_rows : NULL};
    gemm_job job = job_of(compute, &gemm);  // of no rows: the items pack their panels and multiply nothing
    ggd_parallel(compute->threads, "packing", ggd_ceil_div(job.n_panels, job.group), gemm_item, &job);
}

ggd_int8_format ggd_gemm_int8_format(ggd_operation operation, const ggd_matrix *w) {
    return operation == GGD_TIMES_WT ? ggd_int8_format_of(w->type) : ggd_int8_backward_format;
}

typedef struct {
    const ggd_compute *compute;
    size_t m, n, block;
    ggd_activation x;
    const ggd_int8_rows *rows;
} quantise_job;

static void quantise_item(void *context, size_t item, size_t thread) {
    (void)thread;
    const quantise_job *job = context;
    ggd_element element = job->compute->element;
    size_t end = ggd_min((item + 1) * QUANTISE_ROWS, job->m);
    for (size_t row = item * QUANTISE_ROWS; row < end; row++) {
        const void *x = ggd_activation_at(job->x, row, 0, element);
        ggd_int8_quantise_row(job->compute, x, element, job->n, job->block, job->rows, row, 0);
    }
}

void ggd_int8_quantise_row(const ggd_compute *compute, const void *x, ggd_element element, size_t n, size_t block,
                           const ggd_int8_rows *rows, size_t row, size_t column) {
    size_t first_block = row * rows->ld_scales + column / block;
    compute->kernels->int8_quantise(x, element, n, block, rows->is_unsigned, rows->quants + row * rows->ld + column,
                                    rows->scales + first_block, rows->sums + first_block);
}

void ggd_int8_quantise_rows(const ggd_compute *compute, size_t m, size_t n, ggd_activation x, size_t block, ggd_int8_rows *rows) {
    ggd_int8_set_strides(rows, n, block);
    quantise_job job = {compute, m, n, block, x, rows};
    ggd_parallel(compute->threads, "int8 activations", ggd_ceil_div(m, QUANTISE_ROWS), quantise_item, &job);
}
