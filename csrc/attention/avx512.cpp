// SPDX-License-Identifier: BSD-3-Clause
// AVX-512: 12 x 32 accumulators in 24 of 32 registers.
#if defined(__x86_64__)
#define FASTATTN_ISA avx512
#define FASTATTN_LANES 16
#define FASTATTN_ROWS 12
#include "attention/kernels.inl"

constinit const fastattn::AttentionKernels fastattn::kAttentionAvx512 = fastattn::avx512::kKernels;
#endif
