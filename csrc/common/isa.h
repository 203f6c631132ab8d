// SPDX-License-Identifier: BSD-3-Clause
// The instruction sets the kernels are compiled for, and which of them this CPU has.
#pragma once
#include <cstdint>

namespace fastattn {

// Ids as in fastattn/_backends.py.
enum Isa : int64_t {
  kScalar = 0,  // what the compiler makes of 4-lane vectors on the baseline of the platform
  kAvx2 = 1,    // AVX2, FMA, F16C
  kAvx512 = 2,  // AVX-512 F, BW, DQ, VL
  kWide = 3,    // the 16-lane body on AVX2: for its results, not for speed
  kIsaCount = 4,
};

inline bool isa_present(int64_t isa) {
  if (isa == kScalar) return true;
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (isa == kAvx2 || isa == kWide) return avx2;
  if (isa == kAvx512)
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
#endif
  return false;
}

}  // namespace fastattn
