// SPDX-License-Identifier: BSD-3-Clause
// The passes over rows of logits as library.cpp registers them; the schemas are there.
#pragma once
#include "common/tensors.h"

namespace fastattn {

// logits [rows, classes], target int64 [rows], weight float32 [classes]; dloss, loss and lse float32 [rows].
// With `loss` it and lse are written, else lse is read. With `dlogits`, which may be logits, the gradient is
// written. A softcap of 0 is none.
void cross_entropy(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                   const OptionalTensor& dloss, int64_t ignore_index, double label_smoothing, double softcap,
                   double z_loss, int64_t isa, const OptionalTensor& loss, const Tensor& lse,
                   const OptionalTensor& dlogits);
// student, teacher float32 [rows, classes]; loss, dloss float32 [rows]. With `dloss` the gradient takes the
// place of student's logits.
void kl_div(const Tensor& student, const Tensor& teacher, const OptionalTensor& dloss, double temperature,
            int64_t isa, const Tensor& loss);

}  // namespace fastattn
