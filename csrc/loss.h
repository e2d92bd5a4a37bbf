// loss.h - the head: logits of chosen rows, or weighted cross-entropy on them without ever holding whole logits.
#ifndef GGD_LOSS_H
#define GGD_LOSS_H

#include "gemm.h"
#include "include/ggd.h"

// Rows are worked off in chunks and the vocabulary in tiles, which bounds the memory.
enum { GGD_LOSS_ROWS = 1024, GGD_LOSS_TOKENS = 1024 };

typedef struct {
    ggd_matrix head;    // (V, C)
    const float *norm;  // (C)
    float rms_eps;
    int32_t hidden_token;  // its logit is -inf, -1: none
} ggd_head;

typedef struct {
    ggd_activation normed;          // (GGD_LOSS_ROWS, C)
    float *scales;                  // (GGD_LOSS_ROWS)
    float *logits;                  // (GGD_LOSS_ROWS, GGD_LOSS_TOKENS)
    ggd_activation weights;         // (GGD_LOSS_ROWS, GGD_LOSS_TOKENS): exp(logit - running maximum)
    float *dnormed;                 // (GGD_LOSS_ROWS, ld): their sum with the head's rows, then d loss / d normed
    float *largest, *target_logit;  // (GGD_LOSS_ROWS)
    double *sum;                    // (GGD_LOSS_ROWS)
    int32_t *rows;                  // (M): rows that count
    size_t ld;                      // of dnormed
} ggd_loss_scratch;

// x: (M, C) float32, the last layer's output. dx (M, C) is assigned if it is not NULL.
void ggd_loss_run(const ggd_compute *compute, const ggd_head *head, const ggd_loss_scratch *scratch, size_t m, const float *x,
                  size_t ld, ggd_objective *objective, float *dx);

// logits: (n_rows, V) of the given rows.
void ggd_logits_run(const ggd_compute *compute, const ggd_head *head, const ggd_loss_scratch *scratch, size_t n_rows,
                    const int32_t *rows, const float *x, size_t ld, float *logits);

#endif
