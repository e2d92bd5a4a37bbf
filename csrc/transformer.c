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

// Room for an operand of the forward's frozen products in int8, (M, n); NULL where they are not in int8.
static ggd_int8_rows *int8_room(ggd_session *s, int32_t n) {
    if (s->int8 != GGD_INT8_BOTH) {
        return NULL;
    }
    ggd_int8_set_strides(&s->buffers.int8, (size_t)n, GGD_INT8_FORWARD_BLOCK);
    return &s->buffers.int8;
}

// An operand that was stored as activation only.
static const ggd_int8_rows *in_int8(ggd_session *s, size_t m, int32_t n, ggd_activation x) {
    ggd_int8_rows *room = int8_room(s, n);
    if (room != NULL) {
        ggd_int8_quantise_rows(&s->compute, m, (size_t)n, x, GGD_INT8_FORWARD_BLOCK, room);
    }
    return room;
}

// x -> x + attention block
static void attention_block_forward(ggd_session *s, const ggd_batch *batch, size_t l) {
    const ggd_compute *compute = &s->compute;
    ggd_buffers *b = &s->buffers;
    ggd_layer_activations *act = &b->layers[l];
    const ggd_shape *shape = &s->model->shape;
    size_t m = (size_t)batch->n_rows, hidden = (size_t)shape->hidden_size, ld = s->ld_hidden;
    const ggd_int8_rows *normed_int8 = int8_room(s, shape->hidden_size);
    ggd_rmsnorm_forward(compute, m, hidden, b->x, ld, s->model->layers[l].attn_norm, s->model->rms_eps, b->normed, normed_int8,
                        act->attn_scales, act->x);
    for (int target = GGD_ATTN_Q; target <= GGD_ATTN_V; target++) {
        ggd_linear linear = linear_of(s, l, target);
        ggd_activation out = columns_of(s, act->qkv, target);
        if (target == GGD_ATTN_V) {
            ggd_linear_forward(compute, &linear, m, b->normed, normed_int8, NULL, 0, out.data, out.ld, compute->element);
        } else {
            ggd_linear_forward(compute, &linear, m, b->normed, normed_int8, NULL, 0, b->before_rope, s->ld_queries,
                               GGD_ELEMENT_F32);
            size_t n_heads = target == GGD_ATTN_Q ? s->heads.n_heads : s->heads.n_kv_heads;
            ggd_rope_forward(compute, batch, &s->heads, n_heads, b->before_rope, s->ld_queries, out);
        }
    }
    ggd_attention_forward(compute, batch, &s->heads, act->qkv, act->attn_out, act->lse);
    ggd_linear output = linear_of(s, l, GGD_ATTN_OUTPUT);
    const ggd_int8_rows *attn_int8 = in_int8(s, m, shape->n_heads * shape->head_size, act->attn_out);
    ggd_linear_forward(compute, &output, m, act->attn_out, attn_int8, b->x, ld, b->x, ld, GGD_ELEMENT_F32);
}

// gate and up of the residual stream; what GGD_KEEP_WITHOUT_FFN computes again
static void ffn_inner_forward(ggd_session *s, size_t m, size_t l) {
    ggd_buffers *b = &s->buffers;
    ggd_layer_activations *act = &b->layers[l];
    ggd_linear gate = linear_of(s, l, GGD_FFN_GATE), up = linear_of(s, l, GGD_FFN_UP);
    ggd_element element = s->compute.element;
    const ggd_int8_rows *normed_int8 = int8_room(s, s->model->shape.hidden_size);
    ggd_rmsnorm_forward(&s->compute, m, (size_t)s->model->shape.hidden_size, b->x, s->ld_hidden, s->model->layers[l].ffn_norm,
                        s->model->rms_eps, b->normed, normed_int8, act->ffn_scales, act->x_mid);
    ggd_linear_forward(&s->compute, &gate, m, b->normed, normed_int8, NULL, 0, act->gate.data, act->gate.ld, element);
    ggd_linear_forward(&s->compute, &up, m, b->normed, normed_int8, NULL, 0, act->up.data, act->up.ld, element);
}

// x -> x + feed-forward block
static void ffn_block_forward(ggd_session *s, const ggd_batch *batch, size_t l) {
    ggd_buffers *b = &s->buffers;
    size_t m = (size_t)batch->n_rows, ffn = (size_t)s->model->shape.feed_forward_size;
    ffn_inner_forward(s, m, l);
    const ggd_int8_rows *h_int8 = int8_room(s, s->model->shape.feed_forward_size);
    ggd_swiglu_forward(&s->compute, m, ffn, b->layers[l].gate, b->layers[l].up, b->h, h_int8);
    ggd_linear down = linear_of(s, l, GGD_FFN_DOWN);
    ggd_linear_forward(&s->compute, &down, m, b->h, h_int8, b->x, s->ld_hidden, b->x, s->ld_hidden, GGD_ELEMENT_F32);
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
    size_t m = (size_t)batch->n_rows, hidden = (size_t)s->model->shape.hidden_size,
           ffn = (size_t)s->model->shape.feed_forward_size;
    ggd_linear gate = linear_of(s, l, GGD_FFN_GATE), up = linear_of(s, l, GGD_FFN_UP), down = linear_of(s, l, GGD_FFN_DOWN);
    ggd_linear_backward_input(compute, &down, m, b->dx_activation, &b->linear, NULL, b->dgate.data, b->dgate.ld,
                              compute->element);
    // In place: d gate where dh was, d up where up was, h where gate was.
    ggd_activation h = act->gate, dup = act->up;
    ggd_swiglu_backward(compute, m, ffn, act->gate, act->up, b->dgate);
    ggd_linear_backward_lora(compute, &down, m, h, b->dx_activation, &b->linear);
    ggd_rmsnorm_repeat(compute, m, hidden, act->x_mid, s->model->layers[l].ffn_norm, s->model->rms_eps, b->normed);
    ggd_linear_backward_input(compute, &gate, m, b->dgate, &b->linear, NULL, b->dnormed, s->ld_hidden, GGD_ELEMENT_F32);
    ggd_linear_backward_lora(compute, &gate, m, b->normed, b->dgate, &b->linear);
    ggd_linear_backward_input(compute, &up, m, dup, &b->linear, b->dnormed, b->dnormed, s->ld_hidden, GGD_ELEMENT_F32);
    ggd_linear_backward_lora(compute, &up, m, b->normed, dup, &b->linear);
    ggd_rmsnorm_backward(compute, m, hidden, b->dnormed, s->ld_hidden, act->x_mid, s->model->layers[l].ffn_norm, act->ffn_scales,
                         b->dx, b->dx_activation);
}

// dx -> dx + d (attention block) / d x
static void attention_block_backward(ggd_session *s, const ggd_batch *batch, size_t l) {
    const ggd_compute *compute = &s->compute;
    ggd_buffers *b = &s->buffers;
    ggd_layer_activations *act = &b->layers[l];
    size_t m = (size_t)batch->n_rows, hidden = (size_t)s->model->shape.hidden_size;
    ggd_linear output = linear_of(s, l, GGD_ATTN_OUTPUT);
    ggd_linear_backward_input(compute, &output, m, b->dx_activation, &b->linear, NULL, b->dattn_out.data, b->dattn_out.ld,
                              compute->element);
    ggd_linear_backward_lora(compute, &output, m, act->attn_out, b->dx_activation, &b->linear);
    ggd_attention_backward(compute, batch, &s->heads, act->qkv, act->attn_out, act->lse, b->dattn_out, b->dqkv);
    ggd_rmsnorm_repeat(compute, m, hidden, act->x, s->model->layers[l].attn_norm, s->model->rms_eps, b->normed);
    for (int target = GGD_ATTN_Q; target <= GGD_ATTN_V; target++) {
        ggd_linear linear = linear_of(s, l, target);
        ggd_activation dy = columns_of(s, b->dqkv, target);
        const float *sum = target == GGD_ATTN_Q ? NULL : b->dnormed;
        ggd_linear_backward_input(compute, &linear, m, dy, &b->linear, sum, b->dnormed, s->ld_hidden, GGD_ELEMENT_F32);
        ggd_linear_backward_lora(compute, &linear, m, b->normed, dy, &b->linear);
    }
    ggd_rmsnorm_backward(compute, m, hidden, b->dnormed, s->ld_hidden, act->x, s->model->layers[l].attn_norm, act->attn_scales,
                         b->dx, b->dx_activation);
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
        ggd_swiglu_forward(&s->compute, m, (size_t)s->model->shape.feed_forward_size, b->layers[l].gate, b->layers[l].up, b->h,
                           NULL);
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
                      .hidden_token = adapter != NULL ? adapter->mask_token_id : -1};
}
