// rope.c - RoPE (Su et al. 2021, arXiv:2104.09864) with the scalings that llama.cpp knows (ggml-cpu/ops.cpp, llama-context.cpp):
//   theta_i = base^(-2 i / n) / factor_i, of n rotated elements, turned by theta_i / scale a position
// "linear" divides by `scale`; "yarn" (Peng et al. 2023, arXiv:2309.00071) leaves the fast pairs unscaled, blends in between, and magnifies cosine and
// sine. Factors are Llama 3.1's, or LongRoPE's (Ding et al. 2024, arXiv:2402.13753) with one set up to the original context and one beyond.
#include "rope.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

#include "error.h"

typedef struct {
    float base, scale;  // positions are divided by scale
    float file_scale;   // the same by the file's factor, even where it names no scaling
    int yarn;
    float fast, slow;  // turns over the original context above which a pair is unscaled, and below which it is scaled
    float magnitude;
    const float *factors;
} rope_settings;

// The pair that turns `turns` times over the original context.
static double pair_of(const ggd_model *model, const rope_settings *r, double turns) {
    return (double)model->n_rotated * log((double)model->original_context / (turns * 2 * M_PI)) / (2 * log((double)r->base));
}

static int fill(const ggd_model *model, const rope_settings *r, ggd_rope *rope) {
    size_t half = model->n_rotated / 2;
    rope->magnitude = r->magnitude;
    rope->frequencies = malloc(half * sizeof *rope->frequencies);
    if (rope->frequencies == NULL) {
        return ggd_fail("out of memory for the RoPE frequencies");
    }
    double low = r->yarn ? fmax(0, floor(pair_of(model, r, r->fast))) : 0;
    double high = r->yarn ? fmin((double)model->n_rotated - 1, ceil(pair_of(model, r, r->slow))) : 0;
    for (size_t i = 0; i < half; i++) {
        double factor = r->factors != NULL ? r->factors[i] : 1.0f, power = pow(r->base, -(double)i / (double)half);
        double scaled = power / ((double)r->scale * factor);
        if (r->yarn) {
            double share = 1 - fmin(1, fmax(0, ((double)i - low) / fmax(0.001, high - low)));
            scaled = scaled * (1 - share) + power / factor * share;
        }
        rope->frequencies[i] = (float)scaled;
    }
    return 0;
}

// What yarn multiplies cosine and sine by, where the file does not say otherwise.
static double yarn_magnitude(double scale, double log_multiplier) {
    double plain = scale <= 1 ? 1 : 0.1 * log(scale) + 1;
    return log_multiplier == 0 ? plain : plain / (scale <= 1 ? 1 : 0.1 * log_multiplier * log(scale) + 1);
}

static int read_global(const ggd_keys *keys, const ggd_arch *arch, rope_settings *r) {
    float legacy, log_multiplier = 0, attn_factor;
    const char *type = ggd_keys_text(keys, "rope.scaling.type", "linear");
    if (strcmp(type, "none") != 0 && strcmp(type, "linear") != 0 && strcmp(type, "yarn") != 0 && strcmp(type, "longrope") != 0) {
        return ggd_fail("RoPE scaling %s is not supported", type);
    }
    if (ggd_keys_positive(keys, "rope.freq_base", 10000.0f, &r->base) || ggd_keys_float(keys, "rope.scale_linear", 0, &legacy) ||
        ggd_keys_float(keys, "rope.scaling.factor", legacy, &r->scale) ||
        ggd_keys_positive(keys, "rope.scaling.attn_factor", 1.0f, &attn_factor)) {
        return -1;
    }
    r->yarn = strcmp(type, "yarn") == 0;
    r->file_scale = r->scale == 0 ? 1.0f : r->scale;
    r->scale = strcmp(type, "none") == 0 ? 1.0f : r->file_scale;
    r->fast = 32.0f;
    r->slow = 1.0f;
    if (arch->features & GGD_YARN_KEYS && (ggd_keys_positive(keys, "rope.scaling.yarn_beta_fast", r->fast, &r->fast) ||
                                           ggd_keys_positive(keys, "rope.scaling.yarn_beta_slow", r->slow, &r->slow) ||
                                           ggd_keys_float(keys, "rope.scaling.yarn_log_multiplier", 0, &log_multiplier))) {
        return -1;
    }
    if (!(r->base > 1) || !(r->scale > 0)) {
        return ggd_fail("RoPE of base %g and scale %g is not possible", (double)r->base, (double)r->scale);
    }
    r->magnitude = (float)((r->yarn ? yarn_magnitude(r->scale, log_multiplier) : 1.0) * (double)attn_factor);
    return 0;
}

// The same of layers with a window.
static int read_window(const ggd_keys *keys, const ggd_arch *arch, rope_settings *r) {
    switch (arch->window_rope) {
    case GGD_WINDOW_ROPE_SAME:
        r->scale = r->file_scale;  // as llama.cpp does
        return ggd_keys_positive(keys, "rope.freq_base_swa", r->base, &r->base);
    case GGD_WINDOW_ROPE_OWN_BASE:
        r->scale = 1.0f;
        r->yarn = 0;
        return ggd_keys_positive(keys, "rope.freq_base_swa", 10000.0f, &r->base) ||
                       ggd_keys_positive(keys, "rope.scaling.attn_factor", 1.0f, &r->magnitude)
                   ? -1
                   : 0;
    case GGD_WINDOW_ROPE_UNSCALED:
        *r = (rope_settings){.base = r->base, .scale = 1.0f, .magnitude = 1.0f};
        return 0;
    }
    return 0;
}

int ggd_rope_read(const ggd_keys *keys, const ggd_arch *arch, const ggd_rope_factors *factors, ggd_model *model) {
    rope_settings global = {0};
    if (read_global(keys, arch, &global)) {
        return -1;
    }
    rope_settings window = global, beyond = global;
    global.factors = factors->all != NULL ? factors->all : factors->short_;
    if (fill(model, &global, &model->ropes[GGD_ROPE_GLOBAL])) {
        return -1;
    }
    beyond.factors = factors->long_;
    if (factors->all == NULL && factors->long_ != NULL && fill(model, &beyond, &model->ropes[GGD_ROPE_LONG])) {
        return -1;
    }
    for (int32_t l = 0; l < model->shape.n_layers; l++) {
        if (model->layers[l].rope == GGD_ROPE_WINDOW) {
            return read_window(keys, arch, &window) || fill(model, &window, &model->ropes[GGD_ROPE_WINDOW]) ? -1 : 0;
        }
    }
    return 0;
}
