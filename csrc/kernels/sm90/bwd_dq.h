// The warpgroup of the SM90 backward that computes dQ = dS K, and how dQ is added up.
//
// The sums of a tile pass through shared memory in the order of the registers, and TMA adds them to
// dq_accum in L2: [column / 8][thread][4] floats a tile of queries. bwd_postprocess.cuh rounds
// them.
#pragma once
#include "kernels/common/bwd_rows.h"
#include "kernels/sm90/bwd_layout.h"
#include "ptx/barrier.h"
#include "ptx/reduction.h"
#include "ptx/shared_memory.h"
#include "ptx/tma.h"

namespace fa {

template <class T, int kHeadDim, bool kScoreMod>
struct BwdDq {
  using Layout = BwdLayout<T, kHeadDim, kScoreMod>;
  using Scores = typename Layout::ScoresPipeline;
  static constexpr int kCols = Layout::kDqCols, kParts = Layout::kDqParts;
  static constexpr int kPartElements = Layout::kTileM * kCols;
  static constexpr int kBarrier = 5;  // named barrier
  using Accum = AccumTile<1, kCols / 8>;

  const BwdParams& p;
  const BwdLaunch& launch;
  uint32_t smem;
  int thread, lane;
  int64_t turn = -1;  // deterministic: tile that thread 0 has added to and not said so

  FA_DEVICE BwdDq(const BwdParams& params, const BwdLaunch& bwd_launch, uint32_t smem_base)
      : p(params),
        launch(bwd_launch),
        smem(smem_base),
        thread(threadIdx.x % kWarpgroupSize),
        lane(threadIdx.x % kWarpSize) {}

  FA_DEVICE void run() {
    auto k = Layout::KeptPipeline::consumer(smem + Layout::kKBarriers);
    auto scores = Scores::consumer(smem + Layout::kScoresBarriers);
#pragma unroll 1
    for (int i = blockIdx.x; i < launch.num_tiles; i += gridDim.x) {
      const BwdTile tile = bwd_tile(p, launch, i);
      if (tile.num_steps == 0) continue;
      k.wait_full();
      BwdStep step = BwdStep::first(p, tile);
#pragma unroll 1
      for (int n = 0; n < tile.num_steps; ++n) {
        FA_UNROLL
        for (int part = 0; part < kParts; ++part) {
          Accum acc;
          multiply(acc, scores, part);
          add(acc, tile, step, part);
        }
        scores.advance();
        step.advance(tile.blocks);
      }
      release_by_warp(k, lane);
      k.advance();
    }
    if (thread == 0) {
      end_turn();
      ptx::cp_async_bulk_wait_group<0>();
    }
  }

  // dS K of all keys, columns [kCols part, kCols part + kCols).
  FA_DEVICE void multiply(Accum& acc, Scores scores, int part) const {
    ptx::wgmma_pin(acc.x[0]);
    FA_UNROLL
    for (int i = 0; i < Layout::kConsumers; ++i) {
      scores.barriers = Layout::scores_barriers(smem, i);
      if (part == 0) scores.wait_full();
      ptx::wgmma_fence();
      const uint32_t k_part =
          Layout::smem_k(smem, i).base + part * (kCols / 64) * Layout::TileKept::kSlabBytes;
      warpgroup_gemm_atb<T>(acc, Layout::smem_scores(smem, i, scores.stage),
                            SwizzledTile<Layout::kKeys, kCols>{k_part}, i > 0);
    }
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_pin(acc.x[0]);
    if (part != kParts - 1) return;
    __syncwarp();
    if (lane < Layout::kConsumers) {
      scores.barriers = Layout::scores_barriers(smem, lane);
      scores.release();
    }
  }

  FA_DEVICE void add(const Accum& acc, const BwdTile& tile, BwdStep step, int part) {
    const uint32_t buffer = smem + Layout::kDq + part * Layout::kDqPartBytes;
    if (thread == 0) ptx::cp_async_bulk_wait_group_read<kParts - 1>();
    sync();  // the buffer's last sums have been read
    FA_UNROLL
    for (int n = 0; n < kCols / 8; ++n) {
      const float (&x)[4] = acc.x[0][n];
      ptx::st_shared_v4(buffer + (n * kWarpgroupSize + thread) * 16,
                        uint4{__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]),
                              __float_as_uint(x[3])});
    }
    ptx::fence_proxy_async();
    sync();  // all of them are there
    if (thread != 0) return;
    const int64_t index =
        bwd_dq_tile_index(p, kBwdTileM, tile.batch, tile.q_seq.first_row, step.m_block, step.head);
    if (part == 0 && p.dq_semaphore != nullptr) {
      end_turn();
      wait_for_turn(tile, step, index);
    }
    ptx::cp_reduce_async_bulk_add_f32(
        p.dq_accum + index * (Layout::kTileM * kHeadDim) + part * kPartElements, buffer,
        Layout::kDqPartBytes);
    ptx::cp_async_bulk_commit_group();
  }
  FA_DEVICE void sync() const { ptx::bar_sync(kBarrier, kWarpgroupSize); }

  // Deterministic: tiles of keys add to a tile of queries in ascending order; the counter says how
  // many have. CTAs take tiles in the order of n_block, so whoever is waited for already runs.
  FA_DEVICE void wait_for_turn(const BwdTile& tile, BwdStep step, int64_t index) {
    const int first = n_block_range(tile.mask, step.m_block, Layout::kTileM, Layout::kTileN).begin;
    while (ptx::ld_acquire_gpu_s32(p.dq_semaphore + index) < tile.n_block - first) {
    }
    turn = index;
  }
  // Says that the additions of the last turn are done, once they are: a step later, when nobody has
  // to wait for them any more.
  FA_DEVICE void end_turn() {
    if (turn < 0) return;
    ptx::cp_async_bulk_wait_group<0>();
    __threadfence();
    ptx::red_release_gpu_add_s32(p.dq_semaphore + turn, 1);
    turn = -1;
  }
};

}  // namespace fa
