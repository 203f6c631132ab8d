// SPDX-License-Identifier: BSD-3-Clause
// Rotary embedding as library.cpp registers it; the schema is there.
#pragma once
#include "common/tensors.h"

namespace fastattn {

// x and out [B, H, L, D], cos and sin [P, R / 2] of one dtype, positions int64 [B or 1, L] or those from
// start on.
void rotary(const Tensor& x, const Tensor& cos, const Tensor& sin, const OptionalTensor& positions,
            int64_t start, bool interleaved, bool inverse, int64_t isa, const Tensor& out);

}  // namespace fastattn
