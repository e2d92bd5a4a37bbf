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
                      .operation = GGD_TIMES_TRANSPOSE,
                      .m = m,
                      .a = x,
                      .w = lora_a(linear),
                      .scale = 1.0f,
                      .c = linear->p.data,
                      .ld_c = linear->p.ld,
                      .c_element = compute->element};
        ggd_gemm_run(compute, &p);
    }
}

void ggd_linear_forward(const ggd_compute *compute, const ggd_linear *linear, size_t m, ggd_activation x,
                        const ggd_int8_rows *x_int8, const float *init, size_t ld_init, void *c, size_t ld_c,
                        ggd_element c_element) {
    int has_int8 = ggd_gemm_int8_format(GGD_TIMES_TRANSPOSE, linear->weight).block != 0;
    ggd_gemm y = {.part = "frozen forward",
                  .operation = GGD_TIMES_TRANSPOSE,
                  .m = m,
                  .a = x,
                  .a_int8 = has_int8 ? x_int8 : NULL,
                  .w = *linear->weight,
                  .scale = 1.0f,
                  .init = init,
                  .ld_init = ld_init,
                  .c = c,
                  .ld_c = ld_c,
                  .c_element = c_element};
    ggd_linear_forward_lora(compute, linear, m, x);
    if (linear->lora != NULL) {
        y.a2 = linear->p;
        y.w2 = lora_b(linear);
        y.scale2 = linear->lora->scale;
    }
    ggd_gemm_run(compute, &y);
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
    size_t end = job->n_rows < begin + TRANSPOSE_ROWS ? job->n_rows : begin + TRANSPOSE_ROWS;
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
    ggd_parallel(compute->threads, "LoRA gradients", (n_rows + TRANSPOSE_ROWS - 1) / TRANSPOSE_ROWS, transpose_item, &job);
}

// product (R, n) = thin^T wide, a reduction over all rows of the batch.
static void reduce_over_rows(const ggd_compute *compute, const ggd_linear *linear, size_t m, ggd_activation thin,
                             ggd_activation wide, size_t n, const ggd_linear_scratch *scratch) {
    size_t rank = (size_t)linear->lora->rank;
    transpose(compute, thin, m, rank, scratch->transposed);
    ggd_gemm product = {.part = "LoRA gradients",
                        .operation = GGD_TIMES_PLAIN,
                        .m = rank,
                        .a = scratch->transposed,
                        .w = ggd_matrix_of(wide, m, n, compute->element),
                        .scale = 1.0f,
                        .c = scratch->product,
                        .ld_c = scratch->ld_product,
                        .c_element = GGD_ELEMENT_F32};
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
                               const ggd_linear_scratch *scratch, const float *init, void *dx, size_t ld_dx,
                               ggd_element dx_element) {
    ggd_gemm gradient = {.part = "frozen backward",
                         .operation = GGD_TIMES_PLAIN,
                         .m = m,
                         .a = dy,
                         .w = *linear->weight,
                         .scale = 1.0f,
                         .init = init,
                         .ld_init = ld_dx,
                         .c = dx,
                         .ld_c = ld_dx,
                         .c_element = dx_element};
    if (linear->lora != NULL) {
        ggd_gemm q = {.part = "LoRA products",
                      .operation = GGD_TIMES_PLAIN,
                      .m = m,
                      .a = dy,
                      .w = lora_b(linear),
                      .scale = linear->lora->scale,
                      .c = scratch->q.data,
                      .ld_c = scratch->q.ld,
                      .c_element = compute->element};
        ggd_gemm_run(compute, &q);
        gradient.a2 = scratch->q;
        gradient.w2 = lora_a(linear);
        gradient.scale2 = 1.0f;
    }
    if (scratch->dy_int8 != NULL) {
        ggd_int8_quantise_rows(compute, m, linear->weight->n_rows, dy, ggd_int8_backward_format.a_block, scratch->dy_int8);
        gradient.a_int8 = scratch->dy_int8;
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
