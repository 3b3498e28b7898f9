// Attention of many rows against a KV cache on Hopper: TMA copies and wgmma products, where
// mma.sync would be the limit. Rows are the query heads of one KV head and their queries.
//
// One CTA to an SM takes an equal share of all key blocks (core/decode_schedule.h), counted on the
// device, and walks the tiles in it, from the last block of each to the first. The producer
// warpgroup brings what they need (decode_load.h); each consumer warpgroup computes 64 rows, as the
// forward does (fwd.cuh):
//   for n_block of the item:  S = Q K^T;  meanwhile O += P V of the block before;
//                                    mask(S);  P = softmax weights of S
// Memory: per consumer warpgroup smem_q [64, head_dim], then num_stages of smem_k and of smem_v
// [tile_n, head_dim], in slabs of 64 columns with 128-byte swizzle, then barriers and DecodeShared.
// Parts of a tile that is cut meet in pairs, or leave their results to a second launch
// (decode_merge.h).
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
#include "kernels/tile_counter.h"
#include "ptx/barrier.h"
#include "ptx/cp_async.h"
#include "ptx/grid_dependency.h"
#include "ptx/reduction.h"
#include "ptx/shared_memory.h"
#include "ptx/tma.h"
#include "ptx/warpgroup.h"
#include "tile/mma_sm90.h"
#include "tile/store_sm90.h"

namespace fa {

// Of CTA i, at 2 i + warpgroup: whether one of the two parts of a tile that meet there has come.
// Zero before and after every launch. A row for each launch that may run at the same time.
constexpr int kNumDecodeMeetings = 1 << 10;
static __device__ int decode_meetings[kNumDecodeMeetings][kDecodeMaxCtas];

// Tiles of the longest kind of sequences, as far as the host knows.
inline int64_t num_decode_tiles(const DecodeParams& p) {
  const int group = p.num_heads_q / p.num_heads_kv;
  return int64_t{p.batch_size} * p.num_heads_kv *
         packed_m_blocks(p.seqlens_q.max_seqlen, group, p.tile_m);
}

// A warpgroup's computation.
template <class T, int kHeadDim, DecodeTiles kTiles, bool kMerges>
struct WgmmaDecodeConsumer {
  using Layout = WgmmaDecodeLayout<kHeadDim, kTiles, kMerges>;
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
  int warpgroup, warp, lane;  // among the consumers
  typename Layout::KvPipeline k, v;

  FA_DEVICE WgmmaDecodeConsumer(const DecodeParams& params, const WgmmaDecodeLaunch& decode_launch,
                                typename Layout::Shared& decode_shared, uint32_t smem_base,
                                int consumer)
      : p(params),
        launch(decode_launch),
        shared(decode_shared),
        smem(smem_base),
        warpgroup(consumer),
        warp(consumer * 4 + threadIdx.x / kWarpSize % 4),
        lane(threadIdx.x % kWarpSize),
        k(Layout::KvPipeline::consumer(smem_base + Layout::kKBarriers)),
        v(Layout::KvPipeline::consumer(smem_base + Layout::kVBarriers)) {}

  FA_DEVICE float scale_log2() const { return launch.common.scale; }
  FA_DEVICE int first_row(const DecodeItem& item) const { return item.entry.m_block * kTileM; }
  // Rows of the tile that attend.
  FA_DEVICE int num_rows(const DecodeItem& item) const {
    return min(kTileM,
               item.entry.q_seq.seqlen * launch.common.by_group.divisor() - first_row(item));
  }
  // Row r of this lane in the tile.
  FA_DEVICE int tile_row(int r) const { return 16 * warp + 8 * r + lane / 4; }

  FA_DEVICE void run() {
    auto slot = Layout::ItemPipeline::consumer(smem + Layout::kItemBarriers);
#pragma unroll 1
    while (true) {
      slot.wait_full();
      const DecodeItem& item = shared.items[slot.stage];
      if (item.end < 0) return;
      compute(item);
      release(slot);
      slot.advance();
    }
  }

  // Everything about one item.
  FA_DEVICE void compute(const DecodeItem& item) {
    Output acc_o;
    acc_o.clear();
    Softmax softmax;
    if (item.begin < item.end && Layout::kRows * warpgroup < num_rows(item)) {
      load_q(item);
      Weights weights;
      int block = item.end - 1;
      first_step(weights, softmax, item, block);
#pragma unroll 1
      while (block != item.begin) step(weights, acc_o, softmax, item, --block);
      v.wait_full();
      issue_pv(acc_o, weights);
      softmax.finish(RowsOfWarp{});
      ptx::wgmma_wait_group<0>();
      ptx::wgmma_fence_operand(acc_o.x[0]);
      release(v);
      v.advance();
    } else {
      skip(item.end - item.begin);
    }
    store(item, softmax, acc_o);
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

  // This warpgroup's rows of Q, zeros where there is none.
  FA_DEVICE void load_q(const DecodeItem& item) const {
    constexpr int kChunks = kHeadDim / 8;
    const auto tile = Layout::smem_q(smem, warpgroup);
    const DecodeEntry& entry = item.entry;
    const int first = Layout::kRows * warpgroup, rows = num_rows(item) - first;
    sync_warpgroup();  // all warps are done with the rows before
#pragma unroll 4
    for (int i = threadIdx.x % kWarpgroupSize; i < Layout::kRows * kChunks; i += kWarpgroupSize) {
      const int row = i / kChunks, chunk = i % kChunks;
      const auto [token, in_group] = divide(first_row(item) + first + row, launch.common.by_group);
      const bool exists = row < rows && chunk * 8 < p.head_dim;
      const int64_t offset =
          element_offset(p.q_strides.batch, p.q_strides.token, p.q_strides.head, entry.batch,
                         entry.q_seq.first_row + token,
                         item.head_kv * launch.common.by_group.divisor() + in_group) +
          chunk * 8;
      ptx::cp_async_cg_16(tile.chunk_address(row, chunk),
                          static_cast<const T*>(p.q) + (exists ? offset : 0), exists ? 16 : 0);
    }
    ptx::cp_async_commit_group();
    ptx::cp_async_wait_group<0>();
    ptx::fence_proxy_async();  // before wgmma reads them
    sync_warpgroup();          // all rows are there
  }

  // S = Q K^T of the first block, and its weights. No product is under way behind it.
  FA_DEVICE void first_step(Weights& weights, Softmax& softmax, const DecodeItem& item, int block) {
    Scores acc_s;
    k.wait_full();
    issue_qk(acc_s);
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_fence_operand(acc_s.x[0]);
    release(k);
    k.advance();
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
    release(k);
    k.advance();
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
    warpgroup_gemm_abt<T>(acc_s, Layout::smem_q(smem, warpgroup), Layout::smem_k(smem, k.stage));
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
    ptx::bar_sync(kFirstOwnBarrier + warpgroup, kWarpgroupSize);
  }
  // Whether any thread of the warpgroup says so; the vote tells the compiler that warps agree.
  FA_DEVICE bool any(bool predicate) const {
    return __any_sync(0xffffffffu,
                      ptx::bar_red_or(kFirstOwnBarrier + warpgroup, kWarpgroupSize, predicate));
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
  FA_DEVICE void store(const DecodeItem& item, Softmax& softmax, Output& acc_o) const {
    const Results results{p, launch.common};
    const int rows = results.stored_rows(item);
    if (item.entry.batch >= p.batch_size) {  // rows of no sequence
      for (int i = threadIdx.x - kWarpgroupSize; i < rows * Results::kColumnGroups; i += kThreads)
        results.store_row(item, i / Results::kColumnGroups, i % Results::kColumnGroups * 4, {});
      return;
    }
    if (item.is_whole) return store_whole(results, item, rows, softmax, acc_o);
    if constexpr (kMerges) return meet(results, item, rows, softmax, acc_o);
    write_part(results.own_partial(item), rows, softmax, acc_o, scale_log2());
    if (warp == 0) CutTiles<kHeadDim>(p).put(item, lane);
  }

  // max_scale: of the maxima that are written.
  FA_DEVICE void write_part(float* part, int rows, const Softmax& softmax, const Output& acc_o,
                            float max_scale) const {
    FA_UNROLL
    for (int r = 0; r < 2; ++r) {
      if (tile_row(r) >= rows) continue;
      float* to = part + tile_row(r) * Results::kResultWords;
      FA_UNROLL
      for (int d = 0; d < kD; ++d) {
        *reinterpret_cast<float2*>(to + 8 * d + lane % 4 * 2) = {acc_o.x[0][d][2 * r],
                                                                 acc_o.x[0][d][2 * r + 1]};
      }
      // A whole sector of 32 bytes, of which L2 would read the rest from memory.
      if (lane % 4 < 2)
        *reinterpret_cast<float4*>(to + kHeadDim + lane % 4 * 4) = {softmax.row_max[r] * max_scale,
                                                                    softmax.row_sum[r], 0.f, 0.f};
    }
  }

  // Parts of a tile meet in pairs (MergeNode): the first to come of two leaves its results, the
  // other adds them to its own and goes on for both. The one that is left stores the tile.
  FA_DEVICE void meet(const Results& results, const DecodeItem& item, int rows, Softmax& softmax,
                      Output& acc_o) const {
    const auto result = [&](int part) { return results.partial(item.first_cta + part, part == 0); };
    MergeNode node{static_cast<int>(blockIdx.x) - item.first_cta,
                   item.last_cta - item.first_cta + 1, 1};
#pragma unroll 1
    for (; !node.is_root(); node = node.parent()) {
      if (!node.has_sibling()) continue;
      int* counter = decode_meetings[launch.common.counter_row] +
                     2 * (item.first_cta + node.part_to_meet_at()) + warpgroup;
      const bool leads = threadIdx.x % kWarpgroupSize == 0;
      if (!any(leads && ptx::ld_acquire_gpu_s32(counter) == 1)) {
        write_part(result(node.first_part()), rows, softmax, acc_o, 1.f);
        sync_warpgroup();  // all of it is written
        if (!any(leads && ptx::atom_add_acq_rel_gpu_s32(counter, 1) == 1)) return;
      }
      if (leads) *counter = 0;
      add_part(result(node.first_part_of_sibling()), rows, softmax, acc_o);
    }
    store_whole(results, item, rows, softmax, acc_o);
  }

  // Rounds the same whichever of the two is the other.
  FA_DEVICE void add_part(const float* part, int rows, Softmax& softmax, Output& acc_o) const {
    FA_UNROLL
    for (int r = 0; r < 2; ++r) {
      if (tile_row(r) >= rows) continue;
      const float* from = part + tile_row(r) * Results::kResultWords;
      const auto theirs = __ldcg(reinterpret_cast<const float2*>(from + kHeadDim));
      float2 x[kD];
      FA_UNROLL
      for (int d = 0; d < kD; ++d)
        x[d] = __ldcg(reinterpret_cast<const float2*>(from + 8 * d + lane % 4 * 2));
      const float high = fmaxf(softmax.row_max[r], theirs.x), reference = finite_max(high);
      const float factor = ptx::ex2_approx_ftz((softmax.row_max[r] - reference) * scale_log2());
      const float their_factor = ptx::ex2_approx_ftz((theirs.x - reference) * scale_log2());
      const auto sum = [&](float mine, float other) {
        return __fadd_rn(__fmul_rn(mine, factor), __fmul_rn(other, their_factor));
      };
      softmax.row_max[r] = high;
      softmax.row_sum[r] = sum(softmax.row_sum[r], theirs.y);
      FA_UNROLL
      for (int d = 0; d < kD; ++d) {
        acc_o.x[0][d][2 * r] = sum(acc_o.x[0][d][2 * r], x[d].x);
        acc_o.x[0][d][2 * r + 1] = sum(acc_o.x[0][d][2 * r + 1], x[d].y);
      }
    }
    __syncwarp();  // all lanes have read what this warp may overwrite
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

template <class T, int kHeadDim, DecodeTiles kTiles, bool kMerges>
__global__ void __launch_bounds__(WgmmaDecodeLayout<kHeadDim, kTiles, kMerges>::kThreads, 1)
    wgmma_decode_kernel(const __grid_constant__ WgmmaDecodeLaunch launch,
                        const __grid_constant__ DecodeParams p) {
  using Layout = WgmmaDecodeLayout<kHeadDim, kTiles, kMerges>;
  extern __shared__ __align__(1024) char smem[];
  const uint32_t smem_base = ptx::cvta_to_shared(smem);
  auto& shared = *reinterpret_cast<typename Layout::Shared*>(smem + Layout::kShared);
  if (threadIdx.x == 0) {
    ptx::prefetch_tensormap(&launch.k);
    ptx::prefetch_tensormap(&launch.v);
    Layout::init_barriers(smem_base);
    if (!kMerges) CutTiles<kHeadDim>(p).clear();
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
    if (threadIdx.x == kWarpSize) DecodeItemFinder<Layout>(p, launch.common, shared).run(smem_base);
  } else {
    ptx::setmaxnreg_inc<Layout::kRegisters.consumer>();
    WgmmaDecodeConsumer<T, kHeadDim, kTiles, kMerges>(p, launch, shared, smem_base, warpgroup - 1)
        .run();
  }
}

template <class T, int kHeadDim, DecodeTiles kTiles, bool kMerges>
int launch_wgmma_decode_kernel(const DecodeParams& p, int counter_row, cudaStream_t stream) {
  using Layout = WgmmaDecodeLayout<kHeadDim, kTiles, kMerges>;
  constexpr auto kKernel = wgmma_decode_kernel<T, kHeadDim, kTiles, kMerges>;
  constexpr int kTileN = Layout::kTile.tile_n;
  WgmmaDecodeLaunch launch;
  launch.common = decode_launch(p);
  launch.common.counter_row = counter_row;
  launch.threshold = kMaxWeightLog2<T> / launch.common.scale;
  const bool reads_once = launch.common.by_m_blocks.divisor() == 1;  // one tile to a KV head
  launch.l2_policy = reads_once ? ptx::kL2EvictFirst : ptx::kL2EvictLast;
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
  if (error != cudaSuccess || kMerges) return error;
  return launch_merge<T, kHeadDim>(p, launch.common, stream);
}

template <class T, int kHeadDim, DecodeTiles kTiles>
int launch_wgmma_decode(const DecodeParams& p, cudaStream_t stream) {
  int row = kNoTileCounter;
  if (decode_merges(num_decode_tiles(p), p.num_ctas)) {
    const cudaError_t error = tile_counter(stream, row);
    if (error != cudaSuccess) return error;
  }
  return 0 <= row && row < kNumDecodeMeetings
             ? launch_wgmma_decode_kernel<T, kHeadDim, kTiles, true>(p, row, stream)
             : launch_wgmma_decode_kernel<T, kHeadDim, kTiles, false>(p, kNoTileCounter, stream);
}

template <class T, int kHeadDim>
int launch_decode_wgmma(const DecodeParams& p, cudaStream_t stream) {
  constexpr FwdTileConfig kFew = sm90_decode_tile_config(kHeadDim, DecodeTiles::kFew);
  constexpr FwdTileConfig kMany = sm90_decode_tile_config(kHeadDim, DecodeTiles::kMany);
  if (p.num_ctas == 0) return cudaSuccess;
  if constexpr (!same_tile(kFew, kMany)) {
    if (p.tile_n == kFew.tile_n)
      return launch_wgmma_decode<T, kHeadDim, DecodeTiles::kFew>(p, stream);
  }
  return launch_wgmma_decode<T, kHeadDim, DecodeTiles::kMany>(p, stream);
}

}  // namespace fa
