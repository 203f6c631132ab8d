// SPDX-License-Identifier: BSD-3-Clause
// The attention ops as library.cpp registers them; the schemas are there.
#pragma once
#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace fastattn {

using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

void attention_forward(const Tensor& q, const Tensor& k, const Tensor& v, const OptionalTensor& mask,
                       const OptionalTensor& lengths, const OptionalTensor& bias, const OptionalTensor& seed,
                       int64_t diagonal, double scale, int64_t drop_threshold, int64_t isa, const Tensor& out,
                       const Tensor& lse);
void attention_backward(const Tensor& dout, const OptionalTensor& dlse, const Tensor& q, const Tensor& k,
                        const Tensor& v, const Tensor& out, const Tensor& lse, const OptionalTensor& mask,
                        const OptionalTensor& lengths, const OptionalTensor& bias, const OptionalTensor& seed,
                        int64_t diagonal, double scale, int64_t drop_threshold, int64_t isa, const Tensor& dq,
                        const Tensor& dk, const Tensor& dv);
void attention_bias_backward(const Tensor& dout, const OptionalTensor& dlse, const Tensor& q, const Tensor& k,
                             const Tensor& v, const Tensor& out, const Tensor& lse,
                             const OptionalTensor& mask, const OptionalTensor& lengths,
                             const OptionalTensor& bias, const OptionalTensor& seed, int64_t diagonal,
                             double scale, int64_t drop_threshold, int64_t isa, const Tensor& dbias);

// Bit i is set where instruction set i (common/isa.h) is compiled in and this CPU has it.
int64_t isa_mask();
// Floating-point operations done by `steps` rounds of independent FMAs on every thread.
double fma_loop(int64_t steps, int64_t isa);

}  // namespace fastattn
