// fuzz_load.c - any bytes as a model file, for libFuzzer: the loader refuses them with a message, or the model computes logits. What the
// compiler's sanitizers find ends the process. Python's strict reader is not in front here: the core must stand by itself.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <unistd.h>

#include "ggd.h"
#include "ggml.h"

enum { N_TOKENS = 5, MAX_VALUES = 1 << 24 };

static void say_nothing(enum ggml_log_level level, const char *text, void *data) {
    (void)level;
    (void)text;
    (void)data;
}

static void need(int holds, const char *what) {
    if (!holds) {
        fprintf(stderr, "fuzz_load: %s: %s\n", what, ggd_last_error());
        abort();
    }
}

// Whether a pass over a few tokens is small work, so that an accepted input takes no seconds.
static int is_small(const ggd_shape *s) {
    size_t widest = (size_t)s->hidden_size + (size_t)s->feed_forward_size + (size_t)s->n_heads * (size_t)s->head_size;
    return s->n_layers <= 16 && widest <= 4096 && (size_t)s->vocab_size * (size_t)s->hidden_size <= MAX_VALUES &&
           s->context_length >= N_TOKENS;
}

static void compute(const ggd_model *model, const ggd_shape *shape) {
    ggd_session_options options = {.n_threads = 1, .compute = GGD_COMPUTE_FAST, .use_simd = 1, .keep = GGD_KEEP_ALL};
    ggd_session *session = NULL;
    need(ggd_session_create(model, &options, &session) == 0, "no session of a model that loads");
    int32_t tokens[N_TOKENS], rows[] = {N_TOKENS - 1};
    for (int32_t i = 0; i < N_TOKENS; i++) {
        tokens[i] = (shape->vocab_size - 1) * i / (N_TOKENS - 1);
    }
    ggd_segment segment = {.n_rows = N_TOKENS, .n_positions = N_TOKENS};
    ggd_batch batch = {
        .n_rows = N_TOKENS, .tokens = tokens, .n_segments = 1, .segments = &segment, .n_sequences = 1, .causal_ratio = 0.5f};
    float *logits = malloc((size_t)shape->vocab_size * sizeof *logits);
    need(logits != NULL && ggd_logits(session, &batch, NULL, 1, rows, logits) == 0, "no logits of a model that loads");
    free(logits);
    ggd_session_free(session);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size) {
    static int file = -1;
    static char path[64];
    if (file < 0) {
        ggml_log_set(say_nothing, NULL);
        file = memfd_create("model", 0);
        need(file >= 0, "no file in memory");
        snprintf(path, sizeof path, "/proc/self/fd/%d", file);
    }
    need(ftruncate(file, 0) == 0 && pwrite(file, data, size, 0) == (ssize_t)size, "cannot write the input");
    const char *paths[] = {path};
    ggd_model *model = NULL;
    if (ggd_model_load(paths, 1, &model) == 0) {
        ggd_shape shape;
        ggd_model_shape(model, &shape);
        if (is_small(&shape)) {
            compute(model, &shape);
        }
        ggd_model_free(model);
    }
    return 0;
}
