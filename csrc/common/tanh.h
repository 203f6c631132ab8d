// SPDX-License-Identifier: BSD-3-Clause
// The hyperbolic tangent, which caps logits softly.
#pragma once
#include "common/vec.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr float kLog2e = 1.44269504088896340736f;

// tanh to 2 units in the last place: Cephes' polynomial near 0, where 1 - 2 / (e^2x + 1) loses digits.
FASTATTN_INLINE vf tanh(vf x) {
  const vf z = x * x;
  vf near = broadcast(-5.70498872745e-3f);
  near = near * z + 2.06390887954e-2f;
  near = near * z - 5.37397155531e-2f;
  near = near * z + 1.33314422036e-1f;
  near = near * z - 3.33332819422e-1f;
  near = near * z * x + x;
  const vf size = max(x, -x), bounded = size > 10.0f ? broadcast(10.0f) : size;
  const vf far = 1.0f - 2.0f / (exp2(bounded * (2.0f * kLog2e)) + 1.0f);
  return select(size < 0.625f, near, select(x < 0.0f, -far, far));
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
