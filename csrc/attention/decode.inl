// SPDX-License-Identifier: BSD-3-Clause
// Forward for few queries and many keys (Dao et al., "Flash-Decoding", 2023): keys and values are read once,
// where they lie, and split so that one long sequence keeps every core busy. A split has the same keys
// whatever the batch and the number of threads, so the result does not depend on them.
#pragma once
#include <type_traits>

#include "attention/forward.inl"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int64_t kSplit = 512;
// Keys at a time: K and V of it stay in a 48 KiB L1 for all the rows that share a key head.
constexpr int64_t kChunk = 64;
static_assert(kChunk % PANEL == 0 && kSplit % kChunk == 0, "a chunk is whole panels");

template <class F>
FASTATTN_INLINE void with_cache_dtype(Dtype dtype, const F& f) {
  if (dtype == Dtype::kInt8) return f(int8_t{});
  if (dtype == Dtype::kFloat8E4M3) return f(e4m3{});
  with_dtype(dtype, f);
}

int64_t query_rows(const AttentionProblem& p) { return p.heads / p.kv_heads * p.q_length; }

size_t decode_scratch(const AttentionProblem& p) {
  const int64_t stored = kChunk * (round_up(p.qk_dim, W) + round_up(p.v_dim, W));
  return static_cast<size_t>(
      (query_rows(p) * (round_up(p.qk_dim, W) + kChunk) + stored + 4 * p.q_length) * 4 + 6 * 64);
}

// Where the kChunk keys from `key` lie, of which those in `seen` are seen by a query. The others are not
// read: in their place, with a weight of 0, is one that is.
template <class T>
FASTATTN_INLINE void find_rows(const AttentionCache& cache, const Rows& x, int64_t batch, int64_t kv_head,
                               int64_t key, Range seen, const T** found) {
  const T* base = static_cast<const T*>(x.data) + kv_head * x.head;
  for (int64_t at = seen.first; at < seen.end;) {
    const int64_t column = at / cache.page_size;
    const int64_t page = cache.table ? cache.table[batch * cache.table_columns + column] : batch;
    const T* row = base + page * x.batch + at % cache.page_size * x.row;
    for (const int64_t stop = min(seen.end, (column + 1) * cache.page_size); at < stop; ++at, row += x.row)
      found[at - key] = row;
  }
  const T* const any = found[seen.first - key];
  for (int64_t i = 0; i < seen.first - key; ++i) found[i] = any;
  for (int64_t i = seen.end - key; i < kChunk; ++i) found[i] = any;
}

FASTATTN_INLINE void prefetch(const void* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(row) + i);
}

// rows[kChunk][dim] in float32, and pointers to them.
template <class T>
FASTATTN_INLINE void widen_rows(const T* const* rows, int64_t dim, float* to, const float** found) {
  const int64_t stride = round_up(dim, W);
  for (int64_t i = 0; i < kChunk; ++i, to += stride) {
    for (int64_t d = 0; d < dim; d += W) store(to + d, load_as_float(rows[i] + d, dim - d));
    found[i] = to;
  }
}

// scores[W] = q · k of W rows of keys. A key at a time: W pointers at once do not fit the registers.
FASTATTN_INLINE vf dots(const float* q, const float* const* k, int64_t dim) {
  vf acc[W] = {};
  const auto add = [&](int64_t d, auto vectors, int64_t n) {
    constexpr int N = decltype(vectors)::value;
    vf x[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) x[j] = load(q + d + j * W);
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) {
      const float* row = k[i] + d;
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) acc[i] += x[j] * (n >= N * W ? load(row + j * W) : load_as_float(row, n));
    }
  };
  int64_t d = 0;
  for (; d + 4 * W <= dim; d += 4 * W) add(d, std::integral_constant<int, 4>{}, dim - d);
  for (; d < dim; d += W) add(d, std::integral_constant<int, 1>{}, dim - d);
  return join_lanes(acc, [](vf a, vf b) { return a + b; });
}

// out[dim] = decay · out + weights[count] · v[count][dim], count even; two sums, as one would wait for
// itself.
FASTATTN_INLINE void weigh(const float* weights, const float* const* v, int64_t count, int64_t dim,
                           float decay, float* out) {
  const auto columns = [&](int64_t d, auto vectors, int64_t n) {
    constexpr int N = decltype(vectors)::value;
    vf even[N], odd[N] = {};
    const auto add = [&](vf(&sum)[N], int64_t j) {
      const vf x = broadcast(weights[j]);
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i)
        sum[i] += x * (n >= N * W ? load(v[j] + d + i * W) : load_as_float(v[j] + d, n));
    };
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) even[i] = load(out + d + i * W) * decay;
    for (int64_t j = 0; j < count; j += 2) add(even, j), add(odd, j + 1);
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) store(out + d + i * W, even[i] + odd[i]);
  };
  int64_t d = 0;
  for (; d + 4 * W <= dim; d += 4 * W) columns(d, std::integral_constant<int, 4>{}, dim - d);
  for (; d < dim; d += W) columns(d, std::integral_constant<int, 1>{}, dim - d);
}

void decode(const AttentionProblem& p, const AttentionCache& cache, int64_t batch, int64_t kv_head,
            int64_t split, char* scratch) {
  const int64_t rows = query_rows(p), q_stride = round_up(p.qk_dim, W);
  const int64_t first_head = kv_head * (p.heads / p.kv_heads);
  Scratch space{scratch};
  float* q = space.floats(rows * q_stride);
  float* weights = space.floats(rows * kChunk);
  float* wide_k = space.floats(kChunk * q_stride);
  float* wide_v = space.floats(kChunk * round_up(p.v_dim, W));
  Panels* found_of = reinterpret_cast<Panels*>(space.floats(4 * p.q_length));
  const auto head_of = [&](int64_t r) { return first_head + r / p.q_length; };
  const auto partial = [&](int64_t r) {
    const int64_t at = ((batch * p.heads + head_of(r)) * p.q_length + r % p.q_length) * cache.splits + split;
    return cache.partial + at * cache.partial_stride;
  };
  const float scale = p.scale * kLog2e * (cache.k_scale ? cache.k_scale[batch * p.kv_heads + kv_head] : 1.0f);
  const int64_t v_stride = cache.partial_stride - 2;  // maximum and sum are behind out
  for (int64_t r = 0; r < rows; ++r) {
    with_dtype(p.dtype, [&](auto type) {
      using T = decltype(type);
      const T* from = row<T>(p.q, batch, head_of(r), r % p.q_length);
      for (int64_t d = 0; d < p.qk_dim; d += W)
        store(q + r * q_stride + d, load_as_float(from + d, p.qk_dim - d) * scale);
    });
    memset(partial(r), 0, static_cast<size_t>(cache.partial_stride) * 4);
    partial(r)[v_stride] = -kInf;
  }

  const Range needed = meet(seen(p, batch, 0, p.q_length), {split * kSplit, (split + 1) * kSplit});
  with_cache_dtype(cache.dtype, [&](auto type) {
    using T = decltype(type);
    constexpr bool wide = std::is_same_v<T, float>;
    const int64_t k_bytes = p.qk_dim * static_cast<int64_t>(sizeof(T)),
                  v_bytes = p.v_dim * static_cast<int64_t>(sizeof(T));
    const T *stored_k[2][kChunk], *stored_v[2][kChunk];  // of this chunk and the next
    const float *widened_k[kChunk], *widened_v[kChunk];
    const auto find = [&](int64_t key) {
      const Range chunk = meet(needed, {key, key + kChunk});
      find_rows(cache, p.k, batch, kv_head, key, chunk, stored_k[key / kChunk % 2]);
      find_rows(cache, p.v, batch, kv_head, key, chunk, stored_v[key / kChunk % 2]);
    };
    const int64_t first = needed.first / kChunk * kChunk;
    if (first < needed.end) find(first);
    for (int64_t key = first; key < needed.end; key += kChunk) {
      const Range chunk = meet(needed, {key, key + kChunk});
      const bool more = key + kChunk < needed.end;
      if (more) find(key + kChunk);
      const int64_t now = key / kChunk % 2, soon = more ? 1 - now : now;
      const float *const *k = widened_k, *const *v = widened_v;
      if constexpr (wide) {
        k = stored_k[now], v = stored_v[now];
      } else {
        widen_rows(stored_k[now], p.qk_dim, wide_k, widened_k);
        widen_rows(stored_v[now], p.v_dim, wide_v, widened_v);
      }
      for (int64_t c = 0; c < kChunk; c += W) {
        if (key + c + W <= chunk.first || key + c >= chunk.end) continue;
        for (int i = 0; i < W; ++i) {
          prefetch(stored_k[soon][c + i], k_bytes);
          prefetch(stored_v[wide ? now : soon][c + i], v_bytes);
        }
        for (int64_t r = 0; r < rows; ++r)
          store(weights + r * kChunk + c, dots(q + r * q_stride, k + c, p.qk_dim));
      }
      for (int64_t r = 0; r < rows; ++r) {
        const int64_t head = head_of(r), query = r % p.q_length;
        float *row_weights = weights + r * kChunk, *out = partial(r), &m = out[v_stride],
              &l = out[v_stride + 1];
        // Heads differ in blocks and mask alone.
        if (r < p.q_length || p.blocks.data || p.mask.data)
          found_of[query] = panels(p, batch, head, query, 1, key, kChunk);
        const Panels found = found_of[query];
        if (!found.some) continue;
        vf peak = broadcast(-kInf);
        if (changed(p) || found.some != found.all)
          with_dtype(p.bias.data ? p.bias_dtype : Dtype::kFloat32, [&](auto bias) {
            constrain_row(p, batch, head, query, key, found, row_weights, peak, nullptr, bias);
          });
        for_runs(found.some, [&](int64_t c, int64_t end) {
          for (; c < end; c += W) peak = max(load(row_weights + c), peak);
        });
        float top = m;
        for (int i = 0; i < W; ++i) top = peak[i] > top ? peak[i] : top;
        const float shift = top == -kInf ? 0.0f : top, decay = exp2(broadcast(m - shift))[0];
        vf sum{};
        for_runs(found.some, [&](int64_t c, int64_t end) {
          for (; c < end; c += W) {
            const vf x = exp2(load(row_weights + c) - shift);
            sum += x;
            store(row_weights + c, x);
          }
        });
        m = top;
        l = l * decay + horizontal_sum(sum);
        float next = decay;
        for_runs(found.some, [&](int64_t c, int64_t end) {
          weigh(row_weights + c, v + c, end - c, p.v_dim, next, out);
          next = 1.0f;
        });
      }
    }
  });
}

void decode_merge(const AttentionProblem& p, const AttentionCache& cache, int64_t batch, int64_t head) {
  const int64_t v_stride = cache.partial_stride - 2;
  const float sink = p.sinks ? p.sinks[batch * p.sinks_batch + head] * kLog2e : -kInf;
  const float scale =
      cache.v_scale ? cache.v_scale[batch * p.kv_heads + head / (p.heads / p.kv_heads)] : 1.0f;
  for (int64_t query = 0; query < p.q_length; ++query) {
    const int64_t at = (batch * p.heads + head) * p.q_length + query;
    const float* parts = cache.partial + at * cache.splits * cache.partial_stride;
    float top = sink;
    for (int64_t s = 0; s < cache.splits; ++s) {
      const float m = parts[s * cache.partial_stride + v_stride];
      top = m > top ? m : top;
    }
    const float shift = top == -kInf ? 0.0f : top;
    float sum = exp2(broadcast(sink - shift))[0];
    const auto weight = [&](int64_t s) {
      return exp2(broadcast(parts[s * cache.partial_stride + v_stride] - shift))[0];
    };
    for (int64_t s = 0; s < cache.splits; ++s)
      sum += weight(s) * parts[s * cache.partial_stride + v_stride + 1];
    const bool empty = sum == 0.0f;
    with_dtype(p.dtype, [&](auto type) {
      using T = decltype(type);
      T* to = row<T>(p.out, batch, head, query);
      for (int64_t d = 0; d < p.v_dim; d += W) {
        vf x{};
        for (int64_t s = 0; s < cache.splits; ++s)
          x += load(parts + s * cache.partial_stride + d) * weight(s);
        store_from_float(to + d, x * (empty ? 0.0f : scale / sum), p.v_dim - d);
      }
    });
    p.lse[at] = empty ? -kInf : top * kLn2 + __builtin_logf(sum);
  }
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
