// session.h - everything mutable: workers, the memory plan, and one arena from which all buffers come.
#ifndef GGD_SESSION_H
#define GGD_SESSION_H

#include "context.h"
#include "linear.h"
#include "loss.h"
#include "model.h"
#include "ops.h"

// What a layer's forward leaves for its backward. The residual stream itself is float32 and runs on in one buffer.
typedef struct {
    ggd_activation qkv;                 // (M, [Q | K | V]) after RoPE
    ggd_activation attn_out;            // (M, H D)
    float *lse;                         // (M, H)
    ggd_activation gate, up;            // (M, F)
    ggd_activation p[GGD_N_TARGETS];    // (M, R): A x of each LoRA pair
    ggd_activation saved[GGD_N_NORMS];  // what a norm read: (M, C), of Q and K (M, H D) and (M, G D)
    float *norm_scales[GGD_N_NORMS];    // (M), of Q and K one for each piece that is normed
} ggd_layer_activations;

// Sizes that a plan is made for.
typedef struct {
    size_t n_rows, max_keys, max_positions, max_rank;
    int gradients, teacher;
    int keep;  // GGD_KEEP_*, of a call with gradients
} ggd_capacity;

typedef struct {
    float *x;               // (M, C) float32: the residual stream; in the backward dattn_out, then dnormed
    float **boundaries;     // (L): a copy of it before each layer where layers are computed again, else NULL
    float **middles;        // (L): a copy of it before each feed-forward block where only those are computed again, else NULL
    ggd_activation normed;  // (M, C); in the backward also dx_activation; in the loss its operand
    ggd_layer_activations *layers;                          // (L)
    const ggd_lora_pair **pairs;                            // (L, GGD_N_TARGETS), NULL where there is none
    float *before_rope;                                     // (M, H D) float32: Q, then K
    float *block;                                           // (M, C) float32: what a block adds, where blocks stand apart
    ggd_activation h;                                       // (M, F)
    float *cosine[GGD_N_ROPES], *sine[GGD_N_ROPES];         // (positions, n_rotated / 2)
    float *dx, *dnormed;                                    // (M, C) float32; dnormed lies in x
    ggd_activation dx_activation;                           // (M, C), dx as the first products of a block read it; lies in normed
    ggd_activation dgate;                                   // (M, F): d h, then d gate
    ggd_activation dattn_out, dqkv;                         // (M, H D), lies in x; (M, [dQ | dK | dV])
    ggd_int8_rows int8;                                     // (M, the widest operand): what a product in int8 reads
    ggd_int8_rows weights_int8, normed_int8, teacher_int8;  // the same of the loss
    ggd_linear_scratch linear;
    ggd_loss_scratch loss;
    uint8_t *thread_scratch;
} ggd_buffers;

// An adapter whose arrays do not change, packed once for all calls.
typedef struct {
    const ggd_lora_pair *pairs;  // whose; NULL: none
    ggd_lora_panels *panels;     // (L, GGD_N_TARGETS)
    uint8_t *memory;
} ggd_held_adapter;

struct ggd_session {
    const ggd_model *model;
    ggd_session_options options;
    int32_t int8;  // GGD_INT8_*
    int is_fast;   // products may be in the kernels' fast element, and in int8
    ggd_compute compute;
    ggd_heads heads;                                        // without what differs from layer to layer: window and RoPE
    size_t ld_hidden, ld_queries, ld_keys, ld_qkv, ld_ffn;  // row strides in elements
    ggd_held_adapter held;
    const ggd_lora_panels *bound_panels;  // of the adapter that is bound, or NULL
    ggd_context *extended;                // where the forward keeps keys and values, or NULL
    const int32_t *kept;                  // (n_kept), of these rows; NULL: of all
    int32_t n_kept;
    ggd_capacity capacity;
    ggd_buffers buffers;
    void *arena;
};

// Makes sure that the buffers hold a call of this size; allocates only if they do not.
int ggd_session_reserve(ggd_session *session, const ggd_capacity *wanted);

#endif
