// The warpgroup of the SM90 backward of large head_dim that computes dQ = dS K, and the warp that
// adds dQ up.
//
// A CTA has dS of all keys of the pair and some columns of dQ, slabs of 64, which pass through
// shared memory one at a time, as in bwd_dq.h.
#pragma once
#include "kernels/sm90/bwd_elements.h"
#include "kernels/sm90/bwd_pair_layout.h"
#include "ptx/barrier.h"
#include "ptx/reduction.h"
#include "ptx/tma.h"

namespace fa {

template <class T, class Layout>
struct BwdPairDq {
  using Scores = typename Layout::ScoresPipeline;
  using Kept = typename Layout::KeptPipeline;
  using Accum = AccumTile<1, 8>;

  const BwdParams& p;
  uint32_t smem;
  int rank, thread, lane;
  Scores scores, peer_scores;

  FA_DEVICE BwdPairDq(const BwdParams& params, uint32_t smem_base, int cluster_rank)
      : p(params),
        smem(smem_base),
        rank(cluster_rank),
        thread(threadIdx.x % kWarpgroupSize),
        lane(threadIdx.x % kWarpSize),
        scores(Scores::consumer(smem_base + Layout::kScoresBarriers)),
        peer_scores(Scores::consumer(smem_base + Layout::kPeerBarriers)) {}

  FA_DEVICE void run(const BwdTile& tile) {
    const typename Layout::TileShared shared{smem + Layout::kShared};
    Kept::consumer(smem + Layout::kKBarriers).wait_full();
    Kept::consumer(smem + Layout::kSharedBarriers).wait_full();
    clear_rows_behind(shared,
                      tile.k_seq.seqlen - tile.n_block * kBwdTileN - (1 - rank) * Layout::kKeys,
                      p.seqlens_k, Layout::kDqBarrier);
#pragma unroll 1
    for (int n = 0; n < tile.num_steps; ++n) {
      const Range slabs = Layout::dq_slabs(rank, n);
      scores.wait_full();
      ptx::mbarrier_wait_cluster(peer_scores.full(), peer_scores.parity);
#pragma unroll 1
      for (int slab = slabs.begin; slab < slabs.end; ++slab) {
        Accum acc;
        multiply(acc, slab);
        if (slab == slabs.end - 1) release_in_pair(scores, lane);
        hand_over(acc);
      }
      scores.advance();
      peer_scores.advance();
    }
  }

  // dS K of all keys, 64 columns.
  FA_DEVICE void multiply(Accum& acc, int slab) const {
    using Columns = SwizzledTile<Layout::kKeys, 64>;
    const Columns own{smem + Layout::kK + slab * Columns::kBytes};
    const Columns others{smem + Layout::kShared +
                         (slab - Layout::first_shared_slab(rank)) * Columns::kBytes};
    ptx::wgmma_pin(acc.x[0]);
    ptx::wgmma_fence();
    warpgroup_gemm_atb<T>(acc, Layout::smem_scores(smem, scores.stage), own, false);
    warpgroup_gemm_atb<T>(acc, Layout::smem_peer_scores(smem, peer_scores.stage), others, true);
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_pin(acc.x[0]);
  }

  FA_DEVICE void hand_over(const Accum& acc) const {
    ptx::bar_sync(Layout::kDqEmpty, Layout::kDqThreads);  // the last sums have been read
    FA_UNROLL
    for (int n = 0; n < 8; ++n) {
      const float (&x)[4] = acc.x[0][n];
      ptx::st_shared_v4(smem + Layout::kDq + (n * kWarpgroupSize + thread) * 16,
                        uint4{__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]),
                              __float_as_uint(x[3])});
    }
    ptx::fence_proxy_async();
    ptx::bar_arrive(Layout::kDqFull, Layout::kDqThreads);
  }
};

// The warp that adds dQ's sums up in global memory.
template <class Layout>
struct BwdPairDqAdder {
  const BwdParams& p;
  const BwdLaunch& launch;
  uint32_t smem;
  int rank, lane;

  FA_DEVICE void run(const BwdTile& tile) const {
    if (tile.num_steps > 0) ptx::bar_arrive(Layout::kDqEmpty, Layout::kDqThreads);
    BwdStep step = BwdStep::first(p, launch, tile);
#pragma unroll 1
    for (int n = 0; n < tile.num_steps; ++n) {
      add(tile, step, Layout::dq_slabs(rank, n));
      step.advance(tile.blocks);
    }
    if (lane == 0) ptx::cp_async_bulk_wait_group<0>();
  }

  FA_DEVICE void add(const BwdTile& tile, BwdStep step, Range slabs) const {
    const int64_t index = bwd_dq_tile_index(p, kBwdTileM, tile.batch, tile.q_seq.first_row,
                                            step.m_block, step.head);
    const bool in_turn = p.dq_semaphore != nullptr && lane == 0;
    if (in_turn) {
      // The counter says how many CTAs have added to the tile of queries.
      const int turn = Layout::kCtas * bwd_turn(launch, tile, step.m_block);
      while (ptx::ld_acquire_gpu_s32(p.dq_semaphore + index) < turn) {
      }
    }
    __syncwarp();
    constexpr int kSlabElements = Layout::kDqBytes / static_cast<int>(sizeof(float));
#pragma unroll 1
    for (int slab = slabs.begin; slab < slabs.end; ++slab) {
      ptx::bar_sync(Layout::kDqFull, Layout::kDqThreads);
      if (lane == 0) {
        ptx::cp_reduce_async_bulk_add_f32(
            p.dq_accum + (index * Layout::kSlabs + slab) * kSlabElements, smem + Layout::kDq,
            Layout::kDqBytes);
        ptx::cp_async_bulk_commit_group();
        ptx::cp_async_bulk_wait_group_read<0>();
      }
      __syncwarp();
      ptx::bar_arrive(Layout::kDqEmpty, Layout::kDqThreads);
    }
    if (in_turn) {
      ptx::cp_async_bulk_wait_group<0>();
      ptx::red_release_gpu_add_s32(p.dq_semaphore + index, 1);
    }
  }
};

}  // namespace fa
