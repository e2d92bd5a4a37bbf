// few_rows.h - int8 products C = init + A W^T + A2 W2^T where A has few rows. A panel of 32 columns (gemm.c) pays only for as many rows as
// stream past it: packing it goes through the weights in pieces of 32 rows, which memory does not like, to save what few rows do not need.
#ifndef GGD_FEW_ROWS_H
#define GGD_FEW_ROWS_H

#include "gemm.h"

// Whether a product is faster so.
int ggd_is_few_rows(const ggd_compute *compute, const ggd_gemm *gemm);

// As ggd_gemm_run, to the bit.
void ggd_few_rows_run(const ggd_compute *compute, const ggd_gemm *gemm);

#endif
