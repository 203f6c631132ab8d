// SPDX-License-Identifier: BSD-3-Clause
// Walking over a row of logits: blocks that stay in the first-level cache, vectors, and the last, partial
// one.
#pragma once
#include <cmath>
#include <type_traits>

#include "common/tanh.h"
#include "cross_entropy/problem.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int64_t kBlock = 2048;

// f(c, n, whole) for every vector of columns [begin, end): n of its lanes are there, all of them where
// `whole`.
template <class F>
FASTATTN_INLINE void for_vectors(int64_t begin, int64_t end, const F& f) {
  int64_t c = begin;
  for (; c + W <= end; c += W) f(c, int64_t{W}, std::true_type{});
  if (c < end) f(c, end - c, std::false_type{});
}

// x where there is a column, else `other`.
template <class Whole>
FASTATTN_INLINE vf there(vf x, int64_t n, Whole, float other) {
  if constexpr (Whole::value) return x;
  return select(lane_index() < static_cast<int32_t>(n), x, broadcast(other));
}

template <class T, class Whole>
FASTATTN_INLINE vf load_there(const T* x, int64_t n, Whole) {
  if constexpr (Whole::value) return load_as_float(x);
  return load_as_float(x, n);
}

template <class T, class Whole>
FASTATTN_INLINE void store_there(T* x, vf value, int64_t n, Whole) {
  if constexpr (Whole::value) return store_from_float(x, value);
  store_from_float(x, value, n);
}

FASTATTN_INLINE float horizontal_max(vf x) {
  float part[W];
  store(part, x);
  for (int n = W / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) part[i] = part[i] > part[i + n] ? part[i] : part[i + n];
  return part[0];
}

// The largest of columns [begin, end), NaN left out.
template <class T>
FASTATTN_INLINE float row_max(const T* x, int64_t begin, int64_t end) {
  vf top = broadcast(-kInf), next = top;
  int64_t c = begin;
  for (; c + 2 * W <= end; c += 2 * W) {  // two chains hide the latency
    top = max(load_as_float(x + c), top);
    next = max(load_as_float(x + c + W), next);
  }
  for_vectors(c, end, [&](int64_t at, int64_t n, auto whole) {
    top = max(there(load_there(x + at, n, whole), n, whole, -kInf), top);
  });
  return horizontal_max(max(top, next));
}

// Σ exp(factor · x) as far as it was seen, over exp(factor · peak); factor > 0.
struct OnlineSum {
  float peak = -kInf, sum = 0.0f;

  // Makes room for logits up to `top`: what sums over exp(factor · peak) have to be multiplied by.
  FASTATTN_INLINE float raise(float top, float factor) {
    if (!(top > peak)) return 1.0f;
    const float rescale = std::exp((peak - top) * factor);  // 0 at first
    peak = top;
    sum *= rescale;
    return rescale;
  }
  // What is subtracted before exp: a row of -inf alone must not come to -inf + inf.
  FASTATTN_INLINE float base() const { return peak == -kInf ? 0.0f : peak; }
  FASTATTN_INLINE float log(float factor) const { return base() * factor + std::log(sum); }
};

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
