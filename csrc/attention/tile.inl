// SPDX-License-Identifier: BSD-3-Clause
// What forward and backward share: a strip of scores under softcap, bias and mask, and dropout.
#pragma once
#include "attention/cover.inl"
#include "common/philox.h"
#include "common/tanh.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr float kMaxFloat = 3.4028234664e38f;
constexpr float kLn2 = 0.69314718055994530942f;

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

// W neighbouring elements of a row, of which n are there.
template <class T>
FASTATTN_INLINE vf load_scores(const T* x, int64_t column_stride, int64_t n) {
  if (column_stride == 1) return load_as_float(x, n);
  T part[W] = {};
  for (int64_t i = 0; i < min(n, W); ++i) part[i] = x[i * column_stride];
  return load_as_float(part);
}
FASTATTN_INLINE vi load_mask(const uint8_t* x, int64_t column_stride, int64_t n) {
  if (column_stride == 1 && n >= W) return widen_bytes(reinterpret_cast<const int8_t*>(x)) != 0;
  int8_t part[W] = {};
  for (int64_t i = 0; i < min(n, W); ++i) part[i] = static_cast<int8_t>(x[i * column_stride]);
  return widen_bytes(part) != 0;
}

// The keys that one query sees among the W from `key`, of which `there` are there.
struct Seen {
  const AttentionProblem& p;
  int64_t batch, head, query;
  Range by_band;

  FASTATTN_INLINE Seen(const AttentionProblem& p, int64_t batch, int64_t head, int64_t query)
      : p(p), batch(batch), head(head), query(query), by_band(band(p, query)) {}

  FASTATTN_INLINE static vi within(Range x, int64_t key) {
    const vi lanes = lane_index();
    const auto bound = [&](int64_t b) { return static_cast<int32_t>(min(max(b - key, -1), W + 1)); };
    return (lanes >= bound(x.first)) & (lanes < bound(x.end));
  }
  FASTATTN_INLINE vi keep(int64_t key, int64_t there) const {
    vi keep = within(by_band, key);
    if (p.ranges.data) {
      vi any = vi{};
      for (int64_t i = 0; i < p.ranges.count; ++i) any |= within(pair(p.ranges, batch, i, query), key);
      keep &= any;
    }
    if (p.blocks.data && there > 0) {
      const uint8_t* blocks = at<uint8_t>(p.blocks, batch, head, query / p.block_q, 0);
      if (key / p.block_k == (key + W - 1) / p.block_k) {
        if (!blocks[key / p.block_k * p.blocks.column]) keep = vi{};
      } else {
        uint8_t part[W] = {};
        for (int64_t i = 0; i < min(there, W); ++i) part[i] = blocks[(key + i) / p.block_k * p.blocks.column];
        keep &= load_mask(part, 1, W);
      }
    }
    if (p.mask.data && there > 0)
      keep &= load_mask(at<uint8_t>(p.mask, batch, head, query, key), p.mask.column, there);
    return keep;
  }
};

FASTATTN_INLINE vf plus_bias(vf x, vf bias) {
  // The most negative finite bias stays finite in base 2: it is no mask.
  return select(bias == -kInf, bias, max(broadcast(-kMaxFloat), bias * kLog2e + x));
}

// Where among the biases by distance key 0 of one query is; its other keys follow.
FASTATTN_INLINE int64_t relative_row(const AttentionProblem& p, int64_t batch, int64_t query) {
  if (!p.origin) return p.q_length - query;
  return p.q_length + p.k_length - p.origin[batch * p.origin_batch + query];
}

// Whether every score is changed before the mask.
FASTATTN_INLINE bool changed(const AttentionProblem& p) {
  return p.bias.data || p.relative || p.softcap != 0.0f;
}

// scores += what is added to one row of them, in columns from `first` to before `end`.
template <class Bias>
FASTATTN_INLINE void add_biases(const AttentionProblem& p, int64_t batch, int64_t head, int64_t query,
                                int64_t key, int64_t first, int64_t end, float* scores, Bias) {
  const Bias* dense = p.bias.data ? at<Bias>(p.bias, batch, head, query, key) : nullptr;
  const float* relative = p.relative ? p.relative + batch * p.relative_batch + head * p.relative_head +
                                           relative_row(p, batch, query) + key
                                     : nullptr;
  const auto add = [&](const auto& bias) {
    for (int64_t c = first, there = p.k_length - key - first; c < end && there > 0; c += W, there -= W)
      store(scores + c, plus_bias(load(scores + c), bias(c, there)));
  };
  const auto load_dense = [&](int64_t c, int64_t there) {
    return load_scores(dense + c * p.bias.column, p.bias.column, there);
  };
  const auto load_relative = [&](int64_t c, int64_t there) { return load_as_float(relative + c, there); };
  if (dense && relative)
    add([&](int64_t c, int64_t there) { return load_dense(c, there) + load_relative(c, there); });
  else if (dense)
    add(load_dense);
  else
    add(load_relative);
}

// One row of scores, in the panels of `found`: softcap(scores) + bias, -inf where a key is masked; their
// maxima are joined into `peak`, and with softcap its derivative goes to `slope` where that is given.
template <class Bias>
FASTATTN_INLINE void constrain_row(const AttentionProblem& p, int64_t batch, int64_t head, int64_t query,
                                   int64_t key, Panels found, float* scores, vf& peak, float* slope,
                                   Bias bias) {
  const Seen seen(p, batch, head, query);
  const auto each = [](int64_t first, int64_t end, const auto& f) {
    for (int64_t c = first; c < end; c += W) f(c);
  };
  if (p.softcap != 0.0f)
    for_runs(found.some, [&](int64_t first, int64_t end) {
      const float inner = kLn2 / p.softcap, outer = p.softcap * kLog2e;  // scores are in base 2
      each(first, end, [&](int64_t c) {
        const vf t = tanh(load(scores + c) * inner);
        store(scores + c, t * outer);
        if (slope) store(slope + c, 1.0f - t * t);
      });
    });
  if (p.bias.data || p.relative)
    for_runs(found.some, [&](int64_t first, int64_t end) {
      add_biases(p, batch, head, query, key, first, end, scores, bias);
    });
  for_runs(found.some & ~found.all, [&](int64_t first, int64_t end) {
    each(first, end, [&](int64_t c) {
      const vi keep = seen.keep(key + c, p.k_length - key - c);
      store(scores + c, select(keep, load(scores + c), broadcast(-kInf)));
    });
  });
  for_runs(changed(p) ? found.some : found.some & ~found.all, [&](int64_t first, int64_t end) {
    each(first, end, [&](int64_t c) { peak = max(load(scores + c), peak); });
  });
}

// Scores in base 2 of ROWS queries from `query` against the packed block of keys from `key`: scores[ROWS][LD]
// = softcap(q · kt) + bias under the mask in the panels of `found`, their lanewise row maxima in `peak`.
void score_strip(const AttentionProblem& p, int64_t batch, int64_t head, int64_t query, int64_t key,
                 Panels found, Left<PANEL, 1> q, const float* kt, float* scores, vf* peak, float* slope) {
  const bool change = changed(p);
  vf best[ROWS];
  for (int i = 0; i < ROWS; ++i) best[i] = broadcast(-kInf);
  for_runs(found.some, [&](int64_t first, int64_t end) {
    for (int64_t c = first; c < end; c += PANEL) {
      vf acc[ROWS][2];
      multiply(acc, q, kt + c * p.qk_dim, p.qk_dim);
      const bool done = !change && found.all >> (c / PANEL) & 1;
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; ++i) {
        store(scores + i * LD + c, acc[i][0]);
        store(scores + i * LD + c + W, acc[i][1]);
        if (done) best[i] = max(max(acc[i][0], acc[i][1]), best[i]);
      }
    }
  });
  if (change || found.some != found.all)
    with_dtype(p.bias.data ? p.bias_dtype : Dtype::kFloat32, [&](auto bias) {
      for (int i = 0; i < ROWS; ++i)  // rows behind the last are computed and dropped
        constrain_row(p, batch, head, min(query + i, p.q_length - 1), key, found, scores + i * LD, best[i],
                      slope ? slope + i * LD : nullptr, bias);
    });
  for (int i = 0; i < ROWS; ++i) peak[i] = best[i];
}

// Calls f(c, kept) for every W columns from `first` to before `end` of the block of keys from `key`, with all
// ones in the lanes that dropout keeps for this query.
template <class F>
FASTATTN_INLINE void for_kept(const AttentionProblem& p, int64_t batch, int64_t head, int64_t query,
                              int64_t key, int64_t first, int64_t end, const F& f) {
  uint32_t numbers[2 * kPhiloxGroup];  // of two neighbouring groups, where keys do not start with a group
  for (int64_t c = first; c < end;) {
    const int64_t position = p.k_start + key + c, offset = position % kPhiloxGroup;
    for (int n = 0; n <= (position % W != 0); ++n)
      philox_group(p.seed, static_cast<uint32_t>(batch), static_cast<uint32_t>(head),
                   static_cast<uint32_t>(query + p.q_start),
                   static_cast<uint32_t>(position / kPhiloxGroup + n), numbers + n * kPhiloxGroup);
    const int64_t stop = min(end, c + round_up(kPhiloxGroup - offset, W));
    for (const uint32_t* at = numbers + offset; c < stop; c += W, at += W) {
      const vu x = *reinterpret_cast<const vu_any*>(at);
      f(c, reinterpret_cast<vi>(x >= vu{} + p.drop_threshold));
    }
  }
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
