// SPDX-License-Identifier: BSD-3-Clause
// Backward (Dao, FlashAttention-2, algorithm 2). With S = scale · q kᵀ + bias, P = exp(S - lse), Z =
// dropout's mask:
//   dv = (P Z)ᵀ dout      dP = Z (dout vᵀ)      dS = P (dP - delta)      delta = rowsum(dout · out) - dlse
//   dq = scale · dS k     dk = scale · dSᵀ q    dbias = dS
#pragma once
#include <sched.h>

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

// A tile of P Z and dS, kQueryBlock rows of LD, and the queries behind it.
struct Tile {
  float *p, *ds;
  float *q, *dout;  // row panels of kQueryBlock rows; q is scaled by scale · log2(e)
  float log2_sum[kQueryBlock], delta[kQueryBlock];
  int64_t columns[kQueryBlock / ROWS];  // computed columns of each strip; the rest is 0
};

int64_t key_block_floats(const AttentionProblem& p) {
  const int64_t block = key_block(p);
  return block * (p.qk_dim + p.v_dim + round_up(p.qk_dim, PANEL));
}
int64_t tile_floats(const AttentionProblem& p) {
  return 2 * kQueryBlock * LD + kQueryBlock * (round_up(p.qk_dim, PANEL) + round_up(p.v_dim, PANEL));
}
size_t backward_scratch(const AttentionProblem& p) {
  const int64_t rows = round_up(key_block(p), ROWS);
  const int64_t sums = rows * (round_up(p.qk_dim, PANEL) + round_up(p.v_dim, PANEL));
  return static_cast<size_t>((key_block_floats(p) + tile_floats(p) + sums) * 4 + 16 * 64);
}

KeyBlock pack_keys(const AttentionProblem& p, int64_t batch, int64_t kv_head, int64_t block, Scratch& space) {
  KeyBlock b{batch, kv_head, block * key_block(p), 0, 0, nullptr, nullptr, nullptr};
  b.count = min(key_block(p), p.k_length - b.first);
  b.padded = round_up(b.count, PANEL);
  // Padding keys are zeros here: what lies in their memory may be NaN, and 0 · NaN is not 0.
  const int64_t real = p.lengths ? min(max(p.lengths[batch] - b.first, 0), b.count) : b.count;
  b.kt = space.floats(b.padded * p.qk_dim);
  b.vt = space.floats(b.padded * p.v_dim);
  b.k = space.floats(b.padded * round_up(p.qk_dim, PANEL));
  with_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    const T *k = row<T>(p.k, batch, kv_head, b.first), *v = row<T>(p.v, batch, kv_head, b.first);
    pack_transposed(k, p.k.row, real, b.padded, p.qk_dim, b.kt);
    pack_transposed(v, p.v.row, real, b.padded, p.v_dim, b.vt);
    pack_rows(k, p.k.row, real, b.padded, p.qk_dim, 1.0f, b.k);
  });
  return b;
}

Tile new_tile(const AttentionProblem& p, Scratch& space) {
  Tile t;
  t.p = space.floats(kQueryBlock * LD);
  t.ds = space.floats(kQueryBlock * LD);
  t.q = space.floats(kQueryBlock * round_up(p.qk_dim, PANEL));
  t.dout = space.floats(kQueryBlock * round_up(p.v_dim, PANEL));
  return t;
}

// For one row: p = 2^(p - log2_sum) and ds = p (ds - delta), with dropout acting on p and ds as it did
// forward.
template <bool DROP>
FASTATTN_INLINE void gradient_row(const AttentionProblem& p, int64_t batch, int64_t head, int64_t query,
                                  int64_t key, int64_t columns, float log2_sum, float delta, float* pz,
                                  float* ds) {
  const float keep = 65536.0f / static_cast<float>(65536 - p.drop_threshold);
  uint32_t numbers[kPhiloxGroup];
  for (int64_t c = 0; c < columns; c += W) {
    // A probability is at most 1, however lse was rounded (it is large where a bias is).
    const vf below = load(pz + c) - log2_sum, prob = exp2(select(below > 0.0f, vf{}, below));
    vf dp = load(ds + c), kept_prob = prob;
    if constexpr (DROP) {
      if (c % kPhiloxGroup == 0)
        philox_group(p.seed, static_cast<uint32_t>(batch), static_cast<uint32_t>(head),
                     static_cast<uint32_t>(query), static_cast<uint32_t>((key + c) / kPhiloxGroup), numbers);
      const vi z = kept(numbers, c, p.drop_threshold);
      kept_prob = select(z, prob, vf{});
      dp = select(z, dp * keep, vf{});
    }
    store(pz + c, kept_prob);
    store(ds + c, prob * (dp - delta));
  }
}

// Fills `t` for the queries from `query`; false if every strip of it is masked throughout.
bool compute_tile(const AttentionProblem& p, const AttentionGradients& g, const KeyBlock& b, int64_t head,
                  int64_t query, Tile& t) {
  const int64_t rows = min(kQueryBlock, p.q_length - query), batch = b.batch;
  with_dtype(p.dtype, [&](auto type) {
    using T = decltype(type);
    pack_rows(row<T>(p.q, batch, head, query), p.q.row, rows, kQueryBlock, p.qk_dim, p.scale * kLog2e, t.q);
    pack_rows(row<T>(g.dout, batch, head, query), g.dout.row, rows, kQueryBlock, p.v_dim, 1.0f, t.dout);
  });
  const int64_t base = (batch * p.heads + head) * p.q_length + query;
  for (int64_t r = 0; r < kQueryBlock; ++r) {
    t.log2_sum[r] = r < rows ? g.log2_sum[base + r] : kInf;
    t.delta[r] = r < rows ? g.delta[base + r] : 0.0f;
  }

  bool any = false;
  const int64_t width = round_up(b.padded, ROWS);
  for (int64_t r = 0; r < kQueryBlock; r += ROWS) {
    float *pz = t.p + r * LD, *ds = t.ds + r * LD;
    vf peak[ROWS];
    const int64_t columns = r >= rows ? 0
                                      : score_strip(p, batch, head, query + r, min(ROWS, rows - r), b.first,
                                                    b.count, panel_rows(t.q, kQueryBlock, r), b.kt, pz, peak);
    t.columns[r / ROWS] = columns;
    any |= columns > 0;
    for (int64_t c = 0; c < columns; c += PANEL) {  // dP = dout vᵀ
      vf acc[ROWS][2];
      multiply(acc, panel_rows(t.dout, kQueryBlock, r), b.vt + c * p.v_dim, p.v_dim);
#pragma GCC unroll 16
      for (int i = 0; i < ROWS; ++i) {
        store(ds + i * LD + c, acc[i][0]);
        store(ds + i * LD + c + W, acc[i][1]);
      }
    }
    for (int i = 0; i < ROWS; ++i) {
      if (p.drop_threshold)
        gradient_row<true>(p, batch, head, query + r + i, b.first, columns, t.log2_sum[r + i], t.delta[r + i],
                           pz + i * LD, ds + i * LD);
      else
        gradient_row<false>(p, batch, head, query + r + i, b.first, columns, t.log2_sum[r + i],
                            t.delta[r + i], pz + i * LD, ds + i * LD);
      memset(pz + i * LD + columns, 0, static_cast<size_t>(width - columns) * 4);
      memset(ds + i * LD + columns, 0, static_cast<size_t>(width - columns) * 4);
    }
  }
  return any;
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
}

// Keeps the order of the sum: waits until the blocks of keys before `block` have added theirs.
FASTATTN_INLINE void await_turn(const int32_t* turn, int64_t block) {
  for (int spins = 0; __atomic_load_n(turn, __ATOMIC_ACQUIRE) != block; ++spins) {
    if (spins > 1000) sched_yield();
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
}

void backward_keys(const AttentionProblem& p, const AttentionGradients& g, int64_t batch, int64_t kv_head,
                   int64_t block, char* scratch) {
  Scratch space{scratch};
  const KeyBlock b = pack_keys(p, batch, kv_head, block, space);
  Tile t = new_tile(p, space);
  const int64_t qk_stride = round_up(p.qk_dim, PANEL), v_stride = round_up(p.v_dim, PANEL);
  const int64_t key_rows = round_up(b.count, ROWS),
                query_blocks = (p.q_length + kQueryBlock - 1) / kQueryBlock;
  float* dk = space.floats(key_rows * qk_stride);
  float* dv = space.floats(key_rows * v_stride);
  memset(dk, 0, static_cast<size_t>(key_rows * qk_stride) * 4);
  memset(dv, 0, static_cast<size_t>(key_rows * v_stride) * 4);

  const int64_t group = p.heads / p.kv_heads;
  for (int64_t head = kv_head * group; head < (kv_head + 1) * group; ++head) {
    for (int64_t i = 0; i < query_blocks; ++i) {
      const int64_t query = i * kQueryBlock, rows = min(kQueryBlock, p.q_length - query);
      if (key_limit(p, batch, query + rows - 1) <= b.first)
        continue;  // nor does a later block of keys reach it
      const bool any = compute_tile(p, g, b, head, query, t);
      for (int64_t c = 0; any && c < b.count; c += ROWS) {
        int64_t r = 0;  // strips before the first that sees these keys hold zeros
        while (r < kQueryBlock && t.columns[r / ROWS] <= c) r += ROWS;
        if (r == kQueryBlock) break;
        const int64_t depth = kQueryBlock - r;
        const Left<1, LD> pz{t.p + r * LD + c, depth, 0}, ds{t.ds + r * LD + c, depth, 0};
        const float *dout = t.dout + r * PANEL, *q = t.q + r * PANEL;
        accumulate<false>(dv + c * v_stride, v_stride, pz, dout, kQueryBlock * PANEL, depth, p.v_dim,
                          nullptr);
        accumulate<false>(dk + c * qk_stride, qk_stride, ds, q, kQueryBlock * PANEL, depth, p.qk_dim,
                          nullptr);
      }
      int32_t* turn = g.turn + (batch * p.heads + head) * query_blocks + i;
      float* dq = g.dq_sum + ((batch * p.heads + head) * g.dq_rows + query) * g.dq_stride;
      await_turn(turn, block);
      for (int64_t r = 0; any && r < kQueryBlock; r += ROWS) {
        const int64_t depth = t.columns[r / ROWS];
        if (depth == 0) continue;
        accumulate<false>(dq + r * g.dq_stride, g.dq_stride, Left<LD, 1>{t.ds + r * LD, depth, 0}, b.k,
                          b.padded * PANEL, depth, p.qk_dim, nullptr);
      }
      __atomic_store_n(turn, static_cast<int32_t>(block + 1), __ATOMIC_RELEASE);
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

// dbias is summed over what it broadcasts over, in the order of batch, head, query; the block's keys are its
// own.
void backward_bias(const AttentionProblem& p, const AttentionGradients& g, int64_t bias_batch,
                   int64_t bias_head, int64_t block, char* scratch) {
  const bool one_row = g.bias_rows == 1, one_column = g.bias_columns == 1;
  const int64_t size = key_block(p), blocks = (p.k_length + size - 1) / size;
  const int64_t first_block = one_column ? 0 : block, end_block = one_column ? blocks : block + 1;
  const int64_t first_column = one_column ? 0 : block * size;
  const int64_t columns = one_column ? 1 : min(size, p.k_length - first_column);
  float* dbias =
      g.dbias + (bias_batch * g.bias_heads + bias_head) * g.bias_rows * g.bias_columns + first_column;
  for (int64_t r = 0; r < g.bias_rows; ++r)
    memset(dbias + r * g.bias_columns, 0, static_cast<size_t>(columns) * 4);

  const int64_t first_batch = g.bias_batch == 1 ? 0 : bias_batch,
                first_head = g.bias_heads == 1 ? 0 : bias_head;
  const int64_t end_batch = g.bias_batch == 1 ? p.batch : bias_batch + 1;
  const int64_t end_head = g.bias_heads == 1 ? p.heads : bias_head + 1;
  for (int64_t batch = first_batch; batch < end_batch; ++batch)
    for (int64_t head = first_head; head < end_head; ++head)
      for (int64_t j = first_block; j < end_block; ++j) {
        Scratch space{scratch};
        const KeyBlock b = pack_keys(p, batch, head / (p.heads / p.kv_heads), j, space);
        Tile t = new_tile(p, space);
        for (int64_t query = 0; query < p.q_length; query += kQueryBlock) {
          const int64_t rows = min(kQueryBlock, p.q_length - query);
          if (key_limit(p, batch, query + rows - 1) <= b.first) continue;
          if (!compute_tile(p, g, b, head, query, t)) continue;
          // Sums over rows and columns are taken a tile at a time: long sums of small terms lose digits.
          float part[LD] = {};
          for (int64_t r = 0; r < rows; ++r) {
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
        }
      }
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
