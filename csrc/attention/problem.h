// SPDX-License-Identifier: BSD-3-Clause
// What a kernel is asked to compute: pointers, sizes and strides, without a word of torch.
#pragma once
#include <cstddef>
#include <cstdint>

#include "common/dtype.h"

namespace fastattn {

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

// Pairs [B][count][L_q][2] of int32: a query sees the keys from first to before second of any of its pairs.
// Strides in int32, 0 where it broadcasts.
struct Ranges {
  const int32_t* data;
  int64_t count, batch, pair, row;
};

struct AttentionProblem {
  Dtype dtype;  // of q, k, v, out and the gradients
  int64_t batch, heads, kv_heads, q_length, k_length, qk_dim, v_dim;
  Rows q, k, v, out;
  float* lse;  // [B, H, L_q], natural logarithm

  // A key is seen where band, ranges, blocks and mask keep it.
  int64_t diagonal;     // query i stands at key i + diagonal
  int64_t left, right;  // keys seen before and behind that one; negative: all
  Ranges ranges;
  Scores blocks;  // bytes, 0 = masked; its rows and columns are blocks of block_q queries and block_k keys
  int64_t block_q, block_k;
  Scores mask;  // bytes, 0 = masked

  float scale, softcap;  // softcap 0: none
  Scores bias;
  Dtype bias_dtype;
  // A bias by distance: query i and key j take relative[j - i + L_q], with an origin
  // relative[j - origin[i] + L_q + L_k].
  const float* relative;
  int64_t relative_batch, relative_head;
  const int32_t* origin;
  int64_t origin_batch;
  const float* sinks;  // [B, H]
  int64_t sinks_batch;

  uint32_t drop_threshold;  // in 65,536ths; 0 = no dropout
  uint64_t seed;
  int64_t q_start, k_start;  // positions that dropout goes by
};

// Keys and values in pages, for few queries. In AttentionProblem, k and v are [pages, H_kv, page_size, D] and
// k_length is that of the longest table.
struct AttentionCache {
  Dtype dtype;
  const int32_t* table;  // [B][table_columns] pages in order; nullptr: sequence b is page b
  int64_t table_columns, page_size;
  const float *k_scale, *v_scale;  // [B, H_kv], factors on what is stored, or nullptr
  float* partial;  // scratch [B, H, L_q, splits][partial_stride]: out, its maximum and sum of one split
  int64_t splits, partial_stride;
};

struct AttentionGradients {
  Rows dout, dq, dk, dv;
  const float* dlse;  // [B, H, L_q] or nullptr
  float* log2_sum;    // scratch [B, H, L_q]: lse in base 2, +inf for an empty row
  float* delta;       // scratch [B, H, L_q]: rowsum(dout · out) - dlse
  float* dq_sum;      // scratch [B, H, dq_rows][dq_stride], zeros
  int64_t dq_rows, dq_stride;
  int64_t* seen_keys;    // scratch [B, 2]: first and end of the keys that any query sees
  int64_t* seen_blocks;  // scratch [B, query blocks, 2]: first and end of a query block's blocks of keys
  int32_t* turn;         // scratch [B, H, query blocks], zeros: how many of these have added their part of dq

  float* dbias;  // float32 [bias_batch, bias_heads, bias_rows, bias_columns], each 1 or the full size
  int64_t bias_batch, bias_heads, bias_rows, bias_columns;
  float* drelative;  // float32 [relative_batches, relative_heads, relative_size]
  int64_t relative_batches, relative_heads, relative_size;
  float* dsinks;  // [B, H]
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

  // Few queries, split over keys: one split of one (batch, key head), and the sum of one (batch, head).
  int64_t decode_split;  // keys
  size_t (*decode_scratch)(const AttentionProblem&);
  void (*decode)(const AttentionProblem&, const AttentionCache&, int64_t batch, int64_t kv_head,
                 int64_t split, char* scratch);
  void (*decode_merge)(const AttentionProblem&, const AttentionCache&, int64_t batch, int64_t head);

  size_t (*backward_scratch)(const AttentionProblem&);
  // log2_sum and delta of one (batch, head), and dsinks where it is asked for.
  void (*backward_rows)(const AttentionProblem&, const AttentionGradients&, int64_t batch, int64_t head);
  // seen_keys and seen_blocks of one batch.
  void (*backward_seen)(const AttentionProblem&, const AttentionGradients&, int64_t batch);
  // dk and dv of one block of keys, its part of dq in dq_sum, and of dbias where that is not nullptr (it then
  // does not broadcast). Blocks of one head may run at the same time, provided that they
  // are started in order: each waits for its turn to add, so the sum has one order.
  void (*backward_keys)(const AttentionProblem&, const AttentionGradients&, int64_t batch, int64_t kv_head,
                        int64_t block, char* scratch);
  // dq of one (batch, head) from dq_sum.
  void (*backward_queries)(const AttentionProblem&, const AttentionGradients&, int64_t batch, int64_t head);
  // dbias of one block of keys (all keys where bias_columns is 1) of one (bias batch, bias head).
  void (*backward_bias)(const AttentionProblem&, const AttentionGradients&, int64_t bias_batch,
                        int64_t bias_head, int64_t block, char* scratch);
  // drelative of one (relative batch, relative head).
  void (*backward_relative)(const AttentionProblem&, const AttentionGradients&, int64_t relative_batch,
                            int64_t relative_head, char* scratch);

  // `steps` rounds of independent FMAs; returns the floating-point operations done.
  double (*fma_loop)(int64_t steps);
};

extern const AttentionKernels kAttentionScalar;
#if defined(__x86_64__)
extern const AttentionKernels kAttentionAvx2, kAttentionAvx512, kAttentionWide;
#endif

}  // namespace fastattn
