// attention.h - multi-head attention with grouped queries under the fractional causal mask, forward and backward.
#ifndef GGD_ATTENTION_H
#define GGD_ATTENTION_H

#include "ops.h"

// qkv: (M, [Q | K | V]) after RoPE. out: (M, H * D). lse: (M, H), the log of each softmax's denominator, for the backward.
// kept: a context that holds the batch's keys and values behind its rows already; they are read as it has rounded them. NULL = from qkv.
void ggd_attention_forward(const ggd_compute *compute, const ggd_batch *batch, const ggd_heads *heads, const ggd_context *kept,
                           ggd_activation qkv, ggd_activation out, float *lse);

// dqkv: (M, [dQ | dK | dV]) before RoPE, but after the norms of Q and K, from dout (M, H * D).
void ggd_attention_backward(const ggd_compute *compute, const ggd_batch *batch, const ggd_heads *heads, ggd_activation qkv,
                            ggd_activation out, const float *lse, ggd_activation dout, ggd_activation dqkv);

// Scratch bytes of one thread; linear in the keys of a segment.
size_t ggd_attention_bytes_scratch(ggd_element element, const ggd_heads *heads, size_t max_keys, int gradients);

#endif
