// SPDX-License-Identifier: BSD-3-Clause
// Vectors of FASTATTN_LANES floats, in the compiler's own vector types: one source for every instruction set.
// A translation unit sets FASTATTN_ISA (a namespace) and FASTATTN_LANES before it includes this. Everything
// is in an unnamed namespace, so that no inline function compiled for one instruction set is linked for
// another.
#pragma once
#include <cstdint>
#include <cstring>
#include <utility>
#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif

#define FASTATTN_INLINE inline __attribute__((always_inline))

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int W = FASTATTN_LANES;

typedef float vf __attribute__((vector_size(4 * W)));
typedef int32_t vi __attribute__((vector_size(4 * W)));
typedef uint32_t vu __attribute__((vector_size(4 * W)));
typedef uint64_t vq __attribute__((vector_size(4 * W)));  // W / 2 lanes
typedef uint16_t vh __attribute__((vector_size(2 * W)));
typedef int8_t vb8_any __attribute__((vector_size(W), aligned(1), may_alias));
typedef float vf_any __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint32_t vu_any __attribute__((vector_size(4 * W), aligned(4), may_alias));
typedef uint16_t vh_any __attribute__((vector_size(2 * W), aligned(2), may_alias));

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};
struct e4m3 {
  uint8_t bits;
};

constexpr float kInf = __builtin_inff();

FASTATTN_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_any*>(p); }
FASTATTN_INLINE void store(float* p, vf x) { *reinterpret_cast<vf_any*>(p) = x; }
FASTATTN_INLINE vf broadcast(float x) { return x - vf{}; }  // x - 0 keeps -0
// Where either is NaN: b.
FASTATTN_INLINE vf max(vf a, vf b) { return a > b ? a : b; }
FASTATTN_INLINE vf select(vi mask, vf a, vf b) { return mask ? a : b; }
FASTATTN_INLINE vi lane_index() {
  vi x;
  for (int i = 0; i < W; ++i) x[i] = i;
  return x;
}

FASTATTN_INLINE float horizontal_sum(vf x) {
  float part[W];
  store(part, x);
  for (int n = W / 2; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) part[i] += part[i + n];
  return part[0];
}

// 2^x for x <= 126, and exactly 0 for x <= -127 (so for -inf). Degree 5 on [-1/2, 1/2], relative error 2e-7.
FASTATTN_INLINE vf exp2(vf x) {
  const vf floor = broadcast(-127.0f);
  x = floor > x ? floor : x;                // in this order a NaN stays
  const vf magic = broadcast(12582912.0f);  // 1.5 · 2^23: adding it rounds to an integer
  const vf n = x + magic;
  const vf f = x - (n - magic);
  vf p = broadcast(1.32647271e-3f);
  p = p * f + 9.67151265e-3f;
  p = p * f + 5.55073374e-2f;
  p = p * f + 2.40222421e-1f;
  p = p * f + 6.93146978e-1f;
  p = p * f + 1.0f;
  return reinterpret_cast<vf>(reinterpret_cast<vi>(p) + (reinterpret_cast<vi>(n) << 23));
}

// ---- float32 from and to memory of any element type; n < W elements leave the rest 0.

FASTATTN_INLINE vf widen(vh x, bf16) { return reinterpret_cast<vf>(__builtin_convertvector(x, vu) << 16); }

FASTATTN_INLINE vf widen(vh x, f16) {
#if defined(__AVX512F__) && FASTATTN_LANES == 16
  return reinterpret_cast<vf>(_mm512_cvtph_ps(reinterpret_cast<__m256i>(x)));
#elif defined(__F16C__) && FASTATTN_LANES == 8
  return reinterpret_cast<vf>(_mm256_cvtph_ps(reinterpret_cast<__m128i>(x)));
#else
  // Place exponent and mantissa, then let a product move the bias (15 to 127): subnormals come out right.
  const vu bits = __builtin_convertvector(x, vu);
  const vf magnitude = reinterpret_cast<vf>((bits & 0x7fff) << 13) * 0x1p112f;
  const vi special = reinterpret_cast<vi>((bits & 0x7c00) == 0x7c00);
  const vu inf_or_nan = 0x7f800000 | ((bits & 0x3ff) << 13);
  const vu value = special ? inf_or_nan : reinterpret_cast<vu>(magnitude);
  return reinterpret_cast<vf>(value | ((bits & 0x8000) << 16));
#endif
}

// Round to nearest, ties to even.
FASTATTN_INLINE vh narrow(vf x, bf16) {
  const vu bits = reinterpret_cast<vu>(x);
  const vu rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  const vu quiet = (bits >> 16) | 0x40;
  return __builtin_convertvector(x == x ? rounded : quiet, vh);
}

FASTATTN_INLINE uint16_t narrow_scalar(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000, magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);   // NaN
  if (magnitude >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // rounds to inf
  if (magnitude < 0x38800000) {  // subnormal: adding 2^-1 puts the rounded mantissa in the low bits
    float y;
    memcpy(&y, &magnitude, 4);
    y += 0.5f;
    memcpy(&bits, &y, 4);
    return static_cast<uint16_t>(sign | (bits - 0x3f000000));
  }
  const uint32_t odd = (magnitude >> 13) & 1;
  return static_cast<uint16_t>(sign | ((magnitude - 0x38000000 + 0xfff + odd) >> 13));
}

FASTATTN_INLINE vh narrow(vf x, f16) {
#if defined(__AVX512F__) && FASTATTN_LANES == 16
  return reinterpret_cast<vh>(_mm512_cvtps_ph(reinterpret_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__) && FASTATTN_LANES == 8
  return reinterpret_cast<vh>(_mm256_cvtps_ph(reinterpret_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT));
#else
  vh y;
  for (int i = 0; i < W; ++i) y[i] = narrow_scalar(x[i]);
  return y;
#endif
}

FASTATTN_INLINE vf load_as_float(const float* p) { return load(p); }
// W bytes as 32-bit integers: the compiler takes a conversion of bytes apart, lane by lane.
FASTATTN_INLINE vi widen_bytes(const int8_t* p) {
#if defined(__AVX512F__) && FASTATTN_LANES == 16
  return reinterpret_cast<vi>(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(__AVX2__) && FASTATTN_LANES == 8
  return reinterpret_cast<vi>(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
  return __builtin_convertvector(*reinterpret_cast<const vb8_any*>(p), vi);
#endif
}
FASTATTN_INLINE vf load_as_float(const int8_t* p) { return __builtin_convertvector(widen_bytes(p), vf); }
FASTATTN_INLINE vf load_as_float(const e4m3* p) {
  // Exponent and mantissa in place, then a product moves the bias (7 to 127). 0x7f is NaN.
  const vu x = reinterpret_cast<vu>(widen_bytes(reinterpret_cast<const int8_t*>(p)));
  const vf size = reinterpret_cast<vf>((x & 0x7f) << 20) * 0x1p120f;
  const vu bits = (x & 0x7f) == 0x7f ? vu{} + 0x7fc00000u : reinterpret_cast<vu>(size);
  return reinterpret_cast<vf>(bits | ((x & 0x80) << 24));
}
template <class T>
FASTATTN_INLINE vf load_as_float(const T* p) {
  return widen(*reinterpret_cast<const vh_any*>(p), T{});
}
FASTATTN_INLINE void store_from_float(float* p, vf x) { store(p, x); }
template <class T>
FASTATTN_INLINE void store_from_float(T* p, vf x) {
  *reinterpret_cast<vh_any*>(p) = narrow(x, T{});
}

template <class T>
FASTATTN_INLINE vf load_as_float(const T* p, int64_t n) {
  if (n >= W) return load_as_float(p);
  alignas(64) T part[W];
  memset(part, 0, sizeof part);
  memcpy(part, p, static_cast<size_t>(n) * sizeof(T));
  return load_as_float(part);
}
template <class T>
FASTATTN_INLINE void store_from_float(T* p, vf x, int64_t n) {
  if (n >= W) return store_from_float(p, x);
  alignas(64) T part[W];
  store_from_float(part, x);
  memcpy(p, part, static_cast<size_t>(n) * sizeof(T));
}

// ---- W x W transpose in registers: log2(W) rounds of interleaving row i with row i + W / 2.

template <int... I>
FASTATTN_INLINE vf interleave_low(vf a, vf b, std::integer_sequence<int, I...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, (I % 2 ? W + I / 2 : I / 2)...);
#else
  return __builtin_shuffle(a, b, vi{(I % 2 ? W + I / 2 : I / 2)...});
#endif
}
template <int... I>
FASTATTN_INLINE vf interleave_high(vf a, vf b, std::integer_sequence<int, I...>) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, (W / 2 + (I % 2 ? W + I / 2 : I / 2))...);
#else
  return __builtin_shuffle(a, b, vi{(W / 2 + (I % 2 ? W + I / 2 : I / 2))...});
#endif
}
FASTATTN_INLINE void transpose(vf (&rows)[W]) {
  constexpr auto lanes = std::make_integer_sequence<int, W>{};
#pragma GCC unroll 4
  for (int round = 1; round < W; round *= 2) {
    vf next[W];
#pragma GCC unroll 16
    for (int i = 0; i < W / 2; ++i) {
      next[2 * i] = interleave_low(rows[i], rows[i + W / 2], lanes);
      next[2 * i + 1] = interleave_high(rows[i], rows[i + W / 2], lanes);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) rows[i] = next[i];
  }
}

// Lane i of the result is the lanes of rows[i] joined: halves are joined while rows are interleaved, which
// takes half the shuffles of a transpose.
template <class Join>
FASTATTN_INLINE vf join_lanes(vf (&rows)[W], const Join& join) {
  constexpr auto lanes = std::make_integer_sequence<int, W>{};
#pragma GCC unroll 4
  for (int n = W / 2; n > 0; n /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i)
      rows[i] =
          join(interleave_low(rows[i], rows[i + n], lanes), interleave_high(rows[i], rows[i + n], lanes));
  return rows[0];
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
