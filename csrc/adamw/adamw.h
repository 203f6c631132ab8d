// SPDX-License-Identifier: BSD-3-Clause
// AdamW as library.cpp registers it; the schemas are there.
#pragma once
#include <vector>

#include "common/tensors.h"

namespace fastattn {

// The sum of the squares of all elements of contiguous-in-memory tensors, in one order whatever the threads.
double sum_of_squares(const std::vector<Tensor>& tensors, int64_t isa);
// A step of every parameter, in place; steps are float32 scalars that have counted this one.
void adamw_step(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                const std::vector<Tensor>& exp_avgs, const std::vector<Tensor>& exp_avg_sqs,
                const std::vector<Tensor>& steps, double lr, double beta1, double beta2, double eps,
                double weight_decay, double factor, int64_t isa);

}  // namespace fastattn
