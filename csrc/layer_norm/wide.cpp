// SPDX-License-Identifier: BSD-3-Clause
// The 16-lane body on AVX2: for its results, not for speed.
#if defined(__x86_64__)
#define FASTATTN_ISA wide
#define FASTATTN_LANES 16
#include "layer_norm/kernels.inl"

constinit const fastattn::NormKernels fastattn::kNormWide = fastattn::wide::kNormKernels;
#endif
