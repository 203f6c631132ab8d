// SPDX-License-Identifier: BSD-3-Clause
// out = residual + dropout(x), row by row.
#include "common/philox.h"
#include "linear/gemm.inl"

namespace fastattn::FASTATTN_ISA {
namespace {

void dropout_add(const DropoutProblem& p, int64_t first, int64_t end) {
  const float kept_factor = 65536.0f / static_cast<float>(65536 - p.drop_threshold);
  with_element(p.x.dtype, [&]<class T>(T) {
    for (int64_t r = first; r < end; ++r) {
      const auto put = [&](int64_t c, vf x) {
        const int64_t n = p.columns - c;
        if (p.residual.data) x += load_as_float(at<const T>(p.residual, r, c), n);
        store_from_float(at<T>(p.out, r, c), x, n);
      };
      const auto x = [&](int64_t c) { return load_as_float(at<const T>(p.x, r, c), p.columns - c); };
      if (p.drop_threshold == 0)
        for (int64_t c = 0; c < p.columns; c += W) put(c, x(c));
      else
        for_kept_in_row(p.seed, r, p.columns, p.drop_threshold,
                        [&](int64_t c, vi kept) { put(c, select(kept, x(c) * kept_factor, vf{})); });
    }
  });
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
