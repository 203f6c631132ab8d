// SPDX-License-Identifier: BSD-3-Clause
// AVX-512: 12 x 32 accumulators in 24 of 32 registers.
#if defined(__x86_64__)
#define FASTATTN_ISA avx512
#define FASTATTN_LANES 16
#define FASTATTN_ROWS 12
#include "linear/kernels.inl"

constinit const fastattn::GemmKernels fastattn::kGemmAvx512 = fastattn::avx512::kGemmKernels;
#endif
