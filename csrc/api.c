// api.c - the calls of ggd.h that run the network: check the caller's arrays, reserve memory, run.
#include <math.h>

#include "error.h"
#include "include/ggd.h"
#include "transformer.h"

// Positions rise, and stay below `end`.
static int check_positions(const int32_t *positions, int32_t n, int32_t end, int32_t segment) {
    for (int32_t i = 0; i < n; i++) {
        if (positions[i] < 0 || positions[i] >= end || (i > 0 && positions[i] <= positions[i - 1])) {
            return ggd_fail("the positions of segment %d do not rise below %d", segment, end);
        }
    }
    return 0;
}

static int check_segment(const ggd_session *s, const ggd_batch *batch, int32_t index) {
    const ggd_segment *segment = &batch->segments[index];
    const ggd_context *context = batch->context;
    if (segment->n_positions > s->model->shape.context_length) {
        return ggd_fail("a sequence of %d tokens is longer than the model's context of %d", segment->n_positions,
                        s->model->shape.context_length);
    }
    if (segment->sequence < 0 || segment->sequence >= batch->n_sequences || segment->first_position < 0) {
        return ggd_fail("segment %d belongs to no sequence of the batch", index);
    }
    if (batch->positions == NULL
            ? segment->n_positions < segment->n_rows
            : check_positions(batch->positions + segment->first_row, segment->n_rows, segment->n_positions, index)) {
        return ggd_fail("segment %d has positions that do not rise below %d", index, segment->n_positions);
    }
    int32_t n_context = context != NULL ? (int32_t)context->n_rows : 0;
    if (segment->first_context < 0 || segment->n_context < 0 || segment->n_context > n_context - segment->first_context) {
        return ggd_fail("segment %d sees rows that its context does not have", index);
    }
    return segment->n_context == 0
               ? 0
               : check_positions(context->positions + segment->first_context, segment->n_context, segment->n_positions, index);
}

static int check_segments(const ggd_session *s, const ggd_batch *batch) {
    int32_t row = 0;
    if (batch->context != NULL && batch->context->model != s->model) {
        return ggd_fail("a context of another model");
    }
    for (int32_t i = 0; i < batch->n_segments; i++) {
        const ggd_segment *segment = &batch->segments[i];
        if (segment->first_row != row || segment->n_rows < 1 || segment->n_rows > batch->n_rows - row) {
            return ggd_fail("segment %d does not follow the one before it", i);
        }
        if (check_segment(s, batch, i)) {
            return -1;
        }
        row += segment->n_rows;
    }
    return row == batch->n_rows ? 0 : ggd_fail("the segments hold %d of %d rows", row, batch->n_rows);
}

static int check_batch(const ggd_session *s, const ggd_batch *batch) {
    if (batch->n_rows < 1 || batch->n_segments < 1) {
        return ggd_fail("an empty batch");
    }
    if (!(batch->causal_ratio >= 0.0f && batch->causal_ratio <= 1.0f)) {
        return ggd_fail("causal ratio %g is not between 0 and 1", (double)batch->causal_ratio);
    }
    for (int32_t i = 0; i < batch->n_rows; i++) {
        if (batch->tokens[i] < 0 || batch->tokens[i] >= s->model->shape.vocab_size) {
            return ggd_fail("token id %d is outside the vocabulary of %d", batch->tokens[i], s->model->shape.vocab_size);
        }
    }
    return check_segments(s, batch);
}

static int check_adapter(const ggd_session *s, const ggd_adapter *adapter, int gradients) {
    if (adapter == NULL) {
        return 0;
    }
    for (int32_t i = 0; i < adapter->n_pairs; i++) {
        const ggd_lora_pair *pair = &adapter->pairs[i];
        if (pair->layer < 0 || pair->layer >= s->model->shape.n_layers || pair->target < 0 || pair->target >= GGD_N_TARGETS ||
            pair->rank < 1 || pair->a == NULL || pair->b == NULL) {
            return ggd_fail("LoRA pair %d is for no projection of the model", i);
        }
        if (gradients && (pair->grad_a == NULL || pair->grad_b == NULL)) {
            return ggd_fail("LoRA pair %d has no place for its gradients", i);
        }
    }
    if (adapter->mask_token_id >= s->model->shape.vocab_size) {
        return ggd_fail("mask token id %d is outside the vocabulary of %d", adapter->mask_token_id, s->model->shape.vocab_size);
    }
    return 0;
}

static int check_objective(const ggd_session *s, const ggd_batch *batch, const ggd_objective *objective) {
    int teacher = objective->teacher_tokens != NULL;
    for (int32_t i = 0; i < batch->n_rows; i++) {
        float weight = objective->weights[i], teacher_weight = teacher ? objective->teacher_weights[i] : 0;
        if (!isfinite(weight) || !isfinite(teacher_weight)) {
            return ggd_fail("the weight of row %d is not finite", i);
        }
        int counts = weight != 0 || teacher_weight != 0;
        if (counts && (objective->targets[i] < 0 || objective->targets[i] >= s->model->shape.vocab_size)) {
            return ggd_fail("target id %d is outside the vocabulary of %d", objective->targets[i], s->model->shape.vocab_size);
        }
        if (teacher && (objective->teacher_rows[i] < 0 || objective->teacher_rows[i] >= batch->n_rows)) {
            return ggd_fail("row %d has no teacher's row", i);
        }
    }
    return 0;
}

static int prepare(ggd_session *s, const ggd_batch *batch, const ggd_adapter *adapter, const ggd_objective *objective,
                   int gradients) {
    if (check_batch(s, batch) || check_adapter(s, adapter, gradients) ||
        (objective != NULL && check_objective(s, batch, objective))) {
        return -1;
    }
    // Without gradients nothing is kept: any layout of the arena will do.
    ggd_capacity wanted = {.n_rows = (size_t)batch->n_rows, .gradients = gradients};
    wanted.keep = gradients ? s->options.keep : s->capacity.keep;
    wanted.teacher = objective != NULL && objective->teacher_tokens != NULL;
    for (int32_t i = 0; i < batch->n_segments; i++) {
        const ggd_segment *segment = &batch->segments[i];
        wanted.max_keys = ggd_max(wanted.max_keys, (size_t)segment->n_rows + (size_t)segment->n_context);
        wanted.max_positions = ggd_max(wanted.max_positions, (size_t)segment->n_positions);
    }
    for (int32_t i = 0; adapter != NULL && i < adapter->n_pairs; i++) {
        wanted.max_rank = ggd_max(wanted.max_rank, (size_t)adapter->pairs[i].rank);
    }
    return ggd_session_reserve(s, &wanted);
}

// The base alone, causal, on the teacher's tokens.
static int run_teacher(ggd_session *s, const ggd_batch *batch, const ggd_objective *objective) {
    ggd_batch teacher = *batch;
    teacher.tokens = objective->teacher_tokens;
    teacher.embedding_offset = NULL;
    teacher.causal_ratio = 1.0f;
    teacher.bernoulli = 0;
    if (check_batch(s, &teacher)) {
        return -1;
    }
    ggd_bind_adapter(s, NULL);
    const float *x = ggd_transformer_forward(s, &teacher, NULL);
    ggd_head head = ggd_transformer_head(s, NULL);
    ggd_keep_teacher(&s->compute, &head, &s->buffers.loss, (size_t)batch->n_rows, x, s->ld_hidden);
    return 0;
}

// Forward and loss; dx NULL: no gradients.
static int run_loss(ggd_session *s, const ggd_batch *batch, const ggd_adapter *adapter, ggd_objective *objective, int gradients) {
    if (prepare(s, batch, adapter, objective, gradients) ||
        (objective->teacher_tokens != NULL && run_teacher(s, batch, objective))) {
        return -1;
    }
    ggd_bind_adapter(s, adapter);
    const float *x = ggd_transformer_forward(s, batch, adapter);
    ggd_head head = ggd_transformer_head(s, adapter);
    float *dx = gradients ? s->buffers.dx : NULL;
    ggd_loss_run(&s->compute, &head, &s->buffers.loss, (size_t)batch->n_rows, x, s->ld_hidden, objective, dx);
    return 0;
}

static int run_logits(ggd_session *s, const ggd_batch *batch, const ggd_adapter *adapter, int32_t n_select, const int32_t *rows,
                      float *logits) {
    if (prepare(s, batch, adapter, NULL, 0)) {
        return -1;
    }
    for (int32_t i = 0; i < n_select; i++) {
        if (rows[i] < 0 || rows[i] >= batch->n_rows) {
            return ggd_fail("row %d is outside the batch of %d rows", rows[i], batch->n_rows);
        }
    }
    ggd_bind_adapter(s, adapter);
    const float *x = ggd_transformer_forward(s, batch, adapter);
    ggd_head head = ggd_transformer_head(s, NULL);
    ggd_logits_run(&s->compute, &head, &s->buffers.loss, (size_t)(n_select > 0 ? n_select : 0), rows, x, s->ld_hidden, logits);
    return 0;
}

int ggd_logits(ggd_session *s, const ggd_batch *batch, const ggd_adapter *adapter, int32_t n_select, const int32_t *rows,
               float *logits) {
    return run_logits(s, batch, adapter, n_select, rows, logits);
}

// Rows of a context come after those that they see.
static int check_order(const ggd_context *context, const ggd_batch *batch) {
    for (int32_t i = 0; i < batch->n_segments; i++) {
        const ggd_segment *segment = &batch->segments[i];
        int32_t last = segment->first_context + segment->n_context - 1;
        if (segment->n_context > 0 && (size_t)last < context->n_rows &&
            ggd_position(batch, segment, 0) <= (size_t)context->positions[last]) {
            return ggd_fail("the positions of segment %d do not rise from those of its context", i);
        }
    }
    return 0;
}

int ggd_context_extend(ggd_session *s, ggd_context *context, const ggd_batch *batch, int32_t n_select, const int32_t *rows,
                       float *logits) {
    if (context->model != s->model || (batch->context != NULL && batch->context != context)) {
        return ggd_fail("a context of another model, or another context");
    }
    if (batch->n_rows < 1 || (size_t)batch->n_rows > context->capacity - context->n_rows) {
        return ggd_fail("a context for %zu rows has %zu: no room for %d more", context->capacity, context->n_rows, batch->n_rows);
    }
    if (batch->causal_ratio != 1.0f || batch->embedding_offset != NULL) {
        return ggd_fail("rows of a context are the base's own, causal and without offsets");
    }
    if (check_segments(s, batch) || check_order(context, batch)) {
        return -1;
    }
    s->extended = context;
    int status = run_logits(s, batch, NULL, n_select, rows, logits);
    s->extended = NULL;
    if (status != 0) {
        return -1;
    }
    for (int32_t i = 0; i < batch->n_segments; i++) {
        const ggd_segment *segment = &batch->segments[i];
        for (int32_t row = 0; row < segment->n_rows; row++) {
            context->positions[context->n_rows++] = (int32_t)ggd_position(batch, segment, (size_t)row);
        }
    }
    return 0;
}

int ggd_context_refill(ggd_session *s, ggd_context *context, const ggd_batch *batch, const ggd_adapter *adapter, int32_t n_kept,
                       const int32_t *kept, int32_t n_select, const int32_t *rows, float *logits) {
    if (context->model != s->model || batch->context != NULL || batch->n_segments != 1) {
        return ggd_fail("a context of another model, or more than one whole sequence");
    }
    if (n_kept < 0 || (size_t)n_kept > context->capacity || n_kept > batch->n_rows) {
        return ggd_fail("a context for %zu rows, and %d of %d are to be kept", context->capacity, n_kept, batch->n_rows);
    }
    for (int32_t i = 0; i < n_kept; i++) {
        if (kept[i] >= batch->n_rows || kept[i] < 0 || (i > 0 && kept[i] <= kept[i - 1])) {
            return ggd_fail("row %d cannot be kept: rows of the batch, rising", kept[i]);
        }
    }
    if (check_segments(s, batch)) {
        return -1;
    }
    context->n_rows = 0;
    s->extended = context;
    s->kept = kept;
    s->n_kept = n_kept;
    int status = run_logits(s, batch, adapter, n_select, rows, logits);
    s->extended = NULL;
    s->kept = NULL;
    if (status != 0) {
        return -1;
    }
    for (int32_t i = 0; i < n_kept; i++) {
        context->positions[context->n_rows++] = (int32_t)ggd_position(batch, batch->segments, (size_t)kept[i]);
    }
    return 0;
}

int ggd_loss(ggd_session *s, const ggd_batch *batch, const ggd_adapter *adapter, ggd_objective *objective) {
    return run_loss(s, batch, adapter, objective, 0);
}

int ggd_loss_and_gradients(ggd_session *s, const ggd_batch *batch, const ggd_adapter *adapter, ggd_objective *objective,
                           float *grad_offset) {
    if (run_loss(s, batch, adapter, objective, 1)) {
        return -1;
    }
    ggd_transformer_backward(s, batch, adapter, grad_offset);
    return 0;
}
