// SPDX-License-Identifier: BSD-3-Clause
// From lists of tensors to runs of elements: checks, the choice of instruction set, and the split into tasks.
#include "adamw/adamw.h"

#include <torch/csrc/stable/library.h>

#include <cmath>

#include "adamw/problem.h"
#include "common/tasks.h"

namespace fastattn {
namespace {

constexpr int64_t kRun = 32768;  // elements a task

struct Run {
  size_t tensor;
  int64_t first, end;
};

const AdamWKernels& kernels(int64_t isa) {
#if defined(__x86_64__)
  return kernels_of(isa, kAdamWScalar, kAdamWAvx2, kAdamWAvx512, kAdamWWide);
#else
  return kernels_of(isa, kAdamWScalar, kAdamWScalar, kAdamWScalar, kAdamWScalar);
#endif
}

std::vector<Run> runs_of(const std::vector<Tensor>& tensors) {
  std::vector<Run> runs;
  for (size_t t = 0; t < tensors.size(); ++t)
    for (int64_t i = 0, n = tensors[t].numel(); i < n; i += kRun)
      runs.push_back({t, i, i + kRun < n ? i + kRun : n});
  return runs;
}

void* like(const char* name, const Tensor& x, const Tensor& param) {
  STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == param.scalar_type() && x.dim() == param.dim(), name,
                  ": expected a tensor on cpu of the parameter's dtype and shape");
  for (int64_t i = 0; i < x.dim(); ++i)
    STD_TORCH_CHECK(x.size(i) == param.size(i) && (x.size(i) == 1 || x.stride(i) == param.stride(i)), name,
                    ": expected the parameter's shape and strides");
  return x.data_ptr();
}

}  // namespace

double sum_of_squares(const std::vector<Tensor>& tensors, int64_t isa) {
  const AdamWKernels& kernel = kernels(isa);
  const std::vector<Run> runs = runs_of(tensors);
  std::vector<double> parts(runs.size());
  for (const Tensor& x : tensors) STD_TORCH_CHECK(x.is_cpu(), "expected tensors on cpu");
  run_tasks(static_cast<int64_t>(runs.size()), 0, [&](int64_t i, void*) {
    const Run& run = runs[static_cast<size_t>(i)];
    const Tensor& x = tensors[run.tensor];
    parts[static_cast<size_t>(i)] = kernel.squares(dtype_of(x), x.data_ptr(), run.first, run.end);
  });
  double total = 0.0;
  for (const double part : parts) total += part;
  return total;
}

void adamw_step(const std::vector<Tensor>& params, const std::vector<Tensor>& grads,
                const std::vector<Tensor>& exp_avgs, const std::vector<Tensor>& exp_avg_sqs,
                const std::vector<Tensor>& steps, double lr, double beta1, double beta2, double eps,
                double weight_decay, double factor, int64_t isa) {
  const size_t count = params.size();
  STD_TORCH_CHECK(grads.size() == count && exp_avgs.size() == count && exp_avg_sqs.size() == count &&
                      steps.size() == count,
                  "expected lists of one length");
  const AdamWOptions options{static_cast<float>(beta2),
                             static_cast<float>(eps),
                             static_cast<float>(1.0 - beta1),
                             static_cast<float>(1.0 - beta2),
                             static_cast<float>(1.0 - lr * weight_decay),
                             static_cast<float>(factor)};
  std::vector<AdamWTensor> tensors;
  for (size_t i = 0; i < count; ++i) {
    const Tensor &p = params[i], &step = steps[i];
    STD_TORCH_CHECK(
        step.is_cpu() && step.numel() == 1 && step.scalar_type() == torch::headeronly::ScalarType::Float,
        "step: expected a float32 scalar on cpu");
    const double t = *static_cast<const float*>(step.data_ptr());
    tensors.push_back({dtype_of(p), p.numel(), like("grad", grads[i], p), like("param", p, p),
                       like("exp_avg", exp_avgs[i], p), like("exp_avg_sq", exp_avg_sqs[i], p),
                       static_cast<float>(lr / (1.0 - std::pow(beta1, t))),
                       static_cast<float>(1.0 / std::sqrt(1.0 - std::pow(beta2, t)))});
  }
  const AdamWKernels& kernel = kernels(isa);
  const std::vector<Run> runs = runs_of(params);
  run_tasks(static_cast<int64_t>(runs.size()), 0, [&](int64_t i, void*) {
    const Run& run = runs[static_cast<size_t>(i)];
    kernel.step(tensors[run.tensor], options, run.first, run.end);
  });
}

}  // namespace fastattn
