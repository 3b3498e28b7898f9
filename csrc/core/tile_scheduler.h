// Linear tile index -> (m_block, head, batch). Pure arithmetic: kernels add blockIdx or an atomic
// ticket. Every map is a bijection onto the tiles that have work.
//
// Order: longest first. Under a causal mask the last m_block visits most keys, so it is issued
// first and the short tiles fill the gaps at the end.
#pragma once
#include "core/fast_div.h"
#include "core/host_device.h"

namespace fa {

struct TileCoord {
  int m_block, head, batch;
};

struct TileGrid {
  int num_m_blocks, num_heads, batch_size;
  FA_HD constexpr int64_t size() const {
    return static_cast<int64_t>(num_m_blocks) * num_heads * batch_size;
  }
};

// Heads run fastest, then batches, then m_blocks, from the last m_block down if longest_first.
FA_HD constexpr TileCoord tile_coord(TileGrid grid, int64_t tile, bool longest_first) {
  const int64_t num_heads_batches = static_cast<int64_t>(grid.num_heads) * grid.batch_size;
  const int m_block = static_cast<int>(tile / num_heads_batches);
  const int64_t head_batch = tile % num_heads_batches;
  return {longest_first ? grid.num_m_blocks - 1 - m_block : m_block,
          static_cast<int>(head_batch % grid.num_heads),
          static_cast<int>(head_batch / grid.num_heads)};
}

// The same with (head, batch) pairs taken in groups of group_size, all m_blocks of a group before
// the next one: keys and values of a group stay in L2 while its tiles run. The last group is
// smaller if group_size does not divide. group_size >= 1.
FA_HD constexpr TileCoord tile_coord_grouped(TileGrid grid, int64_t tile, bool longest_first,
                                             int group_size) {
  const int64_t num_heads_batches = static_cast<int64_t>(grid.num_heads) * grid.batch_size;
  const int64_t tiles_per_group = static_cast<int64_t>(group_size) * grid.num_m_blocks;
  const int64_t group = tile / tiles_per_group;
  const int64_t first = group * group_size;
  const int64_t members = min<int64_t>(group_size, num_heads_batches - first);
  const int64_t in_group = tile - group * tiles_per_group;
  const int m_block = static_cast<int>(in_group / members);
  const int64_t head_batch = first + in_group % members;
  return {longest_first ? grid.num_m_blocks - 1 - m_block : m_block,
          static_cast<int>(head_batch % grid.num_heads),
          static_cast<int>(head_batch / grid.num_heads)};
}

// tile_coord_grouped with its divisions prepared before the launch; fewer than 2^31 tiles.
struct TileOrder {
  TileGrid grid;
  bool longest_first;
  FastDiv tiles_per_group, group_size, last_group_size, num_heads;

  // The grid is not empty.
  static FA_HD constexpr TileOrder of(TileGrid grid, bool longest_first, int group_size) {
    const int pairs = grid.num_heads * grid.batch_size;
    const int group = min(group_size, pairs), last = pairs - (pairs - 1) / group * group;
    return {grid,           longest_first, FastDiv(group * grid.num_m_blocks),
            FastDiv(group), FastDiv(last), FastDiv(grid.num_heads)};
  }

  FA_HD constexpr TileCoord coord(int tile) const {
    const QuotientRemainder group = divide(tile, tiles_per_group);
    const int first = group.quotient * group_size.divisor();
    const bool is_last = first + group_size.divisor() >= grid.num_heads * grid.batch_size;
    const QuotientRemainder block = divide(group.remainder, is_last ? last_group_size : group_size);
    const QuotientRemainder pair = divide(first + block.remainder, num_heads);
    return {longest_first ? grid.num_m_blocks - 1 - block.quotient : block.quotient, pair.remainder,
            pair.quotient};
  }
};

// Pairs (head, batch) whose keys and values fill l2_bytes: a group for tile_coord_grouped. A power
// of two, at least 1; heads of one KV head share their bytes.
FA_HD constexpr int l2_group_size(int64_t kv_bytes_per_head, int heads_per_kv_head,
                                  int64_t l2_bytes) {
  int group = 1;
  while (group < 1024 && kv_bytes_per_head > 0 &&
         ceil_div<int64_t>(2 * group, heads_per_kv_head) * kv_bytes_per_head <= l2_bytes)
    group *= 2;
  return group;
}

// Varlen without a host copy of the lengths: sequence b owns the block slots from
// cu_seqlens[b] / tile_m + b on. They are enough, because
//   floor(y / t) - floor(x / t) + 1 >= ceil((y - x) / t)   for x <= y,
// so the slots of sequences never overlap and the launch size follows from total and batch_size
// alone; at most batch_size slots have no work.
FA_HD constexpr int varlen_first_slot(int cu_seqlen, int tile_m, int batch) {
  return cu_seqlen / tile_m + batch;
}
FA_HD constexpr int64_t varlen_num_tiles(int total, int batch_size, int tile_m, int num_heads) {
  return static_cast<int64_t>(varlen_first_slot(total, tile_m, batch_size)) * num_heads;
}

// The tile of a varlen launch; m_block == -1: this slot has no work. Within a sequence the last
// m_block comes first, heads run fastest. cu_seqlens: [batch_size + 1], ascending from 0.
FA_HD constexpr TileCoord varlen_tile_coord(const int* cu_seqlens, int batch_size, int tile_m,
                                            int num_heads, int64_t tile) {
  const int slot = static_cast<int>(tile / num_heads), head = static_cast<int>(tile % num_heads);
  if (batch_size == 0) return {-1, head, 0};
  int low = 0, high = batch_size;  // the sequence is in [low, high)
  while (high - low > 1) {
    const int middle = low + (high - low) / 2;
    if (varlen_first_slot(cu_seqlens[middle], tile_m, middle) <= slot) {
      low = middle;
    } else {
      high = middle;
    }
  }
  const int index = slot - varlen_first_slot(cu_seqlens[low], tile_m, low);
  const int num_m_blocks = ceil_div(cu_seqlens[low + 1] - cu_seqlens[low], tile_m);
  return {index < num_m_blocks ? num_m_blocks - 1 - index : -1, head, low};
}

static_assert(tile_coord({4, 2, 3}, 0, true).m_block == 3);
static_assert(tile_coord({4, 2, 3}, 23, true).m_block == 0);
static_assert(TileOrder::of({4, 2, 3}, true, 4).coord(23).m_block == 0);

}  // namespace fa
