// few_rows.h - int8 products C = init + A W^T + A2 W2^T where A has few rows. Packing a panel of 32 columns (gemm.c) reads the
// weights in short pieces of 32 rows, which is slow; it pays only where many rows of A are multiplied by the panel.
#ifndef GGD_FEW_ROWS_H
#define GGD_FEW_ROWS_H

#include "gemm.h"

// Whether a product is faster so.
int ggd_is_few_rows(const ggd_compute *compute, const ggd_gemm *gemm);

// As ggd_gemm_run, to the bit.
void ggd_few_rows_run(const ggd_compute *compute, const ggd_gemm *gemm);

#endif
