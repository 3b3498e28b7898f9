// What a CTA of the SM80 backward works on: its tile of keys, and the tiles of queries that it
// walks.
#pragma once
#include "core/mask.h"
#include "core/params.h"
#include "core/tile_scheduler.h"

namespace fa {

// A tile of keys of one KV head, for a share of its query heads.
struct BwdTile {
  int n_block, head_kv, split, batch;
  SeqlenInfo seq_q, seq_k;
  MaskSpec mask;
  BlockRange blocks;  // of queries that see a key of it
};

template <class Shape>
FA_DEVICE BwdTile bwd_tile(const BwdParams& p, TileGrid grid, int heads_per_group) {
  BwdTile tile;
  // n_block 0 first: under a causal mask most queries see it, and dQ's turns follow this order.
  const TileCoord at = tile_coord_grouped(grid, blockIdx.x, false, heads_per_group);
  tile.n_block = at.m_block, tile.batch = at.batch;
  tile.head_kv = at.head / p.head_splits, tile.split = at.head % p.head_splits;
  tile.seq_q = seqlen_info_or_rest(p.seqlens_q, tile.batch, p.batch_size, p.total_q);
  tile.seq_k = seqlen_info_or_rest(p.seqlens_k, tile.batch, p.batch_size, p.total_k);
  tile.mask =
      mask_spec(tile.seq_q.seqlen, tile.seq_k.seqlen, p.score.window_left, p.score.window_right);
  tile.blocks = m_block_range(tile.mask, tile.n_block, Shape::kTileM, Shape::kTileN);
  return tile;
}

// A tile of queries of one head.
struct BwdStep {
  int head, m_block;
};

// Where the tiles of queries lie that a CTA walks: for each head of the group the blocks from the
// last one down. In that order neighbouring tiles of keys meet a tile of queries one after the
// other, which deterministic dQ waits for.
template <class T>
struct BwdStream {
  BwdStep step;
  const T *q, *dout;       // row of the step's first query
  int64_t statistics_row;  // of the head's first query, in lse and delta

  static FA_DEVICE BwdStream first(const BwdParams& p, const BwdTile& tile, int tile_m) {
    const int head = (tile.head_kv * p.head_splits + tile.split) *
                     (p.num_heads_q / (p.num_heads_kv * p.head_splits));
    const int m_block = tile.blocks.end - 1;
    const int64_t row = tile.seq_q.first_row + static_cast<int64_t>(m_block) * tile_m;
    const auto at = [&](const void* tensor, const Strides& strides) {
      return static_cast<const T*>(tensor) +
             element_offset(strides.batch, strides.token, strides.head, tile.batch, row, head);
    };
    const int64_t statistics_row =
        p.seqlens_q.cu_seqlens
            ? static_cast<int64_t>(head) * p.total_q + tile.seq_q.first_row
            : (static_cast<int64_t>(tile.batch) * p.num_heads_q + head) * p.seqlens_q.max_seqlen;
    return {{head, m_block}, at(p.q, p.q_strides), at(p.dout, p.dout_strides), statistics_row};
  }

  FA_DEVICE void advance(const BwdParams& p, BlockRange blocks, int tile_m) {
    if (step.m_block > blocks.begin) {
      --step.m_block;
      q -= tile_m * p.q_strides.token;
      dout -= tile_m * p.dout_strides.token;
    } else {
      const int64_t back = static_cast<int64_t>(blocks.size() - 1) * tile_m;
      ++step.head;
      step.m_block = blocks.end - 1;
      q += p.q_strides.head + back * p.q_strides.token;
      dout += p.dout_strides.head + back * p.dout_strides.token;
      statistics_row += p.seqlens_q.cu_seqlens ? p.total_q : p.seqlens_q.max_seqlen;
    }
  }
};

}  // namespace fa
