// SPDX-License-Identifier: BSD-3-Clause
// The activations between the two linear layers of an MLP, and their derivatives.
#pragma once
#include "common/vec.h"

namespace fastattn {

// Ids as in fastattn/ops/activations.py.
enum class Activation : int64_t {
  kGelu = 0,
  kGeluTanh = 1,
  kSilu = 2,
  kRelu = 3,
  kReluSquared = 4,
  kCount = 5
};

}  // namespace fastattn

namespace fastattn::FASTATTN_ISA {
namespace {

struct Activated {
  vf value, slope;  // f(x) and f'(x)
};

FASTATTN_INLINE vf exp(vf x) {
  const vf y = x * 1.44269504f, most = broadcast(126.0f);
  return exp2(y > most ? most : y);
}

// x · s, s = σ(z(x)), and its derivative s + x · s · (1 - s) · z'(x).
FASTATTN_INLINE Activated gate_by_sigmoid(vf x, vf z, vf z_slope) {
  const vf s = 1.0f / (1.0f + exp(-z));
  return {x * s, s + x * s * (1.0f - s) * z_slope};
}

// x · Φ(x), Φ the normal distribution: of |x| its upper tail is φ(x) · P(t), t = 1 / (1 + p |x|), of absolute
// error 7.5e-8 (Abramowitz & Stegun, 26.2.17).
FASTATTN_INLINE Activated gelu(vf x) {
  const vf size = x < 0.0f ? -x : x;
  const vf density = exp(x * x * -0.5f) * 0.398942280f;
  const vf t = 1.0f / (1.0f + size * 0.2316419f);
  vf p = broadcast(1.330274429f);
  p = p * t - 1.821255978f;
  p = p * t + 1.781477937f;
  p = p * t - 0.356563782f;
  p = p * t + 0.319381530f;
  const vf tail = density * p * t;
  const vf phi = x < 0.0f ? tail : 1.0f - tail;
  return {x * phi, phi + x * density};
}

template <Activation A>
FASTATTN_INLINE Activated activate(vf x) {
  if constexpr (A == Activation::kGelu) {
    return gelu(x);
  } else if constexpr (A == Activation::kGeluTanh) {
    // (1 + tanh(u)) / 2 = σ(2u), u = √(2/π) · (x + 0.044715 x³)
    const vf x2 = x * x;
    return gate_by_sigmoid(x, x * (1.59576912f + 0.0713548163f * x2), 1.59576912f + 0.214064449f * x2);
  } else if constexpr (A == Activation::kSilu) {
    return gate_by_sigmoid(x, x, broadcast(1.0f));
  } else {
    const vf zero{}, positive = max(zero, x);  // a NaN stays
    if constexpr (A == Activation::kRelu) return {positive, x > 0.0f ? broadcast(1.0f) : zero};
    return {positive * positive, 2.0f * positive};
  }
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
