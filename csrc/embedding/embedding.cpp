// SPDX-License-Identifier: BSD-3-Clause
// From tensors to look-ups: checks, the choice of instruction set, and the split into tasks.
#include "embedding/embedding.h"

#include <torch/csrc/stable/library.h>

#include <vector>

#include "common/tasks.h"
#include "embedding/problem.h"

namespace fastattn {
namespace {

using torch::headeronly::ScalarType;

const EmbeddingKernels& kernels(int64_t isa) {
#if defined(__x86_64__)
  return kernels_of(isa, kEmbeddingScalar, kEmbeddingAvx2, kEmbeddingAvx512, kEmbeddingWide);
#else
  return kernels_of(isa, kEmbeddingScalar, kEmbeddingScalar, kEmbeddingScalar, kEmbeddingScalar);
#endif
}

// `count` indices into `size` rows.
const int64_t* indices(const char* name, const Tensor& x, int64_t size) {
  STD_TORCH_CHECK(x.dim() == 1 && x.is_cpu() && x.is_contiguous() && x.scalar_type() == ScalarType::Long,
                  name, ": expected contiguous int64 [N] on cpu");
  const int64_t* data = static_cast<const int64_t*>(x.data_ptr());
  for (int64_t i = 0; i < x.numel(); ++i)
    STD_TORCH_CHECK(data[i] >= 0 && data[i] < size, name, ": expected indices from 0 to ", size - 1, ", got ",
                    data[i]);
  return data;
}

// A matrix of rows with a unit stride; the stride of its rows.
int64_t row_stride(const char* name, const Tensor& x, const Tensor& like) {
  STD_TORCH_CHECK(x.dim() == 2 && x.is_cpu() && x.scalar_type() == like.scalar_type() &&
                      x.size(1) == like.size(1) && (x.stride(1) == 1 || x.size(1) <= 1 || x.numel() == 0),
                  name, ": expected rows with a unit stride, of one length and dtype");
  return x.stride(0);
}

uint64_t seed_of(const OptionalTensor& seed, int64_t drop_threshold) {
  STD_TORCH_CHECK(drop_threshold >= 0 && drop_threshold < 65536, "drop_threshold: expected 0 to 65535");
  if (drop_threshold == 0) return 0;
  STD_TORCH_CHECK(seed && seed->numel() == 1 && seed->is_cpu() && seed->scalar_type() == ScalarType::Long,
                  "seed: expected int64 [1] on cpu");
  return static_cast<uint64_t>(*static_cast<const int64_t*>(seed->data_ptr()));
}

}  // namespace

void embedding(const Tensor& ids, const Tensor& weight, const OptionalTensor& position_weight,
               const OptionalTensor& positions, const OptionalTensor& seed, int64_t drop_threshold,
               int64_t isa, const Tensor& out) {
  EmbeddingProblem p{};
  p.dtype = dtype_of(weight);
  p.weight_row = row_stride("weight", weight, weight);
  row_stride("out", out, weight);
  p.rows = ids.numel(), p.columns = weight.size(1);
  STD_TORCH_CHECK(out.is_contiguous() && out.size(0) == p.rows, "out: expected contiguous [N, D]");
  p.ids = indices("ids", ids, weight.size(0));
  p.weight = weight.data_ptr(), p.out = out.data_ptr();
  if (position_weight) {
    STD_TORCH_CHECK(positions.has_value(), "positions: expected with position_weight");
    p.position_row = row_stride("position_weight", *position_weight, weight);
    p.position_weight = position_weight->data_ptr();
    p.positions = indices("positions", *positions, position_weight->size(0));
    p.position_count = positions->numel();
    STD_TORCH_CHECK(p.rows == 0 || (p.position_count > 0 && p.rows % p.position_count == 0),
                    "positions: expected a divisor of ", p.rows, " of them, got ", p.position_count);
  }
  p.drop_threshold = static_cast<uint32_t>(drop_threshold);
  p.seed = seed_of(seed, drop_threshold);
  constexpr int64_t kRows = 16;
  const EmbeddingKernels& kernel = kernels(isa);
  run_tasks((p.rows + kRows - 1) / kRows, 0, [&](int64_t i, void*) {
    kernel.look_up(p, i * kRows, kRows * (i + 1) < p.rows ? kRows * (i + 1) : p.rows);
  });
}

void embedding_gradient(const Tensor& dout, const Tensor& ids, const Tensor& order,
                        const OptionalTensor& seed, int64_t drop_threshold, int64_t skip, int64_t isa,
                        const Tensor& grad) {
  EmbeddingGradient g{};
  g.dtype = dtype_of(dout);
  row_stride("grad", grad, dout);
  STD_TORCH_CHECK(dout.dim() == 2 && dout.is_contiguous() && grad.is_contiguous() &&
                      dout.size(0) == ids.numel() && order.numel() == ids.numel(),
                  "dout, grad: expected contiguous [N, D] and [V, D]");
  g.columns = dout.size(1), g.dout = dout.data_ptr(), g.grad = grad.data_ptr();
  g.drop_threshold = static_cast<uint32_t>(drop_threshold);
  g.seed = seed_of(seed, drop_threshold);
  const int64_t* id = indices("ids", ids, grad.size(0));
  const int64_t* row = indices("order", order, ids.numel());
  // Where in `order` the rows of a next id begin.
  std::vector<int64_t> starts;
  const int64_t count = ids.numel();
  for (int64_t i = 0; i < count; ++i)
    if (i == 0 || id[row[i]] != id[row[i - 1]]) starts.push_back(i);
  const int64_t segments = static_cast<int64_t>(starts.size());
  starts.push_back(count);
  const EmbeddingKernels& kernel = kernels(isa);
  const int64_t blocks = (g.columns + kernel.column_block - 1) / kernel.column_block;
  run_tasks(segments * blocks, 0, [&](int64_t i, void*) {
    const size_t segment = static_cast<size_t>(i / blocks);
    const int64_t first = starts[segment], target = id[row[first]];
    if (target != skip)
      kernel.sum(g, target, row + first, starts[segment + 1] - first, i % blocks * kernel.column_block);
  });
}

}  // namespace fastattn
