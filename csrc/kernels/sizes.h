// sizes.h - the arithmetic of sizes, once: smaller, larger, division and rounding upwards.
#ifndef GGD_SIZES_H
#define GGD_SIZES_H

#include <stddef.h>

static inline size_t ggd_min(size_t a, size_t b) { return a < b ? a : b; }
static inline size_t ggd_max(size_t a, size_t b) { return a > b ? a : b; }
static inline size_t ggd_ceil_div(size_t n, size_t divisor) { return (n + divisor - 1) / divisor; }
static inline size_t ggd_round_up(size_t n, size_t multiple) { return ggd_ceil_div(n, multiple) * multiple; }

#endif
