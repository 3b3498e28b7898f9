// What a CTA of the SM90 backward works on: its tile of keys, and the tiles of queries that it
// walks.
#pragma once
#include <cuda.h>

#include "core/bwd_workspace.h"
#include "core/mask.h"
#include "core/params.h"
#include "core/tile_scheduler.h"

namespace fa {

constexpr int kBwdTileM = 64, kBwdTileN = 128;  // of every row in core/tile_config.h that is built

// What the launcher adds to the parameters.
struct BwdLaunch {
  CUtensorMap q, k, v, dout;  // varlen: one batch entry of all rows
  TileOrder order;            // its m_blocks are tiles of keys
  int num_tiles, heads_per_kv;
  float scale_log2;  // softmax_scale * log2(e)
};

// A tile of keys of one KV head.
struct BwdTile {
  int n_block, head_kv, batch;
  int first_head;  // of the query heads that read it
  SeqlenInfo q_seq, k_seq;
  MaskSpec mask;
  BlockRange blocks;  // of queries that see a key of it
  int num_steps;      // blocks of all heads
};

FA_DEVICE BwdTile bwd_tile(const BwdParams& p, const BwdLaunch& launch, int index) {
  // n_block 0 first: under a causal mask most queries see it, and dQ's turns follow this order.
  const TileCoord at = launch.order.coord(index);
  BwdTile tile;
  tile.n_block = at.m_block, tile.head_kv = at.head, tile.batch = at.batch;
  tile.first_head = at.head * launch.heads_per_kv;
  tile.q_seq = seqlen_info_or_rest(p.seqlens_q, tile.batch, p.batch_size, p.total_q);
  tile.k_seq = seqlen_info_or_rest(p.seqlens_k, tile.batch, p.batch_size, p.total_k);
  tile.mask =
      mask_spec(tile.q_seq.seqlen, tile.k_seq.seqlen, p.score.window_left, p.score.window_right);
  tile.blocks = m_block_range(tile.mask, tile.n_block, kBwdTileM, kBwdTileN);
  tile.num_steps = tile.blocks.size() * launch.heads_per_kv;
  return tile;
}

// A tile of queries of one head. A CTA walks the blocks of each head downwards, from a block of its
// own on, so that tiles of keys that run at the same time add to different rows of dQ.
// Deterministic: all from the last block on; then neighbouring tiles of keys meet a tile of queries
// one after the other, as they have to.
struct BwdStep {
  int head, m_block;
  int blocks_left;  // of the head, this one included

  static FA_DEVICE BwdStep first(const BwdParams& p, const BwdTile& tile) {
    const int size = tile.blocks.size();
    const int skipped = p.dq_semaphore != nullptr ? 0 : (2 * tile.n_block + 1) % max(1, size);
    return {tile.first_head, tile.blocks.end - 1 - skipped, size};
  }
  FA_DEVICE void advance(const BlockRange& blocks) {
    m_block = m_block > blocks.begin ? m_block - 1 : blocks.end - 1;
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
