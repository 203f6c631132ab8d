// SPDX-License-Identifier: BSD-3-Clause
// AVX2, FMA, F16C: 6 x 16 accumulators in 12 of 16 registers.
#if defined(__x86_64__)
#define FASTATTN_ISA avx2
#define FASTATTN_LANES 8
#define FASTATTN_ROWS 6
#include "linear/kernels.inl"

constinit const fastattn::GemmKernels fastattn::kGemmAvx2 = fastattn::avx2::kGemmKernels;
#endif
