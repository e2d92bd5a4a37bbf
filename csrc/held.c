// held.c - an adapter that does not change while text is written: its panels are packed once, where each pass of a few rows would pack them anew.
#include <stdlib.h>

#include "error.h"
#include "session.h"

static ggd_linear pair_of(const ggd_session *s, const ggd_lora_pair *pair) {
    return (ggd_linear){.weight = &s->model->layers[pair->layer].linear[pair->target].w, .lora = pair};
}

static int is_of_model(const ggd_session *s, const ggd_lora_pair *pair) {
    return pair->layer >= 0 && pair->layer < s->model->shape.n_layers && pair->target >= 0 && pair->target < GGD_N_TARGETS &&
           pair->rank >= 1 && pair->a != NULL && pair->b != NULL;
}

static size_t bytes_of(const ggd_session *s, const ggd_lora_pair *pair) {
    ggd_linear linear = pair_of(s, pair);
    return ggd_lora_panels_bytes(&s->compute, &linear);
}

static void forget(ggd_session *s) {
    free(s->held.panels);
    free(s->held.memory);
    s->held = (ggd_held_adapter){0};
    s->bound_panels = NULL;
}

int ggd_session_hold(ggd_session *s, const ggd_adapter *adapter) {
    forget(s);
    if (adapter == NULL || adapter->n_pairs < 1) {
        return 0;
    }
    size_t bytes = 0;
    for (int32_t i = 0; i < adapter->n_pairs; i++) {
        if (!is_of_model(s, &adapter->pairs[i])) {
            return ggd_fail("LoRA pair %d is for no projection of the model", i);
        }
        bytes += bytes_of(s, &adapter->pairs[i]);
    }
    float *unpacked = malloc(GGD_UNPACKED_FLOATS * sizeof *unpacked);
    s->held.panels = calloc((size_t)s->model->shape.n_layers * GGD_N_TARGETS, sizeof *s->held.panels);
    s->held.memory = aligned_alloc(64, ggd_round_up(bytes, 64));
    if (unpacked == NULL || s->held.panels == NULL || s->held.memory == NULL) {
        free(unpacked);
        forget(s);
        return ggd_fail("out of memory: an adapter's panels need %zu MiB", bytes >> 20);
    }
    size_t offset = 0;
    for (int32_t i = 0; i < adapter->n_pairs; i++) {
        const ggd_lora_pair *pair = &adapter->pairs[i];
        ggd_linear linear = pair_of(s, pair);
        s->held.panels[pair->layer * GGD_N_TARGETS + pair->target] =
            ggd_lora_pack(&s->compute, &linear, unpacked, s->held.memory + offset);
        offset += bytes_of(s, pair);
    }
    free(unpacked);
    s->held.pairs = adapter->pairs;
    return 0;
}

void ggd_session_release(ggd_session *s, const ggd_adapter *adapter) {
    if (adapter != NULL && adapter->pairs == s->held.pairs) {
        forget(s);
    }
}
