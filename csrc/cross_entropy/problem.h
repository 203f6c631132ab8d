// SPDX-License-Identifier: BSD-3-Clause
// What the kernels over rows of logits are asked to compute: pointers, sizes and strides, without a word of
// torch.
#pragma once
#include <cstdint>

#include "common/dtype.h"

namespace fastattn {

// Of a row x, S = c · tanh(x / c) where softcap c > 0, else x; w the classes' weights, W their sum, y the
// target, e the label smoothing, and lse = log Σ exp S:
//   loss = (1 - e) · w_y · (lse - S_y) + e / V · Σ w_j · (lse - S_j) + z · w_y · lse²
// A row whose target is ignore_index has loss and gradient 0.
struct CrossEntropyProblem {
  int64_t rows, classes;
  const void* logits;  // [rows][classes]
  Dtype dtype;         // of logits and dlogits
  int64_t stride;      // of logits' rows
  const int64_t* target;
  const float* weight;  // [classes]; null: all 1
  float weight_sum;
  int64_t ignore_index;
  float label_smoothing, softcap, z_loss;
  float* loss;  // [rows]; null: lse is given, else both are written
  float* lse;
  const float* dloss;  // [rows]
  int64_t dloss_stride;
  void* dlogits;  // [rows][classes], may be logits; null: not wanted
  int64_t dlogits_stride;
};

// Of rows s of the student and t of the teacher, p = softmax(t / T), q = softmax(s / T):
//   loss = T² · Σ p_j · (log p_j - log q_j), and its gradient T · (q - p) in the place of s
struct KlDivProblem {
  int64_t rows, classes;
  float* student;  // [rows][classes]
  const float* teacher;
  int64_t student_stride, teacher_stride;
  float temperature;
  float* loss;         // [rows]
  const float* dloss;  // [rows]; null: no gradient is wanted
  int64_t dloss_stride;
};

struct CrossEntropyKernels {
  void (*cross_entropy)(const CrossEntropyProblem&, int64_t row);
  void (*kl_div)(const KlDivProblem&, int64_t row);
};

extern const CrossEntropyKernels kCrossEntropyScalar, kCrossEntropyAvx2, kCrossEntropyAvx512,
    kCrossEntropyWide;

}  // namespace fastattn
