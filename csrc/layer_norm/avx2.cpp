// SPDX-License-Identifier: BSD-3-Clause
// AVX2, FMA, F16C.
#if defined(__x86_64__)
#define FASTATTN_ISA avx2
#define FASTATTN_LANES 8
#include "layer_norm/kernels.inl"

constinit const fastattn::NormKernels fastattn::kNormAvx2 = fastattn::avx2::kNormKernels;
#endif
