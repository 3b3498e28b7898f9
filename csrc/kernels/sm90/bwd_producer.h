// Roles of the SM90 backward's producer warpgroup: what streams into shared memory.
#pragma once
#include "core/online_softmax.h"
#include "kernels/sm90/bwd_layout.h"
#include "ptx/shared_memory.h"
#include "tile/copy_sm90.h"

namespace fa {

// The one thread that starts all copies.
template <class Layout>
struct BwdProducer {
  using Kept = typename Layout::KeptPipeline;
  using Stream = typename Layout::StreamPipeline;

  const BwdParams& p;
  const BwdLaunch& launch;
  uint32_t smem;
  Stream q, dout;

  FA_DEVICE BwdProducer(const BwdParams& params, const BwdLaunch& bwd_launch, uint32_t smem_base)
      : p(params),
        launch(bwd_launch),
        smem(smem_base),
        q(Stream::producer(smem_base + Layout::kQBarriers)),
        dout(Stream::producer(smem_base + Layout::kDoutBarriers)) {}

  FA_DEVICE void run(const BwdTile& tile) {
    int steps = tile.num_steps;
    if (steps == 0) return;
    BwdStep step = BwdStep::first(launch, tile);
    const ptx::BoxOrigin kv_at{
        0, static_cast<int>(tile.k_seq.first_row) + tile.n_block * Layout::kTileN, tile.head_kv,
        p.seqlens_k.cu_seqlens != nullptr ? 0 : tile.batch};
    load_stream(q, tile, step, &launch.q, Layout::kQ);
    load_kept(Layout::kKBarriers, kv_at, &launch.k, Layout::kK);
    load_kept(Layout::kVBarriers, kv_at, &launch.v, Layout::kV);
#pragma unroll 1
    while (true) {
      load_stream(dout, tile, step, &launch.dout, Layout::kDout);
      if (--steps == 0) break;
      step.advance(tile.blocks);
      load_stream(q, tile, step, &launch.q, Layout::kQ);
    }
  }

  FA_DEVICE void load_kept(int barriers, ptx::BoxOrigin at, const void* map, int offset) const {
    const Kept kept = Kept::producer(smem + barriers);
    ptx::mbarrier_arrive_expect_tx(kept.full(), Layout::kConsumers * Layout::TileKept::kBytes);
    FA_UNROLL
    for (int i = 0; i < Layout::kConsumers; ++i) {
      load_tile_tma(typename Layout::TileKept{smem + offset + i * Layout::TileKept::kBytes}, map,
                    at, kept.full(), ptx::kL2EvictFirst);
      at.row += Layout::kKeys;
    }
  }

  FA_DEVICE void load_stream(Stream& stream, const BwdTile& tile, BwdStep step, const void* map,
                             int offset) {
    stream.wait_empty();
    ptx::mbarrier_arrive_expect_tx(stream.full(), Layout::TileStream::kBytes);
    const ptx::BoxOrigin at{0,
                            static_cast<int>(tile.q_seq.first_row) + step.m_block * Layout::kTileM,
                            step.head, p.seqlens_q.cu_seqlens != nullptr ? 0 : tile.batch};
    load_tile_tma(
        typename Layout::TileStream{smem + offset + stream.stage * Layout::TileStream::kBytes}, map,
        at, stream.full(), ptx::kL2EvictLast);
    stream.advance();
  }
};

// The warp that brings LSE and delta.
template <class Layout>
struct BwdStatistics {
  const BwdParams& p;
  const BwdLaunch& launch;
  uint32_t smem;
  int lane;

  FA_DEVICE void run(const BwdTile& tile) const {
    auto q = Layout::StreamPipeline::producer(smem + Layout::kQBarriers);
    BwdStep step = BwdStep::first(launch, tile);
#pragma unroll 1
    for (int n = 0; n < tile.num_steps; ++n) {
      bring(tile, step, q);
      q.advance();
      step.advance(tile.blocks);
    }
  }

  // A query past the sequence or without keys has -LSE = -inf, so that its P is 0.
  FA_DEVICE void bring(const BwdTile& tile, BwdStep step,
                       const typename Layout::StreamPipeline& q) const {
    const int64_t first = statistics_row(p, tile, step.head);
    float lse[Layout::kTileM / kWarpSize], delta[Layout::kTileM / kWarpSize];
    FA_UNROLL
    for (int i = 0; i < Layout::kTileM / kWarpSize; ++i) {
      const int row = step.m_block * Layout::kTileM + i * kWarpSize + lane;
      const bool exists = row < tile.q_seq.seqlen;
      const float x = exists ? p.lse[first + row] : -INFINITY;
      lse[i] = x == -INFINITY ? x : -x * kLog2e;
      const float d = exists ? p.delta[first + row] : 0.f;
      delta[i] = Layout::kPipelined ? -d : d;
    }
    q.wait_empty();
    const uint32_t to = Layout::statistics(smem, q.stage) + lane * sizeof(float);
    FA_UNROLL
    for (int i = 0; i < Layout::kTileM / kWarpSize; ++i) {
      ptx::st_shared_f32(to + i * kWarpSize * sizeof(float), lse[i]);
      ptx::st_shared_f32(to + i * kWarpSize * sizeof(float) + Layout::kStatisticBytes, delta[i]);
    }
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(q.full());
  }
};

}  // namespace fa
