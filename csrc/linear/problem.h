// SPDX-License-Identifier: BSD-3-Clause
// What a matrix product is asked to compute: pointers, sizes and strides, without a word of torch.
#pragma once
#include <cstddef>
#include <cstdint>

#include "common/dtype.h"

namespace fastattn {

// Element (i, j) is data[i · row + j · column]; at least one stride is 1. data = nullptr: not given.
struct Matrix {
  void* data;
  Dtype dtype;
  int64_t row, column;
};

// What becomes of S = A · B + bias when it is complete. Ids as in fastattn/ops/linear/epilogues.py.
enum class Epilogue : int64_t {
  kStore = 0,      // C = S
  kAdd = 1,        // C = C + S, C of float32
  kActivate = 2,   // U = S where U is given, C = f(S)
  kGate = 3,       // U = S where U is given, C = f(G) · S, G given
  kSlope = 4,      // C = S · f'(U), H = f(U) where H is given
  kGateSlope = 5,  // C = S · f(G), D = S · U · f'(G), H = f(G) · U where H is given
  kCount = 6,
};

struct GemmProblem {
  int64_t m, n, k;
  Matrix a, b;  // [m][k], [k][n]
  Matrix c;     // [m][n]; of it and the following the column stride is 1
  Matrix bias;  // [n], its stride is `column`
  Epilogue epilogue;
  int64_t activation;
  Matrix u, gate;  // [m][n]: S and G above
  Matrix h, d;
};

// How a problem is cut: B is packed a block [k_block][n_block] at a time by all threads, then tasks of
// [m_block] rows and [n_task] columns of C multiply with it.
struct GemmBlocks {
  int64_t m_block, n_block, k_block, n_task;
  size_t packed_bytes;   // of a block of B, shared
  size_t scratch_bytes;  // of a thread
  size_t sums_bytes;     // float32 [m][n_block], where C itself can't hold partial sums
};

struct GemmKernels {
  GemmBlocks (*blocks)(const GemmProblem&, int64_t threads);
  int64_t panel;  // columns that are packed together
  // Pack columns [first, first + panel) of the block of B that starts at column j0 and row k0.
  void (*pack)(const GemmProblem&, const GemmBlocks&, int64_t j0, int64_t k0, int64_t first, float* packed);
  // Rows [i0, i0 + m_block), columns [j, j + n_task) of the block of B at column j0 and row k0.
  void (*multiply)(const GemmProblem&, const GemmBlocks&, int64_t i0, int64_t j0, int64_t j, int64_t k0,
                   const float* packed, float* sums, void* scratch);
  // Rows [first, end): out = residual + dropout(x). `residual` may be null.
  void (*dropout_add)(const struct DropoutProblem&, int64_t first, int64_t end);
};

// out[r][c] = residual[r][c] + x[r][c] · kept(r, c) / (1 - p): batch 0, head 0, query r, key c of Philox.
struct DropoutProblem {
  int64_t rows, columns;
  Matrix x, residual, out;
  uint32_t drop_threshold;  // in 65,536ths; 0 = no dropout
  uint64_t seed;
};

extern const GemmKernels kGemmScalar, kGemmAvx2, kGemmAvx512, kGemmWide;

}  // namespace fastattn
