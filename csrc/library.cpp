// SPDX-License-Identifier: BSD-3-Clause
// The one list of C++ ops, on the LibTorch stable ABI. They write into tensors that Python made; the public
// ops, with fakes and gradients, are in fastattn/ops/*/library.py.
#include <torch/csrc/stable/library.h>

#include "attention/attention.h"

#define FASTATTN_ATTENTION_PROBLEM                                                             \
  "Tensor? mask, Tensor? lengths, Tensor? bias, Tensor? seed, int diagonal, float scale, int " \
  "drop_threshold, int isa, "
#define FASTATTN_ATTENTION_SAVED \
  "Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "

STABLE_TORCH_LIBRARY(fastattn_cpu, m) {
  m.def("attention_forward(Tensor q, Tensor k, Tensor v, " FASTATTN_ATTENTION_PROBLEM
        "Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def("attention_backward(" FASTATTN_ATTENTION_SAVED FASTATTN_ATTENTION_PROBLEM
        "Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv) -> ()");
  m.def("attention_bias_backward(" FASTATTN_ATTENTION_SAVED FASTATTN_ATTENTION_PROBLEM
        "Tensor(a!) dbias) -> ()");
  m.def("isa_present() -> int");
  m.def("fma_loop(int steps, int isa) -> float");
}

STABLE_TORCH_LIBRARY_IMPL(fastattn_cpu, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&fastattn::attention_forward));
  m.impl("attention_backward", TORCH_BOX(&fastattn::attention_backward));
  m.impl("attention_bias_backward", TORCH_BOX(&fastattn::attention_bias_backward));
}

STABLE_TORCH_LIBRARY_IMPL(fastattn_cpu, CompositeExplicitAutograd, m) {
  m.impl("isa_present", TORCH_BOX(&fastattn::isa_mask));
  m.impl("fma_loop", TORCH_BOX(&fastattn::fma_loop));
}
