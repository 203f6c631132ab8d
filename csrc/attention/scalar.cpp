// SPDX-License-Identifier: BSD-3-Clause
// Four lanes on the platform's baseline (SSE2, NEON), or whatever the compiler makes of them.
#define FASTATTN_ISA scalar
#define FASTATTN_LANES 4
#define FASTATTN_ROWS 6
#include "attention/kernels.inl"

constinit const fastattn::AttentionKernels fastattn::kAttentionScalar = fastattn::scalar::kKernels;
