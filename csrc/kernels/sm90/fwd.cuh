// FlashAttention forward for Hopper: TMA copies, wgmma products, one persistent CTA to an SM.
//
// A CTA takes one tile after the other: tile_m rows of O of one (head, batch). In the producer
// warpgroup one thread decides which, another starts the copies; each consumer warpgroup computes
// 64 rows:
//   for n_block in blocks:  S = Q K^T;  meanwhile O += P V of the block before;
//                                  mask(S);  P = softmax weights of S
// Memory: per warpgroup num_q_stages of smem_q [64, head_dim], then num_stages of smem_k
// [tile_n, head_dim] and of smem_v [tile_n, head_dim_v], all in slabs of 64 columns with 128-byte
// swizzle (SwizzledTile).
// Barriers: a Pipeline each for K, V, Q and the tiles themselves. Three consumer warpgroups issue
// S = Q K^T in turns beyond head_dim 64, so that the products of one run while the others compute
// weights.
// Softcap, ALiBi and dropout: a kernel and a tile of their own (Sm90FwdTile).
// Rows past the end of a sequence may hold anything, also NaN: K's are masked, V's are overwritten
// with zeros in shared memory, Q's lead to rows that are not stored.
// Tiles: core/tile_config.h. Numbers: docs/performance/sm90_forward.md. Algorithm:
// FlashAttention-3, arXiv:2407.08608, algorithm 2, with the lazy rescaling of attention/softmax.h.
#pragma once
#include <cuda_runtime.h>

#include "attention/apply_mask.h"
#include "attention/steady_softmax.h"
#include "core/lse_rows.h"
#include "kernels/launch.h"
#include "kernels/sm90/fwd_layout.h"
#include "kernels/sm90/fwd_producer.h"
#include "kernels/tensor_map.h"
#include "kernels/tile_counter.h"
#include "ptx/barrier.h"
#include "ptx/global_memory.h"
#include "ptx/shared_memory.h"
#include "tile/copy_sm90.h"
#include "tile/mma_sm90.h"
#include "tile/store_sm90.h"

namespace fa {

// A warpgroup's computation: the stages of the loop as functions, and what they share.
template <class T, int kHeadDim, int kHeadDimV, Sm90FwdTile kWhich>
struct FwdConsumer {
  using Layout = FwdLayout<T, kHeadDim, kHeadDimV, kWhich>;
  using Work = typename Layout::Work;
  static constexpr FwdTileConfig kTile = Layout::kTile;
  static constexpr int kN = kTile.tile_n / 8;                        // accumulator columns of S
  static constexpr int kD = kHeadDimV / 8;                           // of O
  static constexpr int kFirstTurnBarrier = 1, kFirstOwnBarrier = 8;  // named barriers
  using Scores = AccumTile<1, kN>;
  using Weights = AFragments<1, kN / 2>;
  using Output = AccumTile<1, kD>;
  using Softmax =
      std::conditional_t<Layout::kKeepsReference, SteadySoftmax<T, 1>, OnlineSoftmax<T, 1>>;

  const FwdParams& p;
  const FwdLaunch& launch;
  uint32_t smem;
  int warpgroup, lane;  // warpgroup: among the consumers
  int warp_row;         // first row of this warp in the warpgroup's 64
  typename Layout::KvPipeline k, v;
  typename Layout::QPipeline q;
  uint32_t output_stage = 0;  // barrier of a stage of Q that O may still leave through; 0: none

  FA_DEVICE FwdConsumer(const FwdParams& params, const FwdLaunch& fwd_launch, uint32_t smem_base,
                        int consumer)
      : p(params),
        launch(fwd_launch),
        smem(smem_base),
        warpgroup(consumer),
        lane(threadIdx.x % kWarpSize),
        warp_row(threadIdx.x / kWarpSize % 4 * 16),
        k(Layout::KvPipeline::consumer(smem_base + Layout::kKBarriers)),
        v(Layout::KvPipeline::consumer(smem_base + Layout::kVBarriers)),
        q(Layout::QPipeline::consumer(Layout::q_barriers(smem_base, consumer))) {}

  FA_DEVICE void run(char* smem_ptr) {
    if (p.seqlens_q.cu_seqlens != nullptr) clear_rows_behind();
    if (Layout::kTakesTurns && warpgroup == Layout::kConsumers - 1) pass_turn_to(0);
    auto slot = Layout::WorkPipeline::consumer(smem + Layout::kWorkBarriers);
#pragma unroll 1
    while (true) {
      slot.wait_full();
      const Work& work = Layout::work(smem_ptr, slot.stage);
      if (work.tile.batch < 0) break;
      compute(work);
      release(slot);
      slot.advance();
    }
    release_output_stage();
  }

  // Everything about one tile.
  FA_DEVICE void compute(const Work& work) {
    const BlockRange blocks = work.own_blocks[warpgroup];
    Output acc_o;
    acc_o.clear();
    Softmax softmax;
    OutputRows rows;
    q.wait_full();
    if (blocks.size() > 0) {
      const int lower = blocks.begin - work.blocks.begin, upper = work.blocks.end - blocks.end;
      skip(Layout::kAscending ? lower : upper, true);
      Weights weights;
      int n_block = Layout::first_block(blocks);
      ModKinds kinds{};
      if constexpr (Layout::kScoreMod) kinds = work.mod.kinds();
      first_step(weights, softmax, work, blocks, n_block, kinds);
      with_mod_kinds<Layout::kScoreMod>(kinds, [&](auto only) {
#pragma unroll 1
        while (n_block != Layout::last_block(blocks)) {
          n_block += Layout::kStep;
          step(weights, acc_o, softmax, work, blocks, n_block, only);
        }
      });
      if (!Layout::kStoresByTma) release(q);  // the last S is complete
      v.wait_full();
      if (Layout::kAscending) clear_values_behind(work, blocks.end - 1);
      issue_pv(acc_o, weights);
      finish(rows, work, softmax);
      ptx::wgmma_wait_group<0>();
      ptx::wgmma_fence_operand(acc_o.x[0]);
      release(v);
      v.advance();
      skip(Layout::kAscending ? upper : lower, true);
    } else {
      if (work.blocks.size() > 0) {
        skip(1, false);
        skip(work.blocks.size() - 1, true);
      }
      if (Layout::kStoresByTma) {
        release_output_stage();
      } else {
        release(q);
      }
      finish(rows, work, softmax);
    }
    store(work, rows, acc_o);
    q.advance();
  }

  // Releases blocks that only other warpgroups need. Every warpgroup has a turn for all blocks of a
  // tile but one: it computes the first of its own without.
  FA_DEVICE void skip(int num_blocks, bool with_turns) {
#pragma unroll 1
    for (; num_blocks > 0; --num_blocks) {
      if (Layout::kTakesTurns && with_turns) {
        wait_for_turn();
        pass_turn_to((warpgroup + 1) % Layout::kConsumers);
      }
      k.wait_full();
      release(k);
      k.advance();
      v.wait_full();
      release(v);
      v.advance();
    }
  }

  // S = Q K^T of the first block, and its weights. No product is under way behind it.
  FA_DEVICE void first_step(Weights& weights, Softmax& softmax, const Work& work,
                            const BlockRange& blocks, int n_block, ModKinds kinds) {
    Scores acc_s;
    k.wait_full();
    issue_qk(acc_s);
    release_output_stage();
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_fence_operand(acc_s.x[0]);
    release(k);
    k.advance();
    modify_scores(acc_s, work, blocks, n_block, kinds);
    if constexpr (Layout::kKeepsReference) {
      softmax.start(acc_s, launch.scale_log2, launch.threshold);
    } else {
      softmax.start(acc_s, launch.scale_log2);
    }
    softmax.weigh_far(acc_s, launch.scale_log2);
    drop(acc_s, work, n_block, kinds);
    weights = as_a_operand<T>(acc_s);
    if (!Layout::kAscending) clear_values_behind(work, n_block);
  }

  // S and weights of a block, and meanwhile O += P V of the block before.
  template <class Kinds>
  FA_DEVICE void step(Weights& weights, Output& acc_o, Softmax& softmax, const Work& work,
                      const BlockRange& blocks, int n_block, Kinds kinds) {
    Scores acc_s;
    k.wait_full();
    if (Layout::kTakesTurns) wait_for_turn();
    issue_qk(acc_s);
    if (Layout::kTakesTurns) pass_turn_to((warpgroup + 1) % Layout::kConsumers);
    v.wait_full();
    issue_pv(acc_o, weights);
    ptx::wgmma_wait_group<1>();  // S is complete, K read
    ptx::wgmma_fence_operand(acc_s.x[0]);
    release(k);
    k.advance();
    modify_scores(acc_s, work, blocks, n_block, kinds);
    float factor[Softmax::kRows];
    const bool moved = softmax.follow(acc_s, launch.scale_log2, launch.threshold, factor);
    weigh(acc_s, softmax);
    drop(acc_s, work, n_block, kinds);
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
    warpgroup_gemm_abt<T>(acc_s, Layout::smem_q(smem, warpgroup, q.stage),
                          Layout::smem_k(smem, k.stage));
    ptx::wgmma_commit_group();
  }
  FA_DEVICE void issue_pv(Output& acc_o, const Weights& weights) const {
    ptx::wgmma_fence_operand(acc_o.x[0]);
    ptx::wgmma_fence();
    warpgroup_gemm_ab<T>(acc_o, weights, Layout::smem_v(smem, v.stage));
    ptx::wgmma_commit_group();
  }
  // Barrier of the warpgroup whose turn it is: it waits there, the one before arrives.
  FA_DEVICE void wait_for_turn() const {
    ptx::bar_sync(kFirstTurnBarrier + warpgroup, 2 * kWarpgroupSize);
  }
  FA_DEVICE void pass_turn_to(int consumer) const {
    ptx::bar_arrive(kFirstTurnBarrier + consumer, 2 * kWarpgroupSize);
  }
  template <class Pipeline>
  FA_DEVICE void release(const Pipeline& pipeline) const {
    __syncwarp();  // all lanes are done with the buffer
    if (lane == 0) pipeline.release();
  }

  FA_DEVICE int first_row(const Work& work) const {
    return work.tile.m_block * kTile.tile_m + warpgroup * Layout::kRows + warp_row;
  }
  FA_DEVICE ScoreOrigin origin(const Work& work, int n_block) const {
    return {first_row(work), n_block * kTile.tile_n};
  }
  // Raw scores become masked scores, in the units of the softmax.
  template <class Kinds>
  FA_DEVICE void modify_scores(Scores& acc_s, const Work& work, const BlockRange& blocks,
                               int n_block, Kinds kinds) const {
    if constexpr (Layout::kScoreMod) work.mod.score(acc_s, origin(work, n_block), lane, kinds);
    if (n_block >= blocks.full_end || n_block < blocks.full_begin)
      apply_mask(acc_s, work.mask, origin(work, n_block), lane);
  }
  FA_DEVICE void weigh(Scores& acc_s, Softmax& softmax) const {
    if constexpr (Layout::kSpreadsWeights) {
      softmax.template weigh_spread<8>(acc_s, launch.scale_log2, launch.zero);
    } else {
      softmax.weigh_far(acc_s, launch.scale_log2);
    }
  }
  // Weights that dropout drops become 0. Their sum, and so the LSE, has them already.
  template <class Kinds>
  FA_DEVICE void drop(Scores& acc_p, const Work& work, int n_block, Kinds kinds) const {
    if constexpr (Layout::kScoreMod) {
      if (!kinds.dropout) return;
      work.mod.template for_each_kept<1, kN>(origin(work, n_block), lane,
                                             [&](int, int n, int reg, bool kept) {
                                               if (!kept) acc_p.x[0][n][reg] = 0.f;
                                             });
    }
  }

  // Rows of V behind the sequence, whose weights are 0, become 0: 0 * NaN would be NaN. Without
  // lengths on the device they lie outside the tensor, and TMA has written zeros.
  FA_DEVICE void clear_values_behind(const Work& work, int n_block) const {
    const int num_rows = work.k_seq.seqlen - n_block * kTile.tile_n;
    if (num_rows >= kTile.tile_n) return;
    if (p.seqlens_k.cu_seqlens == nullptr && p.seqlens_k.seqused == nullptr) return;
    v.wait_full();
    constexpr int kChunks = Layout::TileV::kCols / 8;
    const auto smem_v = Layout::smem_v(smem, v.stage);
    for (int i = num_rows * kChunks + static_cast<int>(threadIdx.x % kWarpgroupSize);
         i < kTile.tile_n * kChunks; i += kWarpgroupSize)
      ptx::st_shared_v4(smem_v.chunk_address(i / kChunks, i % kChunks), uint4{0, 0, 0, 0});
    ptx::fence_proxy_async();  // before wgmma reads them
    sync_warpgroup();          // all of them are written
  }
  FA_DEVICE void sync_warpgroup() const {
    ptx::bar_sync(kFirstOwnBarrier + warpgroup, kWarpgroupSize);
  }

  // What is left to know of a lane's two rows of O before they are stored.
  struct OutputRows {
    float scale[2];
    bool exists[2], is_stored[2];
  };
  // Behind the last weights, while the last product runs; stores lse.
  FA_DEVICE void finish(OutputRows& rows, const Work& work, Softmax& softmax) const {
    softmax.finish(RowsOfWarp{});
    const float dropout_scale = Layout::kScoreMod ? 256.f / p.score.keep_threshold : 1.f;
    const int row_in_tile = warpgroup * Layout::kRows + warp_row + lane / 4;
    const int row = work.tile.m_block * kTile.tile_m + row_in_tile;
    FA_UNROLL
    for (int r = 0; r < 2; ++r) {
      rows.scale[r] = output_scale(softmax.row_sum[r]) * dropout_scale;
      rows.exists[r] = row + 8 * r < work.q_seq.seqlen;
      rows.is_stored[r] = row + 8 * r < work.q_seq.stored;
      if (lane % 4 == 0 && rows.is_stored[r])
        work.lse[row_in_tile + 8 * r] =
            rows.exists[r] ? softmax.lse(r, launch.scale_log2) : -INFINITY;
    }
  }

  FA_DEVICE void store(const Work& work, const OutputRows& rows, const Output& acc_o) {
    const int first = warpgroup * Layout::kRows;  // of this warpgroup's rows in the tile
    if constexpr (Layout::kStoresByTma) {
      output_stage = q.empty();
      if (work.tile.m_block * kTile.tile_m + first + Layout::kRows <= work.q_seq.seqlen) {
        const auto smem_o = Layout::smem_q(smem, warpgroup, q.stage);
        write_tile_swizzled<T>(smem_o, warp_row, acc_o.x[0], rows.scale, lane);
        ptx::fence_proxy_async();  // before TMA reads them
        sync_warpgroup();          // all rows are written
        if (threadIdx.x % kWarpgroupSize == 0) {
          const int batch = p.seqlens_q.cu_seqlens != nullptr ? 0 : work.tile.batch;
          const int row =
              static_cast<int>(work.q_seq.first_row) + work.tile.m_block * kTile.tile_m + first;
          store_tile_tma(smem_o, &launch.out, {0, row, work.tile.head, batch});
        }
        return;
      }
    }
    const int row = first + warp_row + lane / 4;
    FA_UNROLL
    for (int r = 0; r < 2; ++r)
      store_row_by_quad(static_cast<T*>(work.out) + (row + 8 * r) * p.out_strides.token, acc_o.x[0],
                        r, rows.scale[r], !rows.exists[r], rows.is_stored[r], p.head_dim_v, lane);
  }
  // Releases the stage of Q through which the O before left, if there is one.
  FA_DEVICE void release_output_stage() {
    if (!Layout::kStoresByTma || output_stage == 0) return;
    if (threadIdx.x % kWarpgroupSize == 0) ptx::cp_async_bulk_wait_group_read<0>();
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(output_stage);
    output_stage = 0;
  }

  // Varlen: the CTAs share the rows behind the last sequence and write out = 0, lse = -inf.
  FA_DEVICE void clear_rows_behind() const {
    constexpr int kConsumerThreads = Layout::kConsumers * kWarpgroupSize;
    const int thread = static_cast<int>(threadIdx.x) - kWarpgroupSize;
    const int first = p.seqlens_q.cu_seqlens[p.batch_size] + static_cast<int>(blockIdx.x);
    const int chunks = p.num_heads_q * (p.head_dim_v / 8);
    for (int row = first; row < p.total_q; row += gridDim.x) {
      for (int i = thread; i < chunks; i += kConsumerThreads) {
        const int head = i / (p.head_dim_v / 8), chunk = i % (p.head_dim_v / 8);
        T* out = static_cast<T*>(p.out) +
                 element_offset(0, p.out_strides.token, p.out_strides.head, 0, row, head);
        ptx::st_global_v4(out + chunk * 8, uint4{0, 0, 0, 0});
      }
      for (int head = thread; head < p.num_heads_q; head += kConsumerThreads)
        *lse_rows(p, 0, head, row) = -INFINITY;
    }
  }
};

template <class T, int kHeadDim, int kHeadDimV, Sm90FwdTile kWhich>
__global__ void __launch_bounds__(FwdLayout<T, kHeadDim, kHeadDimV, kWhich>::kThreads, 1)
    fwd_kernel(const __grid_constant__ FwdParams p, const __grid_constant__ FwdLaunch launch) {
  using Layout = FwdLayout<T, kHeadDim, kHeadDimV, kWhich>;
  extern __shared__ __align__(1024) char smem[];
  const uint32_t smem_base = ptx::cvta_to_shared(smem);
  if (threadIdx.x == 0) {
    ptx::prefetch_tensormap(&launch.q);
    ptx::prefetch_tensormap(&launch.k);
    ptx::prefetch_tensormap(&launch.v);
    Layout::init_barriers(smem_base);
  }
  __syncthreads();  // the barriers are initialised
  const int warpgroup = ptx::warpgroup_index();
  if (warpgroup == 0) {
    ptx::setmaxnreg_dec<Layout::kRegisters.producer>();
    if (threadIdx.x == 0) FwdLoader<Layout>(p, launch, smem_base).run(smem);
    if (threadIdx.x == kWarpSize) FwdScheduler<T, Layout>{p, launch}.run(smem, smem_base);
  } else {
    ptx::setmaxnreg_inc<Layout::kRegisters.consumer>();
    FwdConsumer<T, kHeadDim, kHeadDimV, kWhich>(p, launch, smem_base, warpgroup - 1).run(smem);
  }
}

// Longest first: all heads of a group run their last m_block, then all the one before. What they
// read should stay in L2 meanwhile: on an H100 (50 MB) groups of 42 MB are 12 % slower than of 21
// MB at 512 keys. Some heads do no harm at any length, as enough CTAs read the same keys then, and
// too many that do slow each other down: on an H200 16 heads are 2 to 6 % faster than 8 or 4 from
// 8k on. Otherwise head by head, so that keys are read once.
constexpr int64_t kL2GroupBytes = 38 << 20;
constexpr int kMinGroupHeads = 16;

inline TileOrder fwd_tile_order(const FwdParams& p, TileGrid grid, int tile_m) {
  if (p.score.window_right < 0) return TileOrder::of(grid, false, 1);
  const int64_t row_bytes = int64_t{2} * (p.head_dim + p.head_dim_v);  // of K and V, of Q and O
  const int64_t head_bytes = (p.seqlens_k.max_seqlen + tile_m) * row_bytes;
  const int most =
      max(kMinGroupHeads, l2_group_size(head_bytes, p.num_heads_q / p.num_heads_kv, kL2GroupBytes));
  // Groups of one size: a small last one would end with its long tiles on few SMs.
  const int pairs = grid.num_heads * grid.batch_size;
  return TileOrder::of(grid, true, ceil_div(pairs, ceil_div(pairs, most)));
}

template <class T, int kHeadDim, int kHeadDimV, Sm90FwdTile kWhich>
cudaError_t encode_tensor_maps(const FwdParams& p, FwdLaunch& launch) {
  using Layout = FwdLayout<T, kHeadDim, kHeadDimV, kWhich>;
  const HeadTensor q = head_tensor(p.q, p.q_strides, p.seqlens_q, p.total_q, p.batch_size,
                                   p.num_heads_q, p.head_dim);
  const HeadTensor k = head_tensor(p.k, p.k_strides, p.seqlens_k, p.total_k, p.batch_size,
                                   p.num_heads_kv, p.head_dim);
  const HeadTensor v = head_tensor(p.v, p.v_strides, p.seqlens_k, p.total_k, p.batch_size,
                                   p.num_heads_kv, p.head_dim_v);
  const HeadTensor out = head_tensor(p.out, p.out_strides, p.seqlens_q, p.total_q, p.batch_size,
                                     p.num_heads_q, p.head_dim_v);
  cudaError_t error = encode_tensor_map(launch.q, p.dtype, q, Layout::kRows);
  if (error == cudaSuccess) error = encode_tensor_map(launch.k, p.dtype, k, Layout::kTile.tile_n);
  if (error == cudaSuccess) error = encode_tensor_map(launch.v, p.dtype, v, Layout::kTile.tile_n);
  if (error == cudaSuccess && Layout::kStoresByTma)
    error = encode_tensor_map(launch.out, p.dtype, out, Layout::kRows);
  return error;
}

template <class T, int kHeadDim, int kHeadDimV, Sm90FwdTile kWhich>
int launch_fwd_kernel(const FwdParams& p, cudaStream_t stream) {
  using Layout = FwdLayout<T, kHeadDim, kHeadDimV, kWhich>;
  constexpr auto kKernel = fwd_kernel<T, kHeadDim, kHeadDimV, kWhich>;
  constexpr int kTileM = Layout::kTile.tile_m;
  const bool varlen = p.seqlens_q.cu_seqlens != nullptr;
  const TileGrid grid{ceil_div(p.seqlens_q.max_seqlen, kTileM), p.num_heads_q, p.batch_size};
  const int64_t num_tiles =
      varlen ? varlen_num_tiles(p.total_q, p.batch_size, kTileM, p.num_heads_q) : grid.size();
  if (num_tiles == 0 && !(varlen && p.total_q > 0)) return cudaSuccess;

  FwdLaunch launch;
  if (!varlen) launch.order = fwd_tile_order(p, grid, kTileM);
  launch.num_heads = FastDiv(p.num_heads_q);
  launch.group_size = FastDiv(p.num_heads_q / p.num_heads_kv);
  launch.num_tiles = static_cast<int>(num_tiles);
  launch.scale_log2 = Layout::kScoreMod ? 1.f : p.score.softmax_scale * kLog2e;
  launch.threshold = kMaxWeightLog2<T> / launch.scale_log2;
  launch.zero = 0.f;

  int num_ctas = 0;
  cudaError_t error = encode_tensor_maps<T, kHeadDim, kHeadDimV, kWhich>(p, launch);
  if (error == cudaSuccess) error = num_multiprocessors(num_ctas);
  if (error == cudaSuccess) error = allow_dynamic_smem<kKernel>(Layout::kSmemBytes);
  if (error == cudaSuccess) error = tile_counter(stream, launch.counter);
  if (error != cudaSuccess) return error;
  num_ctas = max(num_ctas - p.sm_margin, 1);
  if (num_tiles < num_ctas) num_ctas = max(static_cast<int>(num_tiles), 1);
  kKernel<<<num_ctas, Layout::kThreads, Layout::kSmemBytes, stream>>>(p, launch);
  return cudaGetLastError();
}

template <class T, int kHeadDim, int kHeadDimV>
int launch_fwd_tile(const FwdParams& p, cudaStream_t stream) {
  constexpr BuiltHeadDims kBuilt{kHeadDim, kHeadDimV};
  constexpr bool kOneTile = same_tile(sm90_fwd_tile_config(kBuilt, Sm90FwdTile::kLong),
                                      sm90_fwd_tile_config(kBuilt, Sm90FwdTile::kFine));
  switch (p.sm90_tile) {
    case Sm90FwdTile::kLong:
      if constexpr (!kOneTile)
        return launch_fwd_kernel<T, kHeadDim, kHeadDimV, Sm90FwdTile::kLong>(p, stream);
      [[fallthrough]];
    case Sm90FwdTile::kFine:
      return launch_fwd_kernel<T, kHeadDim, kHeadDimV, Sm90FwdTile::kFine>(p, stream);
    case Sm90FwdTile::kScoreMod:
      return launch_fwd_kernel<T, kHeadDim, kHeadDimV, Sm90FwdTile::kScoreMod>(p, stream);
  }
  return cudaErrorInvalidValue;
}

template <class T, int kHeadDim>
int launch_fwd(const FwdParams& p, cudaStream_t stream) {
  if constexpr (kHeadDim == 192) {
    if (sm90_fwd_built_head_dims(p.head_dim, p.head_dim_v).head_dim_v == 128)
      return launch_fwd_tile<T, 192, 128>(p, stream);
  }
  return launch_fwd_tile<T, kHeadDim, kHeadDim>(p, stream);
}

}  // namespace fa
