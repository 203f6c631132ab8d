// SPDX-License-Identifier: BSD-3-Clause
// From tensors to layer norms: checks, the choice of instruction set, and the split into tasks.
#include "layer_norm/layer_norm.h"

#include <torch/csrc/stable/library.h>

#include "common/tasks.h"
#include "layer_norm/problem.h"

namespace fastattn {
namespace {

using torch::headeronly::ScalarType;

const NormKernels& kernels(int64_t isa) {
#if defined(__x86_64__)
  return kernels_of(isa, kNormScalar, kNormAvx2, kNormAvx512, kNormWide);
#else
  return kernels_of(isa, kNormScalar, kNormScalar, kNormScalar, kNormScalar);
#endif
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

NormRows rows_of(const char* name, const OptionalTensor& x, const NormProblem& p, Dtype dtype) {
  if (!x) return {};
  STD_TORCH_CHECK(x->dim() == 2 && x->is_cpu() && x->size(0) == p.rows && x->size(1) == p.columns, name,
                  ": expected [", p.rows, ", ", p.columns, "] on cpu");
  STD_TORCH_CHECK(dtype_of(*x) == dtype, name, ": its dtype does not go with the others'");
  STD_TORCH_CHECK(x->stride(1) == 1 || p.columns <= 1 || p.rows == 0, name,
                  ": expected rows with a unit stride");
  return {x->data_ptr(), x->stride(0)};
}

float* floats_of(const char* name, const OptionalTensor& x, int64_t size) {
  if (!x) return nullptr;
  STD_TORCH_CHECK(x->dim() == 1 && x->is_cpu() && x->size(0) == size &&
                      x->scalar_type() == ScalarType::Float && (x->stride(0) == 1 || size <= 1),
                  name, ": expected contiguous float32 [", size, "] on cpu");
  return static_cast<float*>(x->data_ptr());
}

NormProblem problem_of(const Tensor& x, Dtype sum_dtype, const OptionalTensor& seed, int64_t drop_threshold) {
  NormProblem p{};
  STD_TORCH_CHECK(x.dim() == 2, "expected [rows, columns]");
  p.rows = x.size(0), p.columns = x.size(1);
  p.dtype = dtype_of(x), p.sum_dtype = sum_dtype;
  STD_TORCH_CHECK(sum_dtype == p.dtype || sum_dtype == Dtype::kFloat32, "z: expected x's dtype or float32");
  STD_TORCH_CHECK(drop_threshold >= 0 && drop_threshold < 65536, "drop_threshold: expected 0 to 65535");
  p.drop_threshold = static_cast<uint32_t>(drop_threshold);
  if (drop_threshold > 0) {
    STD_TORCH_CHECK(seed && seed->numel() == 1 && seed->is_cpu() && seed->scalar_type() == ScalarType::Long,
                    "seed: expected int64 [1] on cpu");
    p.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->data_ptr()));
  }
  return p;
}

// Rows of a task: some 32 kB of them.
int64_t rows_together(const NormProblem& p) {
  const int64_t rows = 8192 / (p.columns > 0 ? p.columns : 1);
  return rows < 4 ? 4 : rows;
}

// A thread's random numbers of a row.
size_t scratch_bytes(const NormProblem& p) {
  return p.drop_threshold ? static_cast<size_t>(ceil_div(p.columns, 128) * 128) * sizeof(uint32_t) : 0;
}

}  // namespace

void layer_norm_forward(const Tensor& x, const OptionalTensor& residual, const OptionalTensor& weight,
                        const OptionalTensor& bias, const OptionalTensor& seed, int64_t drop_threshold,
                        double eps, int64_t isa, const Tensor& out, const OptionalTensor& z,
                        const OptionalTensor& mean, const Tensor& rstd) {
  NormProblem p = problem_of(x, z ? dtype_of(*z) : dtype_of(x), seed, drop_threshold);
  STD_TORCH_CHECK(z || (!residual && drop_threshold == 0), "z: expected a matrix");
  p.x = rows_of("x", x, p, p.dtype), p.out = rows_of("out", out, p, p.dtype);
  p.residual = rows_of("residual", residual, p, p.sum_dtype), p.z = rows_of("z", z, p, p.sum_dtype);
  p.weight = floats_of("weight", weight, p.columns), p.bias = floats_of("bias", bias, p.columns);
  p.mean = floats_of("mean", mean, p.rows), p.rstd = floats_of("rstd", rstd, p.rows);
  p.eps = static_cast<float>(eps);

  const NormKernels& kernel = kernels(isa);
  const int64_t some = rows_together(p);
  run_tasks(ceil_div(p.rows, some), scratch_bytes(p), [&](int64_t i, void* scratch) {
    kernel.forward(p, i * some, (i + 1) * some < p.rows ? (i + 1) * some : p.rows,
                   static_cast<uint32_t*>(scratch));
  });
}

void layer_norm_backward(const Tensor& dout, const OptionalTensor& dz, const Tensor& z,
                         const OptionalTensor& weight, const OptionalTensor& mean, const Tensor& rstd,
                         const OptionalTensor& seed, int64_t drop_threshold, int64_t isa,
                         const OptionalTensor& dx, const OptionalTensor& dresidual,
                         const OptionalTensor& dweight, const OptionalTensor& dbias) {
  NormProblem p = problem_of(dout, dtype_of(z), seed, drop_threshold);
  p.dout = rows_of("dout", dout, p, p.dtype), p.dx = rows_of("dx", dx, p, p.dtype);
  p.z = rows_of("z", z, p, p.sum_dtype), p.dz = rows_of("dz", dz, p, p.sum_dtype);
  p.dresidual = rows_of("dresidual", dresidual, p, p.sum_dtype);
  p.weight = floats_of("weight", weight, p.columns);
  p.mean = floats_of("mean", mean, p.rows), p.rstd = floats_of("rstd", rstd, p.rows);
  float* sums[] = {floats_of("dweight", dweight, p.columns), floats_of("dbias", dbias, p.columns)};

  // Chunks do not depend on the number of threads, and so neither do the sums' roundings.
  constexpr int64_t kMostChunks = 64;
  const int64_t even = ceil_div(p.rows, kMostChunks), least = rows_together(p);
  const int64_t some = even > least ? even : least, chunks = ceil_div(p.rows, some);
  const Tensor partials = torch::stable::empty({2, chunks, p.columns}, ScalarType::Float);
  float* partial = static_cast<float*>(partials.mutable_data_ptr());
  if (dweight) p.partial_weight = partial;
  if (dbias) p.partial_bias = partial + chunks * p.columns;

  const NormKernels& kernel = kernels(isa);
  run_tasks(chunks, scratch_bytes(p), [&](int64_t i, void* scratch) {
    kernel.backward(p, i, i * some, (i + 1) * some < p.rows ? (i + 1) * some : p.rows,
                    static_cast<uint32_t*>(scratch));
  });
  constexpr int64_t kColumns = 512;
  const int64_t pieces = ceil_div(p.columns, kColumns);
  run_tasks(2 * pieces, 0, [&](int64_t i, void*) {
    const int64_t of = i / pieces, first = i % pieces * kColumns;
    const int64_t end = first + kColumns < p.columns ? first + kColumns : p.columns;
    if (sums[of]) kernel.add_up(partial + of * chunks * p.columns, chunks, p.columns, first, end, sums[of]);
  });
}

}  // namespace fastattn
