// SPDX-License-Identifier: BSD-3-Clause
// One instruction set's table of kernels.
#include "linear/dropout_add.inl"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr GemmKernels kGemmKernels = {blocks, PANEL, pack, multiply, dropout_add};

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
