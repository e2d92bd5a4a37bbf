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
