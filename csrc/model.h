// model.h - an immutable model: hyperparameters and weights that stay where the files have them. It knows no architecture by name; what a model
// lacks is NULL, zero or one.
#ifndef GGD_MODEL_H
#define GGD_MODEL_H

#include "include/ggd.h"
#include "matrix.h"

enum { GGD_N_TARGETS = 7 };
enum { GGD_NORM_ATTN, GGD_NORM_ATTN_POST, GGD_NORM_FFN, GGD_NORM_FFN_POST, GGD_NORM_Q, GGD_NORM_K, GGD_N_NORMS };

// RoPE of most layers, of those with a window, and of sequences that are longer than the original context.
enum { GGD_ROPE_GLOBAL, GGD_ROPE_WINDOW, GGD_ROPE_LONG, GGD_N_ROPES };
typedef struct {
    float *frequencies;  // (n_rotated / 2) radians a position; NULL: the model has none of this kind
    float magnitude;     // what cosine and sine are multiplied by
} ggd_rope;

typedef struct {
    ggd_matrix w;       // (out, in)
    const float *bias;  // (out), padded by zeros to whole panels; NULL: none
} ggd_projection;

typedef struct {
    const float *norms[GGD_N_NORMS];       // (C), of Q and K (D) or (H D) and (G D); NULL: none
    ggd_projection linear[GGD_N_TARGETS];  // indexed by GGD_ATTN_Q ...
    int32_t rope;                          // GGD_ROPE_GLOBAL or GGD_ROPE_WINDOW; -1: none
    size_t window;                         // a query sees keys that are nearer than this, on both sides; 0: all
} ggd_layer;

typedef struct {
    void *data;  // read-only
    size_t bytes;
} ggd_map;

struct ggd_model {
    ggd_shape shape;
    float rms_eps;
    ggd_rope_kind rope_kind;
    size_t n_rotated;  // elements of a head that RoPE turns
    ggd_rope ropes[GGD_N_ROPES];
    size_t original_context;  // tokens; longer sequences take GGD_ROPE_LONG, where there is one
    ggd_gate gate;
    int wide_head_norms;           // the norms of Q and K run over all heads of a row together
    float embedding_scale;         // of token rows with all that is added to them
    float residual_scale;          // of what a block adds
    int blocks_apart;              // a block goes to a buffer of its own before it is added: it is normed, scaled or has a bias
    float score_scale, score_cap;  // scores are score_scale q k, then soft-capped; 0: no cap
    float logit_cap;               // 0: none
    float temperature;             // queries grow by temperature * log(1 + whole original contexts before them)
    ggd_matrix token_embedding;    // (V, C)
    ggd_matrix head;               // (V, C)
    const float *output_norm;      // (C), times what logits are scaled by
    ggd_layer *layers;             // (L)
    float **vectors;               // what the norm and bias pointers point to
    size_t n_vectors;
    ggd_map *maps;  // the files
    size_t n_maps;
};

#endif
