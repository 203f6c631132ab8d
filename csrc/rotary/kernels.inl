// SPDX-License-Identifier: BSD-3-Clause
// A row at a time; one instruction set's table of kernels.
#include <cstring>

#include "common/vec.h"
#include "rotary/problem.h"

namespace fastattn::FASTATTN_ISA {
namespace {

// Rows of one head that a task takes: long runs through memory, whose angles the next head finds in the
// cache.
constexpr int64_t kRowBlock = 256;

template <class F>
FASTATTN_INLINE void with_dtype(Dtype dtype, const F& f) {
  if (dtype == Dtype::kFloat32) return f(float{});
  if (dtype == Dtype::kBFloat16) return f(bf16{});
  return f(f16{});
}

// f(i, n) for each W columns, n of them: a constant but for the last.
template <class F>
FASTATTN_INLINE void for_columns(int64_t columns, const F& f) {
  int64_t i = 0;
  for (; i + W <= columns; i += W) f(i, int64_t{W});
  if (i < columns) f(i, columns - i);
}

// (x1, x0, x3, x2, …)
template <int... I>
FASTATTN_INLINE vf swap_pairs(vf x, std::integer_sequence<int, I...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(x, x, (I ^ 1)...);
#else
  return __builtin_shuffle(x, vi{(I ^ 1)...});
#endif
}

// Pairs (i, half + i).
template <class T, class Table>
FASTATTN_INLINE void rotate_halves(const T* x, const Table* cos, const Table* sin, float sign, int64_t half,
                                   T* out) {
  for_columns(half, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    const vf a = load_as_float(x + i, n), b = load_as_float(x + half + i, n);
    const vf c = load_as_float(cos + i, n), s = load_as_float(sin + i, n) * sign;
    store_from_float(out + i, a * c - b * s, n);
    store_from_float(out + half + i, a * s + b * c, n);
  });
}

// Pairs (2i, 2i + 1): with each cosine twice and each sine as (-sin, sin) it is x cos + swapped(x) sin.
template <class T, class Table>
FASTATTN_INLINE void rotate_neighbours(const T* x, const Table* cos, const Table* sin, float sign,
                                       int64_t half, T* out) {
  constexpr auto lanes = std::make_integer_sequence<int, W>{};
  const auto turn = [&](int64_t at, int64_t n, vf c, vf s) __attribute__((always_inline)) {
    const vf a = load_as_float(x + at, n);
    store_from_float(out + at, a * c + swap_pairs(a, lanes) * s, n);
  };
  for_columns(half, [&](int64_t i, int64_t n) __attribute__((always_inline)) {
    const vf c = load_as_float(cos + i, n), s = load_as_float(sin + i, n) * sign;
    turn(2 * i, 2 * n, interleave_low(c, c, lanes), interleave_low(-s, s, lanes));
    if (2 * n > W) turn(2 * i + W, 2 * n - W, interleave_high(c, c, lanes), interleave_high(-s, s, lanes));
  });
}

template <class T, class Table>
void rotate_rows(const RotaryProblem& p, int64_t batch, int64_t head, int64_t first, int64_t end) {
  const T* x = static_cast<const T*>(p.x.data) + batch * p.x.batch + head * p.x.head;
  T* out = static_cast<T*>(p.out.data) + batch * p.out.batch + head * p.out.head;
  const float sign = p.inverse ? -1.0f : 1.0f;
  for (int64_t l = first; l < end; ++l) {
    const T* from = x + l * p.x.row;
    T* to = out + l * p.out.row;
    const int64_t position = p.positions ? p.positions[batch * p.position_batch + l] : p.start + l;
    int64_t turned = 0;
    if (position != kUnturned) {
      const Table* cos = static_cast<const Table*>(p.cos) + position * p.cos_row;
      const Table* sin = static_cast<const Table*>(p.sin) + position * p.sin_row;
      if (p.interleaved)
        rotate_neighbours(from, cos, sin, sign, p.half, to);
      else
        rotate_halves(from, cos, sin, sign, p.half, to);
      turned = 2 * p.half;
    }
    if (turned < p.dim) memcpy(to + turned, from + turned, static_cast<size_t>(p.dim - turned) * sizeof(T));
  }
}

void rotate(const RotaryProblem& p, int64_t batch, int64_t head, int64_t first) {
  const int64_t end = first + kRowBlock < p.length ? first + kRowBlock : p.length;
  with_dtype(p.dtype, [&]<class T>(T) {
    with_dtype(p.table_dtype, [&]<class Table>(Table) { rotate_rows<T, Table>(p, batch, head, first, end); });
  });
}

constexpr RotaryKernels kRotaryKernels = {kRowBlock, rotate};

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
