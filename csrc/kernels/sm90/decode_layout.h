// What the warps of Hopper's decode kernel (decode.cuh) agree on: parameters of the launch, shared
// memory, barriers, and which rows and tiles are whose.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include "core/tile_config.h"
#include "kernels/sm80/decode_work.h"
#include "ptx/mbarrier.h"
#include "tile/pipeline.h"
#include "tile/smem_tile_sm90.h"

namespace fa {

// What the launcher adds to the parameters.
struct WgmmaDecodeLaunch {
  CUtensorMap k, v;  // a cache or a page is a batch entry
  DecodeLaunch common;
  float threshold;     // kMaxWeightLog2 / common.scale
  int box_rows;        // keys that one copy brings: a block, or a page's part of it
  uint64_t l2_policy;  // of K and V
  bool by_turns;       // a tile has one warpgroup's rows, and they take the tiles by turns
};

template <int kHeadDim, DecodeTiles kTiles>
struct WgmmaDecodeLayout {
  static constexpr FwdTileConfig kTile = sm90_decode_tile_config(kHeadDim, kTiles);
  static constexpr int kConsumers = kTile.num_warps / 4;  // warpgroups
  static constexpr int kThreads = fwd_num_threads(Arch::kSm90, kTile);
  static constexpr int kRows = 64;  // of a warpgroup
  // Finding an item takes more registers than the scheduler of the forward has.
  static constexpr WarpgroupRegisters kRegisters{168, 56, 224};
  static_assert(kConsumers == 2 && kTile.tile_m == kRows * kConsumers);

  using Shape = DecodeShape<kTile.tile_m, kTile.tile_n, kThreads, false>;
  using Shared = DecodeShared<kThreads>;
  using TileQ = SwizzledTile<kRows, kHeadDim>;
  using TileKV = SwizzledTile<kTile.tile_n, kHeadDim>;
  using KvPipeline = Pipeline<kTile.num_stages>;
  using ItemPipeline = Pipeline<3>;  // of DecodeShared::items
  using QPipeline = Pipeline<1>;     // one for each consumer warpgroup

  static constexpr int kK = kConsumers * TileQ::kBytes;
  static constexpr int kV = kK + kTile.num_stages * TileKV::kBytes;
  static constexpr int kKBarriers = kV + kTile.num_stages * TileKV::kBytes;
  static constexpr int kVBarriers = kKBarriers + KvPipeline::kBarrierBytes;
  static constexpr int kItemBarriers = kVBarriers + KvPipeline::kBarrierBytes;
  static constexpr int kQBarriers = kItemBarriers + ItemPipeline::kBarrierBytes;
  static constexpr int kTurnBarriers = kQBarriers + kConsumers * QPipeline::kBarrierBytes;
  static constexpr int kShared = kTurnBarriers + kConsumers * 8;
  static constexpr int kSmemBytes = sm90_decode_smem_bytes(kHeadDim, kTiles);
  static_assert(kShared + static_cast<int>(sizeof(Shared)) <= kSmemBytes);

  static FA_DEVICE TileQ smem_q(uint32_t smem, int warpgroup) {
    return {smem + warpgroup * TileQ::kBytes};
  }
  static FA_DEVICE TileKV smem_k(uint32_t smem, int stage) {
    return {smem + kK + stage * TileKV::kBytes};
  }
  static FA_DEVICE TileKV smem_v(uint32_t smem, int stage) {
    return {smem + kV + stage * TileKV::kBytes};
  }
  // The barriers of a warpgroup.
  static FA_DEVICE uint32_t q_barriers(uint32_t smem, int warpgroup) {
    return smem + kQBarriers + warpgroup * QPipeline::kBarrierBytes;
  }
  // Complete when warpgroup `warpgroup` may begin its next tile, where they take turns.
  static FA_DEVICE uint32_t turn_barrier(uint32_t smem, int warpgroup) {
    return smem + kTurnBarriers + warpgroup * 8;
  }
  static FA_DEVICE void init_barriers(uint32_t smem, bool by_turns) {
    constexpr int kWarps = kTile.num_warps / kConsumers;  // of a warpgroup
    const int num_releases = by_turns ? kWarps : kTile.num_warps;
    KvPipeline::init(smem + kKBarriers, num_releases);
    KvPipeline::init(smem + kVBarriers, num_releases);
    ItemPipeline::init(smem + kItemBarriers, kTile.num_warps + 1 + kConsumers);  // and the loaders
    FA_UNROLL
    for (int i = 0; i < kConsumers; ++i) {
      QPipeline::init(q_barriers(smem, i), kWarps);
      ptx::mbarrier_init(turn_barrier(smem, i), kWarps);
    }
    ptx::fence_mbarrier_init();
  }
};

// What a consumer warpgroup has of the items of its CTA: rows from first_row on of all of them, or
// every other one.
struct WarpgroupShare {
  int warpgroup, first_row;
  bool by_turns;

  FA_DEVICE WarpgroupShare(const WgmmaDecodeLaunch& launch, int warpgroup, int rows)
      : warpgroup(warpgroup),
        first_row(launch.by_turns ? 0 : warpgroup * rows),
        by_turns(launch.by_turns) {}
  FA_DEVICE bool has(int turn) const { return !by_turns || turn % 2 == warpgroup; }
};

// Rows of the tile that attend.
template <class Layout>
FA_DEVICE int num_tile_rows(const DecodeLaunch& launch, const DecodeItem& item) {
  constexpr int kTileM = Layout::kTile.tile_m;
  return min(kTileM,
             item.entry.q_seq.seqlen * launch.by_group.divisor() - item.entry.m_block * kTileM);
}

}  // namespace fa
