// Where the results of a decode kernel go: to out and lse, or, of a tile that is cut, into global
// memory, to be merged.
#pragma once
#include <cuda_runtime.h>

#include "kernels/sm80/decode_rows.h"
#include "kernels/sm80/decode_work.h"
#include "ptx/global_memory.h"
#include "ptx/math.h"
#include "ptx/reduction.h"
#include "tile/vec.h"

namespace fa {

// Of a kernel whose CTA merges with kWarps warps.
template <class T, int kHeadDim, int kTileM, int kWarps>
struct DecodeOutput {
  static constexpr int kResultWords = decode_result_words(kHeadDim);
  static constexpr int kColumnGroups = kHeadDim / 4;  // of 4 columns, in a row of results
  static constexpr int kLaneGroups = decode_lane_groups(kHeadDim);
  static constexpr int kMergeLoads = kHeadDim > 128 ? 8 : 16;

  const DecodeParams& p;
  const DecodeLaunch& launch;

  // Rows of the tile that exist; rows that belong to no sequence are all in one, without a key.
  FA_DEVICE int stored_rows(const DecodeItem& item) const {
    const DecodeEntry& entry = item.entry;
    const int stored = entry.q_seq.stored * launch.by_group.divisor() - entry.m_block * kTileM;
    return entry.batch < p.batch_size ? min(kTileM, stored) : stored;
  }

  // Query of a row of the tile, query head, and where its lse goes.
  struct Row {
    int token, head;
    float* lse;
  };
  FA_DEVICE Row row_of(const DecodeItem& item, int row) const {
    const DecodeEntry& entry = item.entry;
    const auto [token, in_group] = divide(entry.m_block * kTileM + row, launch.by_group);
    const int head = item.head_kv * launch.by_group.divisor() + in_group;
    const int64_t at =
        p.seqlens_q.cu_seqlens != nullptr
            ? static_cast<int64_t>(head) * p.total_q + entry.q_seq.first_row
            : (static_cast<int64_t>(entry.batch) * p.num_heads_q + head) * p.seqlens_q.max_seqlen;
    return {token, head, p.lse + at + token};
  }
  FA_DEVICE T* out_row(const DecodeItem& item, const Row& row) const {
    return static_cast<T*>(p.out) +
           element_offset(p.out_strides.batch, p.out_strides.token, p.out_strides.head,
                          item.entry.batch, item.entry.q_seq.first_row + row.token, row.head);
  }

  // Columns [col, col + 4) of a row of the tile go to out, and with column 0 its lse.
  FA_DEVICE void store_row(const DecodeItem& item, int row, int col,
                           const MergedRow& merged) const {
    const Row to = row_of(item, row);
    const bool exists = to.token < item.entry.q_seq.seqlen && merged.sum != 0.f;
    const float scale = ptx::rcp_approx_ftz(merged.sum);
    uint2 values = {0u, 0u};
    if (exists) {
      values.x = pack<T>(merged.acc.x * scale, merged.acc.y * scale);
      values.y = pack<T>(merged.acc.z * scale, merged.acc.w * scale);
    }
    if (col < p.head_dim_v) ptx::st_global_v2(out_row(item, to) + col, values);
    if (col == 0)
      *to.lse = exists ? (merged.max + ptx::lg2_approx_ftz(merged.sum)) * kLn2 : -INFINITY;
  }

  // The result of CTA `cta` for a tile: the one that it has the begin of, or another. Those of a
  // tile follow each other but for the first.
  FA_DEVICE float* partial(int cta, bool is_first) const {
    const int64_t at = cta + (is_first ? p.num_ctas : 0);
    return p.partial + at * (kTileM * kResultWords);
  }
  FA_DEVICE float* own_partial(const DecodeItem& item) const {
    return partial(blockIdx.x, static_cast<int>(blockIdx.x) == item.first_cta);
  }

  // Counts the partial result of this CTA, which is written; one thread. True: all of the tile are
  // there, visible to this thread and those that it meets after this. counters: [num_ctas].
  FA_DEVICE bool count_part(const DecodeItem& item, int* counters) const {
    int* counter = counters + item.first_cta;
    const int num_parts = item.last_cta - item.first_cta + 1;
    const bool is_last = ptx::atom_add_acq_rel_gpu_s32(counter, 1) == num_parts - 1;
    if (is_last) *counter = 0;
    return is_last;
  }

  // Merges all parts of some rows of the tile, by warps 0 .. kWarps - 1.
  FA_DEVICE void merge_parts(const DecodeItem& item, Range rows, int warp, int lane) const {
    // kMergeLoads loads of each lane are under way at a time.
    constexpr int kParts = kMergeLoads / kLaneGroups;
    if (rows.size() > kWarps && item.last_cta - item.first_cta < kParts / 2) {
      merge_rows<2, kParts / 2>(item, rows, warp, lane);
    } else {
      merge_rows<1, kParts>(item, rows, warp, lane);
    }
  }

 private:
  // kNumParts parts of kNumRows rows of a warp at a time.
  template <int kNumRows, int kNumParts>
  FA_DEVICE void merge_rows(const DecodeItem& item, Range rows, int warp, int lane) const {
    using Parts = PartsOfRow<kHeadDim, kNumParts>;
    constexpr int kStride = kTileM * kResultWords;
    const int first = item.first_cta, num_parts = item.last_cta - first + 1;
#pragma unroll 1
    for (int begin = rows.begin + warp; begin < rows.end; begin += kNumRows * kWarps) {
      MergedRow merged[kNumRows][kLaneGroups];
#pragma unroll 1
      for (int part = 0; part < num_parts; part += kNumParts) {
        Parts parts[kNumRows];
        FA_UNROLL
        for (int r = 0; r < kNumRows; ++r) {
          const int row = begin + r * kWarps;
          const float* from = partial(first + part, false) + row * kResultWords;
          parts[r].load(part == 0 ? partial(first, true) + row * kResultWords : from, from, kStride,
                        row < rows.end ? num_parts - part : 0, lane);
        }
        FA_UNROLL
        for (int r = 0; r < kNumRows; ++r) parts[r].add_to(merged[r]);
      }
      FA_UNROLL
      for (int r = 0; r < kNumRows; ++r) {
        FA_UNROLL
        for (int g = 0; g < kLaneGroups; ++g) {
          const int row = begin + r * kWarps, group = lane + g * kWarpSize;
          if (row < rows.end && group < kColumnGroups)
            store_row(item, row, 4 * group, merged[r][g]);
        }
      }
    }
  }
};

}  // namespace fa
