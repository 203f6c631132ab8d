// SPDX-License-Identifier: BSD-3-Clause
// Backward (Dao, FlashAttention-2, algorithm 2). With X = scale · q kᵀ, S = softcap(X) + bias, P = exp(S -
// lse), Z = dropout's mask:
//   dv = (P Z)ᵀ dout      dP = Z (dout vᵀ)      dS = P (dP - delta)      delta = rowsum(dout · out) - dlse
//   dX = softcap'(X) dS   dq = scale · dX k     dk = scale · dXᵀ q
//   dbias = dS            dsink = - sum over rows of exp(sink - lse) delta
#pragma once
#include <sched.h>

#include <cstddef>
#include <type_traits>

#include "attention/tile.inl"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int64_t kQueryBlock = 8 * ROWS;
static_assert(kMaxKeyBlock + ROWS <= LD, "the last strip of keys reads up to ROWS columns behind the block");

// A block of keys, packed for the products it is a factor of.
struct KeyBlock {
  int64_t batch, kv_head, first, count, padded;
  float *kt, *vt;  // transposed panels
  float* k;        // row panels
};

// A tile of P Z and dS (dX where that is asked for), kQueryBlock rows of LD, and the queries behind it.
struct Tile {
  float *p, *ds;
  float *q, *dout;  // row panels of kQueryBlock rows; q is scaled by scale · log2(e)
  float* slope;     // softcap' of a strip
  float log2_sum[kQueryBlock], delta[kQueryBlock];
  // Computed panels of each strip. Its others are 0; a strip without any is not written.
  Panels found[kQueryBlock / ROWS];
};

int64_t key_block_floats(const AttentionProblem& p) {
  const int64_t block = key_block(p);
  return block * (p.qk_dim + p.v_dim + round_up(p.qk_dim, PANEL));
}
int64_t tile_floats(const AttentionProblem& p) {
  return (2 * kQueryBlock + ROWS) * LD + kQueryBlock * (round_up(p.qk_dim, PANEL) + round_up(p.v_dim, PANEL));
}
size_t backward_scratch(const AttentionProblem& p) {
  const int64_t rows = key_block(p) + ROWS;
  const int64_t sums = rows * (round_up(p.qk_dim, PANEL) + round_up(p.v_dim, PANEL));
  return static_cast<size_t>((key_block_floats(p) + tile_floats(p) + sums) * 4 + 16 * 64);
}

KeyBlock pack_keys(const AttentionProblem& p, const AttentionGradients& g, int64_t batch, int64_t kv_head,
                   int64_t block, Scratch& space) {
  KeyBlock b{batch, kv_head, block * key_block(p), 0, 0, nullptr, nullptr, nullptr};
  b.count = min(key_block(p), p.k_length - b.first);
  b.padded = round_up(b.count, PANEL);
  // Keys that no row sees are zeros here: what lies in their memory may be NaN, and 0 · NaN is not 0.
  const Range any = meet({g.seen_keys[2 * batch], g.seen_keys[2 * batch + 1]}, {b.first, b.first + b.count});
  const int64_t real = max(any.end - b.first, 0), skip = min(max(any.first - b.first, 0), real);
  b.kt = space.floats(b.padded * p.qk_dim);
  b.vt = space.floats(b.padded * p.v_dim);
  b.k = space.floats(b.padded * round_up(p.qk_dim, PANEL));
  with_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    const T *k = row<T>(p.k, batch, kv_head, b.first), *v = row<T>(p.v, batch, kv_head, b.first);
    pack_transposed(k, p.k.row, skip, real, b.padded, p.qk_dim, b.kt);
    pack_transposed(v, p.v.row, skip, real, b.padded, p.v_dim, b.vt);
    pack_rows(k, p.k.row, skip, real, b.padded, p.qk_dim, 1.0f, b.k);
  });
  return b;
}

Tile new_tile(const AttentionProblem& p, Scratch& space) {
  Tile t;
  t.p = space.floats(kQueryBlock * LD);
  t.ds = space.floats(kQueryBlock * LD);
  t.q = space.floats(kQueryBlock * round_up(p.qk_dim, PANEL));
  t.dout = space.floats(kQueryBlock * round_up(p.v_dim, PANEL));
  t.slope = space.floats(ROWS * LD);
  return t;
}

// For the panels of one row that were found: p = 2^(p - log2_sum) and ds = p (ds - delta), times `slope`
// where that is given, with dropout acting on p and ds as it did forward.
template <bool DROP, bool SLOPE>
FASTATTN_INLINE void gradient_row(const AttentionProblem& p, int64_t batch, int64_t head, int64_t query,
                                  int64_t key, uint64_t found, float log2_sum, float delta,
                                  const float* slope, float* pz, float* ds) {
  const float keep = 65536.0f / static_cast<float>(65536 - p.drop_threshold);
  const auto gradient = [&](int64_t c, auto kept) {
    constexpr bool drop = !std::is_same_v<decltype(kept), std::nullptr_t>;
    // A probability is at most 1, however lse was rounded (it is large where a bias is).
    const vf below = load(pz + c) - log2_sum, prob = exp2(select(below > 0.0f, vf{}, below));
    vf dp = load(ds + c), kept_prob = prob;
    if constexpr (drop) {
      kept_prob = select(kept, prob, vf{});
      dp = select(kept, dp * keep, vf{});
    }
    vf x = prob * (dp - delta);
    if constexpr (SLOPE) x *= load(slope + c);
    store(pz + c, kept_prob);
    store(ds + c, x);
  };
  for_runs(found, [&](int64_t first, int64_t end) {
    if constexpr (DROP)
      for_kept(p, batch, head, query, key, first, end, gradient);
    else
      for (int64_t c = first; c < end; c += W) gradient(c, nullptr);
  });
}

// Zeros in the panels of a strip's rows that were not found, and behind them up to `width`.
FASTATTN_INLINE void clear(uint64_t found, int64_t padded, int64_t width, float* rows) {
  const int64_t panels = padded / PANEL;
  const uint64_t there = panels < 64 ? (uint64_t{1} << panels) - 1 : ~uint64_t{0};
  for (int i = 0; i < ROWS; ++i, rows += LD) {
    for_runs(there & ~found, [&](int64_t first, int64_t end) {
      memset(rows + first, 0, static_cast<size_t>(end - first) * 4);
    });
    memset(rows + padded, 0, static_cast<size_t>(width - padded) * 4);
  }
}

// Fills `t` for the queries from `query`, with dX if `inner` and dS if not; false if every strip of it is
// masked throughout.
bool compute_tile(const AttentionProblem& p, const AttentionGradients& g, const KeyBlock& b, int64_t head,
                  int64_t query, bool inner, Tile& t) {
  const int64_t rows = min(kQueryBlock, p.q_length - query), batch = b.batch;
  bool any = false;
  for (int64_t r = 0; r < kQueryBlock; r += ROWS) {
    const bool there = r < rows;
    t.found[r / ROWS] =
        there ? panels(p, batch, head, query + r, min(ROWS, rows - r), b.first, b.count) : Panels{0, 0};
    any |= t.found[r / ROWS].some != 0;
  }
  if (!any) return false;

  with_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    pack_rows(row<T>(p.q, batch, head, query), p.q.row, 0, rows, kQueryBlock, p.qk_dim, p.scale * kLog2e,
              t.q);
    pack_rows(row<T>(g.dout, batch, head, query), g.dout.row, 0, rows, kQueryBlock, p.v_dim, 1.0f, t.dout);
  });
  const int64_t base = (batch * p.heads + head) * p.q_length + query;
  for (int64_t r = 0; r < kQueryBlock; ++r) {
    t.log2_sum[r] = r < rows ? g.log2_sum[base + r] : kInf;
    t.delta[r] = r < rows ? g.delta[base + r] : 0.0f;
    if (r < rows && t.log2_sum[r] == kInf) {
      // A row with nothing to attend to is zeros, whatever is in its memory: its products with 0 reach all
      // keys.
      for (int64_t d = 0; d < p.qk_dim; d += PANEL) memset(t.q + d * kQueryBlock + r * PANEL, 0, PANEL * 4);
      for (int64_t d = 0; d < p.v_dim; d += PANEL) memset(t.dout + d * kQueryBlock + r * PANEL, 0, PANEL * 4);
    }
  }

  const int64_t width = b.padded + ROWS;
  for (int64_t r = 0; r < kQueryBlock; r += ROWS) {
    float *pz = t.p + r * LD, *ds = t.ds + r * LD;
    const uint64_t found = t.found[r / ROWS].some;
    if (!found) continue;
    clear(found, b.padded, width, pz);
    clear(found, b.padded, width, ds);
    vf peak[ROWS];
    float* slope = inner && p.softcap != 0.0f ? t.slope : nullptr;
    score_strip(p, batch, head, query + r, b.first, t.found[r / ROWS], panel_rows(t.q, kQueryBlock, r), b.kt,
                pz, peak, slope);
    for_runs(found, [&](int64_t first, int64_t end) {  // dP = dout vᵀ
      for (int64_t c = first; c < end; c += PANEL) {
        vf acc[ROWS][2];
        multiply(acc, panel_rows(t.dout, kQueryBlock, r), b.vt + c * p.v_dim, p.v_dim);
#pragma GCC unroll 16
        for (int i = 0; i < ROWS; ++i) {
          store(ds + i * LD + c, acc[i][0]);
          store(ds + i * LD + c + W, acc[i][1]);
        }
      }
    });
    const auto gradient = [&](auto drop, auto sloped) {
      for (int i = 0; i < ROWS; ++i)
        gradient_row<drop, sloped>(p, batch, head, query + r + i, b.first, found, t.log2_sum[r + i],
                                   t.delta[r + i], t.slope + i * LD, pz + i * LD, ds + i * LD);
    };
    const std::true_type yes;
    const std::false_type no;
    if (p.drop_threshold)
      slope ? gradient(yes, yes) : gradient(yes, no);
    else
      slope ? gradient(no, yes) : gradient(no, no);
  }
  return true;
}

void backward_rows(const AttentionProblem& p, const AttentionGradients& g, int64_t batch, int64_t head) {
  const int64_t base = (batch * p.heads + head) * p.q_length;
  with_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t r = 0; r < p.q_length; ++r) {
      const T *out = row<T>(p.out, batch, head, r), *dout = row<T>(g.dout, batch, head, r);
      vf sum{};
      for (int64_t d = 0; d < p.v_dim; d += W)
        sum += load_as_float(out + d, p.v_dim - d) * load_as_float(dout + d, p.v_dim - d);
      const float lse = p.lse[base + r];
      // An empty row's gradients are 0 whatever reaches its lse of -inf.
      const bool empty = lse == -kInf;
      g.delta[base + r] = empty ? 0.0f : horizontal_sum(sum) - (g.dlse ? g.dlse[base + r] : 0.0f);
      g.log2_sum[base + r] = empty ? kInf : lse * kLog2e;
    }
  });
  if (!g.dsinks) return;
  const float sink = p.sinks[batch * p.sinks_batch + head] * kLog2e;
  double sum = 0.0;
  for (int64_t r = 0; r < p.q_length; ++r)
    sum -= static_cast<double>(exp2(broadcast(sink - g.log2_sum[base + r]))[0] * g.delta[base + r]);
  g.dsinks[batch * p.heads + head] = static_cast<float>(sum);
}

void backward_seen(const AttentionProblem& p, const AttentionGradients& g, int64_t batch) {
  const int64_t query_blocks = (p.q_length + kQueryBlock - 1) / kQueryBlock, size = key_block(p);
  Range any{p.k_length, 0};
  for (int64_t i = 0; i < query_blocks; ++i) {
    const int64_t query = i * kQueryBlock;
    const Range keys = seen(p, batch, query, min(kQueryBlock, p.q_length - query));
    const bool none = keys.first >= keys.end;
    if (!none) any = {min(any.first, keys.first), max(any.end, keys.end)};
    int64_t* blocks = g.seen_blocks + (batch * query_blocks + i) * 2;
    blocks[0] = none ? 0 : keys.first / size;
    blocks[1] = none ? 0 : (keys.end + size - 1) / size;
  }
  g.seen_keys[2 * batch] = any.first;
  g.seen_keys[2 * batch + 1] = any.end;
}

// Keeps the order of the sum: waits until `before` blocks of keys have added theirs.
FASTATTN_INLINE void await_turn(const int32_t* turn, int64_t before) {
  for (int spins = 0; __atomic_load_n(turn, __ATOMIC_ACQUIRE) != before; ++spins) {
    if (spins > 1000) sched_yield();
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
}

// Panels that hold the ROWS columns from `column`.
FASTATTN_INLINE uint64_t panels_of(int64_t column) {
  return uint64_t{1} << column / PANEL | uint64_t{1} << min((column + ROWS - 1) / PANEL, 63);
}

// dbias of a bias that does not broadcast: dS, 0 where it is masked throughout.
void copy_bias_tile(const AttentionProblem& p, const AttentionGradients& g, const KeyBlock& b, int64_t head,
                    int64_t query, const Tile* t) {
  float* to = g.dbias + ((b.batch * p.heads + head) * p.q_length + query) * p.k_length + b.first;
  const int64_t rows = min(kQueryBlock, p.q_length - query);
  for (int64_t r = 0; r < rows; ++r, to += p.k_length)
    if (t && t->found[r / ROWS].some)
      memcpy(to, t->ds + r * LD, static_cast<size_t>(b.count) * 4);
    else
      memset(to, 0, static_cast<size_t>(b.count) * 4);
}

void backward_keys(const AttentionProblem& p, const AttentionGradients& g, int64_t batch, int64_t kv_head,
                   int64_t block, char* scratch) {
  Scratch space{scratch};
  const KeyBlock b = pack_keys(p, g, batch, kv_head, block, space);
  Tile t = new_tile(p, space);
  const int64_t qk_stride = round_up(p.qk_dim, PANEL), v_stride = round_up(p.v_dim, PANEL);
  const int64_t key_rows = b.count + ROWS, query_blocks = (p.q_length + kQueryBlock - 1) / kQueryBlock;
  float* dk = space.floats(key_rows * qk_stride);
  float* dv = space.floats(key_rows * v_stride);
  memset(dk, 0, static_cast<size_t>(key_rows * qk_stride) * 4);
  memset(dv, 0, static_cast<size_t>(key_rows * v_stride) * 4);

  const int64_t group = p.heads / p.kv_heads;
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    for (int64_t i = 0; i < query_blocks; ++i) {
      const int64_t query = i * kQueryBlock;
      const int64_t* blocks = g.seen_blocks + (batch * query_blocks + i) * 2;
      const bool seen = blocks[0] <= block && block < blocks[1];
      const bool any = seen && compute_tile(p, g, b, head, query, true, t);
      if (g.dbias) copy_bias_tile(p, g, b, head, query, any ? &t : nullptr);
      if (!seen) continue;
      uint64_t found = 0;
      for (int64_t r = 0; any && r < kQueryBlock; r += ROWS) found |= t.found[r / ROWS].some;
      for_runs(found, [&](int64_t first, int64_t stop) {
        for (int64_t c = first; c < min(stop, b.count); c += ROWS) {
          const uint64_t own = panels_of(c);
          for (int64_t r = 0, end; r < kQueryBlock; r = end) {  // each run of strips that see these keys
            end = r;
            while (end < kQueryBlock && t.found[end / ROWS].some & own) end += ROWS;
            if (r == end) {
              end += ROWS;
              continue;
            }
            const int64_t depth = end - r;
            const Left<1, LD> pz{t.p + r * LD + c, depth, 0}, ds{t.ds + r * LD + c, depth, 0};
            accumulate<false>(dv + c * v_stride, v_stride, pz, t.dout + r * PANEL, kQueryBlock * PANEL, depth,
                              p.v_dim, nullptr);
            accumulate<false>(dk + c * qk_stride, qk_stride, ds, t.q + r * PANEL, kQueryBlock * PANEL, depth,
                              p.qk_dim, nullptr);
          }
        }
      });
      int32_t* turn = g.turn + (batch * p.heads + head) * query_blocks + i;
      float* dq = g.dq_sum + ((batch * p.heads + head) * g.dq_rows + query) * g.dq_stride;
      await_turn(turn, block - blocks[0]);
      for (int64_t r = 0; any && r < kQueryBlock; r += ROWS)
        for_runs(t.found[r / ROWS].some, [&](int64_t first, int64_t end) {
          accumulate<false>(dq + r * g.dq_stride, g.dq_stride,
                            Left<LD, 1>{t.ds + r * LD + first, end - first, 0}, b.k + first * PANEL,
                            b.padded * PANEL, end - first, p.qk_dim, nullptr);
        });
      __atomic_store_n(turn, static_cast<int32_t>(block - blocks[0] + 1), __ATOMIC_RELEASE);
    }
  }

  const float keep = 65536.0f / static_cast<float>(65536 - p.drop_threshold);
  with_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t j = 0; j < b.count; ++j) {
      T *to_k = row<T>(g.dk, batch, kv_head, b.first + j), *to_v = row<T>(g.dv, batch, kv_head, b.first + j);
      for (int64_t d = 0; d < p.qk_dim; d += W)  // q was packed with scale · log2(e)
        store_from_float(to_k + d, load(dk + j * qk_stride + d) * kLn2, p.qk_dim - d);
      for (int64_t d = 0; d < p.v_dim; d += W)
        store_from_float(to_v + d, load(dv + j * v_stride + d) * keep, p.v_dim - d);
    }
  });
}

void backward_queries(const AttentionProblem& p, const AttentionGradients& g, int64_t batch, int64_t head) {
  const float* sum = g.dq_sum + (batch * p.heads + head) * g.dq_rows * g.dq_stride;
  with_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    for (int64_t r = 0; r < p.q_length; ++r) {
      T* to = row<T>(g.dq, batch, head, r);
      for (int64_t d = 0; d < p.qk_dim; d += W)
        store_from_float(to + d, load(sum + r * g.dq_stride + d) * p.scale, p.qk_dim - d);
    }
  });
}

// Calls f(batch, head, block of keys, first query, rows, tile) for the tiles of dS of these batches, heads
// and blocks of keys that are not masked throughout, in this order.
template <class F>
void for_tiles(const AttentionProblem& p, const AttentionGradients& g, Range batches, Range heads,
               Range blocks, char* scratch, const F& f) {
  const int64_t query_blocks = (p.q_length + kQueryBlock - 1) / kQueryBlock;
  for (int64_t batch = batches.first; batch < batches.end; ++batch)
    for (int64_t head = heads.first; head < heads.end; ++head)
      for (int64_t block = blocks.first; block < blocks.end; ++block) {
        Scratch space{scratch};
        const KeyBlock b = pack_keys(p, g, batch, head / (p.heads / p.kv_heads), block, space);
        Tile t = new_tile(p, space);
        for (int64_t i = 0; i < query_blocks; ++i) {
          const int64_t query = i * kQueryBlock;
          const int64_t* seen = g.seen_blocks + (batch * query_blocks + i) * 2;
          if (block < seen[0] || block >= seen[1]) continue;
          if (compute_tile(p, g, b, head, query, false, t))
            f(batch, head, b, query, min(kQueryBlock, p.q_length - query), t);
        }
      }
}
FASTATTN_INLINE Range one_or_all(int64_t i, int64_t given, int64_t all) {
  return given == 1 ? Range{0, all} : Range{i, i + 1};
}

// dbias is summed over what it broadcasts over, in the order of batch, head, query; the block's keys are its
// own.
void backward_bias(const AttentionProblem& p, const AttentionGradients& g, int64_t bias_batch,
                   int64_t bias_head, int64_t block, char* scratch) {
  const bool one_row = g.bias_rows == 1, one_column = g.bias_columns == 1;
  const int64_t size = key_block(p), blocks = (p.k_length + size - 1) / size;
  const int64_t first_column = one_column ? 0 : block * size;
  const int64_t columns = one_column ? 1 : min(size, p.k_length - first_column);
  float* dbias =
      g.dbias + (bias_batch * g.bias_heads + bias_head) * g.bias_rows * g.bias_columns + first_column;
  for (int64_t r = 0; r < g.bias_rows; ++r)
    memset(dbias + r * g.bias_columns, 0, static_cast<size_t>(columns) * 4);

  for_tiles(p, g, one_or_all(bias_batch, g.bias_batch, p.batch), one_or_all(bias_head, g.bias_heads, p.heads),
            one_column ? Range{0, blocks} : Range{block, block + 1}, scratch,
            [&](int64_t, int64_t, const KeyBlock& b, int64_t query, int64_t rows, const Tile& t) {
              // Sums over rows and columns are taken a tile at a time: long sums of small terms lose digits.
              float part[LD] = {};
              for (int64_t r = 0; r < rows; ++r) {
                if (!t.found[r / ROWS].some) continue;
                const float* ds = t.ds + r * LD;
                float* to = one_row ? part : dbias + (query + r) * g.bias_columns;
                if (one_column) {
                  float sum = 0.0f;
                  for (int64_t c = 0; c < b.count; ++c) sum += ds[c];
                  *to += sum;
                } else {
                  for (int64_t c = 0; c < b.count; ++c) to[c] += ds[c];
                }
              }
              for (int64_t c = 0; one_row && c < columns; ++c) dbias[c] += part[c];
            });
}

// Each row of dS is added where its keys' distances are.
void backward_relative(const AttentionProblem& p, const AttentionGradients& g, int64_t relative_batch,
                       int64_t relative_head, char* scratch) {
  const int64_t size = key_block(p), blocks = (p.k_length + size - 1) / size;
  float* drelative = g.drelative + (relative_batch * g.relative_heads + relative_head) * g.relative_size;
  memset(drelative, 0, static_cast<size_t>(g.relative_size) * 4);
  for_tiles(p, g, one_or_all(relative_batch, g.relative_batches, p.batch),
            one_or_all(relative_head, g.relative_heads, p.heads), Range{0, blocks}, scratch,
            [&](int64_t batch, int64_t, const KeyBlock& b, int64_t query, int64_t rows, const Tile& t) {
              const auto at = [&](int64_t r) { return relative_row(p, batch, query + r) + b.first; };
              const auto add = [&](int64_t r, float* to) {
                if (!t.found[r / ROWS].some) return;
                for (int64_t c = 0; c < b.count; ++c) to[c] += t.ds[r * LD + c];
              };
              // As for dbias, a tile at a time, where its rows fall on neighbouring distances.
              float part[LD + kQueryBlock] = {};
              if (p.origin) {
                for (int64_t r = 0; r < rows; ++r) add(r, drelative + at(r));
              } else {
                for (int64_t r = 0; r < rows; ++r) add(r, part + rows - 1 - r);
                for (int64_t d = 0; d < b.count + rows - 1; ++d) drelative[at(rows - 1) + d] += part[d];
              }
            });
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
