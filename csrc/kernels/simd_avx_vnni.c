// simd_avx_vnni.c - kernels for x86-64 with AVX2 and AVX-VNNI: Intel's processors without AVX-512 from Alder Lake on, AMD's from Zen 5.
#include "avx_vnni.h"

static inline __m256i dot_bytes(__m256i sum, __m256i a, __m256i w) { return _mm256_dpbusd_avx_epi32(sum, a, w); }

const ggd_kernels ggd_kernels_avx_vnni = {.name = "avx_vnni", GGD_AVX_VNNI_KERNELS};
