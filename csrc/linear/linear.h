// SPDX-License-Identifier: BSD-3-Clause
// The matrix product as library.cpp registers it; the schema is there.
#pragma once
#include "common/tensors.h"

namespace fastattn {

// `epilogue` and `activation` are ids of linear/problem.h and common/activation.h.
void gemm(const Tensor& a, const Tensor& b, const OptionalTensor& bias, int64_t epilogue, int64_t activation,
          const OptionalTensor& u, const OptionalTensor& gate, const OptionalTensor& h,
          const OptionalTensor& d, int64_t isa, const Tensor& c);
// out = residual + dropout(x), all [rows, columns]; `seed` int64 [1] where drop_threshold is above 0.
void dropout_add(const Tensor& x, const OptionalTensor& residual, const OptionalTensor& seed,
                 int64_t drop_threshold, int64_t isa, const Tensor& out);

}  // namespace fastattn
