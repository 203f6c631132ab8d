// SPDX-License-Identifier: BSD-3-Clause
// One instruction set's table of kernels.
#include "attention/backward.inl"
#include "attention/decode.inl"

namespace fastattn::FASTATTN_ISA {
namespace {

double fma_loop(int64_t steps) {
  vf acc[ROWS * 2];
  for (int i = 0; i < ROWS * 2; ++i) acc[i] = broadcast(static_cast<float>(i));
  const vf x = broadcast(0.999f), y = broadcast(1e-3f);
  for (int64_t s = 0; s < steps; ++s)
#pragma GCC unroll 32
    for (int i = 0; i < ROWS * 2; ++i) acc[i] = acc[i] * x + y;
  vf sum{};
  for (int i = 0; i < ROWS * 2; ++i) sum += acc[i];
  volatile float sink = horizontal_sum(sum);
  (void)sink;
  return 2.0 * W * ROWS * 2 * static_cast<double>(steps);
}

constexpr AttentionKernels kKernels = {
    ROWS,          kQueryBlock,       PANEL,
    key_block,     forward_scratch,   forward,
    kSplit,        decode_scratch,    decode,
    decode_merge,  backward_scratch,  backward_rows,
    backward_seen, backward_keys,     backward_queries,
    backward_bias, backward_relative, fma_loop,
};

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
