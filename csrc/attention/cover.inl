// SPDX-License-Identifier: BSD-3-Clause
// Which keys a query sees, and which panels of a strip of scores are worth computing.
#pragma once
#include "attention/problem.h"
#include "common/gemm.h"

namespace fastattn::FASTATTN_ISA {
namespace {

constexpr int64_t kMaxKeyBlock = 256;
static_assert(kMaxKeyBlock / PANEL <= 64, "a block's panels are bits of a word");

template <class T>
FASTATTN_INLINE const T* at(const Scores& x, int64_t batch, int64_t head, int64_t query, int64_t key) {
  return static_cast<const T*>(x.data) + batch * x.batch + head * x.head + query * x.row + key * x.column;
}

// Keys from first to before end; none: both 0.
struct Range {
  int64_t first, end;
};
FASTATTN_INLINE Range meet(Range a, Range b) {
  const Range both{max(a.first, b.first), min(a.end, b.end)};
  return both.first < both.end ? both : Range{0, 0};
}

// What the band leaves a query; neither end decreases with `query`.
FASTATTN_INLINE Range band(const AttentionProblem& p, int64_t query) {
  const int64_t own = query + p.diagonal;
  return {p.left < 0 ? 0 : max(own - p.left, 0),
          p.right < 0 ? p.k_length : min(max(own + p.right + 1, 0), p.k_length)};
}
// Pair `i` of a query.
FASTATTN_INLINE Range pair(const Ranges& x, int64_t batch, int64_t i, int64_t query) {
  const int32_t* at = x.data + batch * x.batch + i * x.pair + query * x.row;
  return {at[0], at[1]};
}

// The keys from the first to the last that any of `rows` queries sees by band and ranges.
Range seen(const AttentionProblem& p, int64_t batch, int64_t query, int64_t rows) {
  const Range all = meet({band(p, query).first, band(p, query + rows - 1).end}, {0, p.k_length});
  if (!p.ranges.data) return all;
  Range any{p.k_length, 0};
  if (p.ranges.row == 0) rows = 1;
  for (int64_t i = 0; i < p.ranges.count; ++i)
    for (int64_t r = 0; r < rows; ++r) {
      const Range x = pair(p.ranges, batch, i, query + r);
      if (x.first < x.end) any = {min(any.first, x.first), max(any.end, x.end)};
    }
  return meet(all, any);
}

enum class Cover { kNone, kSome, kAll };

FASTATTN_INLINE Cover cover_of(bool any, bool all) {
  return all ? Cover::kAll : any ? Cover::kSome : Cover::kNone;
}
FASTATTN_INLINE Cover both(Cover a, Cover b) {
  if (a == Cover::kNone || b == Cover::kNone) return Cover::kNone;
  return a == Cover::kAll && b == Cover::kAll ? Cover::kAll : Cover::kSome;
}

// How much of rows x keys the ranges keep.
Cover ranges_cover(const AttentionProblem& p, int64_t batch, int64_t query, int64_t rows, Range keys) {
  const Ranges& x = p.ranges;
  bool any = false, all = true;
  if (x.row == 0) rows = 1;
  for (int64_t r = 0; r < rows; ++r) {
    bool whole = false;
    for (int64_t i = 0; i < x.count; ++i) {
      const Range one = pair(x, batch, i, query + r);
      any |= one.first < keys.end && one.end > keys.first && one.first < one.end;
      whole |= one.first <= keys.first && one.end >= keys.end;
    }
    all &= whole;
  }
  return cover_of(any, all);
}

// How much of rows x keys a matrix of bytes keeps.
Cover bytes_cover(const Scores& m, int64_t batch, int64_t head, Range queries, Range keys) {
  uint8_t any = 0, all = 1;
  if (m.row == 0) queries.end = queries.first + 1;
  if (m.column == 0) keys.end = keys.first + 1;
  for (int64_t q = queries.first; q < queries.end; ++q) {
    const uint8_t* x = at<uint8_t>(m, batch, head, q, keys.first);
    const int64_t columns = keys.end - keys.first;
    if (m.column == 1) {
      for (int64_t c = 0; c < columns; ++c) any |= x[c], all &= x[c];
    } else {
      for (int64_t c = 0; c < columns; ++c) any |= x[c * m.column], all &= x[c * m.column];
    }
  }
  return cover_of(any, all);
}

// The panels of a block of keys, a bit each: those of which any, and those of which every score is kept.
struct Panels {
  uint64_t some, all;
};

// Of `rows` queries and the block of `keys` keys from `key`.
Panels panels(const AttentionProblem& p, int64_t batch, int64_t head, int64_t query, int64_t rows,
              int64_t key, int64_t keys) {
  const Range any = meet(seen(p, batch, query, rows), {key, key + keys});
  if (any.first >= any.end) return {0, 0};
  const Range every{band(p, query + rows - 1).first, band(p, query).end};
  const bool plain = !p.ranges.data && !p.blocks.data && !p.mask.data;
  const Range block_rows =
      p.blocks.data ? Range{query / p.block_q, (query + rows - 1) / p.block_q + 1} : Range{};
  Range columns{0, 0};  // of blocks, that the last panel was in
  Cover in_blocks = Cover::kAll;
  Panels found{0, 0};
  for (int64_t i = (any.first - key) / PANEL; key + i * PANEL < any.end; ++i) {
    const Range panel{key + i * PANEL, key + (i + 1) * PANEL};
    Cover cover = every.first <= panel.first && panel.end <= every.end ? Cover::kAll : Cover::kSome;
    if (!plain) {
      const Range there = meet(panel, {0, p.k_length});
      if (p.blocks.data) {
        const Range now{there.first / p.block_k, (there.end - 1) / p.block_k + 1};
        if (now.first != columns.first || now.end != columns.end)
          columns = now, in_blocks = bytes_cover(p.blocks, batch, head, block_rows, columns);
        cover = both(cover, in_blocks);
      }
      if (p.ranges.data && cover != Cover::kNone)
        cover = both(cover, ranges_cover(p, batch, query, rows, panel));
      if (p.mask.data && cover != Cover::kNone)
        cover = both(cover, bytes_cover(p.mask, batch, head, {query, query + rows}, there));
    }
    if (cover != Cover::kNone) found.some |= uint64_t{1} << i;
    if (cover == Cover::kAll) found.all |= uint64_t{1} << i;
  }
  return found;
}

// Calls f(first, end) for each run of columns whose panels are set.
template <class F>
FASTATTN_INLINE void for_runs(uint64_t set, const F& f) {
  int64_t from = 0;
  while (set) {
    const int skip = __builtin_ctzll(set);
    set >>= skip;
    const int length = ~set ? __builtin_ctzll(~set) : 64;
    set = length < 64 ? set >> length : 0;
    f((from + skip) * PANEL, (from + skip + length) * PANEL);
    from += skip + length;
  }
}

}  // namespace
}  // namespace fastattn::FASTATTN_ISA
