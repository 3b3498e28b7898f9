// What a CTA of a decode kernel has to do: its share of all key blocks, and the tiles in it,
// found on the device from the lengths of all sequences (core/decode_schedule.h).
#pragma once
#include <cuda_runtime.h>

#include "core/decode_schedule.h"
#include "core/fast_div.h"
#include "core/mask.h"
#include "core/online_softmax.h"
#include "core/params.h"
#include "core/seqlen.h"
#include "core/tile_config.h"
#include "kernels/common/append_kv.cuh"
#include "kernels/tile_counter.h"

namespace fa {

// What the launcher adds to the parameters.
struct DecodeLaunch {
  FastDiv by_group, by_m_blocks, by_page;
  float scale, softcap_scale;  // scores become scale x, or softcap_scale tanh(scale x): log2 units
  int counter_row;             // of decode_counters; kNoTileCounter: counters are in the workspace
  int tile_start;              // positions of a tile beside its blocks
  AppendKvTiles append_tiles;  // for the threads of one CTA
};

// Rows and keys of a tile, threads of a CTA, and whether new keys may be where the caller has them.
template <int kRows, int kKeys, int kNumThreads, bool kAppends>
struct DecodeShape {
  static constexpr int kTileM = kRows, kTileN = kKeys, kThreads = kNumThreads;
  static constexpr bool kMayAppend = kAppends;
};

// What all decode kernels need of it.
inline DecodeLaunch decode_launch(const DecodeParams& p) {
  const int group = p.num_heads_q / p.num_heads_kv;
  const bool capped = p.score.softcap != 0.f;
  DecodeLaunch launch{};
  launch.by_group = FastDiv(group);
  launch.by_m_blocks = FastDiv(max(1, packed_m_blocks(p.seqlens_q.max_seqlen, group, p.tile_m)));
  launch.by_page = FastDiv(max(1, p.page_size));
  launch.scale = capped ? p.score.softmax_scale / p.score.softcap : p.score.softmax_scale * kLog2e;
  launch.softcap_scale = p.score.softcap * kLog2e;
  launch.counter_row = kNoTileCounter;
  const int64_t entries = int64_t{p.batch_size} * launch.by_m_blocks.divisor();
  launch.tile_start = decode_tile_start(entries * p.num_heads_kv, p.num_ctas, p.tile_m);
  return launch;
}

// The queries of one (batch, m_block) and the keys that they need.
struct DecodeEntry {
  int batch, m_block;
  SeqlenInfo q_seq, k_seq;
  MaskSpec mask;
  BlockRange blocks;
};

// A share of one tile: blocks [begin, end) of its keys.
struct DecodeItem {
  DecodeEntry entry;
  int head_kv;
  int begin, end;
  int tile_begin, tile_end;  // positions of the whole tile in the row of all blocks
  bool is_whole;             // no other CTA has a share of the tile
  int first_cta, last_cta;   // that share the tile, if it is not whole: set by find_sharers()
  int cache;                 // row of the cache, or of the page table
  int appended_at;  // keys from here on are new: key - appended_at is its token among the new ones
  int rotary_base;  // position of the first new token
};

// Where a CTA stands in the row of all blocks.
struct DecodeCursor {
  int entry, offset;  // (batch, m_block), and a position in its tiles or in those behind it
  int position, end;  // in all of them
  WorkSplit split;
};

// Keys of a sequence after the append; leftpad cut off.
FA_DEVICE SeqlenInfo cache_seqlen_info(const DecodeParams& p, int batch) {
  const SeqlenArgs& args = p.seqlens_k;
  int used = args.max_seqlen;
  if (args.seqused != nullptr) {
    used = args.seqused[batch] + (p.cu_seqlens_new != nullptr
                                      ? p.cu_seqlens_new[batch + 1] - p.cu_seqlens_new[batch]
                                      : p.seqlen_new);
  } else if (args.cu_seqlens != nullptr) {
    used = args.cu_seqlens[batch + 1] - args.cu_seqlens[batch];
  }
  used = clamp(used, 0, args.max_seqlen);
  const int leftpad = args.leftpad == nullptr ? 0 : clamp(args.leftpad[batch], 0, used);
  return {used - leftpad, used - leftpad, leftpad, leftpad};
}

// Entry `at` of the launch: m_blocks run fastest; behind the last sequence one entry for the rows
// that belong to none. Returns false if there is no such m_block.
template <class Shape>
FA_DEVICE bool decode_entry(const DecodeParams& p, const DecodeLaunch& launch, int at,
                            DecodeEntry& entry) {
  const auto [batch, m_block] = divide(at, launch.by_m_blocks);
  entry.batch = batch;
  entry.m_block = m_block;
  entry.q_seq = seqlen_info_or_rest(p.seqlens_q, batch, p.batch_size, p.total_q);
  entry.blocks = {0, 0, 0, 0};
  if (batch >= p.batch_size) return m_block == 0 && entry.q_seq.stored > 0;
  const int group = launch.by_group.divisor();
  constexpr int kTileM = Shape::kTileM;
  if (m_block >= packed_m_blocks(entry.q_seq.stored, group, kTileM)) return false;
  entry.k_seq = cache_seqlen_info(p, batch);
  entry.mask =
      mask_spec(entry.q_seq.seqlen, entry.k_seq.seqlen, p.score.window_left, p.score.window_right);
  const int first = launch.by_group.divide(m_block * kTileM);
  const int last = launch.by_group.divide(m_block * kTileM + kTileM - 1);
  if (first < entry.q_seq.seqlen)
    entry.blocks =
        key_blocks(entry.mask, {first, min(last + 1, entry.q_seq.seqlen)}, Shape::kTileN);
  return true;
}

// Positions of one tile: its blocks; at least one, so that every tile is visited. Where several
// tiles read the same keys and a causal mask makes them differ by an eighth at most, as many as the
// last one's, so that all are cut at the same keys and CTAs read them at the same time, from L2.
template <class Shape>
FA_DEVICE int tile_positions(const DecodeParams& p, const DecodeLaunch& launch,
                             const DecodeEntry& entry) {
  if (p.num_splits == 1) return 1;
  const int blocks = entry.blocks.size();
  if (blocks <= 0) return 1;
  if (Shape::kTileM != kDecodeWgmmaRows) return blocks;
  const Range last_keys = key_range(entry.mask, entry.mask.seqlen_q - 1);
  const int most = ceil_div(last_keys.end, Shape::kTileN);
  const bool is_alike = entry.blocks.begin == 0 && 8 * blocks >= 7 * most;
  return (is_alike ? max(blocks, most) : blocks) + launch.tile_start;
}

// Shared memory beside the ring.
template <int kThreads>
struct DecodeShared {
  DecodeItem items[3];  // item i at i % 3: the one before, this one and the next; end < 0: none
  DecodeCursor cursor;
  int warp_total[kThreads / kWarpSize], warp_longest[kThreads / kWarpSize];
  bool is_last;
};

// The item at the cursor: its entry is there and has some of the offset's positions. Moves the
// cursor behind it.
template <class Shape>
FA_DEVICE void take_item(const DecodeParams& p, int positions, DecodeCursor& cursor,
                         DecodeItem& item) {
  const DecodeEntry& entry = item.entry;
  const int offset = cursor.offset;
  item.head_kv = static_cast<unsigned>(offset) / static_cast<unsigned>(positions);
  const int first = offset - item.head_kv * positions;
  const int count = min(positions - first, cursor.end - cursor.position);
  item.begin = entry.blocks.begin + first;
  item.end = p.num_splits == 1 ? entry.blocks.end : min(entry.blocks.end, item.begin + count);
  item.tile_begin = cursor.position - first;
  item.tile_end = item.tile_begin + positions;
  item.is_whole = count == positions;
  cursor.offset = offset + count;
  cursor.position += count;
  if (entry.batch >= p.batch_size) return;
  const bool paged = p.page_table != nullptr;
  const int row = p.cache_batch_idx == nullptr ? entry.batch : p.cache_batch_idx[entry.batch];
  item.cache = clamp(row, 0, (paged ? p.page_table_rows : p.num_caches) - 1);
  if constexpr (Shape::kMayAppend) {
    item.appended_at = entry.k_seq.seqlen;
    if (p.append.k == nullptr) return;
    const int cache_seqlen = p.append.cache_seqlens[entry.batch];
    item.appended_at = cache_seqlen - entry.k_seq.leftpad;
    item.rotary_base =
        p.append.rotary_seqlens == nullptr ? cache_seqlen : p.append.rotary_seqlens[entry.batch];
  }
}

// Which CTAs share the tile; one thread, apart from take_item() because of its divisions.
FA_DEVICE void find_sharers(const WorkSplit& split, DecodeItem& item) {
  if (item.is_whole) return;
  item.first_cta = split.part_of(item.tile_begin);
  item.last_cta = split.part_of(item.tile_end - 1);
}

// The next item of this CTA, and the cursor behind it. One thread.
template <class Shape>
FA_DEVICE void next_item(const DecodeParams& p, const DecodeLaunch& launch, DecodeCursor& cursor,
                         DecodeItem& item) {
  item.end = -1;
  if (cursor.position == cursor.end) return;
  DecodeEntry& entry = item.entry;
  int positions;
#pragma unroll 1
  for (;; ++cursor.entry) {
    if (!decode_entry<Shape>(p, launch, cursor.entry, entry)) continue;
    positions = tile_positions<Shape>(p, launch, entry);
    if (cursor.offset < positions * p.num_heads_kv) break;
    cursor.offset -= positions * p.num_heads_kv;
  }
  take_item<Shape>(p, positions, cursor, item);
}

// The share of this CTA: counts the positions of all entries, all threads side by side; the thread
// whose entries have the begin of the share finds the first item. false: this CTA has none.
template <class Shape>
FA_DEVICE bool find_share(const DecodeParams& p, const DecodeLaunch& launch,
                          DecodeShared<Shape::kThreads>& shared) {
  constexpr int kThreads = Shape::kThreads;
  const int m_blocks = launch.by_m_blocks.divisor();
  const int num_entries = (p.batch_size + (p.seqlens_q.cu_seqlens != nullptr)) * m_blocks;
  const int per_thread = ceil_div(num_entries, kThreads);
  const int first = threadIdx.x * per_thread, end = min(num_entries, first + per_thread);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  int sum = 0, longest = 0;
  DecodeEntry entry;
  int positions = 1;
#pragma unroll 1
  for (int at = first; at < end; ++at) {
    if (decode_entry<Shape>(p, launch, at, entry)) {
      positions = tile_positions<Shape>(p, launch, entry);
      sum += positions * p.num_heads_kv;
      longest = max(longest, positions);
    } else {
      at += m_blocks - 1 - entry.m_block;  // nor has the sequence a later m_block
    }
  }
  int before = sum;
  FA_UNROLL
  for (int step = 1; step < kWarpSize; step *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, before, step);
    if (lane >= step) before += other;
  }
  longest = __reduce_max_sync(0xffffffffu, longest);
  if (lane == kWarpSize - 1) {
    shared.warp_total[warp] = before;
    shared.warp_longest[warp] = longest;
  }
  before -= sum;
  __syncthreads();  // the totals of all warps are there
  int total = 0;
  FA_UNROLL
  for (int w = 0; w < kThreads / kWarpSize; ++w) {
    if (w < warp) before += shared.warp_total[w];
    total += shared.warp_total[w];
    longest = max(longest, shared.warp_longest[w]);
  }
  if (total == 0) return false;
  // Uncut, a position is a whole tile.
  const int num_ctas = p.num_ctas;
  const int rows = p.seqlens_q.max_seqlen * launch.by_group.divisor();
  const bool evenly = p.num_splits == 1 || splits_evenly(total, num_ctas, Shape::kTileM, rows);
  const WorkSplit split = split_work(total, num_ctas, p.num_splits, longest, evenly);
  const int begin = blockIdx.x * split.per_part;
  if (begin >= total) return false;
  if (before <= begin && begin < before + sum) {
    shared.cursor = {first, begin - before, begin, min(total, begin + split.per_part), split};
    if (per_thread == 1) {
      shared.items[0].entry = entry;
      take_item<Shape>(p, positions, shared.cursor, shared.items[0]);
    } else {
      next_item<Shape>(p, launch, shared.cursor, shared.items[0]);
    }
  }
  __syncthreads();  // the first item is there
  return true;
}

}  // namespace fa
