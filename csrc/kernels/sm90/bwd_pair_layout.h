// Compile-time sizes of the SM90 backward of large head_dim, and where things lie in shared memory.
#pragma once
#include "attention/score_mod.h"
#include "core/tile_config.h"
#include "kernels/sm90/bwd_tile.h"
#include "ptx/cluster.h"
#include "tile/mma_sm90.h"
#include "tile/pipeline.h"

namespace fa {

// kNarrowV: without score modifications, and head_dim_v is at most 128.
enum class BwdPairKind { kPlain, kScoreMod, kNarrowV };

template <class T, int kHeadDim, BwdPairKind kKind>
struct BwdPairLayout {
  static constexpr bool kScoreMod = kKind == BwdPairKind::kScoreMod;
  static constexpr BwdTileConfig kTile = bwd_tile_config(Arch::kSm90, kHeadDim);
  static constexpr int kTileM = kBwdTileM, kKeys = 64;  // keys of a CTA
  static constexpr int kCtas = kTile.num_ctas;
  static constexpr int kThreads = bwd_num_threads(Arch::kSm90, kTile);
  static constexpr BwdRegisters kRegisters = sm90_bwd_registers(kHeadDim);
  static constexpr int kSlabs = kHeadDim / 64;
  static_assert(kTile.tile_m == kTileM && kTile.tile_n == kBwdTileN && kBwdTileN == 2 * kKeys);
  static_assert(kCtas == 2 && kThreads == 4 * kWarpgroupSize && kHeadDim % 64 == 0 && kSlabs > 2);

  // Columns of dV and of dK: the first of one warpgroup, the rest of the other. dO comes in these
  // two parts, a ring of buffers of the larger one; where V is narrow, in the first alone.
  static constexpr int kLow = 128, kHigh = kHeadDim - kLow;
  static constexpr bool kHasHighV = kKind != BwdPairKind::kNarrowV;
  static constexpr int kStages = kTile.num_q_stages;
  static constexpr int kDoutStages = kTile.num_dout_stages;
  // P, then dS, of a step; and as many of the other CTA's dS. Score modifications pass more between
  // the warpgroups, for which one has to go.
  static constexpr int kScoresStages = kScoreMod && kHeadDim > 192 ? 1 : kTile.num_ds_stages;

  using TileKept = SwizzledTile<kKeys, kHeadDim>;  // K
  using TileV = SwizzledTile<kKeys, kHasHighV ? kHeadDim : kLow>;
  using TileShared = SwizzledTile<kKeys, kLow>;       // of the other CTA's K
  using TileStream = SwizzledTile<kTileM, kHeadDim>;  // Q
  using TileLow = SwizzledTile<kTileM, kLow>;         // part of dO
  using TileHigh = SwizzledTile<kTileM, kHigh>;
  using TileScores = SwizzledTile<kKeys, kTileM>;  // dS; rows are keys
  using KeptPipeline = Pipeline<1>;
  using StreamPipeline = Pipeline<kStages>;
  using DoutPipeline = Pipeline<kDoutStages>;
  using ScoresPipeline = Pipeline<kScoresStages>;

  static constexpr int kStatisticBytes = kTileM * static_cast<int>(sizeof(float));
  static constexpr int kK = 0, kV = kK + TileKept::kBytes;
  static constexpr int kShared = kV + TileKept::kBytes;
  static constexpr int kQ = kShared + TileShared::kBytes;
  static constexpr int kDout = kQ + kStages * TileStream::kBytes;
  static constexpr int kScores = kDout + kDoutStages * TileLow::kBytes;
  static constexpr int kPeerScores = kScores + kScoresStages * TileScores::kBytes;
  // One buffer is enough: who writes it waits for dS of the step before, so that it has been read.
  static constexpr int kPassed = kPeerScores + kScoresStages * TileScores::kBytes;
  static constexpr int kStatistics = kPassed + (kScoreMod ? TileScores::kBytes : 0);
  static constexpr int kKBarriers = kStatistics + kStages * 2 * kStatisticBytes;
  static constexpr int kVBarriers = kKBarriers + KeptPipeline::kBarrierBytes;
  static constexpr int kSharedBarriers = kVBarriers + KeptPipeline::kBarrierBytes;
  static constexpr int kQBarriers = kSharedBarriers + KeptPipeline::kBarrierBytes;
  static constexpr int kDoutBarriers = kQBarriers + StreamPipeline::kBarrierBytes;
  static constexpr int kProbsBarriers = kDoutBarriers + DoutPipeline::kBarrierBytes;
  static constexpr int kScoresBarriers = kProbsBarriers + ScoresPipeline::kBarrierBytes;
  static constexpr int kPeerBarriers = kScoresBarriers + ScoresPipeline::kBarrierBytes;
  static constexpr int kSmemBytes = kPeerBarriers + ScoresPipeline::kBarrierBytes;
  static_assert(kSmemBytes <=
                (kScoreMod ? max_smem_bytes(Arch::kSm90) : sm90_bwd_smem_bytes(kTile, kHeadDim)));

  static FA_DEVICE TileKept smem_k(uint32_t smem) { return {smem + kK}; }
  static FA_DEVICE TileV smem_v(uint32_t smem) { return {smem + kV}; }
  static FA_DEVICE TileStream smem_q(uint32_t smem, int stage) {
    return {smem + kQ + stage * TileStream::kBytes};
  }
  static FA_DEVICE uint32_t smem_dout(uint32_t smem, int stage) {
    return smem + kDout + stage * TileLow::kBytes;
  }
  static FA_DEVICE TileScores smem_scores(uint32_t smem, int stage) {
    return {smem + kScores + stage * TileScores::kBytes};
  }
  static FA_DEVICE TileScores smem_peer_scores(uint32_t smem, int stage) {
    return {smem + kPeerScores + stage * TileScores::kBytes};
  }
  static constexpr bool kPipelined = false;  // delta is kept as it is
  // -LSE in log2 units of the queries of a stage; delta stands kStatisticBytes further on.
  static FA_DEVICE uint32_t statistics(uint32_t smem, int stage) {
    return smem + kStatistics + stage * 2 * kStatisticBytes;
  }

  // Columns of dQ that a CTA adds up of all keys of the pair, in slabs of 64: two of four, or of
  // three two and one by turns. They begin at the first slab or end with the last one.
  static FA_DEVICE int first_shared_slab(int rank) { return rank == 0 ? 0 : kSlabs - 2; }
  static FA_DEVICE int num_dq_slabs(int rank, int step) {
    return kSlabs == 4 || (step + rank) % 2 == 0 ? 2 : 1;
  }

  static FA_DEVICE void init_barriers(uint32_t smem) {
    KeptPipeline::init(smem + kKBarriers, 1);
    KeptPipeline::init(smem + kVBarriers, 1);
    KeptPipeline::init(smem + kSharedBarriers, 1);
    StreamPipeline::init(smem + kQBarriers, 8, 2);  // filled with Q and statistics
    DoutPipeline::init(smem + kDoutBarriers, 8);
    ScoresPipeline::init(smem + kProbsBarriers, 1, 4);
    // dS: released by the consumers and by both CTAs' dQ.
    ScoresPipeline::init(smem + kScoresBarriers, 8 + kCtas * 4, 4);
    ScoresPipeline::init(smem + kPeerBarriers, 1);
    ptx::fence_mbarrier_init();
  }
};

// Waits for buffers that warps of both CTAs release.
template <class Pipeline>
FA_DEVICE void wait_empty_in_pair(const Pipeline& pipeline) {
  ptx::mbarrier_wait_cluster(pipeline.empty(), pipeline.parity);
}

// One arrival of a warp, whose lanes are all done with a buffer, in each CTA.
template <class Pipeline>
FA_DEVICE void release_in_pair(const Pipeline& pipeline, int lane) {
  __syncwarp();
  if (lane < 2) ptx::mbarrier_arrive_cluster(ptx::cluster_address(pipeline.empty(), lane));
}

}  // namespace fa
