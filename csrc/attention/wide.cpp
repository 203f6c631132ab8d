// SPDX-License-Identifier: BSD-3-Clause
// The 16-lane body of AVX-512 on AVX2 registers: for its results where there is no AVX-512, not for speed.
#if defined(__x86_64__)
#define FASTATTN_ISA wide
#define FASTATTN_LANES 16
#define FASTATTN_ROWS 12
#include "attention/kernels.inl"

constinit const fastattn::AttentionKernels fastattn::kAttentionWide = fastattn::wide::kKernels;
#endif
