// SPDX-License-Identifier: BSD-3-Clause
// One instruction set's table of kernels.
#include "common/philox.h"
#include "embedding/problem.h"

namespace fastattn::FASTATTN_ISA {
namespace {

template <class F>
FASTATTN_INLINE void with_dtype(Dtype dtype, const F& f) {
  if (dtype == Dtype::kFloat32) return f(float{});
  if (dtype == Dtype::kBFloat16) return f(bf16{});
  return f(f16{});
}

FASTATTN_INLINE float kept_factor(uint32_t drop_threshold) {
  return 65536.0f / static_cast<float>(65536 - drop_threshold);
}

void look_up(const EmbeddingProblem& p, int64_t first, int64_t end) {
  const float factor = kept_factor(p.drop_threshold);
  with_dtype(p.dtype, [&]<class T>(T) {
    for (int64_t r = first; r < end; ++r) {
      const T* token = static_cast<const T*>(p.weight) + p.ids[r] * p.weight_row;
      const T* place = static_cast<const T*>(p.position_weight);
      if (place) place += p.positions[r % p.position_count] * p.position_row;
      T* out = static_cast<T*>(p.out) + r * p.columns;
      const auto sum = [&](int64_t c, int64_t n) {
        const vf x = load_as_float(token + c, n);
        return place ? x + load_as_float(place + c, n) : x;
      };
      if (p.drop_threshold == 0)
        for (int64_t c = 0; c < p.columns; c += W) {
          const int64_t n = p.columns - c;
          store_from_float(out + c, sum(c, n), n);
        }
      else
        for_kept_in_row(p.seed, r, p.columns, p.drop_threshold, [&](int64_t c, vi kept) {
          const int64_t n = p.columns - c;
          store_from_float(out + c, select(kept, sum(c, n) * factor, vf{}), n);
        });
    }
  });
}

constexpr int64_t kColumnBlock = 2 * kPhiloxGroup;

void sum(const EmbeddingGradient& g, int64_t target, const int64_t* rows, int64_t count, int64_t first) {
  const int64_t columns = kColumnBlock < g.columns - first ? kColumnBlock : g.columns - first;
  float total[kColumnBlock] = {};
  with_dtype(g.dtype, [&]<class T>(T) {
    for (int64_t i = 0; i < count; ++i) {
      const T* dout = static_cast<const T*>(g.dout) + rows[i] * g.columns + first;
      uint32_t numbers[kPhiloxGroup];
      for (int64_t c = 0; c < columns; c += W) {
        vf x = load_as_float(dout + c, columns - c);
        if (g.drop_threshold) {
          if (c % kPhiloxGroup == 0)
            philox_group(g.seed, 0, 0, static_cast<uint32_t>(rows[i]),
                         static_cast<uint32_t>((first + c) / kPhiloxGroup), numbers);
          const vu drawn = *reinterpret_cast<const vu_any*>(numbers + c % kPhiloxGroup);
          x = select(reinterpret_cast<vi>(drawn >= vu{} + g.drop_threshold), x, vf{});
        }
        store(total + c, load(total + c) + x);
      }
    }
    const float factor = kept_factor(g.drop_threshold);
    T* grad = static_cast<T*>(g.grad) + target * g.columns + first;
    for (int64_t c = 0; c < columns; c += W)
      store_from_float(grad + c, load(total + c) * factor, columns - c);
  });
}

constexpr EmbeddingKernels kEmbeddingKernels = {look_up, kColumnBlock, sum};

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
