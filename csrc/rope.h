// rope.h - the rotary frequencies of a model, from its file's keys and factor tensors.
#ifndef GGD_ROPE_H
#define GGD_ROPE_H

#include "arch.h"
#include "keys.h"
#include "model.h"

// Factors that divide the frequencies, (n_rotated / 2) each; NULL: none.
typedef struct {
    const float *all;             // rope_freqs.weight
    const float *short_, *long_;  // up to the original context, and beyond it
} ggd_rope_factors;

// Fills model->ropes; n_rotated, original_context and the layers' rope are set.
int ggd_rope_read(const ggd_keys *keys, const ggd_arch *arch, const ggd_rope_factors *factors, ggd_model *model);

#endif
