// SPDX-License-Identifier: BSD-3-Clause
// C = epilogue(A · B): blocks of B packed for all threads, blocks of A packed by each, tiles of C in
// registers.
#include "common/activation.h"
#include "common/gemm.h"
#include "linear/problem.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int64_t kRowBlock =
    (84 + ROWS - 1) / ROWS * ROWS;    // with kDepthBlock 260 kB of A, in the second-level cache
constexpr int64_t kDepthBlock = 768;  // a panel of B of that depth is 48 kB on AVX2
constexpr int64_t kPackedFloats = int64_t{2} << 20;

FASTATTN_INLINE int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
// The size of the blocks when `total` is cut evenly into blocks of at most `most`, each a multiple of `unit`.
FASTATTN_INLINE int64_t even(int64_t total, int64_t most, int64_t unit) {
  const int64_t blocks = max(1, ceil_div(total, most));
  return max(unit, round_up(ceil_div(total, blocks), unit));
}

// C holds partial sums where it is of float32 and is not read as anything else.
bool sums_in_c(const GemmProblem& p) {
  return p.c.dtype == Dtype::kFloat32 && (p.epilogue == Epilogue::kStore || p.epilogue == Epilogue::kAdd);
}

GemmBlocks blocks(const GemmProblem& p, int64_t threads) {
  GemmBlocks x{};
  x.k_block = even(p.k, kDepthBlock, PANEL);
  x.n_block = even(p.n, max(PANEL, kPackedFloats / x.k_block / PANEL * PANEL), PANEL);
  x.m_block = even(p.m, kRowBlock, ROWS);
  // Four tasks or more for each thread, but no narrower than what makes the packing of A worth it.
  const int64_t row_blocks = max(1, ceil_div(p.m, x.m_block));
  const int64_t columns = max(8 * PANEL, x.n_block / max(1, ceil_div(4 * threads, row_blocks)));
  x.n_task = even(x.n_block, columns, PANEL);
  x.packed_bytes = static_cast<size_t>(x.k_block * x.n_block) * sizeof(float);
  x.scratch_bytes = static_cast<size_t>(x.m_block * x.k_block + 2 * W) * sizeof(float);
  const bool sums = x.k_block < p.k && !sums_in_c(p);
  x.sums_bytes = sums ? static_cast<size_t>(p.m * x.n_block) * sizeof(float) : 0;
  return x;
}

template <class F>
FASTATTN_INLINE void with_element(Dtype dtype, const F& f) {
  if (dtype == Dtype::kFloat32) return f(float{});
  if (dtype == Dtype::kBFloat16) return f(bf16{});
  f(f16{});
}

void pack(const GemmProblem& p, const GemmBlocks& x, int64_t j0, int64_t k0, int64_t first, float* packed) {
  const int64_t depth = min(x.k_block, p.k - k0), columns = min(PANEL, p.n - j0 - first);
  float* out = packed + first * x.k_block;
  with_element(p.b.dtype, [&]<class T>(T) {
    const T* b = static_cast<const T*>(p.b.data) + k0 * p.b.row + (j0 + first) * p.b.column;
    if (p.b.column == 1)
      pack_rows(b, p.b.row, 0, depth, depth, columns, 1.0f, out);
    else
      pack_transposed(b, p.b.column, 0, columns, PANEL, depth, out);
  });
}

// Tiles of A whose rows lie in memory one behind the other: out[count / ROWS][depth][ROWS], rows of zeros
// behind.
template <class T>
void pack_columns(const T* a, int64_t stride, int64_t count, int64_t depth, float* out) {
  static_assert(ROWS <= 2 * W);
  for (int64_t k = 0; k < depth; ++k, a += stride)
    for (int64_t i = 0; i < count; i += ROWS) {
      alignas(64) float rows[2 * W];
      store(rows, load_as_float(a + i, count - i));
      if (ROWS > W) store(rows + W, count - i > W ? load_as_float(a + i + W, count - i - W) : vf{});
      memcpy(out + i * depth + k * ROWS, rows, ROWS * sizeof(float));
    }
}

// A tile of S, complete, of `rows` and `columns`, at row i and column j.
template <class T, class F>
FASTATTN_INLINE void each_vector(const float* tile, int64_t rows, int64_t columns, const F& f) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; c += W) f(r, c, load(tile + r * PANEL + c), columns - c);
}

template <class T>
FASTATTN_INLINE T* at(const Matrix& x, int64_t i, int64_t j) {
  return static_cast<T*>(x.data) + i * x.row + j;
}

// T: the element of C, U, G, H and D.
template <class T, Activation A>
void finish(const GemmProblem& p, const float* tile, int64_t i, int64_t j, int64_t rows, int64_t columns) {
  each_vector<T>(tile, rows, columns, [&](int64_t r, int64_t c, vf s, int64_t n) {
    const int64_t row = i + r, column = j + c;
    const auto get = [&](const Matrix& x) { return load_as_float(at<const T>(x, row, column), n); };
    const auto put = [&](const Matrix& x, vf value) {
      if (x.data) store_from_float(at<T>(x, row, column), value, n);
    };
    switch (p.epilogue) {
      case Epilogue::kAdd:
        return put(p.c, get(p.c) + s);
      case Epilogue::kActivate:
        put(p.u, s);
        return put(p.c, activate<A>(s).value);
      case Epilogue::kGate:
        put(p.u, s);
        return put(p.c, activate<A>(get(p.gate)).value * s);
      case Epilogue::kSlope: {
        const Activated f = activate<A>(get(p.u));
        put(p.h, f.value);
        return put(p.c, s * f.slope);
      }
      case Epilogue::kGateSlope: {
        const Activated f = activate<A>(get(p.gate));
        const vf u = get(p.u);
        put(p.h, f.value * u);
        put(p.d, s * u * f.slope);
        return put(p.c, s * f.value);
      }
      default:
        return put(p.c, s);
    }
  });
}

template <class T>
void finish(const GemmProblem& p, const float* tile, int64_t i, int64_t j, int64_t rows, int64_t columns) {
  switch (static_cast<Activation>(p.activation)) {
    case Activation::kGelu:
      return finish<T, Activation::kGelu>(p, tile, i, j, rows, columns);
    case Activation::kGeluTanh:
      return finish<T, Activation::kGeluTanh>(p, tile, i, j, rows, columns);
    case Activation::kSilu:
      return finish<T, Activation::kSilu>(p, tile, i, j, rows, columns);
    case Activation::kRelu:
      return finish<T, Activation::kRelu>(p, tile, i, j, rows, columns);
    default:
      return finish<T, Activation::kReluSquared>(p, tile, i, j, rows, columns);
  }
}

// What the sums of a tile start from, and where they go.
struct Partial {
  float* sums;  // [m][stride]
  int64_t stride;
  bool first, last;
};

template <int ROW, int STEP>
FASTATTN_INLINE void tile_of_c(const GemmProblem& p, Left<ROW, STEP> left, const float* right, int64_t depth,
                               const Partial& part, int64_t i, int64_t j, int64_t in_block, int64_t rows,
                               int64_t columns) {
  alignas(64) float tile[ROWS * PANEL];
  vf acc[ROWS][2];
  multiply(acc, left, right, depth);
  vf bias[2]{};
  if (part.last && p.bias.data) {
    with_element(p.bias.dtype, [&]<class T>(T) {
      const T* from = static_cast<const T*>(p.bias.data) + j;
      bias[0] = load_as_float(from, columns);
      if (columns > W) bias[1] = load_as_float(from + W, columns - W);
    });
  }
#pragma GCC unroll 16
  for (int r = 0; r < ROWS; ++r)
#pragma GCC unroll 2
    for (int n = 0; n < 2; ++n) store(tile + r * PANEL + n * W, acc[r][n] + bias[n]);

  if (!part.first)
    each_vector<float>(tile, rows, columns, [&](int64_t r, int64_t c, vf s, int64_t n) {
      store(tile + r * PANEL + c, s + load_as_float(part.sums + (i + r) * part.stride + in_block + c, n));
    });
  if (!part.last)
    return each_vector<float>(tile, rows, columns, [&](int64_t r, int64_t c, vf s, int64_t n) {
      store_from_float(part.sums + (i + r) * part.stride + in_block + c, s, n);
    });
  with_element(p.c.dtype, [&]<class T>(T) { finish<T>(p, tile, i, j, rows, columns); });
}

void multiply(const GemmProblem& p, const GemmBlocks& x, int64_t i0, int64_t j0, int64_t j, int64_t k0,
              const float* packed, float* sums, void* scratch) {
  const int64_t depth = min(x.k_block, p.k - k0), count = min(x.m_block, p.m - i0);
  const int64_t padded = round_up(count, ROWS), end = min(j + x.n_task, min(x.n_block, p.n - j0));
  float* a_packed = static_cast<float*>(scratch);
  const bool by_rows = p.a.column == 1;
  with_element(p.a.dtype, [&]<class T>(T) {
    const T* a = static_cast<const T*>(p.a.data) + i0 * p.a.row + k0 * p.a.column;
    if (by_rows)
      pack_rows(a, p.a.row, 0, count, padded, depth, 1.0f, a_packed);
    else
      pack_columns(a, p.a.column, count, depth, a_packed);
  });

  Partial part{sums, x.n_block, k0 == 0, k0 + depth >= p.k};
  if (sums_in_c(p)) {
    // C += S adds each block of S as it comes.
    part = {at<float>(p.c, 0, j0), p.c.row, k0 == 0 || p.epilogue == Epilogue::kAdd, part.last};
    if (p.epilogue == Epilogue::kAdd) part.last = true;
  }
  for (; j < end; j += PANEL) {
    const float* right = packed + j * x.k_block;
    const int64_t columns = min(PANEL, p.n - j0 - j);
    for (int64_t i = 0; i < count; i += ROWS) {
      const int64_t rows = min(ROWS, count - i);
      if (by_rows)
        tile_of_c(p, panel_rows(a_packed, padded, i), right, depth, part, i0 + i, j0 + j, j, rows, columns);
      else
        tile_of_c(p, Left<1, ROWS>{a_packed + i * depth, depth, 0}, right, depth, part, i0 + i, j0 + j, j,
                  rows, columns);
    }
  }
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
