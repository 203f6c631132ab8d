// SPDX-License-Identifier: BSD-3-Clause
// What forward and backward share: which keys a row may see, and a strip of scores under mask and bias.
#pragma once
#include "attention/problem.h"
#include "common/gemm.h"
#include "common/philox.h"

namespace fastattn::FASTATTN_ISA {
namespace {

typedef uint8_t vb __attribute__((vector_size(W)));
typedef uint8_t vb_any __attribute__((vector_size(W), aligned(1), may_alias));

constexpr float kLog2e = 1.44269504088896340736f;
constexpr float kMaxFloat = 3.4028234664e38f;
constexpr float kLn2 = 0.69314718055994530942f;

constexpr int64_t kMaxKeyBlock = 256;
// Row stride of a tile of scores. The 16 floats more keep a column's elements off the same cache sets.
constexpr int LD = kMaxKeyBlock + 16;

// Keys taken together: a multiple of kPhiloxGroup, such that the packed K and V blocks stay in a 512 KiB L2.
int64_t key_block(const AttentionProblem& p) { return max(p.qk_dim, p.v_dim) <= 64 ? 256 : 128; }

template <class F>
FASTATTN_INLINE void with_dtype(Dtype dtype, const F& f) {
  if (dtype == Dtype::kFloat32) return f(float{});
  if (dtype == Dtype::kBFloat16) return f(bf16{});
  return f(f16{});
}
template <class T>
FASTATTN_INLINE T* row(const Rows& x, int64_t batch, int64_t head, int64_t r) {
  return static_cast<T*>(x.data) + batch * x.batch + head * x.head + r * x.row;
}

struct Scratch {
  char* at;
  float* floats(int64_t count) {
    float* p = reinterpret_cast<float*>(at);
    at += round_up(count * 4, 64);
    return p;
  }
};

// Row `query` sees keys below this by the diagonal and the lengths; it does not decrease with `query`.
FASTATTN_INLINE int64_t key_limit(const AttentionProblem& p, int64_t batch, int64_t query) {
  int64_t limit = p.k_length;
  if (p.lengths) limit = min(limit, p.lengths[batch]);
  if (p.diagonal & 1) limit = min(limit, query + 1);
  if (p.diagonal & 2) limit = min(limit, query + 1 + p.k_length - p.q_length);
  return max(limit, 0);
}

template <class T>
FASTATTN_INLINE const T* at(const Scores& x, int64_t batch, int64_t head, int64_t query, int64_t key) {
  return static_cast<const T*>(x.data) + batch * x.batch + head * x.head + query * x.row + key * x.column;
}

enum class Cover { kNone, kSome, kAll };

// Whether the dense mask keeps none, some or all of rows x columns.
Cover cover(const AttentionProblem& p, int64_t batch, int64_t head, int64_t query, int64_t rows, int64_t key,
            int64_t columns) {
  const Scores& m = p.mask;
  if (!m.data) return Cover::kAll;
  uint8_t any = 0, all = 1;
  if (m.row == 0) rows = 1;
  if (m.column == 0) columns = 1;
  for (int64_t i = 0; i < rows; ++i) {
    const uint8_t* x = at<uint8_t>(m, batch, head, query + i, key);
    if (m.column == 1) {
      for (int64_t c = 0; c < columns; ++c) any |= x[c], all &= x[c];
    } else {
      for (int64_t c = 0; c < columns; ++c) any |= x[c * m.column], all &= x[c * m.column];
    }
  }
  return all ? Cover::kAll : any ? Cover::kSome : Cover::kNone;
}

// W neighbouring elements of a row, of which n are there.
template <class T>
FASTATTN_INLINE vf load_scores(const T* x, int64_t column_stride, int64_t n) {
  if (column_stride == 1) return load_as_float(x, n);
  T part[W] = {};
  for (int64_t i = 0; i < min(n, W); ++i) part[i] = x[i * column_stride];
  return load_as_float(part);
}
FASTATTN_INLINE vi load_mask(const uint8_t* x, int64_t column_stride, int64_t n) {
  if (column_stride == 1 && n >= W)
    return __builtin_convertvector(*reinterpret_cast<const vb_any*>(x), vi) != 0;
  uint8_t part[W] = {};
  for (int64_t i = 0; i < min(n, W); ++i) part[i] = x[i * column_stride];
  return __builtin_convertvector(*reinterpret_cast<const vb_any*>(part), vi) != 0;
}

// scores[ROWS][first … end) += bias, -inf where a key is masked; their maxima are joined into `peak`.
template <class Bias>
void constrain(const AttentionProblem& p, int64_t batch, int64_t head, int64_t query, int64_t key,
               bool masked, int64_t first, int64_t end, float* scores, vf* peak, Bias) {
  const vi lanes = lane_index();
  for (int i = 0; i < ROWS; ++i) {
    const int64_t q = min(query + i, p.q_length - 1);  // rows behind the last are computed and dropped
    const int64_t limit = key_limit(p, batch, q) - key;
    const int64_t there = p.k_length - key;
    for (int64_t c = first; c < end; c += W) {
      vf x = load(scores + i * LD + c);
      if (p.bias.data && c < there) {
        const vf b = load_scores(at<Bias>(p.bias, batch, head, q, key + c), p.bias.column, there - c);
        // The most negative finite bias stays finite in base 2: it is no mask.
        x += select(b == -kInf, b, max(broadcast(-kMaxFloat), b * kLog2e));
        x = select(b == -kInf, x, max(broadcast(-kMaxFloat), x));
      }
      if (masked && c < there) {
        const vi keep = load_mask(at<uint8_t>(p.mask, batch, head, q, key + c), p.mask.column, there - c);
        x = select(keep, x, broadcast(-kInf));
      }
      if (c + W > limit) x = select(lanes < static_cast<int32_t>(max(limit - c, 0)), x, broadcast(-kInf));
      store(scores + i * LD + c, x);
      peak[i] = max(x, peak[i]);
    }
  }
}

// Scores in base 2 of ROWS queries from `query` (of which `rows` are there) against the packed block of keys
// from `key` (of which `keys` are there): scores[ROWS][LD] = q · kt under mask and bias, their lanewise row
// maxima in `peak`. Returns how many columns were computed, a multiple of PANEL; 0 if the strip is masked
// throughout.
int64_t score_strip(const AttentionProblem& p, int64_t batch, int64_t head, int64_t query, int64_t rows,
                    int64_t key, int64_t keys, Left<PANEL, 1> q, const float* kt, float* scores, vf* peak) {
  const int64_t columns = min(key_limit(p, batch, query + rows - 1) - key, keys);
  if (columns <= 0) return 0;
  const Cover covered = cover(p, batch, head, query, rows, key, columns);
  if (covered == Cover::kNone) return 0;

  const bool dense = p.bias.data || covered == Cover::kSome;
  const int64_t full = dense ? 0 : min(max(key_limit(p, batch, query) - key, 0), keys) / PANEL * PANEL;
  const int64_t end = round_up(columns, PANEL);
  vf best[ROWS];
  for (int i = 0; i < ROWS; ++i) best[i] = broadcast(-kInf);
  for (int64_t c = 0; c < end; c += PANEL) {
    vf acc[ROWS][2];
    multiply(acc, q, kt + c * p.qk_dim, p.qk_dim);
#pragma GCC unroll 16
    for (int i = 0; i < ROWS; ++i) {
      store(scores + i * LD + c, acc[i][0]);
      store(scores + i * LD + c + W, acc[i][1]);
      if (c < full) best[i] = max(max(acc[i][0], acc[i][1]), best[i]);
    }
  }
  if (full < end) {
    const auto edge = [&](auto bias_type) {
      constrain(p, batch, head, query, key, covered == Cover::kSome, full, end, scores, best, bias_type);
    };
    with_dtype(p.bias.data ? p.bias_dtype : Dtype::kFloat32, edge);
  }
  for (int i = 0; i < ROWS; ++i) peak[i] = best[i];
  return end;
}

// All ones where the key of a lane is kept. `numbers` are those of the 128 keys from a multiple of 128.
FASTATTN_INLINE vi kept(const uint32_t* numbers, int64_t column, uint32_t threshold) {
  const vu x = *reinterpret_cast<const vu_any*>(numbers + column % kPhiloxGroup);
  return reinterpret_cast<vi>(x >= vu{} + threshold);
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
