// SPDX-License-Identifier: BSD-3-Clause
// One instruction set's table of kernels.
#include "adamw/problem.h"
#include "common/vec.h"

namespace fastattn::FASTATTN_ISA {
namespace {

template <class F>
FASTATTN_INLINE void with_dtype(Dtype dtype, const F& f) {
  if (dtype == Dtype::kFloat32) return f(float{});
  if (dtype == Dtype::kBFloat16) return f(bf16{});
  return f(f16{});
}

FASTATTN_INLINE vf square_root(vf x) {
#if defined(__AVX512F__) && FASTATTN_LANES == 16
  return reinterpret_cast<vf>(_mm512_sqrt_ps(reinterpret_cast<__m512>(x)));
#elif defined(__AVX2__) && FASTATTN_LANES == 8
  return reinterpret_cast<vf>(_mm256_sqrt_ps(reinterpret_cast<__m256>(x)));
#else
  for (int i = 0; i < W; ++i) x[i] = __builtin_sqrtf(x[i]);
  return x;
#endif
}

double squares(Dtype dtype, const void* data, int64_t first, int64_t end) {
  double total = 0.0;
  with_dtype(dtype, [&]<class T>(T) {
    const T* x = static_cast<const T*>(data);
    vf sum[4] = {};
    int64_t i = first;
    for (; i + 4 * W <= end; i += 4 * W)
#pragma GCC unroll 4
      for (int j = 0; j < 4; ++j) {
        const vf g = load_as_float(x + i + j * W);
        sum[j] += g * g;
      }
    for (; i < end; i += W) {
      const vf g = load_as_float(x + i, end - i);
      sum[0] += g * g;
    }
    total = horizontal_sum((sum[0] + sum[1]) + (sum[2] + sum[3]));
  });
  return total;
}

// m = beta1 m + (1 - beta1) g;  v = beta2 v + (1 - beta2) g²;
// p = decay p - step_size m / (sqrt(v) root + eps)
void step(const AdamWTensor& t, const AdamWOptions& o, int64_t first, int64_t end) {
  with_dtype(t.dtype, [&]<class T>(T) {
    const T* grad = static_cast<const T*>(t.grad);
    T *param = static_cast<T*>(t.param), *exp_avg = static_cast<T*>(t.exp_avg);
    T* exp_avg_sq = static_cast<T*>(t.exp_avg_sq);
    // Seven streams at once are more than some prefetchers follow, and what is read is written next.
    constexpr int64_t kAhead = 1024 / sizeof(T);
    const auto update = [&](int64_t i, int64_t n) __attribute__((always_inline)) {
      __builtin_prefetch(grad + i + kAhead);
      __builtin_prefetch(param + i + kAhead, 1);
      __builtin_prefetch(exp_avg + i + kAhead, 1);
      __builtin_prefetch(exp_avg_sq + i + kAhead, 1);
      const vf g = load_as_float(grad + i, n) * o.factor;
      vf m = load_as_float(exp_avg + i, n), v = load_as_float(exp_avg_sq + i, n);
      m = m + (g - m) * o.new1;
      v = v * o.beta2 + g * g * o.new2;
      const vf p = load_as_float(param + i, n) * o.decay;
      store_from_float(param + i, p - m * t.step_size / (square_root(v) * t.root + o.eps), n);
      store_from_float(exp_avg + i, m, n);
      store_from_float(exp_avg_sq + i, v, n);
    };
    int64_t i = first;
    for (; i + W <= end; i += W) update(i, W);
    if (i < end) update(i, end - i);
  });
}

constexpr AdamWKernels kAdamWKernels = {squares, step};

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
