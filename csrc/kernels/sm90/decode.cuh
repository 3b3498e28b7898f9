// Attention of many rows against a KV cache on Hopper: TMA copies and wgmma products, where
// mma.sync would be the limit. Rows are the query heads of one KV head and their queries.
//
// One CTA to an SM takes an equal share of all key blocks (core/decode_schedule.h), counted on the
// device, and walks the tiles in it, from the last block of each to the first. The producer
// warpgroup brings what they need (decode_load.h); each consumer warpgroup computes 64 rows, as the
// forward does (fwd.cuh):
//   for n_block of the item:  S = Q K^T;  meanwhile O += P V of the block before;
//                                    mask(S);  P = softmax weights of S
// Where no tile has more than 64 rows, the warpgroups take the tiles by turns: one stores its
// results while the other has begun the next tile.
// Memory: per consumer warpgroup smem_q [64, head_dim], then num_stages of smem_k and of smem_v
// [tile_n, head_dim], in slabs of 64 columns with 128-byte swizzle, then barriers and DecodeShared.
// A tile that is cut leaves its results in global memory, for a second launch (decode_merge.h).
// Keys behind the end of a sequence, and pages of nobody, may hold anything, also NaN: K's are
// masked, V's are overwritten with zeros in shared memory. Numbers: docs/performance/decode.md.
#pragma once
#include <cuda.h>
#include <cuda_runtime.h>

#include "attention/apply_mask.h"
#include "attention/steady_softmax.h"
#include "kernels/launch.h"
#include "kernels/sm80/decode_output.h"
#include "kernels/sm90/decode_layout.h"
#include "kernels/sm90/decode_load.h"
#include "kernels/sm90/decode_merge.h"
#include "kernels/tensor_map.h"
#include "ptx/barrier.h"
#include "ptx/grid_dependency.h"
#include "ptx/shared_memory.h"
#include "ptx/tma.h"
#include "ptx/warpgroup.h"
#include "tile/mma_sm90.h"
#include "tile/store_sm90.h"

namespace fa {

// A warpgroup's computation.
template <class T, int kHeadDim, DecodeTiles kTiles>
struct WgmmaDecodeConsumer {
  using Layout = WgmmaDecodeLayout<kHeadDim, kTiles>;
  using Shape = typename Layout::Shape;
  static constexpr int kTileM = Shape::kTileM, kTileN = Shape::kTileN;
  static constexpr int kN = kTileN / 8, kD = kHeadDim / 8;
  static constexpr int kWarps = Layout::kTile.num_warps, kThreads = kWarps * kWarpSize;
  static constexpr int kFirstOwnBarrier = 1;  // named barriers
  using Scores = AccumTile<1, kN>;
  using Weights = AFragments<1, kN / 2>;
  using Output = AccumTile<1, kD>;
  using Softmax = SteadySoftmax<T, 1>;
  using Results = DecodeOutput<T, kHeadDim, kTileM, kWarps>;

  const DecodeParams& p;
  const WgmmaDecodeLaunch& launch;
  typename Layout::Shared& shared;
  uint32_t smem;
  WarpgroupShare share;
  int warp, lane;  // of the warpgroup, of the warp
  typename Layout::KvPipeline k, v;
  typename Layout::QPipeline q;
  uint32_t turn_parity;  // of the phase of its turn barrier that lets it begin

  FA_DEVICE WgmmaDecodeConsumer(const DecodeParams& params, const WgmmaDecodeLaunch& decode_launch,
                                typename Layout::Shared& decode_shared, uint32_t smem_base,
                                int consumer)
      : p(params),
        launch(decode_launch),
        shared(decode_shared),
        smem(smem_base),
        share(decode_launch, consumer, Layout::kRows),
        warp(threadIdx.x / kWarpSize % 4),
        lane(threadIdx.x % kWarpSize),
        k(Layout::KvPipeline::consumer(smem_base + Layout::kKBarriers)),
        v(Layout::KvPipeline::consumer(smem_base + Layout::kVBarriers)),
        q(Layout::QPipeline::consumer(Layout::q_barriers(smem_base, consumer))),
        turn_parity(consumer == 0 ? 1 : 0) {}  // the first turn is warpgroup 0's

  FA_DEVICE float scale_log2() const { return launch.common.scale; }
  FA_DEVICE int first_row(const DecodeItem& item) const { return item.entry.m_block * kTileM; }
  FA_DEVICE int num_rows(const DecodeItem& item) const {
    return num_tile_rows<Layout>(launch.common, item);
  }
  // Row r of this lane in the tile.
  FA_DEVICE int tile_row(int r) const { return share.first_row + 16 * warp + 8 * r + lane / 4; }

  FA_DEVICE void run() {
    auto slot = Layout::ItemPipeline::consumer(smem + Layout::kItemBarriers);
#pragma unroll 1
    for (int turn = 0;; ++turn) {
      slot.wait_full();
      const DecodeItem& item = shared.items[slot.stage];
      if (item.end < 0) return;
      if (share.has(turn)) {
        compute(item);
      } else {
        pass_over(max(0, item.end - item.begin));
      }
      release(slot);
      slot.advance();
    }
  }

  // Everything about one item.
  FA_DEVICE void compute(const DecodeItem& item) {
    Output acc_o;
    acc_o.clear();
    Softmax softmax;
    const bool has_rows = item.begin < item.end && share.first_row < num_rows(item);
    if (has_rows) q.wait_full();
    if (share.by_turns) take_turn();
    if (has_rows) {
      Weights weights;
      int block = item.end - 1;
      first_step(weights, softmax, item, block);
#pragma unroll 1
      while (block != item.begin) step(weights, acc_o, softmax, item, --block);
      v.wait_full();
      if (share.by_turns) give_turn();
      issue_pv(acc_o, weights);
      softmax.finish(RowsOfWarp{});
      ptx::wgmma_wait_group<0>();
      ptx::wgmma_fence_operand(acc_o.x[0]);
      release(v);
      v.advance();
    } else if (share.by_turns) {
      give_turn();  // no rows, so no blocks
    } else {
      skip(item.end - item.begin);
    }
    store(item, softmax, acc_o);
  }

  // Blocks of the other warpgroup's turn, which it alone waits for and releases.
  FA_DEVICE void pass_over(int num_blocks) {
    k.advance_by(num_blocks);
    v.advance_by(num_blocks);
  }
  // A wait for a buffer means something once its fill before is complete: until the other
  // warpgroup has seen its last block, this one waits for no block.
  FA_DEVICE void take_turn() {
    ptx::mbarrier_wait(Layout::turn_barrier(smem, share.warpgroup), turn_parity);
    turn_parity ^= 1;
  }
  FA_DEVICE void give_turn() const {
    __syncwarp();  // all lanes have seen the last block
    if (lane == 0) ptx::mbarrier_arrive(Layout::turn_barrier(smem, 1 - share.warpgroup));
  }

  // Blocks of a tile of which this warpgroup has no row.
  FA_DEVICE void skip(int num_blocks) {
#pragma unroll 1
    for (; num_blocks > 0; --num_blocks) {
      k.wait_full();
      release(k);
      k.advance();
      v.wait_full();
      release(v);
      v.advance();
    }
  }

  // The products with K of a block are done, and with the last one those with Q.
  FA_DEVICE void release_k(const DecodeItem& item, int block) {
    release(k);
    k.advance();
    if (block != item.begin) return;
    release(q);
    q.advance();
  }

  // S = Q K^T of the first block, and its weights. No product is under way behind it.
  FA_DEVICE void first_step(Weights& weights, Softmax& softmax, const DecodeItem& item, int block) {
    Scores acc_s;
    k.wait_full();
    issue_qk(acc_s);
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_fence_operand(acc_s.x[0]);
    release_k(item, block);
    mask(acc_s, item, block);
    softmax.start(acc_s, scale_log2(), launch.threshold);
    softmax.weigh_far(acc_s, scale_log2());
    weights = as_a_operand<T>(acc_s);
    clear_values_behind(item, block);
  }

  // S and weights of a block, and meanwhile O += P V of the block before.
  FA_DEVICE void step(Weights& weights, Output& acc_o, Softmax& softmax, const DecodeItem& item,
                      int block) {
    Scores acc_s;
    k.wait_full();
    issue_qk(acc_s);
    v.wait_full();
    issue_pv(acc_o, weights);
    ptx::wgmma_wait_group<1>();  // S is complete, K read
    ptx::wgmma_fence_operand(acc_s.x[0]);
    release_k(item, block);
    mask(acc_s, item, block);
    float factor[Softmax::kRows];
    const bool moved = softmax.follow(acc_s, scale_log2(), launch.threshold, factor);
    softmax.weigh_far(acc_s, scale_log2());
    ptx::wgmma_wait_group<0>();  // O is complete, V and the weights read
    ptx::wgmma_fence_operand(acc_o.x[0]);
    release(v);
    v.advance();
    if (moved) Softmax::rescale(acc_o, factor);
    weights = as_a_operand<T>(acc_s);
  }

  FA_DEVICE void issue_qk(Scores& acc_s) const {
    ptx::wgmma_fence_operand(acc_s.x[0]);
    ptx::wgmma_fence();
    warpgroup_gemm_abt<T>(acc_s, Layout::smem_q(smem, share.warpgroup),
                          Layout::smem_k(smem, k.stage));
    ptx::wgmma_commit_group();
  }
  FA_DEVICE void issue_pv(Output& acc_o, const Weights& weights) const {
    ptx::wgmma_fence_operand(acc_o.x[0]);
    ptx::wgmma_fence();
    warpgroup_gemm_ab<T>(acc_o, weights, Layout::smem_v(smem, v.stage));
    ptx::wgmma_commit_group();
  }
  template <class Pipeline>
  FA_DEVICE void release(const Pipeline& pipeline) const {
    __syncwarp();  // all lanes are done with the buffer
    if (lane == 0) pipeline.release();
  }
  FA_DEVICE void sync_warpgroup() const {
    ptx::bar_sync(kFirstOwnBarrier + share.warpgroup, kWarpgroupSize);
  }

  FA_DEVICE void mask(Scores& acc_s, const DecodeItem& item, int block) const {
    const DecodeEntry& entry = item.entry;
    if (block < entry.blocks.full_end && block >= entry.blocks.full_begin) return;
    const int first_col = block * kTileN;
    FA_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int query = launch.common.by_group.divide(first_row(item) + tile_row(r));
      const Range keys = key_range(entry.mask, query);
      keep_columns(acc_s, r, keys.begin - first_col, keys.size(), lane);
    }
  }

  // Rows of V behind the sequence, whose weights are 0, become 0: 0 * NaN would be NaN.
  FA_DEVICE void clear_values_behind(const DecodeItem& item, int block) const {
    const int num_keys = item.entry.k_seq.seqlen - block * kTileN;
    if (num_keys >= kTileN) return;
    v.wait_full();
    constexpr int kChunks = kHeadDim / 8;
    const auto tile = Layout::smem_v(smem, v.stage);
    for (int i = num_keys * kChunks + static_cast<int>(threadIdx.x % kWarpgroupSize);
         i < kTileN * kChunks; i += kWarpgroupSize)
      ptx::st_shared_v4(tile.chunk_address(i / kChunks, i % kChunks), uint4{0, 0, 0, 0});
    ptx::fence_proxy_async();  // before wgmma reads them
    sync_warpgroup();          // all of them are written
  }

  // A result of all keys goes to out, another one waits for those of the other CTAs.
  FA_DEVICE void store(const DecodeItem& item, const Softmax& softmax, const Output& acc_o) {
    const Results results{p, launch.common};
    const int rows = results.stored_rows(item);
    if (item.entry.batch >= p.batch_size) {  // rows of no sequence
      const int threads = share.by_turns ? kWarpgroupSize : kThreads;
      for (int i = (threadIdx.x - kWarpgroupSize) % threads; i < rows * Results::kColumnGroups;
           i += threads)
        results.store_row(item, i / Results::kColumnGroups, i % Results::kColumnGroups * 4, {});
      return;
    }
    if (item.is_whole) return store_whole(results, item, rows, softmax, acc_o);
    FA_UNROLL
    for (int r = 0; r < 2; ++r) {
      if (tile_row(r) >= rows) continue;
      float* to = results.own_partial(item) + tile_row(r) * Results::kResultWords;
      FA_UNROLL
      for (int d = 0; d < kD; ++d) {
        *reinterpret_cast<float2*>(to + 8 * d + lane % 4 * 2) = {acc_o.x[0][d][2 * r],
                                                                 acc_o.x[0][d][2 * r + 1]};
      }
      // A whole sector of 32 bytes, of which L2 would read the rest from memory.
      if (lane % 4 < 2)
        *reinterpret_cast<float4*>(to + kHeadDim + lane % 4 * 4) = {
            softmax.row_max[r] * scale_log2(), softmax.row_sum[r], 0.f, 0.f};
    }
    if (warp == 0 && share.first_row == 0) CutTiles<kHeadDim>(p).put(item, lane);
  }

  FA_DEVICE void store_whole(const Results& results, const DecodeItem& item, int rows,
                             const Softmax& softmax, const Output& acc_o) const {
    FA_UNROLL
    for (int r = 0; r < 2; ++r) {
      const auto to = results.row_of(item, tile_row(r));
      const bool is_stored = tile_row(r) < rows, exists = tile_row(r) < num_rows(item);
      store_row_by_quad(results.out_row(item, to), acc_o.x[0], r, output_scale(softmax.row_sum[r]),
                        !exists, is_stored, p.head_dim_v, lane);
      if (lane % 4 == 0 && is_stored) *to.lse = exists ? softmax.lse(r, scale_log2()) : -INFINITY;
    }
  }
};

template <class T, int kHeadDim, DecodeTiles kTiles>
__global__ void __launch_bounds__(WgmmaDecodeLayout<kHeadDim, kTiles>::kThreads, 1)
    wgmma_decode_kernel(const __grid_constant__ WgmmaDecodeLaunch launch,
                        const __grid_constant__ DecodeParams p) {
  using Layout = WgmmaDecodeLayout<kHeadDim, kTiles>;
  extern __shared__ __align__(1024) char smem[];
  const uint32_t smem_base = ptx::cvta_to_shared(smem);
  auto& shared = *reinterpret_cast<typename Layout::Shared*>(smem + Layout::kShared);
  if (threadIdx.x == 0) {
    ptx::prefetch_tensormap(&launch.k);
    ptx::prefetch_tensormap(&launch.v);
    Layout::init_barriers(smem_base, launch.by_turns);
    CutTiles<kHeadDim>(p).clear();
  }
  ptx::griddepcontrol_launch_dependents();
  const bool has_share = find_share<typename Layout::Shape>(p, launch.common, shared);
  ptx::griddepcontrol_wait();  // q and new keys are there
  if (!has_share) return;      // all threads
  const int warpgroup = ptx::warpgroup_index();
  if (warpgroup == 0) {
    ptx::setmaxnreg_dec<Layout::kRegisters.producer>();
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / kWarpSize, 0);
    if (warp == 0) WgmmaDecodeLoader<Layout>(p, launch, smem_base).run(shared);
    if (threadIdx.x == kWarpSize) find_decode_items<Layout>(p, launch.common, shared, smem_base);
    if (warp >= 2) WgmmaDecodeQLoader<T, Layout>(p, launch, smem_base, warp - 2).run(shared);
  } else {
    ptx::setmaxnreg_inc<Layout::kRegisters.consumer>();
    WgmmaDecodeConsumer<T, kHeadDim, kTiles>(p, launch, shared, smem_base, warpgroup - 1).run();
  }
}

template <class T, int kHeadDim, DecodeTiles kTiles>
int launch_wgmma_decode_kernel(const DecodeParams& p, cudaStream_t stream) {
  using Layout = WgmmaDecodeLayout<kHeadDim, kTiles>;
  constexpr auto kKernel = wgmma_decode_kernel<T, kHeadDim, kTiles>;
  constexpr int kTileN = Layout::kTile.tile_n;
  WgmmaDecodeLaunch launch;
  launch.common = decode_launch(p);
  launch.threshold = kMaxWeightLog2<T> / launch.common.scale;
  const bool reads_once = launch.common.by_m_blocks.divisor() == 1;  // one tile to a KV head
  launch.l2_policy = reads_once ? ptx::kL2EvictFirst : ptx::kL2EvictLast;
  launch.by_turns = p.seqlens_q.max_seqlen * launch.common.by_group.divisor() <= Layout::kRows;
  launch.box_rows = p.page_table == nullptr ? kTileN : min(p.page_size, kTileN);
  const int rows = p.page_table == nullptr ? p.seqlens_k.max_seqlen : p.page_size;
  const auto address = [&](const void* cache) {
    return cache == nullptr ? p.q : cache;  // no key at all: it is not read
  };
  const HeadTensor k{address(p.k), p.k_strides, p.num_caches, rows, p.num_heads_kv, p.head_dim};
  const HeadTensor v{address(p.v), p.v_strides, p.num_caches, rows, p.num_heads_kv, p.head_dim_v};
  // 128 bytes are a row of a box: 256 are 3 to 8 % slower where memory is the limit (H200).
  constexpr CUtensorMapL2promotion kPromotion = CU_TENSOR_MAP_L2_PROMOTION_L2_128B;
  cudaError_t error = encode_tensor_map(launch.k, p.dtype, k, launch.box_rows, kPromotion);
  if (error == cudaSuccess)
    error = encode_tensor_map(launch.v, p.dtype, v, launch.box_rows, kPromotion);
  if (error == cudaSuccess) error = allow_dynamic_smem<kKernel>(Layout::kSmemBytes);
  if (error != cudaSuccess) return error;
  LaunchConfig config(p.num_ctas, Layout::kThreads, Layout::kSmemBytes, stream);
  if (p.overlaps) config.overlap();
  error = cudaLaunchKernelEx(config.get(), kKernel, launch, p);
  return error != cudaSuccess ? error : launch_merge<T, kHeadDim>(p, launch.common, stream);
}

template <class T, int kHeadDim>
int launch_decode_wgmma(const DecodeParams& p, cudaStream_t stream) {
  constexpr FwdTileConfig kFew = sm90_decode_tile_config(kHeadDim, DecodeTiles::kFew);
  constexpr FwdTileConfig kMany = sm90_decode_tile_config(kHeadDim, DecodeTiles::kMany);
  if (p.num_ctas == 0) return cudaSuccess;
  if constexpr (!same_tile(kFew, kMany)) {
    if (p.tile_n == kFew.tile_n)
      return launch_wgmma_decode_kernel<T, kHeadDim, DecodeTiles::kFew>(p, stream);
  }
  return launch_wgmma_decode_kernel<T, kHeadDim, DecodeTiles::kMany>(p, stream);
}

}  // namespace fa
