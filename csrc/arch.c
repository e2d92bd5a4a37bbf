// arch.c - the table of architectures. All rows so far share RoPE on interleaved pairs (2i, 2i + 1), RMSNorm before attention and
// feed-forward, SwiGLU and no biases; an architecture that differs adds a column for the difference.
#include "arch.h"

#include <string.h>

static const ggd_arch table[] = {
    {
        .name = "llama",
        .linear = {"attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"},
        .attn_norm = "attn_norm",
        .ffn_norm = "ffn_norm",
    },
};

const ggd_arch *ggd_arch_find(const char *name) {
    for (size_t i = 0; i < sizeof table / sizeof *table; i++) {
        if (strcmp(table[i].name, name) == 0) {
            return &table[i];
        }
    }
    return NULL;
}

const char *ggd_arch_names(void) { return "llama"; }
