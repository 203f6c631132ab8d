// SPDX-License-Identifier: BSD-3-Clause
// AVX2, FMA, F16C.
#if defined(__x86_64__)
#define FASTATTN_ISA avx2
#define FASTATTN_LANES 8
#include "cross_entropy/kernels.inl"

constinit const fastattn::CrossEntropyKernels fastattn::kCrossEntropyAvx2 =
    fastattn::avx2::kCrossEntropyKernels;
#endif
