// SPDX-License-Identifier: BSD-3-Clause
// From tensors to rotations: checks, the choice of instruction set, and the split into tasks.
#include "rotary/rotary.h"

#include <torch/csrc/stable/library.h>

#include "common/tasks.h"
#include "rotary/problem.h"

namespace fastattn {
namespace {

const RotaryKernels& kernels(int64_t isa) {
#if defined(__x86_64__)
  return kernels_of(isa, kRotaryScalar, kRotaryAvx2, kRotaryAvx512, kRotaryWide);
#else
  return kernels_of(isa, kRotaryScalar, kRotaryScalar, kRotaryScalar, kRotaryScalar);
#endif
}

HeadRows head_rows(const char* name, const Tensor& x, const Tensor& like) {
  STD_TORCH_CHECK(x.dim() == 4 && x.is_cpu() && x.scalar_type() == like.scalar_type(), name,
                  ": expected [B, H, L, D] on cpu in x's dtype");
  for (int64_t i = 0; i < 4; ++i)
    STD_TORCH_CHECK(x.size(i) == like.size(i), name, ": dimension ", i, ": expected ", like.size(i), ", got ",
                    x.size(i));
  STD_TORCH_CHECK(x.stride(3) == 1 || x.size(3) == 1 || x.numel() == 0, name,
                  ": expected a unit last stride, got ", x.stride(3));
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

void check_table(const char* name, const Tensor& x, const Tensor& like) {
  STD_TORCH_CHECK(x.dim() == 2 && x.is_cpu() && x.scalar_type() == like.scalar_type() &&
                      x.size(0) == like.size(0) && x.size(1) == like.size(1) &&
                      (x.stride(1) == 1 || x.size(1) <= 1),
                  name, ": expected [P, R / 2] on cpu with a unit last stride, cos and sin alike");
}

}  // namespace

void rotary(const Tensor& x, const Tensor& cos, const Tensor& sin, const OptionalTensor& positions,
            int64_t start, bool interleaved, bool inverse, int64_t isa, const Tensor& out) {
  RotaryProblem p{};
  p.x = head_rows("x", x, x), p.out = head_rows("out", out, x);
  p.dtype = dtype_of(x);
  p.batch = x.size(0), p.heads = x.size(1), p.length = x.size(2), p.dim = x.size(3);
  check_table("cos", cos, cos), check_table("sin", sin, cos);
  p.table_dtype = dtype_of(cos);
  p.cos = cos.data_ptr(), p.sin = sin.data_ptr();
  p.cos_row = cos.stride(0), p.sin_row = sin.stride(0);
  p.half = cos.size(1), p.interleaved = interleaved, p.inverse = inverse;
  STD_TORCH_CHECK(2 * p.half <= p.dim, "cos: expected at most ", p.dim / 2, " columns, got ", p.half);

  const int64_t rows = cos.size(0);
  if (positions) {
    const Tensor& at = *positions;
    STD_TORCH_CHECK(at.dim() == 2 && at.is_cpu() && at.is_contiguous() &&
                        at.scalar_type() == torch::headeronly::ScalarType::Long &&
                        (at.size(0) == 1 || at.size(0) == p.batch) && at.size(1) == p.length,
                    "positions: expected contiguous int64 [B or 1, L] on cpu");
    p.positions = static_cast<const int64_t*>(at.data_ptr());
    p.position_batch = at.size(0) == 1 ? 0 : p.length;
    for (int64_t i = 0; i < at.numel(); ++i)
      STD_TORCH_CHECK(p.positions[i] == kUnturned || (p.positions[i] >= 0 && p.positions[i] < rows),
                      "rotary: expected positions from 0 to ", rows - 1, " (cos has ", rows, " rows), got ",
                      p.positions[i]);
  } else {
    p.start = start;
    STD_TORCH_CHECK(start >= 0 && start <= rows - p.length, "rotary: expected positions from 0 to ", rows - 1,
                    " (cos has ", rows, " rows), got start ", start, " and ", p.length, " of them");
  }
  if (x.numel() == 0) return;

  const RotaryKernels& kernel = kernels(isa);
  const int64_t blocks = (p.length + kernel.row_block - 1) / kernel.row_block;
  // Neighbours in time on other heads: their angles are the same.
  run_tasks(p.batch * blocks * p.heads, 0, [&](int64_t i, void*) {
    const int64_t block = i / p.heads;
    kernel.rotate(p, block / blocks, i % p.heads, block % blocks * kernel.row_block);
  });
}

}  // namespace fastattn
