// transformer.c - a decoder as calls, no arithmetic: read ggd_transformer_forward from top to bottom, then
// ggd_transformer_backward in reverse.
//
//   a = x + s post(O attention(rope(norm(Q pre(x))), rope(norm(K pre(x))), V pre(x)))
//   y = a + s post(D (gate(G pre(a)) * U pre(a)))
//
// O, Q, K, V, G, U, D: frozen weight + bias + LoRA delta; pre, post, norm: RMS norms; s: the residual scale. A model without a norm, a bias or a
// scale has NULL or one there.
//
// The residual stream is float32; what products read is in the element type of the session. The backward gives gradients to LoRA, the
// mask row and the embedding offsets; the frozen weights get none.
#include "transformer.h"

#include <string.h>

#include "attention.h"

static ggd_linear linear_of(const ggd_session *s, size_t layer, int target) {
    return (ggd_linear){
        .weight = &s->model->layers[layer].linear[target].w,
        .lora = s->buffers.pairs[layer * GGD_N_TARGETS + (size_t)target],
        .panels = s->bound_panels != NULL ? &s->bound_panels[layer * GGD_N_TARGETS + (size_t)target] : NULL,
        .p = s->buffers.layers[layer].p[target],
    };
}

static ggd_addend bias_of(const ggd_session *s, size_t layer, int target) {
    return (ggd_addend){s->model->layers[layer].linear[target].bias, 0};
}

static ggd_norm norm_of(const ggd_session *s, size_t l, int norm) {
    const ggd_layer_activations *act = &s->buffers.layers[l];
    int of_heads = norm == GGD_NORM_Q || norm == GGD_NORM_K;
    size_t n_heads = norm == GGD_NORM_Q ? s->heads.n_heads : s->heads.n_kv_heads;
    size_t piece = s->heads.head_size * (s->model->wide_head_norms ? n_heads : 1);
    return (ggd_norm){.weight = s->model->layers[l].norms[norm],
                      .eps = s->model->rms_eps,
                      .n = of_heads ? piece : (size_t)s->model->shape.hidden_size,
                      .scales = act->norm_scales[norm],
                      .saved = act->saved[norm]};
}

static ggd_heads heads_of(const ggd_session *s, size_t l) {
    const ggd_layer *layer = &s->model->layers[l];
    const ggd_buffers *b = &s->buffers;
    ggd_heads heads = s->heads;
    heads.layer = l;
    heads.window = layer->window;
    if (layer->rope >= 0) {
        heads.rope = (ggd_rope_table){b->cosine[layer->rope], b->sine[layer->rope]};
    }
    if (layer->rope == GGD_ROPE_GLOBAL && s->model->ropes[GGD_ROPE_LONG].frequencies != NULL) {
        heads.long_rope = (ggd_rope_table){b->cosine[GGD_ROPE_LONG], b->sine[GGD_ROPE_LONG]};
    }
    return heads;
}

// The part of Q, K or V in a joint buffer.
static ggd_activation columns_of(const ggd_session *s, ggd_activation qkv, int target) {
    size_t column = target == GGD_ATTN_Q ? 0 : target == GGD_ATTN_K ? s->heads.k_column : s->heads.v_column;
    return (ggd_activation){ggd_activation_at(qkv, 0, column, s->compute.element), qkv.ld};
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

// x -> x + what a block adds, from its last projection
static void add_block(ggd_session *s, size_t m, size_t l, int target, ggd_operand operand) {
    ggd_buffers *b = &s->buffers;
    ggd_linear linear = linear_of(s, l, target);
    if (!s->model->blocks_apart) {
        ggd_addend residual = {b->x, s->ld_hidden};
        ggd_linear_forward(&s->compute, &linear, m, operand, residual, ggd_place_f32(b->x, s->ld_hidden));
        return;
    }
    ggd_norm post = norm_of(s, l, target == GGD_ATTN_OUTPUT ? GGD_NORM_ATTN_POST : GGD_NORM_FFN_POST);
    ggd_linear_forward(&s->compute, &linear, m, operand, bias_of(s, l, target), ggd_place_f32(b->block, s->ld_hidden));
    ggd_block_forward(&s->compute, &post, s->model->residual_scale, m, b->block, b->x, s->ld_hidden);
}

// Q, K and V of the normed residual stream
static void project_heads(ggd_session *s, const ggd_batch *batch, size_t l, const ggd_heads *heads, ggd_operand normed) {
    const ggd_compute *compute = &s->compute;
    ggd_buffers *b = &s->buffers;
    size_t m = (size_t)batch->n_rows;
    for (int target = GGD_ATTN_Q; target <= GGD_ATTN_V; target++) {
        ggd_linear linear = linear_of(s, l, target);
        ggd_addend bias = bias_of(s, l, target);
        ggd_activation out = columns_of(s, b->layers[l].qkv, target);
        if (target == GGD_ATTN_V) {
            ggd_linear_forward(compute, &linear, m, normed, bias, ggd_place_of(compute, out));
        } else {
            ggd_heads own = *heads;
            own.temperature = target == GGD_ATTN_Q ? heads->temperature : 0;
            size_t n_heads = target == GGD_ATTN_Q ? heads->n_heads : heads->n_kv_heads;
            ggd_norm norm = norm_of(s, l, target == GGD_ATTN_Q ? GGD_NORM_Q : GGD_NORM_K);
            ggd_linear_forward(compute, &linear, m, normed, bias, ggd_place_f32(b->before_rope, s->ld_queries));
            ggd_heads_forward(compute, batch, &own, n_heads, &norm, b->before_rope, s->ld_queries, out);
        }
    }
}

// Keys and values of rows that others will see.
static void keep_context(ggd_session *s, size_t m, size_t l) {
    if (s->extended != NULL) {
        ggd_activation qkv = s->buffers.layers[l].qkv;
        size_t n = s->kept != NULL ? (size_t)s->n_kept : m;
        ggd_context_store(s->extended, &s->compute, l, GGD_CONTEXT_KEYS, n, s->kept, columns_of(s, qkv, GGD_ATTN_K));
        ggd_context_store(s->extended, &s->compute, l, GGD_CONTEXT_VALUES, n, s->kept, columns_of(s, qkv, GGD_ATTN_V));
    }
}

// x -> x + attention block
static void attention_block_forward(ggd_session *s, const ggd_batch *batch, size_t l) {
    ggd_buffers *b = &s->buffers;
    ggd_layer_activations *act = &b->layers[l];
    size_t m = (size_t)batch->n_rows;
    ggd_heads heads = heads_of(s, l);
    ggd_norm norm = norm_of(s, l, GGD_NORM_ATTN);
    ggd_operand normed = operand_of(s, b->normed, s->model->shape.hidden_size);
    ggd_rmsnorm_forward(&s->compute, &norm, m, b->x, s->ld_hidden, normed);
    project_heads(s, batch, l, &heads, normed);
    keep_context(s, m, l);
    const ggd_context *seen = s->kept == NULL ? s->extended : NULL;  // which then holds all rows
    ggd_attention_forward(&s->compute, batch, &heads, seen, act->qkv, act->attn_out, act->lse);
    add_block(s, m, l, GGD_ATTN_OUTPUT, quantised(s, m, act->attn_out, s->model->shape.n_heads * s->model->shape.head_size));
}

// gate and up of the residual stream; what GGD_KEEP_WITHOUT_FFN computes again
static void ffn_inner_forward(ggd_session *s, size_t m, size_t l) {
    ggd_buffers *b = &s->buffers;
    ggd_layer_activations *act = &b->layers[l];
    ggd_linear gate = linear_of(s, l, GGD_FFN_GATE), up = linear_of(s, l, GGD_FFN_UP);
    ggd_norm norm = norm_of(s, l, GGD_NORM_FFN);
    ggd_operand normed = operand_of(s, b->normed, s->model->shape.hidden_size);
    ggd_rmsnorm_forward(&s->compute, &norm, m, b->x, s->ld_hidden, normed);
    ggd_linear_forward(&s->compute, &gate, m, normed, bias_of(s, l, GGD_FFN_GATE), ggd_place_of(&s->compute, act->gate));
    ggd_linear_forward(&s->compute, &up, m, normed, bias_of(s, l, GGD_FFN_UP), ggd_place_of(&s->compute, act->up));
}

// x -> x + feed-forward block
static void ffn_block_forward(ggd_session *s, const ggd_batch *batch, size_t l) {
    ggd_buffers *b = &s->buffers;
    int32_t ffn = s->model->shape.feed_forward_size;
    size_t m = (size_t)batch->n_rows;
    ffn_inner_forward(s, m, l);
    ggd_operand h = operand_of(s, b->h, ffn);
    ggd_gate_forward(&s->compute, s->model->gate, m, (size_t)ffn, b->layers[l].gate, b->layers[l].up, h);
    add_block(s, m, l, GGD_FFN_DOWN, h);
}

// A copy of the residual stream for the backward, where the policy wants one there.
static void keep_copy(ggd_session *s, size_t m, float **copies, size_t l) {
    if (copies != NULL) {
        memcpy(copies[l], s->buffers.x, m * s->ld_hidden * sizeof(float));
    }
}

static ggd_embedding embedding_of(const ggd_session *s) {
    return (ggd_embedding){s->model->token_embedding, s->model->embedding_scale};
}

const float *ggd_transformer_forward(ggd_session *s, const ggd_batch *batch, const ggd_adapter *adapter) {
    ggd_buffers *b = &s->buffers;
    ggd_embedding embedding = embedding_of(s);
    ggd_embedding_forward(&s->compute, &embedding, batch, adapter, b->x, s->ld_hidden);
    for (size_t l = 0; l < (size_t)s->model->shape.n_layers; l++) {
        keep_copy(s, (size_t)batch->n_rows, b->boundaries, l);
        attention_block_forward(s, batch, l);
        keep_copy(s, (size_t)batch->n_rows, b->middles, l);
        ffn_block_forward(s, batch, l);
    }
    return b->x;
}

// The gradient of what a block adds, where it is not dx itself.
static void enter_block(ggd_session *s, size_t m, size_t l, int norm) {
    if (s->model->blocks_apart) {
        ggd_norm post = norm_of(s, l, norm);
        ggd_block_backward(&s->compute, &post, s->model->residual_scale, m, s->buffers.dx, s->ld_hidden,
                           s->buffers.dx_activation);
    }
}

// dx -> dx + d (feed-forward block) / d x_mid
static void ffn_block_backward(ggd_session *s, const ggd_batch *batch, size_t l) {
    const ggd_compute *compute = &s->compute;
    ggd_buffers *b = &s->buffers;
    ggd_layer_activations *act = &b->layers[l];
    size_t m = (size_t)batch->n_rows, ffn = (size_t)s->model->shape.feed_forward_size;
    ggd_addend sum = {b->dnormed, s->ld_hidden};
    ggd_place dnormed = ggd_place_f32(b->dnormed, s->ld_hidden);
    ggd_norm norm = norm_of(s, l, GGD_NORM_FFN);
    ggd_linear gate = linear_of(s, l, GGD_FFN_GATE), up = linear_of(s, l, GGD_FFN_UP), down = linear_of(s, l, GGD_FFN_DOWN);
    enter_block(s, m, l, GGD_NORM_FFN_POST);
    ggd_linear_backward_input(compute, &down, m, b->dx_activation, &b->linear, nothing, ggd_place_of(compute, b->dgate));
    // In place: d gate where dh was, d up where up was, h where gate was.
    ggd_activation h = act->gate, dup = act->up;
    ggd_gate_backward(compute, s->model->gate, m, ffn, act->gate, act->up, b->dgate);
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
    ggd_heads heads = heads_of(s, l);
    ggd_norm norm = norm_of(s, l, GGD_NORM_ATTN);
    ggd_linear output = linear_of(s, l, GGD_ATTN_OUTPUT);
    enter_block(s, m, l, GGD_NORM_ATTN_POST);
    ggd_linear_backward_input(compute, &output, m, b->dx_activation, &b->linear, nothing, ggd_place_of(compute, b->dattn_out));
    ggd_linear_backward_lora(compute, &output, m, act->attn_out, b->dx_activation, &b->linear);
    ggd_attention_backward(compute, batch, &heads, act->qkv, act->attn_out, act->lse, b->dattn_out, b->dqkv);
    ggd_rmsnorm_repeat(compute, &norm, m, b->normed);
    for (int target = GGD_ATTN_Q; target <= GGD_ATTN_V; target++) {
        ggd_linear linear = linear_of(s, l, target);
        ggd_activation dy = columns_of(s, b->dqkv, target);
        ggd_norm of_heads = norm_of(s, l, target == GGD_ATTN_Q ? GGD_NORM_Q : GGD_NORM_K);
        if (target != GGD_ATTN_V && of_heads.weight != NULL) {
            ggd_heads_backward(compute, batch, &heads, target == GGD_ATTN_Q ? heads.n_heads : heads.n_kv_heads, &of_heads, dy);
        }
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
        if (s->model->layers[l].norms[GGD_NORM_FFN_POST] != NULL) {
            ffn_block_forward(s, batch, l);  // its norm's backward needs what the down projection gave
            return;
        }
        ffn_inner_forward(s, m, l);
        // The down projection's A h, without its output.
        ggd_operand h = {.x = b->h};
        ggd_gate_forward(&s->compute, s->model->gate, m, (size_t)s->model->shape.feed_forward_size, b->layers[l].gate,
                         b->layers[l].up, h);
        ggd_linear down = linear_of(s, l, GGD_FFN_DOWN);
        ggd_linear_forward_lora(&s->compute, &down, m, b->h);
    }
}

void ggd_transformer_backward(ggd_session *s, const ggd_batch *batch, const ggd_adapter *adapter, float *grad_offset) {
    size_t m = (size_t)batch->n_rows, hidden = (size_t)s->model->shape.hidden_size, n_layers = (size_t)s->model->shape.n_layers;
    int recomputes = s->buffers.boundaries != NULL || s->buffers.middles != NULL, apart = s->model->blocks_apart;
    for (size_t l = n_layers; l-- > 0;) {
        recompute_layer(s, batch, l);
        if (!apart && (recomputes || l + 1 == n_layers)) {  // else the layer after it left its dx there, or the block makes it
            ggd_to_activation(&s->compute, m, hidden, s->buffers.dx, s->ld_hidden, s->buffers.dx_activation);
        }
        ffn_block_backward(s, batch, l);
        attention_block_backward(s, batch, l);
    }
    ggd_embedding embedding = embedding_of(s);
    ggd_embedding_backward(&s->compute, &embedding, batch, adapter, s->buffers.dx, s->ld_hidden, grad_offset);
}

void ggd_bind_adapter(ggd_session *s, const ggd_adapter *adapter) {
    s->bound_panels = adapter != NULL && adapter->n_pairs > 0 && adapter->pairs == s->held.pairs ? s->held.panels : NULL;
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
                      .logit_cap = s->model->logit_cap,
                      .mask_token = adapter != NULL ? adapter->mask_token_id : -1};
}
