// SPDX-License-Identifier: BSD-3-Clause
// AVX-512.
#if defined(__x86_64__)
#define FASTATTN_ISA avx512
#define FASTATTN_LANES 16
#include "adamw/kernels.inl"

constinit const fastattn::AdamWKernels fastattn::kAdamWAvx512 = fastattn::avx512::kAdamWKernels;
#endif
