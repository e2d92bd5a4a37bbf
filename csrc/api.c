// api.c - the calls of ggd.h that run the network: check the caller's arrays, reserve memory, run.
#include <math.h>

#include "error.h"
#include "include/ggd.h"
#include "transformer.h"

static int check_segments(const ggd_batch *batch, const ggd_shape *shape) {
    int32_t row = 0;
    for (int32_t i = 0; i < batch->n_segments; i++) {
        const ggd_segment *segment = &batch->segments[i];
        if (segment->first_row != row || segment->n_rows < 1 || segment->n_rows > batch->n_rows - row) {
            return ggd_fail("segment %d does not follow the one before it", i);
        }
        if (segment->n_rows > shape->context_length) {
            return ggd_fail("a sequence of %d tokens is longer than the model's context of %d", segment->n_rows,
                            shape->context_length);
        }
        if (segment->sequence < 0 || segment->sequence >= batch->n_sequences || segment->first_position < 0) {
            return ggd_fail("segment %d belongs to no sequence of the batch", i);
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
    return check_segments(batch, &s->model->shape);
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
        size_t n = (size_t)batch->segments[i].n_rows;
        wanted.max_segment_rows = n > wanted.max_segment_rows ? n : wanted.max_segment_rows;
    }
    for (int32_t i = 0; adapter != NULL && i < adapter->n_pairs; i++) {
        size_t rank = (size_t)adapter->pairs[i].rank;
        wanted.max_rank = rank > wanted.max_rank ? rank : wanted.max_rank;
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

int ggd_logits(ggd_session *s, const ggd_batch *batch, const ggd_adapter *adapter, int32_t n_select, const int32_t *rows,
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
