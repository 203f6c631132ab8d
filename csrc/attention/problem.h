// SPDX-License-Identifier: BSD-3-Clause
// What a kernel is asked to compute: pointers, sizes and strides, without a word of torch.
#pragma once
#include <cstddef>
#include <cstdint>

namespace fastattn {

enum class Dtype : int { kFloat32, kBFloat16, kFloat16 };

// [B, H, L, D] with a unit last stride; strides in elements.
struct Rows {
  void* data;
  int64_t batch, head, row;
};
// Broadcastable to [B, H, L_q, L_k]: a stride of 0 where it broadcasts. data = nullptr: not given.
struct Scores {
  const void* data;
  int64_t batch, head, row, column;
};

struct AttentionProblem {
  Dtype dtype;  // of q, k, v, out and the gradients
  int64_t batch, heads, kv_heads, q_length, k_length, qk_dim, v_dim;
  Rows q, k, v, out;
  float* lse;  // [B, H, L_q], natural logarithm

  Scores mask;  // bytes, 0 = masked
  Scores bias;
  Dtype bias_dtype;
  const int64_t* lengths;  // [B] or nullptr
  int diagonal;            // bit 0: top-left causal, bit 1: bottom-right causal
  float scale;
  uint32_t drop_threshold;  // in 65,536ths; 0 = no dropout
  uint64_t seed;
};

struct AttentionGradients {
  Rows dout, dq, dk, dv;
  const float* dlse;  // [B, H, L_q] or nullptr
  float* log2_sum;    // scratch [B, H, L_q]: lse in base 2, +inf for an empty row
  float* delta;       // scratch [B, H, L_q]: rowsum(dout · out) - dlse
  float* dq_sum;      // scratch [B, H, dq_rows][dq_stride], zeros
  int64_t dq_rows, dq_stride;
  int32_t* turn;  // scratch [B, H, query blocks], zeros: how many key blocks have added their part of dq

  float* dbias;  // float32 [bias_batch, bias_heads, bias_rows, bias_columns], each 1 or the full size
  int64_t bias_batch, bias_heads, bias_rows, bias_columns;
};

// One instruction set's kernels. `scratch` is private to the caller's thread, 64-byte aligned.
struct AttentionKernels {
  int64_t row_block;     // forward's rows come in multiples of this
  int64_t query_block;   // backward's tile
  int64_t dq_alignment;  // dq_stride is a multiple of this
  int64_t (*key_block)(const AttentionProblem&);

  size_t (*forward_scratch)(const AttentionProblem&, int64_t rows);
  void (*forward)(const AttentionProblem&, int64_t batch, int64_t head, int64_t first_row, int64_t rows,
                  char* scratch);

  size_t (*backward_scratch)(const AttentionProblem&);
  // log2_sum and delta of one (batch, head).
  void (*backward_rows)(const AttentionProblem&, const AttentionGradients&, int64_t batch, int64_t head);
  // dk and dv of one block of keys, and its part of dq in dq_sum. Blocks of one head may run at the same
  // time, provided that they are started in order: each waits for its turn to add, so the sum has one order.
  void (*backward_keys)(const AttentionProblem&, const AttentionGradients&, int64_t batch, int64_t kv_head,
                        int64_t block, char* scratch);
  // dq of one (batch, head) from dq_sum.
  void (*backward_queries)(const AttentionProblem&, const AttentionGradients&, int64_t batch, int64_t head);
  // dbias of one block of keys (all keys where bias_columns is 1) of one (bias batch, bias head).
  void (*backward_bias)(const AttentionProblem&, const AttentionGradients&, int64_t bias_batch,
                        int64_t bias_head, int64_t block, char* scratch);

  // `steps` rounds of independent FMAs; returns the floating-point operations done.
  double (*fma_loop)(int64_t steps);
};

extern const AttentionKernels kAttentionScalar;
#if defined(__x86_64__)
extern const AttentionKernels kAttentionAvx2, kAttentionAvx512, kAttentionWide;
#endif

}  // namespace fastattn
