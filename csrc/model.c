// model.c - GGUF file -> immutable model: read the header through ggml's gguf API, check every tensor's type, shape and place, map the
// file and bind the weights in it. Nothing is unpacked but the norms.
//
// The Python side has already parsed the header strictly (model_file.py), so that messages there are the ones a user sees; here every
// value is checked again, because the core must not read past the map whoever calls it.
#include "model.h"

#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "arch.h"
#include "error.h"
#include "ggml.h"
#include "gguf.h"

static const struct {
    enum ggml_type stored;
    ggd_type type;
} own_types[] = {
    {GGML_TYPE_F32, GGD_F32},   {GGML_TYPE_F16, GGD_F16},       {GGML_TYPE_BF16, GGD_BF16},     {GGML_TYPE_Q8_0, GGD_Q8_0},
    {GGML_TYPE_Q4_0, GGD_Q4_0}, {GGML_TYPE_Q4_1, GGD_Q4_1},     {GGML_TYPE_Q5_0, GGD_Q5_0},     {GGML_TYPE_Q5_1, GGD_Q5_1},
    {GGML_TYPE_Q4_K, GGD_Q4_K}, {GGML_TYPE_Q5_K, GGD_Q5_K},     {GGML_TYPE_Q6_K, GGD_Q6_K},     {GGML_TYPE_Q2_K, GGD_Q2_K},
    {GGML_TYPE_Q3_K, GGD_Q3_K}, {GGML_TYPE_IQ4_NL, GGD_IQ4_NL}, {GGML_TYPE_IQ4_XS, GGD_IQ4_XS}, {GGML_TYPE_MXFP4, GGD_MXFP4},
};

// Pieces of this many elements are unpacked at a time (gemm.c), so a block must divide it.
enum { PIECE = 256 };

static ggd_type own_type(int32_t id) {
    for (size_t i = 0; i < sizeof own_types / sizeof *own_types; i++) {
        if ((int32_t)own_types[i].stored == id) {
            return own_types[i].type;
        }
    }
    return GGD_OTHER;
}

// What has no own kernels ggml's to_float unpacks, which reads nothing but constants: any thread may call it, without set-up.
int ggd_tensor_type(int32_t id, ggd_tensor_type_info *info) {
    *info = (ggd_tensor_type_info){0};
    if (id < 0 || id >= GGML_TYPE_COUNT) {
        return -1;
    }
    const struct ggml_type_traits *traits = ggml_get_type_traits((enum ggml_type)id);
    int own_kernels = own_type(id) != GGD_OTHER, block = (int)traits->blck_size;
    *info = (ggd_tensor_type_info){traits->type_name, block, (int32_t)traits->type_size, own_kernels};
    return own_kernels || (traits->is_quantized && traits->to_float != NULL && block > 0 && PIECE % block == 0) ? 0 : -1;
}

typedef struct {
    struct gguf_context *gguf;
    const ggd_arch *arch;
    ggd_model *model;
} loader;

static int64_t find_arch_key(const loader *l, const char *suffix) {
    char key[128];
    snprintf(key, sizeof key, "%s.%s", l->arch->name, suffix);
    return gguf_find_key(l->gguf, key);
}

// An unsigned key; `fallback` < 0 makes it required.
static int read_count(const loader *l, const char *suffix, int64_t fallback, int32_t *value) {
    int64_t id = find_arch_key(l, suffix), number;
    if (id < 0) {
        number = fallback;
    } else {
        enum gguf_type type = gguf_get_kv_type(l->gguf, id);
        number = type == GGUF_TYPE_UINT32  ? (int64_t)gguf_get_val_u32(l->gguf, id)
                 : type == GGUF_TYPE_INT32 ? (int64_t)gguf_get_val_i32(l->gguf, id)
                                           : -1;
    }
    if (number < 0 || number > INT32_MAX) {
        return ggd_fail("%s.%s is missing or no unsigned 32-bit number", l->arch->name, suffix);
    }
    *value = (int32_t)number;
    return 0;
}

static int read_float(const loader *l, const char *suffix, float fallback, float *value) {
    int64_t id = find_arch_key(l, suffix);
    if (id >= 0 && gguf_get_kv_type(l->gguf, id) != GGUF_TYPE_FLOAT32) {
        return ggd_fail("%s.%s is no 32-bit float", l->arch->name, suffix);
    }
    *value = id < 0 ? fallback : gguf_get_val_f32(l->gguf, id);
    return isfinite(*value) && *value > 0 ? 0 : ggd_fail("%s.%s is missing or not positive", l->arch->name, suffix);
}

static int read_shape(loader *l) {
    ggd_shape *s = &l->model->shape;
    if (read_count(l, "block_count", -1, &s->n_layers) || read_count(l, "embedding_length", -1, &s->hidden_size) ||
        read_count(l, "attention.head_count", -1, &s->n_heads) ||
        read_count(l, "attention.head_count_kv", s->n_heads, &s->n_kv_heads) ||
        read_count(l, "feed_forward_length", -1, &s->feed_forward_size) ||
        read_count(l, "context_length", -1, &s->context_length) ||
        read_float(l, "attention.layer_norm_rms_epsilon", NAN, &l->model->rms_eps)) {
        return -1;
    }
    if (s->n_layers < 1 || s->n_layers > 4096 || s->n_heads < 1 || s->n_kv_heads < 1 || s->n_heads % s->n_kv_heads != 0) {
        return ggd_fail("%d layers, %d heads, %d key/value heads is no valid shape", s->n_layers, s->n_heads, s->n_kv_heads);
    }
    if (read_count(l, "attention.key_length", s->hidden_size / s->n_heads, &s->head_size)) {
        return -1;
    }
    if (s->hidden_size < 1 || s->feed_forward_size < 1 || s->context_length < 1) {
        return ggd_fail("hidden size %d, feed-forward size %d and context length %d must be positive", s->hidden_size,
                        s->feed_forward_size, s->context_length);
    }
    if (s->head_size < 2 || s->head_size % 2 != 0 || s->head_size > 4096) {
        return ggd_fail("head size %d must be even, for RoPE's pairs, and at most 4096", s->head_size);
    }
    return 0;
}

// A tensor of exactly (n_rows, n_cols) inside the file.
static int bind_matrix(const loader *l, const char *name, size_t n_rows, size_t n_cols, ggd_matrix *matrix) {
    int64_t id = gguf_find_tensor(l->gguf, name);
    if (id < 0) {
        return ggd_fail("tensor %s is missing", name);
    }
    enum ggml_type stored = gguf_get_tensor_type(l->gguf, id);
    ggd_tensor_type_info type = {0};
    if (ggd_tensor_type((int32_t)stored, &type)) {
        return ggd_fail("tensor %s has the unsupported type %s", name, type.name != NULL ? type.name : "unknown");
    }
    const int64_t *ne = gguf_get_tensor_ne(l->gguf, id);
    if (ne[0] != (int64_t)n_cols || ne[1] != (int64_t)n_rows || ne[2] != 1 || ne[3] != 1) {
        return ggd_fail("tensor %s has the shape (%lld, %lld), not (%zu, %zu)", name, (long long)ne[1], (long long)ne[0], n_rows,
                        n_cols);
    }
    size_t block = (size_t)type.block, bytes_block = (size_t)type.bytes_block;
    if (n_cols % block != 0) {
        return ggd_fail("tensor %s: %zu columns are not divisible by the block size %zu", name, n_cols, block);
    }
    size_t offset = gguf_get_data_offset(l->gguf) + gguf_get_tensor_offset(l->gguf, id), bytes_row = ggml_row_size(stored, ne[0]);
    if (offset > l->model->bytes_map || bytes_row * n_rows > l->model->bytes_map - offset) {
        return ggd_fail("tensor %s ends past the end of the file", name);
    }
    const uint8_t *data = (const uint8_t *)l->model->map + offset;
    *matrix = (ggd_matrix){data, n_rows, n_cols, bytes_row, own_type((int32_t)stored), block, bytes_block, NULL};
    if (matrix->type == GGD_OTHER) {
        matrix->to_float = ggml_get_type_traits(stored)->to_float;
    }
    return 0;
}

static int bind_norm(const loader *l, const char *name, size_t slot, const float **norm) {
    size_t hidden = (size_t)l->model->shape.hidden_size;
    ggd_matrix row = {0};
    if (bind_matrix(l, name, 1, hidden, &row)) {
        return -1;
    }
    float *values = l->model->norms + slot * hidden;
    ggd_matrix_unpack_row(&ggd_kernels_reference, &row, 0, values);
    *norm = values;
    return 0;
}

static int bind_layer(loader *l, int32_t index) {
    const ggd_shape *s = &l->model->shape;
    size_t hidden = (size_t)s->hidden_size, ffn = (size_t)s->feed_forward_size;
    size_t queries = (size_t)s->n_heads * (size_t)s->head_size, keys = (size_t)s->n_kv_heads * (size_t)s->head_size;
    const size_t outputs[GGD_N_TARGETS] = {queries, keys, keys, hidden, ffn, ffn, hidden};
    const size_t inputs[GGD_N_TARGETS] = {hidden, hidden, hidden, queries, hidden, hidden, ffn};
    ggd_layer *layer = &l->model->layers[index];
    char name[96];
    for (int target = 0; target < GGD_N_TARGETS; target++) {
        snprintf(name, sizeof name, "blk.%d.%s.weight", index, l->arch->linear[target]);
        if (bind_matrix(l, name, outputs[target], inputs[target], &layer->linear[target])) {
            return -1;
        }
    }
    snprintf(name, sizeof name, "blk.%d.%s.weight", index, l->arch->attn_norm);
    if (bind_norm(l, name, 2 * (size_t)index, &layer->attn_norm)) {
        return -1;
    }
    snprintf(name, sizeof name, "blk.%d.%s.weight", index, l->arch->ffn_norm);
    return bind_norm(l, name, 2 * (size_t)index + 1, &layer->ffn_norm);
}

// theta_i = freq_scale * freq_base^(-2i / D) / factor_i
static int read_rope(loader *l) {
    size_t half = (size_t)l->model->shape.head_size / 2;
    float base, factor;
    int32_t rotated;
    if (read_float(l, "rope.freq_base", 10000.0f, &base) || read_float(l, "rope.scaling.factor", 1.0f, &factor) ||
        read_count(l, "rope.dimension_count", l->model->shape.head_size, &rotated)) {
        return -1;
    }
    if (rotated != l->model->shape.head_size) {
        return ggd_fail("RoPE on %d of %d dimensions is not supported", rotated, l->model->shape.head_size);
    }
    float *frequencies = l->model->rope_frequencies = malloc(half * sizeof *frequencies);
    if (frequencies == NULL) {
        return ggd_fail("out of memory for the RoPE frequencies");
    }
    ggd_matrix factors = {0};
    int has_factors = gguf_find_tensor(l->gguf, "rope_freqs.weight") >= 0;
    if (has_factors && bind_matrix(l, "rope_freqs.weight", 1, half, &factors)) {
        return -1;
    }
    for (size_t i = 0; i < half; i++) {
        frequencies[i] = 1.0f;
    }
    if (has_factors) {
        ggd_matrix_unpack_row(&ggd_kernels_reference, &factors, 0, frequencies);
    }
    for (size_t i = 0; i < half; i++) {
        frequencies[i] = (float)(pow(base, -(double)i / (double)half) / ((double)factor * frequencies[i]));
    }
    return 0;
}

static int bind_weights(loader *l) {
    ggd_model *model = l->model;
    size_t hidden = (size_t)model->shape.hidden_size, n_layers = (size_t)model->shape.n_layers;
    int64_t embedding = gguf_find_tensor(l->gguf, "token_embd.weight");
    if (embedding < 0) {
        return ggd_fail("tensor token_embd.weight is missing");
    }
    int64_t vocab = gguf_get_tensor_ne(l->gguf, embedding)[1];
    if (vocab < 2 || vocab > INT32_MAX / 4) {
        return ggd_fail("a vocabulary of %lld tokens is not supported", (long long)vocab);
    }
    model->shape.vocab_size = (int32_t)vocab;
    model->layers = calloc(n_layers, sizeof *model->layers);
    model->norms = malloc((2 * n_layers + 1) * hidden * sizeof *model->norms);
    if (model->layers == NULL || model->norms == NULL) {
        return ggd_fail("out of memory for %zu layers", n_layers);
    }
    model->shape.tied_head = gguf_find_tensor(l->gguf, "output.weight") < 0;
    const char *head = model->shape.tied_head ? "token_embd.weight" : "output.weight";
    if (bind_matrix(l, "token_embd.weight", (size_t)vocab, hidden, &model->token_embedding) ||
        bind_matrix(l, head, (size_t)vocab, hidden, &model->head) ||
        bind_norm(l, "output_norm.weight", 2 * n_layers, &model->output_norm)) {
        return -1;
    }
    for (int32_t layer = 0; layer < model->shape.n_layers; layer++) {
        if (bind_layer(l, layer)) {
            return -1;
        }
    }
    return read_rope(l);
}

static int map_file(ggd_model *model, const char *path) {
    int file = open(path, O_RDONLY);
    struct stat status;
    if (file < 0 || fstat(file, &status) != 0 || status.st_size <= 0) {
        if (file >= 0) {
            close(file);
        }
        return ggd_fail("cannot open %s", path);
    }
    model->bytes_map = (size_t)status.st_size;
    model->map = mmap(NULL, model->bytes_map, PROT_READ, MAP_SHARED, file, 0);
    close(file);
    if (model->map == MAP_FAILED) {
        model->map = NULL;
        return ggd_fail("cannot map %s", path);
    }
    return 0;
}

static int load(loader *l) {
    int64_t id = gguf_find_key(l->gguf, "general.architecture");
    if (id < 0 || gguf_get_kv_type(l->gguf, id) != GGUF_TYPE_STRING) {
        return ggd_fail("general.architecture is missing");
    }
    l->arch = ggd_arch_find(gguf_get_val_str(l->gguf, id));
    if (l->arch == NULL) {
        return ggd_fail("architecture %s is not supported (supported: %s)", gguf_get_val_str(l->gguf, id), ggd_arch_names());
    }
    return read_shape(l) || bind_weights(l) ? -1 : 0;
}

int ggd_model_load(const char *path, ggd_model **model) {
    *model = NULL;
    loader l = {.model = calloc(1, sizeof **model)};
    int status = -1;
    if (l.model == NULL) {
        return ggd_fail("out of memory for a model");
    }
    if (map_file(l.model, path)) {
        goto cleanup;
    }
    l.gguf = gguf_init_from_file(path, (struct gguf_init_params){.no_alloc = true, .ctx = NULL});
    if (l.gguf == NULL) {
        ggd_fail("%s is no readable GGUF file", path);
        goto cleanup;
    }
    status = load(&l);
cleanup:
    if (l.gguf != NULL) {
        gguf_free(l.gguf);
    }
    if (status != 0) {
        ggd_model_free(l.model);
        return -1;
    }
    *model = l.model;
    return 0;
}

void ggd_model_free(ggd_model *model) {
    if (model == NULL) {
        return;
    }
    if (model->map != NULL) {
        munmap(model->map, model->bytes_map);
    }
    free(model->layers);
    free(model->norms);
    free(model->rope_frequencies);
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

const char *ggd_ggml_version(void) { return ggml_version(); }
