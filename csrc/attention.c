// attention.c - p_ij proportional to w_ij exp(scale q_i k_j), w = 1 for j <= i and 1 - causal_ratio for a future key j > i, so a
// future score gets log(1 - causal_ratio) added (-inf when fully causal). With the Bernoulli mask a future key is there or not, by a hash. In a
// layer with a window a key at a distance of the window or more is not there, on either side. Where scores are soft-capped, they are before
// the weight joins them. With an attention sink the query at position 0 sees its own key alone, as with a causal mask.
//
// i and j are positions. Where a segment sees rows of a context, its keys are both kinds in one order of their positions, so that what is
// future to a query begins at one key; a context's key at the query's own position, which comes just before it, is not there.
//
// A thread takes one segment and one key/value head with all the query heads that share it. Scores exist for a strip of STRIP_ROWS
// queries at a time, never T x T; the backward computes them again from the saved log-sum-exp (Dao et al. 2022, arXiv:2205.14135):
//   dV = P^T dO,  dP = dO V^T,  dS = scale P (dP - sum(dO O)),  dQ = dS K,  dK = dS^T Q
// dK and dV are summed transposed, (D, T), over all strips and query heads of the group in a fixed order.
#include "attention.h"

#include <math.h>
#include <string.h>

#include "context.h"

enum { STRIP_ROWS = 48 };

typedef struct {
    const ggd_compute *compute;
    const ggd_batch *batch;
    const ggd_heads *heads;
    const ggd_context *kept;  // holds the batch's own keys and values behind its rows, as later calls will see them; or NULL
    ggd_activation qkv, out, dout, dqkv;
    float *lse;
    float scale, future_bias;  // of scores as the softmax takes them (soft-capped ones are scaled already); log(1 - causal_ratio)
} attention_job;

// One thread's scratch for one unit.
typedef struct {
    float *unpacked;
    uint8_t *keys;           // panels of K for S = Q K^T
    uint8_t *values;         // panels of V for O = P V
    uint8_t *values_t;       // panels of V for dP = dO V^T
    uint8_t *keys_w;         // panels of K for dQ = dS K
    uint8_t *strip_panel;    // one panel over the strip's rows
    float *scores;           // (STRIP_ROWS, ld_t): S, then P
    float *dscores;          // (STRIP_ROWS, ld_t): dP, then dS
    uint8_t *strip;          // (STRIP_ROWS, ld_t): P or dS as activation
    float *rows;             // (STRIP_ROWS, ld_d)
    uint8_t *transposed;     // (D, STRIP_ROWS padded): Q^T or dO^T
    float *dkeys, *dvalues;  // (D, ld_t)
    // Of a segment with positions or a context:
    uint8_t *gathered;       // (T, ld_d): keys or values in their order
    int32_t *key_positions;  // (T)
    int32_t *key_rows;       // (T): the segment's row, or -1 - the context's
    int32_t *own_keys;       // (T): the key of each of the segment's rows
    size_t bytes;
} attention_scratch;

static uint8_t *take(uint8_t *base, size_t *offset, size_t bytes) {
    uint8_t *piece = base != NULL ? base + *offset : NULL;
    *offset += ggd_round_up(bytes, 64);
    return piece;
}

static attention_scratch lay_out(uint8_t *base, ggd_element element, size_t head_size, size_t t, int gradients) {
    attention_scratch s;
    size_t bytes = ggd_element_bytes(element), offset = 0;
    size_t ld_t = ggd_round_up(t, GGD_PANEL_COLUMNS), ld_d = ggd_round_up(head_size, GGD_PANEL_COLUMNS);
    size_t ld_strip = ggd_round_up(STRIP_ROWS, GGD_PANEL_COLUMNS);
    s.unpacked = (float *)take(base, &offset, GGD_UNPACKED_FLOATS * sizeof(float));
    s.keys = take(base, &offset, ld_t * ld_d * bytes);
    s.values = take(base, &offset, ld_t * ld_d * bytes);
    s.scores = (float *)take(base, &offset, STRIP_ROWS * ld_t * sizeof(float));
    s.strip = take(base, &offset, STRIP_ROWS * ld_t * bytes);
    s.rows = (float *)take(base, &offset, STRIP_ROWS * ld_d * sizeof(float));
    size_t n = gradients ? 1 : 0;
    s.values_t = take(base, &offset, n * ld_t * ld_d * bytes);
    s.keys_w = take(base, &offset, n * ld_t * ld_d * bytes);
    s.strip_panel = take(base, &offset, n * ld_strip * GGD_PANEL_COLUMNS * bytes);
    s.dscores = (float *)take(base, &offset, n * STRIP_ROWS * ld_t * sizeof(float));
    s.transposed = take(base, &offset, n * ld_d * ld_strip * bytes);
    s.dkeys = (float *)take(base, &offset, n * ld_d * ld_t * sizeof(float));
    s.dvalues = (float *)take(base, &offset, n * ld_d * ld_t * sizeof(float));
    s.gathered = take(base, &offset, t * ld_d * bytes);
    s.key_positions = (int32_t *)take(base, &offset, t * sizeof(int32_t));
    s.key_rows = (int32_t *)take(base, &offset, t * sizeof(int32_t));
    s.own_keys = (int32_t *)take(base, &offset, t * sizeof(int32_t));
    s.bytes = offset;
    return s;
}

size_t ggd_attention_bytes_scratch(ggd_element element, const ggd_heads *heads, size_t max_keys, int gradients) {
    return lay_out(NULL, element, heads->head_size, max_keys, gradients).bytes;
}

// What a thread works on: a segment's rows under one key/value head.
typedef struct {
    const attention_job *job;
    const ggd_segment *segment;
    attention_scratch s;
    size_t rows, t;  // queries, and keys
    size_t ld_t, ld_d, d;
    size_t kv_head, first_head, n_heads;
    int is_merged;  // keys are not just the segment's rows 0, 1, 2 ...
} unit;

// ---- the order of the keys ----

static size_t query_position(const unit *u, size_t row) { return ggd_position(u->job->batch, u->segment, row); }
static size_t key_position(const unit *u, size_t key) { return u->is_merged ? (size_t)u->s.key_positions[key] : key; }
static size_t own_key(const unit *u, size_t row) { return u->is_merged ? (size_t)u->s.own_keys[row] : row; }
static size_t own_row(const unit *u, size_t key) { return u->is_merged ? (size_t)u->s.key_rows[key] : key; }
static int is_own(const unit *u, size_t key) { return !u->is_merged || u->s.key_rows[key] >= 0; }

// Both kinds of rows have rising positions; at equal ones the context's comes first.
static void merge_keys(const unit *u) {
    const int32_t *context_positions = u->t > u->rows ? u->job->batch->context->positions + u->segment->first_context : NULL;
    size_t n_context = u->t - u->rows, own = 0, context = 0;
    for (size_t key = 0; key < u->t; key++) {
        size_t position = own < u->rows ? query_position(u, own) : SIZE_MAX;
        if (context < n_context && (size_t)context_positions[context] <= position) {
            u->s.key_positions[key] = context_positions[context];
            u->s.key_rows[key] = -1 - (u->segment->first_context + (int32_t)context++);
        } else {
            u->s.key_positions[key] = (int32_t)position;
            u->s.key_rows[key] = (int32_t)own;
            u->s.own_keys[own++] = (int32_t)key;
        }
    }
}

static unit unit_of(const attention_job *job, size_t item, size_t thread, int gradients) {
    const ggd_heads *heads = job->heads;
    unit u = {.job = job, .segment = &job->batch->segments[item / heads->n_kv_heads], .kv_head = item % heads->n_kv_heads};
    u.rows = (size_t)u.segment->n_rows;
    u.t = u.rows + (size_t)u.segment->n_context;
    u.d = heads->head_size;
    u.ld_t = ggd_round_up(u.t, GGD_PANEL_COLUMNS);
    u.ld_d = ggd_round_up(u.d, GGD_PANEL_COLUMNS);
    u.n_heads = heads->n_heads / heads->n_kv_heads;
    u.first_head = u.kv_head * u.n_heads;
    u.s = lay_out(ggd_scratch(job->compute, thread), job->compute->element, u.d, u.t, gradients);
    u.is_merged = job->batch->positions != NULL || u.segment->n_context > 0;
    if (u.is_merged) {
        merge_keys(&u);
    }
    return u;
}

// The unit's keys or values (T, D) as an operand.
static ggd_matrix keys_or_values(const unit *u, ggd_context_part part) {
    const attention_job *job = u->job;
    ggd_element element = job->compute->element;
    size_t column = part == GGD_CONTEXT_KEYS ? job->heads->k_column : job->heads->v_column;
    size_t first = (size_t)u->segment->first_row, bytes = u->d * ggd_element_bytes(element);
    ggd_activation own = {ggd_activation_at(job->qkv, first, column + u->kv_head * u->d, element), job->qkv.ld};
    if (u->t == u->rows && job->kept == NULL) {
        return ggd_matrix_of(own, u->t, u->d, element);
    }
    ggd_activation gathered = {u->s.gathered, u->ld_d};
    for (size_t key = 0; key < u->t; key++) {
        void *target = ggd_activation_at(gathered, key, 0, element);
        const ggd_context *context = is_own(u, key) ? job->kept : job->batch->context;
        if (context == NULL) {
            memcpy(target, ggd_activation_at(own, own_row(u, key), 0, element), bytes);
        } else {
            size_t row = is_own(u, key) ? context->n_rows + first + own_row(u, key) : (size_t)(-1 - u->s.key_rows[key]);
            ggd_context_load(context, job->compute, job->heads->layer, part, row, u->kv_head * u->d, u->d, u->s.unpacked, target);
        }
    }
    return ggd_matrix_of(gathered, u->t, u->d, element);
}

static void pack_all(const unit *u, ggd_operation operation, const ggd_matrix *w, uint8_t *panels) {
    const ggd_compute *compute = u->job->compute;
    size_t columns = operation == GGD_TIMES_WT ? w->n_rows : w->n_cols;
    size_t reduction = operation == GGD_TIMES_WT ? w->n_cols : w->n_rows;
    size_t bytes_panel = ggd_panel_bytes(compute->element, reduction);
    for (size_t column = 0; column < columns; column += GGD_PANEL_COLUMNS) {
        ggd_pack_panel(compute, operation, w, column, 1.0f, u->s.unpacked, panels + column / GGD_PANEL_COLUMNS * bytes_panel);
    }
}

// C (rows, columns) = init + A P over packed panels, reduction k.
static void multiply(const unit *u, size_t rows, size_t columns, const void *a, size_t ld_a, size_t k, const uint8_t *panels,
                     const float *init, float *c, size_t ld_c) {
    const ggd_compute *compute = u->job->compute;
    size_t k_panel = ggd_panel_k(compute->element, k);
    size_t bytes_panel = ggd_panel_bytes(compute->element, k);
    for (size_t column = 0; column < columns; column += GGD_PANEL_COLUMNS) {
        ggd_tile tile = {.a1 = a,
                         .ld_a1 = ld_a,
                         .k1 = k_panel,
                         .panel = panels + column / GGD_PANEL_COLUMNS * bytes_panel,
                         .init = init != NULL ? init + column : NULL,
                         .ld_init = ld_c,
                         .c = c + column,
                         .ld_c = ld_c,
                         .c_element = GGD_ELEMENT_F32};
        ggd_multiply_panel(compute, rows, &tile);
    }
}

// Uniform in [0, 1) from (seed, i, j): the splitmix64 finaliser (Steele et al. 2014).
static float pattern(uint64_t seed, uint64_t i, uint64_t j) {
    uint64_t x = seed + 0x9E3779B97F4A7C15u * (((i << 32) | j) + 1);
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    x ^= x >> 31;
    return (float)(x >> 40) / 16777216.0f;
}

// Keys [first, end) that a strip can see at all; `first` begins a panel. Scores and gradients of others do not exist.
typedef struct {
    size_t first, end;
} key_range;

static key_range visible_keys(const unit *u, size_t first, size_t rows) {
    size_t window = u->job->heads->window, last = first + rows - 1;
    key_range keys = {0, u->job->batch->causal_ratio >= 1.0f ? own_key(u, last) + 1 : u->t};
    if (window > 0) {
        while (key_position(u, keys.first) + window <= query_position(u, first)) {
            keys.first++;
        }
        keys.first = keys.first / GGD_PANEL_COLUMNS * GGD_PANEL_COLUMNS;
        while (key_position(u, keys.end - 1) >= query_position(u, last) + window) {
            keys.end--;
        }
    }
    return keys;
}

// Takes away the keys that a query does not see: its own position's in the context, outside of its window, all that is behind an attention
// sink, or by the Bernoulli pattern.
static void hide_keys(const unit *u, size_t row, key_range keys, float *scores) {
    const ggd_batch *batch = u->job->batch;
    size_t window = u->job->heads->window, query = query_position(u, row), own = own_key(u, row);
    if (own > 0 && key_position(u, own - 1) == query) {
        scores[own - 1] = -INFINITY;
    }
    for (size_t key = keys.first; window > 0 && key_position(u, key) + window <= query; key++) {
        scores[key] = -INFINITY;
    }
    for (size_t key = keys.end; window > 0 && key > own + 1 && key_position(u, key - 1) >= query + window; key--) {
        scores[key - 1] = -INFINITY;
    }
    for (size_t key = own + 1; batch->attention_sink && query == 0 && key < keys.end; key++) {
        scores[key] = -INFINITY;
    }
    uint64_t first = (uint64_t)u->segment->first_position;
    for (size_t key = own + 1; batch->bernoulli && key < keys.end; key++) {
        if (!(pattern(batch->bernoulli_seed, first + query, first + key_position(u, key)) < 1.0f - batch->causal_ratio)) {
            scores[key] = -INFINITY;
        }
    }
}

// Panels of keys from `first` on, of a reduction of k.
static const uint8_t *panels_from(const unit *u, const uint8_t *panels, size_t first, size_t k) {
    return panels + first / GGD_PANEL_COLUMNS * ggd_panel_bytes(u->job->compute->element, k);
}

static void strip_scores(const unit *u, size_t head, size_t first, size_t rows, key_range keys) {
    const ggd_compute *compute = u->job->compute;
    const ggd_heads *heads = u->job->heads;
    const void *queries = ggd_activation_at(u->job->qkv, (size_t)u->segment->first_row + first, head * u->d, compute->element);
    multiply(u, rows, keys.end - keys.first, queries, u->job->qkv.ld, u->d, panels_from(u, u->s.keys, keys.first, u->d), NULL,
             u->s.scores + keys.first, u->ld_t);
    for (size_t i = 0; i < rows; i++) {
        float *scores = u->s.scores + i * u->ld_t;
        if (heads->score_cap > 0) {
            compute->kernels->soft_cap(scores + keys.first, heads->score_scale, heads->score_cap, keys.end - keys.first);
        }
        hide_keys(u, first + i, keys, scores);
    }
}

// The strip as left operand of a product over keys: converted, with a zero after an odd row for the pairs.
static const void *strip_activation(const unit *u, float *values, size_t rows, key_range keys) {
    const ggd_compute *compute = u->job->compute;
    if (compute->element == GGD_ELEMENT_F32) {
        return values + keys.first;
    }
    for (size_t i = 0; i < rows; i++) {
        uint16_t *target = (uint16_t *)u->s.strip + i * u->ld_t;
        compute->kernels->to_bf16(values + i * u->ld_t + keys.first, target + keys.first, keys.end - keys.first);
        if (keys.end % 2 != 0) {
            target[keys.end] = 0;
        }
    }
    return (uint16_t *)u->s.strip + keys.first;
}

// rows (STRIP_ROWS, D) = strip (rows, keys) * panels whose reduction is over all t keys.
static void multiply_over_keys(const unit *u, size_t rows, const void *strip, key_range keys, const uint8_t *panels) {
    ggd_element element = u->job->compute->element;
    // A strip begins at its first key in each panel, and ends early.
    const uint8_t *panel = panels + keys.first * GGD_PANEL_COLUMNS * ggd_element_bytes(element);
    for (size_t column = 0; column < u->d; column += GGD_PANEL_COLUMNS, panel += ggd_panel_bytes(element, u->t)) {
        multiply(u, rows, GGD_PANEL_COLUMNS, strip, u->ld_t, keys.end - keys.first, panel, NULL, u->s.rows + column, u->ld_d);
    }
}

// ---- forward ----

static void forward_strip(const unit *u, size_t head, size_t first) {
    const attention_job *job = u->job;
    const ggd_compute *compute = job->compute;
    size_t rows = ggd_min(u->rows - first, STRIP_ROWS), first_row = (size_t)u->segment->first_row + first;
    key_range keys = visible_keys(u, first, rows);
    strip_scores(u, head, first, rows, keys);
    for (size_t i = 0; i < rows; i++) {
        float *scores = u->s.scores + i * u->ld_t + keys.first;
        size_t n = keys.end - keys.first, n_past = own_key(u, first + i) + 1 - keys.first;
        if (job->batch->causal_ratio >=
            1.0f) {  // summed as if the row came alone: a text has the same bits in whatever pieces it is read
            memset(scores + n_past, 0, (n - n_past) * sizeof *scores);
            n = n_past;
        }
        job->lse[(first_row + i) * job->heads->n_heads + head] =
            compute->kernels->attention_softmax(scores, n, n_past, job->scale, job->future_bias);
    }
    multiply_over_keys(u, rows, strip_activation(u, u->s.scores, rows, keys), keys, u->s.values);
    for (size_t i = 0; i < rows; i++) {
        ggd_store_row(compute, u->s.rows + i * u->ld_d, job->out, first_row + i, head * u->d, u->d);
    }
}

static void forward_item(void *context, size_t item, size_t thread) {
    const attention_job *job = context;
    unit u = unit_of(job, item, thread, 0);
    ggd_matrix keys = keys_or_values(&u, GGD_CONTEXT_KEYS);
    pack_all(&u, GGD_TIMES_WT, &keys, u.s.keys);
    ggd_matrix values = keys_or_values(&u, GGD_CONTEXT_VALUES);
    pack_all(&u, GGD_TIMES_W, &values, u.s.values);
    for (size_t head = u.first_head; head < u.first_head + u.n_heads; head++) {
        for (size_t first = 0; first < u.rows; first += STRIP_ROWS) {
            forward_strip(&u, head, first);
        }
    }
}

static float future_bias(const ggd_batch *batch) { return batch->bernoulli ? 0.0f : logf(1.0f - batch->causal_ratio); }

static size_t n_units(const ggd_batch *batch, const ggd_heads *heads) { return (size_t)batch->n_segments * heads->n_kv_heads; }

void ggd_attention_forward(const ggd_compute *compute, const ggd_batch *batch, const ggd_heads *heads, const ggd_context *kept,
                           ggd_activation qkv, ggd_activation out, float *lse) {
    attention_job job = {.compute = compute,
                         .batch = batch,
                         .heads = heads,
                         .kept = kept,
                         .qkv = qkv,
                         .out = out,
                         .lse = lse,
                         .scale = heads->score_cap > 0 ? 1.0f : heads->score_scale,
                         .future_bias = future_bias(batch)};
    ggd_parallel(compute->threads, "attention forward", n_units(batch, heads), forward_item, &job);
}

// ---- backward ----

// (D, rows) from the strip's rows of one head, padded to an even number of columns.
static void transpose_strip(const unit *u, ggd_activation x, size_t column, size_t first, size_t rows) {
    size_t ld = ggd_round_up(STRIP_ROWS, GGD_PANEL_COLUMNS);
    for (size_t i = 0; i < ggd_round_up(rows, 2); i++) {
        const void *source = ggd_activation_at(x, (size_t)u->segment->first_row + first + i, column, u->job->compute->element);
        for (size_t d = 0; d < u->d; d++) {
            if (u->job->compute->element == GGD_ELEMENT_BF16) {
                ((uint16_t *)u->s.transposed)[d * ld + i] = i < rows ? ((const uint16_t *)source)[d] : 0;
            } else {
                ((float *)u->s.transposed)[d * ld + i] = i < rows ? ((const float *)source)[d] : 0.0f;
            }
        }
    }
}

static int has_own_key(const unit *u, size_t first) {
    for (size_t key = first; key < ggd_min(first + GGD_PANEL_COLUMNS, u->t); key++) {
        if (is_own(u, key)) {
            return 1;
        }
    }
    return 0;
}

// target (D, keys) += transposed (D, rows) * strip (rows, keys), in the panels that have keys of the segment itself: a context gets no gradients.
static void add_transposed_product(const unit *u, const float *strip, size_t rows, key_range keys, float *target) {
    const ggd_compute *compute = u->job->compute;
    size_t ld = ggd_round_up(STRIP_ROWS, GGD_PANEL_COLUMNS);
    for (size_t key = keys.first; key < keys.end; key += GGD_PANEL_COLUMNS) {
        if (!has_own_key(u, key)) {
            continue;
        }
        compute->kernels->pack_rows[compute->element](strip + key, u->ld_t, rows, 1.0f, u->s.strip_panel);
        multiply(u, u->d, GGD_PANEL_COLUMNS, u->s.transposed, ld, rows, u->s.strip_panel, target + key, target + key, u->ld_t);
    }
}

// The kernel on one query's scores, and the derivative of their soft cap where they have one. That one needs the scores, which
// become P in place, so it goes by pieces.
static void score_gradient(const unit *u, float *p, float *dp, key_range keys, size_t first_future, float lse, float delta) {
    enum { SCORES = 1024 };
    const attention_job *job = u->job;
    const ggd_kernels *kernels = job->compute->kernels;
    float cap = job->heads->score_cap, capped[SCORES];
    size_t step = cap > 0 ? SCORES : keys.end - keys.first;
    for (size_t key = keys.first; key < keys.end; key += step) {
        size_t n = ggd_min(step, keys.end - key), future = first_future > key ? ggd_min(first_future - key, n) : 0;
        if (cap > 0) {
            memcpy(capped, p + key, n * sizeof *capped);
        }
        kernels->attention_gradient(p + key, dp + key, n, future, job->scale, job->future_bias, lse, delta);
        if (cap > 0) {
            for (size_t i = 0; i < n; i++) {
                capped[i] = p[key + i] > 0 ? capped[i] : 0;  // a hidden key's score is no number to square
            }
            kernels->soft_cap_backward(capped, cap, dp + key, n);
            kernels->scale(dp + key, job->heads->score_scale, n);
        }
    }
}

// dS of the strip from P and dP; columns up to whole panels to zero, because panels of them are multiplied.
static void strip_gradient(const unit *u, size_t head, size_t first, size_t rows, key_range keys) {
    const attention_job *job = u->job;
    float *buffer = u->s.unpacked;
    size_t pad = ggd_round_up(keys.end, GGD_PANEL_COLUMNS) - keys.end;
    for (size_t i = 0; i < rows; i++) {
        size_t row = (size_t)u->segment->first_row + first + i;
        float *p = u->s.scores + i * u->ld_t, *dp = u->s.dscores + i * u->ld_t;
        const float *out = ggd_load_row(job->compute, job->out, row, head * u->d, u->d, buffer);
        const float *dout = ggd_load_row(job->compute, job->dout, row, head * u->d, u->d, buffer + u->d);
        float delta = job->compute->kernels->dot(out, dout, u->d);
        score_gradient(u, p, dp, keys, own_key(u, first + i) + 1, job->lse[row * job->heads->n_heads + head], delta);
        memset(p + keys.end, 0, pad * sizeof *p);
        memset(dp + keys.end, 0, pad * sizeof *dp);
    }
}

static void store_query_gradient(const unit *u, size_t head, size_t first, size_t rows) {
    for (size_t i = 0; i < rows; i++) {
        float *dq = u->s.rows + i * u->ld_d;
        float scale = ggd_query_scale(u->job->heads, query_position(u, first + i));
        if (scale != 1.0f) {
            u->job->compute->kernels->scale(dq, scale, u->d);
        }
        ggd_rotate(u->job->compute->kernels, u->job->heads, u->segment, query_position(u, first + i), -1.0f, 1, dq);
        ggd_store_row(u->job->compute, dq, u->job->dqkv, (size_t)u->segment->first_row + first + i, head * u->d, u->d);
    }
}

static void backward_strip(const unit *u, size_t head, size_t first) {
    const attention_job *job = u->job;
    size_t rows = ggd_min(u->rows - first, STRIP_ROWS), first_row = (size_t)u->segment->first_row + first;
    key_range keys = visible_keys(u, first, rows);
    strip_scores(u, head, first, rows, keys);
    const void *dout = ggd_activation_at(job->dout, first_row, head * u->d, job->compute->element);
    multiply(u, rows, keys.end - keys.first, dout, job->dout.ld, u->d, panels_from(u, u->s.values_t, keys.first, u->d), NULL,
             u->s.dscores + keys.first, u->ld_t);
    strip_gradient(u, head, first, rows, keys);
    transpose_strip(u, job->dout, head * u->d, first, rows);
    add_transposed_product(u, u->s.scores, rows, keys, u->s.dvalues);
    transpose_strip(u, job->qkv, head * u->d, first, rows);
    add_transposed_product(u, u->s.dscores, rows, keys, u->s.dkeys);
    multiply_over_keys(u, rows, strip_activation(u, u->s.dscores, rows, keys), keys, u->s.keys_w);
    store_query_gradient(u, head, first, rows);
}

// dK (rotated back) and dV of the unit from their transposed sums.
static void store_key_value_gradients(const unit *u) {
    const attention_job *job = u->job;
    const ggd_heads *heads = job->heads;
    float *row = u->s.unpacked;
    for (size_t i = 0; i < u->rows; i++) {
        size_t target = (size_t)u->segment->first_row + i, key = own_key(u, i);
        for (size_t d = 0; d < u->d; d++) {
            row[d] = u->s.dkeys[d * u->ld_t + key];
        }
        ggd_rotate(job->compute->kernels, heads, u->segment, query_position(u, i), -1.0f, 1, row);
        ggd_store_row(job->compute, row, job->dqkv, target, heads->k_column + u->kv_head * u->d, u->d);
        for (size_t d = 0; d < u->d; d++) {
            row[d] = u->s.dvalues[d * u->ld_t + key];
        }
        ggd_store_row(job->compute, row, job->dqkv, target, heads->v_column + u->kv_head * u->d, u->d);
    }
}

static void backward_item(void *context, size_t item, size_t thread) {
    const attention_job *job = context;
    unit u = unit_of(job, item, thread, 1);
    ggd_matrix keys = keys_or_values(&u, GGD_CONTEXT_KEYS);
    pack_all(&u, GGD_TIMES_WT, &keys, u.s.keys);
    pack_all(&u, GGD_TIMES_W, &keys, u.s.keys_w);
    ggd_matrix values = keys_or_values(&u, GGD_CONTEXT_VALUES);
    pack_all(&u, GGD_TIMES_WT, &values, u.s.values_t);
    memset(u.s.dkeys, 0, u.d * u.ld_t * sizeof(float));
    memset(u.s.dvalues, 0, u.d * u.ld_t * sizeof(float));
    for (size_t head = u.first_head; head < u.first_head + u.n_heads; head++) {
        for (size_t first = 0; first < u.rows; first += STRIP_ROWS) {
            backward_strip(&u, head, first);
        }
    }
    store_key_value_gradients(&u);
}

void ggd_attention_backward(const ggd_compute *compute, const ggd_batch *batch, const ggd_heads *heads, ggd_activation qkv,
                            ggd_activation out, const float *lse, ggd_activation dout, ggd_activation dqkv) {
    attention_job job = {.compute = compute,
                         .batch = batch,
                         .heads = heads,
                         .qkv = qkv,
                         .out = out,
                         .dout = dout,
                         .dqkv = dqkv,
                         .lse = (float *)lse,
                         .scale = heads->score_cap > 0 ? 1.0f : heads->score_scale,
                         .future_bias = future_bias(batch)};
    ggd_parallel(compute->threads, "attention backward", n_units(batch, heads), backward_item, &job);
}
