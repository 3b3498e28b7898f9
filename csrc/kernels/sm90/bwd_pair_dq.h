// The warpgroup of the SM90 backward of large head_dim that computes dQ = dS K of all keys of the
// pair, some columns in each CTA, and adds it to dq_accum from registers: [column / 8][thread][4]
// floats a tile of queries, as bwd_postprocess.cuh reads them.
#pragma once
#include "kernels/sm90/bwd_elements.h"
#include "kernels/sm90/bwd_pair_layout.h"
#include "ptx/reduction.h"

namespace fa {

template <class T, class Layout>
struct BwdPairDq {
  using Scores = typename Layout::ScoresPipeline;
  using Kept = typename Layout::KeptPipeline;
  static constexpr int kBarrier = 3;  // named barrier
  static constexpr int kHeadDim = Layout::TileKept::kCols;
  using Accum = AccumTile<1, 8>;

  const BwdParams& p;
  const BwdLaunch& launch;
  uint32_t smem;
  int rank, thread, lane;
  Scores scores, peer_scores;
  int64_t turn = -1;  // deterministic: tile of queries whose additions are not announced

  FA_DEVICE BwdPairDq(const BwdParams& params, const BwdLaunch& bwd_launch, uint32_t smem_base,
                      int cluster_rank)
      : p(params),
        launch(bwd_launch),
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
                      p.seqlens_k, kBarrier);
    BwdStep step = BwdStep::first(launch, tile);
#pragma unroll 1
    for (int n = 0; n < tile.num_steps; ++n) {
      const int64_t index = bwd_dq_tile_index(p, kBwdTileM, tile.batch, tile.q_seq.first_row,
                                              step.m_block, step.head);
      const int num_slabs = Layout::num_dq_slabs(rank, n);
      const int end = rank == 0 ? num_slabs : Layout::kSlabs;
      scores.wait_full();
      ptx::mbarrier_wait_cluster(peer_scores.full(), peer_scores.parity);
#pragma unroll 1
      for (int slab = end - num_slabs; slab < end; ++slab) {
        Accum acc;
        issue(acc, slab);
        // While it runs: the last additions have arrived by now.
        end_turn();
        ptx::wgmma_wait_group<0>();
        ptx::wgmma_pin(acc.x[0]);
        if (slab == end - 1) release_in_pair(scores, lane);
        if (slab == end - num_slabs) wait_for_turn(tile, step, index);
        add(acc, index, slab);
      }
      if (p.dq_semaphore != nullptr) turn = index;
      scores.advance();
      peer_scores.advance();
      step.advance(tile.blocks);
    }
    end_turn();
  }

  // dS K of all keys, 64 columns.
  FA_DEVICE void issue(Accum& acc, int slab) const {
    using Columns = SwizzledTile<Layout::kKeys, 64>;
    const Columns own{smem + Layout::kK + slab * Columns::kBytes};
    const Columns others{smem + Layout::kShared +
                         (slab - Layout::first_shared_slab(rank)) * Columns::kBytes};
    ptx::wgmma_pin(acc.x[0]);
    ptx::wgmma_fence();
    warpgroup_gemm_atb<T>(acc, Layout::smem_scores(smem, scores.stage), own, false);
    warpgroup_gemm_atb<T>(acc, Layout::smem_peer_scores(smem, peer_scores.stage), others, true);
    ptx::wgmma_commit_group();
  }

  FA_DEVICE void add(const Accum& acc, int64_t index, int slab) const {
    float* sums =
        p.dq_accum + index * (kBwdTileM * kHeadDim) + (slab * 8 * kWarpgroupSize + thread) * 4;
    FA_UNROLL
    for (int n = 0; n < 8; ++n)
      ptx::red_global_add_v4_f32(sums + n * (4 * kWarpgroupSize), acc.x[0][n]);
  }

  // Deterministic: the counter says how many CTAs have added to the tile of queries.
  FA_DEVICE void wait_for_turn(const BwdTile& tile, BwdStep step, int64_t index) const {
    if (p.dq_semaphore == nullptr) return;
    if (thread == 0) {
      const int before =
          Layout::kCtas * bwd_order(launch, tile).turn(tile.n_block, step.m_block).before;
      while (ptx::ld_acquire_gpu_s32(p.dq_semaphore + index) < before) {
      }
    }
    ptx::bar_sync(kBarrier, kWarpgroupSize);
  }
  FA_DEVICE void end_turn() {
    if (turn < 0) return;
    ptx::bar_sync(kBarrier, kWarpgroupSize);
    if (thread == 0) ptx::red_release_gpu_add_s32(p.dq_semaphore + turn, 1);
    turn = -1;
  }
};

}  // namespace fa
