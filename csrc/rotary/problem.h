// SPDX-License-Identifier: BSD-3-Clause
// What a rotation is asked to compute: pointers, sizes and strides, without a word of torch.
#pragma once
#include <cstddef>
#include <cstdint>

#include "common/dtype.h"

namespace fastattn {

// [B, H, L, D] with a last stride of 1.
struct HeadRows {
  void* data;
  int64_t batch, head, row;
};

// A position that turns nothing: what is behind the last of packed sequences.
constexpr int64_t kUnturned = INT64_MIN;

// out[.., i], out[.., j] = x_i cos - x_j sin, x_i sin + x_j cos for each pair (i, j) of dimensions.
struct RotaryProblem {
  Dtype dtype, table_dtype;
  HeadRows x, out;
  int64_t batch, heads, length, dim;
  int64_t half;           // pairs; the dimensions from 2 · half on pass through
  const void *cos, *sin;  // [positions][half]
  int64_t cos_row, sin_row;
  const int64_t* positions;  // [B or 1][L], by position_batch; null: start + l
  int64_t position_batch, start;
  bool interleaved;  // pairs (0, 1), (2, 3), …; else (0, half), (1, half + 1), …
  bool inverse;      // the angles' negatives
};

struct RotaryKernels {
  int64_t row_block;  // rows a task
  void (*rotate)(const RotaryProblem&, int64_t batch, int64_t head, int64_t first_row);
};

extern const RotaryKernels kRotaryScalar, kRotaryAvx2, kRotaryAvx512, kRotaryWide;

}  // namespace fastattn
