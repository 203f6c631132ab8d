// SPDX-License-Identifier: BSD-3-Clause
// One instruction set's table of kernels.
#include "layer_norm/backward.inl"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr NormKernels kNormKernels = {norm_forward, norm_backward, add_up};

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
