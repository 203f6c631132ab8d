// SPDX-License-Identifier: BSD-3-Clause
// A row at a time: read once from memory, then again from the first-level cache for each of its sums.
#include "common/philox.h"
#include "layer_norm/problem.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int kSums = 4;  // independent sums, for the latency of an addition

template <class T>
FASTATTN_INLINE T* row_of(const NormRows& x, int64_t r) {
  return x.data ? static_cast<T*>(x.data) + r * x.stride : nullptr;
}

// Row r, where it is before `end`, on its way into the second-level cache: while the rows before it are
// worked on in the first, memory would have nothing to do.
template <class T>
struct Ahead {
  const char* at;
  FASTATTN_INLINE Ahead(const NormRows& x, int64_t r, int64_t end)
      : at(r < end ? reinterpret_cast<const char*>(row_of<const T>(x, r)) : nullptr) {}
  FASTATTN_INLINE void fetch(int64_t c) const {
    if (at) __builtin_prefetch(at + c * static_cast<int64_t>(sizeof(T)), 0, 2);
  }
};

// f(c, n, i) for each W columns from c, n of them to be read or written; i counts 0 … kSums-1 around.
template <class F>
FASTATTN_INLINE void each_vector(int64_t columns, const F& f) {
  int64_t c = 0;
  for (; c + kSums * W <= columns; c += kSums * W)
#pragma GCC unroll 4
    for (int i = 0; i < kSums; ++i) f(c + i * W, int64_t{W}, i);
  for (; c < columns; c += W) f(c, columns - c < W ? columns - c : int64_t{W}, 0);
}

// f(x) summed over a row; f gives 0 where there is nothing.
template <class F>
FASTATTN_INLINE float sum_of(int64_t columns, const F& f) {
  vf sums[kSums] = {};
  each_vector(columns, [&](int64_t c, int64_t n, int i) { sums[i] += f(c, n); });
  return horizontal_sum((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

// The first n lanes of x, the others 0.
FASTATTN_INLINE vf first_lanes(vf x, int64_t n) {
  return n >= W ? x : select(lane_index() < vi{} + static_cast<int32_t>(n), x, vf{});
}

// What dropout does to a row. The numbers of all columns are drawn before any is used: read back while the
// stores behind a row's end still wait for memory, they would wait with them (3 x the time).
class Dropout {
 public:
  FASTATTN_INLINE Dropout(const NormProblem& p, int64_t r, uint32_t* numbers)
      : numbers_(p.drop_threshold ? numbers : nullptr),
        threshold_(p.drop_threshold),
        factor_(65536.0f / static_cast<float>(65536 - p.drop_threshold)) {
    if (!numbers_) return;
    for (int64_t c = 0; c < p.columns; c += kPhiloxGroup)
      philox_group(p.seed, 0, 0, static_cast<uint32_t>(r), static_cast<uint32_t>(c / kPhiloxGroup),
                   numbers + c);
  }
  // x where kept / (1 - p), else 0: of the columns from c.
  FASTATTN_INLINE vf operator()(vf x, int64_t c) const {
    if (!numbers_) return x;
    const vu number = *reinterpret_cast<const vu_any*>(numbers_ + c);
    return select(reinterpret_cast<vi>(number >= vu{} + threshold_), x * factor_, vf{});
  }

 private:
  const uint32_t* numbers_;
  uint32_t threshold_;
  float factor_;
};

// z = residual + dropout(x)
template <class T, class Z>
void add_residual(const NormProblem& p, int64_t r, uint32_t* numbers) {
  const T* x = row_of<const T>(p.x, r);
  const Z* residual = row_of<const Z>(p.residual, r);
  Z* z = row_of<Z>(p.z, r);
  const Dropout dropout(p, r, numbers);
  each_vector(p.columns, [&](int64_t c, int64_t n, int) {
    vf sum = dropout(load_as_float(x + c, n), c);
    if (residual) sum += load_as_float(residual + c, n);
    store_from_float(z + c, sum, n);
  });
}

// out = (z - mean) · rstd · weight + bias
template <class T, class Z>
void normalize_row(const NormProblem& p, const Z* z, int64_t r) {
  const Ahead<T> x(p.x, r + 1, p.rows);
  const Ahead<Z> residual(p.residual, r + 1, p.rows);
  const float columns = static_cast<float>(p.columns);
  const auto load_z = [&](int64_t c, int64_t n) { return load_as_float(z + c, n); };
  const float mean = p.mean ? sum_of(p.columns, load_z) / columns : 0.0f;
  const float variance = sum_of(p.columns,
                                [&](int64_t c, int64_t n) {
                                  const vf centered = first_lanes(load_z(c, n) - mean, n);
                                  return centered * centered;
                                }) /
                         columns;
  const float rstd = 1.0f / __builtin_sqrtf(variance + p.eps);
  if (p.mean) p.mean[r] = mean;
  p.rstd[r] = rstd;

  T* out = row_of<T>(p.out, r);
  const float *weight = p.weight, *bias = p.bias;
  each_vector(p.columns, [&](int64_t c, int64_t n, int) {
    vf y = (load_z(c, n) - mean) * rstd;
    if (weight) y *= load_as_float(weight + c, n);
    if (bias) y += load_as_float(bias + c, n);
    store_from_float(out + c, y, n);
    x.fetch(c);
    residual.fetch(c);
  });
}

template <class T, class Z>
void forward_rows(const NormProblem& p, int64_t first, int64_t end, uint32_t* numbers) {
  for (int64_t r = first; r < end; ++r) {
    if (p.z.data) {
      add_residual<T, Z>(p, r, numbers);
      normalize_row<T>(p, row_of<const Z>(p.z, r), r);
    } else {
      normalize_row<T>(p, row_of<const T>(p.x, r), r);
    }
  }
}

// f(T{}, Z{}): the element types of x and z.
template <class F>
FASTATTN_INLINE void with_elements(const NormProblem& p, const F& f) {
  const bool wide = p.sum_dtype == Dtype::kFloat32;
  if (p.dtype == Dtype::kFloat32) return f(float{}, float{});
  if (p.dtype == Dtype::kBFloat16) return wide ? f(bf16{}, float{}) : f(bf16{}, bf16{});
  return wide ? f(f16{}, float{}) : f(f16{}, f16{});
}

void norm_forward(const NormProblem& p, int64_t first, int64_t end, uint32_t* numbers) {
  with_elements(p, [&]<class T, class Z>(T, Z) { forward_rows<T, Z>(p, first, end, numbers); });
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
