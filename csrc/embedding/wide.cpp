// SPDX-License-Identifier: BSD-3-Clause
// The 16-lane body on AVX2: for its results, not for speed.
#if defined(__x86_64__)
#define FASTATTN_ISA wide
#define FASTATTN_LANES 16
#include "embedding/kernels.inl"

constinit const fastattn::EmbeddingKernels fastattn::kEmbeddingWide = fastattn::wide::kEmbeddingKernels;
#endif
