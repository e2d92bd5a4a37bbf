// checks.h - what the tests of the kernels share: random data, comparisons, and their count.
//
// Tolerances: both sides sum float32 products of the same operands in another order, so they differ by rounding: 2e-6 of the sum of
// the terms' magnitudes, n up to 600. A bfloat16 output is such a sum, which may then fall on the other side of a rounding step,
// 2^-8. The vector exponential is within 3e-7 of expf.
#ifndef GGD_CHECKS_H
#define GGD_CHECKS_H

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "../kernels/kernels.h"

enum { MAX_N = 600, LD = 640 };

static const double ROUNDING = 2e-6;
extern int failures, checks;

float uniform(void);  // [-1, 1)
void fill(float *x, size_t n, float scale);
// |got - expected| <= tolerance * size for every element; a NaN fails.
void expect(const char *set, const char *kernel, size_t n_case, const float *got, const float *expected, size_t n,
            double tolerance, double size);
void expect_bytes(const char *set, const char *kernel, size_t n_case, const void *got, const void *expected, size_t n);

static const ggd_kernels *const reference = &ggd_kernels_reference;

// test_int8.c
void test_int8_unpacking(const ggd_kernels *set);
void test_int8(const ggd_kernels *set, size_t n);
void test_int8_pack_stored(const ggd_kernels *set);

#endif
