// peak.c - the machine's own bounds for matrix products: of the tile kernel, on operands that never leave the first-level cache, and of
// packing the model's weights for it.
#include <stdlib.h>
#include <time.h>

#include "session.h"

enum { PEAK_K = 128, TILES_A_ROUND = 4096 };

typedef struct {
    const ggd_compute *compute;
    uint8_t *operands;  // (n_threads, bytes_thread): A, panel, C
    size_t bytes_thread;
} peak_job;

static const size_t bytes_a = GGD_TILE_ROWS * PEAK_K * sizeof(float), bytes_panel = PEAK_K * GGD_PANEL_COLUMNS * sizeof(float);

static void peak_item(void *context, size_t item, size_t thread) {
    (void)thread;
    const peak_job *job = context;
    uint8_t *operands = job->operands + item * job->bytes_thread;
    ggd_tile tile = {.n_rows = GGD_TILE_ROWS,
                     .a1 = operands,
                     .ld_a1 = PEAK_K,
                     .k1 = PEAK_K,
                     .panel = operands + bytes_a,
                     .c = operands + bytes_a + bytes_panel,
                     .ld_c = GGD_PANEL_COLUMNS,
                     .c_element = GGD_ELEMENT_F32};
    for (size_t i = 0; i < TILES_A_ROUND; i++) {
        job->compute->kernels->tile[job->compute->element](&tile);
    }
}

static double now_s(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

double ggd_session_peak(ggd_session *session, double time_s) {
    size_t n_threads = ggd_threads_count(session->compute.threads);
    size_t bytes_thread = ggd_round_up(bytes_a + bytes_panel + GGD_TILE_ROWS * GGD_PANEL_COLUMNS * sizeof(float), 4096);
    peak_job job = {&session->compute, calloc(n_threads, bytes_thread), bytes_thread};
    if (job.operands == NULL) {
        return 0;
    }
    double start_s = now_s(), end_s = start_s;
    size_t n_tiles = 0;
    while (end_s - start_s < time_s) {
        ggd_parallel(session->compute.threads, "peak", n_threads, peak_item, &job);
        n_tiles += n_threads * TILES_A_ROUND;
        end_s = now_s();
    }
    free(job.operands);
    return 2e-9 * (double)n_tiles * GGD_TILE_ROWS * GGD_PANEL_COLUMNS * PEAK_K / (end_s - start_s);
}

// One pass over the frozen weights of all layers; returns how many there are.
static size_t pack_layers(const ggd_session *s, int backward) {
    size_t n_weights = 0;
    for (int32_t l = 0; l < s->model->shape.n_layers; l++) {
        for (int target = 0; target < GGD_N_TARGETS; target++) {
            const ggd_matrix *w = &s->model->layers[l].linear[target].w;
            ggd_operation operation = backward ? GGD_TIMES_W : GGD_TIMES_WT;
            int wanted = s->int8 >= (backward ? GGD_INT8_BACKWARD : GGD_INT8_BOTH);
            ggd_gemm_pack(&s->compute, operation, w, wanted && ggd_gemm_int8_format(operation, w).block != 0);
            n_weights += w->n_rows * w->n_cols;
        }
    }
    return n_weights;
}

double ggd_session_packing(ggd_session *session, int32_t backward, double time_s) {
    ggd_capacity capacity = {.n_rows = 1, .max_keys = 1, .max_positions = 1, .gradients = 1, .keep = session->capacity.keep};
    if (ggd_session_reserve(session, &capacity)) {
        return 0;
    }
    double start_s = now_s(), end_s = start_s, n_weights = 0;
    while (end_s - start_s < time_s) {
        n_weights += (double)pack_layers(session, backward);
        end_s = now_s();
    }
    return 1e-9 * n_weights / (end_s - start_s);
}
