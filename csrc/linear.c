// linear.c - frozen quantised linear layer + LoRA delta, forward and backward (Hu et al. 2021, arXiv:2106.09685; Dettmers et al. 2023,
// arXiv:2305.14314). The weight gets no gradient; its input does.
#include "linear.h"

#include <string.h>

static ggd_matrix lora_a(const ggd_linear *linear) {
    size_t rank = (size_t)linear->lora->rank, in = linear->weight->n_cols;
    return ggd_matrix_f32(linear->lora->a, rank, in, in);
}

static ggd_matrix lora_b(const ggd_linear *linear) {
    size_t rank = (size_t)linear->lora->rank, out = linear->weight->n_rows;
    return ggd_matrix_f32(linear->lora->b, out, rank, rank);
}

void ggd_linear_forward_lora(const ggd_compute *compute, const ggd_linear *linear, size_t m, ggd_activation x) {
    if (linear->lora != NULL) {
        ggd_gemm p = {.part = "LoRA products",
                      .operation = GGD_TIMES_WT,
                      .m = m,
                      .a = {.x = x},
                      .w = lora_a(linear),
                      .panels = linear->panels != NULL ? linear->panels->a : NULL,
                      .scale = 1.0f,
                      .c = ggd_place_of(compute, linear->p)};
        ggd_gemm_run(compute, &p);
    }
}

void ggd_linear_forward(const ggd_compute *compute, const ggd_linear *linear, size_t m, ggd_operand x, ggd_addend init,
                        ggd_place y) {
    int has_int8 = ggd_gemm_int8_format(GGD_TIMES_WT, linear->weight).block != 0;
    ggd_gemm product = {.part = "frozen forward",
                        .operation = GGD_TIMES_WT,
                        .m = m,
                        .a = {x.x, has_int8 ? x.int8 : NULL},
                        .w = *linear->weight,
                        .scale = 1.0f,
                        .init = init,
                        .c = y};
    ggd_linear_forward_lora(compute, linear, m, x.x);
    if (linear->lora != NULL) {
        product.a2 = linear->p;
        product.w2 = lora_b(linear);
        product.scale2 = linear->lora->scale;
        product.panels2 = linear->panels != NULL ? linear->panels->b : NULL;
    }
    ggd_gemm_run(compute, &product);
}

static size_t panels_bytes(const ggd_compute *compute, const ggd_matrix *w) {
    return ggd_ceil_div(w->n_rows, GGD_PANEL_COLUMNS) * ggd_panel_bytes(compute->element, w->n_cols);
}

static uint8_t *pack_all(const ggd_compute *compute, const ggd_matrix *w, float scale, float *unpacked, uint8_t *panel) {
    for (size_t column = 0; column < w->n_rows; column += GGD_PANEL_COLUMNS) {
        ggd_pack_panel(compute, GGD_TIMES_WT, w, column, scale, unpacked, panel);
        panel += ggd_panel_bytes(compute->element, w->n_cols);
    }
    return panel;
}

size_t ggd_lora_panels_bytes(const ggd_compute *compute, const ggd_linear *linear) {
    ggd_matrix a = lora_a(linear), b = lora_b(linear);
    return panels_bytes(compute, &a) + panels_bytes(compute, &b);
}

ggd_lora_panels ggd_lora_pack(const ggd_compute *compute, const ggd_linear *linear, float *unpacked, uint8_t *memory) {
    ggd_matrix a = lora_a(linear), b = lora_b(linear);
    uint8_t *second = pack_all(compute, &a, 1.0f, unpacked, memory);
    pack_all(compute, &b, linear->lora->scale, unpacked, second);
    return (ggd_lora_panels){memory, second};
}

typedef struct {
    const ggd_compute *compute;
    ggd_activation source, target;
    size_t n_rows, n_cols;
} transpose_job;

enum { TRANSPOSE_ROWS = 64 };

static void transpose_item(void *context, size_t item, size_t thread) {
    (void)thread;
    const transpose_job *job = context;
    size_t begin = item * TRANSPOSE_ROWS;
    size_t end = ggd_min(job->n_rows, begin + TRANSPOSE_ROWS);
    for (size_t column = 0; column < job->n_cols; column++) {
        for (size_t row = begin; row < end; row++) {
            if (job->compute->element == GGD_ELEMENT_BF16) {
                ((uint16_t *)job->target.data)[column * job->target.ld + row] =
                    ((const uint16_t *)job->source.data)[row * job->source.ld + column];
            } else {
                ((float *)job->target.data)[column * job->target.ld + row] =
                    ((const float *)job->source.data)[row * job->source.ld + column];
            }
        }
    }
}

// target (n_cols, n_rows) = source (n_rows, n_cols) transposed, with a zero after an odd row for the bfloat16 pairs.
static void transpose(const ggd_compute *compute, ggd_activation source, size_t n_rows, size_t n_cols, ggd_activation target) {
    transpose_job job = {compute, source, target, n_rows, n_cols};
    if (n_rows % 2 != 0) {
        for (size_t column = 0; column < n_cols; column++) {
            memset(ggd_activation_at(target, column, n_rows, compute->element), 0, ggd_element_bytes(compute->element));
        }
    }
    ggd_parallel(compute->threads, "LoRA gradients", ggd_ceil_div(n_rows, TRANSPOSE_ROWS), transpose_item, &job);
}

// product (R, n) = thin^T wide, a reduction over all rows of the batch.
static void reduce_over_rows(const ggd_compute *compute, const ggd_linear *linear, size_t m, ggd_activation thin,
                             ggd_activation wide, size_t n, const ggd_linear_scratch *scratch) {
    size_t rank = (size_t)linear->lora->rank;
    transpose(compute, thin, m, rank, scratch->transposed);
    ggd_gemm product = {.part = "LoRA gradients",
                        .operation = GGD_TIMES_W,
                        .m = rank,
                        .a = {.x = scratch->transposed},
                        .w = ggd_matrix_of(wide, m, n, compute->element),
                        .scale = 1.0f,
                        .c = ggd_place_f32(scratch->product, scratch->ld_product)};
    ggd_gemm_run(compute, &product);
}

typedef struct {
    const ggd_compute *compute;
    const ggd_linear *linear;
    const ggd_linear_scratch *scratch;
} gradient_job;

static void add_gradient_a_item(void *context, size_t item, size_t thread) {
    (void)thread;
    const gradient_job *job = context;
    size_t in = job->linear->weight->n_cols;
    const float *product = job->scratch->product + item * job->scratch->ld_product;
    job->compute->kernels->add_scaled(product, 1.0f, job->linear->lora->grad_a + item * in, in);
}

static void add_gradient_b_item(void *context, size_t item, size_t thread) {
    (void)thread;
    const gradient_job *job = context;
    const ggd_lora_pair *lora = job->linear->lora;
    size_t rank = (size_t)lora->rank;
    for (size_t r = 0; r < rank; r++) {
        lora->grad_b[item * rank + r] += lora->scale * job->scratch->product[r * job->scratch->ld_product + item];
    }
}

void ggd_linear_backward_input(const ggd_compute *compute, const ggd_linear *linear, size_t m, ggd_activation dy,
                               const ggd_linear_scratch *scratch, ggd_addend init, ggd_place dx) {
    ggd_gemm gradient = {.part = "frozen backward",
                         .operation = GGD_TIMES_W,
                         .m = m,
                         .a = {.x = dy},
                         .w = *linear->weight,
                         .scale = 1.0f,
                         .init = init,
                         .c = dx};
    if (linear->lora != NULL) {
        ggd_gemm q = {.part = "LoRA products",
                      .operation = GGD_TIMES_W,
                      .m = m,
                      .a = {.x = dy},
                      .w = lora_b(linear),
                      .scale = linear->lora->scale,
                      .c = ggd_place_of(compute, scratch->q)};
        ggd_gemm_run(compute, &q);
        gradient.a2 = scratch->q;
        gradient.w2 = lora_a(linear);
        gradient.scale2 = 1.0f;
    }
    if (scratch->dy_int8 != NULL) {
        ggd_int8_quantise_rows(compute, m, linear->weight->n_rows, dy, ggd_int8_backward_format.a_block, scratch->dy_int8);
        gradient.a.int8 = scratch->dy_int8;
    }
    ggd_gemm_run(compute, &gradient);
}

void ggd_linear_backward_lora(const ggd_compute *compute, const ggd_linear *linear, size_t m, ggd_activation x, ggd_activation dy,
                              const ggd_linear_scratch *scratch) {
    if (linear->lora == NULL) {
        return;
    }
    gradient_job job = {compute, linear, scratch};
    reduce_over_rows(compute, linear, m, scratch->q, x, linear->weight->n_cols, scratch);
    ggd_parallel(compute->threads, "LoRA gradients", (size_t)linear->lora->rank, add_gradient_a_item, &job);
    reduce_over_rows(compute, linear, m, linear->p, dy, linear->weight->n_rows, scratch);
    ggd_parallel(compute->threads, "LoRA gradients", linear->weight->n_rows, add_gradient_b_item, &job);
}
