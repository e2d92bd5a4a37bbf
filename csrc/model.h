// model.h - an immutable model: hyperparameters and weights that stay where the file has them.
#ifndef GGD_MODEL_H
#define GGD_MODEL_H

#include "include/ggd.h"
#include "matrix.h"

enum { GGD_N_TARGETS = 7 };

typedef struct {
    const float *attn_norm;            // (C)
    const float *ffn_norm;             // (C)
    ggd_matrix linear[GGD_N_TARGETS];  // indexed by GGD_ATTN_Q ...: (out, in)
} ggd_layer;

struct ggd_model {
    ggd_shape shape;
    float rms_eps;
    float *rope_frequencies;     // (D / 2) radians a position
    ggd_matrix token_embedding;  // (V, C)
    ggd_matrix head;             // (V, C)
    const float *output_norm;    // (C)
    ggd_layer *layers;           // (L)
    float *norms;                // (2 L + 1, C), what the norm pointers point into
    void *map;                   // the whole file, read-only
    size_t bytes_map;
};

#endif
