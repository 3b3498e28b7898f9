// Compile-time sizes of the SM80 backward: how a tile is divided among the warps, and where things
// lie in shared memory and in dq_accum. Shared by the kernel and its postprocess.
#pragma once
#include "core/tile_config.h"
#include "tile/mma_sm80.h"

namespace fa {

template <int kHeadDim, Arch kTiles>
struct BwdShape {
  static constexpr BwdTileConfig kTile = sm80_bwd_tile_config(kTiles, kHeadDim);
  static constexpr int kTileM = kTile.tile_m, kTileN = kTile.tile_n;
  static constexpr int kStages = kTile.num_q_stages;
  static constexpr int kThreads = kTile.num_warps * kWarpSize;
  static constexpr int kCtasPerSm = 256 / kThreads;  // what 255 registers a thread leave room for
  static_assert(kTile.num_dout_stages == kStages && kTile.num_ds_stages == 2);
  static_assert(2 * kTileM <= kThreads);  // a thread loads one LSE or delta

  // Half of the warps own dV, the other half dK; each owns kWarpKeys rows of it.
  static constexpr int kRoleWarps = kTile.num_warps / 2;
  static constexpr int kWarpKeys = kTileN / kRoleWarps;
  static constexpr int kBands = kWarpKeys / 16;
  // Queries whose scores a warp holds at a time: 64 scores a thread.
  static constexpr int kChunk = min(kTileM, 2048 / kWarpKeys);
  static constexpr int kChunks = kTileM / kChunk;
  // A warp's rows of K or V stay in registers where they, the gradient and the scores leave room
  // for the operands in flight. Spills at head_dim 192 and 256 cost more than the loads.
  static constexpr bool kKeptInRegs =
      kHeadDim < 192 && kWarpKeys * (kHeadDim + kChunk + kHeadDim / 2) / kWarpSize <= 208;

  // dQ of a step, tile_m x head_dim, is shared by all warps: kDqWarpsM x kDqWarpsD parts.
  static constexpr bool divides(int warps_m) {
    return kHeadDim % (16 * (kTile.num_warps / warps_m)) == 0;
  }
  static constexpr int kDqWarpsM = divides(kTileM / 32) ? kTileM / 32 : kTileM / 16;
  static constexpr int kDqWarpsD = kTile.num_warps / kDqWarpsM;
  static constexpr int kDqRows = kTileM / kDqWarpsM, kDqCols = kHeadDim / kDqWarpsD;
  static constexpr int kDqRegs = kDqRows * kDqCols / kWarpSize;
  using DqAccum = AccumTile<kDqRows / 16, kDqCols / 8>;
  static_assert(kDqRows % 16 == 0 && kDqCols % 16 == 0);
  // Row and column of warp `warp`'s part.
  static FA_HD constexpr RowCol dq_part(int warp) {
    return {warp % kDqWarpsM * kDqRows, warp / kDqWarpsM * kDqCols};
  }
  // Elements of one tile of dq_accum, [warp][register][lane]: an addition of a warp covers whole
  // sectors.
  static constexpr int kDqTileElements = kTileM * kHeadDim;

  using KeptTile = SmemTile<kTileN, kHeadDim>;    // K, V
  using StreamTile = SmemTile<kTileM, kHeadDim>;  // Q, dO
  using ScoreTile = SmemTile<kTileN, kTileM>;     // P, then dS; rows are keys

  // Byte offsets in shared memory.
  static constexpr int kK = 0, kV = kK + KeptTile::kBytes;
  static constexpr int kQ = kV + KeptTile::kBytes, kDout = kQ + kStages * StreamTile::kBytes;
  static constexpr int kScores = kDout + kStages * StreamTile::kBytes;
  static constexpr int kStatistics = kScores + 2 * ScoreTile::kBytes;
  static constexpr int kStatisticBytes = kTileM * static_cast<int>(sizeof(float));  // LSE or delta
  static constexpr int kSmemBytes = kStatistics + 2 * 2 * kStatisticBytes;
  static_assert(kSmemBytes ==
                bwd_smem_bytes(kTile, kHeadDim) + bwd_statistics_bytes(Arch::kSm80, kTile));
  static_assert(kCtasPerSm * (kSmemBytes + 1024) <= max_smem_bytes(kTiles) + 1024 ||
                kTiles != Arch::kSm90);  // 1 KB: CUDA's own
};

}  // namespace fa
