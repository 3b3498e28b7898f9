// The producer warpgroup of Hopper's decode kernel (decode.cuh): a thread that finds the items, a
// warp that starts the copies of K and V, and one for each consumer warpgroup that copies its Q.
#pragma once
#include <cuda_runtime.h>

#include "kernels/sm90/decode_layout.h"
#include "ptx/cp_async.h"
#include "ptx/global_memory.h"
#include "ptx/tma.h"

namespace fa {

// The thread that finds the items, up to three ahead. find_share() has found the first.
template <class Layout>
FA_DEVICE void find_decode_items(const DecodeParams& p, const DecodeLaunch& launch,
                                 typename Layout::Shared& shared, uint32_t smem) {
  auto slot = Layout::ItemPipeline::producer(smem + Layout::kItemBarriers);
#pragma unroll 1
  for (bool is_first = true;; is_first = false) {
    DecodeItem& item = shared.items[slot.stage];
    slot.wait_empty();
    if (!is_first) next_item<typename Layout::Shape>(p, launch, shared.cursor, item);
    const bool exists = item.end >= 0;
    if (exists) find_sharers(shared.cursor.split, item);
    ptx::mbarrier_arrive(slot.full());
    if (!exists) return;
    slot.advance();
  }
}

// The warp that starts all copies of K and V. Pages: a block is copied in boxes that are part of
// one page each. Each lane has a box of a block, the slabs of a row by turns.
template <class Layout>
struct WgmmaDecodeLoader {
  using TileKV = typename Layout::TileKV;
  static constexpr int kTileN = Layout::kTile.tile_n;

  const DecodeParams& p;
  const WgmmaDecodeLaunch& launch;
  uint32_t smem;
  int lane;
  typename Layout::KvPipeline k, v;

  FA_DEVICE WgmmaDecodeLoader(const DecodeParams& params, const WgmmaDecodeLaunch& decode_launch,
                              uint32_t smem_base)
      : p(params),
        launch(decode_launch),
        smem(smem_base),
        lane(threadIdx.x % kWarpSize),
        k(Layout::KvPipeline::producer(smem_base + Layout::kKBarriers)),
        v(Layout::KvPipeline::producer(smem_base + Layout::kVBarriers)) {}

  FA_DEVICE void run(typename Layout::Shared& shared) {
    auto slot = Layout::ItemPipeline::consumer(smem + Layout::kItemBarriers);
#pragma unroll 1
    while (true) {
      slot.wait_full();
      const DecodeItem& item = shared.items[slot.stage];
      if (item.end < 0) return;
      load(item);
      __syncwarp();  // all lanes are done with the item
      if (lane == 0) slot.release();
      slot.advance();
    }
  }

  // K of a block goes ahead of V of the block before, as they are needed.
  FA_DEVICE void load(const DecodeItem& item) {
    int block = item.end - 1;
    if (block < item.begin) return;
    ptx::BoxOrigin at = box(item, block);
    load_tile(k, &launch.k, Layout::smem_k(smem, k.stage), at);
#pragma unroll 1
    while (--block >= item.begin) {
      const ptx::BoxOrigin next = box(item, block);
      load_tile(k, &launch.k, Layout::smem_k(smem, k.stage), next);
      load_tile(v, &launch.v, Layout::smem_v(smem, v.stage), at);
      at = next;
    }
    load_tile(v, &launch.v, Layout::smem_v(smem, v.stage), at);
  }

  // Where this lane's box of a block is. Behind the last key: any page of the pool.
  FA_DEVICE ptx::BoxOrigin box(const DecodeItem& item, int block) const {
    const SeqlenInfo& seq = item.entry.k_seq;
    const int column = lane % TileKV::kSlabs * TileKV::kSlabCols;
    const int row = block * kTileN + lane / TileKV::kSlabs * launch.box_rows;
    if (p.page_table == nullptr) return {column, seq.leftpad + row, item.head_kv, item.cache};
    const auto [at, row_in_page] = divide(min(row, seq.seqlen - 1), launch.common.by_page);
    const int page = p.page_table[item.cache * p.page_table_batch_stride + at];
    const bool exists = row < seq.seqlen;
    return {column, exists ? row_in_page : 0, item.head_kv, clamp(page, 0, p.num_caches - 1)};
  }

  FA_DEVICE void load_tile(typename Layout::KvPipeline& pipeline, const void* map, TileKV tile,
                           ptx::BoxOrigin at) {
    pipeline.wait_empty();
    if (lane == 0) ptx::mbarrier_arrive_expect_tx(pipeline.full(), TileKV::kBytes);
    __syncwarp();  // the bytes are announced
    if (lane < TileKV::kSlabs * (kTileN / launch.box_rows)) {
      const int first_row = lane / TileKV::kSlabs * launch.box_rows;
      ptx::cp_async_bulk_tensor_4d(tile.base + lane % TileKV::kSlabs * TileKV::kSlabBytes +
                                       first_row * TileKV::kSlabRowBytes,
                                   map, at, pipeline.full(), launch.l2_policy);
    }
    pipeline.advance();
  }
};

// A warp that copies the rows of Q of one consumer warpgroup as soon as the products with those
// before are done. Until then they are on their way to L2: behind all copies of K and V that are
// under way, memory takes several microseconds to answer.
template <class T, class Layout>
struct WgmmaDecodeQLoader {
  static constexpr int kRows = Layout::kRows, kHeadDim = Layout::TileQ::kCols;

  const DecodeParams& p;
  const WgmmaDecodeLaunch& launch;
  uint32_t smem;
  WarpgroupShare share;
  int lane;

  FA_DEVICE WgmmaDecodeQLoader(const DecodeParams& params, const WgmmaDecodeLaunch& decode_launch,
                               uint32_t smem_base, int consumer)
      : p(params),
        launch(decode_launch),
        smem(smem_base),
        share(decode_launch, consumer, kRows),
        lane(threadIdx.x % kWarpSize) {}

  FA_DEVICE void run(typename Layout::Shared& shared) const {
    auto slot = Layout::ItemPipeline::consumer(smem + Layout::kItemBarriers);
    auto q = Layout::QPipeline::producer(Layout::q_barriers(smem, share.warpgroup));
#pragma unroll 1
    for (int turn = 0;; ++turn) {
      slot.wait_full();
      const DecodeItem& item = shared.items[slot.stage];
      if (item.end < 0) return;
      const int rows = num_tile_rows<Layout>(launch.common, item) - share.first_row;
      if (share.has(turn) && item.begin < item.end && rows > 0) {
        prefetch(item, rows);
        q.wait_empty();
        copy(item, rows);
        if (lane == 0) ptx::mbarrier_arrive(q.full());
        q.advance();
      }
      __syncwarp();  // all lanes are done with the item
      if (lane == 0) slot.release();
      slot.advance();
    }
  }

  // Row of the warpgroup's rows.
  FA_DEVICE const T* q_row(const DecodeItem& item, int row) const {
    const DecodeEntry& entry = item.entry;
    const int group = launch.common.by_group.divisor();
    const auto [token, in_group] = divide(
        entry.m_block * Layout::kTile.tile_m + share.first_row + row, launch.common.by_group);
    return static_cast<const T*>(p.q) +
           element_offset(p.q_strides.batch, p.q_strides.token, p.q_strides.head, entry.batch,
                          entry.q_seq.first_row + token, item.head_kv * group + in_group);
  }

  FA_DEVICE void prefetch(const DecodeItem& item, int rows) const {
    constexpr int kLineElements = 128 / sizeof(T);
    for (int row = lane; row < min(rows, kRows); row += kWarpSize) {
      const T* from = q_row(item, row);
      for (int col = 0; col < p.head_dim; col += kLineElements) ptx::prefetch_l2(from + col);
    }
  }

  // Zeros where there is no row.
  FA_DEVICE void copy(const DecodeItem& item, int rows) const {
    constexpr int kChunks = kHeadDim / 8;
    const auto tile = Layout::smem_q(smem, share.warpgroup);
#pragma unroll 4
    for (int i = lane; i < kRows * kChunks; i += kWarpSize) {
      const int row = i / kChunks, chunk = i % kChunks;
      const bool exists = row < rows && chunk * 8 < p.head_dim;
      ptx::cp_async_cg_16(tile.chunk_address(row, chunk),
                          exists ? q_row(item, row) + chunk * 8 : static_cast<const T*>(p.q),
                          exists ? 16 : 0);
    }
    ptx::cp_async_commit_group();
    ptx::cp_async_wait_group<0>();
    ptx::fence_proxy_async();  // before wgmma reads them
    __syncwarp();              // all rows are there
  }
};

}  // namespace fa
