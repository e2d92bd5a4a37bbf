// arch.h - what the loader has to know about an architecture, one table row each. Nothing else reads it: the network sees a ggd_model.
#ifndef GGD_ARCH_H
#define GGD_ARCH_H

#include <stddef.h>
#include <stdint.h>

#include "kernels/kernels.h"

enum {
    GGD_PRE_NORMS = 1 << 0,           // attn_norm, ffn_norm: what a block reads
    GGD_POST_NORMS = 1 << 1,          // post_attention_norm, post_ffw_norm: what a block adds
    GGD_HEAD_NORMS = 1 << 2,          // attn_q_norm, attn_k_norm, head by head
    GGD_WIDE_HEAD_NORMS = 1 << 3,     // the same, over all heads of a row together
    GGD_GATE_IN_UP = 1 << 4,          // ffn_up holds gate's rows, then up's
    GGD_EMBEDDING_BY_WIDTH = 1 << 5,  // embeddings are multiplied by sqrt(C)
    GGD_SCALE_KEYS = 1 << 6,          // embedding_scale, residual_scale, attention.scale, logit_scale; rope.scaling.finetuned
    GGD_SCORE_CAP = 1 << 7,           // attn_logit_softcapping
    GGD_LOGIT_CAP = 1 << 8,           // final_logit_softcapping
    GGD_ROPE_FACTORS = 1 << 9,        // rope_freqs.weight
    GGD_LONG_FACTORS = 1 << 10,       // rope_factors_long.weight, rope_factors_short.weight
    GGD_YARN_KEYS = 1 << 11           // rope.scaling.yarn_*, attention.temperature_scale
};

// RoPE of the layers that have a window.
typedef enum {
    GGD_WINDOW_ROPE_SAME,      // as the others', with an own base where the file has rope.freq_base_swa
    GGD_WINDOW_ROPE_OWN_BASE,  // rope.freq_base_swa or 10000, positions never scaled
    GGD_WINDOW_ROPE_UNSCALED   // the others' base, neither scaled nor magnified
} ggd_window_rope;

typedef struct {
    const char *name;  // general.architecture
    ggd_rope_kind rope;
    ggd_gate gate;
    unsigned features;      // GGD_PRE_NORMS ...
    int32_t window;         // width where the file names none; 0: no window
    int32_t window_period;  // each n-th layer has none, where the file has no pattern; 0: no layer has one
    ggd_window_rope window_rope;
    int32_t no_rope_period;      // each n-th layer goes without RoPE; 0: none does
    int32_t wide_query_layers;   // a model of so many layers divides scores by sqrt(C / H), not sqrt(D)
    float score_cap, logit_cap;  // where the file names none; 0: none
} ggd_arch;

const ggd_arch *ggd_arch_find(const char *name);  // NULL if it is not supported

#endif
