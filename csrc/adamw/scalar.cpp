// SPDX-License-Identifier: BSD-3-Clause
// The platform's baseline, 4-lane vectors.
#define FASTATTN_ISA scalar
#define FASTATTN_LANES 4
#include "adamw/kernels.inl"

constinit const fastattn::AdamWKernels fastattn::kAdamWScalar = fastattn::scalar::kAdamWKernels;
