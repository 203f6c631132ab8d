// SPDX-License-Identifier: BSD-3-Clause
// The layer norm as library.cpp registers it; the schema is there.
#pragma once
#include "common/tensors.h"

namespace fastattn {

// All but the statistics are [rows, columns], weight and bias float32 [columns]. Without `mean` an RMS norm.
void layer_norm_forward(const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
                        const OptionalTensor& bias, const OptionalTensor& seed, int64_t drop_threshold,
                        double eps, int64_t isa, const Tensor& out, const OptionalTensor& z,
                        const OptionalTensor& mean, const Tensor& rstd);
void layer_norm_backward(const Tensor& dout, const OptionalTensor& dz, const Tensor& z,
                         const OptionalTensor& weight, const OptionalTensor& mean, const Tensor& rstd,
                         const OptionalTensor& seed, int64_t drop_threshold, int64_t isa,
                         const OptionalTensor& dx, const OptionalTensor& dresidual,
                         const OptionalTensor& dweight, const OptionalTensor& dbias);

}  // namespace fastattn
