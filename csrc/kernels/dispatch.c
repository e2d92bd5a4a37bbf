// dispatch.c - chooses a kernel set by what the processor has. One binary serves all.
#include <stdlib.h>
#include <string.h>

#include "kernels.h"

#if defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
enum { HWCAP_BIT_DOT = 20, HWCAP2_BIT_I8MM = 13, HWCAP2_BIT_BF16 = 14 };
static int has_neon_bf16(void) {
    return (getauxval(AT_HWCAP) >> HWCAP_BIT_DOT & 1) && (getauxval(AT_HWCAP2) >> HWCAP2_BIT_BF16 & 1);
}
static int has_neon_i8mm(void) { return has_neon_bf16() && (getauxval(AT_HWCAP2) >> HWCAP2_BIT_I8MM & 1); }
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
static int has_feature(const char *name) {
    int has = 0;
    size_t size = sizeof has;
    return sysctlbyname(name, &has, &size, NULL, 0) == 0 && has;
}
// Every Apple processor with bfloat16 has the dot product.
static int has_neon_bf16(void) { return has_feature("hw.optional.arm.FEAT_BF16"); }
static int has_neon_i8mm(void) { return has_neon_bf16() && has_feature("hw.optional.arm.FEAT_I8MM"); }
#endif

#if defined(__x86_64__)
#include <cpuid.h>
static int has_avx512(void) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("fma");
}
static int has_avx2(void) { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }
// Leaf 7, subleaf 1; not all compilers know its name. That the system saves the registers follows from AVX2.
static int has_avx_vnni(void) {
    enum { AVX_VNNI = 1 << 4 };
    unsigned eax, ebx, ecx, edx;
    return has_avx2() && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & AVX_VNNI) != 0;
}
#endif

size_t ggd_kernels_available(const ggd_kernels *sets[GGD_MAX_KERNEL_SETS]) {
    size_t n = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
#endif
#ifdef GGD_HAVE_AVX512_BF16
    if (has_avx512() && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("avx512vnni")) {
        sets[n++] = &ggd_kernels_avx512_bf16;
    }
#endif
#ifdef GGD_HAVE_AVX512
    if (has_avx512()) {
        sets[n++] = &ggd_kernels_avx512;
    }
#endif
#ifdef GGD_HAVE_AVX_VNNI
    if (has_avx_vnni()) {
        sets[n++] = &ggd_kernels_avx_vnni;
    }
#endif
#ifdef GGD_HAVE_AVX_VNNI_EVEX
    if (has_avx512() && __builtin_cpu_supports("avx512vnni")) {  // never the first: it is there to be tested
        sets[n++] = &ggd_kernels_avx_vnni_evex;
    }
#endif
#ifdef GGD_HAVE_AVX2
    if (has_avx2()) {
        sets[n++] = &ggd_kernels_avx2;
    }
#endif
#ifdef GGD_HAVE_NEON_I8MM
    if (has_neon_i8mm()) {
        sets[n++] = &ggd_kernels_neon_i8mm;
    }
#endif
#ifdef GGD_HAVE_NEON_BF16
    if (has_neon_bf16()) {
        sets[n++] = &ggd_kernels_neon_bf16;
    }
#endif
#ifdef GGD_HAVE_NEON
    sets[n++] = &ggd_kernels_neon;
#endif
    sets[n++] = &ggd_kernels_reference;
    return n;
}

const ggd_kernels *ggd_kernels_choose(int use_simd) {
    const ggd_kernels *sets[GGD_MAX_KERNEL_SETS];
    size_t n = ggd_kernels_available(sets);
    const char *wanted = getenv("GGD_KERNELS");
    for (size_t i = 0; use_simd && wanted != NULL && i < n; i++) {
        if (strcmp(sets[i]->name, wanted) == 0) {
            return sets[i];
        }
    }
    return use_simd ? sets[0] : &ggd_kernels_reference;
}

const char *ggd_kernel_sets(void) {
    static _Thread_local char names[128];
    const ggd_kernels *sets[GGD_MAX_KERNEL_SETS];
    size_t n = ggd_kernels_available(sets);
    names[0] = '\0';
    for (size_t i = 0; i < n; i++) {
        strcat(strcat(names, i > 0 ? "," : ""), sets[i]->name);
    }
    return names;
}
