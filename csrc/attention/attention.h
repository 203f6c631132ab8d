// SPDX-License-Identifier: BSD-3-Clause
// The attention ops as library.cpp registers them; the schemas are there.
#pragma once
#include "common/tensors.h"

namespace fastattn {

// What is computed over: fields of Problem (fastattn/ops/attention/problem.py), dropout in 65,536ths.
struct AttentionOptions {
  const OptionalTensor &mask, &blocks, &ranges, &bias, &relative, &origin, &sinks, &seed;
  int64_t left, right;
  bool bottom_right;
  int64_t q_start, k_start, block_q, block_k;
  double scale, softcap;
  int64_t drop_threshold;
};
// They come one by one from the dispatcher.
#define FASTATTN_ATTENTION_OPTIONS                                                                         \
  const OptionalTensor &mask, const OptionalTensor &blocks, const OptionalTensor &ranges,                  \
      const OptionalTensor &bias, const OptionalTensor &relative, const OptionalTensor &origin,            \
      const OptionalTensor &sinks, const OptionalTensor &seed, int64_t left, int64_t right,                \
      bool bottom_right, int64_t q_start, int64_t k_start, int64_t block_q, int64_t block_k, double scale, \
      double softcap, int64_t drop_threshold
#define FASTATTN_ATTENTION_GIVEN                                                                            \
  AttentionOptions {                                                                                        \
    mask, blocks, ranges, bias, relative, origin, sinks, seed, left, right, bottom_right, q_start, k_start, \
        block_q, block_k, scale, softcap, drop_threshold                                                    \
  }
#define FASTATTN_ATTENTION_SAVED                                                                     \
  const Tensor &dout, const OptionalTensor &dlse, const Tensor &q, const Tensor &k, const Tensor &v, \
      const Tensor &out, const Tensor &lse

void attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, FASTATTN_ATTENTION_OPTIONS,
                       int64_t isa, const Tensor& out, const Tensor& lse);
// Of few queries: k and v are [pages, H_kv, page_size, D], in q's dtype, int8 or float8_e4m3fn.
void attention_decode(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& block_table,
                      const OptionalTensor& k_scale, const OptionalTensor& v_scale,
                      FASTATTN_ATTENTION_OPTIONS, int64_t isa, const Tensor& out, const Tensor& lse);
// Bits of `wanted`: 1 dbias, 2 drelative, 4 dsinks, 8 dq, dk and dv. What is not wanted is not written.
void attention_backward(FASTATTN_ATTENTION_SAVED, FASTATTN_ATTENTION_OPTIONS, int64_t isa, int64_t wanted,
                        const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& dbias,
                        const Tensor& drelative, const Tensor& dsinks);

// Bit i is set where instruction set i (common/isa.h) is compiled in and this CPU has it.
int64_t isa_mask();
// Floating-point operations done by `steps` rounds of independent FMAs on every thread.
double fma_loop(int64_t steps, int64_t isa);

}  // namespace fastattn
