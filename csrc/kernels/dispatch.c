// dispatch.c - chooses a kernel set by what the processor has. One binary serves all.
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

enum { MAX_SETS = 8 };

// The sets that this processor runs, fastest first; the reference is last.
static size_t available_sets(const ggd_kernels *sets[MAX_SETS]) {
    size_t n = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
#endif
#ifdef GGD_HAVE_AVX512
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512dq")) {
        if (__builtin_cpu_supports("avx512bf16")) {
            sets[n++] = &ggd_kernels_avx512_bf16;
        }
        sets[n++] = &ggd_kernels_avx512;
    }
#endif
#ifdef GGD_HAVE_AVX2
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        sets[n++] = &ggd_kernels_avx2;
    }
#endif
#ifdef GGD_HAVE_NEON
    sets[n++] = &ggd_kernels_neon;
#endif
    sets[n++] = &ggd_kernels_reference;
    return n;
}

const ggd_kernels *ggd_kernels_choose(int use_simd) {
    const ggd_kernels *sets[MAX_SETS];
    size_t n = available_sets(sets);
    const char *wanted = getenv("GGD_KERNELS");
    for (size_t i = 0; wanted != NULL && i < n; i++) {
        if (strcmp(sets[i]->name, wanted) == 0) {
            return sets[i];
        }
    }
    return use_simd ? sets[0] : &ggd_kernels_reference;
}

const char *ggd_kernel_sets(void) {
    static _Thread_local char names[128];
    const ggd_kernels *sets[MAX_SETS];
    size_t n = available_sets(sets);
    names[0] = '\0';
    for (size_t i = 0; i < n; i++) {
        strcat(strcat(names, i > 0 ? "," : ""), sets[i]->name);
    }
    return names;
}
