// load.c - GGUF files -> immutable model: read the header through ggml's gguf API, check every tensor's type, shape and place, map the
// files and bind the weights in them. Nothing is unpacked but norms, biases and RoPE factors.
//
// The Python side has already parsed the header strictly (formats/), so that messages there are the ones a user sees; here every
// value is checked again, because the core must not read past the map whoever calls it.
#include "model.h"

#include <fcntl.h>
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "arch.h"
#include "bus.h"
#include "error.h"
#include "ggml.h"
#include "gguf.h"
#include "keys.h"
#include "rope.h"

enum { MAX_PARTS = 4096, MAX_LAYERS = 4096, NAME_SIZE = 96 };

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
    struct gguf_context **parts;  // a header a file; keys are those of the first
    size_t n_parts;
    ggd_keys keys;
    const ggd_arch *arch;
    ggd_model *model;
} loader;

// ---- sizes ----

static int read_sizes(loader *l) {
    ggd_shape *s = &l->model->shape;
    const ggd_keys *keys = &l->keys;
    if (ggd_keys_count(keys, "block_count", -1, &s->n_layers) || ggd_keys_count(keys, "embedding_length", -1, &s->hidden_size) ||
        ggd_keys_count(keys, "attention.head_count", -1, &s->n_heads) ||
        ggd_keys_count(keys, "attention.head_count_kv", s->n_heads, &s->n_kv_heads) ||
        ggd_keys_count(keys, "feed_forward_length", -1, &s->feed_forward_size) ||
        ggd_keys_count(keys, "context_length", -1, &s->context_length) ||
        ggd_keys_positive(keys, "attention.layer_norm_rms_epsilon", NAN, &l->model->rms_eps)) {
        return -1;
    }
    if (s->n_layers < 1 || s->n_layers > MAX_LAYERS || s->n_heads < 1 || s->n_kv_heads < 1 || s->n_heads % s->n_kv_heads != 0) {
        return ggd_fail("%d layers, %d heads, %d key/value heads is no valid shape", s->n_layers, s->n_heads, s->n_kv_heads);
    }
    if (ggd_keys_count(keys, "attention.key_length", s->hidden_size / s->n_heads, &s->head_size)) {
        return -1;
    }
    if (s->hidden_size < 1 || s->feed_forward_size < 1 || s->context_length < 1) {
        return ggd_fail("hidden size %d, feed-forward size %d and context length %d must be positive", s->hidden_size,
                        s->feed_forward_size, s->context_length);
    }
    return s->head_size < 2 || s->head_size % 2 != 0 || s->head_size > 4096
               ? ggd_fail("head size %d must be even and between 2 and 4096", s->head_size)
               : 0;
}

static int read_rotation(loader *l) {
    ggd_model *model = l->model;
    const ggd_shape *s = &model->shape;
    int32_t rotated, original;
    if (ggd_keys_count(&l->keys, "rope.dimension_count", s->head_size, &rotated) ||
        ggd_keys_count(&l->keys, "rope.scaling.original_context_length", s->context_length, &original) ||
        (l->arch->features & GGD_YARN_KEYS && ggd_keys_float(&l->keys, "attention.temperature_scale", 0, &model->temperature))) {
        return -1;
    }
    if (rotated < 2 || rotated % 2 != 0 || rotated > s->head_size) {
        return ggd_fail("RoPE on %d of %d elements is not supported", rotated, s->head_size);
    }
    original = original > 0 ? original : s->context_length;  // only some scalings read it
    model->rope_kind = l->arch->rope;
    model->n_rotated = (size_t)rotated;
    model->original_context = (size_t)original;
    return 0;
}

static int read_scales(loader *l) {
    ggd_model *model = l->model;
    const ggd_shape *s = &model->shape;
    const ggd_arch *arch = l->arch;
    float attention = 0;
    model->gate = arch->gate;
    model->wide_head_norms = (arch->features & GGD_WIDE_HEAD_NORMS) != 0;
    model->embedding_scale = arch->features & GGD_EMBEDDING_BY_WIDTH ? sqrtf((float)s->hidden_size) : 1.0f;
    model->residual_scale = 1.0f;
    int wide = arch->wide_query_layers != 0 && s->n_layers == arch->wide_query_layers;
    model->score_scale = 1.0f / sqrtf((float)(wide ? s->hidden_size / s->n_heads : s->head_size));
    if (arch->features & GGD_SCALE_KEYS) {
        if (ggd_keys_float(&l->keys, "embedding_scale", 1.0f, &model->embedding_scale) ||
            ggd_keys_float(&l->keys, "residual_scale", 1.0f, &model->residual_scale) ||
            ggd_keys_float(&l->keys, "attention.scale", 0, &attention)) {
            return -1;
        }
        model->embedding_scale = model->embedding_scale == 0 ? 1.0f : model->embedding_scale;
        model->residual_scale = model->residual_scale == 0 ? 1.0f : model->residual_scale;
        model->score_scale = attention == 0 ? model->score_scale : attention;
    }
    if ((arch->features & GGD_SCORE_CAP &&
         ggd_keys_float(&l->keys, "attn_logit_softcapping", arch->score_cap, &model->score_cap)) ||
        (arch->features & GGD_LOGIT_CAP &&
         ggd_keys_float(&l->keys, "final_logit_softcapping", arch->logit_cap, &model->logit_cap))) {
        return -1;
    }
    return model->score_cap < 0 || model->logit_cap < 0 ? ggd_fail("a soft cap is below zero") : 0;
}

// Which layers have a window and which RoPE.
static int read_layer_kinds(loader *l) {
    const ggd_arch *arch = l->arch;
    int32_t window = 0, period = arch->window_period, has_rope = 1;
    if (arch->window_period > 0 && ggd_keys_count(&l->keys, "attention.sliding_window", arch->window, &window)) {
        return -1;
    }
    int listed = ggd_keys_flag(&l->keys, "attention.sliding_window_pattern", 0) >= 0;
    if (window > 0 && !listed && ggd_keys_count(&l->keys, "attention.sliding_window_pattern", period, &period)) {
        return -1;
    }
    if (arch->features & GGD_SCALE_KEYS) {
        has_rope = ggd_keys_bool(&l->keys, "rope.scaling.finetuned", 1);
    }
    for (int32_t i = 0; i < l->model->shape.n_layers; i++) {
        ggd_layer *layer = &l->model->layers[i];
        int windowed = window > 0 && (listed ? ggd_keys_flag(&l->keys, "attention.sliding_window_pattern", (size_t)i) > 0
                                             : period == 0 || i % period < period - 1);
        layer->window = windowed ? (size_t)window : 0;
        layer->rope = windowed ? GGD_ROPE_WINDOW : GGD_ROPE_GLOBAL;
        if (!has_rope || (arch->no_rope_period > 0 && (i + 1) % arch->no_rope_period == 0)) {
            layer->rope = -1;
        }
    }
    return 0;
}

// ---- tensors ----

// The part that holds a tensor, and its index there; -1 if none does.
static int64_t find_tensor(const loader *l, const char *name, size_t *part) {
    for (*part = 0; *part < l->n_parts; ++*part) {
        int64_t id = gguf_find_tensor(l->parts[*part], name);
        if (id >= 0) {
            return id;
        }
    }
    return -1;
}

static int has_tensor(const loader *l, const char *name) {
    size_t part;
    return find_tensor(l, name, &part) >= 0;
}

// A tensor of exactly (n_rows, n_cols) inside its file.
static int bind_matrix(const loader *l, const char *name, size_t n_rows, size_t n_cols, ggd_matrix *matrix) {
    size_t part;
    int64_t id = find_tensor(l, name, &part);
    if (id < 0) {
        return ggd_fail("tensor %s is missing", name);
    }
    const struct gguf_context *gguf = l->parts[part];
    const ggd_map *map = &l->model->maps[part];
    enum ggml_type stored = gguf_get_tensor_type(gguf, id);
    ggd_tensor_type_info type = {0};
    if (ggd_tensor_type((int32_t)stored, &type)) {
        return ggd_fail("tensor %s has the unsupported type %s", name, type.name != NULL ? type.name : "unknown");
    }
    const int64_t *ne = gguf_get_tensor_ne(gguf, id);
    if (ne[0] != (int64_t)n_cols || ne[1] != (int64_t)n_rows || ne[2] != 1 || ne[3] != 1) {
        return ggd_fail("tensor %s has the shape (%lld, %lld), not (%zu, %zu)", name, (long long)ne[1], (long long)ne[0], n_rows,
                        n_cols);
    }
    size_t block = (size_t)type.block;
    if (n_cols % block != 0) {
        return ggd_fail("tensor %s: %zu columns are not divisible by the block size %zu", name, n_cols, block);
    }
    size_t offset = gguf_get_data_offset(gguf) + gguf_get_tensor_offset(gguf, id), bytes_row = ggml_row_size(stored, ne[0]);
    if (offset > map->bytes || bytes_row * n_rows > map->bytes - offset) {
        return ggd_fail("tensor %s ends past the end of the file", name);
    }
    *matrix = (ggd_matrix){.data = (const uint8_t *)map->data + offset,
                           .n_rows = n_rows,
                           .n_cols = n_cols,
                           .bytes_row = bytes_row,
                           .type = own_type((int32_t)stored),
                           .block = block,
                           .bytes_block = (size_t)type.bytes_block,
                           .stored = (int32_t)stored};
    if (matrix->type == GGD_OTHER) {
        matrix->to_float = ggml_get_type_traits(stored)->to_float;
    }
    return 0;
}

// A vector of n numbers, unpacked, times `scale`, padded by zeros to whole panels.
static int bind_vector(loader *l, const char *name, size_t n, float scale, const float **vector) {
    ggd_matrix row = {0};
    if (bind_matrix(l, name, 1, n, &row)) {
        return -1;
    }
    float *values = calloc(ggd_round_up(n, GGD_PANEL_COLUMNS), sizeof *values);
    if (values == NULL) {
        return ggd_fail("out of memory for %s", name);
    }
    l->model->vectors[l->model->n_vectors++] = values;
    ggd_matrix_unpack_row(&ggd_kernels_reference, &row, 0, values);
    for (size_t i = 0; scale != 1.0f && i < n; i++) {
        values[i] *= scale;
    }
    *vector = values;
    return 0;
}

static const char *const projection_names[GGD_N_TARGETS] = {"attn_q",   "attn_k", "attn_v",  "attn_output",
                                                            "ffn_gate", "ffn_up", "ffn_down"};

// Where a projection lies: rows [first, first + n_rows) of blk.INDEX.NAME, a tensor of n_all rows.
typedef struct {
    const char *name;
    size_t first, n_rows, n_all, n_cols;
} source;

// The bias of a source, if there is one. A part of a vector need not begin where a panel does, so it is copied to one of its own.
static int bind_bias(loader *l, const char *tensor, const source *from, const float **bias) {
    if (from->n_rows == from->n_all) {
        return bind_vector(l, tensor, from->n_rows, 1.0f, bias);
    }
    const float *whole;
    float *part = calloc(ggd_round_up(from->n_rows, GGD_PANEL_COLUMNS), sizeof *part);
    if (part == NULL) {
        return ggd_fail("out of memory for %s", tensor);
    }
    l->model->vectors[l->model->n_vectors++] = part;
    if (bind_vector(l, tensor, from->n_all, 1.0f, &whole)) {
        return -1;
    }
    memcpy(part, whole + from->first, from->n_rows * sizeof *part);
    *bias = part;
    return 0;
}

static int bind_projection(loader *l, int32_t index, int target, const source *from) {
    ggd_projection *projection = &l->model->layers[index].linear[target];
    char tensor[NAME_SIZE];
    ggd_matrix all = {0};
    snprintf(tensor, sizeof tensor, "blk.%d.%s.weight", index, from->name);
    if (bind_matrix(l, tensor, from->n_all, from->n_cols, &all)) {
        return -1;
    }
    projection->w = ggd_matrix_rows(&all, from->first, from->n_rows);
    snprintf(tensor, sizeof tensor, "blk.%d.%s.bias", index, from->name);
    if (has_tensor(l, tensor)) {
        return bind_bias(l, tensor, from, &projection->bias);
    }
    // Weights that lie together may have biases that do not.
    snprintf(tensor, sizeof tensor, "blk.%d.%s.bias", index, projection_names[target]);
    return has_tensor(l, tensor) ? bind_vector(l, tensor, from->n_rows, 1.0f, &projection->bias) : 0;
}

static const char *const norm_names[GGD_N_NORMS] = {"attn_norm",     "post_attention_norm", "ffn_norm",
                                                    "post_ffw_norm", "attn_q_norm",         "attn_k_norm"};

static int bind_norms(loader *l, int32_t index) {
    const ggd_shape *s = &l->model->shape;
    unsigned features = l->arch->features;
    size_t hidden = (size_t)s->hidden_size, head = (size_t)s->head_size;
    int pre = (features & GGD_PRE_NORMS) != 0, post = (features & GGD_POST_NORMS) != 0, heads = (features & GGD_HEAD_NORMS) != 0;
    size_t wide = features & GGD_WIDE_HEAD_NORMS ? 1 : 0;
    const int has[GGD_N_NORMS] = {pre, post, pre, post, heads, heads};
    const size_t sizes[GGD_N_NORMS] = {
        hidden, hidden, hidden, hidden, wide ? (size_t)s->n_heads * head : head, wide ? (size_t)s->n_kv_heads * head : head};
    char name[NAME_SIZE];
    for (int norm = 0; norm < GGD_N_NORMS; norm++) {
        snprintf(name, sizeof name, "blk.%d.%s.weight", index, norm_names[norm]);
        if (has[norm] && bind_vector(l, name, sizes[norm], 1.0f, &l->model->layers[index].norms[norm])) {
            return -1;
        }
    }
    return 0;
}

static int bind_layer(loader *l, int32_t index) {
    const ggd_shape *s = &l->model->shape;
    size_t hidden = (size_t)s->hidden_size, ffn = (size_t)s->feed_forward_size;
    size_t queries = (size_t)s->n_heads * (size_t)s->head_size, keys = (size_t)s->n_kv_heads * (size_t)s->head_size;
    const size_t outputs[GGD_N_TARGETS] = {queries, keys, keys, hidden, ffn, ffn, hidden};
    const size_t inputs[GGD_N_TARGETS] = {hidden, hidden, hidden, queries, hidden, hidden, ffn};
    char fused[NAME_SIZE];
    snprintf(fused, sizeof fused, "blk.%d.attn_qkv.weight", index);
    int fused_qkv = has_tensor(l, fused), gate_in_up = (l->arch->features & GGD_GATE_IN_UP) != 0;
    source from = {0};
    for (int target = 0; target < GGD_N_TARGETS; target++) {
        int in_qkv = fused_qkv && target <= GGD_ATTN_V, in_up = gate_in_up && (target == GGD_FFN_GATE || target == GGD_FFN_UP);
        int follows = (in_qkv && target > GGD_ATTN_Q) || (in_up && target == GGD_FFN_UP);
        from = (source){.name = in_qkv  ? "attn_qkv"
                                : in_up ? "ffn_up"
                                        : projection_names[target],
                        .first = follows ? from.first + from.n_rows : 0,
                        .n_rows = outputs[target],
                        .n_all = in_qkv  ? queries + 2 * keys
                                 : in_up ? 2 * ffn
                                         : outputs[target],
                        .n_cols = inputs[target]};
        if (bind_projection(l, index, target, &from)) {
            return -1;
        }
    }
    return bind_norms(l, index);
}

static int bind_rope(loader *l) {
    size_t half = l->model->n_rotated / 2;
    unsigned features = l->arch->features;
    ggd_rope_factors factors = {0};
    // All but phi3, which has no other factors, name the kind in the file.
    int is_long = strcmp(ggd_keys_text(&l->keys, "rope.scaling.type", ""), "longrope") == 0 || !(features & GGD_ROPE_FACTORS);
    const struct {
        const char *name;
        int used;
        const float **factors;
    } tensors[] = {{"rope_freqs.weight", features & GGD_ROPE_FACTORS && !is_long, &factors.all},
                   {"rope_factors_short.weight", features & GGD_LONG_FACTORS && is_long, &factors.short_},
                   {"rope_factors_long.weight", features & GGD_LONG_FACTORS && is_long, &factors.long_}};
    for (size_t i = 0; i < sizeof tensors / sizeof *tensors; i++) {
        if (tensors[i].used && has_tensor(l, tensors[i].name) &&
            bind_vector(l, tensors[i].name, half, 1.0f, tensors[i].factors)) {
            return -1;
        }
    }
    return ggd_rope_read(&l->keys, l->arch, &factors, l->model);
}

static int bind_head(loader *l) {
    ggd_model *model = l->model;
    size_t hidden = (size_t)model->shape.hidden_size, vocab = (size_t)model->shape.vocab_size;
    float logit_scale = 1.0f;
    if (l->arch->features & GGD_SCALE_KEYS && ggd_keys_positive(&l->keys, "logit_scale", NAN, &logit_scale)) {
        return -1;
    }
    model->shape.tied_head = !has_tensor(l, "output.weight");
    const char *head = model->shape.tied_head ? "token_embd.weight" : "output.weight";
    // Logits are divided by logit_scale: so is what the head multiplies.
    return bind_matrix(l, "token_embd.weight", vocab, hidden, &model->token_embedding) ||
                   bind_matrix(l, head, vocab, hidden, &model->head) ||
                   bind_vector(l, "output_norm.weight", hidden, 1.0f / logit_scale, &model->output_norm)
               ? -1
               : 0;
}

// Blocks stand apart where one of them is normed or scaled before it is added, or adds a bias.
static int blocks_apart(const ggd_model *model) {
    for (int32_t l = 0; l < model->shape.n_layers; l++) {
        const ggd_layer *layer = &model->layers[l];
        if (layer->norms[GGD_NORM_ATTN_POST] != NULL || layer->linear[GGD_ATTN_OUTPUT].bias != NULL ||
            layer->linear[GGD_FFN_DOWN].bias != NULL) {
            return 1;
        }
    }
    return model->residual_scale != 1.0f;
}

static int bind_weights(loader *l) {
    ggd_model *model = l->model;
    size_t part, n_layers = (size_t)model->shape.n_layers;
    int64_t embedding = find_tensor(l, "token_embd.weight", &part);
    if (embedding < 0) {
        return ggd_fail("tensor token_embd.weight is missing");
    }
    int64_t vocab = gguf_get_tensor_ne(l->parts[part], embedding)[1];
    if (vocab < 2 || vocab > INT32_MAX / 4) {
        return ggd_fail("a vocabulary of %lld tokens is not supported", (long long)vocab);
    }
    model->shape.vocab_size = (int32_t)vocab;
    model->layers = calloc(n_layers, sizeof *model->layers);
    // Of a layer: the norms, and a bias with its part for each projection; of the model: the last norm and three kinds of RoPE factors.
    model->vectors = calloc(n_layers * (GGD_N_NORMS + 2 * GGD_N_TARGETS) + 4, sizeof *model->vectors);
    if (model->layers == NULL || model->vectors == NULL) {
        return ggd_fail("out of memory for %zu layers", n_layers);
    }
    if (read_layer_kinds(l) || bind_head(l)) {
        return -1;
    }
    for (int32_t layer = 0; layer < model->shape.n_layers; layer++) {
        if (bind_layer(l, layer)) {
            return -1;
        }
    }
    model->blocks_apart = blocks_apart(model);
    return bind_rope(l);
}

// ---- files ----

static int map_file(ggd_map *map, const char *path) {
    int file = open(path, O_RDONLY);
    struct stat status;
    if (file < 0 || fstat(file, &status) != 0 || status.st_size <= 0) {
        if (file >= 0) {
            close(file);
        }
        return ggd_fail("cannot open %s", path);
    }
    void *data = mmap(NULL, (size_t)status.st_size, PROT_READ, MAP_SHARED, file, 0);
    close(file);
    if (data == MAP_FAILED) {
        return ggd_fail("cannot map %s", path);
    }
    *map = (ggd_map){data, (size_t)status.st_size};
    ggd_bus_watch(data, map->bytes, path);
    return 0;
}

static int open_part(loader *l, const char *path) {
    if (map_file(&l->model->maps[l->model->n_maps], path)) {
        return -1;
    }
    l->model->n_maps++;
    struct gguf_context *gguf = gguf_init_from_file(path, (struct gguf_init_params){.no_alloc = true, .ctx = NULL});
    if (gguf == NULL) {
        return ggd_fail("%s is no readable GGUF file", path);
    }
    l->parts[l->n_parts++] = gguf;
    return 0;
}

static int load(loader *l, const char *const *paths, size_t n_paths) {
    for (size_t i = 0; i < n_paths; i++) {
        if (open_part(l, paths[i])) {
            return -1;
        }
    }
    int64_t id = gguf_find_key(l->parts[0], "general.architecture");
    if (id < 0 || gguf_get_kv_type(l->parts[0], id) != GGUF_TYPE_STRING) {
        return ggd_fail("general.architecture is missing");
    }
    l->arch = ggd_arch_find(gguf_get_val_str(l->parts[0], id));
    if (l->arch == NULL) {
        return ggd_fail("architecture %s is not supported", gguf_get_val_str(l->parts[0], id));
    }
    l->keys = (ggd_keys){l->parts[0], l->arch->name};
    return read_sizes(l) || read_rotation(l) || read_scales(l) || bind_weights(l) ? -1 : 0;
}

int ggd_model_load(const char *const *paths, int32_t n_paths, ggd_model **model) {
    *model = NULL;
    if (n_paths < 1 || n_paths > MAX_PARTS) {
        return ggd_fail("a model of %d files is not supported", n_paths);
    }
    loader l = {.model = calloc(1, sizeof **model), .parts = calloc((size_t)n_paths, sizeof *l.parts)};
    ggd_map *maps = calloc((size_t)n_paths, sizeof *maps);
    int status = -1;
    if (l.model == NULL || l.parts == NULL || maps == NULL) {
        free(maps);
        ggd_fail("out of memory for a model");
        goto cleanup;
    }
    l.model->maps = maps;
    status = load(&l, paths, (size_t)n_paths);
cleanup:
    for (size_t i = 0; i < l.n_parts; i++) {
        gguf_free(l.parts[i]);
    }
    free(l.parts);
    if (status != 0) {
        ggd_model_free(l.model);
        return -1;
    }
    *model = l.model;
    return 0;
}

const char *ggd_ggml_version(void) { return ggml_version(); }
