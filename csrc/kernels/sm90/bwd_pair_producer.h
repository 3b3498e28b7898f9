// Roles of the producer warpgroup of the SM90 backward of large head_dim: copies to shared memory.
#pragma once
#include "kernels/sm90/bwd_pair_layout.h"
#include "tile/copy_sm90.h"

namespace fa {

// The one thread that starts all copies from global memory.
template <class Layout>
struct BwdPairProducer {
  const BwdParams& p;
  const BwdLaunch& launch;
  uint32_t smem;
  int rank;
  typename Layout::StreamPipeline q;
  typename Layout::DoutPipeline dout;

  FA_DEVICE BwdPairProducer(const BwdParams& params, const BwdLaunch& bwd_launch,
                            uint32_t smem_base, int cluster_rank)
      : p(params),
        launch(bwd_launch),
        smem(smem_base),
        rank(cluster_rank),
        q(Layout::StreamPipeline::producer(smem_base + Layout::kQBarriers)),
        dout(Layout::DoutPipeline::producer(smem_base + Layout::kDoutBarriers)) {}

  // In the order in which buffers become free: the high part of dO(j) takes the place of the low
  // part of dO(j - 1).
  FA_DEVICE void run(const BwdTile& tile) {
    if (tile.num_steps == 0) return;
    BwdStep step = BwdStep::first(launch, tile);
    load_q(tile, step);
    load_kept(tile, rank, 0, &launch.k, Layout::smem_k(smem), Layout::kKBarriers);
    load_dout<typename Layout::TileLow>(tile, step, 0);
    load_kept(tile, rank, 0, &launch.v, Layout::smem_v(smem), Layout::kVBarriers);
    for (int n = 0;; ++n) {
      if constexpr (Layout::kHasHighV)
        load_dout<typename Layout::TileHigh>(tile, step, Layout::kLow);
      if (n == 0)
        load_kept(tile, 1 - rank, Layout::first_shared_slab(rank) * 64, &launch.k,
                  typename Layout::TileShared{smem + Layout::kShared}, Layout::kSharedBarriers);
      if (n + 1 == tile.num_steps) break;
      step.advance(tile.blocks);
      load_dout<typename Layout::TileLow>(tile, step, 0);
      load_q(tile, step);
    }
  }

  // Columns from `column` on of the keys of the CTA of this rank.
  template <class Tile>
  FA_DEVICE void load_kept(const BwdTile& tile, int of_rank, int column, const void* map, Tile rows,
                           int barriers) const {
    const auto pipeline = Layout::KeptPipeline::producer(smem + barriers);
    ptx::mbarrier_arrive_expect_tx(pipeline.full(), Tile::kBytes);
    const int row =
        static_cast<int>(tile.k_seq.first_row) + tile.n_block * kBwdTileN + of_rank * Layout::kKeys;
    load_tile_tma(rows, map,
                  {column, row, tile.head_kv, p.seqlens_k.cu_seqlens != nullptr ? 0 : tile.batch},
                  pipeline.full(), ptx::kL2EvictFirst);
  }
  FA_DEVICE void load_q(const BwdTile& tile, BwdStep step) {
    load_stream(q, tile, step, 0, &launch.q, Layout::smem_q(smem, q.stage));
  }
  template <class Part>
  FA_DEVICE void load_dout(const BwdTile& tile, BwdStep step, int column) {
    load_stream(dout, tile, step, column, &launch.dout, Part{Layout::smem_dout(smem, dout.stage)});
  }
  template <class Pipeline, class Tile>
  FA_DEVICE void load_stream(Pipeline& pipeline, const BwdTile& tile, BwdStep step, int column,
                             const void* map, Tile rows) const {
    pipeline.wait_empty();
    ptx::mbarrier_arrive_expect_tx(pipeline.full(), Tile::kBytes);
    const int row = static_cast<int>(tile.q_seq.first_row) + step.m_block * Layout::kTileM;
    load_tile_tma(rows, map,
                  {column, row, step.head, p.seqlens_q.cu_seqlens != nullptr ? 0 : tile.batch},
                  pipeline.full(), ptx::kL2EvictLast);
    pipeline.advance();
  }
};

// The thread that sends dS to the other CTA. Its buffer there is free: its dQ warps release it with
// the one here.
template <class Layout>
FA_DEVICE void send_dscores(const BwdTile& tile, uint32_t smem, int peer) {
  auto scores = Layout::ScoresPipeline::consumer(smem + Layout::kScoresBarriers);
  auto there = Layout::ScoresPipeline::consumer(smem + Layout::kPeerBarriers);
#pragma unroll 1
  for (int n = 0; n < tile.num_steps; ++n) {
    scores.wait_full();
    const uint32_t barrier = ptx::cluster_address(there.full(), peer);
    ptx::mbarrier_arrive_expect_tx_cluster(barrier, Layout::TileScores::kBytes);
    ptx::cp_async_bulk_to_cluster(
        ptx::cluster_address(Layout::smem_peer_scores(smem, there.stage).base, peer),
        Layout::smem_scores(smem, scores.stage).base, Layout::TileScores::kBytes, barrier);
    scores.advance();
    there.advance();
  }
}

}  // namespace fa
