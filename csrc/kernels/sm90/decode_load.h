// The producer warpgroup of Hopper's decode kernel (decode.cuh): a thread that finds the items and
// a warp that starts the copies of K and V.
#pragma once
#include <cuda_runtime.h>

#include "kernels/sm90/decode_layout.h"
#include "ptx/tma.h"

namespace fa {

// The thread that finds the items, up to three ahead: those of core/decode_schedule.h's rounds. If
// there is none, they are those of the share of which find_share() has found the first.
template <class Layout>
struct DecodeItemFinder {
  using Shape = typename Layout::Shape;

  const DecodeParams& p;
  const DecodeLaunch& launch;
  typename Layout::Shared& shared;
  DecodeRounds rounds;
  int round = 0;

  FA_DEVICE DecodeItemFinder(const DecodeParams& params, const DecodeLaunch& decode_launch,
                             typename Layout::Shared& decode_shared)
      : p(params), launch(decode_launch), shared(decode_shared) {
    const WorkSplit split = shared.cursor.split;
    rounds = {0, 1, 1, split};
    // Entries in the same order for all, each with one tile of a KV head.
    if (!Layout::kHasRounds || p.num_splits != 0 || p.seqlens_q.cu_seqlens != nullptr ||
        launch.by_m_blocks.divisor() > 1)
      return;
    int longest = 1;  // what find_share() has found of each warp's sequences
    FA_UNROLL
    for (const int positions : shared.warp_longest) longest = max(longest, positions);
    rounds = decode_rounds(split, p.batch_size * p.num_heads_kv, longest);
  }

  FA_DEVICE void run(uint32_t smem) {
    auto slot = Layout::ItemPipeline::producer(smem + Layout::kItemBarriers);
#pragma unroll 1
    for (bool is_found = rounds.num_rounds == 0;; is_found = false) {
      DecodeItem& item = shared.items[slot.stage];
      slot.wait_empty();
      if (!is_found) next(item);
      const bool exists = item.end >= 0;
      if (exists && !item.is_whole) {
        item.first_cta = rounds.rest_cta(item.tile_begin);
        item.last_cta = rounds.rest_cta(item.tile_end - 1);
      }
      ptx::mbarrier_arrive(slot.full());
      if (!exists) return;
      slot.advance();
    }
  }

  FA_DEVICE void next(DecodeItem& item) {
    DecodeCursor& cursor = shared.cursor;
    if (Layout::kHasRounds && rounds.num_rounds > 0 &&
        (round == 0 || cursor.position == cursor.end)) {
      const Range positions = rounds.share(round++, blockIdx.x);
      const int for_entry = rounds.tile_length * p.num_heads_kv;
      cursor.entry = positions.begin / for_entry;
      cursor.offset = positions.begin - cursor.entry * for_entry;
      cursor.position = positions.begin;
      cursor.end = positions.end;
    }
    next_item<Shape>(p, launch, cursor, item);
  }
};

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

}  // namespace fa
