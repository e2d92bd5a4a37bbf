// few_rows.c - a thread unpacks 8 rows of W in the order in which they lie in memory, into a strip that stays in its first-level cache, and
// multiplies it by all rows of A at once.
#include "few_rows.h"

#include <stddef.h>
#include <string.h>

enum {
    PIECE = 1024,  // weights of a row unpacked at a time; a multiple of every block
    PIECE_BLOCKS = PIECE / GGD_INT8_MIN_BLOCK,
    MAX_ROWS = 32,  // beyond this panels are faster
    ITEMS_A_THREAD = 2
};

// What a thread needs for a strip, in its scratch memory: a block in a strip has at most twice the bytes of its quants and 16 for each column's
// scale, minimum and corrections.
typedef struct {
    int8_t quants[GGD_STRIP_COLUMNS][PIECE];
    float scales[GGD_STRIP_COLUMNS][PIECE_BLOCKS], minima[GGD_STRIP_COLUMNS][PIECE_BLOCKS];
    uint8_t strip[GGD_STRIP_COLUMNS * (2 * PIECE + 16 * PIECE_BLOCKS)];
} strip_buffers;
_Static_assert(sizeof(strip_buffers) <= GGD_UNPACKED_FLOATS * sizeof(float),
               "a strip fits into what every product has as scratch");

typedef float few_sums[MAX_ROWS][GGD_PANEL_COLUMNS];

typedef struct {
    const ggd_compute *compute;
    const ggd_gemm *gemm;
    ggd_int8_format format;
    size_t n_panels, n_items;  // of 32 columns of C; pieces of them that one thread takes together
} few_job;

int ggd_is_few_rows(const ggd_compute *compute, const ggd_gemm *gemm) {
    return gemm->operation == GGD_TIMES_WT && gemm->a.int8 != NULL && gemm->m <= MAX_ROWS && compute->kernels->int8_strip != NULL;
}

// The sums start from init and from the second product, whose reduction is short: as a panel.
static void start_sums(const few_job *job, size_t column, uint8_t *scratch, few_sums sums) {
    const ggd_gemm *g = job->gemm;
    size_t n = ggd_min(g->w.n_rows - column, GGD_PANEL_COLUMNS);
    for (size_t row = 0; row < g->m; row++) {
        memset(sums[row], 0, sizeof sums[row]);
        if (g->init.data != NULL) {
            memcpy(sums[row], g->init.data + row * g->init.ld + column, n * sizeof(float));
        }
    }
    if (g->a2.data == NULL) {
        return;
    }
    float *unpacked = (float *)scratch;
    size_t bytes_panel = ggd_panel_bytes(job->compute->element, g->w2.n_cols);
    const uint8_t *panel = scratch + GGD_UNPACKED_FLOATS * sizeof *unpacked;
    if (g->panels2 != NULL) {
        panel = g->panels2 + column / GGD_PANEL_COLUMNS * bytes_panel;
    } else {
        ggd_pack_panel(job->compute, GGD_TIMES_WT, &g->w2, column, g->scale2, unpacked, (void *)panel);
    }
    ggd_tile tile = {.a1 = g->a2.data,
                     .ld_a1 = g->a2.ld,
                     .k1 = ggd_panel_k(job->compute->element, g->w2.n_cols),
                     .panel = panel,
                     .init = sums[0],
                     .ld_init = GGD_PANEL_COLUMNS,
                     .c = sums,
                     .ld_c = GGD_PANEL_COLUMNS,
                     .c_element = GGD_ELEMENT_F32};
    ggd_multiply_panel(job->compute, g->m, &tile);
}

// The weights of the strip after this one.
static ggd_fetch next_of(const ggd_matrix *w, size_t first, size_t k) {
    size_t next = k + PIECE, row = first;
    if (next >= w->n_cols) {
        next = 0;
        row += GGD_STRIP_COLUMNS;
    }
    return (ggd_fetch){.row = w->data + row * w->bytes_row + next / w->block * w->bytes_block,
                       .n_rows = row < w->n_rows ? ggd_min(w->n_rows - row, GGD_STRIP_COLUMNS) : 0,
                       .bytes = ggd_min(w->n_cols - next, PIECE) / w->block * w->bytes_block,
                       .bytes_row = w->bytes_row};
}

// Weights [k, k + length) of up to eight rows to a strip.
static void pack_strip(const few_job *job, size_t first, size_t k, size_t length, strip_buffers *b) {
    const ggd_matrix *w = &job->gemm->w;
    const ggd_kernels *kernels = job->compute->kernels;
    const uint8_t *source = w->data + first * w->bytes_row + k / w->block * w->bytes_block;
    ggd_fetch next = next_of(w, first, k);
    size_t n = ggd_min(w->n_rows - first, GGD_STRIP_COLUMNS), lines_row = next.bytes / 64 + 1;
    if (n == GGD_STRIP_COLUMNS && kernels->int8_pack_stored[w->type] != NULL) {
        kernels->int8_pack_stored[w->type](source, w->bytes_row, length, b->strip, &next);
        return;
    }
    if (n < GGD_STRIP_COLUMNS) {
        memset(b, 0, offsetof(strip_buffers, strip));
    }
    for (size_t i = 0; i < n; i++, source += w->bytes_row) {
        kernels->int8_unpack[w->type](source, length, b->quants[i], b->scales[i], b->minima[i]);
        ggd_fetch_lines(&next, lines_row);
    }
    kernels->int8_pack_strip(&job->format, b->quants[0], PIECE, b->scales[0], b->minima[0], PIECE_BLOCKS, length, b->strip);
}

// sums (m, 8 of their columns) += A times eight rows of W
static void add_strip(const few_job *job, size_t first, strip_buffers *b, float *sums) {
    const ggd_gemm *g = job->gemm;
    ggd_int8_tile tile = {.format = job->format,
                          .n_rows = g->m,
                          .panel = b->strip,
                          .init = sums,
                          .ld_init = GGD_PANEL_COLUMNS,
                          .c = sums,
                          .ld_c = GGD_PANEL_COLUMNS,
                          .c_element = GGD_ELEMENT_F32};
    for (size_t k = 0; k < g->w.n_cols; k += PIECE) {
        size_t length = ggd_min(g->w.n_cols - k, PIECE);
        pack_strip(job, first, k, length, b);
        tile.n_blocks = length / job->format.block;
        tile.a = *g->a.int8;
        tile.a.quants += k;
        tile.a.scales += k / job->format.a_block;
        tile.a.sums += k / job->format.a_block;
        job->compute->kernels->int8_strip(&tile);
    }
}

static void store_sums(const few_job *job, size_t column, few_sums sums) {
    for (size_t row = 0; row < job->gemm->m; row++) {
        void *target = ggd_place_at(&job->gemm->c, row, column);
        if (job->gemm->c.element == GGD_ELEMENT_BF16) {
            job->compute->kernels->to_bf16(sums[row], target, GGD_PANEL_COLUMNS);
        } else {
            memcpy(target, sums[row], sizeof sums[row]);
        }
    }
}

// 32 columns of C
static void few_panel(const few_job *job, size_t column, uint8_t *scratch) {
    size_t n = ggd_min(job->gemm->w.n_rows - column, GGD_PANEL_COLUMNS);
    few_sums sums;
    start_sums(job, column, scratch, sums);
    for (size_t i = 0; i < n; i += GGD_STRIP_COLUMNS) {
        add_strip(job, column + i, (strip_buffers *)scratch, sums[0] + i);
    }
    store_sums(job, column, sums);
}

static void few_item(void *context, size_t item, size_t thread) {
    const few_job *job = context;
    size_t end = (item + 1) * job->n_panels / job->n_items;
    for (size_t panel = item * job->n_panels / job->n_items; panel < end; panel++) {
        few_panel(job, panel * GGD_PANEL_COLUMNS, ggd_scratch(job->compute, thread));
    }
}

// Few long items: the strip that a thread asked for ahead is its own next one only within an item.
void ggd_few_rows_run(const ggd_compute *compute, const ggd_gemm *gemm) {
    few_job job = {.compute = compute, .gemm = gemm, .format = ggd_gemm_int8_format(GGD_TIMES_WT, &gemm->w)};
    job.n_panels = ggd_ceil_div(gemm->w.n_rows, GGD_PANEL_COLUMNS);
    job.n_items = ggd_min(ITEMS_A_THREAD * ggd_threads_count(compute->threads), job.n_panels);
    ggd_parallel(compute->threads, gemm->part, job.n_items, few_item, &job);
}
