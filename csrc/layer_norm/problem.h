// SPDX-License-Identifier: BSD-3-Clause
// What a layer norm is asked to compute: pointers, sizes and strides, without a word of torch.
#pragma once
#include <cstddef>
#include <cstdint>

#include "common/dtype.h"

namespace fastattn {

// Row r starts at element r · stride; its elements lie side by side. data = nullptr: not given.
struct NormRows {
  void* data;
  int64_t stride;
};

// z = residual + dropout(x), out = (z - mean) · rstd · weight + bias; without `mean` (RMS norm) it is 0.
struct NormProblem {
  int64_t rows, columns;
  Dtype dtype;                 // of x, out and their gradients
  Dtype sum_dtype;             // of z, residual and their gradients: `dtype` or float32
  NormRows x, residual, z;     // forward: without z, x is z; backward: z alone
  NormRows out;                // forward
  const float *weight, *bias;  // [columns]; null: 1 and 0
  float *mean, *rstd;          // [rows]
  float eps;
  uint32_t drop_threshold;  // in 65,536ths; 0 = no dropout
  uint64_t seed;
  // Backward. `dz` is what comes into z from elsewhere.
  NormRows dout, dz, dx, dresidual;
  float* partial_weight;  // [chunks][columns]: sums over a chunk's rows; null: not wanted
  float* partial_bias;
};

struct NormKernels {
  // Rows [first, end). With dropout `numbers` is scratch for `columns`, rounded up to 128.
  void (*forward)(const NormProblem&, int64_t first, int64_t end, uint32_t* numbers);
  // The same; what a chunk adds to the gradients of weight and bias goes to row `chunk` of the partials.
  void (*backward)(const NormProblem&, int64_t chunk, int64_t first, int64_t end, uint32_t* numbers);
  // out[c] = Σ partial[0 … chunks)[c], in order, for c in [first, end).
  void (*add_up)(const float* partial, int64_t chunks, int64_t columns, int64_t first, int64_t end,
                 float* out);
};

extern const NormKernels kNormScalar, kNormAvx2, kNormAvx512, kNormWide;

}  // namespace fastattn
