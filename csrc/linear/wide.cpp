// SPDX-License-Identifier: BSD-3-Clause
// The 16-lane body on AVX2: for its results, not for speed.
#if defined(__x86_64__)
#define FASTATTN_ISA wide
#define FASTATTN_LANES 16
#define FASTATTN_ROWS 12
#include "linear/kernels.inl"

constinit const fastattn::GemmKernels fastattn::kGemmWide = fastattn::wide::kGemmKernels;
#endif
