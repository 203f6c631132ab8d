// SPDX-License-Identifier: BSD-3-Clause
// From tensors to matrix products: checks, the choice of instruction set, and the split into tasks.
#include "linear/linear.h"

#include <torch/csrc/stable/library.h>

#include "common/tasks.h"
#include "linear/problem.h"

namespace fastattn {
namespace {

const GemmKernels& kernels(int64_t isa) {
#if defined(__x86_64__)
  return kernels_of(isa, kGemmScalar, kGemmAvx2, kGemmAvx512, kGemmWide);
#else
  return kernels_of(isa, kGemmScalar, kGemmScalar, kGemmScalar, kGemmScalar);
#endif
}

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

Matrix matrix(const char* name, const Tensor& x, int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(x.dim() == 2 && x.is_cpu() && x.size(0) == rows && x.size(1) == columns, name,
                  ": expected [", rows, ", ", columns, "] on cpu");
  // The stride of a dimension of size 1 is of no account.
  Matrix m{x.data_ptr(), dtype_of(x), x.stride(0), x.stride(1)};
  if (columns == 1 && m.row != 1) m.column = 1;
  if (rows == 1 && m.column != 1) m.row = 1;
  STD_TORCH_CHECK(m.row == 1 || m.column == 1 || x.numel() == 0, name, ": expected a stride of 1, got ",
                  m.row, " and ", m.column);
  return m;
}

// One of the matrices that have C's shape and dtype, and are read and written by rows.
Matrix like_c(const char* name, const Tensor& x, const Tensor& c) {
  const Matrix m = matrix(name, x, c.size(0), c.size(1));
  STD_TORCH_CHECK(m.dtype == dtype_of(c), name, ": expected the dtype of c");
  STD_TORCH_CHECK(m.column == 1 || x.size(1) == 1 || x.numel() == 0, name,
                  ": expected rows with a unit stride");
  return {m.data, m.dtype, m.row, 1};
}
Matrix like_c(const char* name, const OptionalTensor& x, const Tensor& c) {
  return x ? like_c(name, *x, c) : Matrix{};
}

}  // namespace

void gemm(const Tensor& a, const Tensor& b, const OptionalTensor& bias, int64_t epilogue, int64_t activation,
          const OptionalTensor& u, const OptionalTensor& gate, const OptionalTensor& h,
          const OptionalTensor& d, int64_t isa, const Tensor& c) {
  GemmProblem p{};
  STD_TORCH_CHECK(a.dim() == 2 && b.dim() == 2 && c.dim() == 2, "expected matrices");
  p.m = a.size(0), p.k = a.size(1), p.n = b.size(1);
  p.a = matrix("a", a, p.m, p.k), p.b = matrix("b", b, p.k, p.n);
  STD_TORCH_CHECK(c.size(0) == p.m && c.size(1) == p.n, "c: expected [", p.m, ", ", p.n, "]");
  p.c = like_c("c", c, c);
  if (bias) {
    STD_TORCH_CHECK(
        bias->dim() == 1 && bias->size(0) == p.n && bias->is_cpu() && (bias->stride(0) == 1 || p.n <= 1),
        "bias: expected contiguous [", p.n, "] on cpu");
    p.bias = {bias->data_ptr(), dtype_of(*bias), 0, 1};
  }
  STD_TORCH_CHECK(epilogue >= 0 && epilogue < static_cast<int64_t>(Epilogue::kCount), "epilogue: unknown");
  p.epilogue = static_cast<Epilogue>(epilogue), p.activation = activation;
  const bool needs_u = p.epilogue == Epilogue::kSlope || p.epilogue == Epilogue::kGateSlope;
  const bool needs_gate = p.epilogue == Epilogue::kGate || p.epilogue == Epilogue::kGateSlope;
  STD_TORCH_CHECK(!needs_u || u, "u: expected a matrix");
  STD_TORCH_CHECK(!needs_gate || gate, "gate: expected a matrix");
  STD_TORCH_CHECK(p.epilogue != Epilogue::kGateSlope || d, "d: expected a matrix");
  STD_TORCH_CHECK(p.epilogue != Epilogue::kAdd || (!bias && p.c.dtype == Dtype::kFloat32),
                  "adding to c: expected float32 and no bias");
  p.u = like_c("u", u, c), p.gate = like_c("gate", gate, c);
  p.h = like_c("h", h, c), p.d = like_c("d", d, c);
  if (p.m == 0 || p.n == 0) return;

  const GemmKernels& kernel = kernels(isa);
  const GemmBlocks x = kernel.blocks(p, torch::stable::get_num_threads());
  const auto bytes = [](size_t n) {
    return torch::stable::empty({static_cast<int64_t>(n) + 64}, torch::headeronly::ScalarType::Byte);
  };
  const auto aligned = [](const Tensor& t) {
    char* at = static_cast<char*>(t.mutable_data_ptr());
    return reinterpret_cast<float*>(at + (64 - reinterpret_cast<uintptr_t>(at) % 64) % 64);
  };
  const Tensor packed_memory = bytes(x.packed_bytes), sums_memory = bytes(x.sums_bytes);
  float *packed = aligned(packed_memory), *sums = aligned(sums_memory);
  const int64_t row_blocks = ceil_div(p.m, x.m_block);
  for (int64_t j0 = 0; j0 < p.n; j0 += x.n_block) {
    const int64_t columns = x.n_block < p.n - j0 ? x.n_block : p.n - j0;
    // A depth of 0 still makes a C of zeros, or of the bias.
    for (int64_t k0 = 0; k0 < p.k || k0 == 0; k0 += x.k_block) {
      run_tasks(ceil_div(columns, kernel.panel), 0,
                [&](int64_t i, void*) { kernel.pack(p, x, j0, k0, i * kernel.panel, packed); });
      const int64_t column_tasks = ceil_div(columns, x.n_task);
      run_tasks(row_blocks * column_tasks, x.scratch_bytes, [&](int64_t i, void* scratch) {
        kernel.multiply(p, x, i / column_tasks * x.m_block, j0, i % column_tasks * x.n_task, k0, packed, sums,
                        scratch);
      });
    }
  }
}

void dropout_add(const Tensor& x, const OptionalTensor& residual, const OptionalTensor& seed,
                 int64_t drop_threshold, int64_t isa, const Tensor& out) {
  DropoutProblem p{};
  STD_TORCH_CHECK(x.dim() == 2, "x: expected a matrix");
  p.rows = x.size(0), p.columns = x.size(1);
  STD_TORCH_CHECK(out.dim() == 2 && out.size(0) == p.rows && out.size(1) == p.columns,
                  "out: expected x's shape");
  p.x = like_c("x", x, out), p.out = like_c("out", out, out), p.residual = like_c("residual", residual, out);
  STD_TORCH_CHECK(drop_threshold >= 0 && drop_threshold < 65536, "drop_threshold: expected 0 to 65535");
  p.drop_threshold = static_cast<uint32_t>(drop_threshold);
  if (drop_threshold > 0) {
    STD_TORCH_CHECK(seed && seed->numel() == 1 && seed->is_cpu() &&
                        seed->scalar_type() == torch::headeronly::ScalarType::Long,
                    "seed: expected int64 [1] on cpu");
    p.seed = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->data_ptr()));
  }
  constexpr int64_t kRows = 16;
  const GemmKernels& kernel = kernels(isa);
  run_tasks(ceil_div(p.rows, kRows), 0, [&](int64_t i, void*) {
    kernel.dropout_add(p, i * kRows, kRows * (i + 1) < p.rows ? kRows * (i + 1) : p.rows);
  });
}

}  // namespace fastattn
