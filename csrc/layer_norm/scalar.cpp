// SPDX-License-Identifier: BSD-3-Clause
// The platform's baseline, 4-lane vectors.
#define FASTATTN_ISA scalar
#define FASTATTN_LANES 4
#include "layer_norm/kernels.inl"

constinit const fastattn::NormKernels fastattn::kNormScalar = fastattn::scalar::kNormKernels;
