// keys.c - see keys.h. Python has read the same keys strictly before; here a value of the wrong kind is an error, never a crash.
#include "keys.h"

#include <math.h>
#include <stdio.h>

#include "error.h"

int64_t ggd_keys_find(const ggd_keys *keys, const char *suffix) {
    char key[128];
    snprintf(key, sizeof key, "%s.%s", keys->arch, suffix);
    return gguf_find_key(keys->gguf, key);
}

// A list of 32-bit numbers as its one value, -1 if they differ or are none.
static int64_t common_value(const struct gguf_context *gguf, int64_t id) {
    enum gguf_type type = gguf_get_arr_type(gguf, id);
    size_t n = gguf_get_arr_n(gguf, id);
    if ((type != GGUF_TYPE_UINT32 && type != GGUF_TYPE_INT32) || n == 0) {
        return -1;
    }
    const uint32_t *values = gguf_get_arr_data(gguf, id);
    for (size_t i = 1; i < n; i++) {
        if (values[i] != values[0]) {
            return -1;
        }
    }
    return type == GGUF_TYPE_UINT32 ? (int64_t)values[0] : (int64_t)(int32_t)values[0];
}

int ggd_keys_count(const ggd_keys *keys, const char *suffix, int64_t fallback, int32_t *value) {
    int64_t id = ggd_keys_find(keys, suffix), number = fallback;
    if (id >= 0) {
        enum gguf_type type = gguf_get_kv_type(keys->gguf, id);
        number = type == GGUF_TYPE_UINT32  ? (int64_t)gguf_get_val_u32(keys->gguf, id)
                 : type == GGUF_TYPE_INT32 ? (int64_t)gguf_get_val_i32(keys->gguf, id)
                 : type == GGUF_TYPE_ARRAY ? common_value(keys->gguf, id)
                                           : -1;
    }
    if (number < 0 || number > INT32_MAX) {
        return ggd_fail("%s.%s is missing or no unsigned 32-bit number", keys->arch, suffix);
    }
    *value = (int32_t)number;
    return 0;
}

int ggd_keys_float(const ggd_keys *keys, const char *suffix, float fallback, float *value) {
    int64_t id = ggd_keys_find(keys, suffix);
    if (id >= 0 && gguf_get_kv_type(keys->gguf, id) != GGUF_TYPE_FLOAT32) {
        return ggd_fail("%s.%s is no 32-bit float", keys->arch, suffix);
    }
    *value = id < 0 ? fallback : gguf_get_val_f32(keys->gguf, id);
    return isfinite(*value) ? 0 : ggd_fail("%s.%s is missing or not finite", keys->arch, suffix);
}

int ggd_keys_positive(const ggd_keys *keys, const char *suffix, float fallback, float *value) {
    if (ggd_keys_float(keys, suffix, fallback, value)) {
        return -1;
    }
    return *value > 0 ? 0 : ggd_fail("%s.%s is missing or not positive", keys->arch, suffix);
}

int ggd_keys_bool(const ggd_keys *keys, const char *suffix, int fallback) {
    int64_t id = ggd_keys_find(keys, suffix);
    return id >= 0 && gguf_get_kv_type(keys->gguf, id) == GGUF_TYPE_BOOL ? gguf_get_val_bool(keys->gguf, id) : fallback;
}

const char *ggd_keys_text(const ggd_keys *keys, const char *suffix, const char *fallback) {
    int64_t id = ggd_keys_find(keys, suffix);
    return id >= 0 && gguf_get_kv_type(keys->gguf, id) == GGUF_TYPE_STRING ? gguf_get_val_str(keys->gguf, id) : fallback;
}

int ggd_keys_flag(const ggd_keys *keys, const char *suffix, size_t index) {
    int64_t id = ggd_keys_find(keys, suffix);
    if (id < 0 || gguf_get_kv_type(keys->gguf, id) != GGUF_TYPE_ARRAY) {
        return -1;
    }
    enum gguf_type type = gguf_get_arr_type(keys->gguf, id);
    if (type == GGUF_TYPE_STRING || type == GGUF_TYPE_ARRAY) {
        return -1;
    }
    if (index >= gguf_get_arr_n(keys->gguf, id)) {
        return 0;
    }
    const void *data = gguf_get_arr_data(keys->gguf, id);
    return type == GGUF_TYPE_BOOL || type == GGUF_TYPE_UINT8 || type == GGUF_TYPE_INT8 ? ((const uint8_t *)data)[index] != 0
           : type == GGUF_TYPE_UINT32 || type == GGUF_TYPE_INT32                       ? ((const uint32_t *)data)[index] != 0
                                                                                       : -1;
}
