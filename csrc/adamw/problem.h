// SPDX-License-Identifier: BSD-3-Clause
// What a step of AdamW is asked to compute: pointers and numbers, without a word of torch.
#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace fastattn {

// One parameter: tensors of one dtype and one layout without holes, as `count` elements in memory order.
struct AdamWTensor {
  Dtype dtype;
  int64_t count;
  const void* grad;
  void *param, *exp_avg, *exp_avg_sq;
  float step_size;  // lr / (1 - beta1^t)
  float root;       // 1 / sqrt(1 - beta2^t)
};

struct AdamWOptions {
  float beta2, eps;
  float new1, new2;  // 1 - beta1, 1 - beta2: rounded once, for a float beta near 1 has lost them
  float decay;       // 1 - lr · weight_decay
  float factor;      // of every gradient: clipping's, negative to maximize
};

struct AdamWKernels {
  // The sum of squares of elements [first, end).
  double (*squares)(Dtype, const void* x, int64_t first, int64_t end);
  void (*step)(const AdamWTensor&, const AdamWOptions&, int64_t first, int64_t end);
};

extern const AdamWKernels kAdamWScalar, kAdamWAvx2, kAdamWAvx512, kAdamWWide;

}  // namespace fastattn
