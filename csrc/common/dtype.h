// SPDX-License-Identifier: BSD-3-Clause
// Element types that kernels read and write.
#pragma once

namespace fastattn {

// The last two are of a cache of keys and values alone.
enum class Dtype : int { kFloat32, kBFloat16, kFloat16, kInt8, kFloat8E4M3 };

}  // namespace fastattn
