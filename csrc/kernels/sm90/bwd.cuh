// FlashAttention backward for Hopper: TMA copies, wgmma products, dQ by a warpgroup of its own.
//
// Head_dim 64 to 128; above: bwd_pair.cuh. A CTA keeps 128 keys of one KV head and streams tiles of
// 64 queries, Q and dO, of the query heads that read it, so that dK and dV are complete in one
// place; or, where that gives too few CTAs, of a part of these heads (head_splits), and dK and dV
// are added up in fp32 (shared_gradients.cuh). Four warpgroups:
//   producer      one thread starts all copies, a warp brings LSE and delta   bwd_producer.h
//                 two warps add dQ up in global memory                        bwd_dq.h
//   2 consumers   64 keys each, along the rows, so that P^T and dS^T are operands as they are:
//                   S^T = K Q^T;    P = exp(S - lse);             dV += P^T dO
//                   dP^T = V dO^T;  dS = P (dP - delta) -> smem;  dK += dS^T Q
//   dQ            dQ = dS K, in fp32                                          bwd_dq.h
// No consumer waits for the other's dS, so one computes while the other multiplies.
// Memory, order of the products: bwd_layout.h. Barriers: a Pipeline each for K, V, Q with the
// statistics, dO, and each consumer's dS.
// Rows past the end of a sequence may hold anything, also NaN: scores are masked, and the rows
// overwritten with zeros in shared memory (bwd_elements.h).
// delta comes from bwd_preprocess; bwd_postprocess rounds dQ, or, with BwdKind::kCompleteDq, who is
// last to add. Tiles: core/tile_config.h. Numbers: docs/performance/sm90_backward.md.
// Algorithm: FlashAttention-2, arXiv:2307.08691, algorithm 2.
#pragma once
#include <cuda_runtime.h>

#include <climits>
#include <type_traits>

#include "kernels/launch.h"
#include "kernels/sm90/bwd_dq.h"
#include "kernels/sm90/bwd_elements.h"
#include "kernels/sm90/bwd_layout.h"
#include "kernels/sm90/bwd_pair.cuh"
#include "kernels/sm90/bwd_postprocess.cuh"
#include "kernels/sm90/bwd_producer.h"
#include "kernels/tensor_map.h"
#include "ptx/ldmatrix.h"
#include "ptx/opaque.h"
#include "ptx/stmatrix.h"
#include "ptx/warpgroup.h"

namespace fa {

// A consumer warpgroup's computation: the stages of the loop as functions, and what they share.
// Kinds of score modifications: NoMods, one alone, or ModKinds, any.
template <class T, int kHeadDim, class Kinds>
struct BwdConsumer {
  static constexpr bool kScoreMod = !std::is_same_v<Kinds, NoMods>;
  using Layout = BwdLayout<T, kHeadDim, kScoreMod>;
  static constexpr int kTileM = Layout::kTileM;
  static constexpr int kFirstOwnBarrier = 1, kFirstTurnBarrier = 3;  // named barriers
  using Scores = AccumTile<1, kTileM / 8>;                           // S^T or dP^T
  using Operand = AFragments<1, kTileM / 16>;                        // P^T or dS^T
  using Gradient = AccumTile<1, kHeadDim / 8>;                       // dK or dV
  using Statistic = BwdStatistic<kTileM / 8>;
  using Kept = AFragments<1, Layout::kKeptInRegs ? kHeadDim / 16 : 1>;  // K or V

  const BwdParams& p;
  const BwdLaunch& launch;
  uint32_t smem;
  int consumer, lane;
  int warp_row;  // first key of this warp in the consumer's 64
  typename Layout::StreamPipeline q;
  typename Layout::ScoresPipeline scores;

  FA_DEVICE BwdConsumer(const BwdParams& params, const BwdLaunch& bwd_launch, uint32_t smem_base,
                        int consumer_index)
      : p(params),
        launch(bwd_launch),
        smem(smem_base),
        consumer(consumer_index),
        lane(threadIdx.x % kWarpSize),
        warp_row(threadIdx.x / kWarpSize % 4 * 16),
        q(Layout::StreamPipeline::consumer(smem_base + Layout::kQBarriers)),
        scores(
            Layout::ScoresPipeline::producer(Layout::scores_barriers(smem_base, consumer_index))) {}

  FA_DEVICE void run(const BwdTile& tile) {
    if (tile.num_steps == 0) {
      clear_gradients<T, Layout::kConsumers * kWarpgroupSize>(
          p, launch, tile, consumer * kWarpgroupSize + threadIdx.x % kWarpgroupSize);
    } else {
      if (Layout::kTakesTurns && consumer == 1) pass_turn_to(0);
      compute(tile);
    }
  }

  FA_DEVICE void compute(const BwdTile& tile) {
    Gradient acc_dk, acc_dv;
    acc_dk.clear();
    acc_dv.clear();
    Scores acc_s;
    BwdStep step = BwdStep::first(launch, tile);
    Layout::KeptPipeline::consumer(smem + Layout::kKBarriers).wait_full();
    clear_kept_behind(tile, smem_k());
    const Kept kept_k = load_kept(smem_k());
    wait_for_q(q, tile, step);
    issue_scores(acc_s, kept_k, smem_k(), Layout::smem_q(smem, q.stage));
    Statistic minus_lse = load_statistic<kTileM / 8>(Layout::statistics(smem, q.stage), lane);
    Layout::KeptPipeline::consumer(smem + Layout::kVBarriers).wait_full();
    clear_kept_behind(tile, smem_v());
    const Kept kept_v = load_kept(smem_v());
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_pin(acc_s.x[0]);
#pragma unroll 1
    for (int steps_left = tile.num_steps - 1; steps_left >= 0; --steps_left) {
      // S of this step is complete.
      Scores acc_dp;
      if (Layout::kHasRoom) issue_dp(acc_dp, kept_v, tile, step);
      Operand probs, passed;  // of dV and of dS
      if (Layout::kTakesTurns) wait_for_turn();
      to_probs(acc_s, tile, step, minus_lse, probs, passed);
      if (Layout::kTakesTurns) pass_turn_to(consumer ^ 1);
      if (!Layout::kHasRoom) issue_dp(acc_dp, kept_v, tile, step);
      accumulate(acc_dv, probs, Layout::smem_dout(smem, q.stage));
      const Statistic deltas = load_statistic<kTileM / 8>(
          Layout::statistics(smem, q.stage) + Layout::kStatisticBytes, lane);
      ptx::wgmma_wait_group<Layout::kHasRoom ? 1 : 0>();  // dP is complete
      ptx::wgmma_pin(acc_dp.x[0]);
      if (!Layout::kHasRoom) release_dout(acc_dv);
      Operand dscores = kScoreMod ? passed : probs;
      FA_UNROLL
      for (int k = 0; k < kTileM / 16; ++k)
        to_dscores<T>(dscores.x[0][k], score_part(acc_dp, k), deltas.part(k), kinds(),
                      drop_factor(p.score));

      // The next S goes ahead of dK. Behind the last step it is that of some old tile, which nobody
      // reads: products of a group are not to be skipped by a branch. Where dS is stored behind the
      // branch, it keeps the compiler from waiting for room for dS before it computes it.
      if (Layout::kHasRoom) {
        pin(dscores);
        store_dscores(dscores);  // behind the wait for Q: 7 % slower
      }
      auto next = q;
      next.advance();
      if (steps_left > 0) {
        step.advance(tile.blocks);
        wait_for_q(next, tile, step);
      }
      if (!Layout::kHasRoom) store_dscores(dscores);
      issue_scores(acc_s, kept_k, smem_k(), Layout::smem_q(smem, next.stage));
      accumulate(acc_dk, dscores, Layout::smem_q(smem, q.stage));
      hand_over_dscores();
      minus_lse = load_statistic<kTileM / 8>(Layout::statistics(smem, next.stage), lane);
      if (Layout::kHasRoom) {
        ptx::wgmma_wait_group<2>();  // dV is complete
        release_dout(acc_dv);
      }
      ptx::wgmma_wait_group<0>();
      ptx::wgmma_pin(acc_s.x[0]);
      ptx::wgmma_pin(acc_dk.x[0]);
      release_by_warp(q, lane);
      q = next;
    }
    store(acc_dk, acc_dv);
  }

  FA_DEVICE void store(const Gradient& acc_dk, const Gradient& acc_dv) const {
    // Found anew: the tile's numbers would fill registers throughout the loop.
    const BwdTile stored = bwd_tile(p, launch, ptx::opaque(blockIdx.x));
    in_order_of_splits<Layout::kConsumers * 4>(p, stored, lane, [&] {
      store_gradient<T>(p, acc_dv, stored, first_key(stored), dv_rows(p), 0,
                        kScoreMod ? 256.f / p.score.keep_threshold : 1.f, lane);
      store_gradient<T>(p, acc_dk, stored, first_key(stored), dk_rows(p), 0, p.score.softmax_scale,
                        lane);
    });
  }

  FA_DEVICE Kinds kinds() const {
    if constexpr (std::is_same_v<Kinds, ModKinds>) {
      return mod_kinds(p.score);
    } else {
      return {};
    }
  }
  FA_DEVICE typename Layout::TileKept smem_k() const { return Layout::smem_k(smem, consumer); }
  FA_DEVICE typename Layout::TileKept smem_v() const { return Layout::smem_v(smem, consumer); }

  // dO of a step lies in the stage that Q does.
  FA_DEVICE typename Layout::StreamPipeline dout() const {
    return {smem + Layout::kDoutBarriers, q.stage, q.parity};
  }
  FA_DEVICE void wait_for_q(const typename Layout::StreamPipeline& queries, const BwdTile& tile,
                            BwdStep step) const {
    queries.wait_full();
    clear_stream_behind(tile, step, Layout::smem_q(smem, queries.stage));
  }
  FA_DEVICE void issue_dp(Scores& acc, const Kept& kept, const BwdTile& tile, BwdStep step) const {
    dout().wait_full();
    clear_stream_behind(tile, step, Layout::smem_dout(smem, q.stage));
    issue_scores(acc, kept, smem_v(), Layout::smem_dout(smem, q.stage));
  }
  FA_DEVICE void release_dout(Gradient& acc_dv) {
    ptx::wgmma_pin(acc_dv.x[0]);
    release_by_warp(dout(), lane);
  }
  // Exponentials of one consumer at a time.
  FA_DEVICE void wait_for_turn() const {
    ptx::bar_sync(kFirstTurnBarrier + consumer, 2 * kWarpgroupSize);
  }
  FA_DEVICE void pass_turn_to(int other) const {
    ptx::bar_arrive(kFirstTurnBarrier + other, 2 * kWarpgroupSize);
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

  FA_DEVICE static void pin(Operand& operand) {
    FA_UNROLL
    for (int k = 0; k < kTileM / 16; ++k) ptx::pin(operand.x[0][k]);
  }

  FA_DEVICE Kept load_kept(typename Layout::TileKept rows) const {
    Kept kept{};
    if constexpr (Layout::kKeptInRegs) {
      FA_UNROLL
      for (int i = 0; i < kHeadDim / 16; ++i)
        ptx::ldmatrix_x4(kept.x[0][i], rows.chunk_address(warp_row + lane % 16, 2 * i + lane / 16));
    }
    return kept;
  }

  // Scores become P. passed: what dS needs of it if there are score modifications.
  FA_DEVICE void to_probs(Scores acc, const BwdTile& tile, BwdStep step, const Statistic& minus_lse,
                          Operand& probs, Operand& passed) const {
    const TransposedOrigin origin{first_key(tile), step.m_block * kTileM};
    const bool border =
        step.m_block < tile.blocks.full_begin || step.m_block >= tile.blocks.full_end;
    if constexpr (kScoreMod) {
      const TransposedScoreMod mod{
          ScoreMod::of(p.score, tile.mask, tile.batch, step.head, p.num_heads_q)};
      mod.score(acc, origin, lane, kinds());
      if (border) apply_mask(acc, tile.mask, origin, lane);
      FA_UNROLL
      for (int k = 0; k < kTileM / 16; ++k)
        modify_weights<T>(score_part(acc, k), mod, kinds(),
                          {origin.first_key, origin.first_query + 16 * k}, minus_lse.part(k), lane,
                          probs.x[0][k], passed.x[0][k]);
    } else {
      if (border) apply_mask(acc, tile.mask, origin, lane);
      to_weights(acc, launch.scale_log2, minus_lse);
      probs = as_a_operand<T>(acc);
    }
  }
  // dS to shared memory, and, once that has happened, word of it to the dQ warpgroup.
  FA_DEVICE void store_dscores(const Operand& dscores) const {
    scores.wait_empty();
    const uint32_t at = Layout::smem_scores(smem, consumer, scores.stage)
                            .chunk_address(warp_row + lane % 16, lane / 16);
    FA_UNROLL
    for (int i = 0; i < kTileM / 16; ++i) ptx::stmatrix_x4(at ^ (i * 32), dscores.x[0][i]);
  }
  FA_DEVICE void hand_over_dscores() {
    ptx::fence_proxy_async();
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(scores.full());
    scores.advance();
  }

  FA_DEVICE void clear_kept_behind(const BwdTile& tile, typename Layout::TileKept rows) const {
    clear_rows_behind(rows, tile.k_seq.seqlen - first_key(tile) + warp_row, p.seqlens_k,
                      kFirstOwnBarrier + consumer);
  }
  FA_DEVICE void clear_stream_behind(const BwdTile& tile, BwdStep step,
                                     typename Layout::TileStream rows) const {
    clear_rows_behind(rows, tile.q_seq.seqlen - step.m_block * kTileM, p.seqlens_q,
                      kFirstOwnBarrier + consumer);
  }

  FA_DEVICE int first_key(const BwdTile& tile) const {
    return tile.n_block * Layout::kTileN + consumer * Layout::kKeys + warp_row;
  }
};

// The plain kernel's consumer of head_dim 64. Products run under every computation: dK of the step
// before and dP under P, S of the next step and dV under dS; none is waited for right behind its
// issue. V is an operand in registers; dP's sums start at -delta.
template <class T, int kHeadDim>
struct BwdPipelinedConsumer : BwdConsumer<T, kHeadDim, NoMods> {
  using Base = BwdConsumer<T, kHeadDim, NoMods>;
  using Base::consumer, Base::kTileM, Base::lane, Base::launch, Base::p, Base::q, Base::scores,
      Base::smem, Base::smem_k, Base::warp_row;
  using typename Base::Gradient;
  using typename Base::Kept;  // V
  using typename Base::Layout;
  using typename Base::Operand;
  using typename Base::Scores;
  using typename Base::Statistic;

  // Of this lane, behind where a stage begins; held, as finding them costs 12 instructions a step.
  uint32_t statistics_at;  // its first query's
  uint32_t scores_at;      // dS

  FA_DEVICE BwdPipelinedConsumer(const BwdParams& params, const BwdLaunch& bwd_launch,
                                 uint32_t smem_base, int consumer_index)
      : Base(params, bwd_launch, smem_base, consumer_index),
        statistics_at(ptx::opaque(lane % 4 * 8)),
        scores_at(ptx::opaque(Layout::smem_scores(smem, consumer, 0)
                                  .chunk_address(warp_row + lane % 16, lane / 16))) {}

  FA_DEVICE void run(const BwdTile& tile) {
    if (tile.num_steps == 0) {
      Base::run(tile);
    } else {
      compute(tile);
    }
  }

  FA_DEVICE void compute(const BwdTile& tile) {
    Gradient acc_dk, acc_dv;
    acc_dk.clear();
    acc_dv.clear();
    BwdStep step = BwdStep::first(launch, tile);
    Scores acc_s, acc_dp;
    Layout::KeptPipeline::consumer(smem + Layout::kKBarriers).wait_full();
    this->clear_kept_behind(tile, smem_k());
    this->wait_for_q(q, tile, step);
    issue_s(acc_s, q.stage);
    Statistic minus_lse = load(Layout::statistics(smem, q.stage));
    start_at_minus_delta(acc_dp, q.stage);
    Layout::KeptPipeline::consumer(smem + Layout::kVBarriers).wait_full();
    this->clear_kept_behind(tile, this->smem_v());
    const Kept kept_v = this->load_kept(this->smem_v());
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_pin(acc_s.x[0]);
    auto previous = q;
    Operand dscores;
#pragma unroll 1
    for (int steps_left = tile.num_steps - 1; steps_left >= 0; --steps_left) {
      // S of this step is complete; dK of the step before runs.
      add_dp(acc_dp, kept_v, tile, step);
      Operand probs, unused;
      this->to_probs(acc_s, tile, step, minus_lse, probs, unused);
      // As in Base, S of the step behind the last is that of some old tile.
      auto next = q;
      next.advance();
      if (steps_left > 0) {
        step.advance(tile.blocks);
        this->wait_for_q(next, tile, step);
      }
      issue_s(acc_s, next.stage);
      this->accumulate(acc_dv, probs, Layout::smem_dout(smem, q.stage));
      ptx::wgmma_wait_group<2>();  // dP is complete, and dK of the step before
      ptx::wgmma_pin(acc_dp.x[0]);
      ptx::wgmma_pin(acc_dk.x[0]);
      if (steps_left < tile.num_steps - 1) release_by_warp(previous, lane);
      dscores = probs;
      FA_UNROLL
      for (int k = 0; k < kTileM / 16; ++k)
        multiply_by_gradients<T>(dscores.x[0][k], score_part(acc_dp, k));
      this->pin(dscores);
      store_dscores(dscores);
      this->accumulate(acc_dk, dscores, Layout::smem_q(smem, q.stage));
      this->hand_over_dscores();
      minus_lse = load(Layout::statistics(smem, next.stage));
      start_at_minus_delta(acc_dp, next.stage);
      ptx::wgmma_wait_group<1>();  // the next S is complete, and dV
      ptx::wgmma_pin(acc_s.x[0]);
      this->release_dout(acc_dv);
      previous = q;
      q = next;
    }
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_pin(acc_dk.x[0]);
    this->store(acc_dk, acc_dv);
  }

  // S^T = K Q^T, as a group.
  FA_DEVICE void issue_s(Scores& acc, int stage) const {
    ptx::wgmma_pin(acc.x[0]);
    ptx::wgmma_fence();
    warpgroup_gemm_abt<T>(acc, smem_k(), Layout::smem_q(smem, stage));
    ptx::wgmma_commit_group();
  }
  // acc += V dO^T, as a group.
  FA_DEVICE void add_dp(Scores& acc, const Kept& kept_v, const BwdTile& tile, BwdStep step) const {
    this->dout().wait_full();
    this->clear_stream_behind(tile, step, Layout::smem_dout(smem, q.stage));
    ptx::wgmma_pin(acc.x[0]);
    ptx::wgmma_fence();
    warpgroup_gemm_abt<T>(acc, kept_v, Layout::smem_dout(smem, q.stage), true);
    ptx::wgmma_commit_group();
  }
  FA_DEVICE void start_at_minus_delta(Scores& acc, int stage) const {
    const Statistic minus_delta = load(Layout::statistics(smem, stage) + Layout::kStatisticBytes);
    FA_UNROLL
    for (int n = 0; n < kTileM / 8; ++n) {
      FA_UNROLL
      for (int i = 0; i < 4; ++i)
        acc.x[0][n][i] = i % 2 == 0 ? minus_delta.pair[n].x : minus_delta.pair[n].y;
    }
  }
  FA_DEVICE Statistic load(uint32_t statistics) const {
    Statistic s;
    FA_UNROLL
    for (int n = 0; n < kTileM / 8; ++n)
      s.pair[n] = ptx::ld_shared_v2_f32(statistics + statistics_at + n * 8 * sizeof(float));
    return s;
  }
  FA_DEVICE void store_dscores(const Operand& dscores) const {
    scores.wait_empty();
    const uint32_t at = scores_at + scores.stage * Layout::TileScores::kBytes;
    FA_UNROLL
    for (int i = 0; i < kTileM / 16; ++i) ptx::stmatrix_x4(at ^ (i * 32), dscores.x[0][i]);
  }
};

template <class T, int kHeadDim, BwdKind kKind, class Kinds>
__global__ void __launch_bounds__(BwdLayout<T, kHeadDim, kKind == BwdKind::kScoreMod>::kThreads, 1)
    bwd_kernel(const __grid_constant__ BwdParams p, const __grid_constant__ BwdLaunch launch) {
  using Layout = BwdLayout<T, kHeadDim, kKind == BwdKind::kScoreMod>;
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
    ptx::setmaxnreg_dec<Layout::kRegisters.producer>();
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / kWarpSize, 0);
    const BwdTile tile = bwd_tile(p, launch, blockIdx.x);
    if (threadIdx.x == 0) BwdProducer<Layout>(p, launch, smem_base).run(tile);
    if (warp == 1) BwdStatistics<Layout>{p, launch, smem_base, lane}.run(tile);
    if (warp >= 2) BwdDqAdder<T, Layout, kKind>{p, launch, smem_base, warp - 2, lane}.run(tile);
  } else if (warpgroup == 1) {
    ptx::setmaxnreg_dec<Layout::kRegisters.dq>();
    const BwdTile tile = bwd_tile(p, launch, blockIdx.x);
    if constexpr (kKind == BwdKind::kCompleteDq)
      clear_unseen_dq<T, kWarpgroupSize>(p, launch, tile, threadIdx.x % kWarpgroupSize);
    BwdDq<T, Layout, kKind>(p, smem_base).run(tile.num_steps);
  } else {
    ptx::setmaxnreg_inc<Layout::kRegisters.consumer>();
    using Consumer = std::conditional_t<Layout::kPipelined, BwdPipelinedConsumer<T, kHeadDim>,
                                        BwdConsumer<T, kHeadDim, Kinds>>;
    Consumer(p, launch, smem_base, warpgroup - 2).run(bwd_tile(p, launch, blockIdx.x));
  }
}

// KV heads, or splits of them, whose Q, dO and dQ fill a share of the L2 cache run at the same
// time. H100 (50 MB): 4, 8 and 16 MB are equal, 32 MB is 6 % slower at 2k; deterministic 128 MB is
// 10 % slower at 8k.
constexpr int64_t kBwdL2GroupBytes = 16 << 20;

// And about as many as fill the GPU: with fewer, the long tiles of the last ones begin behind short
// ones and end late, 10 % of the time where 8 KV heads x 2 have four query heads and 8k keys each.
template <int kHeadDim>
int bwd_heads_at_once(const BwdParams& p, int num_sms) {
  const auto mean_length = [&](const SeqlenArgs& seqlens, int total) {
    return seqlens.cu_seqlens ? total / max(p.batch_size, 1) : seqlens.max_seqlen;
  };
  const int heads_per_cta = p.num_heads_q / (p.num_heads_kv * p.head_splits);
  const int64_t stream_bytes = int64_t{heads_per_cta} * mean_length(p.seqlens_q, p.total_q) *
                               (2 * (p.head_dim + p.head_dim_v) + 4 * kHeadDim);
  const int tiles = ceil_div(max(1, mean_length(p.seqlens_k, p.total_k)), kBwdTileN);
  int heads = l2_group_size(stream_bytes, 1, kBwdL2GroupBytes);
  while (2 * heads * tiles <= num_sms + num_sms / 4) heads *= 2;
  return heads;
}

inline cudaError_t encode_bwd_tensor_maps(const BwdParams& p, BwdLaunch& launch) {
  constexpr int kKeys = 64;  // of a consumer, or of a CTA of a pair
  const auto of_q = [&](const void* data, const Strides& strides, int head_dim) {
    return head_tensor(data, strides, p.seqlens_q, p.total_q, p.batch_size, p.num_heads_q,
                       head_dim);
  };
  const auto of_k = [&](const void* data, const Strides& strides, int head_dim) {
    return head_tensor(data, strides, p.seqlens_k, p.total_k, p.batch_size, p.num_heads_kv,
                       head_dim);
  };
  const HeadTensor q = of_q(p.q, p.q_strides, p.head_dim);
  const HeadTensor dout = of_q(p.dout, p.dout_strides, p.head_dim_v);
  const HeadTensor k = of_k(p.k, p.k_strides, p.head_dim);
  const HeadTensor v = of_k(p.v, p.v_strides, p.head_dim_v);
  cudaError_t error = encode_tensor_map(launch.q, p.dtype, q, kBwdTileM);
  if (error == cudaSuccess) error = encode_tensor_map(launch.dout, p.dtype, dout, kBwdTileM);
  if (error == cudaSuccess) error = encode_tensor_map(launch.k, p.dtype, k, kKeys);
  if (error == cudaSuccess) error = encode_tensor_map(launch.v, p.dtype, v, kKeys);
  return error;
}

template <class T, int kHeadDim, BwdKind kKind, class Kinds = NoMods>
int launch_bwd_kernel(const BwdParams& p, int num_sequences, cudaStream_t stream) {
  const TileGrid grid{max(1, ceil_div(p.seqlens_k.max_seqlen, kBwdTileN)),
                      p.num_heads_kv * p.head_splits, num_sequences};
  if (grid.size() == 0) return cudaSuccess;
  if (grid.size() > INT_MAX / 2) return cudaErrorInvalidConfiguration;
  BwdLaunch launch;
  launch.by_splits = FastDiv(p.head_splits);
  launch.heads_per_cta = p.num_heads_q / (p.num_heads_kv * p.head_splits);
  launch.num_tiles = static_cast<int>(grid.size());
  launch.scale_log2 = p.score.softmax_scale * kLog2e;
  launch.in_order = p.dq_semaphore != nullptr;
  constexpr BwdTileConfig kTile = bwd_tile_config(Arch::kSm90, kHeadDim);
  constexpr bool kPair = kTile.num_ctas == 2;
  int num_sms = 0;
  cudaError_t error = num_multiprocessors(num_sms);
  if (error != cudaSuccess) return error;
  // n_block 0 first, as under a causal mask most queries see it; in order: BwdStep.
  launch.order = TileOrder::of(grid, launch.in_order,
                               launch.in_order ? 1 : bwd_heads_at_once<kHeadDim>(p, num_sms));
  launch.heads_fit = bwd_heads_fit(grid.num_m_blocks, kTile.num_ctas, num_sms, p.complete_dq);
  // Clusters do not begin in the order of blockIdx, so a counter behind those of dQ deals out
  // tiles.
  const int64_t rows = bwd_dq_accum_rows(p.seqlens_q.cu_seqlens != nullptr, p.batch_size,
                                         p.seqlens_q.max_seqlen, p.total_q, kBwdTileM);
  launch.next_tile = launch.in_order && kPair
                         ? p.dq_semaphore + bwd_dq_semaphores(rows, p.num_heads_q, kBwdTileM) - 1
                         : nullptr;
  error = encode_bwd_tensor_maps(p, launch);
  if (error != cudaSuccess) return error;
  if constexpr (kPair) {
    if constexpr (kKind == BwdKind::kScoreMod) {
      return launch_bwd_pair_kernel<T, kHeadDim, BwdPairKind::kScoreMod>(p, launch, stream);
    } else {
      if constexpr (kHeadDim == 192) {
        if (p.head_dim_v <= 128)
          return launch_bwd_pair_kernel<T, kHeadDim, BwdPairKind::kNarrowV>(p, launch, stream);
      }
      return launch_bwd_pair_kernel<T, kHeadDim, BwdPairKind::kPlain>(p, launch, stream);
    }
  } else {
    using Layout = BwdLayout<T, kHeadDim, kKind == BwdKind::kScoreMod>;
    constexpr auto kKernel = bwd_kernel<T, kHeadDim, kKind, Kinds>;
    error = allow_dynamic_smem<kKernel>(Layout::kSmemBytes);
    if (error != cudaSuccess) return error;
    kKernel<<<launch.num_tiles, Layout::kThreads, Layout::kSmemBytes, stream>>>(p, launch);
    return cudaGetLastError();
  }
}

// A kernel for each score modification that comes alone: loops beside each other in one kernel
// spill at 128, where dropout alone is slower than with the branches.
template <class T, int kHeadDim>
int launch_modified_bwd(const BwdParams& p, int num_sequences, cudaStream_t stream) {
  constexpr BwdKind kKind = BwdKind::kScoreMod;
  const ModKinds kinds = mod_kinds(p.score);
  if constexpr (kHeadDim <= 128) {
    if (kinds.is_softcap())
      return launch_bwd_kernel<T, kHeadDim, kKind, OnlySoftcap>(p, num_sequences, stream);
    if (kinds.is_bias())
      return launch_bwd_kernel<T, kHeadDim, kKind, OnlyAlibi>(p, num_sequences, stream);
  }
  if constexpr (kHeadDim < 128) {
    if (kinds.is_dropout())
      return launch_bwd_kernel<T, kHeadDim, kKind, OnlyDropout>(p, num_sequences, stream);
  }
  return launch_bwd_kernel<T, kHeadDim, kKind, ModKinds>(p, num_sequences, stream);
}

template <class T, int kHeadDim>
int launch_bwd(const BwdParams& p, cudaStream_t stream) {
  // Varlen tensors have the rest behind the last sequence as well.
  const int num_sequences =
      p.batch_size + (p.seqlens_q.cu_seqlens || p.seqlens_k.cu_seqlens ? 1 : 0);
  int error = cudaErrorInvalidValue;
  if (p.complete_dq) {
    if constexpr (sm90_bwd_completes_dq(kHeadDim))
      error = launch_bwd_kernel<T, kHeadDim, BwdKind::kCompleteDq>(p, num_sequences, stream);
  } else if (has_score_mod(p.score)) {
    error = launch_modified_bwd<T, kHeadDim>(p, num_sequences, stream);
  } else {
    error = launch_bwd_kernel<T, kHeadDim, BwdKind::kPlain>(p, num_sequences, stream);
  }
  if (error == cudaSuccess && !p.complete_dq)
    error = launch_bwd_postprocess<T, kHeadDim>(p, num_sequences, stream);
  return error != cudaSuccess ? error : launch_round_gradients<T>(p, stream);
}

}  // namespace fa
