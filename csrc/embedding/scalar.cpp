// SPDX-License-Identifier: BSD-3-Clause
// The platform's baseline, 4-lane vectors.
#define FASTATTN_ISA scalar
#define FASTATTN_LANES 4
#include "embedding/kernels.inl"

constinit const fastattn::EmbeddingKernels fastattn::kEmbeddingScalar = fastattn::scalar::kEmbeddingKernels;
