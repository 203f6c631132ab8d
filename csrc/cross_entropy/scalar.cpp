// SPDX-License-Identifier: BSD-3-Clause
// The platform's baseline, 4-lane vectors.
#define FASTATTN_ISA scalar
#define FASTATTN_LANES 4
#include "cross_entropy/kernels.inl"

constinit const fastattn::CrossEntropyKernels fastattn::kCrossEntropyScalar =
    fastattn::scalar::kCrossEntropyKernels;
