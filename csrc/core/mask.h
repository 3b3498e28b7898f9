// Which (query, key) pairs attend, and which blocks a tile must visit: the mask rule, once.
//
// One rule covers causal, sliding window and "no mask". With the bottom-right aligned diagonal
//   diag(q) = q + seqlen_k - seqlen_q
// key k is kept for query q iff
//   diag(q) - window_left <= k <= diag(q) + window_right   and   0 <= k < seqlen_k.
// causal == {kUnbounded, 0}; no mask == {kUnbounded, kUnbounded}.
//
// Both ends of a row's keys grow with the row, so a tile of rows needs the keys from the first
// row's begin to the last row's end, and keeps all keys from the last row's begin to the first
// row's end. Everything below follows from these two sentences.
#pragma once
#include "core/host_device.h"

namespace fa {

constexpr int kUnbounded = -1;

// The mask of one sequence. Build it with mask_spec(), which makes the arithmetic below safe.
struct MaskSpec {
  int seqlen_q, seqlen_k;         // rows, keys of this sequence
  int window_left, window_right;  // keys beside the diagonal; kUnbounded turns that side off
};

// Any negative window is unbounded; a window that cuts nothing off becomes unbounded, which makes
// more blocks maskless and keeps diag - window_left and diag + window_right inside int.
// seqlen_q, seqlen_k in [0, 2^30].
FA_HD constexpr MaskSpec mask_spec(int seqlen_q, int seqlen_k, int window_left, int window_right) {
  // The last row has diag = seqlen_k - 1 and the first seqlen_k - seqlen_q: the extremes.
  const bool left_cuts = window_left >= 0 && window_left < seqlen_k - 1;
  const bool right_cuts = window_right >= 0 && window_right < seqlen_q - 1;
  return {seqlen_q, seqlen_k, left_cuts ? window_left : kUnbounded,
          right_cuts ? window_right : kUnbounded};
}

// Keys that query q keeps. Rows past seqlen_q have no meaning; they get a range inside
// [0, seqlen_k) too.
FA_HD constexpr Range key_range(MaskSpec m, int q) {
  const int diag = q + (m.seqlen_k - m.seqlen_q);
  const int begin = m.window_left == kUnbounded ? 0 : clamp(diag - m.window_left, 0, m.seqlen_k);
  const int end =
      m.window_right == kUnbounded ? m.seqlen_k : clamp(diag + m.window_right + 1, 0, m.seqlen_k);
  return {begin, max(begin, end)};
}

// Queries that keep key k: the same rule read along a column, for the backward. k in
// [0, seqlen_k).
FA_HD constexpr Range query_range(MaskSpec m, int k) {
  const int q_on_diag = k - (m.seqlen_k - m.seqlen_q);
  const int begin =
      m.window_right == kUnbounded ? 0 : clamp(q_on_diag - m.window_right, 0, m.seqlen_q);
  const int end = m.window_left == kUnbounded ? m.seqlen_q
                                              : clamp(q_on_diag + m.window_left + 1, 0, m.seqlen_q);
  return {begin, max(begin, end)};
}

// Queries that keep a key.
FA_HD constexpr Range seen_queries(MaskSpec m) {
  return m.seqlen_k == 0 ? Range{0, 0}
                         : Range{query_range(m, 0).begin, query_range(m, m.seqlen_k - 1).end};
}

FA_HD constexpr bool is_kept(MaskSpec m, int q, int k) {
  return key_range(m, q).contains(k);
}

// Half-open block ranges for one tile. Every kept pair lies in [begin, end), and each of those
// blocks has a kept pair. Every pair of a block in [full_begin, full_end) is kept, so the mainloop
// skips the mask there. begin <= full_begin <= full_end <= end; an empty range is all zeros.
struct BlockRange {
  int begin, end;
  int full_begin, full_end;
  FA_HD constexpr int size() const { return end - begin; }
};

// Blocks of tile `width` over [needed.begin, needed.end), maskless inside [full.begin, full.end).
FA_HD constexpr BlockRange blocks_over(Range needed, Range full, int width) {
  if (needed.begin >= needed.end) return {0, 0, 0, 0};
  const int begin = needed.begin / width, end = ceil_div(needed.end, width);
  const int full_begin = clamp(ceil_div(full.begin, width), begin, end);
  const int full_end = clamp(full.end / width, full_begin, end);
  return {begin, end, full_begin, full_end};
}

// Key blocks that a non-empty range of queries, all inside the sequence, needs. A block with keys
// past seqlen_k is never full.
FA_HD constexpr BlockRange key_blocks(MaskSpec m, Range queries, int tile_n) {
  const Range first = key_range(m, queries.begin), last = key_range(m, queries.end - 1);
  return blocks_over({first.begin, last.end}, {last.begin, max(last.begin, first.end)}, tile_n);
}

// Forward: n_blocks that m_block visits. Rows past seqlen_q are ignored: the kernel does not store
// them.
FA_HD constexpr BlockRange n_block_range(MaskSpec m, int m_block, int tile_m, int tile_n) {
  const int q_first = m_block * tile_m;
  if (q_first >= m.seqlen_q) return {0, 0, 0, 0};
  return key_blocks(m, {q_first, min(q_first + tile_m, m.seqlen_q)}, tile_n);
}

// Backward: m_blocks that n_block visits. A block with rows past seqlen_q is never full, and
// neither is any block of the n_block that holds keys past seqlen_k: such rows and keys would add
// to dK and dQ. Hence the masked step of the backward keeps a pair iff
// q < seqlen_q && is_kept(m, q, k).
FA_HD constexpr BlockRange m_block_range(MaskSpec m, int n_block, int tile_m, int tile_n) {
  const int k_first = n_block * tile_n, k_end = k_first + tile_n;
  if (k_first >= m.seqlen_k) return {0, 0, 0, 0};
  const Range first = query_range(m, k_first);
  const Range last = query_range(m, min(k_end, m.seqlen_k) - 1);
  const bool has_tail = k_end > m.seqlen_k;
  const Range full = has_tail ? Range{0, 0} : Range{last.begin, max(last.begin, first.end)};
  return blocks_over({first.begin, last.end}, full, tile_m);
}

// The drawings in the docstring of flash_attn_func: causal, 2 x 5 and 5 x 2.
static_assert(is_kept({2, 5, kUnbounded, 0}, 0, 3) && !is_kept({2, 5, kUnbounded, 0}, 0, 4));
static_assert(is_kept({2, 5, kUnbounded, 0}, 1, 4));
static_assert(key_range({5, 2, kUnbounded, 0}, 2).size() == 0);
static_assert(is_kept({5, 2, kUnbounded, 0}, 3, 0) && !is_kept({5, 2, kUnbounded, 0}, 3, 1));

}  // namespace fa
