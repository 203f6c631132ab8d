// SPDX-License-Identifier: BSD-3-Clause
// What an embedding is asked to compute: pointers and sizes, without a word of torch.
#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace fastattn {

// out[r] = dropout(weight[ids[r]] + position_weight[positions[r % position_count]]), r of all leading
// dimensions.
struct EmbeddingProblem {
  Dtype dtype;
  int64_t rows, columns;
  const int64_t* ids;
  const void* weight;  // rows of weight_row elements
  int64_t weight_row;
  const void* position_weight;  // may be null
  int64_t position_row;
  const int64_t* positions;
  int64_t position_count;
  void* out;                // contiguous
  uint32_t drop_threshold;  // in 65,536ths; 0 = no dropout
  uint64_t seed;
};

// grad[t] = the sum of dropout's gradient of dout over rows that looked t up, in the order given.
struct EmbeddingGradient {
  Dtype dtype;
  int64_t columns;
  const void* dout;  // contiguous
  void* grad;        // contiguous
  uint32_t drop_threshold;
  uint64_t seed;
};

struct EmbeddingKernels {
  void (*look_up)(const EmbeddingProblem&, int64_t first, int64_t end);
  int64_t column_block;  // columns a task of the gradient
  // Columns [first, first + column_block) of row `target` of the gradient, from the `count` rows listed.
  void (*sum)(const EmbeddingGradient&, int64_t target, const int64_t* rows, int64_t count, int64_t first);
};

extern const EmbeddingKernels kEmbeddingScalar, kEmbeddingAvx2, kEmbeddingAvx512, kEmbeddingWide;

}  // namespace fastattn
