// Attention of a few queries against a long KV cache with mma.sync and cp.async, for compute
// capability 8.0 and newer. Bound by memory, so it serves SM90 too.
//
// A CTA takes an equal share of all key blocks (core/decode_schedule.h) and walks the tiles in it:
//   for n_block of the share:  S = Q K^T;  mask(S);  P = softmax weights of S;  O += P V
// A tile is kTileM rows: the query heads of one KV head and their queries, so keys are read once.
// 16 rows: every warp computes all of them with its own quarter of each block, the four results are
// merged at the end, and no warp waits for another in the loop. 64 rows: 16 to a warp, keys shared.
// Memory: a ring of units [64, head_dim], keys and values of a block by turns, rows swizzled; each
// warp copies 16 keys of every unit. The results leave through the ring, in fp32.
// A tile that is cut leaves partial results in global memory; the last CTA of a tile to arrive
// merges them, so one launch does everything. Lengths, pages and the split are read and computed on
// the device. Numbers: docs/performance/decode.md.
#pragma once
#include <cuda_runtime.h>

#include <type_traits>

#include "attention/apply_mask.h"
#include "attention/score_mod.h"
#include "attention/softmax.h"
#include "core/decode_schedule.h"
#include "core/fast_div.h"
#include "core/mask.h"
#include "core/page_table.h"
#include "core/params.h"
#include "core/tile_config.h"
#include "kernels/launch.h"
#include "kernels/tile_counter.h"
#include "ptx/global_memory.h"
#include "ptx/math.h"
#include "ptx/opaque.h"
#include "ptx/shared_memory.h"
#include "tile/mma_sm80.h"
#include "tile/vec.h"

namespace fa {

#ifndef DECODE_MIN_BLOCKS
#define DECODE_MIN_BLOCKS 1
#endif
#ifndef DECODE_BOUNDS
#define DECODE_BOUNDS 2
#endif
#ifndef DECODE_UNITS
#define DECODE_UNITS(d) decode_num_units(d)
#endif

// What the launcher adds to the parameters.
struct DecodeLaunch {
  FastDiv by_group, by_m_blocks, by_page;
  float scale, softcap_scale;  // scores become scale x, or softcap_scale tanh(scale x): log2 units
  int counter_row;             // of decode_counters; kNoTileCounter: counters are in the workspace
};

// Counts the finished parts of a tile, for the CTA that has its first: zero before and after every
// launch. A row for each launch that may run at the same time.
constexpr int kNumDecodeCounters = 1 << 13;
static __device__ int decode_counters[kNumDecodeCounters][kDecodeMaxCtas];

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
  int first_cta, last_cta;  // that share the tile
  const void* k;            // token 0 of the sequence and head; paged: of page 0
  const void* v;
  const int* pages;  // of the sequence
};

// Where a CTA stands in the row of all blocks.
struct DecodeCursor {
  int entry, offset;  // (batch, m_block), and a position in its tiles
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
template <int kTileM>
FA_DEVICE bool decode_entry(const DecodeParams& p, const DecodeLaunch& launch, int at,
                            DecodeEntry& entry) {
  const auto [batch, m_block] = divide(at, launch.by_m_blocks);
  entry.batch = batch;
  entry.m_block = m_block;
  entry.q_seq = seqlen_info_or_rest(p.seqlens_q, batch, p.batch_size, p.total_q);
  entry.blocks = {0, 0, 0, 0};
  if (batch >= p.batch_size) return m_block == 0 && entry.q_seq.stored > 0;
  const int group = launch.by_group.divisor();
  if (m_block >= packed_m_blocks(entry.q_seq.stored, group, kTileM)) return false;
  entry.k_seq = cache_seqlen_info(p, batch);
  entry.mask = mask_spec(entry.q_seq.seqlen, entry.k_seq.seqlen, p.score.window_left,
                         p.score.window_right);
  const int first = launch.by_group.divide(m_block * kTileM);
  const int last = launch.by_group.divide(m_block * kTileM + kTileM - 1);
  if (first < entry.q_seq.seqlen)
    entry.blocks = key_blocks(entry.mask, {first, min(last + 1, entry.q_seq.seqlen)}, kDecodeTileN);
  return true;
}

// Positions of one tile: its blocks; at least one, so that every tile is visited.
FA_DEVICE int tile_positions(const DecodeParams& p, const DecodeEntry& entry) {
  return p.num_splits == 1 ? 1 : max(1, entry.blocks.size());
}

// Shared memory beside the ring.
template <int kTileM>
struct DecodeShared {
  DecodeItem items[2];  // of this turn and the next; end < 0: none
  DecodeCursor cursor;
  int warp_total[4], warp_longest[4];
  float row_max[kDecodeManyRows], row_sum[kDecodeManyRows];
  bool is_last;
};

// The share of this CTA: counts the positions of all entries, 128 threads side by side, and finds
// the entry where the share begins. false: this CTA has none.
template <int kTileM>
FA_DEVICE bool find_share(const DecodeParams& p, const DecodeLaunch& launch,
                          DecodeShared<kTileM>& shared) {
  const int num_entries = (p.batch_size + (p.seqlens_q.cu_seqlens != nullptr)) *
                          launch.by_m_blocks.divisor();
  const int per_thread = ceil_div(num_entries, kDecodeThreads);
  const int first = threadIdx.x * per_thread, end = min(num_entries, first + per_thread);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  int sum = 0, longest = 0;
  for (int at = first; at < end; ++at) {
    DecodeEntry entry;
    if (!decode_entry<kTileM>(p, launch, at, entry)) {
      // Nor has the sequence a later m_block.
      at += launch.by_m_blocks.divisor() - 1 - entry.m_block;
      continue;
    }
    const int positions = tile_positions(p, entry);
    sum += positions * p.num_heads_kv;
    longest = max(longest, positions);
  }
  int before = sum;
  FA_UNROLL
  for (int step = 1; step < kWarpSize; step *= 2) {
    const int other = __shfl_up_sync(0xffffffffu, before, step);
    if (lane >= step) before += other;
    longest = max(longest, __shfl_xor_sync(0xffffffffu, longest, step));
  }
  if (lane == kWarpSize - 1) {
    shared.warp_total[warp] = before;
    shared.warp_longest[warp] = longest;
  }
  before -= sum;
  __syncthreads();  // the totals of all warps are there
  int total = 0;
  FA_UNROLL
  for (int w = 0; w < 4; ++w) {
    if (w < warp) before += shared.warp_total[w];
    total += shared.warp_total[w];
    longest = max(longest, shared.warp_longest[w]);
  }
  if (total == 0) return false;
  const WorkSplit split =
      split_work(total, gridDim.x, DECODE_MIN_BLOCKS, p.num_splits, longest);
  const int cta = blockIdx.x;
  if (cta >= split.num_parts) return false;
  const int begin = split.begin(cta);
  if (before <= begin && begin < before + sum) {
    int offset = begin - before, at = first;
    for (;; ++at) {
      DecodeEntry entry;
      if (!decode_entry<kTileM>(p, launch, at, entry)) continue;
      const int positions = tile_positions(p, entry) * p.num_heads_kv;
      if (offset < positions) break;
      offset -= positions;
    }
    shared.cursor = {at, offset, begin, split.begin(cta + 1), split};
  }
  __syncthreads();  // the cursor is there
  return true;
}

// The next item of this CTA, and the cursor behind it. One thread.
template <class T, int kTileM>
FA_DEVICE void next_item(const DecodeParams& p, const DecodeLaunch& launch, DecodeCursor& cursor,
                         DecodeItem& item) {
  if (cursor.position == cursor.end) {
    item.end = -1;
    return;
  }
  while (!decode_entry<kTileM>(p, launch, cursor.entry, item.entry)) ++cursor.entry;
  const DecodeEntry& entry = item.entry;
  const int positions = tile_positions(p, entry);
  item.head_kv = cursor.offset / positions;
  const int first = cursor.offset - item.head_kv * positions;
  const int count = min(positions - first, cursor.end - cursor.position);
  const BlockRange& blocks = entry.blocks;
  item.begin = blocks.begin + first;
  item.end = p.num_splits == 1 ? blocks.end : min(blocks.end, item.begin + count);
  const int tile_begin = cursor.position - first;
  item.first_cta = cursor.split.part_of(tile_begin);
  item.last_cta = cursor.split.part_of(tile_begin + positions - 1);
  cursor.position += count;
  cursor.offset += count;
  if (cursor.offset == positions * p.num_heads_kv) {
    ++cursor.entry;
    cursor.offset = 0;
  }
  if (entry.batch >= p.batch_size) return;
  const int row = p.cache_batch_idx == nullptr ? entry.batch : p.cache_batch_idx[entry.batch];
  const bool paged = p.page_table != nullptr;
  const int cache = paged ? 0 : clamp(row, 0, p.num_caches - 1);
  const int leftpad = paged ? 0 : entry.k_seq.leftpad;
  item.k = static_cast<const T*>(p.k) + element_offset(p.k_strides.batch, p.k_strides.token,
                                                       p.k_strides.head, cache, leftpad,
                                                       item.head_kv);
  item.v = static_cast<const T*>(p.v) + element_offset(p.v_strides.batch, p.v_strides.token,
                                                       p.v_strides.head, cache, leftpad,
                                                       item.head_kv);
  if (paged)
    item.pages = p.page_table + clamp(row, 0, p.page_table_rows - 1) * p.page_table_batch_stride;
}

// Online softmax of two rows of a lane, as attention/softmax.h, in log2 units. Every row moves its
// reference on its own, so that a result does not depend on the other rows of its tile.
template <class T>
struct RowSoftmax {
  float row_max[2] = {-INFINITY, -INFINITY};
  float row_sum[2] = {0.f, 0.f};

  template <int kN, int kD>
  FA_DEVICE void step(AccumTile<1, kN>& acc_s, AccumTile<1, kD>& acc_o) {
    float high[2];
    bool moves = false;
    FA_UNROLL
    for (int r = 0; r < 2; ++r) {
      high[r] = -INFINITY;
      FA_UNROLL
      for (int n = 0; n < kN; ++n)
        high[r] = fmaxf(high[r], fmaxf(acc_s.x[0][n][2 * r], acc_s.x[0][n][2 * r + 1]));
      moves |= high[r] - row_max[r] > kMaxWeightLog2<T>;  // false for -inf - -inf
    }
    if (__any_sync(0xffffffffu, moves)) {
      FA_UNROLL
      for (int r = 0; r < 2; ++r) {
        high[r] = fmaxf(high[r], __shfl_xor_sync(0xffffffffu, high[r], 1));
        high[r] = fmaxf(high[r], __shfl_xor_sync(0xffffffffu, high[r], 2));
        if (!(high[r] - row_max[r] > kMaxWeightLog2<T>)) continue;
        const float factor = ptx::ex2_approx_ftz(row_max[r] - high[r]);
        row_max[r] = high[r];
        row_sum[r] *= factor;
        FA_UNROLL
        for (int d = 0; d < kD; ++d) {
          acc_o.x[0][d][2 * r] *= factor;
          acc_o.x[0][d][2 * r + 1] *= factor;
        }
      }
    }
    FA_UNROLL
    for (int r = 0; r < 2; ++r) {
      const float reference = finite_max(row_max[r]);
      FA_UNROLL
      for (int n = 0; n < kN; ++n) {
        FA_UNROLL
        for (int i = 2 * r; i < 2 * r + 2; ++i) {
          float& weight = acc_s.x[0][n][i];
          weight = ptx::ex2_approx_ftz(weight - reference);
          row_sum[r] += weight;
        }
      }
    }
  }

  // Adds up the sums of the lanes of a quad; once, behind the last step.
  FA_DEVICE void finish() {
    FA_UNROLL
    for (float& sum : row_sum) {
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    }
  }
};

// Four columns of a row, merged from results over disjoint sets of keys. Maxima in log2 units.
struct RowMerge {
  float acc[4] = {};
  float sum = 0.f, max = -INFINITY;

  FA_DEVICE void add(float part_max, float part_sum, float4 part) {
    if (part_max == -INFINITY) return;
    const float new_max = fmaxf(max, part_max);
    const float rescale = ptx::ex2_approx_ftz(max - new_max);
    const float weight = ptx::ex2_approx_ftz(part_max - new_max);
    max = new_max;
    sum = sum * rescale + weight * part_sum;
    acc[0] = acc[0] * rescale + weight * part.x;
    acc[1] = acc[1] * rescale + weight * part.y;
    acc[2] = acc[2] * rescale + weight * part.z;
    acc[3] = acc[3] * rescale + weight * part.w;
  }
};

template <class T, int kHeadDim, int kTileM>
struct DecodeCta {
  static constexpr int kWarps = kDecodeThreads / kWarpSize;
  static constexpr int kKeyParts = kTileM == kDecodeFewRows ? kWarps : 1;
  static constexpr int kWarpKeys = kDecodeTileN / kKeyParts;
  static constexpr int kN = kWarpKeys / 8, kD = kHeadDim / 8, kSteps = kHeadDim / 16;
  static constexpr int kUnits = DECODE_UNITS(kHeadDim);
  using Unit = SmemTile<kDecodeTileN, kHeadDim>;
  // A lane copies kChunks chunks of kRows keys of its warp's 16.
  static constexpr int kCopyKeys = kDecodeTileN / kWarps;
  static constexpr int kLanes = Unit::kRowBytes % 128 == 0 ? 8 : 4;
  static constexpr int kRowsPerPass = kWarpSize / kLanes;
  static constexpr int kRows = kCopyKeys / kRowsPerPass;
  static constexpr int kChunks = Unit::kChunksPerRow / kLanes;
  static constexpr bool kQInRegs = decode_q_in_regs(kHeadDim);
  using TileQ = SmemTile<kTileM, kHeadDim>;          // behind the ring
  static constexpr int kOStride = kHeadDim + 4;  // floats; rows of O in shared memory
  static constexpr int kSmemBytes = decode_smem_bytes(kHeadDim, kTileM);

  const DecodeParams& p;
  const DecodeLaunch& launch;
  DecodeShared<kTileM>& shared;
  float* smem_o;  // [64, kOStride], where the ring is
  uint32_t smem;
  int warp, lane;

  // The item.
  AFragments<1, kQInRegs ? kSteps : 1> q;
  int seqlen_k;

  // The copies.
  int copied_block;  // of the page below
  int page, page_row;  // lanes below 16: where key `lane` of this warp's is
  int load_slot;

  FA_DEVICE int first_row() const { return shared_entry().m_block * kTileM; }
  const DecodeItem* item;
  FA_DEVICE const DecodeEntry& shared_entry() const { return item->entry; }
  // Row of the tile of row r of this lane.
  FA_DEVICE int tile_row(int r) const {
    return (kKeyParts == 1 ? 16 * warp : 0) + r * 8 + lane / 4;
  }

  FA_DEVICE void find_page(int block) {
    page = 0;
    page_row = 0;
    const int key = block * kDecodeTileN + warp * kCopyKeys + lane;
    if (lane >= kCopyKeys || key >= seqlen_k) return;
    const auto [index, row] = divide(item->entry.k_seq.leftpad + key, launch.by_page);
    page = clamp(item->pages[index], 0, p.num_caches - 1);
    page_row = row;
  }

  // Starts copying keys or values of a block into the next unit of the ring.
  FA_DEVICE void load(const void* base, const Strides& strides, int num_cols, int block) {
    const Unit unit{smem + load_slot * Unit::kBytes};
    // The addresses shall not be kept in registers through the loop.
    const int thread = ptx::opaque(lane);
    const int row = thread / kLanes, chunk = thread % kLanes;
    const uint32_t to = unit.chunk_address(warp * kCopyKeys + row, chunk);
    const int first_key = block * kDecodeTileN + warp * kCopyKeys + row;
    const T* from = static_cast<const T*>(base) + chunk * 8;
    FA_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const int key = first_key + i * kRowsPerPass;
      const bool row_exists = key < seqlen_k;
      int64_t offset;
      if (p.page_table != nullptr) {
        const int key_page = __shfl_sync(0xffffffffu, page, row + i * kRowsPerPass);
        const int key_row = __shfl_sync(0xffffffffu, page_row, row + i * kRowsPerPass);
        offset = key_page * strides.batch + key_row * strides.token;
      } else {
        offset = row_exists ? key * strides.token : 0;
      }
      FA_UNROLL
      for (int c = 0; c < kChunks; ++c) {
        const bool exists = row_exists && (chunk + c * kLanes) * 8 < num_cols;
        // Rows 8 apart have the same swizzle; kRowsPerPass is 4 or 8.
        const uint32_t at = kRowsPerPass == 8
                                ? to + i * 8 * Unit::kRowBytes
                                : (i % 2 == 0 ? to : to_of_odd(unit, row, chunk)) +
                                      i / 2 * 8 * Unit::kRowBytes;
        ptx::cp_async_cg_16(at + c * kLanes * kSwizzleChunkBytes, from + offset + c * kLanes * 8,
                            exists ? 16 : 0);
      }
    }
    load_slot = load_slot + 1 == kUnits ? 0 : load_slot + 1;
  }
  FA_DEVICE uint32_t to_of_odd(const Unit& unit, int row, int chunk) const {
    return unit.chunk_address(warp * kCopyKeys + row + 4, chunk);
  }

  // Copies unit kUnit (even: keys, odd: values) behind the keys of `block`, if it is in the item.
  template <int kUnit>
  FA_DEVICE void load_ahead(int block) {
    block += kUnit / 2;
    if (block < item->end) {
      if constexpr (kUnit % 2 == 0) {
        load(item->k, p.k_strides, p.head_dim, block);
      } else {
        load(item->v, p.v_strides, p.head_dim_v, block);
        if (p.page_table != nullptr) find_page(block + 1);
      }
    }
    ptx::cp_async_commit_group();
  }
  template <int kUnit>
  FA_DEVICE void load_first(int block) {
    if constexpr (kUnit < kUnits - 1) {
      load_ahead<kUnit>(block);
      load_first<kUnit + 1>(block);
    }
  }

  // The oldest unit is complete, and the one before it is read by all that read it.
  FA_DEVICE void wait_unit() const {
    ptx::cp_async_wait_group<kUnits - 2>();
    if constexpr (kKeyParts == 1) {
      __syncthreads();
    } else {
      __syncwarp();
    }
  }

  // Row `row` of the tile in q; nullptr: it does not attend.
  FA_DEVICE const T* q_row(int row) const {
    const DecodeEntry& entry = item->entry;
    const auto [token, head] = divide(first_row() + row, launch.by_group);
    if (token >= entry.q_seq.seqlen) return nullptr;
    return static_cast<const T*>(p.q) +
           element_offset(p.q_strides.batch, p.q_strides.token, p.q_strides.head, entry.batch,
                          entry.q_seq.first_row + token,
                          item->head_kv * launch.by_group.divisor() + head);
  }
  FA_DEVICE TileQ smem_q() const { return {smem + kUnits * Unit::kBytes}; }

  // Starts copying Q to shared memory, as part of the first group.
  FA_DEVICE void copy_q() const {
    for (int i = threadIdx.x; i < kTileM * TileQ::kChunksPerRow; i += kDecodeThreads) {
      const int row = i / TileQ::kChunksPerRow, chunk = i % TileQ::kChunksPerRow;
      const T* from = q_row(row);
      const bool exists = from != nullptr && chunk * 8 < p.head_dim;
      ptx::cp_async_cg_16(smem_q().chunk_address(row, chunk),
                          exists ? from + chunk * 8 : static_cast<const T*>(p.q), exists ? 16 : 0);
    }
  }
  // A operands of this lane from global memory.
  FA_DEVICE void load_q_operands() {
    FA_UNROLL
    for (int r = 0; r < 2; ++r) {
      const T* row = q_row(tile_row(r));
      FA_UNROLL
      for (int k = 0; k < kSteps; ++k) {
        FA_UNROLL
        for (int half = 0; half < 2; ++half) {
          const int col = 16 * k + 8 * half + lane % 4 * 2;
          q.x[0][k][2 * half + r] = row != nullptr && col < p.head_dim
                                        ? *reinterpret_cast<const uint32_t*>(row + col)
                                        : 0u;
        }
      }
    }
  }
  FA_DEVICE void q_operand(int k, uint32_t (&a)[4]) const {
    if constexpr (kQInRegs) {
      FA_UNROLL
      for (int i = 0; i < 4; ++i) a[i] = q.x[0][k][i];
    } else {
      const auto by_rows = BlockAddress<TileQ::kRowBytes>::by_rows(lane);
      ptx::ldmatrix_x4(a, smem_q().base + by_rows.offset(kKeyParts == 1 ? 16 * warp : 0, k));
    }
  }

  // Raw scores become masked ones in log2 units.
  FA_DEVICE void modify_scores(AccumTile<1, kN>& acc_s, int block) const {
    const int first_col = block * kDecodeTileN + (kKeyParts == 1 ? 0 : warp * kWarpKeys);
    FA_UNROLL
    for (auto& column : acc_s.x[0]) {
      FA_UNROLL
      for (float& x : column) x *= launch.scale;
    }
    if (launch.softcap_scale != 0.f) {
      FA_UNROLL
      for (auto& column : acc_s.x[0]) {
        FA_UNROLL
        for (float& x : column) x = launch.softcap_scale * ptx::tanh_approx(x);
      }
    }
    const DecodeEntry& entry = item->entry;
    if (p.score.alibi_slopes != nullptr) {
      FA_UNROLL
      for (int r = 0; r < 2; ++r) {
        const auto [token, in_group] = divide(first_row() + tile_row(r), launch.by_group);
        const int head = item->head_kv * launch.by_group.divisor() + in_group;
        const float slope =
            p.score.alibi_slopes[entry.batch * p.score.alibi_batch_stride + head] * kLog2e;
        const int first_distance = first_col + lane % 4 * 2 -
                                   (token + entry.mask.seqlen_k - entry.mask.seqlen_q);
        FA_UNROLL
        for (int n = 0; n < kN; ++n) {
          FA_UNROLL
          for (int i = 0; i < 2; ++i)
            acc_s.x[0][n][2 * r + i] -=
                slope * fabsf(static_cast<float>(first_distance + n * 8 + i));
        }
      }
    }
    const BlockRange& blocks = entry.blocks;
    if (block >= blocks.full_end || block < blocks.full_begin) {
      FA_UNROLL
      for (int r = 0; r < 2; ++r) {
        const Range keys =
            key_range(entry.mask, launch.by_group.divide(first_row() + tile_row(r)));
        keep_columns(acc_s, r, keys.begin - first_col, keys.size(), lane);
      }
    }
  }

  // O and the statistics of this warp's rows over its keys of the item.
  // `meanwhile` is called once the first copies are under way.
  template <class Meanwhile>
  FA_DEVICE void run(AccumTile<1, kD>& acc_o, RowSoftmax<T>& softmax, Meanwhile meanwhile) {
    using Address = BlockAddress<Unit::kRowBytes>;
    const Address by_rows = Address::by_rows(lane), by_columns = Address::by_columns(lane);
    const int key_row = kKeyParts == 1 ? 0 : warp * kWarpKeys;
    seqlen_k = item->entry.k_seq.seqlen;
    load_slot = 0;
    int block = item->begin;
    if (p.page_table != nullptr) find_page(block);
    if constexpr (!kQInRegs) copy_q();
    load_first<0>(block);
    if constexpr (kQInRegs) load_q_operands();
    meanwhile();
    if constexpr (!kQInRegs) {
      ptx::cp_async_wait_group<kUnits - 2>();
      __syncthreads();  // Q is complete
    }
    // A warp without a row only copies.
    const bool has_rows = kKeyParts > 1 || first_row() + 16 * warp < item->entry.q_seq.seqlen *
                                                                        launch.by_group.divisor();
    int slot = 0;
    const auto next_slot = [&] { slot = slot + 1 == kUnits ? 0 : slot + 1; };
    for (; block < item->end; ++block) {
      AccumTile<1, kN> acc_s;
      wait_unit();
      load_ahead<kUnits - 1>(block);
      if (has_rows) {
        const uint32_t k_base = smem + slot * Unit::kBytes;
        acc_s.clear();
        warp_gemm<T, kSteps>(
            acc_s,
            [&](int, int k, uint32_t(&a)[4]) { q_operand(k, a); },
            [&](int n, int k, uint32_t(&b)[4]) {
              ptx::ldmatrix_x4(b, k_base + by_columns.offset(key_row + 16 * n, k));
            });
        modify_scores(acc_s, block);
        softmax.step(acc_s, acc_o);
      }
      next_slot();
      wait_unit();
      load_ahead<kUnits>(block);
      if (has_rows) {
        const uint32_t v_base = smem + slot * Unit::kBytes;
        const AFragments<1, kN / 2> weights = as_a_operand<T>(acc_s);
        warp_gemm<T, kN / 2>(
            acc_o,
            [&](int, int k, uint32_t(&a)[4]) {
              FA_UNROLL
              for (int i = 0; i < 4; ++i) a[i] = weights.x[0][k][i];
            },
            [&](int n, int k, uint32_t(&b)[4]) {
              ptx::ldmatrix_x4_trans(b, v_base + by_rows.offset(key_row + 16 * k, n));
            });
      }
      next_slot();
    }
    softmax.finish();
  }

  // Columns [col, col + 4) of row `row` of the tile, merged over the warps.
  FA_DEVICE RowMerge merged_row(int row, int col) const {
    RowMerge merged;
    FA_UNROLL
    for (int part = 0; part < kKeyParts; ++part) {
      const int at = part * kTileM + row;
      merged.add(shared.row_max[at], shared.row_sum[at],
                 *reinterpret_cast<const float4*>(smem_o + at * kOStride + col));
    }
    return merged;
  }

  FA_DEVICE void store_row(int row, int col, const RowMerge& merged) const {
    const DecodeEntry& entry = item->entry;
    const auto [token, in_group] = divide(first_row() + row, launch.by_group);
    const int head = item->head_kv * launch.by_group.divisor() + in_group;
    const bool exists = token < entry.q_seq.seqlen;
    const float scale = exists ? output_scale(merged.sum) : 0.f;
    T* out = static_cast<T*>(p.out) +
             element_offset(p.out_strides.batch, p.out_strides.token, p.out_strides.head,
                            entry.batch, entry.q_seq.first_row + token, head) + col;
    uint2 values = {0u, 0u};
    if (exists) {
      values.x = pack<T>(merged.acc[0] * scale, merged.acc[1] * scale);
      values.y = pack<T>(merged.acc[2] * scale, merged.acc[3] * scale);
    }
    if (col < p.head_dim_v) ptx::st_global_v2(out, values);
    if (col == 0) {
      const bool varlen = p.seqlens_q.cu_seqlens != nullptr;
      float* lse = varlen ? p.lse + static_cast<int64_t>(head) * p.total_q + entry.q_seq.first_row
                          : p.lse + (static_cast<int64_t>(entry.batch) * p.num_heads_q + head) *
                                        p.seqlens_q.max_seqlen;
      lse[token] = exists && merged.sum != 0.f
                       ? (merged.max + ptx::lg2_approx_ftz(merged.sum)) * kLn2
                       : -INFINITY;
    }
  }

  // Rows of the tile that exist.
  FA_DEVICE int num_rows() const {
    return min<int64_t>(kTileM, int64_t{item->entry.q_seq.stored} * launch.by_group.divisor() -
                                    first_row());
  }

  static constexpr int kColumnGroups = kHeadDim / 4;

  FA_DEVICE float* partial_out(int slot) const {
    return p.partial + static_cast<int64_t>(slot) * kTileM * kHeadDim;
  }
  // [kTileM] maxima and sums.
  FA_DEVICE float2* partial_statistics(int slot) const {
    return reinterpret_cast<float2*>(
               p.partial + static_cast<int64_t>(2) * gridDim.x * kTileM * kHeadDim) +
           slot * kTileM;
  }

  FA_DEVICE int* counters() const {
    return launch.counter_row != kNoTileCounter
               ? decode_counters[launch.counter_row]
               : reinterpret_cast<int*>(p.partial) +
                     decode_partial_words(gridDim.x, kTileM, kHeadDim);
  }

  FA_DEVICE void store(const AccumTile<1, kD>& acc_o, const RowSoftmax<T>& softmax) {
    ptx::cp_async_wait_group<0>();
    __syncthreads();  // nobody reads the ring any more, and no copy writes to it
    FA_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int row = 16 * warp + r * 8 + lane / 4;
      FA_UNROLL
      for (int d = 0; d < kD; ++d) {
        float2* to = reinterpret_cast<float2*>(smem_o + row * kOStride + 8 * d + lane % 4 * 2);
        *to = {acc_o.x[0][d][2 * r], acc_o.x[0][d][2 * r + 1]};
      }
      if (lane % 4 == 0) {
        shared.row_max[row] = softmax.row_max[r];
        shared.row_sum[row] = softmax.row_sum[r];
      }
    }
    __syncthreads();  // the results of all warps are there
    const int rows = num_rows();
    const bool whole = item->first_cta == item->last_cta;
    const int slot = 2 * blockIdx.x + (item->first_cta == static_cast<int>(blockIdx.x));
    for (int i = threadIdx.x; i < rows * kColumnGroups; i += kDecodeThreads) {
      const int row = i / kColumnGroups, col = i % kColumnGroups * 4;
      const RowMerge merged = merged_row(row, col);
      if (whole) {
        store_row(row, col, merged);
      } else {
        *reinterpret_cast<float4*>(partial_out(slot) + row * kHeadDim + col) = {
            merged.acc[0], merged.acc[1], merged.acc[2], merged.acc[3]};
        if (col == 0) partial_statistics(slot)[row] = {merged.max, merged.sum};
      }
    }
    if (!whole) merge_parts(rows);
  }

  // The last CTA of those that share the tile merges their results.
  FA_DEVICE void merge_parts(int rows) {
    __syncthreads();  // the partial result of this CTA is written
    if (threadIdx.x == 0) {
      __threadfence();  // and visible to who counts after this
      int* counter = counters() + item->first_cta;
      shared.is_last = atomicAdd(counter, 1) == item->last_cta - item->first_cta;
      if (shared.is_last) *counter = 0;
      __threadfence();  // what the others counted is visible to this CTA
    }
    __syncthreads();  // is_last is set
    if (!shared.is_last) return;
    constexpr int kUnroll = 8;
    for (int i = threadIdx.x; i < rows * kColumnGroups; i += kDecodeThreads) {
      const int row = i / kColumnGroups, col = i % kColumnGroups * 4;
      RowMerge merged;
      for (int cta = item->first_cta; cta <= item->last_cta; cta += kUnroll) {
        float4 part[kUnroll];
        float2 statistics[kUnroll];
        FA_UNROLL
        for (int u = 0; u < kUnroll; ++u) {
          const int slot = 2 * (cta + u) + (cta + u == item->first_cta);
          statistics[u] = {-INFINITY, 0.f};
          if (cta + u > item->last_cta) continue;
          statistics[u] = __ldcg(partial_statistics(slot) + row);
          part[u] = __ldcg(reinterpret_cast<const float4*>(partial_out(slot) + row * kHeadDim + col));
        }
        FA_UNROLL
        for (int u = 0; u < kUnroll; ++u) merged.add(statistics[u].x, statistics[u].y, part[u]);
      }
      store_row(row, col, merged);
    }
  }

  // Varlen: out = 0, lse = -inf for the rows behind the last sequence.
  FA_DEVICE void clear_rest() const {
    const int64_t rows = int64_t{item->entry.q_seq.stored} * launch.by_group.divisor();
    for (int64_t i = threadIdx.x; i < rows * kColumnGroups; i += kDecodeThreads)
      store_row(static_cast<int>(i / kColumnGroups), static_cast<int>(i % kColumnGroups) * 4, {});
  }
};

template <class T, int kHeadDim, int kTileM>
__global__ void __launch_bounds__(kDecodeThreads, kTileM == kDecodeFewRows ? DECODE_BOUNDS : 2)
    decode_kernel(const __grid_constant__ DecodeParams p,
                  const __grid_constant__ DecodeLaunch launch) {
  using Cta = DecodeCta<T, kHeadDim, kTileM>;
  extern __shared__ __align__(128) char smem[];
  __shared__ DecodeShared<kTileM> shared;
  if (!find_share<kTileM>(p, launch, shared)) return;
  if (threadIdx.x == 0) next_item<T, kTileM>(p, launch, shared.cursor, shared.items[0]);
  __syncthreads();  // the first item is there

  Cta cta{p, launch, shared, reinterpret_cast<float*>(smem), ptx::cvta_to_shared(smem)};
  cta.warp = __shfl_sync(0xffffffffu, threadIdx.x / kWarpSize, 0);
  cta.lane = threadIdx.x % kWarpSize;
  for (int turn = 0; shared.items[turn].end >= 0; turn ^= 1) {
    cta.item = &shared.items[turn];
    const auto find_next = [&] {
      if (threadIdx.x == kDecodeThreads - 1)
        next_item<T, kTileM>(p, launch, shared.cursor, shared.items[turn ^ 1]);
      __syncwarp();
    };
    if (cta.item->entry.batch == p.batch_size) {
      find_next();
      cta.clear_rest();
    } else {
      AccumTile<1, Cta::kD> acc_o;
      acc_o.clear();
      RowSoftmax<T> softmax;
      cta.run(acc_o, softmax, find_next);
      cta.store(acc_o, softmax);
    }
    __syncthreads();  // the next item is there, and nobody reads this one or the ring any more
  }
}

template <class T, int kHeadDim, int kTileM>
int launch_decode_kernel(const DecodeParams& p, const DecodeLaunch& launch, cudaStream_t stream) {
  using Cta = DecodeCta<T, kHeadDim, kTileM>;
  constexpr auto kKernel = decode_kernel<T, kHeadDim, kTileM>;
  const cudaError_t error = allow_dynamic_smem<kKernel>(Cta::kSmemBytes);
  if (error != cudaSuccess || p.num_ctas == 0) return error;
  kKernel<<<p.num_ctas, kDecodeThreads, Cta::kSmemBytes, stream>>>(p, launch);
  return cudaGetLastError();
}

template <class T, int kHeadDim>
int launch_decode(const DecodeParams& p, cudaStream_t stream) {
  const int group = p.num_heads_q / p.num_heads_kv;
  const bool capped = p.score.softcap != 0.f;
  DecodeLaunch launch;
  launch.by_group = FastDiv(group);
  launch.by_m_blocks = FastDiv(max(1, packed_m_blocks(p.seqlens_q.max_seqlen, group, p.tile_m)));
  launch.by_page = FastDiv(max(1, p.page_size));
  launch.scale = capped ? p.score.softmax_scale / p.score.softcap : p.score.softmax_scale * kLog2e;
  launch.softcap_scale = p.score.softcap * kLog2e;
  launch.counter_row = kNoTileCounter;
  if (p.num_splits != 1) {
    cudaError_t error = tile_counter(stream, launch.counter_row);
    if (launch.counter_row >= kNumDecodeCounters) launch.counter_row = kNoTileCounter;
    if (error == cudaSuccess && launch.counter_row == kNoTileCounter)
      error = cudaMemsetAsync(p.partial + decode_partial_words(p.num_ctas, p.tile_m, kHeadDim), 0,
                              p.num_ctas * sizeof(int), stream);
    if (error != cudaSuccess) return error;
  }
  return p.tile_m == kDecodeFewRows
             ? launch_decode_kernel<T, kHeadDim, kDecodeFewRows>(p, launch, stream)
             : launch_decode_kernel<T, kHeadDim, kDecodeManyRows>(p, launch, stream);
}

}  // namespace fa
