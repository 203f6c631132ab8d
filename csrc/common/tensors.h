// SPDX-License-Identifier: BSD-3-Clause
// From torch's tensors to what kernels take: the checks that every op makes, and its instruction set's table.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <optional>

#include "common/dtype.h"
#include "common/isa.h"

namespace fastattn {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline Dtype dtype_of(const Tensor& x) {
  using torch::headeronly::ScalarType;
  switch (x.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      STD_TORCH_CHECK(false, "expected float32, bfloat16 or float16");
  }
}

// The kernels of one instruction set; they are declared by the names that every op's header gives them.
template <class Kernels>
const Kernels& kernels_of(int64_t isa, const Kernels& scalar, [[maybe_unused]] const Kernels& avx2,
                          [[maybe_unused]] const Kernels& avx512, [[maybe_unused]] const Kernels& wide) {
  STD_TORCH_CHECK(isa >= 0 && isa < kIsaCount && isa_present(isa), "this CPU does not have instruction set ",
                  isa);
  const Kernels* table[] = {&scalar, &avx2, &avx512, &wide};
  return *table[isa];
}

}  // namespace fastattn
