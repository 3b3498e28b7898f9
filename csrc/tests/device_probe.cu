// Compiled, not run, for every target: core/ is valid device code. Each kernel evaluates some of
// core/ at run time and at compile time.
#include "core/accum_layout.h"
#include "core/bwd_order.h"
#include "core/bwd_workspace.h"
#include "core/cross_entropy.h"
#include "core/decode_schedule.h"
#include "core/dtype.h"
#include "core/fast_div.h"
#include "core/lse_rows.h"
#include "core/mask.h"
#include "core/norm.h"
#include "core/online_softmax.h"
#include "core/page_table.h"
#include "core/params.h"
#include "core/philox.h"
#include "core/rotary.h"
#include "core/row_kernels.h"
#include "core/seqlen.h"
#include "core/split.h"
#include "core/swizzle.h"
#include "core/tile_config.h"
#include "core/tile_scheduler.h"
#include "core/token_tile.h"
#include "core/value_checks.h"

namespace fa {

__global__ void probe_ranges(SeqlenArgs args_q, SeqlenArgs args_k, TileGrid grid, int window_left,
                             int window_right, int* out) {
  const TileCoord tile = tile_coord_grouped(grid, blockIdx.x, true, 8);
  const SeqlenInfo q = seqlen_info(args_q, tile.batch), k = seqlen_info(args_k, tile.batch);
  const MaskSpec mask = mask_spec(q.seqlen, k.seqlen, window_left, window_right);
  const BlockRange blocks = n_block_range(mask, tile.m_block, 128, 64);
  const BlockRange part = split_blocks(blocks, blockIdx.y, gridDim.y);
  const BlockRange rows = m_block_range(mask, tile.m_block, 64, 128);
  const BwdOrder order{mask, 64, 128, grid.num_m_blocks,
                       bwd_heads_fit(grid.num_m_blocks, 1, 132, true)};
  const TileCoord varlen =
      varlen_tile_coord(args_q.cu_seqlens, grid.batch_size, 128, grid.num_heads, blockIdx.x);
  const TokenTile tokens = token_tile(args_q.cu_seqlens, grid.batch_size, q.seqlen, 64, blockIdx.x);
  out[threadIdx.x] = tokens.begin + part.begin + part.full_end + rows.full_begin + varlen.m_block +
                     is_kept(mask, threadIdx.x, threadIdx.y) + seen_queries(mask).begin +
                     order.turn(tile.m_block, rows.begin).before +
                     order.first_step(tile.m_block, rows.size()) + tile_coord(grid, 1, false).head +
                     choose_num_splits(grid.size(), gridDim.z, blocks.size(), 32) +
                     split_work(gridDim.x, 7, 0, 1, true).part_of(threadIdx.x);
}

__global__ void probe_layouts(const int* page_table_row, int page_size, int* out) {
  const RowCol c = wgmma_accum_coord(threadIdx.x, 3);
  const AccumSlot slot = accum_slot(c.row % 16, c.col);
  const PageSlot page = page_slot(page_table_row, page_size, threadIdx.x);
  const RotaryPair pair = rotary_pair(threadIdx.x, 64, page_size > 1);
  out[threadIdx.x] =
      swizzle_128b(c.row, 2 * c.col) + swizzle_64b(c.row, 0) + swizzle_32b(c.row, 0) + slot.reg +
      page.offset + pair.second + a_operand_coord(threadIdx.x, 1).row +
      b_operand_coord(threadIdx.x, 1).row + dropout_byte(7, 9, blockIdx.x, c.row, c.col) +
      unit_columns(128, 64, page_size > 1, elements_per_vector(DType::kFloat16), 3).first;
  out[1] = divide(threadIdx.x, FastDiv(page_size)).remainder;
  out[3] = row_pieces(2 * threadIdx.x, 2, page_size).tail + norm_share(page_size, 16, 256).lanes +
           norm_dropout_bits(norm_dropout_words(7, 9, blockIdx.x, c.row), c.col);
  out[2] = static_cast<int>(
      bwd_dq_accum_first_row(page_size > 1, threadIdx.x, 100, page_table_row[0], 64));
  out[0] = static_cast<int>(page_element_offset(page, 1 << 20, 1 << 10, 128, 3));
}

__global__ void probe_softmax(float* x, float softmax_scale) {
  const float factor = rescale_factor(x[0], x[1], softmax_scale * kLog2e);
  x[2] = softmax_weight(x[3], x[1], softmax_scale) * factor + merge_lse(x[4], x[5]) +
         row_lse(x[1], x[6], softmax_scale) + merge_weight(x[4], x[5]) + output_scale(x[6]);
}

__global__ void probe_value_checks(const __grid_constant__ ValueCheckParams p, int64_t* out) {
  const Violation first = first_violation(p, blockIdx.x, threadIdx.x, kWarpSize);
  out[threadIdx.x] = first.got + static_cast<int64_t>(violation_order(first));
}

template <Arch kArch, int kHeadDim>
constexpr FwdTileConfig kFwdTile =
    kArch == Arch::kSm90 ? sm90_fwd_tile_config({kHeadDim, kHeadDim}, Sm90FwdTile::kLong)
                         : fwd_tile_config(kArch, kHeadDim);

template <Arch kArch, int kHeadDim>
__global__ void __launch_bounds__(fwd_num_threads(kArch, kFwdTile<kArch, kHeadDim>))
    probe_tiles(int* out) {
  constexpr FwdTileConfig kFwd = kFwdTile<kArch, kHeadDim>;
  constexpr BwdTileConfig kBwd = bwd_tile_config(kArch, kHeadDim);
  static_assert(fwd_smem_bytes(kFwd, kHeadDim, kHeadDim) <= max_smem_bytes(kArch));
  static_assert(bwd_smem_bytes(kBwd, kHeadDim) <= max_smem_bytes(kArch));
  constexpr int kRegisters = warpgroup_registers(2).consumer;
  out[threadIdx.x] = kFwd.tile_m + kBwd.tile_n + kRegisters;
}

template __global__ void probe_tiles<Arch::kSm80, 128>(int*);
template __global__ void probe_tiles<Arch::kSm89, 256>(int*);
template __global__ void probe_tiles<Arch::kSm90, 64>(int*);

}  // namespace fa
