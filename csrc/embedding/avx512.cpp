// SPDX-License-Identifier: BSD-3-Clause
// AVX-512.
#if defined(__x86_64__)
#define FASTATTN_ISA avx512
#define FASTATTN_LANES 16
#include "embedding/kernels.inl"

constinit const fastattn::EmbeddingKernels fastattn::kEmbeddingAvx512 = fastattn::avx512::kEmbeddingKernels;
#endif
