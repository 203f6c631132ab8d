// SPDX-License-Identifier: BSD-3-Clause
// AVX-512.
#if defined(__x86_64__)
#define FASTATTN_ISA avx512
#define FASTATTN_LANES 16
#include "layer_norm/kernels.inl"

constinit const fastattn::NormKernels fastattn::kNormAvx512 = fastattn::avx512::kNormKernels;
#endif
