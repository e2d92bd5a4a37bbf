// session.c - plans memory before taking it: one function lays all buffers out, once without memory to count the bytes and once in
// the arena. After the first call of a size nothing is allocated any more.
#include "session.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "attention.h"
#include "error.h"

enum { ALIGNMENT = 64, MAX_THREADS = 1024, HUGE_PAGE = 2 << 20 };

typedef struct {
    uint8_t *base;  // NULL: count only
    size_t offset;
} arena;

static void *take(arena *a, size_t count, size_t bytes) {
    void *piece = a->base != NULL ? a->base + a->offset : NULL;
    a->offset += ggd_round_up(count * bytes, ALIGNMENT);
    return piece;
}

static ggd_activation take_activation(arena *a, ggd_element element, size_t rows, size_t ld) {
    return (ggd_activation){take(a, rows * ld, ggd_element_bytes(element)), ld};
}

static size_t panel_multiple(size_t n) { return ggd_round_up(n, GGD_PANEL_COLUMNS); }

// Row stride of activations with n columns. Rows whole 2 KiB apart would fall into a few sets of the first-level cache and push each
// other out of it, in the midst of a tile.
static size_t row_stride(size_t n) {
    size_t ld = panel_multiple(n);
    return ld % 512 == 0 ? ld + GGD_PANEL_COLUMNS : ld;
}

// Beside float32 too, where the set's fast element is that; the reference is there to be compared with, in float32.
static int has_int8(const ggd_session *s) {
    return s->is_fast && s->compute.kernels->int8_tile != NULL && s->compute.kernels != &ggd_kernels_reference;
}

// Row stride of what a norm reads; 0 where the model does not have that norm.
static size_t norm_stride(const ggd_session *s, int norm) {
    int always = norm == GGD_NORM_ATTN || norm == GGD_NORM_FFN;  // without a norm the block still reads the residual stream
    if (!always && s->model->layers[0].norms[norm] == NULL) {
        return 0;
    }
    return norm == GGD_NORM_Q ? s->ld_queries : norm == GGD_NORM_K ? s->ld_keys : s->ld_hidden;
}

// Room for what the backward of a norm needs.
static void take_norm(const ggd_session *s, arena *a, const ggd_capacity *c, int norm, ggd_layer_activations *layer) {
    size_t ld = norm_stride(s, norm), m = c->n_rows;
    size_t heads = norm == GGD_NORM_Q ? s->heads.n_heads : norm == GGD_NORM_K ? s->heads.n_kv_heads : 1;
    if (ld > 0) {
        layer->saved[norm] = take_activation(a, s->compute.element, c->gradients ? m : 0, ld);
        layer->norm_scales[norm] = take(a, m * heads, sizeof(float));
    }
}

// The parts of a layer that a policy computes again share one buffer among the layers.
static void lay_out_layers(const ggd_session *s, arena *a, const ggd_capacity *c, ggd_buffers *b) {
    const ggd_shape *shape = &s->model->shape;
    size_t m = c->n_rows, n_layers = (size_t)shape->n_layers, ld_rank = panel_multiple(c->max_rank);
    int keep = c->gradients ? c->keep : GGD_KEEP_BOUNDARIES;
    ggd_element e = s->compute.element;
    ggd_layer_activations shared = {0};
    for (size_t l = 0; l < n_layers; l++) {
        ggd_layer_activations layer = shared;
        if (l == 0 || keep != GGD_KEEP_BOUNDARIES) {
            layer.qkv = take_activation(a, e, m, s->ld_qkv);
            layer.attn_out = take_activation(a, e, m, s->ld_queries);
            layer.lse = take(a, m * (size_t)shape->n_heads, sizeof(float));
            for (int target = 0; target < GGD_N_TARGETS; target++) {
                layer.p[target] = take_activation(a, e, c->max_rank > 0 ? m : 0, ld_rank);
            }
            const int norms[] = {GGD_NORM_ATTN, GGD_NORM_ATTN_POST, GGD_NORM_FFN_POST, GGD_NORM_Q, GGD_NORM_K};
            for (size_t i = 0; i < sizeof norms / sizeof *norms; i++) {
                take_norm(s, a, c, norms[i], &layer);
            }
        }
        if (l == 0 || keep == GGD_KEEP_ALL) {
            take_norm(s, a, c, GGD_NORM_FFN, &layer);
            layer.gate = take_activation(a, e, m, s->ld_ffn);
            layer.up = take_activation(a, e, m, s->ld_ffn);
        }
        if (b->layers != NULL) {
            b->layers[l] = layer;
        }
        shared = layer;
    }
    for (size_t l = 0; !c->gradients && b->layers != NULL && l < n_layers; l++) {
        for (int norm = 0; norm < GGD_N_NORMS; norm++) {
            b->layers[l].saved[norm].data = NULL;
        }
    }
}

static size_t widest_operand(const ggd_session *s) { return ggd_max(s->ld_ffn, ggd_max(s->ld_hidden, s->ld_queries)); }

static ggd_int8_rows take_int8(const ggd_session *s, arena *a, size_t rows, size_t n) {
    size_t count = has_int8(s) ? rows * ggd_int8_ld(n) : 0;
    ggd_int8_rows taken = {.quants = take(a, count, 1)};
    taken.scales = take(a, count / GGD_INT8_FORWARD_BLOCK, sizeof(float));
    taken.sums = take(a, count / GGD_INT8_FORWARD_BLOCK, sizeof(float));
    return taken;
}

// What only a layer's backward uses, between two layers.
static void lay_out_layer_backward(const ggd_session *s, arena *a, const ggd_capacity *c, ggd_buffers *b) {
    size_t m = c->gradients ? c->n_rows : 0, ld_rank = panel_multiple(c->max_rank), widest = widest_operand(s);
    ggd_element e = s->compute.element;
    size_t begin = a->offset, end;  // the feed-forward block is done when the attention block begins
    b->dgate = take_activation(a, e, m, s->ld_ffn);
    end = a->offset;
    a->offset = begin;
    b->dqkv = take_activation(a, e, m, s->ld_qkv);
    a->offset = ggd_max(end, a->offset);
    b->linear.q = take_activation(a, e, c->max_rank > 0 ? m : 0, ld_rank);
    b->linear.transposed = take_activation(a, e, m > 0 ? ld_rank : 0, panel_multiple(m + 1));
    b->linear.product = take(a, m > 0 ? ld_rank * widest : 0, sizeof(float));
    b->linear.ld_product = widest;
}

static void lay_out_softmax(arena *a, size_t rows, size_t gradient_rows, size_t ld, ggd_online_softmax *softmax) {
    softmax->logits = take(a, rows * GGD_LOSS_TOKENS, sizeof(float));
    softmax->largest = take(a, rows, sizeof(float));
    softmax->sum = take(a, rows, sizeof(double));
    softmax->mean = take(a, gradient_rows * ld, sizeof(float));
}

static void lay_out_loss(const ggd_session *s, arena *a, const ggd_capacity *c, ggd_buffers *b) {
    size_t rows = ggd_min(c->n_rows, GGD_LOSS_ROWS), teacher = c->teacher ? 1 : 0;
    size_t gradient_rows = c->gradients ? rows : 0;
    ggd_element e = s->compute.element;
    b->loss.normed = b->normed;
    b->loss.scales = take(a, rows, sizeof(float));
    b->loss.weights = take_activation(a, e, gradient_rows, GGD_LOSS_TOKENS);
    b->loss.target_logit = take(a, rows, sizeof(float));
    b->loss.rows = take(a, c->n_rows, sizeof(int32_t));
    b->loss.ld = s->ld_hidden;
    lay_out_softmax(a, rows, gradient_rows, s->ld_hidden, &b->loss.own);
    b->normed_int8 = b->int8;
    b->teacher_int8 = take_int8(s, a, teacher * rows, s->ld_hidden);
    ggd_int8_set_strides(&b->normed_int8, s->ld_hidden, GGD_INT8_FORWARD_BLOCK);
    ggd_int8_set_strides(&b->teacher_int8, s->ld_hidden, GGD_INT8_FORWARD_BLOCK);
    b->weights_int8 = take_int8(s, a, gradient_rows, GGD_LOSS_TOKENS);
    b->weights_int8.is_unsigned = 1;  // exponentials; the few large ones among many small ones need each bit
    b->loss.teacher_chunk = take_activation(a, e, teacher * rows, s->ld_hidden);
    b->loss.cross = take(a, teacher * rows, sizeof(double));
    b->loss.teacher_loss = take(a, teacher * c->n_rows, sizeof(double));
    lay_out_softmax(a, teacher * rows, teacher * gradient_rows, s->ld_hidden, &b->loss.teacher);
}

static size_t thread_scratch_bytes(const ggd_session *s, const ggd_capacity *c) {
    size_t block = 1, reduction = widest_operand(s) + c->max_rank;
    for (int32_t l = 0; l < s->model->shape.n_layers; l++) {
        for (int target = 0; target < GGD_N_TARGETS; target++) {
            block = ggd_max(s->model->layers[l].linear[target].w.block, block);
        }
    }
    block = ggd_max(s->model->head.block, block);
    size_t bytes = ggd_gemm_bytes_scratch(s->compute.element, ggd_max(GGD_LOSS_TOKENS, reduction), block);
    // LoRA gradients reduce over all rows, with operands that have no blocks.
    size_t rows = ggd_gemm_bytes_scratch(s->compute.element, c->gradients ? c->n_rows : 0, 1);
    size_t attention = ggd_attention_bytes_scratch(s->compute.element, &s->heads, c->max_keys, c->gradients);
    size_t row = ggd_max(ggd_max(s->ld_qkv, s->ld_hidden) + s->ld_hidden, 3 * s->ld_queries) * sizeof(float);
    return ggd_round_up(ggd_max(ggd_max(rows, bytes), ggd_max(attention, row)), 4096);
}

// The own buffers of the forward's two blocks, of the loss and of the backward share one piece of memory: none of them is read once the
// next is written.
// (Where activations are in pairs their rows have no padding to be zero: quantised types come in blocks of 32.)
static void lay_out_phases(const ggd_session *s, arena *a, const ggd_capacity *c, ggd_buffers *b) {
    size_t begin = a->offset, end;
    b->before_rope = take(a, c->n_rows * s->ld_queries, sizeof(float));
    end = a->offset;
    a->offset = begin;
    b->h = take_activation(a, s->compute.element, c->n_rows, s->ld_ffn);
    // The feed-forward block is written while h is read; the attention block when before_rope is done.
    b->block = take(a, s->model->blocks_apart ? c->n_rows * s->ld_hidden : 0, sizeof(float));
    end = ggd_max(end, a->offset);
    a->offset = begin;
    lay_out_loss(s, a, c, b);
    end = ggd_max(end, a->offset);
    a->offset = begin;
    lay_out_layer_backward(s, a, c, b);
    a->offset = ggd_max(end, a->offset);
}

// (L) copies of the residual stream under the given policy, else NULL.
static float **take_copies(const ggd_session *s, arena *a, const ggd_capacity *c, int keep) {
    if (!c->gradients || c->keep != keep) {
        return NULL;
    }
    size_t n_layers = (size_t)s->model->shape.n_layers;
    float **copies = take(a, n_layers, sizeof *copies);
    for (size_t l = 0; l < n_layers; l++) {
        float *copy = take(a, c->n_rows * s->ld_hidden, sizeof *copy);
        if (copies != NULL) {
            copies[l] = copy;
        }
    }
    return copies;
}

static size_t lay_out(const ggd_session *s, void *base, const ggd_capacity *c, ggd_buffers *b, size_t *bytes_thread) {
    const ggd_shape *shape = &s->model->shape;
    size_t n_layers = (size_t)shape->n_layers;
    arena a = {base, 0};
    *b = (ggd_buffers){0};
    b->layers = take(&a, n_layers, sizeof *b->layers);
    b->pairs = take(&a, n_layers * GGD_N_TARGETS, sizeof *b->pairs);
    size_t bytes_x = s->ld_hidden * sizeof(float), bytes_attn_out = s->ld_queries * ggd_element_bytes(s->compute.element);
    b->x = take(&a, c->n_rows, ggd_max(bytes_x, bytes_attn_out));
    b->normed = take_activation(&a, s->compute.element, c->n_rows, s->ld_hidden);
    // A layer's backward does not read the residual stream. Its place has the gradient of the attention's output, and when that is
    // done the gradient of what a norm made; and what a norm made is needed only once the block's dx has been read.
    b->dattn_out = (ggd_activation){b->x, s->ld_queries};
    b->dnormed = b->x;
    b->dx_activation = b->normed;
    b->boundaries = take_copies(s, &a, c, GGD_KEEP_BOUNDARIES);
    b->middles = take_copies(s, &a, c, GGD_KEEP_WITHOUT_FFN);
    lay_out_layers(s, &a, c, b);
    for (int rope = 0; rope < GGD_N_ROPES; rope++) {
        size_t n = s->model->ropes[rope].frequencies != NULL ? c->max_positions * (s->model->n_rotated / 2) : 0;
        b->cosine[rope] = take(&a, n, sizeof(float));
        b->sine[rope] = take(&a, n, sizeof(float));
    }
    b->int8 = take_int8(s, &a, c->n_rows, widest_operand(s));
    b->dx = take(&a, c->gradients ? c->n_rows * s->ld_hidden : 0, sizeof(float));
    b->loss.teacher_normed = take_activation(&a, s->compute.element, c->teacher ? c->n_rows : 0, s->ld_hidden);
    lay_out_phases(s, &a, c, b);
    *bytes_thread = thread_scratch_bytes(s, c);
    b->thread_scratch = take(&a, (size_t)s->options.n_threads * *bytes_thread, 1);
    return a.offset;
}

static void fill_rope_tables(ggd_session *s, size_t n_positions) {
    size_t half = s->model->n_rotated / 2;
    for (int kind = 0; kind < GGD_N_ROPES; kind++) {
        const ggd_rope *rope = &s->model->ropes[kind];
        for (size_t i = 0; rope->frequencies != NULL && i < n_positions * half; i++) {
            double angle = (double)(i / half) * rope->frequencies[i % half];
            s->buffers.cosine[kind][i] = (float)cos(angle) * rope->magnitude;
            s->buffers.sine[kind][i] = (float)sin(angle) * rope->magnitude;
        }
    }
}

static void bind_int8(ggd_session *s) {
    int backward = s->int8 >= GGD_INT8_BACKWARD;
    s->buffers.loss.normed_int8 = s->int8 == GGD_INT8_BOTH ? &s->buffers.normed_int8 : NULL;
    s->buffers.loss.teacher_int8 = s->int8 == GGD_INT8_BOTH ? &s->buffers.teacher_int8 : NULL;
    s->buffers.loss.weights_int8 = backward ? &s->buffers.weights_int8 : NULL;
    s->buffers.linear.dy_int8 = backward ? &s->buffers.int8 : NULL;
}

// Every pass goes through all of the arena: with pages of 4 KiB it would mostly wait for their addresses.
static void ask_for_huge_pages(void *memory, size_t bytes) {
#ifdef MADV_HUGEPAGE
    (void)madvise(memory, bytes, MADV_HUGEPAGE);  // a wish; nothing depends on it
#else
    (void)memory;
    (void)bytes;
#endif
}

int ggd_session_reserve(ggd_session *s, const ggd_capacity *wanted) {
    const ggd_capacity *have = &s->capacity;
    if (s->arena != NULL && wanted->n_rows <= have->n_rows && wanted->max_keys <= have->max_keys &&
        wanted->max_positions <= have->max_positions && wanted->max_rank <= have->max_rank &&
        wanted->gradients <= have->gradients && wanted->teacher <= have->teacher && wanted->keep == have->keep) {
        return 0;
    }
    // A first call with gradients lays everything out anew: what went before (a check, a measure) may have been longer.
    const ggd_capacity none = {0};
    have = wanted->gradients > have->gradients ? &none : have;
    ggd_capacity grown = {.n_rows = ggd_max(wanted->n_rows, have->n_rows),
                          .max_keys = ggd_max(wanted->max_keys, have->max_keys),
                          .max_positions = ggd_max(wanted->max_positions, have->max_positions),
                          .max_rank = ggd_max(wanted->max_rank, have->max_rank),
                          .gradients = wanted->gradients || have->gradients,
                          .teacher = wanted->teacher || have->teacher,
                          .keep = wanted->keep};
    free(s->arena);
    s->arena = NULL;
    s->capacity = (ggd_capacity){0};
    size_t bytes = lay_out(s, NULL, &grown, &s->buffers, &s->compute.bytes_scratch);
    s->arena = aligned_alloc(HUGE_PAGE, ggd_round_up(bytes, HUGE_PAGE));
    if (s->arena == NULL) {
        return ggd_fail("out of memory: a call of %zu rows needs %zu MiB", grown.n_rows, bytes >> 20);
    }
    ask_for_huge_pages(s->arena, bytes);
    // Pad columns of activations are read as parts of pairs; they must be zero, not leftovers.
    memset(s->arena, 0, bytes);
    lay_out(s, s->arena, &grown, &s->buffers, &s->compute.bytes_scratch);
    s->compute.scratch = s->buffers.thread_scratch;
    bind_int8(s);
    s->capacity = grown;
    fill_rope_tables(s, grown.max_positions);
    return 0;
}

// Fast products are for weights that were quantised anyway: bfloat16 would take from float weights what their file still has.
static int has_float_weights(const ggd_model *model) {
    for (int32_t l = 0; l < model->shape.n_layers; l++) {
        for (int target = 0; target < GGD_N_TARGETS; target++) {
            if (model->layers[l].linear[target].w.block == 1) {
                return 1;
            }
        }
    }
    return 0;
}

int ggd_session_create(const ggd_model *model, const ggd_session_options *options, ggd_session **session) {
    *session = NULL;
    if (options->n_threads < 1 || options->n_threads > MAX_THREADS) {
        return ggd_fail("%d threads: must be between 1 and %d", options->n_threads, MAX_THREADS);
    }
    ggd_session *s = calloc(1, sizeof *s);
    if (s == NULL) {
        return ggd_fail("out of memory for a session");
    }
    const ggd_shape *shape = &model->shape;
    size_t head_size = (size_t)shape->head_size;
    s->model = model;
    s->options = *options;
    s->compute.kernels = ggd_kernels_choose(options->use_simd);
    s->is_fast = options->compute == GGD_COMPUTE_FAST && !has_float_weights(model);
    s->compute.element = s->is_fast ? s->compute.kernels->fast_element : GGD_ELEMENT_F32;
    size_t queries = panel_multiple((size_t)shape->n_heads * head_size),
           keys = panel_multiple((size_t)shape->n_kv_heads * head_size);
    s->ld_hidden = row_stride((size_t)shape->hidden_size);
    s->ld_ffn = row_stride((size_t)shape->feed_forward_size);
    s->ld_queries = row_stride(queries);
    s->ld_keys = row_stride(keys);
    s->ld_qkv = row_stride(queries + 2 * keys);
    s->heads = (ggd_heads){.n_heads = (size_t)shape->n_heads,
                           .n_kv_heads = (size_t)shape->n_kv_heads,
                           .head_size = head_size,
                           .k_column = queries,
                           .v_column = queries + keys,
                           .score_scale = model->score_scale,
                           .score_cap = model->score_cap,
                           .rope_kind = model->rope_kind,
                           .n_rotated = model->n_rotated,
                           .original_context = model->original_context,
                           .temperature = model->temperature};
    s->compute.threads = ggd_threads_create((size_t)options->n_threads);
    if (s->compute.threads == NULL) {
        free(s);
        return -1;
    }
    *session = s;
    return 0;
}

void ggd_session_free(ggd_session *session) {
    if (session == NULL) {
        return;
    }
    ggd_session_hold(session, NULL);
    ggd_threads_free(session->compute.threads);
    free(session->arena);
    free(session);
}

const char *ggd_session_kernels(const ggd_session *session) { return session->compute.kernels->name; }

const char *ggd_session_element(const ggd_session *session) {
    return session->compute.element == GGD_ELEMENT_BF16 ? "bfloat16" : "float32";
}

int ggd_session_plan(const ggd_session *session, const ggd_call_size *size, int32_t gradients, int32_t teacher, int32_t keep,
                     size_t *bytes) {
    if (size->n_rows < 1 || size->max_keys < 1 || size->max_positions < 1 || size->max_rank < 0) {
        return ggd_fail("cannot plan %d rows with %d keys and %d positions at rank %d", size->n_rows, size->max_keys,
                        size->max_positions, size->max_rank);
    }
    ggd_capacity wanted = {.n_rows = (size_t)size->n_rows,
                           .max_keys = (size_t)size->max_keys,
                           .max_positions = (size_t)size->max_positions,
                           .max_rank = (size_t)size->max_rank,
                           .gradients = gradients != 0,
                           .teacher = teacher != 0,
                           .keep = keep};
    ggd_buffers buffers;
    size_t bytes_thread;
    *bytes = lay_out(session, NULL, &wanted, &buffers, &bytes_thread);
    return 0;
}

void ggd_session_set_keep(ggd_session *session, int32_t keep) { session->options.keep = keep; }

const char *ggd_session_part(const ggd_session *session, int32_t index, double *time_s) {
    return index < 0 ? NULL : ggd_threads_part(session->compute.threads, (size_t)index, time_s);
}

void ggd_session_reset_parts(ggd_session *session) { ggd_threads_reset_parts(session->compute.threads); }

int ggd_session_set_int8(ggd_session *session, int32_t products) {
    if (products < GGD_INT8_NONE || products > GGD_INT8_BOTH) {
        return ggd_fail("no int8 products %d", products);
    }
    if (products != GGD_INT8_NONE && !session->is_fast) {
        return ggd_fail("no int8 products: this model or its settings ask for float32");
    }
    if (products != GGD_INT8_NONE && !has_int8(session)) {
        return ggd_fail("no int8 products in the %s kernels", session->compute.kernels->name);
    }
    session->int8 = products;
    bind_int8(session);
    return 0;
}

int32_t ggd_session_int8(const ggd_session *session) { return session->int8; }
