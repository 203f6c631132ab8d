// SPDX-License-Identifier: BSD-3-Clause
// Forward: softmax(q kᵀ) v by blocks of keys, with a running maximum and sum (Dao, FlashAttention-2,
// algorithm 1).
#pragma once
#include "attention/tile.inl"

namespace fastattn::FASTATTN_ISA {
namespace {

size_t forward_scratch(const AttentionProblem& p, int64_t rows) {
  const int64_t padded = round_up(rows, ROWS), keys = key_block(p);
  const int64_t qk = round_up(p.qk_dim, PANEL), v = round_up(p.v_dim, PANEL);
  const int64_t floats = padded * (qk + v + 2) + keys * (p.qk_dim + v) + ROWS * (LD + W + 1);
  return static_cast<size_t>(floats * 4 + 16 * 64);
}

constexpr int ROWS_UP = (ROWS + W - 1) / W * W;

// out[i] = the lanes of rows[i] joined by `join`: a transpose makes it a sum of vectors, all rows at once.
template <class Join>
FASTATTN_INLINE void reduce_rows(const vf (&rows)[ROWS_UP], float (&out)[ROWS_UP], const Join& join) {
  for (int first = 0; first < ROWS; first += W) {
    vf tile[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) tile[i] = rows[first + i];
    transpose(tile);
#pragma GCC unroll 4
    for (int n = W / 2; n > 0; n /= 2)
#pragma GCC unroll 8
      for (int i = 0; i < n; ++i) tile[i] = join(tile[i], tile[i + n]);
    store(out + first, tile[0]);
  }
}

// For the strip's rows: m' = max(m, peak), decay = 2^(m - m'), p = 2^(scores - m'), l = decay · l + Σ p; then
// p is zeroed where dropout says so (l is not: dropout acts on normalised probabilities).
template <bool DROP>
FASTATTN_INLINE void softmax_strip(const AttentionProblem& p, int64_t batch, int64_t head, int64_t query,
                                   int64_t key, int64_t columns, float* scores, const vf (&peak)[ROWS_UP],
                                   float* m, float* l, float (&decay)[ROWS_UP]) {
  float best[ROWS_UP], before[ROWS_UP] = {}, shift[ROWS_UP];
  reduce_rows(peak, best, [](vf a, vf b) { return max(a, b); });
  memcpy(before, m, ROWS * sizeof(float));
  for (int i = 0; i < ROWS; i += W) {
    const vf now = max(load(best + i), load(before + i));
    const vf finite = select(now == -kInf, vf{}, now);
    store(best + i, now);
    store(shift + i, finite);
    store(decay + i, exp2(load(before + i) - finite));
  }
  memcpy(m, best, ROWS * sizeof(float));

  vf sum[ROWS_UP] = {};
  for (int i = 0; i < ROWS; ++i) {
    vf sum0{}, sum1{};
    uint32_t numbers[kPhiloxGroup];
    for (int64_t c = 0; c < columns; c += PANEL) {
      float* x = scores + i * LD + c;
      vf p0 = exp2(load(x) - shift[i]), p1 = exp2(load(x + W) - shift[i]);
      sum0 += p0;
      sum1 += p1;
      if constexpr (DROP) {
        if (c % kPhiloxGroup == 0)
          philox_group(p.seed, static_cast<uint32_t>(batch), static_cast<uint32_t>(head),
                       static_cast<uint32_t>(query + i), static_cast<uint32_t>((key + c) / kPhiloxGroup),
                       numbers);
        p0 = select(kept(numbers, c, p.drop_threshold), p0, vf{});
        p1 = select(kept(numbers, c + W, p.drop_threshold), p1, vf{});
      }
      store(x, p0);
      store(x + W, p1);
    }
    sum[i] = sum0 + sum1;
  }
  float total[ROWS_UP];
  reduce_rows(sum, total, [](vf a, vf b) { return a + b; });
  for (int i = 0; i < ROWS; ++i) l[i] = l[i] * decay[i] + total[i];
}

void forward(const AttentionProblem& p, int64_t batch, int64_t head, int64_t first, int64_t rows,
             char* scratch) {
  const int64_t kv_head = head / (p.heads / p.kv_heads), block = key_block(p);
  const int64_t padded = round_up(rows, ROWS), v_stride = round_up(p.v_dim, PANEL);
  Scratch space{scratch};
  float* q = space.floats(padded * round_up(p.qk_dim, PANEL));
  float* out = space.floats(padded * v_stride);
  float* kt = space.floats(block * p.qk_dim);
  float* v = space.floats(block * v_stride);
  float* scores = space.floats(ROWS * LD);
  float* m = space.floats(padded);
  float* l = space.floats(padded);
  float decay[ROWS_UP];
  vf peak[ROWS_UP] = {};

  with_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    pack_rows(row<T>(p.q, batch, head, first), p.q.row, rows, padded, p.qk_dim, p.scale * kLog2e, q);
  });
  memset(out, 0, static_cast<size_t>(padded * v_stride) * 4);
  for (int64_t i = 0; i < padded; ++i) m[i] = -kInf, l[i] = 0.0f;

  const int64_t end = key_limit(p, batch, first + rows - 1);
  for (int64_t key = 0; key < end; key += block) {
    const int64_t keys = min(block, end - key), keys_padded = round_up(keys, PANEL);
    with_dtype(p.dtype, [&](auto type) {
      using T = decltype(type);
      pack_transposed(row<T>(p.k, batch, kv_head, key), p.k.row, keys, keys_padded, p.qk_dim, kt);
      pack_rows(row<T>(p.v, batch, kv_head, key), p.v.row, keys, keys_padded, p.v_dim, 1.0f, v);
    });
    for (int64_t r = 0; r < rows; r += ROWS) {
      const int64_t query = first + r;
      const int64_t columns = score_strip(p, batch, head, query, min(ROWS, rows - r), key, keys,
                                          panel_rows(q, padded, r), kt, scores, peak);
      if (columns == 0) continue;
      if (p.drop_threshold)
        softmax_strip<true>(p, batch, head, query, key, columns, scores, peak, m + r, l + r, decay);
      else
        softmax_strip<false>(p, batch, head, query, key, columns, scores, peak, m + r, l + r, decay);
      // out = decay · out + p v
      accumulate<true>(out + r * v_stride, v_stride, Left<LD, 1>{scores, columns, 0}, v, keys_padded * PANEL,
                       columns, p.v_dim, decay);
    }
  }

  const float keep = 65536.0f / static_cast<float>(65536 - p.drop_threshold);
  float* lse = p.lse + (batch * p.heads + head) * p.q_length + first;
  with_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t r = 0; r < rows; ++r) {
      const bool empty = l[r] == 0.0f;
      const float factor = empty ? 0.0f : keep / l[r];
      T* to = row<T>(p.out, batch, head, first + r);
      for (int64_t d = 0; d < p.v_dim; d += W)
        store_from_float(to + d, load(out + r * v_stride + d) * factor, p.v_dim - d);
      lse[r] = empty ? -kInf : m[r] * kLn2 + __builtin_logf(l[r]);
    }
  });
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
