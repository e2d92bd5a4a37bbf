// arch.c - the table of architectures, as llama.cpp computes them (src/models/NAME.cpp). All have RMS norms, grouped queries, a gated
// feed-forward block and biases where the file has them; a row says in what else they differ. formats/architectures.py has the same table for the
// names and shapes in files; a test compares the two by ggd_arch_row.
#include "arch.h"

#include <stdio.h>
#include <string.h>

#include "include/ggd.h"

static const ggd_arch table[] = {
    {.name = "llama", .rope = GGD_ROPE_PAIRS, .features = GGD_PRE_NORMS | GGD_ROPE_FACTORS | GGD_LONG_FACTORS},
    {.name = "mistral3", .rope = GGD_ROPE_PAIRS, .features = GGD_PRE_NORMS | GGD_ROPE_FACTORS | GGD_LONG_FACTORS | GGD_YARN_KEYS},
    {.name = "smollm3", .rope = GGD_ROPE_PAIRS, .features = GGD_PRE_NORMS, .no_rope_period = 4},
    {.name = "granite", .rope = GGD_ROPE_PAIRS, .features = GGD_PRE_NORMS | GGD_ROPE_FACTORS | GGD_LONG_FACTORS | GGD_SCALE_KEYS},
    {.name = "qwen2", .rope = GGD_ROPE_HALVES, .features = GGD_PRE_NORMS},
    {.name = "qwen3", .rope = GGD_ROPE_HALVES, .features = GGD_PRE_NORMS | GGD_HEAD_NORMS},
    {.name = "phi3", .rope = GGD_ROPE_HALVES, .features = GGD_PRE_NORMS | GGD_GATE_IN_UP | GGD_LONG_FACTORS},
    {.name = "olmo2",
     .rope = GGD_ROPE_HALVES,
     .features = GGD_POST_NORMS | GGD_HEAD_NORMS | GGD_WIDE_HEAD_NORMS,
     .window_period = 4,
     .window_rope = GGD_WINDOW_ROPE_UNSCALED},
    {.name = "gemma2",
     .rope = GGD_ROPE_HALVES,
     .gate = GGD_GATE_GELU,
     .features = GGD_PRE_NORMS | GGD_POST_NORMS | GGD_EMBEDDING_BY_WIDTH | GGD_SCORE_CAP | GGD_LOGIT_CAP,
     .window = 4096,
     .window_period = 2,
     .window_rope = GGD_WINDOW_ROPE_SAME,
     .wide_query_layers = 46,
     .score_cap = 50.0f,
     .logit_cap = 30.0f},
    {.name = "gemma3",
     .rope = GGD_ROPE_HALVES,
     .gate = GGD_GATE_GELU,
     .features = GGD_PRE_NORMS | GGD_POST_NORMS | GGD_HEAD_NORMS | GGD_EMBEDDING_BY_WIDTH | GGD_LOGIT_CAP,
     .window_period = 6,
     .window_rope = GGD_WINDOW_ROPE_OWN_BASE,
     .wide_query_layers = 62},
};

enum { N_ARCHS = sizeof table / sizeof *table };

const ggd_arch *ggd_arch_find(const char *name) {
    for (size_t i = 0; i < N_ARCHS; i++) {
        if (strcmp(table[i].name, name) == 0) {
            return &table[i];
        }
    }
    return NULL;
}

const char *ggd_arch_row(int32_t index) {
    static _Thread_local char row[256];
    if (index < 0 || index >= N_ARCHS) {
        return NULL;
    }
    const ggd_arch *a = &table[index];
    snprintf(row, sizeof row,
             "%s rope=%d gate=%d features=%u window=%d window_period=%d window_rope=%d no_rope_period=%d wide_query_layers=%d "
             "score_cap=%g logit_cap=%g",
             a->name, a->rope, a->gate, a->features, a->window, a->window_period, a->window_rope, a->no_rope_period,
             a->wide_query_layers, (double)a->score_cap, (double)a->logit_cap);
    return row;
}
