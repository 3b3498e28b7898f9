// The producer warpgroup of the SM90 forward: one thread decides on tiles, another starts the
// copies. See fwd.cuh.
#pragma once
#include "core/lse_rows.h"
#include "kernels/sm90/fwd_layout.h"
#include "kernels/tile_counter.h"
#include "ptx/tma.h"
#include "tile/copy_sm90.h"

namespace fa {

// The thread that decides on tiles: one ahead of the copies, which would wait for it otherwise.
template <class T, class Layout>
struct FwdScheduler {
  using Work = typename Layout::Work;
  static constexpr FwdTileConfig kTile = Layout::kTile;

  const FwdParams& p;
  const FwdLaunch& launch;

  FA_DEVICE void run(char* smem_ptr, uint32_t smem) const {
    auto slot = Layout::WorkPipeline::producer(smem + Layout::kWorkBarriers);
    int tile = -1;
#pragma unroll 1
    while (true) {
      Work& work = Layout::work(smem_ptr, slot.stage);
      slot.wait_empty();
      // Chosen not before there is place for it, so that a CTA that is late takes fewer tiles.
      do {
        tile = tile < 0 ? static_cast<int>(blockIdx.x) : next_tile(tile);
      } while (!find_work(work, tile));  // varlen: some places have no rows
      ptx::mbarrier_arrive(slot.full());
      slot.advance();
      if (work.tile.batch < 0) return;
    }
  }

  // A CTA asks once for every tile it has taken: the last of all answers resets the counter for the
  // next launch.
  FA_DEVICE int next_tile(int tile) const {
    if (launch.counter == kNoTileCounter) return tile + gridDim.x;
    int& counter = tile_counters[launch.counter];
    const int ticket = atomicAdd(&counter, 1);
    if (ticket == launch.num_tiles - 1) counter = 0;
    return ticket + gridDim.x;
  }

  // False: `tile` has no rows.
  FA_DEVICE bool find_work(Work& work, int tile) const {
    if (tile >= launch.num_tiles) {
      work.tile.batch = -1;
      return true;
    }
    TileCoord coord;
    if (p.seqlens_q.cu_seqlens != nullptr) {
      const QuotientRemainder place = divide(tile, launch.num_heads);
      coord =
          varlen_tile_coord(p.seqlens_q.cu_seqlens, p.batch_size, kTile.tile_m, 1, place.quotient);
      if (coord.m_block < 0) return false;
      coord.head = place.remainder;
    } else {
      coord = launch.order.coord(tile);
    }
    work.tile = coord;
    work.q_seq = seqlen_info(p.seqlens_q, coord.batch);
    work.k_seq = seqlen_info(p.seqlens_k, coord.batch);
    const int row = coord.m_block * kTile.tile_m;
    work.out = static_cast<T*>(p.out) + element_offset(p.out_strides.batch, p.out_strides.token,
                                                       p.out_strides.head, coord.batch,
                                                       work.q_seq.first_row + row, coord.head);
    work.lse = lse_rows(p, coord.batch, coord.head, work.q_seq.first_row) + row;
    work.mask =
        mask_spec(work.q_seq.seqlen, work.k_seq.seqlen, p.score.window_left, p.score.window_right);
    work.blocks = n_block_range(work.mask, coord.m_block, kTile.tile_m, kTile.tile_n);
    FA_UNROLL
    for (int i = 0; i < Layout::kConsumers; ++i) work.own_blocks[i] = own_blocks(work, i);
    if constexpr (Layout::kScoreMod)
      work.mod = ScoreMod::of(p.score, work.mask, coord.batch, coord.head, p.num_heads_q);
    return true;
  }

  static FA_DEVICE BlockRange own_blocks(const Work& work, int warpgroup) {
    return n_block_range(work.mask, work.tile.m_block * Layout::kConsumers + warpgroup,
                         Layout::kRows, kTile.tile_n);
  }
};

// The thread that starts all copies.
template <class Layout>
struct FwdLoader {
  using Work = typename Layout::Work;
  static constexpr FwdTileConfig kTile = Layout::kTile;

  const FwdParams& p;
  const FwdLaunch& launch;
  uint32_t smem;
  typename Layout::KvPipeline k, v;

  FA_DEVICE FwdLoader(const FwdParams& params, const FwdLaunch& fwd_launch, uint32_t smem_base)
      : p(params),
        launch(fwd_launch),
        smem(smem_base),
        k(Layout::KvPipeline::producer(smem_base + Layout::kKBarriers)),
        v(Layout::KvPipeline::producer(smem_base + Layout::kVBarriers)) {}

  FA_DEVICE void run(char* smem_ptr) {
    auto slot = Layout::WorkPipeline::consumer(smem + Layout::kWorkBarriers);
    auto q = Layout::QPipeline::producer(0);  // barriers: of each warpgroup
#pragma unroll 1
    while (true) {
      slot.wait_full();
      const Work& work = Layout::work(smem_ptr, slot.stage);
      if (work.tile.batch < 0) return;
      load(work, q);
      slot.release();
      slot.advance();
    }
  }

  // K of a block goes ahead of V of the block before, as they are needed.
  FA_DEVICE void load(const Work& work, typename Layout::QPipeline& q) {
    const int batch_q = p.seqlens_q.cu_seqlens != nullptr ? 0 : work.tile.batch;
    const ptx::BoxOrigin q_at{
        0, static_cast<int>(work.q_seq.first_row) + work.tile.m_block * kTile.tile_m,
        work.tile.head, batch_q};
    const ptx::BoxOrigin kv_at{0, static_cast<int>(work.k_seq.first_row),
                               launch.group_size.divide(work.tile.head),
                               p.seqlens_k.cu_seqlens != nullptr ? 0 : work.tile.batch};
    const bool any = work.blocks.size() > 0;
    int n_block = Layout::first_block(work.blocks);
    const int last = Layout::last_block(work.blocks);
    if (any) load_k(kv_at, n_block);
    load_q(q_at, q);
    if (!any) return;
#pragma unroll 1
    for (; n_block != last; n_block += Layout::kStep) {
      load_k(kv_at, n_block + Layout::kStep);
      load_v(kv_at, n_block);
    }
    load_v(kv_at, last);
  }

  FA_DEVICE void load_q(ptx::BoxOrigin at, typename Layout::QPipeline& q) {
    FA_UNROLL
    for (int i = 0; i < Layout::kConsumers; ++i) {
      q.barriers = Layout::q_barriers(smem, i);
      q.wait_empty();
      ptx::mbarrier_arrive_expect_tx(q.full(), Layout::TileQ::kBytes);
      load_tile_tma(Layout::smem_q(smem, i, q.stage), &launch.q, at, q.full(), ptx::kL2EvictFirst);
      at.row += Layout::kRows;
    }
    q.advance();
  }
  FA_DEVICE void load_k(ptx::BoxOrigin at, int n_block) {
    k.wait_empty();
    ptx::mbarrier_arrive_expect_tx(k.full(), Layout::TileK::kBytes);
    at.row += n_block * kTile.tile_n;
    load_tile_tma(Layout::smem_k(smem, k.stage), &launch.k, at, k.full(), ptx::kL2EvictLast);
    k.advance();
  }
  FA_DEVICE void load_v(ptx::BoxOrigin at, int n_block) {
    v.wait_empty();
    ptx::mbarrier_arrive_expect_tx(v.full(), Layout::TileV::kBytes);
    at.row += n_block * kTile.tile_n;
    load_tile_tma(Layout::smem_v(smem, v.stage), &launch.v, at, v.full(), ptx::kL2EvictLast);
    v.advance();
  }
};

}  // namespace fa
