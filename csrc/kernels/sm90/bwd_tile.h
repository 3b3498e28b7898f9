// What a CTA of the SM90 backward works on: its tile of keys, and the tiles of queries that it
// walks.
#pragma once
#include <cuda.h>

#include "core/bwd_order.h"
#include "core/bwd_workspace.h"
#include "core/fast_div.h"
#include "core/mask.h"
#include "core/params.h"
#include "core/tile_scheduler.h"

namespace fa {

constexpr int kBwdTileM = 64, kBwdTileN = 128;  // of every row in core/tile_config.h that is built

// What the launcher adds to the parameters.
struct BwdLaunch {
  CUtensorMap q, k, v, dout;  // varlen: one batch entry of all rows
  TileOrder order;    // its m_blocks are tiles of keys, its heads the head_splits of KV heads
  FastDiv by_splits;  // head_splits
  int num_tiles, heads_per_cta;
  float scale_log2;  // softmax_scale * log2(e)
  bool heads_fit;    // all tiles of a head run at the same time
  bool in_order;     // tiles of keys add to a tile of queries in that of core/bwd_order.h
  int* next_tile;    // zeroed counter that deals out the tiles; nullptr: blockIdx says which
};

// A tile of keys of one KV head, and the query heads that read it, or a part of them.
struct BwdTile {
  int n_block, head_kv, batch;
  int split;       // which part, below head_splits
  int first_head;  // of the query heads
  SeqlenInfo q_seq, k_seq;
  MaskSpec mask;
  BlockRange blocks;  // of queries that see a key of it
  int num_steps;      // blocks of all heads
};

FA_DEVICE BwdTile bwd_tile(const BwdParams& p, const BwdLaunch& launch, int index) {
  const TileCoord at = launch.order.coord(index);
  BwdTile tile;
  const auto [head_kv, split] = divide(at.head, launch.by_splits);
  tile.n_block = at.m_block, tile.head_kv = head_kv, tile.split = split, tile.batch = at.batch;
  tile.first_head = at.head * launch.heads_per_cta;
  tile.q_seq = seqlen_info_or_rest(p.seqlens_q, tile.batch, p.batch_size, p.total_q);
  tile.k_seq = seqlen_info_or_rest(p.seqlens_k, tile.batch, p.batch_size, p.total_k);
  tile.mask =
      mask_spec(tile.q_seq.seqlen, tile.k_seq.seqlen, p.score.window_left, p.score.window_right);
  tile.blocks = m_block_range(tile.mask, tile.n_block, kBwdTileM, kBwdTileN);
  tile.num_steps = tile.blocks.size() * launch.heads_per_cta;
  return tile;
}

// dQ of a query of the sequence.
template <class T>
FA_DEVICE T* dq_row(const BwdParams& p, const BwdTile& tile, int head, int query) {
  return static_cast<T*>(p.dq) + element_offset(p.dq_strides.batch, p.dq_strides.token,
                                                p.dq_strides.head, tile.batch,
                                                tile.q_seq.first_row + query, head);
}

FA_DEVICE BwdOrder bwd_order(const BwdLaunch& launch, const BwdTile& tile) {
  return {tile.mask, kBwdTileM, kBwdTileN, launch.order.grid.num_m_blocks, launch.heads_fit};
}

// A tile of queries of one head. A CTA walks the blocks of each head upwards and around, from a
// block of its own on, so that tiles of keys that run at the same time add to different rows of dQ.
struct BwdStep {
  int head, m_block;
  int blocks_left;  // of the head, this one included

  static FA_DEVICE BwdStep first(const BwdLaunch& launch, const BwdTile& tile) {
    const int size = tile.blocks.size();
    int skipped = (2 * tile.n_block + 1) % max(1, size);
    if (launch.in_order) skipped = bwd_order(launch, tile).first_step(tile.n_block, size);
    return {tile.first_head, tile.blocks.begin + skipped, size};
  }
  FA_DEVICE void advance(const BlockRange& blocks) {
    m_block = m_block + 1 < blocks.end ? m_block + 1 : blocks.begin;
    if (--blocks_left == 0) {
      ++head;
      blocks_left = blocks.size();
    }
  }
};

// Element of lse and delta that belongs to the first query of a sequence and head.
FA_DEVICE int64_t statistics_row(const BwdParams& p, const BwdTile& tile, int head) {
  return p.seqlens_q.cu_seqlens
             ? static_cast<int64_t>(head) * p.total_q + tile.q_seq.first_row
             : (static_cast<int64_t>(tile.batch) * p.num_heads_q + head) * p.seqlens_q.max_seqlen;
}

// One arrival of a warp whose lanes are all done with a buffer.
template <class Pipeline>
FA_DEVICE void release_by_warp(const Pipeline& pipeline, int lane) {
  __syncwarp();
  if (lane == 0) pipeline.release();
}

}  // namespace fa
