// SPDX-License-Identifier: BSD-3-Clause
// With y = (z - mean) · rstd and g = dout · weight:
//   dz = rstd · (g - mean(g) - y · mean(g · y)) + what comes from elsewhere, mean(g) left out in an RMS norm,
//   dweight = Σ dout · y, dbias = Σ dout over the rows, dresidual = dz, dx = dz where kept / (1 - p).
// A few rows together: the partial sums of dweight and dbias are read and written once for all of them.
#include "layer_norm/forward.inl"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int kTogether = W >= 16 ? 4 : 2;

template <class T, class Z>
struct GradientRow {
  const T* dout;
  const Z* z;
  float mean, rstd;

  GradientRow() = default;
  GradientRow(const NormProblem& p, int64_t r)
      : dout(row_of<const T>(p.dout, r)),
        z(row_of<const Z>(p.z, r)),
        mean(p.mean ? p.mean[r] : 0.0f),
        rstd(p.rstd[r]) {}

  FASTATTN_INLINE vf normalized(int64_t c, int64_t n) const {
    return (load_as_float(z + c, n) - mean) * rstd;
  }
  FASTATTN_INLINE vf g(const float* weight, int64_t c, int64_t n) const {
    const vf g = load_as_float(dout + c, n);
    return weight ? g * load_as_float(weight + c, n) : g;
  }
};

// Rows r … r + ROWS: adds to dweight and dbias of the chunk, and finds the means of g and of g · y.
template <int ROWS, class T, class Z>
FASTATTN_INLINE void sums_of_rows(const NormProblem& p, const GradientRow<T, Z> (&rows)[ROWS], float* dweight,
                                  float* dbias, float (&mean_g)[ROWS], float (&mean_gy)[ROWS]) {
  vf sum_g[ROWS] = {}, sum_gy[ROWS] = {};
  const float* weight = p.weight;
  const auto step = [&](int64_t c, int64_t n) {
    const vf w = weight ? load_as_float(weight + c, n) : broadcast(1.0f);
    vf dw{}, db{};
#pragma GCC unroll 4
    for (int i = 0; i < ROWS; ++i) {
      // Past the row's end dout is 0, and so is all that is summed.
      const vf dout = load_as_float(rows[i].dout + c, n), y = rows[i].normalized(c, n), g = dout * w;
      sum_g[i] += g;
      sum_gy[i] += g * y;
      dw += dout * y;
      db += dout;
    }
    if (dweight) store_from_float(dweight + c, load_as_float(dweight + c, n) + dw, n);
    if (dbias) store_from_float(dbias + c, load_as_float(dbias + c, n) + db, n);
  };
  int64_t c = 0;
  for (; c + W <= p.columns; c += W) step(c, W);
  if (c < p.columns) step(c, p.columns - c);
  const float columns = static_cast<float>(p.columns);
  for (int i = 0; i < ROWS; ++i) {
    mean_g[i] = p.mean ? horizontal_sum(sum_g[i]) / columns : 0.0f;
    mean_gy[i] = horizontal_sum(sum_gy[i]) / columns;
  }
}

// dz of row r, dropout's mask on what of it is dx. The row `ahead` is that of the next ones.
template <class T, class Z>
FASTATTN_INLINE void gradient_of_row(const NormProblem& p, int64_t r, int64_t ahead,
                                     const GradientRow<T, Z>& row, float mean_g, float mean_gy,
                                     uint32_t* numbers) {
  const Ahead<T> next_dout(p.dout, ahead, p.rows);
  const Ahead<Z> next_z(p.z, ahead, p.rows), next_dz(p.dz, ahead, p.rows);
  const Z* more = row_of<const Z>(p.dz, r);
  T* dx = row_of<T>(p.dx, r);
  Z* dresidual = row_of<Z>(p.dresidual, r);
  const float* weight = p.weight;
  const Dropout dropout(p, r, numbers);
  each_vector(p.columns, [&](int64_t c, int64_t n, int) {
    next_dout.fetch(c), next_z.fetch(c), next_dz.fetch(c);
    vf dz = (row.g(weight, c, n) - mean_g - row.normalized(c, n) * mean_gy) * row.rstd;
    if (more) dz += load_as_float(more + c, n);
    if (dresidual) store_from_float(dresidual + c, dz, n);
    if (dx) store_from_float(dx + c, dropout(dz, c), n);
  });
}

template <int ROWS, class T, class Z>
void backward_together(const NormProblem& p, int64_t r, float* dweight, float* dbias, uint32_t* numbers) {
  GradientRow<T, Z> rows[ROWS];
  for (int i = 0; i < ROWS; ++i) rows[i] = GradientRow<T, Z>(p, r + i);
  float mean_g[ROWS], mean_gy[ROWS];
  sums_of_rows<ROWS>(p, rows, dweight, dbias, mean_g, mean_gy);
  if (!p.dx.data && !p.dresidual.data) return;
  for (int i = 0; i < ROWS; ++i)
    gradient_of_row(p, r + i, r + ROWS + i, rows[i], mean_g[i], mean_gy[i], numbers);
}

template <class T, class Z>
void backward_rows(const NormProblem& p, int64_t chunk, int64_t first, int64_t end, uint32_t* numbers) {
  const auto partial = [&](float* sums) {
    if (!sums) return sums;
    sums += chunk * p.columns;
    memset(sums, 0, static_cast<size_t>(p.columns) * sizeof(float));
    return sums;
  };
  float *dweight = partial(p.partial_weight), *dbias = partial(p.partial_bias);
  int64_t r = first;
  for (; r + kTogether <= end; r += kTogether)
    backward_together<kTogether, T, Z>(p, r, dweight, dbias, numbers);
  for (; r < end; ++r) backward_together<1, T, Z>(p, r, dweight, dbias, numbers);
}

void norm_backward(const NormProblem& p, int64_t chunk, int64_t first, int64_t end, uint32_t* numbers) {
  with_elements(p, [&]<class T, class Z>(T, Z) { backward_rows<T, Z>(p, chunk, first, end, numbers); });
}

void add_up(const float* partial, int64_t chunks, int64_t columns, int64_t first, int64_t end, float* out) {
  for (int64_t c = first; c < end; c += W) {
    const int64_t n = end - c;
    vf sum{};
    for (int64_t i = 0; i < chunks; ++i) sum += load_as_float(partial + i * columns + c, n);
    store_from_float(out + c, sum, n);
  }
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
