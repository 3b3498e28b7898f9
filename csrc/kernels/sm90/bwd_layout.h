// Compile-time sizes of the SM90 backward: the order of its products, the registers of its roles,
// and where things lie in shared memory.
#pragma once
#include "attention/score_mod.h"
#include "core/tile_config.h"
#include "kernels/sm90/bwd_tile.h"
#include "ptx/shared_memory.h"
#include "tile/mma_sm90.h"
#include "tile/pipeline.h"

namespace fa {

// Where dQ of a tile of queries goes from the registers, which a warp that adds says of each step.
struct BwdDqTarget {
  static constexpr int kBytes = 16;  // in shared memory

  uint64_t rows;                  // address of the first; 0: to the warp that adds
  uint32_t num_rows, num_stored;  // that attend, that exist; at most kBwdTileM
  bool has_sums;                  // those of other tiles are in the buffer

  FA_DEVICE void store(uint32_t smem) const {
    ptx::st_shared_v4(smem, uint4{static_cast<uint32_t>(rows), static_cast<uint32_t>(rows >> 32),
                                  num_rows | num_stored << 16, has_sums});
  }
  static FA_DEVICE BwdDqTarget load(uint32_t smem) {
    const uint4 x = ptx::ld_shared_v4(smem);
    return {static_cast<uint64_t>(x.y) << 32 | x.x, x.z & 0xffff, x.z >> 16, x.w != 0};
  }
};

template <class T, int kHeadDim, bool kScoreMod>
struct BwdLayout {
  static constexpr BwdTileConfig kTile = bwd_tile_config(Arch::kSm90, kHeadDim);
  static constexpr int kTileM = kBwdTileM, kTileN = kBwdTileN;
  static constexpr int kConsumers = 2, kKeys = 64;  // keys of a consumer
  static constexpr int kConsumerWarps = 4 * kConsumers;
  static constexpr int kThreads = bwd_num_threads(Arch::kSm90, kTile);
  static constexpr BwdRegisters kRegisters = sm90_bwd_registers(kHeadDim);
  static constexpr int kStages = kTile.num_q_stages;
  static_assert(kTile.tile_m == kTileM && kTile.tile_n == kTileN && kTileN == kConsumers * kKeys);
  static_assert(kTile.num_warps == kConsumerWarps && kTile.num_dout_stages == kStages);
  static_assert(kTile.num_ds_stages == 2 && kTile.dq_through_smem && !kTile.v_in_regs);

  // The order of the products. Head_dim 64: BwdPipelinedConsumer, 13 % slower with softcap; with
  // score modifications dP is issued ahead of the exponentials, and dV runs while dS is computed.
  // Else no registers are left for that: one consumer computes while the other multiplies, and they
  // take turns with the exponentials.
  static constexpr bool kHasRoom = kHeadDim == 64;
  static constexpr bool kPipelined = kHasRoom && !kScoreMod;
  static constexpr bool kKeptInRegs = kPipelined;  // V as an operand
  static constexpr bool kTakesTurns = !kHasRoom;

  using TileKept = SwizzledTile<kKeys, kHeadDim>;     // K or V of a consumer
  using TileStream = SwizzledTile<kTileM, kHeadDim>;  // Q or dO
  using TileScores = SwizzledTile<kKeys, kTileM>;     // dS of a consumer; rows are keys
  using KeptPipeline = Pipeline<1>;
  using StreamPipeline = Pipeline<kStages>;
  using ScoresPipeline = Pipeline<2>;

  // dQ passes through shared memory kDqCols columns at a time, [column / 8][thread][4] floats.
  static constexpr int kDqCols = kHeadDim == 128 ? 64 : kHeadDim;
  static constexpr int kDqParts = kHeadDim / kDqCols;
  // Named barriers of a part's buffer: an adder's sums are there, they have been read.
  static constexpr int kDqAdders = 2;
  static constexpr int kDqFull = 5, kDqEmpty = kDqFull + kDqAdders * kDqParts;
  static constexpr int kDqThreads = kWarpgroupSize + kWarpSize;  // that meet there
  // The same from one adder to the other.
  static constexpr int kDqFree = kDqEmpty + kDqParts;
  static_assert(kDqFree + kDqAdders * kDqParts <= 16);
  static constexpr int kDqPartBytes = kTileM * kDqCols * static_cast<int>(sizeof(float));

  static constexpr int kStatisticBytes = kTileM * static_cast<int>(sizeof(float));
  static constexpr int kK = 0, kV = kK + kConsumers * TileKept::kBytes;
  static constexpr int kQ = kV + kConsumers * TileKept::kBytes;
  static constexpr int kDout = kQ + kStages * TileStream::kBytes;
  static constexpr int kScores = kDout + kStages * TileStream::kBytes;
  static constexpr int kDq = kScores + 2 * kConsumers * TileScores::kBytes;
  static constexpr int kStatistics = kDq + kDqParts * kDqPartBytes;
  static constexpr int kKBarriers = kStatistics + kStages * 2 * kStatisticBytes;
  static constexpr int kVBarriers = kKBarriers + KeptPipeline::kBarrierBytes;
  static constexpr int kQBarriers = kVBarriers + KeptPipeline::kBarrierBytes;
  static constexpr int kDoutBarriers = kQBarriers + StreamPipeline::kBarrierBytes;
  static constexpr int kScoresBarriers = kDoutBarriers + StreamPipeline::kBarrierBytes;
  static constexpr int kDqTargets = kScoresBarriers + kConsumers * ScoresPipeline::kBarrierBytes;
  static constexpr int kDqSumsBarriers = kDqTargets + kDqAdders * BwdDqTarget::kBytes;
  static constexpr int kSmemBytes = sm90_bwd_smem_bytes(kTile, kHeadDim);
  static_assert(kDqSumsBarriers + 8 * kDqParts <= kSmemBytes);

  static FA_DEVICE TileKept smem_k(uint32_t smem, int consumer) {
    return {smem + kK + consumer * TileKept::kBytes};
  }
  static FA_DEVICE TileKept smem_v(uint32_t smem, int consumer) {
    return {smem + kV + consumer * TileKept::kBytes};
  }
  static FA_DEVICE TileStream smem_q(uint32_t smem, int stage) {
    return {smem + kQ + stage * TileStream::kBytes};
  }
  static FA_DEVICE TileStream smem_dout(uint32_t smem, int stage) {
    return {smem + kDout + stage * TileStream::kBytes};
  }
  static FA_DEVICE TileScores smem_scores(uint32_t smem, int consumer, int stage) {
    return {smem + kScores + (consumer * 2 + stage) * TileScores::kBytes};
  }
  // -LSE in log2 units of the queries of a stage; delta, pipelined -delta, stands kStatisticBytes
  // further on.
  static FA_DEVICE uint32_t statistics(uint32_t smem, int stage) {
    return smem + kStatistics + stage * 2 * kStatisticBytes;
  }
  static FA_DEVICE uint32_t smem_dq(uint32_t smem, int part) {
    return smem + kDq + part * kDqPartBytes;
  }
  static FA_DEVICE uint32_t dq_target(uint32_t smem, int adder) {
    return smem + kDqTargets + adder * BwdDqTarget::kBytes;
  }
  static FA_DEVICE uint32_t scores_barriers(uint32_t smem, int consumer) {
    return smem + kScoresBarriers + consumer * ScoresPipeline::kBarrierBytes;
  }

  static FA_DEVICE void init_barriers(uint32_t smem) {
    KeptPipeline::init(smem + kKBarriers, 1);
    KeptPipeline::init(smem + kVBarriers, 1);
    StreamPipeline::init(smem + kQBarriers, kConsumerWarps, 2);  // filled with Q and statistics
    StreamPipeline::init(smem + kDoutBarriers, kConsumerWarps);
    for (int i = 0; i < kConsumers; ++i) ScoresPipeline::init(scores_barriers(smem, i), 4, 4);
    for (int i = 0; i < kDqParts; ++i) ptx::mbarrier_init(smem + kDqSumsBarriers + 8 * i, 1);
    ptx::fence_mbarrier_init();
  }
};

}  // namespace fa
