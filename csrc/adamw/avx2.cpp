// SPDX-License-Identifier: BSD-3-Clause
// AVX2, FMA, F16C.
#if defined(__x86_64__)
#define FASTATTN_ISA avx2
#define FASTATTN_LANES 8
#include "adamw/kernels.inl"

constinit const fastattn::AdamWKernels fastattn::kAdamWAvx2 = fastattn::avx2::kAdamWKernels;
#endif
