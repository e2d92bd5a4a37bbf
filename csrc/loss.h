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
    float logit_cap;     // logits are soft-capped at it; 0: they are not
    int32_t mask_token;  // its logit is -inf, -1: none
} ggd_head;

// A softmax over the vocabulary whose tiles arrive one after the other, for the rows of a chunk.
typedef struct {
    float *logits;   // (GGD_LOSS_ROWS, GGD_LOSS_TOKENS), the tile
    float *largest;  // (GGD_LOSS_ROWS), running maximum
    double *sum;     // (GGD_LOSS_ROWS), of exp(logit - largest)
    float *mean;     // (GGD_LOSS_ROWS, ld), of exp(logit - largest) times the head's rows; the gradient needs it
} ggd_online_softmax;

typedef struct {
    ggd_activation normed;  // (GGD_LOSS_ROWS, C)
    float *scales;          // (GGD_LOSS_ROWS)
    ggd_activation
        weights;  // (GGD_LOSS_ROWS, GGD_LOSS_TOKENS): exp(logit - largest) of the tile, times the slope of the logits' soft cap
    ggd_online_softmax own;
    float *target_logit;  // (GGD_LOSS_ROWS)
    int32_t *rows;        // (M): rows that count
    size_t ld;            // of both means
    // Room for operands in int8 where they are multiplied so, else NULL: the weights, and the normed rows of both softmaxes.
    ggd_int8_rows *weights_int8, *normed_int8, *teacher_int8;
    // The teacher's, where a session has made room for one.
    ggd_activation teacher_normed;  // (M, C), by the teacher's row
    ggd_activation teacher_chunk;   // (GGD_LOSS_ROWS, C)
    ggd_online_softmax teacher;
    double *cross;         // (GGD_LOSS_ROWS), sum of exp(teacher's logit - largest) times the own logit
    double *teacher_loss;  // (M)
} ggd_loss_scratch;

// Norms all rows of the teacher's last layer for the ggd_loss_run that follows.
void ggd_keep_teacher(const ggd_compute *compute, const ggd_head *head, const ggd_loss_scratch *scratch, size_t m, const float *x,
                      size_t ld);

// x: (M, C) float32, the last layer's output. dx (M, C) is assigned if it is not NULL.
void ggd_loss_run(const ggd_compute *compute, const ggd_head *head, const ggd_loss_scratch *scratch, size_t m, const float *x,
                  size_t ld, ggd_objective *objective, float *dx);

// logits: (n_rows, V) of the given rows.
void ggd_logits_run(const ggd_compute *compute, const ggd_head *head, const ggd_loss_scratch *scratch, size_t n_rows,
                    const int32_t *rows, const float *x, size_t ld, float *logits);

#endif
