// keys.h - typed reads of an architecture's keys in a GGUF header. A key is named without its prefix, as in "block_count".
#ifndef GGD_KEYS_H
#define GGD_KEYS_H

#include <stdint.h>

#include "gguf.h"

typedef struct {
    const struct gguf_context *gguf;
    const char *arch;
} ggd_keys;

int64_t ggd_keys_find(const ggd_keys *keys, const char *suffix);  // -1: there is no such key
// An unsigned number, or a list of equal ones; `fallback` < 0 makes the key required.
int ggd_keys_count(const ggd_keys *keys, const char *suffix, int64_t fallback, int32_t *value);
// A finite number.
int ggd_keys_float(const ggd_keys *keys, const char *suffix, float fallback, float *value);
// The same, above zero; a fallback that is not makes the key required.
int ggd_keys_positive(const ggd_keys *keys, const char *suffix, float fallback, float *value);
int ggd_keys_bool(const ggd_keys *keys, const char *suffix, int fallback);
// A text; `fallback` too where the key holds something else.
const char *ggd_keys_text(const ggd_keys *keys, const char *suffix, const char *fallback);
// Element `index` of a list of flags or numbers, 0 past its end; -1 where the key is no list.
int ggd_keys_flag(const ggd_keys *keys, const char *suffix, size_t index);

#endif
