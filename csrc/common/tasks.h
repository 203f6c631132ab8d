// SPDX-License-Identifier: BSD-3-Clause
// Tasks of uneven size on torch's own thread pool.
#pragma once
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <atomic>
#include <cstdint>

namespace fastattn {

// Runs task(0 … count-1, scratch) on as many threads as torch is set to use. Threads claim tasks in
// increasing order, so a task may wait for one with a lower number. Each thread has `scratch_bytes` of its
// own, 64-byte aligned.
template <class Task>
void run_tasks(int64_t count, size_t scratch_bytes, const Task& task) {
  if (count <= 0) return;
  const int64_t threads = torch::stable::get_num_threads(), workers = count < threads ? count : threads;
  const int64_t stride = static_cast<int64_t>(scratch_bytes + 63) / 64 * 64;
  const torch::stable::Tensor scratch =
      torch::stable::empty({workers * stride + 64}, torch::headeronly::ScalarType::Byte);
  char* base = static_cast<char*>(scratch.mutable_data_ptr());
  base += (64 - reinterpret_cast<uintptr_t>(base) % 64) % 64;

  std::atomic<int64_t> next{0};
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    for (int64_t worker = begin; worker < end; ++worker)
      for (int64_t i = next.fetch_add(1); i < count; i = next.fetch_add(1)) task(i, base + worker * stride);
  });
}

}  // namespace fastattn
