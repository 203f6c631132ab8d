// SPDX-License-Identifier: BSD-3-Clause
// Loss and gradient of a row of logits: one pass for the statistics, one for the gradient.
#include "cross_entropy/row.inl"

namespace fastattn::FASTATTN_ISA {
namespace {

template <bool CAPPED>
FASTATTN_INLINE vf score(vf x, float cap) {
  if constexpr (CAPPED) return tanh(x * (1.0f / cap)) * cap;
  return x;
}
template <bool CAPPED>
FASTATTN_INLINE float score(float x, float cap) {
  return score<CAPPED>(broadcast(x), cap)[0];
}

template <class T>
FASTATTN_INLINE float element(const T* x) {
  return load_as_float(x, 1)[0];
}

FASTATTN_INLINE vf class_weights(const CrossEntropyProblem& p, int64_t c, int64_t n) {
  return p.weight ? load_as_float(p.weight + c, n) : broadcast(1.0f);
}

struct RowStatistics {
  float lse, weighted;  // log Σ exp S, Σ w_j · S_j
};

// `weighted` is 0 without label smoothing: a class of score -inf would make it so.
template <class T, bool CAPPED>
FASTATTN_INLINE RowStatistics statistics(const CrossEntropyProblem& p, const T* x) {
  OnlineSum total;
  vf weighted{};
  for (int64_t begin = 0; begin < p.classes; begin += kBlock) {
    const int64_t end = begin + kBlock < p.classes ? begin + kBlock : p.classes;
    total.raise(score<CAPPED>(row_max(x, begin, end), p.softcap), 1.0f);
    const vf base = broadcast(total.base());
    vf sum{};
    for_vectors(begin, end, [&](int64_t c, int64_t n, auto whole) {
      const vf s = score<CAPPED>(load_there(x + c, n, whole), p.softcap);
      sum += there(exp2((s - base) * kLog2e), n, whole, 0.0f);
    });
    total.sum += horizontal_sum(sum);
    if (p.label_smoothing != 0.0f)
      for_vectors(begin, end, [&](int64_t c, int64_t n, auto whole) {
        const vf s = score<CAPPED>(load_there(x + c, n, whole), p.softcap);
        weighted += there(s * class_weights(p, c, n), n, whole, 0.0f);
      });
  }
  return {total.log(1.0f), horizontal_sum(weighted)};
}

// The factors of a row's terms.
struct Terms {
  float target;  // (1 - e) · w_y
  float flat;    // e / V
  float z;       // z · w_y
};

FASTATTN_INLINE Terms terms(const CrossEntropyProblem& p, int64_t y) {
  const float w = p.weight ? p.weight[y] : 1.0f;
  return {(1.0f - p.label_smoothing) * w, p.label_smoothing / static_cast<float>(p.classes), p.z_loss * w};
}

// dS_j = a · exp(S_j - lse) - e / V · w_j - [j = y] · (1 - e) · w_y, all times dloss; and dx = dS · (1 - (S /
// c)²).
template <class T, bool CAPPED>
FASTATTN_INLINE void gradient(const CrossEntropyProblem& p, const T* x, int64_t y, float lse, float dloss,
                              T* dx) {
  const Terms of = terms(p, y);
  const float a = dloss * (of.target + of.flat * p.weight_sum + 2.0f * of.z * lse), flat = dloss * of.flat;
  const auto derivative = [&](vf s, vf w, float target) {
    vf ds = exp2((s - lse) * kLog2e) * a - w * flat - target;
    if constexpr (CAPPED) ds *= 1.0f - s * s * (1.0f / (p.softcap * p.softcap));
    return ds;
  };
  const vf at_target = derivative(broadcast(score<CAPPED>(element(x + y), p.softcap)),
                                  broadcast(p.weight ? p.weight[y] : 1.0f), dloss * of.target);
  const auto pass = [&](const auto& weights) {
    for_vectors(0, p.classes, [&](int64_t c, int64_t n, auto whole) {
      const vf s = score<CAPPED>(load_there(x + c, n, whole), p.softcap);
      store_there(dx + c, derivative(s, weights(c, n), 0.0f), n, whole);
    });
  };
  if (p.weight && flat != 0.0f)
    pass([&](int64_t c, int64_t n) { return load_as_float(p.weight + c, n); });
  else
    pass([&](int64_t, int64_t) { return broadcast(1.0f); });
  store_from_float(dx + y, at_target, 1);
}

template <class T, bool CAPPED>
void row(const CrossEntropyProblem& p, int64_t r) {
  const T* x = static_cast<const T*>(p.logits) + r * p.stride;
  T* dx = p.dlogits ? static_cast<T*>(p.dlogits) + r * p.dlogits_stride : nullptr;
  const int64_t y = p.target[r];
  if (y == p.ignore_index) {
    if (p.loss) p.loss[r] = p.lse[r] = 0.0f;
    if (dx)
      for_vectors(0, p.classes,
                  [&](int64_t c, int64_t n, auto whole) { store_there(dx + c, vf{}, n, whole); });
    return;
  }
  if (p.loss) {
    const RowStatistics found = statistics<T, CAPPED>(p, x);
    const Terms of = terms(p, y);
    const float lse = found.lse, s = score<CAPPED>(element(x + y), p.softcap);
    float loss = of.target * (lse - s) + of.z * lse * lse;
    if (p.label_smoothing != 0.0f) loss += of.flat * (p.weight_sum * lse - found.weighted);
    p.loss[r] = loss, p.lse[r] = lse;
  }
  if (dx) gradient<T, CAPPED>(p, x, y, p.lse[r], p.dloss[r * p.dloss_stride], dx);
}

void cross_entropy(const CrossEntropyProblem& p, int64_t r) {
  const auto of = [&]<class T>(T) { p.softcap > 0.0f ? row<T, true>(p, r) : row<T, false>(p, r); };
  if (p.dtype == Dtype::kFloat32) return of(float{});
  if (p.dtype == Dtype::kBFloat16) return of(bf16{});
  of(f16{});
}

void kl_div(const KlDivProblem& p, int64_t r) {
  float* s = p.student + r * p.student_stride;
  const float* t = p.teacher + r * p.teacher_stride;
  const float over_t = 1.0f / p.temperature, factor = over_t * kLog2e;
  OnlineSum of_s, of_t;
  float cross = 0.0f;  // Σ p_j · (t_j - s_j), as `of_t.sum`
  for (int64_t begin = 0; begin < p.classes; begin += kBlock) {
    const int64_t end = begin + kBlock < p.classes ? begin + kBlock : p.classes;
    of_s.raise(row_max(s, begin, end), over_t);
    cross *= of_t.raise(row_max(t, begin, end), over_t);
    const vf s_base = broadcast(of_s.base()), t_base = broadcast(of_t.base());
    vf s_sum{}, t_sum{}, cross_sum{};
    for_vectors(begin, end, [&](int64_t c, int64_t n, auto whole) {
      const vf sj = load_there(s + c, n, whole), tj = load_there(t + c, n, whole);
      const vf weight = there(exp2((tj - t_base) * factor), n, whole, 0.0f);
      s_sum += there(exp2((sj - s_base) * factor), n, whole, 0.0f);
      t_sum += weight;
      cross_sum += select(weight == 0.0f, vf{}, weight * (tj - sj));  // of 0 · inf: 0
    });
    of_s.sum += horizontal_sum(s_sum), of_t.sum += horizontal_sum(t_sum), cross += horizontal_sum(cross_sum);
  }
  const float s_lse = of_s.log(over_t), t_lse = of_t.log(over_t);
  const float square = p.temperature * p.temperature;
  p.loss[r] = square * (cross / of_t.sum * over_t - t_lse + s_lse);
  if (!p.dloss) return;
  const float g = p.dloss[r * p.dloss_stride] * p.temperature;
  if (g == 0.0f)  // of a row that does not count, whatever it holds
    return for_vectors(0, p.classes,
                       [&](int64_t c, int64_t n, auto whole) { store_there(s + c, vf{}, n, whole); });
  const float s_shift = s_lse * kLog2e, t_shift = t_lse * kLog2e;
  for_vectors(0, p.classes, [&](int64_t c, int64_t n, auto whole) {
    const vf q = exp2(load_there(s + c, n, whole) * factor - s_shift);
    const vf of_teacher = exp2(load_there(t + c, n, whole) * factor - t_shift);
    store_there(s + c, g * (q - of_teacher), n, whole);
  });
}

constexpr CrossEntropyKernels kCrossEntropyKernels = {cross_entropy, kl_div};

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
