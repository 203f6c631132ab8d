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

// out[i] = the lanes of rows[i] joined.
template <class Join>
FASTATTN_INLINE void reduce_rows(const vf (&rows)[ROWS_UP], float (&out)[ROWS_UP], const Join& join) {
  for (int first = 0; first < ROWS; first += W) {
    vf some[W];
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) some[i] = rows[first + i];
    store(out + first, join_lanes(some, join));
  }
}

// For the strip's rows: m' = max(m, peak), decay = 2^(m - m'), p = 2^(scores - m'), l = decay · l + Σ p; then
// p is zeroed where dropout says so (l is not: dropout acts on normalised probabilities).
template <bool DROP>
FASTATTN_INLINE void softmax_strip(const AttentionProblem& p, int64_t batch, int64_t head, int64_t query,
                                   int64_t key, uint64_t found, float* scores, const vf (&peak)[ROWS_UP],
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
    float* x = scores + i * LD;
    for_runs(found, [&](int64_t first, int64_t end) {
      if constexpr (DROP) {
        for_kept(p, batch, head, query + i, key, first, end, [&](int64_t c, vi kept) {
          const vf prob = exp2(load(x + c) - shift[i]);
          sum0 += prob;
          store(x + c, select(kept, prob, vf{}));
        });
      } else {
        for (int64_t c = first; c < end; c += PANEL) {
          const vf p0 = exp2(load(x + c) - shift[i]), p1 = exp2(load(x + c + W) - shift[i]);
          sum0 += p0;
          sum1 += p1;
          store(x + c, p0);
          store(x + c + W, p1);
        }
      }
    });
    sum[i] = sum0 + sum1;
  }
  float total[ROWS_UP];
  reduce_rows(sum, total, [](vf a, vf b) { return a + b; });
  for (int i = 0; i < ROWS; ++i) l[i] = l[i] * decay[i] + total[i];
}

// A sink is one more score: m' = max(m, sink), l' = l 2^(m - m') + 2^(sink - m'), and out goes down with l.
void add_sink(float sink, int64_t rows, float* out, int64_t stride, float* m, float* l) {
  for (int64_t r = 0; r < rows; ++r) {
    const float top = m[r] > sink ? m[r] : sink, shift = top == -kInf ? 0.0f : top;
    const float decay = exp2(broadcast(m[r] - shift))[0];
    l[r] = l[r] * decay + exp2(broadcast(sink - shift))[0];
    m[r] = top;
    for (int64_t d = 0; d < stride; d += W) store(out + r * stride + d, load(out + r * stride + d) * decay);
  }
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
    pack_rows(row<T>(p.q, batch, head, first), p.q.row, 0, rows, padded, p.qk_dim, p.scale * kLog2e, q);
  });
  memset(out, 0, static_cast<size_t>(padded * v_stride) * 4);
  for (int64_t i = 0; i < padded; ++i) m[i] = -kInf, l[i] = 0.0f;

  const Range needed = seen(p, batch, first, rows);
  for (int64_t key = needed.first / block * block; key < needed.end; key += block) {
    const int64_t keys = min(block, needed.end - key), keys_padded = round_up(keys, PANEL);
    bool packed = false;
    for (int64_t r = 0; r < rows; r += ROWS) {
      const int64_t query = first + r;
      const Panels found = panels(p, batch, head, query, min(ROWS, rows - r), key, keys);
      if (!found.some) continue;
      if (!packed) {
        packed = true;
        // Keys that no row sees are zeros here: what lies in their memory may be NaN, and 0 · NaN is not 0.
        const int64_t skip = max(needed.first - key, 0);
        with_dtype(p.dtype, [&](auto type) {
          using T = decltype(type);
          pack_transposed(row<T>(p.k, batch, kv_head, key), p.k.row, skip, keys, keys_padded, p.qk_dim, kt);
          pack_rows(row<T>(p.v, batch, kv_head, key), p.v.row, skip, keys, keys_padded, p.v_dim, 1.0f, v);
        });
      }
      score_strip(p, batch, head, query, key, found, panel_rows(q, padded, r), kt, scores, peak, nullptr);
      if (p.drop_threshold)
        softmax_strip<true>(p, batch, head, query, key, found.some, scores, peak, m + r, l + r, decay);
      else
        softmax_strip<false>(p, batch, head, query, key, found.some, scores, peak, m + r, l + r, decay);
      // out = decay · out + p v
      bool decayed = false;
      for_runs(found.some, [&](int64_t c, int64_t end) {
        const Left<LD, 1> left{scores + c, end - c, 0};
        float* to = out + r * v_stride;
        if (decayed)
          accumulate<false>(to, v_stride, left, v + c * PANEL, keys_padded * PANEL, end - c, p.v_dim, decay);
        else
          accumulate<true>(to, v_stride, left, v + c * PANEL, keys_padded * PANEL, end - c, p.v_dim, decay);
        decayed = true;
      });
    }
  }
  if (p.sinks) add_sink(p.sinks[batch * p.sinks_batch + head] * kLog2e, rows, out, v_stride, m, l);

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
