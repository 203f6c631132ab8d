// SPDX-License-Identifier: BSD-3-Clause
// The embedding as library.cpp registers it; the schemas are there.
#pragma once
#include "common/tensors.h"

namespace fastattn {

// ids int64 [N], weight [V, D], position_weight [P, D], positions int64 [M] with M a divisor of N, out [N,
// D].
void embedding(const Tensor& ids, const Tensor& weight, const OptionalTensor& position_weight,
               const OptionalTensor& positions, const OptionalTensor& seed, int64_t drop_threshold,
               int64_t isa, const Tensor& out);
// grad [V, D], of zeros: rows of dout [N, D] that looked up one row, in the order `order` of sorted ids, are
// added up; not for the row `skip`.
void embedding_gradient(const Tensor& dout, const Tensor& ids, const Tensor& order,
                        const OptionalTensor& seed, int64_t drop_threshold, int64_t skip, int64_t isa,
                        const Tensor& grad);

}  // namespace fastattn
