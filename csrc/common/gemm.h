// SPDX-License-Identifier: BSD-3-Clause
// Register-tiled matrix products on packed float32 panels, and the packing.
//
// A translation unit sets FASTATTN_ROWS, the height of the register tile: ROWS x PANEL accumulators must fit
// the register file (6 x 16 in 16 AVX2 registers, 12 x 32 in 32 AVX-512 registers).
#pragma once
#include "common/vec.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int ROWS = FASTATTN_ROWS;
constexpr int PANEL = 2 * W;

FASTATTN_INLINE int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
FASTATTN_INLINE int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
FASTATTN_INLINE int64_t round_up(int64_t a, int64_t b) { return (a + b - 1) / b * b; }

// x[count][dim] as panels: out[dim / PANEL][padded][PANEL], times `factor`; zeros before `first`, and behind
// count and dim.
template <class T>
void pack_rows(const T* x, int64_t stride, int64_t first, int64_t count, int64_t padded, int64_t dim,
               float factor, float* out) {
  for (int64_t d = 0; d < dim; d += PANEL, out += padded * PANEL) {
    memset(out, 0, static_cast<size_t>(first * PANEL) * sizeof(float));
    for (int64_t r = first; r < count; ++r) {
      const T* from = x + r * stride + d;
      store(out + r * PANEL, load_as_float(from, dim - d) * factor);
      store(out + r * PANEL + W, d + W < dim ? load_as_float(from + W, dim - d - W) * factor : vf{});
    }
    memset(out + count * PANEL, 0, static_cast<size_t>((padded - count) * PANEL) * sizeof(float));
  }
}

// x[count][dim] transposed, as panels: out[padded / PANEL][dim][PANEL]; zeros before `first` and behind
// count.
template <class T>
void pack_transposed(const T* x, int64_t stride, int64_t first, int64_t count, int64_t padded, int64_t dim,
                     float* out) {
  for (int64_t r0 = 0; r0 < padded; r0 += W) {
    float* to = out + r0 / PANEL * dim * PANEL + r0 % PANEL;
    for (int64_t d = 0; d < dim; d += W) {
      vf tile[W];
      for (int i = 0; i < W; ++i)
        tile[i] =
            r0 + i >= first && r0 + i < count ? load_as_float(x + (r0 + i) * stride + d, dim - d) : vf{};
      transpose(tile);
      const int64_t n = min(W, dim - d);
      for (int64_t i = 0; i < n; ++i) store(to + (d + i) * PANEL, tile[i]);
    }
  }
}

// The left factor of a product, ROWS rows of it: element (i, k) is data[i · ROW + k · STEP], in segments of
// `segment` k's, each `next` floats behind the last.
template <int ROW, int STEP>
struct Left {
  const float* data;
  int64_t segment, next;
};
// Rows of pack_rows' panels.
FASTATTN_INLINE Left<PANEL, 1> panel_rows(const float* panels, int64_t padded, int64_t row) {
  return {panels + row * PANEL, PANEL, padded * PANEL};
}

// acc[ROWS][N·W] = left[ROWS][depth] · right[depth][PANEL], the first N·W columns.
template <int N, int ROW, int STEP>
FASTATTN_INLINE void multiply(vf (&acc)[ROWS][N], Left<ROW, STEP> left, const float* right, int64_t depth) {
#pragma GCC unroll 16
  for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
    for (int n = 0; n < N; ++n) acc[i][n] = vf{};
  for (int64_t k0 = 0; k0 < depth; k0 += left.segment) {
    const float* a = left.data;
    const int64_t end = min(left.segment, depth - k0);
#pragma GCC unroll 2
    for (int64_t k = 0; k < end; ++k) {
      vf b[N];
#pragma GCC unroll 2
      for (int n = 0; n < N; ++n) b[n] = load(right + n * W);
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; ++i) {
        const vf x = broadcast(a[i * ROW]);
#pragma GCC unroll 2
        for (int n = 0; n < N; ++n) acc[i][n] += x * b[n];
      }
      a += STEP;
      right += PANEL;
    }
    left.data += left.next;
  }
}

// out[ROWS][columns] += left · right for all panels of `right`, which are `panel_stride` floats apart; row i
// of `out` is first multiplied by decay[i] where that is given.
template <bool DECAY, int ROW, int STEP>
FASTATTN_INLINE void accumulate(float* out, int64_t out_stride, Left<ROW, STEP> left, const float* right,
                                int64_t panel_stride, int64_t depth, int64_t columns, const float* decay) {
  const auto add = [&](auto& acc, float* to) {
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i)
#pragma GCC unroll 2
      for (int n = 0; n < static_cast<int>(sizeof acc[0] / sizeof(vf)); ++n) {
        float* at = to + i * out_stride + n * W;
        store(at, DECAY ? load(at) * decay[i] + acc[i][n] : load(at) + acc[i][n]);
      }
  };
  for (int64_t c = 0; c < columns; c += PANEL, right += panel_stride) {
    if (columns - c > W) {
      vf acc[ROWS][2];
      multiply(acc, left, right, depth);
      add(acc, out + c);
    } else {
      vf acc[ROWS][1];
      multiply(acc, left, right, depth);
      add(acc, out + c);
    }
  }
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
