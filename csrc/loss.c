// loss.c - loss = sum_i weight_i (log sum_v exp(z_iv) - z_i,target), z = head norm(x).
//
// Logits exist for a tile of GGD_LOSS_TOKENS tokens at a time. The gradient needs no second pass over the vocabulary: as in an online
// softmax (Milakov and Gimelshein 2018, arXiv:1805.02867) each tile adds exp(z - running maximum) times its head rows to a sum that is
// scaled when the maximum moves; with the final denominator Z that sum is the softmax-weighted row:
//   d loss / d normed = weight (sum_v p_v head_v - head_target)
// The target's own term, p_target - 1, is kept out of the sum and added in float32, so that a confident prediction does not cancel.
//
// Where logits are soft-capped, z = cap tanh(u / cap), all of this holds for z, and each term of a sum over head rows has the slope
// dz / du = 1 - (z / cap)^2 beside it.
//
// With a teacher (the base alone; Hinton et al. 2015, arXiv:1503.02531, at temperature 1) a second online softmax over the same tiles
// gives -sum_v p_teacher(v) log p(v) = log sum_v exp(z_v) - sum_v p_teacher(v) z_v and its gradient sum_v (p_v - p_teacher(v)) head_v.
#include "loss.h"

#include <math.h>
#include <string.h>

#include "ops.h"

typedef struct {
    const ggd_compute *compute;
    const ggd_head *head;
    const ggd_loss_scratch *scratch;
    size_t ld;
    const float *x;
    ggd_objective *objective;
    float *dx;
    const int32_t *rows;  // this chunk's, n of them
    size_t n;
    size_t first_token, n_tokens;  // this tile's
    float *logits;                 // ggd_logits_run only
} loss_job;

static int has_teacher(const loss_job *job) { return job->objective != NULL && job->objective->teacher_tokens != NULL; }

static void start_softmax(const loss_job *job, const ggd_online_softmax *softmax, size_t item) {
    softmax->largest[item] = -INFINITY;
    softmax->sum[item] = 0;
    if (job->dx != NULL) {
        memset(softmax->mean + item * job->scratch->ld, 0, job->scratch->ld * sizeof(float));
    }
}

// Whether the logits are products in int8.
static int logits_in_int8(const loss_job *job) {
    return job->scratch->normed_int8 != NULL && ggd_gemm_int8_format(GGD_TIMES_WT, &job->head->head).block != 0;
}

// A row of the head's operand also in int8, where it is multiplied so.
static void store_int8(const loss_job *job, const void *row, ggd_element element, ggd_int8_rows *rows, size_t item) {
    if (logits_in_int8(job)) {
        ggd_int8_quantise_row(job->compute, row, element, job->head->head.n_cols, GGD_INT8_FORWARD_BLOCK, rows, item, 0);
    }
}

static void norm_item(void *context, size_t item, size_t thread) {
    const loss_job *job = context;
    const ggd_loss_scratch *s = job->scratch;
    float *buffer = (float *)ggd_scratch(job->compute, thread);
    size_t row = (size_t)job->rows[item], hidden = job->head->head.n_cols;
    s->scales[item] = job->compute->kernels->rmsnorm(job->x + row * job->ld, job->head->norm, job->head->rms_eps, buffer, hidden);
    ggd_store_row(job->compute, buffer, s->normed, item, 0, hidden);
    store_int8(job, buffer, GGD_ELEMENT_F32, s->normed_int8, item);
    s->target_logit[item] = -INFINITY;
    start_softmax(job, &s->own, item);
    if (has_teacher(job)) {
        size_t teacher_row = (size_t)job->objective->teacher_rows[row], bytes = ggd_element_bytes(job->compute->element) * hidden;
        const void *teacher = ggd_activation_at(s->teacher_normed, teacher_row, 0, job->compute->element);
        memcpy(ggd_activation_at(s->teacher_chunk, item, 0, job->compute->element), teacher, bytes);
        store_int8(job, teacher, job->compute->element, s->teacher_int8, item);
        s->cross[item] = 0;
        start_softmax(job, &s->teacher, item);
    }
}

// Logits (n, n_tokens) of the tile.
static void tile_logits(const loss_job *job, ggd_activation normed, const ggd_int8_rows *normed_int8, float *logits) {
    ggd_gemm product = {.part = "head logits",
                        .operation = GGD_TIMES_WT,
                        .m = job->n,
                        .a = {normed, logits_in_int8(job) ? normed_int8 : NULL},
                        .w = ggd_matrix_rows(&job->head->head, job->first_token, job->n_tokens),
                        .scale = 1.0f,
                        .c = ggd_place_f32(logits, GGD_LOSS_TOKENS)};
    ggd_gemm_run(job->compute, &product);
}

// The mask token's element of a row of the tile, or NULL.
static float *mask_element(const loss_job *job, float *row) {
    size_t token = (size_t)job->head->mask_token;
    int inside = job->head->mask_token >= 0 && token >= job->first_token && token < job->first_token + job->n_tokens;
    return inside ? row + (token - job->first_token) : NULL;
}

// A row's product of the tile to logits: soft-capped, the mask token's out of the way.
static void finish_logits(const loss_job *job, float *logits) {
    float *mask = mask_element(job, logits);
    if (job->head->logit_cap > 0) {
        job->compute->kernels->soft_cap(logits, 1.0f, job->head->logit_cap, job->n_tokens);
    }
    if (mask != NULL) {
        *mask = -INFINITY;
    }
}

// One row's logits of the tile join its running softmax: `weights` gets exp(logit - largest), what was summed before is scaled by the
// returned factor.
static float join_tile(const loss_job *job, const ggd_online_softmax *softmax, size_t item, float *weights) {
    const ggd_kernels *kernels = job->compute->kernels;
    float *logits = softmax->logits + item * GGD_LOSS_TOKENS, factor = 1.0f;
    size_t n = job->n_tokens;
    finish_logits(job, logits);
    float largest = kernels->max(logits, n);
    if (largest > softmax->largest[item]) {
        factor = expf(softmax->largest[item] - largest);
        softmax->sum[item] *= factor;
        if (job->dx != NULL && factor > 0) {
            kernels->scale(softmax->mean + item * job->scratch->ld, factor, job->head->head.n_cols);
        }
        softmax->largest[item] = largest;
    }
    softmax->sum[item] += kernels->exp_sum(logits, softmax->largest[item], weights, n);
    return factor;
}

// Slope of the own logit's soft cap.
static float slope(const loss_job *job, float logit) {
    float share = job->head->logit_cap > 0 ? logit / job->head->logit_cap : 0;
    return 1.0f - share * share;
}

// Weights of the head's rows, for the product with them; `own_logits` are of the same tile.
static void store_weights(const loss_job *job, float *weights, float *own_logits, size_t item) {
    if (job->dx == NULL) {
        return;
    }
    if (job->head->logit_cap > 0) {
        float *mask = mask_element(job, weights);
        job->compute->kernels->soft_cap_backward(own_logits, job->head->logit_cap, weights, job->n_tokens);
        if (mask != NULL) {
            *mask = 0;  // 0 * -inf would be no number
        }
    }
    weights[job->n_tokens] = 0;  // the pair of an odd last token
    ggd_store_row(job->compute, weights, job->scratch->weights, item, 0, ggd_min(job->n_tokens + 1, GGD_LOSS_TOKENS));
}

static void softmax_item(void *context, size_t item, size_t thread) {
    const loss_job *job = context;
    const ggd_loss_scratch *s = job->scratch;
    float *weights = (float *)ggd_scratch(job->compute, thread), *own_logits = s->own.logits + item * GGD_LOSS_TOKENS;
    size_t target = (size_t)job->objective->targets[job->rows[item]];
    join_tile(job, &s->own, item, weights);
    if (target >= job->first_token && target < job->first_token + job->n_tokens) {
        s->target_logit[item] = own_logits[target - job->first_token];
        weights[target - job->first_token] = 0;
    }
    store_weights(job, weights, own_logits, item);
}

static void teacher_item(void *context, size_t item, size_t thread) {
    const loss_job *job = context;
    const ggd_loss_scratch *s = job->scratch;
    float *weights = (float *)ggd_scratch(job->compute, thread), *own_logits = s->own.logits + item * GGD_LOSS_TOKENS;
    float *mask = mask_element(job, own_logits);
    s->cross[item] *= join_tile(job, &s->teacher, item, weights);
    if (mask != NULL) {
        *mask = 0;  // 0 * -inf would be no number
    }
    s->cross[item] += job->compute->kernels->dot(weights, own_logits, job->n_tokens);
    store_weights(job, weights, own_logits, item);
}

static void add_weighted_rows(const loss_job *job, float *mean) {
    const ggd_loss_scratch *s = job->scratch;
    ggd_gemm product = {.part = "head gradient",
                        .operation = GGD_TIMES_W,
                        .m = job->n,
                        .a = {.x = s->weights},
                        .w = ggd_matrix_rows(&job->head->head, job->first_token, job->n_tokens),
                        .scale = 1.0f,
                        .init = {mean, s->ld},
                        .c = ggd_place_f32(mean, s->ld)};
    if (s->weights_int8 != NULL) {
        size_t block = ggd_int8_backward_format.a_block;
        ggd_int8_quantise_rows(job->compute, job->n, job->n_tokens, s->weights, block, s->weights_int8);
        product.a.int8 = s->weights_int8;
    }
    ggd_gemm_run(job->compute, &product);
}

static void finish_item(void *context, size_t item, size_t thread) {
    const loss_job *job = context;
    const ggd_loss_scratch *s = job->scratch;
    const ggd_kernels *kernels = job->compute->kernels;
    size_t row = (size_t)job->rows[item], hidden = job->head->head.n_cols;
    float lse = s->own.largest[item] + (float)log(s->own.sum[item]), weight = job->objective->weights[row], teacher_weight = 0;
    float target_probability = expf(s->target_logit[item] - lse);
    if (weight != 0) {
        job->objective->row_loss[row] = lse - s->target_logit[item];
        job->objective->row_correct[row] = s->target_logit[item] >= s->own.largest[item];
    }
    if (has_teacher(job)) {
        teacher_weight = job->objective->teacher_weights[row];
        s->teacher_loss[row] = lse - s->cross[item] / s->teacher.sum[item];
    }
    if (job->dx == NULL) {
        return;
    }
    float *dnormed = s->own.mean + item * s->ld, *target_row = (float *)ggd_scratch(job->compute, thread);
    kernels->scale(dnormed, (weight + teacher_weight) / (float)s->own.sum[item], hidden);
    ggd_matrix_unpack_row(kernels, &job->head->head, (size_t)job->objective->targets[row], target_row);
    float target_weight = (weight + teacher_weight) * target_probability - weight;
    kernels->add_scaled(target_row, slope(job, s->target_logit[item]) * target_weight, dnormed, hidden);
    if (teacher_weight != 0) {
        kernels->add_scaled(s->teacher.mean + item * s->ld, -teacher_weight / (float)s->teacher.sum[item], dnormed, hidden);
    }
    kernels->rmsnorm_backward(dnormed, job->x + row * job->ld, job->head->norm, s->scales[item], job->dx + row * job->ld, hidden);
}

static void loss_tile(loss_job *job) {
    const ggd_loss_scratch *s = job->scratch;
    tile_logits(job, s->normed, s->normed_int8, s->own.logits);
    ggd_parallel(job->compute->threads, "head softmax", job->n, softmax_item, job);
    if (job->dx != NULL) {
        add_weighted_rows(job, s->own.mean);
    }
    if (has_teacher(job)) {
        tile_logits(job, s->teacher_chunk, s->teacher_int8, s->teacher.logits);
        ggd_parallel(job->compute->threads, "head softmax", job->n, teacher_item, job);
        if (job->dx != NULL) {
            add_weighted_rows(job, s->teacher.mean);
        }
    }
}

static void loss_chunk(loss_job *job) {
    size_t vocab = job->head->head.n_rows;
    ggd_parallel(job->compute->threads, "head", job->n, norm_item, job);
    for (job->first_token = 0; job->first_token < vocab; job->first_token += GGD_LOSS_TOKENS) {
        job->n_tokens = ggd_min(vocab - job->first_token, GGD_LOSS_TOKENS);
        loss_tile(job);
    }
    ggd_parallel(job->compute->threads, "head", job->n, finish_item, job);
}

// Rows with a weight of either kind; outputs of the others are zero.
static size_t choose_rows(const ggd_objective *objective, const ggd_loss_scratch *scratch, size_t m) {
    size_t n_rows = 0;
    for (size_t row = 0; row < m; row++) {
        objective->row_loss[row] = 0;
        objective->row_correct[row] = 0;
        int taught = objective->teacher_tokens != NULL && objective->teacher_weights[row] != 0;
        if (objective->weights[row] != 0 || taught) {
            scratch->rows[n_rows++] = (int32_t)row;
        }
    }
    return n_rows;
}

void ggd_loss_run(const ggd_compute *compute, const ggd_head *head, const ggd_loss_scratch *scratch, size_t m, const float *x,
                  size_t ld, ggd_objective *objective, float *dx) {
    loss_job job = {.compute = compute, .head = head, .scratch = scratch, .ld = ld, .x = x, .objective = objective, .dx = dx};
    size_t n_rows = choose_rows(objective, scratch, m);
    if (dx != NULL) {
        memset(dx, 0, m * ld * sizeof *dx);
    }
    for (size_t first = 0; first < n_rows; first += GGD_LOSS_ROWS) {
        job.rows = scratch->rows + first;
        job.n = ggd_min(n_rows - first, GGD_LOSS_ROWS);
        loss_chunk(&job);
    }
    objective->loss = objective->teacher_loss = 0;
    for (size_t i = 0; i < n_rows; i++) {
        size_t row = (size_t)scratch->rows[i];
        objective->loss += (double)objective->weights[row] * objective->row_loss[row];
        if (has_teacher(&job) && objective->teacher_weights[row] != 0) {
            objective->teacher_loss += (double)objective->teacher_weights[row] * scratch->teacher_loss[row];
        }
    }
}

static void teacher_norm_item(void *context, size_t item, size_t thread) {
    const loss_job *job = context;
    float *buffer = (float *)ggd_scratch(job->compute, thread);
    size_t hidden = job->head->head.n_cols;
    job->compute->kernels->rmsnorm(job->x + item * job->ld, job->head->norm, job->head->rms_eps, buffer, hidden);
    ggd_store_row(job->compute, buffer, job->scratch->teacher_normed, item, 0, hidden);
}

void ggd_keep_teacher(const ggd_compute *compute, const ggd_head *head, const ggd_loss_scratch *scratch, size_t m, const float *x,
                      size_t ld) {
    loss_job job = {.compute = compute, .head = head, .scratch = scratch, .ld = ld, .x = x};
    ggd_parallel(compute->threads, "head", m, teacher_norm_item, &job);
}

static void copy_item(void *context, size_t item, size_t thread) {
    (void)thread;
    const loss_job *job = context;
    float *logits = job->scratch->own.logits + item * GGD_LOSS_TOKENS;
    finish_logits(job, logits);
    memcpy(job->logits + item * job->head->head.n_rows + job->first_token, logits, job->n_tokens * sizeof(float));
}

void ggd_logits_run(const ggd_compute *compute, const ggd_head *head, const ggd_loss_scratch *scratch, size_t n_rows,
                    const int32_t *rows, const float *x, size_t ld, float *logits) {
    loss_job job = {.compute = compute, .head = head, .scratch = scratch, .ld = ld, .x = x};
    size_t vocab = head->head.n_rows;
    for (size_t first = 0; first < n_rows; first += GGD_LOSS_ROWS) {
        job.rows = rows + first;
        job.n = ggd_min(n_rows - first, GGD_LOSS_ROWS);
        job.logits = logits + first * vocab;
        ggd_parallel(compute->threads, "head", job.n, norm_item, &job);
        for (job.first_token = 0; job.first_token < vocab; job.first_token += GGD_LOSS_TOKENS) {
            job.n_tokens = ggd_min(vocab - job.first_token, GGD_LOSS_TOKENS);
            tile_logits(&job, scratch->normed, scratch->normed_int8, scratch->own.logits);
            ggd_parallel(compute->threads, "head", job.n, copy_item, &job);
        }
    }
}
