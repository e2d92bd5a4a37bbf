// model.c - what is asked of a model beside computing with it: its sizes, token rows, its end. load.c makes one.
#include "model.h"

#include <stdlib.h>
#include <sys/mman.h>

#include "bus.h"
#include "error.h"

void ggd_model_free(ggd_model *model) {
    if (model == NULL) {
        return;
    }
    for (size_t i = 0; i < model->n_maps; i++) {
        ggd_bus_forget(model->maps[i].data);
        munmap(model->maps[i].data, model->maps[i].bytes);
    }
    for (size_t i = 0; i < model->n_vectors; i++) {
        free(model->vectors[i]);
    }
    for (size_t i = 0; i < GGD_N_ROPES; i++) {
        free(model->ropes[i].frequencies);
    }
    free(model->maps);
    free(model->vectors);
    free(model->layers);
    free(model);
}

void ggd_model_shape(const ggd_model *model, ggd_shape *shape) { *shape = model->shape; }

int ggd_model_embed(const ggd_model *model, int32_t n_tokens, const int32_t *tokens, float *rows) {
    for (int32_t i = 0; i < n_tokens; i++) {
        if (tokens[i] < 0 || tokens[i] >= model->shape.vocab_size) {
            return ggd_fail("token id %d is outside the vocabulary of %d", tokens[i], model->shape.vocab_size);
        }
        ggd_matrix_unpack_row(&ggd_kernels_reference, &model->token_embedding, (size_t)tokens[i],
                              rows + (size_t)i * (size_t)model->shape.hidden_size);
    }
    return 0;
}

// ---- for another engine ----

// The file that holds an address; every matrix of a model lies in one.
static int32_t part_of(const ggd_model *model, const uint8_t *data) {
    int32_t part = 0;
    while ((size_t)part < model->n_maps && (data < (const uint8_t *)model->maps[part].data ||
                                            data >= (const uint8_t *)model->maps[part].data + model->maps[part].bytes)) {
        part++;
    }
    return part;
}

static ggd_weight weight_of(const ggd_model *model, const ggd_matrix *matrix, const float *bias) {
    return (ggd_weight){.data = matrix->data,
                        .type = matrix->stored,
                        .part = part_of(model, matrix->data),
                        .n_rows = (int32_t)matrix->n_rows,
                        .n_cols = (int32_t)matrix->n_cols,
                        .bias = bias};
}

void ggd_model_network(const ggd_model *model, ggd_network *network) {
    *network = (ggd_network){.rms_eps = model->rms_eps,
                             .rope_halves = model->rope_kind == GGD_ROPE_HALVES,
                             .n_rotated = (int32_t)model->n_rotated,
                             .original_context = (int32_t)model->original_context,
                             .gelu_gate = model->gate == GGD_GATE_GELU,
                             .wide_head_norms = model->wide_head_norms,
                             .embedding_scale = model->embedding_scale,
                             .residual_scale = model->residual_scale,
                             .score_scale = model->score_scale,
                             .score_cap = model->score_cap,
                             .logit_cap = model->logit_cap,
                             .temperature = model->temperature,
                             .head = weight_of(model, &model->head, NULL),
                             .output_norm = model->output_norm};
    for (size_t i = 0; i < GGD_N_ROPES; i++) {
        network->frequencies[i] = model->ropes[i].frequencies;
        network->magnitudes[i] = model->ropes[i].magnitude;
    }
}

int ggd_model_layer(const ggd_model *model, int32_t layer, ggd_layer_weights *weights) {
    if (layer < 0 || layer >= model->shape.n_layers) {
        return ggd_fail("layer %d is not one of %d", layer, model->shape.n_layers);
    }
    const ggd_layer *source = &model->layers[layer];
    *weights = (ggd_layer_weights){.rope = source->rope, .window = (int32_t)source->window};
    for (int target = 0; target < GGD_N_TARGETS; target++) {
        weights->projections[target] = weight_of(model, &source->linear[target].w, source->linear[target].bias);
    }
    for (int norm = 0; norm < GGD_N_NORMS; norm++) {
        weights->norms[norm] = source->norms[norm];
    }
    return 0;
}

int ggd_model_part(const ggd_model *model, int32_t part, const void **data, size_t *bytes) {
    if (part < 0 || (size_t)part >= model->n_maps) {
        return ggd_fail("part %d is not one of %zu", part, model->n_maps);
    }
    *data = model->maps[part].data;
    *bytes = model->maps[part].bytes;
    return 0;
}
