// transformer.c - a llama-style transformer as calls, no arithmetic: read ggd_transformer_forward from top to bottom, then
// ggd_transformer_backward in reverse.
//
//   a = x + O attention(rope(Q norm(x)), rope(K norm(x)), V norm(x))        O, Q, K, V, G, U, D: frozen weight + LoRA delta
//   y = a + D (silu(G norm(a)) * U norm(a))
//
// The residual stream is float32; what products read is in the element type of the session. The backward gives gradients to LoRA, the
// mask row and the embedding offsets; the frozen weights get none.
#include "transformer.h"

#include <string.h>

#include "attention.h"

static ggd_linear linear_of(const ggd_session *s, size_t layer, int target) {
    return (ggd_linear){
        .weight = &s->model->layers[layer].linear[target],
        .lora = s->buffers.pairs[layer * GGD_N_TARGETS + (size_t)target],
        .p = s->buffers.layers[layer].p[target],
    };
}

// The part of Q, K or V in a joint buffer.
static ggd_activation columns_of(const ggd_session *s, ggd_activation qkv, int target) {
    size_t column = target == GGD_ATTN_Q ? 0 : target == GGD_ATTN_K ? s->heads.k_column : s->heads.v_column;
    return (ggd_activation){ggd_activation_at(qkv, 0, column, s->compute.element), qkv.ld};
}

static ggd_norm attn_norm_of(const ggd_session *s, size_t l) {
    const ggd_layer_activations *act = &s->buffers.layers[l];
    return (ggd_norm){.weight = s->model->layers[l].attn_norm,
                      .eps = s->model->rms_eps,
                      .n = (size_t)s->model->shape.hidden_size,
                      .scales = act->attn_scales,
                      .saved = act->x};
}

static ggd_norm ffn_norm_of(const ggd_session *s, size_t l) {
    const ggd_layer_activations *act = &s->buffers.layers[l];
    return (ggd_norm){.weight = s->model->layers[l].ffn_norm,
                      .eps = s->model->rms_eps,
                      .n = (size_t)s->model->shape.hidden_size,
                      .scales = act->ffn_scales,
                      .saved = act->x_mid};
}

// An operand of the forward's frozen products, (M, n), with room for it in int8 where they are in int8.
static ggd_operand operand_of(ggd_session *s, ggd_activation x, int32_t n) {
    if (s->int8 != GGD_INT8_BOTH) {
        return (ggd_operand){.x = x};
    }
    ggd_int8_set_strides(&s->buffers.int8, (size_t)n, GGD_INT8_FORWARD_BLOCK);
    return (ggd_operand){x, &s->buffers.int8};
}

// The same of what was stored as activation only.
static ggd_operand quantised(ggd_session *s, size_t m, ggd_activation x, int32_t n) {
    ggd_operand operand = operand_of(s, x, n);
    if (operand.int8 != NULL) {
        ggd_int8_quantise_rows(&s->compute, m, (size_t)n, x, GGD_INT8_FORWARD_BLOCK, &s->buffers.int8);
    }
    return operand;
}

static const ggd_addend nothing = {NULL, 0};

// x -> x + attention block
static void attention_block_forward(ggd_session *s, const ggd_batch *batch, size_t l) {
    const ggd_compute *compute = &s->compute;
    ggd_buffers *b = &s->buffers;
    ggd_layer_activations *act = &b->layers[l];
    const ggd_shape *shape = &s->model->shape;
    size_t m = (size_t)batch->n_rows;
    ggd_addend residual = {b->x, s->ld_hidden};
    ggd_norm norm = attn_norm_of(s, l);
    ggd_operand normed = operand_of(s, b->normed, shape->hidden_size);
    ggd_rmsnorm_forward(compute, &norm, m, b->x, s->ld_hidden, normed);
    for (int target = GGD_ATTN_Q; target <= GGD_ATTN_V; target++) {
        ggd_linear linear = linear_of(s, l, target);
        ggd_activation out = columns_of(s, act->qkv, target);
        if (target == GGD_ATTN_V) {
            ggd_linear_forward(compute, &linear, m, normed, nothing, ggd_place_of(compute, out));
        } else {
            size_t n_heads = target == GGD_ATTN_Q ? s->heads.n_heads : s->heads.n_kv_heads;
            ggd_linear_forward(compute, &linear, m, normed, nothing, ggd_place_f32(b->before_rope, s->ld_queries));
            ggd_rope_forward(compute, batch, &s->heads, n_heads, b->before_rope, s->ld_queries, out);
        }
    }
    ggd_attention_forward(compute, batch, &s->heads, act->qkv, act->attn_out, act->lse);
    ggd_linear output = linear_of(s, l, GGD_ATTN_OUTPUT);
    ggd_operand attended = quantised(s, m, act->attn_out, shape->n_heads * shape->head_size);
    ggd_linear_forward(compute, &output, m, attended, residual, ggd_place_f32(b->x, s->ld_hidden));
}

// gate and up of the residual stream; what GGD_KEEP_WITHOUT_FFN computes again
static void ffn_inner_forward(ggd_session *s, size_t m, size_t l) {
    ggd_buffers *b = &s->buffers;
    ggd_layer_activations *act = &b->layers[l];
    ggd_linear gate = linear_of(s, l, GGD_FFN_GATE), up = linear_of(s, l, GGD_FFN_UP);
    ggd_norm norm = ffn_norm_of(s, l);
    ggd_operand normed = operand_of(s, b->normed, s->model->shape.hidden_size);
    ggd_rmsnorm_forward(&s->compute, &norm, m, b->x, s->ld_hidden, normed);
    ggd_linear_forward(&s->compute, &gate, m, normed, nothing, ggd_place_of(&s->compute, act->gate));
    ggd_linear_forward(&s->compute, &up, m, normed, nothing, ggd_place_of(&s->compute, act->up));
}

// x -> x + feed-forward block
static void ffn_block_forward(ggd_session *s, const ggd_batch *batch, size_t l) {
    ggd_buffers *b = &s->buffers;
    int32_t ffn = s->model->shape.feed_forward_size;
    size_t m = (size_t)batch->n_rows;
    ggd_addend residual = {b->x, s->ld_hidden};
    ffn_inner_forward(s, m, l);
    ggd_operand h = operand_of(s, b->h, ffn);
    ggd_swiglu_forward(&s->compute, m, (size_t)ffn, b->layers[l].gate, b->layers[l].up, h);
    ggd_linear down = linear_of(s, l, GGD_FFN_DOWN);
    ggd_linear_forward(&s->compute, &down, m, h, residual, ggd_place_f32(b->x, s->ld_hidden));
}

// A copy of the residual stream for the backward, where the policy wants one there.
static void keep_copy(ggd_session *s, size_t m, float **copies, size_t l) {
    if (copies != NULL) {
        memcpy(copies[l], s->buffers.x, m * s->ld_hidden * sizeof(float));
    }
}

const float *ggd_transformer_forward(ggd_session *s, const ggd_batch *batch, const ggd_adapter *adapter) {
    ggd_buffers *b = &s->buffers;
    ggd_embedding_forward(&s->compute, &s->model->token_embedding, batch, adapter, b->x, s->ld_hidden);
    for (size_t l = 0; l < (size_t)s->model->shape.n_layers; l++) {
        keep_copy(s, (size_t)batch->n_rows, b->boundaries, l);
        attention_block_forward(s, batch, l);
        keep_copy(s, (size_t)batch->n_rows, b->middles, l);
        ffn_block_forward(s, batch, l);
    }
    return b->x;
}

// dx -> dx + d (feed-forward block) / d x_mid
static void ffn_block_backward(ggd_session *s, const ggd_batch *batch, size_t l) {
    const ggd_compute *compute = &s->compute;
    ggd_buffers *b = &s->buffers;
    ggd_layer_activations *act = &b->layers[l];
    size_t m = (size_t)batch->n_rows, ffn = (size_t)s->model->shape.feed_forward_size;
    ggd_addend sum = {b->dnormed, s->ld_hidden};
    ggd_place dnormed = ggd_place_f32(b->dnormed, s->ld_hidden);
    ggd_norm norm = ffn_norm_of(s, l);
    ggd_linear gate = linear_of(s, l, GGD_FFN_GATE), up = linear_of(s, l, GGD_FFN_UP), down = linear_of(s, l, GGD_FFN_DOWN);
    ggd_linear_backward_input(compute, &down, m, b->dx_activation, &b->linear, nothing, ggd_place_of(compute, b->dgate));
    // In place: d gate where dh was, d up where up was, h where gate was.
    ggd_activation h = act->gate, dup = act->up;
    ggd_swiglu_backward(compute, m, ffn, act->gate, act->up, b->dgate);
    ggd_linear_backward_lora(compute, &down, m, h, b->dx_activation, &b->linear);
    ggd_rmsnorm_repeat(compute, &norm, m, b->normed);
    ggd_linear_backward_input(compute, &gate, m, b->dgate, &b->linear, nothing, dnormed);
    ggd_linear_backward_lora(compute, &gate, m, b->normed, b->dgate, &b->linear);
    ggd_linear_backward_input(compute, &up, m, dup, &b->linear, sum, dnormed);
    ggd_linear_backward_lora(compute, &up, m, b->normed, dup, &b->linear);
    ggd_rmsnorm_backward(compute, &norm, m, b->dnormed, s->ld_hidden, b->dx, b->dx_activation);
}

// dx -> dx + d (attention block) / d x
static void attention_block_backward(ggd_session *s, const ggd_batch *batch, size_t l) {
    const ggd_compute *compute = &s->compute;
    ggd_buffers *b = &s->buffers;
    ggd_layer_activations *act = &b->layers[l];
    size_t m = (size_t)batch->n_rows;
    ggd_addend sum = {b->dnormed, s->ld_hidden};
    ggd_norm norm = attn_norm_of(s, l);
    ggd_linear output = linear_of(s, l, GGD_ATTN_OUTPUT);
    ggd_linear_backward_input(compute, &output, m, b->dx_activation, &b->linear, nothing, ggd_place_of(compute, b->dattn_out));
    ggd_linear_backward_lora(compute, &output, m, act->attn_out, b->dx_activation, &b->linear);
    ggd_attention_backward(compute, batch, &s->heads, act->qkv, act->attn_out, act->lse, b->dattn_out, b->dqkv);
    ggd_rmsnorm_repeat(compute, &norm, m, b->normed);
    for (int target = GGD_ATTN_Q; target <= GGD_ATTN_V; target++) {
        ggd_linear linear = linear_of(s, l, target);
        ggd_activation dy = columns_of(s, b->dqkv, target);
        ggd_linear_backward_input(compute, &linear, m, dy, &b->linear, target == GGD_ATTN_Q ? nothing : sum,
                                  ggd_place_f32(b->dnormed, s->ld_hidden));
        ggd_linear_backward_lora(compute, &linear, m, b->normed, dy, &b->linear);
    }
    ggd_rmsnorm_backward(compute, &norm, m, b->dnormed, s->ld_hidden, b->dx, b->dx_activation);
}

// Activations that the forward did not keep.
static void recompute_layer(ggd_session *s, const ggd_batch *batch, size_t l) {
    ggd_buffers *b = &s->buffers;
    size_t m = (size_t)batch->n_rows, bytes = m * s->ld_hidden * sizeof *b->x;
    if (b->middles != NULL) {
        memcpy(b->x, b->middles[l], bytes);
        ffn_inner_forward(s, m, l);
    } else if (b->boundaries != NULL) {
        memcpy(b->x, b->boundaries[l], bytes);
        attention_block_forward(s, batch, l);
        ffn_inner_forward(s, m, l);
        // The down projection's A h, without its output.
        ggd_swiglu_forward(&s->compute, m, (size_t)s->model->shape.feed_forward_size, b->layers[l].gate, b->layers[l].up,
                           (ggd_operand){.x = b->h});
        ggd_linear down = linear_of(s, l, GGD_FFN_DOWN);
        ggd_linear_forward_lora(&s->compute, &down, m, b->h);
    }
}

void ggd_transformer_backward(ggd_session *s, const ggd_batch *batch, const ggd_adapter *adapter, float *grad_offset) {
    size_t m = (size_t)batch->n_rows, hidden = (size_t)s->model->shape.hidden_size, n_layers = (size_t)s->model->shape.n_layers;
    int recomputes = s->buffers.boundaries != NULL || s->buffers.middles != NULL;
    for (size_t l = n_layers; l-- > 0;) {
        recompute_layer(s, batch, l);
        if (recomputes || l + 1 == n_layers) {  // else the layer after it left its dx there
            ggd_to_activation(&s->compute, m, hidden, s->buffers.dx, s->ld_hidden, s->buffers.dx_activation);
        }
        ffn_block_backward(s, batch, l);
        attention_block_backward(s, batch, l);
    }
    ggd_embedding_backward(&s->compute, batch, adapter, hidden, s->buffers.dx, s->ld_hidden, grad_offset);
}

void ggd_bind_adapter(ggd_session *s, const ggd_adapter *adapter) {
    memset(s->buffers.pairs, 0, (size_t)s->model->shape.n_layers * GGD_N_TARGETS * sizeof *s->buffers.pairs);
    for (int32_t i = 0; adapter != NULL && i < adapter->n_pairs; i++) {
        const ggd_lora_pair *pair = &adapter->pairs[i];
        s->buffers.pairs[(size_t)pair->layer * GGD_N_TARGETS + (size_t)pair->target] = pair;
    }
}

ggd_head ggd_transformer_head(const ggd_session *s, const ggd_adapter *adapter) {
    return (ggd_head){.head = s->model->head,
                      .norm = s->model->output_norm,
                      .rms_eps = s->model->rms_eps,
                      .mask_token = adapter != NULL ? adapter->mask_token_id : -1};
}
