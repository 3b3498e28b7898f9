// What the threads of the SM90 forward share: the work of a tile, the launch, sizes and places in
// shared memory. See fwd.cuh.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include "attention/score_mod.h"
#include "core/fast_div.h"
#include "core/mask.h"
#include "core/params.h"
#include "core/seqlen.h"
#include "core/tile_config.h"
#include "core/tile_scheduler.h"
#include "ptx/mbarrier.h"
#include "ptx/warpgroup.h"
#include "tile/pipeline.h"
#include "tile/smem_tile_sm90.h"

namespace fa {

// A tile that the producer hands to the consumers, in shared memory.
template <int kConsumers>
struct FwdWork {
  TileCoord tile;  // batch < 0: there are no more
  SeqlenInfo q_seq, k_seq;
  void* out;   // of the tile's first row
  float* lse;  // likewise
  MaskSpec mask;
  BlockRange blocks;                  // that are loaded: what any of the tile's rows needs
  BlockRange own_blocks[kConsumers];  // what those of a warpgroup compute
  ScoreMod mod;                       // set iff the kernel has kScoreMod
};

// What the launcher adds to the parameters.
struct FwdLaunch {
  CUtensorMap q, k, v, out;  // varlen: one batch entry of all rows
  TileOrder order;           // fixed length
  FastDiv num_heads, group_size;
  int num_tiles;
  int counter;       // tile_counters[counter] deals the tiles; kNoTileCounter: in turn
  float scale_log2;  // of the softmax: softmax_scale * log2(e); 1 behind a ScoreMod
  float threshold;   // kMaxWeightLog2 / scale_log2
  float zero;        // 0, see SteadySoftmax::weigh_spread()
};

// Sizes, and where things lie in shared memory.
template <class T, int kHeadDim, int kHeadDimV, Sm90FwdTile kWhich>
struct FwdLayout {
  static constexpr BuiltHeadDims kBuilt{kHeadDim, kHeadDimV};
  static constexpr FwdTileConfig kTile = sm90_fwd_tile_config(kBuilt, kWhich);
  static constexpr bool kScoreMod = kWhich == Sm90FwdTile::kScoreMod;
  static constexpr int kConsumers = kTile.num_warps / 4;  // warpgroups
  static constexpr int kThreads = fwd_num_threads(Arch::kSm90, kTile);
  static constexpr bool kTakesTurns = kConsumers == 3 && kHeadDim > 64;
  // At head_dim 64 exponentials that wait for each other are better than turns: weigh_spread().
  static constexpr bool kSpreadsWeights = kConsumers == 3 && kHeadDim == 64;
  // Up to 8 % faster on an H200 at head_dim 64 and 128, up to 4 % slower at 256.
  static constexpr bool kKeepsReference = !kScoreMod && (kHeadDim == 64 || kHeadDim == 128);
  // Whole tiles of O leave by TMA through the stage of their Q, while the next Q is in the other
  // one.
  static constexpr bool kStoresByTma = kTile.num_q_stages == 2 && kHeadDimV == kHeadDim;
  // From the first keys to the last: 1 to 4 % faster above 128 on an H200, 5 to 9 % slower for
  // warpgroups that take turns. Why is not known.
  static constexpr bool kAscending = kHeadDim > 128;
  static constexpr int kStep = kAscending ? 1 : -1;  // from a block to the next
  static constexpr WarpgroupRegisters kRegisters = warpgroup_registers(kConsumers);
  static constexpr int kRows = 64;  // of a warpgroup
  static constexpr int kStages = kTile.num_stages, kQStages = kTile.num_q_stages;
  static_assert(kTile.tile_m == kRows * kConsumers && kStages >= 2);

  using TileQ = SwizzledTile<kRows, kHeadDim>;
  using TileK = SwizzledTile<kTile.tile_n, kHeadDim>;
  using TileV = SwizzledTile<kTile.tile_n, kHeadDimV>;
  using KvPipeline = Pipeline<kStages>;
  using QPipeline = Pipeline<kQStages>;
  using WorkPipeline = Pipeline<2>;
  using Work = FwdWork<kConsumers>;

  static constexpr int kK = kConsumers * kQStages * TileQ::kBytes;
  static constexpr int kV = kK + kStages * TileK::kBytes;
  static constexpr int kKBarriers = kV + kStages * TileV::kBytes;
  static constexpr int kVBarriers = kKBarriers + KvPipeline::kBarrierBytes;
  static constexpr int kQBarriers = kVBarriers + KvPipeline::kBarrierBytes;  // for each warpgroup
  static constexpr int kWorkBarriers = kQBarriers + kConsumers * QPipeline::kBarrierBytes;
  static constexpr int kWork = kWorkBarriers + WorkPipeline::kBarrierBytes;
  static constexpr int kSmemBytes = sm90_fwd_smem_bytes(kTile, kBuilt);
  static_assert(kWork + 2 * static_cast<int>(sizeof(Work)) <= kSmemBytes);

  static FA_DEVICE int first_block(const BlockRange& blocks) {
    return kAscending ? blocks.begin : blocks.end - 1;
  }
  static FA_DEVICE int last_block(const BlockRange& blocks) {
    return kAscending ? blocks.end - 1 : blocks.begin;
  }

  static FA_DEVICE TileQ smem_q(uint32_t smem, int warpgroup, int stage) {
    return {smem + (warpgroup * kQStages + stage) * TileQ::kBytes};
  }
  static FA_DEVICE TileK smem_k(uint32_t smem, int stage) {
    return {smem + kK + stage * TileK::kBytes};
  }
  static FA_DEVICE TileV smem_v(uint32_t smem, int stage) {
    return {smem + kV + stage * TileV::kBytes};
  }
  static FA_DEVICE uint32_t q_barriers(uint32_t smem, int warpgroup) {
    return smem + kQBarriers + warpgroup * QPipeline::kBarrierBytes;
  }
  static FA_DEVICE Work& work(char* smem, int slot) {
    return reinterpret_cast<Work*>(smem + kWork)[slot];
  }

  static FA_DEVICE void init_barriers(uint32_t smem) {
    KvPipeline::init(smem + kKBarriers, kTile.num_warps);
    KvPipeline::init(smem + kVBarriers, kTile.num_warps);
    for (int i = 0; i < kConsumers; ++i) QPipeline::init(q_barriers(smem, i), 4);
    WorkPipeline::init(smem + kWorkBarriers, kTile.num_warps + 1);  // and the loader
    ptx::fence_mbarrier_init();
  }
};

}  // namespace fa
