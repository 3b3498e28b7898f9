// What the warps of Hopper's decode kernel (decode.cuh) agree on: parameters of the launch, shared
// memory and its barriers.
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
};

// kMerges: parts of a tile are merged in the launch itself, as tiles are many.
template <int kHeadDim, DecodeTiles kTiles, bool kMerges>
struct WgmmaDecodeLayout {
  static constexpr bool kHasRounds = kMerges;  // of core/decode_schedule.h
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

  static constexpr int kK = kConsumers * TileQ::kBytes;
  static constexpr int kV = kK + kTile.num_stages * TileKV::kBytes;
  static constexpr int kKBarriers = kV + kTile.num_stages * TileKV::kBytes;
  static constexpr int kVBarriers = kKBarriers + KvPipeline::kBarrierBytes;
  static constexpr int kItemBarriers = kVBarriers + KvPipeline::kBarrierBytes;
  static constexpr int kShared = kItemBarriers + ItemPipeline::kBarrierBytes;
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
  static FA_DEVICE void init_barriers(uint32_t smem) {
    KvPipeline::init(smem + kKBarriers, kTile.num_warps);
    KvPipeline::init(smem + kVBarriers, kTile.num_warps);
    ItemPipeline::init(smem + kItemBarriers, kTile.num_warps + 1);  // and the loader
    ptx::fence_mbarrier_init();
  }
};

}  // namespace fa
