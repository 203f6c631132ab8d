// SPDX-License-Identifier: BSD-3-Clause
// The one list of C++ ops, on the LibTorch stable ABI. They write into tensors that Python made; the public
// ops, with fakes and gradients, are in fastattn/ops/*/library.py.
#include <torch/csrc/stable/library.h>

#include "adamw/adamw.h"
#include "attention/attention.h"
#include "cross_entropy/cross_entropy.h"
#include "embedding/embedding.h"
#include "layer_norm/layer_norm.h"
#include "linear/linear.h"
#include "rotary/rotary.h"

#define ATTENTION_PROBLEM                                                                           \
  "Tensor? mask, Tensor? blocks, Tensor? ranges, Tensor? bias, Tensor? relative, Tensor? origin, "  \
  "Tensor? sinks, Tensor? seed, int left, int right, bool bottom_right, int q_start, int k_start, " \
  "int block_q, int block_k, float scale, float softcap, int drop_threshold, int isa, "
#define ATTENTION_SAVED "Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "

STABLE_TORCH_LIBRARY(fastattn_cpu, m) {
  m.def("attention_forward(Tensor q, Tensor k, Tensor v, " ATTENTION_PROBLEM
        "Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def(
      "attention_decode(Tensor q, Tensor k, Tensor v, Tensor? block_table, Tensor? k_scale, "
      "Tensor? v_scale, " ATTENTION_PROBLEM "Tensor(a!) out, Tensor(b!) lse) -> ()");
  m.def("attention_backward(" ATTENTION_SAVED ATTENTION_PROBLEM
        "int wanted, Tensor(a!) dq, Tensor(b!) dk, Tensor(c!) dv, Tensor(d!) dbias, Tensor(e!) drelative, "
        "Tensor(f!) dsinks) -> ()");
  m.def(
      "gemm(Tensor a, Tensor b, Tensor? bias, int epilogue, int activation, Tensor(a!)? u, Tensor? gate, "
      "Tensor(b!)? h, Tensor(c!)? d, int isa, Tensor(d!) c) -> ()");
  m.def(
      "dropout_add(Tensor x, Tensor? residual, Tensor? seed, int drop_threshold, int isa, Tensor(a!) out) -> "
      "()");
  m.def(
      "rotary(Tensor x, Tensor cos, Tensor sin, Tensor? positions, int start, bool interleaved, bool "
      "inverse, "
      "int isa, Tensor(a!) out) -> ()");
  m.def(
      "cross_entropy(Tensor logits, Tensor target, Tensor? weight, Tensor? dloss, int ignore_index, "
      "float label_smoothing, float softcap, float z_loss, int isa, Tensor(a!)? loss, Tensor(b!) lse, "
      "Tensor(c!)? dlogits) -> ()");
  m.def(
      "kl_div(Tensor(a!) student, Tensor teacher, Tensor? dloss, float temperature, int isa, Tensor(b!) "
      "loss) -> ()");
  m.def("sum_of_squares(Tensor[] tensors, int isa) -> float");
  m.def(
      "adamw_step(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
      "Tensor[] steps, float lr, float beta1, float beta2, float eps, float weight_decay, float factor, "
      "int isa) -> ()");
  m.def(
      "embedding(Tensor ids, Tensor weight, Tensor? position_weight, Tensor? positions, Tensor? seed, "
      "int drop_threshold, int isa, Tensor(a!) out) -> ()");
  m.def(
      "embedding_gradient(Tensor dout, Tensor ids, Tensor order, Tensor? seed, int drop_threshold, int skip, "
      "int isa, Tensor(a!) grad) -> ()");
  m.def(
      "layer_norm_forward(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? seed, "
      "int drop_threshold, float eps, int isa, Tensor(a!) out, Tensor(b!)? z, Tensor(c!)? mean, "
      "Tensor(d!) rstd) -> ()");
  m.def(
      "layer_norm_backward(Tensor dout, Tensor? dz, Tensor z, Tensor? weight, Tensor? mean, Tensor rstd, "
      "Tensor? seed, int drop_threshold, int isa, Tensor(a!)? dx, Tensor(b!)? dresidual, "
      "Tensor(c!)? dweight, Tensor(d!)? dbias) -> ()");
  m.def("isa_present() -> int");
  m.def("fma_loop(int steps, int isa) -> float");
}

STABLE_TORCH_LIBRARY_IMPL(fastattn_cpu, CPU, m) {
  m.impl("attention_forward", TORCH_BOX(&fastattn::attention_forward));
  m.impl("attention_decode", TORCH_BOX(&fastattn::attention_decode));
  m.impl("attention_backward", TORCH_BOX(&fastattn::attention_backward));
  m.impl("gemm", TORCH_BOX(&fastattn::gemm));
  m.impl("dropout_add", TORCH_BOX(&fastattn::dropout_add));
  m.impl("rotary", TORCH_BOX(&fastattn::rotary));
  m.impl("cross_entropy", TORCH_BOX(&fastattn::cross_entropy));
  m.impl("kl_div", TORCH_BOX(&fastattn::kl_div));
  m.impl("sum_of_squares", TORCH_BOX(&fastattn::sum_of_squares));
  m.impl("adamw_step", TORCH_BOX(&fastattn::adamw_step));
  m.impl("embedding", TORCH_BOX(&fastattn::embedding));
  m.impl("embedding_gradient", TORCH_BOX(&fastattn::embedding_gradient));
  m.impl("layer_norm_forward", TORCH_BOX(&fastattn::layer_norm_forward));
  m.impl("layer_norm_backward", TORCH_BOX(&fastattn::layer_norm_backward));
}

STABLE_TORCH_LIBRARY_IMPL(fastattn_cpu, CompositeExplicitAutograd, m) {
  m.impl("isa_present", TORCH_BOX(&fastattn::isa_mask));
  m.impl("fma_loop", TORCH_BOX(&fastattn::fma_loop));
}
