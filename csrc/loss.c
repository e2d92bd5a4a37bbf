// loss.c - loss = sum_i weight_i (log sum_v exp(z_iv) - z_i,target), z = head norm(x).
//
// Logits exist for a tile of GGD_LOSS_TOKENS tokens at a time. The gradient needs no second pass over the vocabulary: as in an online
// softmax (Milakov and Gimelshein 2018, arXiv:1805.02867) each tile adds exp(z - running maximum) times its head rows to a sum that is
// scaled when the maximum moves; with the final denominator Z that sum is the softmax-weighted row:
//   d loss / d normed = weight (sum_v p_v head_v - head_target)
// The target's own term, p_target - 1, is kept out of the sum and added in float32, so that a confident prediction does not cancel.
#include "loss.h"

#include <math.h>
#include <string.h>

#include "ops.h"

typedef struct {
    const ggd_compute *compute;
    const ggd_head *head;
    const ggd_loss_scratch *scratch;
    size_t m, ld;
    const float *x;
    ggd_objective *objective;
    float *dx;
    const int32_t *rows;  // this chunk's, n of them
    size_t n;
    size_t first_token, n_tokens;  // this tile's
    float *logits;                 // ggd_logits_run only
} loss_job;

static size_t min_size(size_t a, size_t b) { return a < b ? a : b; }

static void norm_item(void *context, size_t item, size_t thread) {
    const loss_job *job = context;
    const ggd_loss_scratch *s = job->scratch;
    float *buffer = (float *)ggd_scratch(job->compute, thread);
    size_t hidden = job->head->head.n_cols;
    const float *x = job->x + (size_t)job->rows[item] * job->ld;
    s->scales[item] = job->compute->kernels->rmsnorm(x, job->head->norm, job->head->rms_eps, buffer, hidden);
    ggd_store_row(job->compute, buffer, s->normed, item, 0, hidden);
    s->largest[item] = -INFINITY;
    s->target_logit[item] = -INFINITY;
    s->sum[item] = 0;
    if (job->dx != NULL) {
        memset(s->dnormed + item * s->ld, 0, s->ld * sizeof(float));
    }
}

static void tile_logits(const loss_job *job) {
    ggd_gemm product = {.part = "head logits",
                        .operation = GGD_TIMES_TRANSPOSE,
                        .m = job->n,
                        .a = job->scratch->normed,
                        .w = ggd_matrix_rows(&job->head->head, job->first_token, job->n_tokens),
                        .scale = 1.0f,
                        .c = job->scratch->logits,
                        .ld_c = GGD_LOSS_TOKENS,
                        .c_element = GGD_ELEMENT_F32};
    ggd_gemm_run(job->compute, &product);
}

// One row's logits of the tile join the running softmax; exp(z - maximum) is left as activation for the gradient.
static void softmax_item(void *context, size_t item, size_t thread) {
    const loss_job *job = context;
    const ggd_loss_scratch *s = job->scratch;
    const ggd_kernels *kernels = job->compute->kernels;
    float *logits = s->logits + item * GGD_LOSS_TOKENS, *weights = (float *)ggd_scratch(job->compute, thread);
    size_t target = (size_t)job->objective->targets[job->rows[item]], n = job->n_tokens;
    size_t hidden_token = (size_t)job->head->hidden_token;
    if (job->head->hidden_token >= 0 && hidden_token >= job->first_token && hidden_token < job->first_token + n) {
        logits[hidden_token - job->first_token] = -INFINITY;
    }
    float largest = kernels->max(logits, n);
    if (largest > s->largest[item]) {
        float factor = expf(s->largest[item] - largest);
        s->sum[item] *= factor;
        if (job->dx != NULL && factor > 0) {
            kernels->scale(s->dnormed + item * s->ld, factor, job->head->head.n_cols);
        }
        s->largest[item] = largest;
    }
    s->sum[item] += kernels->exp_sum(logits, s->largest[item], weights, n);
    if (target >= job->first_token && target < job->first_token + n) {
        s->target_logit[item] = logits[target - job->first_token];
        weights[target - job->first_token] = 0;
    }
    if (job->dx != NULL) {
        weights[n] = 0;  // the pair of an odd last token
        ggd_store_row(job->compute, weights, s->weights, item, 0, min_size(n + 1, GGD_LOSS_TOKENS));
    }
}

static void add_weighted_rows(const loss_job *job) {
    const ggd_loss_scratch *s = job->scratch;
    ggd_gemm product = {.part = "head gradient",
                        .operation = GGD_TIMES_PLAIN,
                        .m = job->n,
                        .a = s->weights,
                        .w = ggd_matrix_rows(&job->head->head, job->first_token, job->n_tokens),
                        .scale = 1.0f,
                        .init = s->dnormed,
                        .ld_init = s->ld,
                        .c = s->dnormed,
                        .ld_c = s->ld,
                        .c_element = GGD_ELEMENT_F32};
    ggd_gemm_run(job->compute, &product);
}

static void finish_item(void *context, size_t item, size_t thread) {
    const loss_job *job = context;
    const ggd_loss_scratch *s = job->scratch;
    const ggd_kernels *kernels = job->compute->kernels;
    size_t row = (size_t)job->rows[item], hidden = job->head->head.n_cols;
    float lse = s->largest[item] + (float)log(s->sum[item]), weight = job->objective->weights[row];
    job->objective->row_loss[row] = lse - s->target_logit[item];
    job->objective->row_correct[row] = s->target_logit[item] >= s->largest[item];
    if (job->dx == NULL) {
        return;
    }
    float *dnormed = s->dnormed + item * s->ld, *target_row = (float *)ggd_scratch(job->compute, thread);
    kernels->scale(dnormed, weight / (float)s->sum[item], hidden);
    ggd_matrix_unpack_row(kernels, &job->head->head, (size_t)job->objective->targets[row], target_row);
    kernels->add_scaled(target_row, weight * (expf(s->target_logit[item] - lse) - 1.0f), dnormed, hidden);
    kernels->rmsnorm_backward(dnormed, job->x + row * job->ld, job->head->norm, s->scales[item], job->dx + row * job->ld, hidden);
}

static void loss_chunk(loss_job *job) {
    size_t vocab = job->head->head.n_rows;
    ggd_parallel(job->compute->threads, "head", job->n, norm_item, job);
    for (job->first_token = 0; job->first_token < vocab; job->first_token += GGD_LOSS_TOKENS) {
        job->n_tokens = min_size(vocab - job->first_token, GGD_LOSS_TOKENS);
        tile_logits(job);
        ggd_parallel(job->compute->threads, "head softmax", job->n, softmax_item, job);
        if (job->dx != NULL) {
            add_weighted_rows(job);
        }
    }
    ggd_parallel(job->compute->threads, "head", job->n, finish_item, job);
}

void ggd_loss_run(const ggd_compute *compute, const ggd_head *head, const ggd_loss_scratch *scratch, size_t m, const float *x,
                  size_t ld, ggd_objective *objective, float *dx) {
    loss_job job = {
        .compute = compute, .head = head, .scratch = scratch, .m = m, .ld = ld, .x = x, .objective = objective, .dx = dx};
    size_t n_rows = 0;
    for (size_t row = 0; row < m; row++) {
        objective->row_loss[row] = 0;
        objective->row_correct[row] = 0;
        if (objective->weights[row] != 0) {
            scratch->rows[n_rows++] = (int32_t)row;
        }
    }
    if (dx != NULL) {
        memset(dx, 0, m * ld * sizeof *dx);
    }
    for (size_t first = 0; first < n_rows; first += GGD_LOSS_ROWS) {
        job.rows = scratch->rows + first;
        job.n = min_size(n_rows - first, GGD_LOSS_ROWS);
        loss_chunk(&job);
    }
    objective->loss = 0;
    for (size_t i = 0; i < n_rows; i++) {
        size_t row = (size_t)scratch->rows[i];
        objective->loss += (double)objective->weights[row] * objective->row_loss[row];
    }
}

static void copy_item(void *context, size_t item, size_t thread) {
    (void)thread;
    const loss_job *job = context;
    memcpy(job->logits + item * job->head->head.n_rows + job->first_token, job->scratch->logits + item * GGD_LOSS_TOKENS,
           job->n_tokens * sizeof(float));
}

void ggd_logits_run(const ggd_compute *compute, const ggd_head *head, const ggd_loss_scratch *scratch, size_t n_rows,
                    const int32_t *rows, const float *x, size_t ld, float *logits) {
    loss_job job = {.compute = compute, .head = head, .scratch = scratch, .ld = ld, .x = x};
    size_t vocab = head->head.n_rows;
    for (size_t first = 0; first < n_rows; first += GGD_LOSS_ROWS) {
        job.rows = rows + first;
        job.n = min_size(n_rows - first, GGD_LOSS_ROWS);
        job.logits = logits + first * vocab;
        ggd_parallel(compute->threads, "head", job.n, norm_item, &job);
        for (job.first_token = 0; job.first_token < vocab; job.first_token += GGD_LOSS_TOKENS) {
            job.n_tokens = min_size(vocab - job.first_token, GGD_LOSS_TOKENS);
            tile_logits(&job);
            ggd_parallel(compute->threads, "head", job.n, copy_item, &job);
        }
    }
}
