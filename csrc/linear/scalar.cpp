// SPDX-License-Identifier: BSD-3-Clause
// The platform's baseline, 4-lane vectors.
#define FASTATTN_ISA scalar
#define FASTATTN_LANES 4
#define FASTATTN_ROWS 6
#include "linear/kernels.inl"

constinit const fastattn::GemmKernels fastattn::kGemmScalar = fastattn::scalar::kGemmKernels;
