// context.h - keys and values of rows that stand: computed once by the base, read by every call that sees them.
#ifndef GGD_CONTEXT_H
#define GGD_CONTEXT_H

#include "gemm.h"
#include "model.h"

typedef enum { GGD_CONTEXT_KEYS, GGD_CONTEXT_VALUES } ggd_context_part;

struct ggd_context {
    const ggd_model *model;
    int32_t type;      // GGD_CONTEXT_*
    size_t n_columns;  // of a row of keys or of values, G D
    size_t bytes_row;  // of such a row
    size_t n_rows, capacity;
    int32_t *positions;  // (capacity)
    uint8_t *data;       // (L, keys and values, capacity, bytes_row)
};

// Keys or values of a layer, as the attention reads them, to the rows behind those that count already: n rows of x, `rows` or the first.
void ggd_context_store(ggd_context *context, const ggd_compute *compute, size_t layer, ggd_context_part part, size_t n,
                       const int32_t *rows, ggd_activation x);
// n columns of a row, from a multiple of 32 on where the type has blocks, in the element type; `buffer` holds n floats.
void ggd_context_load(const ggd_context *context, const ggd_compute *compute, size_t layer, ggd_context_part part, size_t row,
                      size_t column, size_t n, float *buffer, void *target);

#endif
