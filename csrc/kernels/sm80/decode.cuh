// Attention of a few queries against a long KV cache with mma.sync and cp.async, for compute
// capability 8.0 and newer. Bound by memory, so it serves SM90 too.
//
// A CTA takes an equal share of all key blocks (core/decode_schedule.h) and walks the tiles in it:
//   for n_block of the share:  S = Q K^T;  mask(S);  P = softmax weights of S;  O += P V
// A tile is kTileM rows: the query heads of one KV head and their queries, so keys are read once.
// 16 rows: every warp computes all of them with its own keys of each block, 16 or 32; the results
// of all warps are merged at the end, and no warp waits for another in the loop. 64 rows: 16 to
// each of four warps, keys shared.
// Memory: a ring of units [kTileN, head_dim], keys and values of a block by turns, swizzled; each
// warp copies its part of every unit. Behind it the results, one row of fp32 for each row of each
// warp; while they are merged and stored, the ring fills with the blocks of the next tile.
// A tile that is cut leaves partial results in global memory; the last CTA of a tile to arrive
// merges them, so one launch does everything. Lengths, pages and the split are read and computed on
// the device. A short call is bound by latency, instructions fetched for the first time included,
// so what runs once is kept short. Numbers: docs/performance/decode.md.
#pragma once
#include <cuda_runtime.h>

#include <type_traits>

#include "attention/apply_mask.h"
#include "attention/rotary.h"
#include "attention/score_mod.h"
#include "attention/softmax.h"
#include "core/page_table.h"
#include "core/params.h"
#include "core/rotary.h"
#include "core/tile_config.h"
#include "kernels/launch.h"
#include "kernels/sm80/decode_output.h"
#include "kernels/sm80/decode_rows.h"
#include "kernels/sm80/decode_work.h"
#include "kernels/tile_counter.h"
#include "ptx/global_memory.h"
#include "ptx/math.h"
#include "ptx/opaque.h"
#include "ptx/reduction.h"
#include "ptx/shared_memory.h"
#include "tile/mma_sm80.h"
#include "tile/vec.h"

namespace fa {

// Counts the finished parts of a tile, for the CTA that has its first: zero before and after every
// launch. A row for each launch that may run at the same time.
constexpr int kNumDecodeCounters = 1 << 12;
static __device__ int decode_counters[kNumDecodeCounters][kDecodeMaxCtas];

template <class T, int kHeadDim, int kTileM, DecodeCtas kCtas, bool kMayAppend>
struct DecodeCta {
  static constexpr DecodeConfig kConfig = decode_config(kHeadDim, kCtas);
  static constexpr int kTileN = kConfig.tile_n, kWarps = kConfig.num_warps;
  static constexpr int kThreads = kConfig.num_threads();
  static constexpr int kKeyParts = kTileM == kDecodeFewRows ? kWarps : 1;
  static constexpr int kWarpKeys = kTileN / kKeyParts;
  static constexpr int kN = kWarpKeys / 8, kD = kHeadDim / 8, kSteps = kHeadDim / 16;
  static constexpr int kUnits = kConfig.num_units;
  static constexpr bool kRunsAhead = decode_runs_ahead(kHeadDim);
  static constexpr int kRingBytes = decode_ring_bytes(kHeadDim, kCtas);
  static constexpr int kSmemBytes = decode_smem_bytes(kHeadDim, kTileM, kCtas);
  static constexpr int kResultsBegin = kRunsAhead ? kRingBytes : 0;  // bytes
  static constexpr int kResultWords = decode_result_words(kHeadDim);
  static constexpr int kColumnGroups = kHeadDim / 4;  // of 4 columns, in a row of results
  static constexpr bool kQInRegs = kRunsAhead;
  using Shape = DecodeShape<kTileM, kTileN, kThreads, kMayAppend>;
  using Output = DecodeOutput<T, kHeadDim, kTileM, kWarps>;
  using Unit = SmemTile<kTileN, kHeadDim>;
  using TileQ = SmemTile<kTileM, kHeadDim>;
  // A lane copies kChunks chunks of kRows keys of its warp's kCopyKeys.
  static constexpr int kCopyKeys = kTileN / kWarps;
  static_assert(kCopyKeys <= kWarpSize, "a lane finds one key");
  static constexpr int kLanes = Unit::kRowBytes % 128 == 0 ? 8 : 4;
  static constexpr int kRowsPerPass = kWarpSize / kLanes;
  static constexpr int kRows = kCopyKeys / kRowsPerPass;
  static constexpr int kChunks = Unit::kChunksPerRow / kLanes;
  // Rows of other than whole lines end in those of the next head: another CTA reads it, at the same
  // time or, among small ones, much later.
  static constexpr bool kWholeLines = kCtas != DecodeCtas::kSmall || Unit::kRowBytes % 128 == 0;

  const DecodeParams& p;
  const DecodeLaunch& launch;
  DecodeShared<kThreads>& shared;
  char* smem_begin;
  uint32_t smem;
  int warp, lane;

  AFragments<1, kQInRegs ? kSteps : 1> q;
  int index = 0;  // of the item that is computed
  int slot = 0;   // of the unit that is computed next

  // The copies.
  int load_index = -1;  // of the item that is copied: index or the one behind
  int load_block = 0, load_end = 0;
  bool load_values = false;  // of the block, else its keys
  int load_slot = 0;
  int num_ahead = 0;                 // units that are copied and not yet computed
  const T *load_k, *load_v;          // token 0 of load_index's KV head
  const T *load_new_k, *load_new_v;  // the same among the new tokens
  int load_seqlen;
  int page = 0, page_row;  // where key lane % kCopyKeys of this warp's is; page < 0: it is new
                           // token page_row

  FA_DEVICE bool appends() const { return kMayAppend && p.append.k != nullptr; }
  FA_DEVICE bool rotates() const { return kMayAppend && p.append.table.rotary_dim > 0; }
  FA_DEVICE const DecodeItem& item() const { return shared.items[index % 3]; }
  FA_DEVICE int group() const { return launch.by_group.divisor(); }
  FA_DEVICE int first_row() const { return item().entry.m_block * kTileM; }
  // Where this warp's keys begin in a unit.
  FA_DEVICE int key_row() const { return kKeyParts == 1 ? 0 : warp * kWarpKeys; }
  FA_DEVICE float* results() const { return reinterpret_cast<float*>(smem_begin + kResultsBegin); }
  // Behind the ring: a place of its own, or that of the results until they are there.
  FA_DEVICE TileQ smem_q() const { return {smem + kRingBytes}; }
  // Row of the tile of row r of this lane.
  FA_DEVICE int tile_row(int r) const {
    return (kKeyParts == 1 ? 16 * warp : 0) + r * 8 + lane / 4;
  }

  // Where the keys of load_block are; without pages, all are in one.
  FA_DEVICE void find_page() {
    const DecodeItem& from = shared.items[load_index % 3];
    const int key = load_block * kTileN + warp * kCopyKeys + lane % kCopyKeys;
    const int last_key = min(key, from.entry.k_seq.seqlen - 1);
    if (kMayAppend && last_key >= from.appended_at) {
      page = -1;
      page_row = last_key - from.appended_at;
      return;
    }
    page_row = from.entry.k_seq.leftpad + last_key;
    page = from.cache;
    if (p.page_table == nullptr) return;
    const auto [at, row] = divide(page_row, launch.by_page);
    page = clamp(p.page_table[from.cache * p.page_table_batch_stride + at], 0, p.num_caches - 1);
    page_row = row;
  }

  // Starts copying the next unit into the ring, if an item up to last_index has one. One group.
  FA_DEVICE void load_next(int last_index) {
    while (load_block == load_end && load_index < last_index) {
      const DecodeItem& next = shared.items[(load_index + 1) % 3];
      if (next.end < 0) break;
      ++load_index;
      load_block = next.begin;
      load_end = next.end;
      load_seqlen = next.entry.k_seq.seqlen;
      load_k = static_cast<const T*>(p.k) + next.head_kv * p.k_strides.head;
      load_v = static_cast<const T*>(p.v) + next.head_kv * p.v_strides.head;
      if (appends()) {
        const AppendKvParams& a = p.append;
        const int batch = next.entry.batch;
        const int64_t row = a.cu_seqlens_new == nullptr ? 0 : a.cu_seqlens_new[batch];
        const auto head_of_new = [&](const void* x, const Strides& strides) {
          return static_cast<const T*>(x) + element_offset(strides.batch, strides.token,
                                                           strides.head, batch, row, next.head_kv);
        };
        load_new_k = head_of_new(a.k, a.k_strides);
        load_new_v = head_of_new(a.v, a.v_strides);
      }
      if (load_block < load_end) find_page();
    }
    if (load_block < load_end) {
      copy_unit();
      load_slot = load_slot + 1 == kUnits ? 0 : load_slot + 1;
      ++num_ahead;
      load_values = !load_values;
      if (!load_values && ++load_block < load_end) find_page();
    }
    ptx::cp_async_commit_group();
  }

  // Where key lane % kCopyKeys of this warp's is, or its value.
  FA_DEVICE const T* key_of_lane() const {
    const Strides& strides = load_values ? p.v_strides : p.k_strides;
    const T* key =
        (load_values ? load_v : load_k) + page * strides.batch + page_row * strides.token;
    if constexpr (kMayAppend) {
      const int64_t new_stride = load_values ? p.append.v_strides.token : p.append.k_strides.token;
      if (page < 0) key = (load_values ? load_new_v : load_new_k) + page_row * new_stride;
    }
    return key;
  }

  FA_DEVICE void copy_unit() const {
    const Unit unit{smem + load_slot * Unit::kBytes};
    // The addresses shall not be kept in registers through the loop.
    const int thread = ptx::opaque(lane);
    const int row = thread / kLanes, chunk = thread % kLanes;
    const int keys_left = load_seqlen - (load_block * kTileN + warp * kCopyKeys + row);
    const int num_chunks = (load_values ? p.head_dim_v : p.head_dim) / 8 - chunk;
    const T* own_key = key_of_lane();
    FA_UNROLL
    for (int i = 0; i < kRows; ++i) {
      const T* key =
          reinterpret_cast<const T*>(__shfl_sync(
              0xffffffffu, reinterpret_cast<unsigned long long>(own_key), row + i * kRowsPerPass)) +
          chunk * 8;
      const uint32_t to = unit.chunk_address(warp * kCopyKeys + row + i * kRowsPerPass, chunk);
      FA_UNROLL
      for (int c = 0; c < kChunks; ++c) {
        const bool exists = i * kRowsPerPass < keys_left && c * kLanes < num_chunks;
        ptx::cp_async_cg_16<kWholeLines>(to + c * kLanes * kSwizzleChunkBytes, key + c * kLanes * 8,
                                         exists ? 16 : 0);
      }
    }
  }

  // Turns the first rotary_dim elements of rows [begin, end) of a tile by positions(row).
  template <int kRowsOfTile, class Position>
  FA_DEVICE void rotate_rows(SmemTile<kRowsOfTile, kHeadDim> tile, int begin, int end, int thread,
                             int num_threads, Position position) const {
    constexpr int kVec = kVecSize<T>;
    const RotaryTable& table = p.append.table;
    const int units = rotated_units(table.rotary_dim, kVec);
#pragma unroll 1
    for (int i = thread; i < (end - begin) * units; i += num_threads) {
      const int row = begin + i / units;
      const UnitColumns columns =
          unit_columns(p.head_dim, table.rotary_dim, table.interleaved, kVec, i % units);
      const uint32_t first = tile.chunk_address(row, columns.first / kVec);
      const uint32_t second = tile.chunk_address(row, columns.second / kVec);
      RowUnit<T, kVec> unit;
      *reinterpret_cast<uint4*>(unit.first.x) = ptx::ld_shared_v4(first);
      *reinterpret_cast<uint4*>(unit.second.x) = ptx::ld_shared_v4(second);
      rotate(unit, RotaryAngles<T, kVec>(table, position(row), columns), table.interleaved);
      ptx::st_shared_v4(first, *reinterpret_cast<const uint4*>(unit.first.x));
      ptx::st_shared_v4(second, *reinterpret_cast<const uint4*>(unit.second.x));
    }
  }
  // New keys come as they were given: this warp turns those that it has copied of a block.
  FA_DEVICE void rotate_new_keys(int block) const {
    const int first_key = block * kTileN + warp * kCopyKeys;
    const int begin = max(0, item().appended_at - first_key);
    const int end = min(kCopyKeys, item().entry.k_seq.seqlen - first_key);
    if (begin >= end) return;
    __syncwarp();  // the copies of all lanes are complete
    rotate_rows(Unit{smem + slot * Unit::kBytes + warp * kCopyKeys * Unit::kRowBytes}, begin, end,
                lane, kWarpSize,
                [&](int row) { return item().rotary_base + first_key + row - item().appended_at; });
  }

  // Unit `unit` is complete, and the one before it is read by all that read it.
  FA_DEVICE void wait_unit(int unit) const {
    ptx::cp_async_wait_group<kUnits - 2>();
    if (rotates() && unit % 2 == 0) rotate_new_keys(item().begin + unit / 2);
    if constexpr (kKeyParts == 1) {
      __syncthreads();
    } else {
      __syncwarp();
    }
  }
  // Rows of the tile that attend.
  FA_DEVICE int num_rows() const {
    return min(kTileM, item().entry.q_seq.seqlen * group() - first_row());
  }
  // Starts copying Q. What the other rows of the tile hold gets into no other row.
  FA_DEVICE void copy_q() const {
    const DecodeEntry& entry = item().entry;
#pragma unroll 1
    for (int i = threadIdx.x; i < num_rows() * TileQ::kChunksPerRow; i += kThreads) {
      const int row = i / TileQ::kChunksPerRow, chunk = i % TileQ::kChunksPerRow;
      const auto [token, head] = divide(first_row() + row, launch.by_group);
      const bool exists = chunk * 8 < p.head_dim;
      const int64_t offset =
          element_offset(p.q_strides.batch, p.q_strides.token, p.q_strides.head, entry.batch,
                         entry.q_seq.first_row + token, item().head_kv * group() + head) +
          chunk * 8;
      ptx::cp_async_cg_16(smem_q().chunk_address(row, chunk),
                          static_cast<const T*>(p.q) + (exists ? offset : 0), exists ? 16 : 0);
    }
    ptx::cp_async_commit_group();
  }
  FA_DEVICE void load_q_operand(int k, uint32_t (&a)[4]) const {
    const auto by_rows = BlockAddress<TileQ::kRowBytes>::by_rows(lane);
    ptx::ldmatrix_x4(a, smem_q().base + by_rows.offset(kKeyParts == 1 ? 16 * warp : 0, k));
  }
  FA_DEVICE void q_operand(int k, uint32_t (&a)[4]) const {
    if constexpr (kQInRegs) {
      FA_UNROLL
      for (int i = 0; i < 4; ++i) a[i] = q.x[0][k][i];
    } else {
      load_q_operand(k, a);
    }
  }

  // Raw scores become masked ones in log2 units.
  FA_DEVICE void modify_scores(AccumTile<1, kN>& acc_s, int block) const {
    const int first_col = block * kTileN + (kKeyParts == 1 ? 0 : warp * kWarpKeys);
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
    const DecodeEntry& entry = item().entry;
    if (p.score.alibi_slopes != nullptr) {
      FA_UNROLL
      for (int r = 0; r < 2; ++r) {
        const auto [token, in_group] = divide(first_row() + tile_row(r), launch.by_group);
        const int head = item().head_kv * group() + in_group;
        const float slope =
            p.score.alibi_slopes[entry.batch * p.score.alibi_batch_stride + head] * kLog2e;
        const int first_distance =
            first_col + lane % 4 * 2 - (token + entry.mask.seqlen_k - entry.mask.seqlen_q);
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
        const Range keys = key_range(entry.mask, launch.by_group.divide(first_row() + tile_row(r)));
        keep_columns(acc_s, r, keys.begin - first_col, keys.size(), lane);
      }
    }
  }

  // Reads Q, whose group is the first of a CTA, or the last.
  FA_DEVICE void read_q(bool is_first) {
    if (is_first) {
      ptx::cp_async_wait_group<kUnits - 2>();
    } else {
      ptx::cp_async_wait_group<0>();
    }
    __syncthreads();  // Q is complete
    if (rotates()) {
      rotate_rows(smem_q(), 0, num_rows(), threadIdx.x, kThreads, [&](int row) {
        const int token = launch.by_group.divide(first_row() + row);
        return rotary_position(item().rotary_base, token, p.same_position);
      });
      __syncthreads();  // Q is rotated
    }
    if constexpr (kQInRegs) {
      FA_UNROLL
      for (int k = 0; k < kSteps; ++k) load_q_operand(k, q.x[0][k]);
    }
  }

  // S = Q K^T, and the softmax weights of it.
  FA_DEVICE void multiply_qk(AccumTile<1, kN>& acc_s, AccumTile<1, kD>& acc_o,
                             RowSoftmax<T>& softmax, int block) const {
    const auto by_columns = BlockAddress<Unit::kRowBytes>::by_columns(lane);
    const uint32_t k_base = smem + slot * Unit::kBytes + key_row() * Unit::kRowBytes;
    acc_s.clear();
    warp_gemm<T, kSteps>(
        acc_s, [&](int, int k, uint32_t (&a)[4]) { q_operand(k, a); },
        [&](int n, int k, uint32_t (&b)[4]) {
          ptx::ldmatrix_x4(b, k_base + by_columns.offset(16 * n, k));
        });
    modify_scores(acc_s, block);
    softmax.step(acc_s, acc_o);
  }

  // O += P V.
  FA_DEVICE void multiply_pv(AccumTile<1, kD>& acc_o, const AccumTile<1, kN>& acc_p) const {
    const auto by_rows = BlockAddress<Unit::kRowBytes>::by_rows(lane);
    const uint32_t v_base = smem + slot * Unit::kBytes + key_row() * Unit::kRowBytes;
    const AFragments<1, kN / 2> weights = as_a_operand<T>(acc_p);
    warp_gemm<T, kN / 2>(
        acc_o,
        [&](int, int k, uint32_t (&a)[4]) {
          FA_UNROLL
          for (int i = 0; i < 4; ++i) a[i] = weights.x[0][k][i];
        },
        [&](int n, int k, uint32_t (&b)[4]) {
          ptx::ldmatrix_x4_trans(b, v_base + by_rows.offset(16 * k, n));
        });
  }

  // O and the statistics of this warp's rows over its keys of the item.
  // find_next() finds the next item, by one thread, while the first copies are under way.
  template <class FindNext>
  FA_DEVICE void run(AccumTile<1, kD>& acc_o, RowSoftmax<T>& softmax, FindNext find_next) {
    // A warp without a row only copies.
    const bool has_rows =
        kKeyParts > 1 || first_row() + 16 * warp < item().entry.q_seq.seqlen * group();
    const int begin = item().begin, num_units = 2 * (item().end - begin);
    if (num_units > 0) copy_q();
    AccumTile<1, kN> acc_s;
    acc_o.clear();
    softmax = {};
    if (num_units == 0) {
      load_index = max(load_index, index);  // else it would fall out of the three items
      return find_next();
    }
    // One body for all, so that there are few instructions; below unit 0 the ring fills. A unit is
    // complete if at most kUnits - 2 groups are younger: every turn has made one, so there are that
    // many, empty ones included.
    const int first = num_ahead - (kUnits - 1);
#pragma unroll 1
    for (int unit = first; unit < num_units; ++unit) {
      if (unit == 0) {
        find_next();
        read_q(index == 0 || !kRunsAhead);
      }
      if (unit >= 0) wait_unit(unit);
      load_next(unit >= 0 ? index + kRunsAhead : index);
      if (unit < 0) continue;
      if (has_rows) {
        if (unit % 2 == 0) {
          multiply_qk(acc_s, acc_o, softmax, begin + unit / 2);
        } else {
          multiply_pv(acc_o, acc_s);
        }
      }
      slot = slot + 1 == kUnits ? 0 : slot + 1;
      --num_ahead;
    }
    softmax.finish();
  }

  // Calls visit(row, col) for the first columns of the groups of rows [begin, end) of results.
  template <class Visit>
  static FA_DEVICE void for_each_group(int begin, int end, Visit visit) {
#pragma unroll 1
    for (int i = begin * kColumnGroups + threadIdx.x; i < end * kColumnGroups; i += kThreads)
      visit(i / kColumnGroups, i % kColumnGroups * 4);
  }

  FA_DEVICE int* counters() const {
    return launch.counter_row != kNoTileCounter
               ? decode_counters[launch.counter_row]
               : reinterpret_cast<int*>(p.partial) +
                     decode_partial_words(p.num_ctas, kTileM, kHeadDim);
  }

  // Merges the results of the warps; they go to out, or wait for those of the other CTAs.
  FA_DEVICE void store(const AccumTile<1, kD>& acc_o, const RowSoftmax<T>& softmax) {
    // Q, or the ring, is read by all: their place becomes that of the results.
    __syncthreads();
    const Output output{p, launch};
    const int rows = output.stored_rows(item());
    FA_UNROLL
    for (int r = 0; r < 2; ++r) {
      if (kKeyParts > 1 && 8 * r >= rows) break;
      float* row = results() + (16 * warp + r * 8 + lane / 4) * kResultWords;
      FA_UNROLL
      for (int d = 0; d < kD; ++d) {
        *reinterpret_cast<float2*>(row + 8 * d + lane % 4 * 2) = {acc_o.x[0][d][2 * r],
                                                                  acc_o.x[0][d][2 * r + 1]};
      }
      if (lane % 4 == 0)
        *reinterpret_cast<float2*>(row + kHeadDim) = {softmax.row_max[r], softmax.row_sum[r]};
    }
    __syncthreads();  // the results of all warps are there
    const bool whole = item().is_whole;
    for_each_group(0, rows, [&](int row, int col) {
      const float* result = results() + row % kTileM * kResultWords;
      MergedRow merged;
      float max = -INFINITY;
      FA_UNROLL
      for (int part = 0; part < kKeyParts; ++part)
        max = fmaxf(max, result[part * kTileM * kResultWords + kHeadDim]);
      merged.rescale(max);
      FA_UNROLL
      for (int part = 0; part < kKeyParts; ++part) {
        const float* from = result + part * kTileM * kResultWords;
        const float2 statistics = *reinterpret_cast<const float2*>(from + kHeadDim);
        const float weight = ptx::ex2_approx_ftz(statistics.x - finite_max(max));
        merged.sum += weight * statistics.y;
        merged.add(*reinterpret_cast<const float4*>(from + col), weight);
      }
      if (whole) return output.store_row(item(), row, col, merged);
      float* to = output.own_partial(item()) + row * kResultWords;
      *reinterpret_cast<float4*>(to + col) = merged.acc;
      // The whole sector of 32 bytes: L2 would read the rest of it from memory when it is read.
      if (col < 8)
        *reinterpret_cast<float4*>(to + kHeadDim + col) = {merged.max, merged.sum, 0.f, 0.f};
    });
    if (whole) return;
    __syncthreads();  // the partial result of this CTA is written
    if (threadIdx.x == 0) shared.is_last = output.count_part(item(), counters());
    __syncthreads();  // is_last is set
    if (shared.is_last) output.merge_parts(item(), {0, rows}, warp, lane);
  }
};

// One word of every 64 bytes of a kernel's parameters. The first read of each costs as much as a
// read of memory, here all at once.
template <class Params>
FA_DEVICE uint32_t read_parameters(const Params& params) {
  const auto* words = reinterpret_cast<const uint32_t*>(&params);
  uint32_t all = words[sizeof(Params) / 4 - 1];
  FA_UNROLL
  for (int i = 0; i < static_cast<int>(sizeof(Params) / 4); i += 16) all ^= words[i];
  return all;
}

template <class T, int kHeadDim, int kTileM, DecodeCtas kCtas, bool kMayAppend>
FA_DEVICE void decode_tiles(const DecodeParams& p, const DecodeLaunch& launch) {
  using Cta = DecodeCta<T, kHeadDim, kTileM, kCtas, kMayAppend>;
  extern __shared__ __align__(128) char smem[];
  __shared__ DecodeShared<Cta::kThreads> shared;
  // By a warp that seldom has a sequence to count; stored, where keys come later, so that it is
  // read.
  if (threadIdx.x == Cta::kThreads - 1)
    *reinterpret_cast<uint32_t*>(smem) = read_parameters(launch) ^ read_parameters(p);
  if (!find_share<typename Cta::Shape>(p, launch, shared)) return;

  Cta cta{p, launch, shared, smem, ptx::cvta_to_shared(smem)};
  cta.warp = __shfl_sync(0xffffffffu, threadIdx.x / kWarpSize, 0);
  cta.lane = threadIdx.x % kWarpSize;
  AccumTile<1, Cta::kD> acc_o;
  RowSoftmax<T> softmax;
#pragma unroll 1
  for (;; ++cta.index) {
    // The next item has to be there before the ring runs ahead into it; its place is that of the
    // item before the last, which everybody is done with.
    cta.run(acc_o, softmax, [&] {
      if (threadIdx.x == Cta::kThreads - 1) {
        find_sharers(shared.cursor.split, shared.items[cta.index % 3]);
        next_item<typename Cta::Shape>(p, launch, shared.cursor, shared.items[(cta.index + 1) % 3]);
      }
    });
    cta.store(acc_o, softmax);
    __syncthreads();  // the results are read
    if (shared.items[(cta.index + 1) % 3].end < 0) return;
  }
}

template <class T, int kHeadDim, int kTileM, DecodeCtas kCtas, bool kMayAppend>
__global__ void __launch_bounds__(decode_config(kHeadDim, kCtas).num_threads(),
                                  decode_config(kHeadDim, kCtas).ctas_per_sm)
    decode_kernel(const __grid_constant__ DecodeLaunch launch,
                  const __grid_constant__ DecodeParams p) {
  if (!kMayAppend || static_cast<int>(blockIdx.x) < p.num_ctas)
    decode_tiles<T, kHeadDim, kTileM, kCtas, kMayAppend>(p, launch);
  if constexpr (kMayAppend) {
    // Nobody reads what is written here, so it needs no order. CTAs behind num_ctas begin with it.
    for (int tile = gridDim.x - 1 - blockIdx.x; tile < launch.append_tiles.num_tiles;
         tile += gridDim.x)
      append_kv_tile<T, kVecSize<T>, kHeadsPerThread, decode_config(kHeadDim, kCtas).num_threads()>(
          p.append, launch.append_tiles, tile);
  }
}

// Also sees to the counters of the parts of tiles.
template <class T, int kHeadDim, int kThreads>
cudaError_t prepare_launch(const DecodeParams& p, cudaStream_t stream, DecodeLaunch& launch) {
  launch = decode_launch(p);
  if (p.append.k != nullptr) launch.append_tiles = append_kv_tiles<kVecSize<T>>(p.append, kThreads);
  if (p.num_splits == 1) return cudaSuccess;
  const cudaError_t error = tile_counter(stream, launch.counter_row);
  if (launch.counter_row >= kNumDecodeCounters) launch.counter_row = kNoTileCounter;
  if (error != cudaSuccess || launch.counter_row != kNoTileCounter) return error;
  return cudaMemsetAsync(p.partial + decode_partial_words(p.num_ctas, p.tile_m, kHeadDim), 0,
                         p.num_ctas * sizeof(int), stream);
}

template <class T, int kHeadDim, int kTileM, DecodeCtas kCtas, bool kMayAppend>
int launch_decode_kernel(const DecodeParams& p, cudaStream_t stream) {
  constexpr int kThreads = decode_config(kHeadDim, kCtas).num_threads();
  constexpr int kSmemBytes = decode_smem_bytes(kHeadDim, kTileM, kCtas);
  constexpr auto kKernel = decode_kernel<T, kHeadDim, kTileM, kCtas, kMayAppend>;
  DecodeLaunch launch;
  cudaError_t error = prepare_launch<T, kHeadDim, kThreads>(p, stream, launch);
  if (error == cudaSuccess) error = allow_dynamic_smem<kKernel>(kSmemBytes);
  if (error != cudaSuccess || p.num_ctas == 0) return error;
  const int appending = min(launch.append_tiles.num_tiles, p.num_ctas);
  kKernel<<<p.num_ctas + appending, kThreads, kSmemBytes, stream>>>(launch, p);
  return cudaGetLastError();
}

// p.tile_m is kDecodeFewRows. Those are short calls, where every instruction counts: a kernel of
// their own without append.
template <class T, int kHeadDim, DecodeCtas kCtas>
int launch_decode_few_rows(const DecodeParams& p, cudaStream_t stream) {
  return p.append.k != nullptr
             ? launch_decode_kernel<T, kHeadDim, kDecodeFewRows, kCtas, true>(p, stream)
             : launch_decode_kernel<T, kHeadDim, kDecodeFewRows, kCtas, false>(p, stream);
}

// p.tile_m is kDecodeManyRows.
template <class T, int kHeadDim>
int launch_decode_many_rows(const DecodeParams& p, cudaStream_t stream) {
  return launch_decode_kernel<T, kHeadDim, kDecodeManyRows, DecodeCtas::kDeep, true>(p, stream);
}

}  // namespace fa
