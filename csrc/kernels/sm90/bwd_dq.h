// The warpgroup of the SM90 backward that computes dQ = dS K, and the warps that add dQ up.
//
// The sums of a tile pass through shared memory in the order of the registers, and TMA adds them to
// dq_accum in L2: [column / 8][thread][4] floats a tile of queries. bwd_postprocess.cuh rounds
// them. Order of the additions: bwd_tile.h.
#pragma once
#include "kernels/common/bwd_rows.h"
#include "kernels/sm90/bwd_layout.h"
#include "ptx/barrier.h"
#include "ptx/reduction.h"
#include "ptx/shared_memory.h"
#include "ptx/tma.h"

namespace fa {

template <class T, class Layout>
struct BwdDq {
  using Scores = typename Layout::ScoresPipeline;
  static constexpr int kCols = Layout::kDqCols, kParts = Layout::kDqParts;
  using Accum = AccumTile<1, kCols / 8>;

  uint32_t smem;
  int thread, lane;

  FA_DEVICE explicit BwdDq(uint32_t smem_base)
      : smem(smem_base), thread(threadIdx.x % kWarpgroupSize), lane(threadIdx.x % kWarpSize) {}

  FA_DEVICE void run(int num_steps) const {
    auto scores = Scores::consumer(smem + Layout::kScoresBarriers);
    if (num_steps > 0) Layout::KeptPipeline::consumer(smem + Layout::kKBarriers).wait_full();
#pragma unroll 1
    for (int n = 0; n < num_steps; ++n) {
      FA_UNROLL
      for (int part = 0; part < kParts; ++part) {
        Accum acc;
        multiply(acc, scores, part);
        hand_over(acc, part, n % Layout::kDqAdders);
      }
      scores.advance();
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

  // Sums to shared memory, and word of them to the warp that adds them.
  FA_DEVICE void hand_over(const Accum& acc, int part, int adder) const {
    const uint32_t buffer = smem + Layout::kDq + part * Layout::kDqPartBytes;
    ptx::bar_sync(Layout::kDqEmpty + part, Layout::kDqThreads);  // its last sums have been read
    FA_UNROLL
    for (int n = 0; n < kCols / 8; ++n) {
      const float (&x)[4] = acc.x[0][n];
      ptx::st_shared_v4(buffer + (n * kWarpgroupSize + thread) * 16,
                        uint4{__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]),
                              __float_as_uint(x[3])});
    }
    ptx::fence_proxy_async();
    ptx::bar_arrive(Layout::kDqFull + adder * kParts + part, Layout::kDqThreads);
  }
};

// The warps that add dQ's sums up in global memory, every other step each: when deterministic, the
// additions of one are not complete before the next begin. Lane 0 waits for turns, so that nobody
// else does.
template <class Layout>
struct BwdDqAdder {
  static constexpr int kParts = Layout::kDqParts;
  static constexpr int kPartElements = Layout::kTileM * Layout::kDqCols;

  const BwdParams& p;
  const BwdLaunch& launch;
  uint32_t smem;
  int adder, lane;

  FA_DEVICE void run(const BwdTile& tile) const {
    if (tile.num_steps > 0 && adder == 0) {
      FA_UNROLL
      for (int part = 0; part < kParts; ++part)
        ptx::bar_arrive(Layout::kDqEmpty + part, Layout::kDqThreads);
    }
    BwdStep step = BwdStep::first(p, launch, tile);
#pragma unroll 1
    for (int n = 0; n < tile.num_steps; ++n) {
      if (n % Layout::kDqAdders == adder) add(tile, step);
      step.advance(tile.blocks);
    }
    if (lane == 0) ptx::cp_async_bulk_wait_group<0>();
  }

  FA_DEVICE void add(const BwdTile& tile, BwdStep step) const {
    const int64_t index =
        bwd_dq_tile_index(p, kBwdTileM, tile.batch, tile.q_seq.first_row, step.m_block, step.head);
    float* sums = p.dq_accum + index * (kParts * kPartElements);
    const bool in_turn = p.dq_semaphore != nullptr && lane == 0;
    if (in_turn) {
      const int turn = bwd_turn(launch, tile, step.m_block);
      while (ptx::ld_acquire_gpu_s32(p.dq_semaphore + index) < turn) {
      }
    }
    __syncwarp();
    FA_UNROLL
    for (int part = 0; part < kParts; ++part) {
      ptx::bar_sync(Layout::kDqFull + adder * kParts + part, Layout::kDqThreads);
      if (lane == 0) {
        ptx::cp_reduce_async_bulk_add_f32(sums + part * kPartElements,
                                          smem + Layout::kDq + part * Layout::kDqPartBytes,
                                          Layout::kDqPartBytes);
        ptx::cp_async_bulk_commit_group();
      }
    }
    empty<0>();
    if constexpr (kParts > 1) empty<1>();
    if (in_turn) {
      ptx::cp_async_bulk_wait_group<0>();
      ptx::red_release_gpu_add_s32(p.dq_semaphore + index, 1);
    }
  }

  // Says that the sums of a part have been read.
  template <int kPart>
  FA_DEVICE void empty() const {
    if (lane == 0) ptx::cp_async_bulk_wait_group_read<kParts - 1 - kPart>();
    __syncwarp();
    ptx::bar_arrive(Layout::kDqEmpty + kPart, Layout::kDqThreads);
  }
};

}  // namespace fa
