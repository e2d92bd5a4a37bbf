// simd_avx_vnni_evex.c - the kernels of AVX-VNNI in the encoding of AVX-512 VL and VNNI, so that they are run where a processor has
// AVX-512 and no AVX-VNNI. Only tests ask for this set: such a processor has faster ones.
#include "avx_vnni.h"

static inline __m256i dot_bytes(__m256i sum, __m256i a, __m256i w) { return _mm256_dpbusd_epi32(sum, a, w); }

const ggd_kernels ggd_kernels_avx_vnni_evex = {.name = "avx_vnni_evex", GGD_AVX_VNNI_KERNELS};
