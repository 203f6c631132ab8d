// SPDX-License-Identifier: BSD-3-Clause
// From tensors to problems: checks, the choice of instruction set, and the split into tasks.
#include "attention/attention.h"

#include <torch/csrc/stable/library.h>

#include "attention/problem.h"
#include "common/tasks.h"
#include "common/tensors.h"

namespace fastattn {
namespace {

using torch::headeronly::ScalarType;

const AttentionKernels& kernels(int64_t isa) {
#if defined(__x86_64__)
  return kernels_of(isa, kAttentionScalar, kAttentionAvx2, kAttentionAvx512, kAttentionWide);
#else
  return kernels_of(isa, kAttentionScalar, kAttentionScalar, kAttentionScalar, kAttentionScalar);
#endif
}

// A cache may be stored in less than q's dtype.
Dtype cache_dtype_of(const Tensor& x) {
  if (x.scalar_type() == ScalarType::Char) return Dtype::kInt8;
  if (x.scalar_type() == ScalarType::Float8_e4m3fn) return Dtype::kFloat8E4M3;
  return dtype_of(x);
}

// `x`, a [B, H, L, D] of the shape of `like` and of q's dtype.
Rows rows(const Tensor& x, const Tensor& like, const Tensor& q) {
  STD_TORCH_CHECK(x.dim() == 4 && x.is_cpu(), "expected 4 dimensions on cpu");
  STD_TORCH_CHECK(x.scalar_type() == q.scalar_type(), "expected q's dtype");
  for (int64_t i = 0; i < 4; ++i)
    STD_TORCH_CHECK(x.size(i) == like.size(i), "dimension ", i, ": expected ", like.size(i), ", got ",
                    x.size(i));
  STD_TORCH_CHECK(x.stride(3) == 1 || x.size(3) == 1 || x.numel() == 0, "expected a unit last stride, got ",
                  x.stride(3));
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// More rows of queries to a key head than this are worth packing the keys for.
constexpr int64_t kDecodeRows = 8;

// `x`, which broadcasts to `full` in all but its last `exact` dimensions.
Scores scores(const char* name, const Tensor& x, const int64_t (&full)[4], int64_t exact) {
  int64_t stride[4];
  STD_TORCH_CHECK(x.dim() == 4 && x.is_cpu(), name, ": expected 4 dimensions on cpu");
  for (int64_t i = 0; i < 4; ++i) {
    STD_TORCH_CHECK(x.size(i) == full[i] || (x.size(i) == 1 && i < 4 - exact), name, ": size ", x.size(i),
                    " does not broadcast to ", full[i]);
    stride[i] = x.size(i) == 1 ? 0 : x.stride(i);
  }
  return {x.data_ptr(), stride[0], stride[1], stride[2], stride[3]};
}

const int32_t* int32s(const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous() && x.scalar_type() == ScalarType::Int, name,
                  ": expected contiguous int32 on cpu");
  return static_cast<const int32_t*>(x.data_ptr());
}
const float* floats(const char* name, const Tensor& x) {
  STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous() && x.scalar_type() == ScalarType::Float, name,
                  ": expected contiguous float32 on cpu");
  return static_cast<const float*>(x.data_ptr());
}
// The stride along a dimension of a contiguous tensor, 0 where it broadcasts to `full`.
int64_t step(const char* name, const Tensor& x, int64_t dim, int64_t full) {
  STD_TORCH_CHECK(x.size(dim) == 1 || x.size(dim) == full, name, ": size ", x.size(dim),
                  " does not broadcast to ", full);
  return x.size(dim) == 1 ? 0 : x.stride(dim);
}

// k and v are [batches, H_kv, rows, D]; all of them together are k_length keys for each sequence.
AttentionProblem problem(const Tensor& q, const Tensor& k, const Tensor& v, int64_t k_length,
                         const AttentionOptions& o, const Tensor& out, const Tensor& lse) {
  AttentionProblem p{};
  p.dtype = dtype_of(q);
  p.q = rows(q, q, q), p.k = rows(k, k, k), p.v = rows(v, v, k), p.out = rows(out, out, q);
  p.batch = q.size(0), p.heads = q.size(1), p.q_length = q.size(2), p.qk_dim = q.size(3);
  p.kv_heads = k.size(1), p.k_length = k_length, p.v_dim = v.size(3);
  STD_TORCH_CHECK(k.size(3) == p.qk_dim && p.kv_heads > 0 && p.heads % p.kv_heads == 0 &&
                      v.size(0) == k.size(0) && v.size(1) == p.kv_heads && v.size(2) == k.size(2),
                  "k or v does not fit q");
  STD_TORCH_CHECK(out.size(0) == p.batch && out.size(1) == p.heads && out.size(2) == p.q_length &&
                      out.size(3) == p.v_dim && lse.is_cpu() && lse.is_contiguous() &&
                      lse.numel() == p.batch * p.heads * p.q_length && lse.scalar_type() == ScalarType::Float,
                  "out or lse does not fit q and v");
  p.lse = static_cast<float*>(lse.data_ptr());

  p.left = o.left, p.right = o.right;
  p.q_start = o.q_start, p.k_start = o.k_start;
  p.diagonal = o.bottom_right ? p.k_length - p.q_length : o.q_start - o.k_start;
  if (o.ranges) {
    const Tensor& x = *o.ranges;
    STD_TORCH_CHECK(x.dim() == 4 && x.size(3) == 2, "ranges: expected [B or 1, K, L_q or 1, 2]");
    p.ranges = {int32s("ranges", x), x.size(1), step("ranges", x, 0, p.batch), x.stride(1),
                step("ranges", x, 2, p.q_length)};
  }
  if (o.blocks) {
    STD_TORCH_CHECK(o.block_q > 0 && o.block_k > 0, "blocks: expected sizes above 0");
    p.block_q = o.block_q, p.block_k = o.block_k;
    p.blocks =
        scores("blocks", *o.blocks,
               {p.batch, p.heads, ceil_div(p.q_length, p.block_q), ceil_div(p.k_length, p.block_k)}, 2);
    STD_TORCH_CHECK(o.blocks->scalar_type() == ScalarType::Bool, "blocks: expected bool");
  }
  if (o.mask) {
    p.mask = scores("mask", *o.mask, {p.batch, p.heads, p.q_length, p.k_length}, 0);
    STD_TORCH_CHECK(o.mask->scalar_type() == ScalarType::Bool, "mask: expected bool");
  }

  p.scale = static_cast<float>(o.scale), p.softcap = static_cast<float>(o.softcap);
  if (o.bias) {
    p.bias = scores("bias", *o.bias, {p.batch, p.heads, p.q_length, p.k_length}, 0);
    p.bias_dtype = dtype_of(*o.bias);
  }
  if (o.relative) {
    const Tensor& x = *o.relative;
    const int64_t length = p.q_length + p.k_length, size = o.origin ? 2 * length + 1 : length;
    STD_TORCH_CHECK(x.dim() == 3 && x.size(2) == size, "relative: expected [B or 1, H or 1, ", size, "]");
    p.relative = floats("relative", x);
    p.relative_batch = step("relative", x, 0, p.batch), p.relative_head = step("relative", x, 1, p.heads);
  }
  if (o.origin) {
    STD_TORCH_CHECK(o.origin->dim() == 2 && o.origin->size(1) == p.q_length,
                    "origin: expected [B or 1, L_q]");
    p.origin = int32s("origin", *o.origin);
    p.origin_batch = step("origin", *o.origin, 0, p.batch);
  }
  if (o.sinks) {
    STD_TORCH_CHECK(o.sinks->dim() == 2 && o.sinks->size(1) == p.heads, "sinks: expected [B or 1, H]");
    p.sinks = floats("sinks", *o.sinks);
    p.sinks_batch = step("sinks", *o.sinks, 0, p.batch);
  }

  STD_TORCH_CHECK(o.drop_threshold >= 0 && o.drop_threshold < 65536, "drop_threshold: expected 0 to 65535");
  if (o.drop_threshold > 0) {
    STD_TORCH_CHECK(
        o.seed && o.seed->scalar_type() == ScalarType::Long && o.seed->numel() == 1 && o.seed->is_cpu(),
        "seed: expected int64 [1] on cpu");
    p.seed = *static_cast<const uint64_t*>(o.seed->data_ptr());
  }
  p.drop_threshold = static_cast<uint32_t>(o.drop_threshold);
  return p;
}

// What both backward ops share: statistics of the rows, and what these see.
struct Statistics {
  Tensor log2_sum, delta, seen_keys, seen_blocks;
};
Statistics row_statistics(const AttentionKernels& kernel, const AttentionProblem& p, AttentionGradients& g,
                          const Tensor& lse, const OptionalTensor& dlse) {
  STD_TORCH_CHECK(!dlse || (dlse->is_cpu() && dlse->is_contiguous() && dlse->numel() == lse.numel() &&
                            dlse->scalar_type() == ScalarType::Float),
                  "dlse does not fit lse");
  const int64_t query_blocks = ceil_div(p.q_length, kernel.query_block);
  const auto integers = [&](int64_t count) {
    return torch::stable::new_empty(lse, {p.batch, count, 2}, ScalarType::Long);
  };
  Statistics s{torch::stable::empty_like(lse), torch::stable::empty_like(lse), integers(1),
               integers(query_blocks)};
  g.dlse = dlse ? static_cast<const float*>(dlse->data_ptr()) : nullptr;
  g.log2_sum = static_cast<float*>(s.log2_sum.data_ptr());
  g.delta = static_cast<float*>(s.delta.data_ptr());
  g.seen_keys = static_cast<int64_t*>(s.seen_keys.data_ptr());
  g.seen_blocks = static_cast<int64_t*>(s.seen_blocks.data_ptr());
  run_tasks(p.batch * p.heads, 0,
            [&](int64_t i, char*) { kernel.backward_rows(p, g, i / p.heads, i % p.heads); });
  run_tasks(p.batch, 0, [&](int64_t i, char*) { kernel.backward_seen(p, g, i); });
  return s;
}

// One sequence's keys and values lie in one piece.
AttentionProblem dense_problem(const Tensor& q, const Tensor& k, const Tensor& v, const AttentionOptions& o,
                               const Tensor& out, const Tensor& lse) {
  STD_TORCH_CHECK(k.size(0) == q.size(0) && k.scalar_type() == q.scalar_type(), "k does not fit q");
  return problem(q, k, v, k.size(2), o, out, lse);
}

// Few queries, split over keys.
void run_decode(const AttentionKernels& kernel, const AttentionProblem& p, AttentionCache& cache,
                const Tensor& lse) {
  cache.splits = ceil_div(p.k_length, kernel.decode_split);
  cache.partial_stride = ceil_div(p.v_dim, 16) * 16 + 2;
  const Tensor partial = torch::stable::new_empty(
      lse, {p.batch * p.heads * p.q_length * cache.splits * cache.partial_stride + 16}, ScalarType::Float);
  cache.partial = static_cast<float*>(partial.data_ptr());
  // Neighbours in time on other heads: these are neighbours in memory where heads lie within a row.
  const int64_t matrices = p.batch * p.kv_heads;
  run_tasks(matrices * cache.splits, kernel.decode_scratch(p), [&](int64_t i, char* scratch) {
    const int64_t matrix = i % matrices;
    kernel.decode(p, cache, matrix / p.kv_heads, matrix % p.kv_heads, i / matrices, scratch);
  });
  run_tasks(p.batch * p.heads, 0,
            [&](int64_t i, char*) { kernel.decode_merge(p, cache, i / p.heads, i % p.heads); });
}

float* gradient(const char* name, const OptionalTensor& of, const Tensor& x) {
  STD_TORCH_CHECK(of && x.is_cpu() && x.is_contiguous() && x.scalar_type() == ScalarType::Float &&
                      x.numel() == of->numel(),
                  name, ": expected contiguous float32 of the shape of what it is the gradient of");
  return static_cast<float*>(x.data_ptr());
}

void gradients_of_inputs(const AttentionKernels& kernel, const AttentionProblem& p, AttentionGradients& g,
                         const Tensor& lse) {
  const int64_t matrices = p.batch * p.heads, query_blocks = ceil_div(p.q_length, kernel.query_block);
  g.dq_rows = query_blocks * kernel.query_block;
  g.dq_stride = ceil_div(p.qk_dim, kernel.dq_alignment) * kernel.dq_alignment;
  const Tensor dq_sum = torch::stable::new_zeros(lse, {matrices, g.dq_rows, g.dq_stride});
  const Tensor turn = torch::stable::new_zeros(lse, {matrices, query_blocks}, ScalarType::Int);
  g.dq_sum = static_cast<float*>(dq_sum.data_ptr());
  g.turn = static_cast<int32_t*>(turn.data_ptr());

  // The first keys have the most queries under a causal mask: longest first, and neighbours in time on other
  // heads.
  const int64_t kv_matrices = p.batch * p.kv_heads, key_blocks = ceil_div(p.k_length, kernel.key_block(p));
  run_tasks(kv_matrices * key_blocks, kernel.backward_scratch(p), [&](int64_t i, char* scratch) {
    const int64_t matrix = i % kv_matrices;
    kernel.backward_keys(p, g, matrix / p.kv_heads, matrix % p.kv_heads, i / kv_matrices, scratch);
  });
  run_tasks(matrices, 0, [&](int64_t i, char*) { kernel.backward_queries(p, g, i / p.heads, i % p.heads); });
}

}  // namespace

void attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, FASTATTN_ATTENTION_OPTIONS,
                       int64_t isa, const Tensor& out, const Tensor& lse) {
  const AttentionKernels& kernel = kernels(isa);
  const AttentionProblem p = dense_problem(q, k, v, FASTATTN_ATTENTION_GIVEN, out, lse);
  if (p.heads / p.kv_heads * p.q_length <= kDecodeRows && !p.drop_threshold) {
    AttentionCache cache{p.dtype, nullptr, 0, p.k_length, nullptr, nullptr, nullptr, 0, 0};
    return run_decode(kernel, p, cache, lse);
  }
  // Many rows a task make the packing of keys and values cheap; few make the tasks even.
  const int64_t threads = torch::stable::get_num_threads(), matrices = p.batch * p.heads;
  int64_t rows = 1536;
  const auto tasks = [&] { return matrices * ceil_div(p.q_length, rows); };
  while (rows > 48 && tasks() < 4 * threads) rows /= 2;
  while (rows > 12 && tasks() < threads) rows /= 2;  // rather dear packing than an idle thread
  rows = ceil_div(rows, kernel.row_block) * kernel.row_block;
  const int64_t row_blocks = ceil_div(p.q_length, rows);
  // Under a causal mask the last rows have the most keys: longest first.
  run_tasks(matrices * row_blocks, kernel.forward_scratch(p, rows), [&](int64_t i, char* scratch) {
    const int64_t first = (row_blocks - 1 - i / matrices) * rows, matrix = i % matrices;
    const int64_t count = first + rows < p.q_length ? rows : p.q_length - first;
    kernel.forward(p, matrix / p.heads, matrix % p.heads, first, count, scratch);
  });
}

void attention_decode(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& block_table,
                      const OptionalTensor& k_scale, const OptionalTensor& v_scale,
                      FASTATTN_ATTENTION_OPTIONS, int64_t isa, const Tensor& out, const Tensor& lse) {
  const AttentionKernels& kernel = kernels(isa);
  AttentionCache cache{};
  cache.dtype = cache_dtype_of(k), cache.page_size = k.size(2);
  STD_TORCH_CHECK(drop_threshold == 0, "expected no dropout over a cache");
  STD_TORCH_CHECK(v.scalar_type() == k.scalar_type(), "v: expected k's dtype");
  STD_TORCH_CHECK(cache.page_size > 0, "k: expected pages of one key or more");
  if (block_table) {
    STD_TORCH_CHECK(block_table->dim() == 2 && block_table->size(0) == q.size(0),
                    "block_table: expected [B, n]");
    cache.table = int32s("block_table", *block_table), cache.table_columns = block_table->size(1);
  } else {
    STD_TORCH_CHECK(k.size(0) == q.size(0), "k: expected q's batch");
    cache.table_columns = 1;
  }
  const AttentionProblem p =
      problem(q, k, v, cache.table_columns * cache.page_size, FASTATTN_ATTENTION_GIVEN, out, lse);
  for (const OptionalTensor& x : {k_scale, v_scale})
    STD_TORCH_CHECK(!x || x->numel() == p.batch * p.kv_heads, "scale: expected [B, H_kv]");
  if (k_scale) cache.k_scale = floats("k_scale", *k_scale);
  if (v_scale) cache.v_scale = floats("v_scale", *v_scale);
  run_decode(kernel, p, cache, lse);
}

void attention_backward(FASTATTN_ATTENTION_SAVED, FASTATTN_ATTENTION_OPTIONS, int64_t isa, int64_t wanted,
                        const Tensor& dq, const Tensor& dk, const Tensor& dv, const Tensor& dbias,
                        const Tensor& drelative, const Tensor& dsinks) {
  const AttentionKernels& kernel = kernels(isa);
  const AttentionProblem p = dense_problem(q, k, v, FASTATTN_ATTENTION_GIVEN, out, lse);
  AttentionGradients g{};
  g.dout = rows(dout, out, q);
  const Tensor each = torch::stable::new_zeros(lse, {p.batch * p.heads});
  if (wanted & 4) g.dsinks = static_cast<float*>(each.data_ptr());
  const Statistics statistics = row_statistics(kernel, p, g, lse, dlse);
  if (wanted & 4) {
    float* sum = gradient("dsinks", sinks, dsinks);
    const int64_t count = dsinks.numel();
    for (int64_t i = 0; i < count; ++i) sum[i] = 0.0f;
    for (int64_t i = 0; i < p.batch * p.heads; ++i) sum[i % count] += g.dsinks[i];
  }

  // A bias that does not broadcast gets its gradient on the way to those of q, k and v.
  bool on_the_way = false;
  if (wanted & 1) {
    g.dbias = gradient("dbias", bias, dbias);
    g.bias_batch = bias->size(0), g.bias_heads = bias->size(1);
    g.bias_rows = bias->size(2), g.bias_columns = bias->size(3);
    on_the_way = (wanted & 8) && p.softcap == 0.0f && g.bias_batch == p.batch && g.bias_heads == p.heads &&
                 g.bias_rows == p.q_length && g.bias_columns == p.k_length;
  }
  if (wanted & 8) {
    g.dq = rows(dq, q, q), g.dk = rows(dk, k, q), g.dv = rows(dv, v, q);
    AttentionGradients own = g;
    if (!on_the_way) own.dbias = nullptr;
    gradients_of_inputs(kernel, p, own, lse);
  }
  if ((wanted & 1) && !on_the_way) {
    const int64_t matrices = g.bias_batch * g.bias_heads;
    const int64_t key_blocks = g.bias_columns == 1 ? 1 : ceil_div(p.k_length, kernel.key_block(p));
    run_tasks(matrices * key_blocks, kernel.backward_scratch(p), [&](int64_t i, char* scratch) {
      const int64_t matrix = i % matrices;
      kernel.backward_bias(p, g, matrix / g.bias_heads, matrix % g.bias_heads, i / matrices, scratch);
    });
  }
  if (wanted & 2) {
    g.drelative = gradient("drelative", relative, drelative);
    g.relative_batches = relative->size(0), g.relative_heads = relative->size(1);
    g.relative_size = relative->size(2);
    run_tasks(g.relative_batches * g.relative_heads, kernel.backward_scratch(p),
              [&](int64_t i, char* scratch) {
                kernel.backward_relative(p, g, i / g.relative_heads, i % g.relative_heads, scratch);
              });
  }
}

int64_t isa_mask() {
  int64_t mask = 0;
  for (int64_t isa = 0; isa < kIsaCount; ++isa) mask |= int64_t{isa_present(isa)} << isa;
  return mask;
}

double fma_loop(int64_t steps, int64_t isa) {
  const AttentionKernels& kernel = kernels(isa);
  const int64_t threads = torch::stable::get_num_threads();
  std::atomic<int64_t> total{0};
  torch::stable::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) total.fetch_add(static_cast<int64_t>(kernel.fma_loop(steps)));
  });
  return static_cast<double>(total.load());
}

}  // namespace fastattn
