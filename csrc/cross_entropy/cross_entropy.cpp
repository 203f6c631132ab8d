// SPDX-License-Identifier: BSD-3-Clause
// From tensors to rows of logits: checks, the choice of instruction set, and the split into tasks.
#include "cross_entropy/cross_entropy.h"

#include <torch/csrc/stable/library.h>

#include "common/tasks.h"
#include "cross_entropy/problem.h"

namespace fastattn {
namespace {

using torch::headeronly::ScalarType;

const CrossEntropyKernels& kernels(int64_t isa) {
#if defined(__x86_64__)
  return kernels_of(isa, kCrossEntropyScalar, kCrossEntropyAvx2, kCrossEntropyAvx512, kCrossEntropyWide);
#else
  return kernels_of(isa, kCrossEntropyScalar, kCrossEntropyScalar, kCrossEntropyScalar, kCrossEntropyScalar);
#endif
}

void check_rows(const char* name, const Tensor& x, int64_t rows, int64_t classes) {
  STD_TORCH_CHECK(x.dim() == 2 && x.is_cpu() && x.size(0) == rows && x.size(1) == classes, name,
                  ": expected [", rows, ", ", classes, "] on cpu");
  STD_TORCH_CHECK(x.stride(1) == 1 || classes <= 1, name, ": expected rows with a unit stride");
}

const void* vector_of(const char* name, const Tensor& x, int64_t size, ScalarType type,
                      bool any_stride = false) {
  STD_TORCH_CHECK(x.dim() == 1 && x.is_cpu() && x.size(0) == size && x.scalar_type() == type, name,
                  ": expected [", size, "] on cpu, of its dtype");
  STD_TORCH_CHECK(any_stride || x.stride(0) == 1 || size <= 1, name, ": expected a unit stride");
  return x.data_ptr();
}

float* floats(const char* name, const Tensor& x, int64_t size) {
  return static_cast<float*>(const_cast<void*>(vector_of(name, x, size, ScalarType::Float)));
}

// task(row) for every row, some thousand logits at a time.
template <class Task>
void for_rows(int64_t rows, int64_t classes, const Task& task) {
  constexpr int64_t kLogits = 16384;
  const int64_t together = classes < kLogits ? kLogits / classes : 1;
  run_tasks((rows + together - 1) / together, 0, [&](int64_t i, void*) {
    const int64_t end = (i + 1) * together < rows ? (i + 1) * together : rows;
    for (int64_t r = i * together; r < end; ++r) task(r);
  });
}

}  // namespace

void cross_entropy(const Tensor& logits, const Tensor& target, const OptionalTensor& weight,
                   const OptionalTensor& dloss, int64_t ignore_index, double label_smoothing, double softcap,
                   double z_loss, int64_t isa, const OptionalTensor& loss, const Tensor& lse,
                   const OptionalTensor& dlogits) {
  CrossEntropyProblem p{};
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0, "logits: expected [rows, classes]");
  p.rows = logits.size(0), p.classes = logits.size(1);
  check_rows("logits", logits, p.rows, p.classes);
  p.logits = logits.data_ptr(), p.dtype = dtype_of(logits), p.stride = logits.stride(0);
  p.target = static_cast<const int64_t*>(vector_of("target", target, p.rows, ScalarType::Long));
  for (int64_t r = 0; r < p.rows; ++r)
    STD_TORCH_CHECK(p.target[r] == ignore_index || (p.target[r] >= 0 && p.target[r] < p.classes),
                    "target: ", p.target[r], " is out of bounds");
  p.weight_sum = static_cast<float>(p.classes);
  if (weight) {
    p.weight = floats("weight", *weight, p.classes);
    double sum = 0;
    for (int64_t c = 0; c < p.classes; ++c) sum += p.weight[c];
    p.weight_sum = static_cast<float>(sum);
  }
  p.ignore_index = ignore_index;
  p.label_smoothing = static_cast<float>(label_smoothing);
  p.softcap = static_cast<float>(softcap), p.z_loss = static_cast<float>(z_loss);
  p.lse = floats("lse", lse, p.rows);
  if (loss) p.loss = floats("loss", *loss, p.rows);
  if (dlogits) {
    check_rows("dlogits", *dlogits, p.rows, p.classes);
    STD_TORCH_CHECK(dtype_of(*dlogits) == p.dtype, "dlogits: expected logits' dtype");
    p.dlogits = dlogits->mutable_data_ptr(), p.dlogits_stride = dlogits->stride(0);
    STD_TORCH_CHECK(dloss, "dloss: expected for a gradient");
    p.dloss = static_cast<const float*>(vector_of("dloss", *dloss, p.rows, ScalarType::Float, true));
    p.dloss_stride = dloss->stride(0);
  }
  const CrossEntropyKernels& kernel = kernels(isa);
  for_rows(p.rows, p.classes, [&](int64_t r) { kernel.cross_entropy(p, r); });
}

void kl_div(const Tensor& student, const Tensor& teacher, const OptionalTensor& dloss, double temperature,
            int64_t isa, const Tensor& loss) {
  KlDivProblem p{};
  STD_TORCH_CHECK(student.dim() == 2 && student.size(1) > 0, "student: expected [rows, classes]");
  p.rows = student.size(0), p.classes = student.size(1);
  check_rows("student", student, p.rows, p.classes), check_rows("teacher", teacher, p.rows, p.classes);
  STD_TORCH_CHECK(student.scalar_type() == ScalarType::Float && teacher.scalar_type() == ScalarType::Float,
                  "expected logits in float32");
  p.student = static_cast<float*>(student.mutable_data_ptr());
  p.teacher = static_cast<const float*>(teacher.data_ptr());
  p.student_stride = student.stride(0), p.teacher_stride = teacher.stride(0);
  p.temperature = static_cast<float>(temperature);
  p.loss = floats("loss", loss, p.rows);
  if (dloss) {
    p.dloss = static_cast<const float*>(vector_of("dloss", *dloss, p.rows, ScalarType::Float, true));
    p.dloss_stride = dloss->stride(0);
  }
  const CrossEntropyKernels& kernel = kernels(isa);
  for_rows(p.rows, p.classes, [&](int64_t r) { kernel.kl_div(p, r); });
}

}  // namespace fastattn
