// SPDX-License-Identifier: BSD-3-Clause
// Philox-4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011) for dropout by
// position.
//
// The layout, the same in every backend (fastattn/ops/philox.py):
//   key      seed, low then high 32 bits
//   counter  word 3 = batch, word 2 = query head, word 1 = query position,
//            word 0 = 16 · (key position / 128) + lane, lane = key position mod 16
//   result   four words = eight 16-bit numbers, t = 0 … 7, the low half of a word first:
//            number t belongs to key position 128 · group + 16 · t + lane
// So 16 consecutive counters serve 128 keys, and 16 neighbouring keys are 16 neighbouring lanes: no shuffle.
// A key is dropped where its number is below round(65536 · dropout).
#pragma once
#include "common/vec.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int kPhiloxGroup = 128;

typedef uint32_t vw __attribute__((vector_size(2 * W)));  // as many lanes as vq has
typedef uint32_t vw_any __attribute__((vector_size(2 * W), aligned(4), may_alias));

// Product of the low 32 bits of each 64-bit lane.
FASTATTN_INLINE vq multiply_low32(vq a, vq b) {
#if defined(__AVX512F__) && FASTATTN_LANES == 16
  return reinterpret_cast<vq>(_mm512_mul_epu32(reinterpret_cast<__m512i>(a), reinterpret_cast<__m512i>(b)));
#elif defined(__AVX2__) && FASTATTN_LANES == 8
  return reinterpret_cast<vq>(_mm256_mul_epu32(reinterpret_cast<__m256i>(a), reinterpret_cast<__m256i>(b)));
#else
  return (a & 0xffffffffu) * (b & 0xffffffffu);
#endif
}

// The 16-bit numbers of one row's 128 keys from 128 · group, as numbers[16 · t + lane] of kPhiloxGroup.
FASTATTN_INLINE void philox_group(uint64_t seed, uint32_t batch, uint32_t head, uint32_t query,
                                  uint32_t group, uint32_t* numbers) {
  constexpr int H = W / 2;  // counters a call
  for (int lane = 0; lane < 16; lane += H) {
    vq c0, c1 = vq{} + query, c2 = vq{} + head, c3 = vq{} + batch;
    for (int i = 0; i < H; ++i) c0[i] = static_cast<uint64_t>(i);
    c0 += uint64_t{16} * group + static_cast<uint64_t>(lane);
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    // Only the low 32 bits of a lane count; what a round leaves above them is never read.
#pragma GCC unroll 10
    for (int round = 0; round < 10; ++round) {
      const vq p0 = multiply_low32(c0, vq{} + 0xD2511F53u), p1 = multiply_low32(c2, vq{} + 0xCD9E8D57u);
      c0 = (p1 >> 32) ^ c1 ^ (vq{} + k0);
      c1 = p1;
      c2 = (p0 >> 32) ^ c3 ^ (vq{} + k1);
      c3 = p0;
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    const vq words[4] = {c0, c1, c2, c3};
#pragma GCC unroll 4
    for (int w = 0; w < 4; ++w) {
      const vq low = words[w] & 0xffff, high = (words[w] >> 16) & 0xffff;
      *reinterpret_cast<vw_any*>(numbers + 32 * w + lane) = __builtin_convertvector(low, vw);
      *reinterpret_cast<vw_any*>(numbers + 32 * w + 16 + lane) = __builtin_convertvector(high, vw);
    }
  }
}

// Calls f(c, kept) for each W columns of a row, kept a mask of lanes: batch 0, head 0, query `row`, keys the
// columns.
template <class F>
FASTATTN_INLINE void for_kept_in_row(uint64_t seed, int64_t row, int64_t columns, uint32_t drop_threshold,
                                     const F& f) {
  // Many groups before the first is read: it was stored in halves, which no load of the whole is served from.
  constexpr int64_t kColumns = 8 * kPhiloxGroup;
  uint32_t numbers[kColumns];
  for (int64_t c = 0; c < columns; c += kColumns) {
    const int64_t end = columns - c < kColumns ? columns - c : kColumns;
    for (int64_t g = 0; g < end; g += kPhiloxGroup)
      philox_group(seed, 0, 0, static_cast<uint32_t>(row), static_cast<uint32_t>((c + g) / kPhiloxGroup),
                   numbers + g);
    for (int64_t i = 0; i < end; i += W) {
      const vu x = *reinterpret_cast<const vu_any*>(numbers + i);
      f(c + i, reinterpret_cast<vi>(x >= vu{} + drop_threshold));
    }
  }
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
