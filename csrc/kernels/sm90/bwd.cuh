// FlashAttention backward for Hopper: TMA copies, wgmma products, dQ by a warpgroup of its own.
//
// A CTA keeps 128 keys of one KV head and streams tiles of 64 queries, Q and dO, of the query heads
// that read it. Four warpgroups:
//   producer:      one thread starts all copies; a warp brings LSE and delta of the queries
//   2 consumers:   64 keys each, along the rows, so that P^T and dS^T are operands as they are:
//                    S^T = K Q^T;  P = exp(S - lse);           dV += P^T dO
//                    dP^T = V dO^T;  dS = P (dP - delta) -> smem;  dK += dS^T Q
//   dQ warpgroup:  dQ = dS K, added up in fp32 in global memory
// The consumers never wait for each other: one computes exponentials while the other multiplies.
// Algorithm: FlashAttention-2, arXiv:2307.08691, algorithm 2.
#pragma once
#include <cuda_runtime.h>

#include "attention/bwd_scores.h"
#include "core/bwd_workspace.h"
#include "core/mask.h"
#include "core/params.h"
#include "core/tile_config.h"
#include "core/tile_scheduler.h"
#include "kernels/launch.h"
#include "kernels/sm90/bwd_postprocess.cuh"
#include "kernels/sm90/bwd_tile.h"
#include "kernels/tensor_map.h"
#include "ptx/barrier.h"
#include "ptx/global_memory.h"
#include "ptx/math.h"
#include "ptx/reduction.h"
#include "ptx/shared_memory.h"
#include "ptx/stmatrix.h"
#include "ptx/warpgroup.h"
#include "tile/copy_sm90.h"
#include "tile/mma_sm90.h"
#include "tile/pipeline.h"

#ifndef BWD_REGS_DQ
#define BWD_REGS_DQ 56
#define BWD_REGS_C 216
#define BWD_REGS_P 24
#endif
#ifndef BWD_DQ_N
#define BWD_DQ_N 64
#endif
#ifndef BWD_STAGES
#define BWD_STAGES 2
#endif
#ifndef BWD_END_WAIT
#define BWD_END_WAIT 1
#endif
#ifndef BWD_MID_WAIT
#define BWD_MID_WAIT 1
#endif
#ifndef BWD_EARLY_DP
#define BWD_EARLY_DP 0
#endif

#ifndef BWD_KEPT
#define BWD_KEPT 1
#endif
#ifndef BWD_TURNS
#define BWD_TURNS 0
#endif
#ifndef BWD_LATE
#define BWD_LATE 1
#endif
#ifndef BWD_BULK
#define BWD_BULK 0
#endif
#ifdef BWD_PROF
__device__ unsigned long long prof_counts[2][8];
#define PROF_DECL unsigned prof_last, prof_n[6];
#define PROF_START prof_last = clock(); for (int i = 0; i < 6; ++i) prof_n[i] = 0;
#define PROF(i) { const unsigned t = clock(); prof_n[i] += t - prof_last; prof_last = t; }
#define PROF_END(role) if (threadIdx.x % 128 == 0) { for (int i = 0; i < 6; ++i) atomicAdd(&prof_counts[role][i], (unsigned long long)prof_n[i]); }
#define PROF_CONST
#else
#define PROF_DECL
#define PROF_START
#define PROF(i)
#define PROF_END(role)
#define PROF_CONST const
#endif

namespace fa {

// Sizes, and where things lie in shared memory.
template <class T, int kHeadDim, bool kScoreMod>
struct BwdLayout {
  static constexpr int kTileM = kBwdTileM, kTileN = kBwdTileN;
  static constexpr int kConsumers = 2, kKeys = 64;  // keys of a consumer
  static constexpr int kConsumerWarps = 4 * kConsumers;
  static constexpr int kThreads = (kConsumers + 2) * kWarpgroupSize;
  static constexpr int kProducerRegs = BWD_REGS_P, kDqRegs = BWD_REGS_DQ, kConsumerRegs = BWD_REGS_C;
  static constexpr int kStages = BWD_STAGES;
  static constexpr bool kKeptInRegs = BWD_KEPT && kHeadDim == 64 && !kScoreMod;  // K and V as operands
  static constexpr int kDqCols = kHeadDim == 128 ? 64 : kHeadDim;
  static_assert(kTileN == kConsumers * kKeys);

  using TileKept = SwizzledTile<kKeys, kHeadDim>;     // K or V of a consumer
  using TileStream = SwizzledTile<kTileM, kHeadDim>;  // Q or dO
  using TileScores = SwizzledTile<kKeys, kTileM>;     // dS of a consumer; rows are keys
  using KeptPipeline = Pipeline<1>;
  using StreamPipeline = Pipeline<kStages>;
  using ScoresPipeline = Pipeline<2>;

  static constexpr int kStatisticBytes = kTileM * static_cast<int>(sizeof(float));
  static constexpr int kK = 0, kV = kK + kConsumers * TileKept::kBytes;
  static constexpr int kQ = kV + kConsumers * TileKept::kBytes;
  static constexpr int kDout = kQ + kStages * TileStream::kBytes;
  static constexpr int kScores = kDout + kStages * TileStream::kBytes;
  // dQ on its way to global memory: buffers of 64 x kDqCols floats.
  static constexpr int kDqBytes = kBwdDqRows * kDqCols * static_cast<int>(sizeof(float));
  static constexpr int kDq = kScores + 2 * kConsumers * TileScores::kBytes;
  static constexpr int kStatistics = kDq + (BWD_BULK ? kTileM * kHeadDim * static_cast<int>(sizeof(float)) : 0);
  static constexpr int kKBarriers = kStatistics + kStages * 2 * kStatisticBytes;
  static constexpr int kVBarriers = kKBarriers + KeptPipeline::kBarrierBytes;
  static constexpr int kQBarriers = kVBarriers + KeptPipeline::kBarrierBytes;
  static constexpr int kDoutBarriers = kQBarriers + StreamPipeline::kBarrierBytes;
  static constexpr int kScoresBarriers = kDoutBarriers + StreamPipeline::kBarrierBytes;
  static constexpr int kSmemBytes = kScoresBarriers + kConsumers * ScoresPipeline::kBarrierBytes;

  static FA_DEVICE TileKept smem_k(uint32_t smem, int consumer) {
    return {smem + kK + consumer * TileKept::kBytes};
  }
  static FA_DEVICE TileKept smem_v(uint32_t smem, int consumer) {
    return {smem + kV + consumer * TileKept::kBytes};
  }
  static FA_DEVICE TileStream smem_q(uint32_t smem, int stage) {
    return {smem + kQ + stage * TileStream::kBytes};
  }
  static FA_DEVICE TileStream smem_dout(uint32_t smem, int stage) {
    return {smem + kDout + stage * TileStream::kBytes};
  }
  static FA_DEVICE TileScores smem_scores(uint32_t smem, int consumer, int stage) {
    return {smem + kScores + (consumer * 2 + stage) * TileScores::kBytes};
  }
  // -LSE in log2 units of the queries of a stage; delta stands kStatisticBytes further on.
  static FA_DEVICE uint32_t statistics(uint32_t smem, int stage) {
    return smem + kStatistics + stage * 2 * kStatisticBytes;
  }
  static FA_DEVICE uint32_t scores_barriers(uint32_t smem, int consumer) {
    return smem + kScoresBarriers + consumer * ScoresPipeline::kBarrierBytes;
  }

  static FA_DEVICE void init_barriers(uint32_t smem) {
    KeptPipeline::init(smem + kKBarriers, kConsumerWarps + 4);  // the dQ warps read K as well
    KeptPipeline::init(smem + kVBarriers, kConsumerWarps);
    StreamPipeline::init(smem + kQBarriers, kConsumerWarps, 2);  // filled with Q and statistics
    StreamPipeline::init(smem + kDoutBarriers, kConsumerWarps);
    for (int i = 0; i < kConsumers; ++i) ScoresPipeline::init(scores_barriers(smem, i), 4, 4);
    ptx::fence_mbarrier_init();
  }
};

// The one thread that starts all copies.
template <class T, int kHeadDim, bool kScoreMod>
struct BwdProducer {
  using Layout = BwdLayout<T, kHeadDim, kScoreMod>;
  using Kept = typename Layout::KeptPipeline;
  using Stream = typename Layout::StreamPipeline;

  const BwdParams& p;
  const BwdLaunch& launch;
  uint32_t smem;
  Kept k, v;
  Stream q, dout;

  FA_DEVICE BwdProducer(const BwdParams& params, const BwdLaunch& bwd_launch, uint32_t smem_base)
      : p(params),
        launch(bwd_launch),
        smem(smem_base),
        k(Kept::producer(smem_base + Layout::kKBarriers)),
        v(Kept::producer(smem_base + Layout::kVBarriers)),
        q(Stream::producer(smem_base + Layout::kQBarriers)),
        dout(Stream::producer(smem_base + Layout::kDoutBarriers)) {}

  FA_DEVICE void run() {
#pragma unroll 1
    for (int i = blockIdx.x; i < launch.num_tiles; i += gridDim.x) load(bwd_tile(p, launch, i));
  }

  FA_DEVICE void load(const BwdTile& tile) {
    int steps = tile.num_steps;
    if (steps == 0) return;
    BwdStep step = BwdStep::first(p, tile);
    const ptx::BoxOrigin kv_at{
        0, static_cast<int>(tile.k_seq.first_row) + tile.n_block * Layout::kTileN, tile.head_kv,
        p.seqlens_k.cu_seqlens != nullptr ? 0 : tile.batch};
    load_stream(q, tile, step, &launch.q, Layout::kQ);
    load_kept(k, kv_at, &launch.k, Layout::kK);
    load_kept(v, kv_at, &launch.v, Layout::kV);
#pragma unroll 1
    while (true) {
      load_stream(dout, tile, step, &launch.dout, Layout::kDout);
      if (--steps == 0) break;
      step.advance(tile.blocks);
      load_stream(q, tile, step, &launch.q, Layout::kQ);
    }
  }

  FA_DEVICE void load_kept(Kept& kept, ptx::BoxOrigin at, const void* map, int offset) {
    kept.wait_empty();
    ptx::mbarrier_arrive_expect_tx(kept.full(), Layout::kConsumers * Layout::TileKept::kBytes);
    FA_UNROLL
    for (int i = 0; i < Layout::kConsumers; ++i) {
      load_tile_tma(typename Layout::TileKept{smem + offset + i * Layout::TileKept::kBytes}, map, at,
                    kept.full(), ptx::kL2EvictFirst);
      at.row += Layout::kKeys;
    }
    kept.advance();
  }

  FA_DEVICE void load_stream(Stream& stream, const BwdTile& tile, BwdStep step, const void* map,
                             int offset) {
    stream.wait_empty();
    ptx::mbarrier_arrive_expect_tx(stream.full(), Layout::TileStream::kBytes);
    const ptx::BoxOrigin at{
        0, static_cast<int>(tile.q_seq.first_row) + step.m_block * Layout::kTileM, step.head,
        p.seqlens_q.cu_seqlens != nullptr ? 0 : tile.batch};
    load_tile_tma(
        typename Layout::TileStream{smem + offset + stream.stage * Layout::TileStream::kBytes}, map,
        at, stream.full(), ptx::kL2EvictLast);
    stream.advance();
  }
};

// The warp that brings LSE and delta.
template <class T, int kHeadDim, bool kScoreMod>
struct BwdStatistics {
  using Layout = BwdLayout<T, kHeadDim, kScoreMod>;

  const BwdParams& p;
  const BwdLaunch& launch;
  uint32_t smem;
  int lane;

  FA_DEVICE void run() const {
    auto q = Layout::StreamPipeline::producer(smem + Layout::kQBarriers);
#pragma unroll 1
    for (int i = blockIdx.x; i < launch.num_tiles; i += gridDim.x) {
      const BwdTile tile = bwd_tile(p, launch, i);
      BwdStep step = BwdStep::first(p, tile);
#pragma unroll 1
      for (int n = 0; n < tile.num_steps; ++n) {
        bring(tile, step, q);
        q.advance();
        step.advance(tile.blocks);
      }
    }
  }

  // A query past the sequence or without keys has -LSE = -inf, so that its P is 0.
  FA_DEVICE void bring(const BwdTile& tile, BwdStep step,
                       const typename Layout::StreamPipeline& q) const {
    const int64_t first = statistics_row(p, tile, step.head);
    float lse[Layout::kTileM / kWarpSize], delta[Layout::kTileM / kWarpSize];
    FA_UNROLL
    for (int i = 0; i < Layout::kTileM / kWarpSize; ++i) {
      const int row = step.m_block * Layout::kTileM + i * kWarpSize + lane;
      const bool exists = row < tile.q_seq.seqlen;
      const float x = exists ? p.lse[first + row] : -INFINITY;
      lse[i] = x == -INFINITY ? x : -x * kLog2e;
      delta[i] = exists ? p.delta[first + row] : 0.f;
    }
    q.wait_empty();
    const uint32_t to = Layout::statistics(smem, q.stage) + lane * sizeof(float);
    FA_UNROLL
    for (int i = 0; i < Layout::kTileM / kWarpSize; ++i) {
      ptx::st_shared_f32(to + i * kWarpSize * sizeof(float), lse[i]);
      ptx::st_shared_f32(to + i * kWarpSize * sizeof(float) + Layout::kStatisticBytes, delta[i]);
    }
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(q.full());
  }
};

// Two warps that clear dq_accum: those of the first tile of keys of a KV head clear the rows of its
// query heads, so that they are in L2 when the first sums come.
template <class T, int kHeadDim, bool kScoreMod>
struct BwdDqClearer {
  static constexpr int kThreads = 2 * kWarpSize, kBarrier = 8;

  const BwdParams& p;
  const BwdLaunch& launch;
  int thread;

  FA_DEVICE void run() const {
#pragma unroll 1
    for (int i = blockIdx.x; i < launch.num_tiles; i += gridDim.x) {
      const BwdTile tile = bwd_tile(p, launch, i);
      if (tile.n_block != 0) continue;
      clear(tile);
      __threadfence();
      ptx::bar_sync(kBarrier, kThreads);  // all have cleared
      if (thread == 0) ptx::red_release_gpu_add_s32(bwd_cleared(p, tile), 1);
    }
  }
  FA_DEVICE void clear(const BwdTile& tile) const {
    constexpr int kBlock = kBwdDqRows * kHeadDim;
    const int64_t first =
        bwd_dq_block_index(p, tile.batch, tile.q_seq.first_row, 0, tile.first_head) * kBlock;
    float* out = p.dq_accum + first + thread * 4;
    const int64_t next_row = static_cast<int64_t>(p.num_heads_q) * kBlock;
    const int rows = round_up(tile.q_seq.seqlen, kBwdTileM) / kBwdDqRows;
#pragma unroll 1
    for (int row = 0; row < rows; ++row, out += next_row) {
#pragma unroll 4
      for (int i = 0; i < launch.heads_per_kv * kBlock; i += 4 * kThreads)
        ptx::st_global_v4(out + i, uint4{0, 0, 0, 0});
    }
  }
};

// One arrival of a warp whose lanes are all done with a buffer.
template <class Pipeline>
FA_DEVICE void release_by_warp(const Pipeline& pipeline, int lane) {
  __syncwarp();
  if (lane == 0) pipeline.release();
}

// The warpgroup that computes dQ.
template <class T, int kHeadDim, bool kScoreMod>
struct BwdDq {
  using Layout = BwdLayout<T, kHeadDim, kScoreMod>;
  using Scores = typename Layout::ScoresPipeline;
  static constexpr int kCols = Layout::kDqCols, kColParts = kHeadDim / kCols;
  static constexpr int kParts = kColParts * (Layout::kTileM / kBwdDqRows);

  const BwdParams& p;
  const BwdLaunch& launch;
  uint32_t smem;
  int thread, lane;
  int64_t turn;  // that this thread has not said the end of

  FA_DEVICE void run() {
    PROF_START
    auto k = Layout::KeptPipeline::consumer(smem + Layout::kKBarriers);
    auto scores = Scores::consumer(smem + Layout::kScoresBarriers);
#pragma unroll 1
    for (int i = blockIdx.x; i < launch.num_tiles; i += gridDim.x) {
      const BwdTile tile = bwd_tile(p, launch, i);
      if (tile.num_steps == 0) continue;
      if (thread == 0) wait_until_cleared(tile);
      k.wait_full();
      BwdStep step = BwdStep::first(p, tile);
#pragma unroll 1
      for (int n = 0; n < tile.num_steps; ++n) {
        add(tile, step, scores);
        scores.advance();
        step.advance(tile.blocks);
      }
      release_by_warp(k, lane);
      k.advance();
    }
    PROF_END(0);
#if BWD_BULK
    if (thread == 0) {
      end_turn();
      ptx::cp_async_bulk_wait_group<0>();
    }
#endif
  }

  PROF_DECL
  FA_DEVICE void add(const BwdTile& tile, BwdStep step, Scores scores) {
    const int64_t index =
        bwd_dq_tile_index(p, tile.batch, tile.q_seq.first_row, step.m_block, step.head);
    const int64_t block = bwd_dq_block_index(p, tile.batch, tile.q_seq.first_row,
                                             step.m_block * (Layout::kTileM / kBwdDqRows), step.head);
    float* first = p.dq_accum + block * (kBwdDqRows * kHeadDim) + thread * 4;
    FA_UNROLL
    for (int part = 0; part < kParts; ++part) {
      AccumTile<1, kCols / 8> acc;
      const int row_part = part / kColParts, col_part = part % kColParts;
      float* out = first + static_cast<int64_t>(row_part) * p.num_heads_q * (kBwdDqRows * kHeadDim) + col_part * (kCols / 8) * (4 * kWarpgroupSize);
      ptx::wgmma_pin(acc.x[0]);
      FA_UNROLL
      for (int i = 0; i < Layout::kConsumers; ++i) {
        scores.barriers = Layout::scores_barriers(smem, i);
        if (part == 0) scores.wait_full();
        if (part == 0) PROF(0);
        ptx::wgmma_fence();
        const uint32_t k_part = Layout::smem_k(smem, i).base +
                                col_part * (kCols / 64) * Layout::TileKept::kSlabBytes;
        const uint32_t scores_part = Layout::smem_scores(smem, i, scores.stage).base +
                                     row_part * Layout::TileScores::kSlabBytes;
        warpgroup_gemm_atb<T>(acc, SwizzledTile<Layout::kKeys, 64>{scores_part},
                              SwizzledTile<Layout::kKeys, kCols>{k_part}, i > 0);
      }
      ptx::wgmma_commit_group();
      ptx::wgmma_wait_group<0>();
      ptx::wgmma_pin(acc.x[0]);
      PROF(1);
      if (part == kParts - 1) {
        __syncwarp();
        if (lane < Layout::kConsumers) {
          scores.barriers = Layout::scores_barriers(smem, lane);
          scores.release();
        }
      }
      if (!BWD_BULK && part == 0 && p.dq_semaphore != nullptr) wait_for_turn(tile, step, index);
      PROF(2);
#if BWD_BULK
      const uint32_t buffer = smem + Layout::kDq + part * Layout::kDqBytes;
      if (thread == 0) ptx::cp_async_bulk_wait_group_read<kParts - 1>();
      ptx::bar_sync(7, kWarpgroupSize);
      FA_UNROLL
      for (int n = 0; n < kCols / 8; ++n)
        ptx::st_shared_v4(buffer + n * (16 * kWarpgroupSize) + thread * 16,
                          uint4{__float_as_uint(acc.x[0][n][0]), __float_as_uint(acc.x[0][n][1]),
                                __float_as_uint(acc.x[0][n][2]), __float_as_uint(acc.x[0][n][3])});
      ptx::fence_proxy_async();
      ptx::bar_sync(7, kWarpgroupSize);
      if (thread == 0) {
        if (part == 0 && p.dq_semaphore != nullptr) {
          end_turn();
          wait_for_turn(tile, step, index);
          turn = index;
        }
        ptx::cp_reduce_async_bulk_add_f32(out - thread * 4, buffer,
                                          Layout::kDqBytes);
        ptx::cp_async_bulk_commit_group();
      }
#elif !defined(BWD_NO_RED)
      FA_UNROLL
      for (int n = 0; n < kCols / 8; ++n)
        ptx::red_global_add_v4_f32(out + n * (4 * kWarpgroupSize),
                                   acc.x[0][n]);
#else
      if (acc.x[0][0][0] == 12345.f) {
        FA_UNROLL
        for (int n = 0; n < kCols / 8; ++n)
          ptx::red_global_add_v4_f32(out + n * (4 * kWarpgroupSize),
                                     acc.x[0][n]);
      }
#endif
      PROF(3);
    }
#if !BWD_BULK
    if (p.dq_semaphore != nullptr) end_turn(index);
#endif
  }

  // Deterministic: tiles of keys add to a tile of queries in ascending order, each warp its part.
  // The counter says how many warps are done. CTAs take tiles in the order of n_block, so whoever
  // is waited for already runs.
  FA_DEVICE void wait_for_turn(const BwdTile& tile, BwdStep step, int64_t index) const {
    const int first =
        n_block_range(tile.mask, step.m_block, Layout::kTileM, Layout::kTileN).begin;
    const int done = (tile.n_block - first) * (BWD_BULK ? 1 : 4);
    while (lane == 0 && ptx::ld_acquire_gpu_s32(p.dq_semaphore + index) < done) {
    }
    if (!BWD_BULK) __syncwarp();
  }
  FA_DEVICE void wait_until_cleared(const BwdTile& tile) const {
    while (ptx::ld_acquire_gpu_s32(bwd_cleared(p, tile)) == 0) {
    }
    ptx::fence_proxy_async_global();  // before the additions
  }
  // Says that the additions of the last turn are done, once they are.
  FA_DEVICE void end_turn() {
    if (turn < 0) return;
    ptx::cp_async_bulk_wait_group<0>();
    __threadfence();
    ptx::red_release_gpu_add_s32(p.dq_semaphore + turn, 1);
    turn = -1;
  }
  FA_DEVICE void end_turn(int64_t index) const {
    __threadfence();  // the additions of every lane, before lane 0 says so
    __syncwarp();
    if (lane == 0) ptx::red_release_gpu_add_s32(p.dq_semaphore + index, 1);
  }
};

// A consumer warpgroup's computation: the stages of the loop as functions, and what they share.
template <class T, int kHeadDim, bool kScoreMod>
struct BwdConsumer {
  using Layout = BwdLayout<T, kHeadDim, kScoreMod>;
  static constexpr int kTileM = Layout::kTileM;
  static constexpr int kFirstOwnBarrier = 1, kFirstTurnBarrier = 3;  // named barriers
  using Scores = AccumTile<1, kTileM / 8>;               // S^T or dP^T
  using Operand = AFragments<1, kTileM / 16>;            // P^T or dS^T
  using Gradient = AccumTile<1, kHeadDim / 8>;           // dK or dV
  struct Statistics {         // LSE or delta of this lane's queries
    float2 pair[kTileM / 8];  // of column n of the scores
  };
  using Kept = AFragments<1, Layout::kKeptInRegs ? kHeadDim / 16 : 1>;  // K or V

  const BwdParams& p;
  const BwdLaunch& launch;
  uint32_t smem;
  int consumer, lane;
  int warp_row;  // first key of this warp in the consumer's 64
  typename Layout::KeptPipeline k, v;
  typename Layout::StreamPipeline q, dout;
  typename Layout::ScoresPipeline scores;
  PROF_DECL

  FA_DEVICE BwdConsumer(const BwdParams& params, const BwdLaunch& bwd_launch, uint32_t smem_base,
                        int consumer_index)
      : p(params),
        launch(bwd_launch),
        smem(smem_base),
        consumer(consumer_index),
        lane(threadIdx.x % kWarpSize),
        warp_row(threadIdx.x / kWarpSize % 4 * 16),
        k(Layout::KeptPipeline::consumer(smem_base + Layout::kKBarriers)),
        v(Layout::KeptPipeline::consumer(smem_base + Layout::kVBarriers)),
        q(Layout::StreamPipeline::consumer(smem_base + Layout::kQBarriers)),
        dout(Layout::StreamPipeline::consumer(smem_base + Layout::kDoutBarriers)),
        scores(Layout::ScoresPipeline::producer(Layout::scores_barriers(smem_base, consumer_index))) {
  }

  FA_DEVICE void run() {
    PROF_START
#if BWD_TURNS
    if (consumer == 1) ptx::bar_arrive(kFirstTurnBarrier, 2 * kWarpgroupSize);
#endif
#pragma unroll 1
    for (int i = blockIdx.x; i < launch.num_tiles; i += gridDim.x) {
      const BwdTile tile = bwd_tile(p, launch, i);
      if (tile.num_steps == 0) {
        clear_gradients(tile);
      } else {
        compute(tile);
      }
    }
    PROF_END(1);
  }

  // Everything about one tile of keys.
  FA_DEVICE void compute(const BwdTile& tile) {
    Gradient acc_dk, acc_dv;
    acc_dk.clear();
    acc_dv.clear();
    Operand dscores;
    Scores acc_s;
    BwdStep step = BwdStep::first(p, tile);
    k.wait_full();
    clear_kept_behind(tile, Layout::smem_k(smem, consumer));
    const Kept kept_k = load_kept(Layout::smem_k(smem, consumer));
    q.wait_full();
    clear_stream_behind(tile, step, Layout::smem_q(smem, q.stage));
    issue_scores(acc_s, kept_k, Layout::smem_k(smem, consumer), Layout::smem_q(smem, q.stage));
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_pin(acc_s.x[0]);
    v.wait_full();
    clear_kept_behind(tile, Layout::smem_v(smem, consumer));
    const Kept kept_v = load_kept(Layout::smem_v(smem, consumer));
    Statistics minus_lse = load_statistics(Layout::statistics(smem, q.stage));
    ptx::wgmma_pin(acc_dk.x[0]);
    ptx::wgmma_pin(acc_dv.x[0]);
    ptx::wgmma_fence();
    ptx::wgmma_commit_group();  // in place of dK
    PROF(0);
#pragma unroll 1
    for (int n = tile.num_steps - 1; n >= 0; --n)
      this->step(acc_dk, acc_dv, dscores, acc_s, kept_k, kept_v, tile, step,
                 minus_lse, n < tile.num_steps - 1, n == 0);
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_pin(acc_dk.x[0]);
    ptx::wgmma_pin(acc_dv.x[0]);
    release_previous_q();
    release_by_warp(k, lane);
    k.advance();
    v.advance();
    store(acc_dv, tile, p.dv, p.dv_strides, p.head_dim_v,
          kScoreMod ? 256.f / p.score.keep_threshold : 1.f);
    store(acc_dk, tile, p.dk, p.dk_strides, p.head_dim, p.score.softmax_scale);
  }

  // A tile of queries. S, and dK of the tile before, are under way.
  FA_DEVICE void step(Gradient& acc_dk, Gradient& acc_dv, Operand& dscores, Scores& acc_s,
                      const Kept& kept_k, const Kept& kept_v, const BwdTile& tile, BwdStep& step,
                      Statistics& minus_lse, bool has_previous, bool is_last) {
#if BWD_SHARE
    Scores& acc_dp = acc_s;
#else
    Scores acc_dp;
#endif
#if BWD_EARLY_DP
    dout.wait_full();
    clear_stream_behind(tile, step, Layout::smem_dout(smem, dout.stage));
    issue_scores(acc_dp, kept_v, Layout::smem_v(smem, consumer),
                 Layout::smem_dout(smem, dout.stage));
#endif
    const uint32_t statistics = Layout::statistics(smem, q.stage);
#if BWD_TURNS
    ptx::bar_sync(kFirstTurnBarrier + consumer, 2 * kWarpgroupSize);
    PROF(0);
#endif
    Operand probs, passed;  // of dV and of dS
    to_probs(acc_s, tile, step, minus_lse, probs, passed);
#if BWD_TURNS == 1
    ptx::bar_arrive(kFirstTurnBarrier + (consumer ^ 1), 2 * kWarpgroupSize);
#endif
    PROF(1);
#if !BWD_EARLY_DP
    dout.wait_full();
    clear_stream_behind(tile, step, Layout::smem_dout(smem, dout.stage));
    issue_scores(acc_dp, kept_v, Layout::smem_v(smem, consumer),
                 Layout::smem_dout(smem, dout.stage));
#endif
    accumulate(acc_dv, probs, Layout::smem_dout(smem, dout.stage));
#if BWD_TURNS == 2
    ptx::bar_arrive(kFirstTurnBarrier + (consumer ^ 1), 2 * kWarpgroupSize);
#endif
    const Statistics deltas = load_statistics(statistics + Layout::kStatisticBytes);
    ptx::wgmma_wait_group<BWD_MID_WAIT>();  // dP is complete, and dK of the tile before
    if (BWD_MID_WAIT == 0) ptx::wgmma_pin(acc_dv.x[0]);
    ptx::wgmma_pin(acc_dp.x[0]);
    PROF(2);
    if (has_previous) release_previous_q();
    if (is_last) release_by_warp(v, lane);
    to_dscores(dscores, kScoreMod ? passed : probs, acc_dp, deltas);
    PROF(3);
    hand_over(dscores);
#if !BWD_LATE
    announce();
#endif
    PROF(4);
    auto next = q;
    next.advance();
    if (!is_last) {
      step.advance(tile.blocks);
      next.wait_full();
      clear_stream_behind(tile, step, Layout::smem_q(smem, next.stage));
    }
    issue_scores(acc_s, kept_k, Layout::smem_k(smem, consumer), Layout::smem_q(smem, next.stage));
    accumulate(acc_dk, dscores, Layout::smem_q(smem, q.stage));
#if BWD_LATE
    announce();
#endif
    minus_lse = load_statistics(Layout::statistics(smem, next.stage));
    ptx::wgmma_wait_group<2>();  // dV is complete, dO read
    release_by_warp(dout, lane);
    dout.advance();
    ptx::wgmma_wait_group<BWD_END_WAIT>();  // S is complete
    ptx::wgmma_pin(acc_s.x[0]);
    if (BWD_END_WAIT == 0) ptx::wgmma_pin(acc_dk.x[0]);
    q = next;
    PROF(5);
  }

  FA_DEVICE void release_previous_q() const {
    auto previous = q;
    previous.stage = (q.stage + Layout::kStages - 1) % Layout::kStages;
    release_by_warp(previous, lane);
  }

  // S^T = K Q^T or dP^T = V dO^T, as a group.
  template <class TileKept, class TileStream>
  FA_DEVICE void issue_scores(Scores& acc, const Kept& kept, TileKept rows,
                              TileStream stream) const {
    ptx::wgmma_pin(acc.x[0]);
    ptx::wgmma_fence();
    if constexpr (Layout::kKeptInRegs) {
      warpgroup_gemm_abt<T>(acc, kept, stream);
    } else {
      warpgroup_gemm_abt<T>(acc, rows, stream);
    }
    ptx::wgmma_commit_group();
  }
  // dV += P^T dO or dK += dS^T Q, as a group.
  FA_DEVICE void accumulate(Gradient& acc, const Operand& operand,
                            typename Layout::TileStream stream) const {
    ptx::wgmma_pin(acc.x[0]);
    ptx::wgmma_fence();
    warpgroup_gemm_ab<T>(acc, operand, stream);
    ptx::wgmma_commit_group();
  }

  FA_DEVICE Kept load_kept(typename Layout::TileKept rows) const {
    Kept kept{};
    if constexpr (Layout::kKeptInRegs) {
      FA_UNROLL
      for (int i = 0; i < kHeadDim / 16; ++i)
        ptx::ldmatrix_x4(kept.x[0][i],
                         rows.chunk_address(warp_row + lane % 16, 2 * i + lane / 16));
    }
    return kept;
  }

  // They are loaded ahead of the wait for a product: shared memory answers late while products read
  // it.
  FA_DEVICE Statistics load_statistics(uint32_t from) const {
    Statistics s;
    FA_UNROLL
    for (int n = 0; n < kTileM / 8; ++n)
      s.pair[n] = ptx::ld_shared_v2_f32(from + (n * 8 + lane % 4 * 2) * sizeof(float));
    return s;
  }

  // Scores become P. passed: what dS needs of it if there are score modifications.
  FA_DEVICE void to_probs(Scores acc, const BwdTile& tile, BwdStep step, const Statistics& minus_lse,
                          Operand& probs, Operand& passed) const {
    const TransposedOrigin origin{first_key(tile), step.m_block * kTileM};
    const bool border =
        step.m_block < tile.blocks.full_begin || step.m_block >= tile.blocks.full_end;
    if constexpr (kScoreMod) {
      const TransposedScoreMod mod{
          ScoreMod::of(p.score, tile.mask, tile.batch, step.head, p.num_heads_q)};
      mod.score(acc, origin, lane);
      if (border) apply_mask(acc, tile.mask, origin, lane);
      FA_UNROLL
      for (int k = 0; k < kTileM / 16; ++k)
        modify_part(acc, mod, origin, k, minus_lse, probs, passed);
    } else {
      if (border) apply_mask(acc, tile.mask, origin, lane);
      to_weights(acc, launch.scale_log2, minus_lse, 0);
      probs = as_a_operand<T>(acc);
    }
  }
  // Scores become exp(score - lse).
  template <int kN>
  FA_DEVICE void to_weights(AccumTile<1, kN>& acc, float scale_log2, const Statistics& minus_lse,
                            int first_column) const {
    FA_UNROLL
    for (int n = 0; n < kN; ++n) {
      const float2 pair = minus_lse.pair[first_column + n];
      FA_UNROLL
      for (int i = 0; i < 4; ++i) {
        float& x = acc.x[0][n][i];
        x = ptx::ex2_approx_ftz(fmaf(x, scale_log2, i % 2 == 0 ? pair.x : pair.y));
      }
    }
  }
  // Queries [16 k, 16 k + 16) with softcap, ALiBi and dropout. passed is P (1 - tanh^2), with the
  // sign of minus where dropped: it is never negative otherwise.
  FA_DEVICE void modify_part(const Scores& acc, const TransposedScoreMod& mod,
                             TransposedOrigin origin, int k, const Statistics& minus_lse, Operand& probs,
                             Operand& passed) const {
    origin.first_query += 16 * k;
    AccumTile<1, 2> scores;
    FA_UNROLL
    for (int i = 0; i < 8; ++i) scores.x[0][i / 4][i % 4] = acc.x[0][2 * k + i / 4][i % 4];
    AccumTile<1, 2> weights = scores;
    to_weights(weights, 1.f, minus_lse, 2 * k);
    AccumTile<1, 2> others = weights;
    if (mod.mod.outer_scale != 0.f) mod.multiply_by_derivative(others, scores, origin, lane);
    if (p.score.keep_threshold < 256) {
      mod.for_each_kept(weights, origin, lane, [&](int m, int n, int i, bool kept) {
        weights.x[m][n][i] = kept ? weights.x[m][n][i] : 0.f;
        others.x[m][n][i] = kept ? others.x[m][n][i] : -others.x[m][n][i];
      });
    }
    const AFragments<1, 1> w = as_a_operand<T>(weights), o = as_a_operand<T>(others);
    FA_UNROLL
    for (int i = 0; i < 4; ++i) {
      probs.x[0][k][i] = w.x[0][0][i];
      passed.x[0][k][i] = o.x[0][0][i];
    }
  }

  FA_DEVICE void to_dscores(Operand& dscores, const Operand& probs, const Scores& acc,
                            const Statistics& deltas) const {
    const float factor = kScoreMod ? 256.f / p.score.keep_threshold : 1.f;
    FA_UNROLL
    for (int n = 0; n < kTileM / 8; ++n) {
      const float2 delta = deltas.pair[n];
      FA_UNROLL
      for (int h = 0; h < 2; ++h) {
        const int i = n % 2 * 2 + h;
        dscores.x[0][n / 2][i] =
            dscore_pair(probs.x[0][n / 2][i],
                        {acc.x[0][n][2 * h], acc.x[0][n][2 * h + 1]}, delta, factor);
      }
    }
  }
  // dS of two queries and one key. factor: of dropout.
  static FA_DEVICE uint32_t dscore_pair(uint32_t probs, float2 dp, float2 delta, float factor) {
    if constexpr (kScoreMod) {
      // The sign bits, as a dropped P may be -0.
      dp.x = probs & 0x8000u ? 0.f : dp.x * factor;
      dp.y = probs & 0x80000000u ? 0.f : dp.y * factor;
      probs &= 0x7FFF7FFFu;
    }
    const float2 prob = unpack<T>(probs);
    return pack<T>(prob.x * (dp.x - delta.x), prob.y * (dp.y - delta.y));
  }

  // dS to shared memory, for the dQ warpgroup.
  FA_DEVICE void hand_over(const Operand& dscores) {
    scores.wait_empty();
    const uint32_t at = Layout::smem_scores(smem, consumer, scores.stage)
                            .chunk_address(warp_row + lane % 16, lane / 16);
    FA_UNROLL
    for (int i = 0; i < kTileM / 16; ++i)
      ptx::stmatrix_x4((at ^ (i % 4 * 32)) + i / 4 * Layout::TileScores::kSlabBytes,
                       dscores.x[0][i]);
  }
  FA_DEVICE void announce() {
    ptx::fence_proxy_async();
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(scores.full());
    scores.advance();
  }

  // Rows of a tile past the sequence become 0, as their weights are: 0 * NaN would be NaN. Without
  // lengths on the device they lie outside the tensor, and TMA has written zeros. Every consumer
  // clears what it reads.
  template <class Tile>
  FA_DEVICE void clear_rows_behind(Tile rows, int num_rows) const {
    constexpr int kChunks = kHeadDim / 8;
#pragma unroll 1
    for (int i = max(num_rows, 0) * kChunks + static_cast<int>(threadIdx.x % kWarpgroupSize);
         i < Tile::kRows * kChunks; i += kWarpgroupSize)
      ptx::st_shared_v4(rows.chunk_address(i / kChunks, i % kChunks), uint4{0, 0, 0, 0});
    ptx::fence_proxy_async();
    ptx::bar_sync(kFirstOwnBarrier + consumer, kWarpgroupSize);
  }
  FA_DEVICE void clear_kept_behind(const BwdTile& tile, typename Layout::TileKept rows) const {
    const int num_rows =
        tile.k_seq.seqlen - tile.n_block * Layout::kTileN - consumer * Layout::kKeys;
    if (num_rows < Layout::kKeys && has_lengths(p.seqlens_k)) clear_rows_behind(rows, num_rows);
  }
  FA_DEVICE void clear_stream_behind(const BwdTile& tile, BwdStep step,
                                     typename Layout::TileStream rows) const {
    const int num_rows = tile.q_seq.seqlen - step.m_block * kTileM;
    if (num_rows < kTileM && has_lengths(p.seqlens_q)) clear_rows_behind(rows, num_rows);
  }
  static FA_DEVICE bool has_lengths(const SeqlenArgs& seqlens) {
    return seqlens.cu_seqlens != nullptr || seqlens.seqused != nullptr;
  }

  FA_DEVICE int first_key(const BwdTile& tile) const {
    return tile.n_block * Layout::kTileN + consumer * Layout::kKeys + warp_row;
  }

  // dK or dV as 16-byte chunks, four of a row by the lanes of a quad.
  FA_DEVICE void store(const Gradient& acc, const BwdTile& tile, void* tensor,
                       const Strides& strides, int num_cols, float scale) const {
    FA_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int key = first_key(tile) + r * 8 + lane / 4;
      const bool exists = key < tile.k_seq.seqlen, stored = key < tile.k_seq.stored;
      T* out = static_cast<T*>(tensor) + element_offset(strides.batch, strides.token, strides.head,
                                                        tile.batch, tile.k_seq.first_row + key,
                                                        tile.head_kv);
      FA_UNROLL
      for (int d = 0; d < kHeadDim / 8; d += 4) {
        uint32_t pairs[4];
        FA_UNROLL
        for (int i = 0; i < 4; ++i) {
          const float* x = &acc.x[0][d + i][r * 2];
          pairs[i] = exists ? pack<T>(x[0] * scale, x[1] * scale) : 0u;
        }
        transpose_in_quad(pairs, lane);
        const int chunk = d + lane % 4;
        if (stored && chunk * 8 < num_cols)
          ptx::st_global_v4(out + chunk * 8, uint4{pairs[0], pairs[1], pairs[2], pairs[3]});
      }
    }
  }

  // dK = dV = 0 for keys that no query sees. The rest behind the last sequence may have more tiles
  // than the grid, so a tile stands for every num_n_blocks-th.
  FA_DEVICE void clear_gradients(const BwdTile& tile) const {
    const int thread = consumer * kWarpgroupSize + threadIdx.x % kWarpgroupSize;
    constexpr int kConsumerThreads = Layout::kConsumers * kWarpgroupSize;
    for (int first = tile.n_block * Layout::kTileN; first < tile.k_seq.stored;
         first += launch.order.grid.num_m_blocks * Layout::kTileN) {
      const Range rows{first, min(first + Layout::kTileN, tile.k_seq.stored)};
      const auto at = [&](void* tensor, const Strides& strides) {
        return static_cast<T*>(tensor) + element_offset(strides.batch, strides.token, strides.head,
                                                        tile.batch, tile.k_seq.first_row,
                                                        tile.head_kv);
      };
      clear_rows<kConsumerThreads>(at(p.dk, p.dk_strides), p.dk_strides.token, rows, p.head_dim,
                                   thread);
      clear_rows<kConsumerThreads>(at(p.dv, p.dv_strides), p.dv_strides.token, rows, p.head_dim_v,
                                   thread);
    }
  }
};

template <class T, int kHeadDim, bool kScoreMod>
__global__ void __launch_bounds__(BwdLayout<T, kHeadDim, kScoreMod>::kThreads, 1)
    bwd_kernel(const __grid_constant__ BwdParams p, const __grid_constant__ BwdLaunch launch) {
  using Layout = BwdLayout<T, kHeadDim, kScoreMod>;
  extern __shared__ __align__(1024) char smem[];
  const uint32_t smem_base = ptx::cvta_to_shared(smem);
  if (threadIdx.x == 0) {
    ptx::prefetch_tensormap(&launch.q);
    ptx::prefetch_tensormap(&launch.k);
    ptx::prefetch_tensormap(&launch.v);
    ptx::prefetch_tensormap(&launch.dout);
    Layout::init_barriers(smem_base);
  }
  __syncthreads();  // the barriers are initialised
  const int warpgroup = ptx::warpgroup_index();
  const int lane = threadIdx.x % kWarpSize;
  if (warpgroup == 0) {
    ptx::setmaxnreg_dec<Layout::kProducerRegs>();
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / kWarpSize, 0);
    if (warp == 0 && lane == 0) BwdProducer<T, kHeadDim, kScoreMod>(p, launch, smem_base).run();
    if (warp == 1) BwdStatistics<T, kHeadDim, kScoreMod>{p, launch, smem_base, lane}.run();
    if (warp >= 2)
      BwdDqClearer<T, kHeadDim, kScoreMod>{p, launch, static_cast<int>(threadIdx.x) - 2 * kWarpSize}
          .run();
  } else if (warpgroup == 1) {
    ptx::setmaxnreg_dec<Layout::kDqRegs>();
    BwdDq<T, kHeadDim, kScoreMod>{p, launch, smem_base, static_cast<int>(threadIdx.x) - kWarpgroupSize, lane, -1}
        .run();
  } else {
    ptx::setmaxnreg_inc<Layout::kConsumerRegs>();
    BwdConsumer<T, kHeadDim, kScoreMod>(p, launch, smem_base, warpgroup - 2).run();
  }
}

// KV heads whose Q, dO and dQ fill a share of the L2 cache run at the same time.
constexpr int64_t kBwdL2GroupBytes = 16 << 20;

// Rows of a side as TMA sees them: varlen tensors are one batch entry.
inline HeadTensor bwd_head_tensor(const void* data, const Strides& strides,
                                  const SeqlenArgs& seqlens, int total, int batch_size) {
  const bool varlen = seqlens.cu_seqlens != nullptr;
  return {data, strides, varlen ? 1 : batch_size, varlen ? total : seqlens.max_seqlen, 0, 0};
}

template <class T, int kHeadDim, bool kScoreMod>
cudaError_t encode_bwd_tensor_maps(const BwdParams& p, BwdLaunch& launch) {
  using Layout = BwdLayout<T, kHeadDim, kScoreMod>;
  HeadTensor q = bwd_head_tensor(p.q, p.q_strides, p.seqlens_q, p.total_q, p.batch_size);
  HeadTensor dout = bwd_head_tensor(p.dout, p.dout_strides, p.seqlens_q, p.total_q, p.batch_size);
  HeadTensor k = bwd_head_tensor(p.k, p.k_strides, p.seqlens_k, p.total_k, p.batch_size);
  HeadTensor v = bwd_head_tensor(p.v, p.v_strides, p.seqlens_k, p.total_k, p.batch_size);
  q.num_heads = dout.num_heads = p.num_heads_q;
  k.num_heads = v.num_heads = p.num_heads_kv;
  q.head_dim = k.head_dim = p.head_dim;
  dout.head_dim = v.head_dim = p.head_dim_v;
  cudaError_t error = encode_tensor_map(launch.q, p.dtype, q, Layout::kTileM);
  if (error == cudaSuccess) error = encode_tensor_map(launch.dout, p.dtype, dout, Layout::kTileM);
  if (error == cudaSuccess) error = encode_tensor_map(launch.k, p.dtype, k, Layout::kKeys);
  if (error == cudaSuccess) error = encode_tensor_map(launch.v, p.dtype, v, Layout::kKeys);
  return error;
}

template <class T, int kHeadDim, bool kScoreMod>
int launch_bwd_kernel(const BwdParams& p, int num_sequences, cudaStream_t stream) {
  using Layout = BwdLayout<T, kHeadDim, kScoreMod>;
  constexpr auto kKernel = bwd_kernel<T, kHeadDim, kScoreMod>;
  const TileGrid grid{max(1, ceil_div(p.seqlens_k.max_seqlen, Layout::kTileN)), p.num_heads_kv,
                      num_sequences};
  if (grid.size() == 0) return cudaSuccess;
  const int heads_per_kv = p.num_heads_q / p.num_heads_kv;
  const int64_t stream_bytes = int64_t{heads_per_kv} * p.seqlens_q.max_seqlen *
                               (2 * (p.head_dim + p.head_dim_v) + 4 * kHeadDim);
  int64_t group_bytes = kBwdL2GroupBytes;
#ifdef BWD_EXPERIMENT
  if (getenv("BWD_L2")) group_bytes = int64_t{atoi(getenv("BWD_L2"))} << 20;
#endif
  BwdLaunch launch;
  launch.order = TileOrder::of(grid, false, l2_group_size(stream_bytes, 1, group_bytes));
  launch.num_tiles = static_cast<int>(grid.size());
  launch.heads_per_kv = heads_per_kv;
  launch.scale_log2 = p.score.softmax_scale * kLog2e;
  int num_ctas = 0;
  cudaError_t error = encode_bwd_tensor_maps<T, kHeadDim, kScoreMod>(p, launch);
  if (error == cudaSuccess) error = num_multiprocessors(num_ctas);
  if (error == cudaSuccess) error = allow_dynamic_smem<kKernel>(Layout::kSmemBytes);
  if (error != cudaSuccess) return error;
  // Equal tiles are dealt out; others go to whichever SM is free.
  bool equal = mask_kind(p.score.window_left, p.score.window_right) == MaskKind::kFull &&
               num_sequences == p.batch_size;
#ifdef BWD_EXPERIMENT
  if (getenv("BWD_PERSIST")) equal = atoi(getenv("BWD_PERSIST"));
#endif
  num_ctas = equal ? min(launch.num_tiles, num_ctas) : launch.num_tiles;
  kKernel<<<num_ctas, Layout::kThreads, Layout::kSmemBytes, stream>>>(p, launch);
  return cudaGetLastError();
}

template <class T, int kHeadDim>
int launch_bwd(const BwdParams& p, cudaStream_t stream) {
  // Varlen tensors have the rest behind the last sequence as well.
  const int num_sequences =
      p.batch_size + (p.seqlens_q.cu_seqlens || p.seqlens_k.cu_seqlens ? 1 : 0);
  const int error = has_score_mod(p.score)
                        ? launch_bwd_kernel<T, kHeadDim, true>(p, num_sequences, stream)
                        : launch_bwd_kernel<T, kHeadDim, false>(p, num_sequences, stream);
  return error != cudaSuccess ? error
                              : launch_bwd_postprocess<T, kHeadDim>(p, num_sequences, stream);
}

}  // namespace fa
