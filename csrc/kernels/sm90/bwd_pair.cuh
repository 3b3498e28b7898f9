// FlashAttention backward for Hopper, head_dim 192 and 256: two CTAs, a cluster, keep 128 keys.
//
// Each CTA keeps 64 keys of one KV head, both walk the same tiles of 64 queries, Q and dO, which
// they load for each other. dK and dV of 64 keys are more than one warpgroup holds beside a tile of
// scores, so two share their columns, and the work on the scores:
//   producer   one thread starts the copies, a warp brings LSE and delta, one sends dS to the other
//              CTA                                                         bwd_pair_producer.h
//   probs      S^T = K Q^T;    P = exp(S - lse) -> smem;    low columns of dV += P^T dO, dK += dS^T Q
//   dscores    dP^T = V dO^T;  dS = P (dP - delta) -> smem; high columns
//   dQ         dQ = dS K of the 128 keys, half of the columns, added to fp32 sums in global memory
//              from registers                                              bwd_pair_dq.h
// S of the next step runs while dS of this one is computed, dP of the next one while P is.
// Memory: bwd_pair_layout.h. Rows past the end of a sequence: bwd_elements.h.
// delta comes from bwd_preprocess, bwd_postprocess rounds dQ. Numbers:
// docs/performance/sm90_backward.md. Algorithm: FlashAttention-2, arXiv:2307.08691, algorithm 2.
#pragma once
#include <cuda_runtime.h>

#include "kernels/launch.h"
#include "kernels/sm90/bwd_elements.h"
#include "kernels/sm90/bwd_pair_dq.h"
#include "kernels/sm90/bwd_pair_layout.h"
#include "kernels/sm90/bwd_pair_producer.h"
#include "kernels/sm90/bwd_producer.h"
#include "ptx/barrier.h"
#include "ptx/shared_memory.h"
#include "ptx/stmatrix.h"
#include "ptx/warpgroup.h"

namespace fa {

// What both consumer warpgroups have.
template <class T, int kHeadDim, bool kScoreMod>
struct BwdPairConsumer {
  using Layout = BwdPairLayout<T, kHeadDim, kScoreMod>;
  static constexpr int kTileM = Layout::kTileM;
  using Scores = AccumTile<1, kTileM / 8>;          // S^T or dP^T
  using Operand = AFragments<1, kTileM / 16>;       // P^T or dS^T
  using Low = AccumTile<1, Layout::kLow / 8>;       // of dV or dK
  using High = AccumTile<1, Layout::kHigh / 8>;

  const BwdParams& p;
  const BwdLaunch& launch;
  uint32_t smem;
  int rank, lane, warp_row;
  int barrier;  // named barrier of the warpgroup
  typename Layout::StreamPipeline q;
  typename Layout::DoutPipeline dout;
  typename Layout::ScoresPipeline probs, scores;

  FA_DEVICE BwdPairConsumer(const BwdParams& params, const BwdLaunch& bwd_launch,
                            uint32_t smem_base, int cluster_rank, int named_barrier)
      : p(params),
        launch(bwd_launch),
        smem(smem_base),
        rank(cluster_rank),
        lane(threadIdx.x % kWarpSize),
        warp_row(threadIdx.x / kWarpSize % 4 * 16),
        barrier(named_barrier),
        q(Layout::StreamPipeline::consumer(smem_base + Layout::kQBarriers)),
        dout(Layout::DoutPipeline::consumer(smem_base + Layout::kDoutBarriers)),
        probs(Layout::ScoresPipeline::consumer(smem_base + Layout::kProbsBarriers)),
        scores(Layout::ScoresPipeline::consumer(smem_base + Layout::kScoresBarriers)) {}

  FA_DEVICE int first_key(const BwdTile& tile) const {
    return tile.n_block * kBwdTileN + rank * Layout::kKeys + warp_row;
  }
  template <class Tile>
  FA_DEVICE void wait_for_kept(const BwdTile& tile, Tile rows, int barriers) const {
    Layout::KeptPipeline::consumer(smem + barriers).wait_full();
    clear_rows_behind(rows, tile.k_seq.seqlen - first_key(tile) + warp_row, p.seqlens_k, barrier);
  }
  template <class Tile>
  FA_DEVICE void clear_stream(const BwdTile& tile, BwdStep step, Tile rows) const {
    clear_rows_behind(rows, tile.q_seq.seqlen - step.m_block * kTileM, p.seqlens_q, barrier);
  }
  template <class Tile>
  FA_DEVICE void wait_for_dout(const typename Layout::DoutPipeline& part, const BwdTile& tile,
                               BwdStep step, Tile rows) const {
    part.wait_full();
    clear_stream(tile, step, rows);
  }
  FA_DEVICE void release_dout() {
    release_in_pair(dout, lane);
    dout.advance();
  }
  FA_DEVICE void release_q() {
    release_in_pair(q, lane);
    q.advance();
  }
  template <int kN, class Rows>
  FA_DEVICE void accumulate(AccumTile<1, kN>& acc, const Operand& operand, Rows rows) const {
    ptx::wgmma_pin(acc.x[0]);
    ptx::wgmma_fence();
    warpgroup_gemm_ab<T>(acc, operand, rows);
    ptx::wgmma_commit_group();
  }
  // Low or high columns of a tile of Q.
  FA_DEVICE typename Layout::TileLow q_low(int stage) const {
    return {Layout::smem_q(smem, stage).base};
  }
  FA_DEVICE typename Layout::TileLow q_from_high(int stage) const {
    return {Layout::smem_q(smem, stage).base +
            Layout::kHigh / 64 * Layout::TileStream::kSlabBytes};
  }
  // Where this thread's operand of queries [16 k, 16 k + 16) passes to its like in the other
  // warpgroup: among the warp's rows of dS, or in the buffer of what passed.
  FA_DEVICE uint32_t handover(uint32_t buffer, int k) const {
    return buffer + (warp_row * 8 + k * kWarpSize + lane) * 16;
  }
  FA_DEVICE uint32_t handover_probs(int stage, int k) const {
    return handover(Layout::smem_scores(smem, stage).base, k);
  }
  FA_DEVICE uint32_t handover_passed(int k) const { return handover(smem + Layout::kPassed, k); }
};

// S and P; columns [0, kLow) of dV, [0, kHigh) of dK.
template <class T, int kHeadDim, bool kScoreMod>
struct BwdPairProbs : BwdPairConsumer<T, kHeadDim, kScoreMod> {
  using Base = BwdPairConsumer<T, kHeadDim, kScoreMod>;
  using Layout = typename Base::Layout;
  using Base::Base, Base::p, Base::launch, Base::smem, Base::lane, Base::q, Base::dout, Base::probs,
      Base::scores, Base::kTileM;
  using TileHighQ = SwizzledTile<kTileM, Layout::kHigh>;

  FA_DEVICE void run(const BwdTile& tile) {
    typename Base::Low acc_dv;
    typename Base::High acc_dk;
    acc_dv.clear();
    acc_dk.clear();
    ptx::wgmma_pin(acc_dv.x[0]);
    ptx::wgmma_pin(acc_dk.x[0]);
    typename Base::Scores acc_s;
    BwdStep step = BwdStep::first(p, tile);
    this->wait_for_kept(tile, Layout::smem_k(smem), Layout::kKBarriers);
    wait_for_q(q, tile, step);
    issue_scores(acc_s, q.stage);
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_pin(acc_s.x[0]);
    auto empty = Layout::ScoresPipeline::producer(smem + Layout::kScoresBarriers);
#pragma unroll 1
    for (int steps_left = tile.num_steps - 1; steps_left >= 0; --steps_left) {
      // S of this step is complete.
      typename Base::Operand operand;
      wait_empty_in_pair(empty);
      to_probs(acc_s, tile, step, operand);
      __syncwarp();
      if (lane == 0) ptx::mbarrier_arrive(probs.full());
      probs.advance();
      empty.advance();

      const typename Layout::TileLow dout_low{Layout::smem_dout(smem, dout.stage)};
      this->wait_for_dout(dout, tile, step, dout_low);
      this->accumulate(acc_dv, operand, dout_low);
      // Behind the last step, S is that of some old tile, which nobody reads: products of a group
      // are not to be skipped by a branch.
      auto next = q;
      next.advance();
      if (steps_left > 0) {
        step.advance(tile.blocks);
        wait_for_q(next, tile, step);
      }
      issue_scores(acc_s, next.stage);
      ptx::wgmma_wait_group<1>();  // dV is complete
      ptx::wgmma_pin(acc_dv.x[0]);
      this->release_dout();
      scores.wait_full();
      ptx::wgmma_pin(acc_dk.x[0]);
      ptx::wgmma_fence();
      warpgroup_gemm_ab<T>(acc_dk, Layout::smem_scores(smem, scores.stage),
                           TileHighQ{this->q_low(q.stage).base});
      ptx::wgmma_commit_group();
      dout.wait_full();  // the high part, not for this warpgroup
      this->release_dout();
      ptx::wgmma_wait_group<0>();
      ptx::wgmma_pin(acc_s.x[0]);
      ptx::wgmma_pin(acc_dk.x[0]);
      release_by_warp(scores, lane);
      scores.advance();
      this->release_q();
    }
    store_gradient<T>(acc_dv, tile, this->first_key(tile), {p.dv, p.dv_strides, p.head_dim_v}, 0,
                      kScoreMod ? 256.f / p.score.keep_threshold : 1.f, lane);
    store_gradient<T>(acc_dk, tile, this->first_key(tile), {p.dk, p.dk_strides, p.head_dim}, 0,
                      p.score.softmax_scale, lane);
  }

  FA_DEVICE void wait_for_q(const typename Layout::StreamPipeline& queries, const BwdTile& tile,
                            BwdStep step) const {
    queries.wait_full();
    this->clear_stream(tile, step, Layout::smem_q(smem, queries.stage));
  }
  FA_DEVICE void issue_scores(typename Base::Scores& acc, int stage) const {
    ptx::wgmma_pin(acc.x[0]);
    ptx::wgmma_fence();
    warpgroup_gemm_abt<T>(acc, Layout::smem_k(smem), Layout::smem_q(smem, stage));
    ptx::wgmma_commit_group();
  }

  // Scores become P, here and in the other warpgroup's hands.
  FA_DEVICE void to_probs(typename Base::Scores& acc, const BwdTile& tile, BwdStep step,
                          typename Base::Operand& operand) const {
    const BwdStatistic minus_lse = load_statistic(Layout::statistics(smem, q.stage), lane);
    const TransposedOrigin origin{this->first_key(tile), step.m_block * kTileM};
    const bool border =
        step.m_block < tile.blocks.full_begin || step.m_block >= tile.blocks.full_end;
    if constexpr (kScoreMod) {
      const TransposedScoreMod mod{
          ScoreMod::of(p.score, tile.mask, tile.batch, step.head, p.num_heads_q)};
      mod.score(acc, origin, lane);
      if (border) apply_mask(acc, tile.mask, origin, lane);
      FA_UNROLL
      for (int k = 0; k < kTileM / 16; ++k) {
        uint32_t passed[4];
        modify_weights<T>(acc, mod, origin, k, minus_lse, lane, operand.x[0][k], passed);
        ptx::st_shared_v4(this->handover_passed(k),
                          uint4{passed[0], passed[1], passed[2], passed[3]});
      }
    } else {
      if (border) apply_mask(acc, tile.mask, origin, lane);
      to_weights(acc, launch.scale_log2, minus_lse, 0);
      operand = as_a_operand<T>(acc);
    }
    FA_UNROLL
    for (int k = 0; k < kTileM / 16; ++k) {
      const uint32_t(&x)[4] = operand.x[0][k];
      ptx::st_shared_v4(this->handover_probs(probs.stage, k), uint4{x[0], x[1], x[2], x[3]});
    }
  }
};

// dP and dS; columns [kLow, kHeadDim) of dV, [kHigh, kHeadDim) of dK.
template <class T, int kHeadDim, bool kScoreMod>
struct BwdPairDscores : BwdPairConsumer<T, kHeadDim, kScoreMod> {
  using Base = BwdPairConsumer<T, kHeadDim, kScoreMod>;
  using Layout = typename Base::Layout;
  using Base::Base, Base::p, Base::launch, Base::smem, Base::lane, Base::q, Base::dout, Base::probs,
      Base::scores, Base::kTileM;

  FA_DEVICE void run(const BwdTile& tile) {
    typename Base::High acc_dv;
    typename Base::Low acc_dk;
    acc_dv.clear();
    acc_dk.clear();
    ptx::wgmma_pin(acc_dv.x[0]);
    ptx::wgmma_pin(acc_dk.x[0]);
    typename Base::Scores acc_dp;
    BwdStep step = BwdStep::first(p, tile);
    this->wait_for_kept(tile, Layout::smem_v(smem), Layout::kVBarriers);
    issue_dp_low(acc_dp, tile, step, true);
    issue_dp_high(acc_dp, tile, step, true);
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_pin(acc_dp.x[0]);
#pragma unroll 1
    for (int steps_left = tile.num_steps - 1; steps_left >= 0; --steps_left) {
      // dP of this step is complete.
      this->release_dout();  // the low part
      q.wait_full();
      const BwdStatistic deltas =
          load_statistic(Layout::statistics(smem, q.stage) + Layout::kStatisticBytes, lane);
      typename Base::Operand operand, dscores;
      probs.wait_full();
      FA_UNROLL
      for (int k = 0; k < kTileM / 16; ++k)
        load_operand(operand.x[0][k], this->handover_probs(probs.stage, k));
      this->accumulate(acc_dv, operand,
                       typename Layout::TileHigh{Layout::smem_dout(smem, dout.stage)});
      to_dscores_of_tile(dscores, operand, acc_dp, deltas);
      store_dscores(dscores);
      this->accumulate(acc_dk, dscores, this->q_from_high(q.stage));
      ptx::wgmma_wait_group<1>();  // dV is complete
      ptx::wgmma_pin(acc_dv.x[0]);
      this->release_dout();  // the high part
      // Behind the last step, dP is of some old tile, which nobody reads.
      if (steps_left > 0) step.advance(tile.blocks);
      issue_dp_low(acc_dp, tile, step, steps_left > 0);
      ptx::wgmma_wait_group<1>();  // dK is complete
      ptx::wgmma_pin(acc_dk.x[0]);
      this->release_q();
      issue_dp_high(acc_dp, tile, step, steps_left > 0);
      ptx::wgmma_wait_group<0>();
      ptx::wgmma_pin(acc_dp.x[0]);
    }
    store_gradient<T>(acc_dv, tile, this->first_key(tile), {p.dv, p.dv_strides, p.head_dim_v},
                      Layout::kLow, kScoreMod ? 256.f / p.score.keep_threshold : 1.f, lane);
    store_gradient<T>(acc_dk, tile, this->first_key(tile), {p.dk, p.dk_strides, p.head_dim},
                      Layout::kHigh, p.score.softmax_scale, lane);
  }

  // dP = V dO^T over the low columns, then over the high ones, which lie in the next buffer.
  FA_DEVICE void issue_dp_low(typename Base::Scores& acc, const BwdTile& tile, BwdStep step,
                              bool is_new) const {
    const typename Layout::TileLow rows{Layout::smem_dout(smem, dout.stage)};
    if (is_new) this->wait_for_dout(dout, tile, step, rows);
    ptx::wgmma_pin(acc.x[0]);
    ptx::wgmma_fence();
    warpgroup_gemm_abt<T>(acc, SwizzledTile<Layout::kKeys, Layout::kLow>{smem + Layout::kV}, rows);
    ptx::wgmma_commit_group();
  }
  FA_DEVICE void issue_dp_high(typename Base::Scores& acc, const BwdTile& tile, BwdStep step,
                               bool is_new) const {
    constexpr int kHighSlab = Layout::kLow / 64 * Layout::TileKept::kSlabBytes;
    auto high = dout;
    high.advance();
    const typename Layout::TileHigh rows{Layout::smem_dout(smem, high.stage)};
    if (is_new) this->wait_for_dout(high, tile, step, rows);
    ptx::wgmma_fence();
    warpgroup_gemm_abt<T>(
        acc, SwizzledTile<Layout::kKeys, Layout::kHigh>{smem + Layout::kV + kHighSlab}, rows, true);
    ptx::wgmma_commit_group();
  }

  FA_DEVICE void load_operand(uint32_t (&operand)[4], uint32_t from) const {
    const uint4 x = ptx::ld_shared_v4(from);
    operand[0] = x.x, operand[1] = x.y, operand[2] = x.z, operand[3] = x.w;
  }
  FA_DEVICE void to_dscores_of_tile(typename Base::Operand& dscores,
                                    const typename Base::Operand& operand,
                                    const typename Base::Scores& acc_dp,
                                    const BwdStatistic& deltas) const {
    const float drop_factor =
        kScoreMod && p.score.keep_threshold < 256 ? 256.f / p.score.keep_threshold : 0.f;
    FA_UNROLL
    for (int k = 0; k < kTileM / 16; ++k) {
      uint32_t(&x)[4] = dscores.x[0][k];
      if constexpr (kScoreMod) {
        load_operand(x, this->handover_passed(k));
      } else {
        FA_UNROLL
        for (int i = 0; i < 4; ++i) x[i] = operand.x[0][k][i];
      }
      to_dscores<T>(x, acc_dp, deltas, k, drop_factor);
    }
  }
  // In the place of P, which this warp has read.
  FA_DEVICE void store_dscores(const typename Base::Operand& dscores) {
    __syncwarp();
    const uint32_t at = Layout::smem_scores(smem, probs.stage)
                            .chunk_address(this->warp_row + lane % 16, lane / 16);
    FA_UNROLL
    for (int i = 0; i < kTileM / 16; ++i) ptx::stmatrix_x4(at ^ (i * 32), dscores.x[0][i]);
    ptx::fence_proxy_async();
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(scores.full());
    scores.advance();
    probs.advance();
  }
};

template <class T, int kHeadDim, bool kScoreMod>
__global__ void __cluster_dims__(2, 1, 1)
    __launch_bounds__(BwdPairLayout<T, kHeadDim, kScoreMod>::kThreads, 1)
        bwd_pair_kernel(const __grid_constant__ BwdParams p,
                        const __grid_constant__ BwdLaunch launch) {
  using Layout = BwdPairLayout<T, kHeadDim, kScoreMod>;
  extern __shared__ __align__(1024) char smem[];
  const uint32_t smem_base = ptx::cvta_to_shared(smem);
  if (threadIdx.x == 0) {
    ptx::prefetch_tensormap(&launch.q);
    ptx::prefetch_tensormap(&launch.k);
    ptx::prefetch_tensormap(&launch.v);
    ptx::prefetch_tensormap(&launch.dout);
    Layout::init_barriers(smem_base);
  }
  ptx::cluster_sync();  // the barriers of both CTAs are initialised
  const int warpgroup = ptx::warpgroup_index(), rank = ptx::cluster_rank();
  const int lane = threadIdx.x % kWarpSize;
  const BwdTile tile = bwd_tile(p, launch, blockIdx.x / Layout::kCtas);
  if (tile.num_steps == 0) {
    clear_gradients<T, Layout::kCtas * Layout::kThreads>(p, launch, tile,
                                                         rank * Layout::kThreads + threadIdx.x);
  } else if (warpgroup == 0) {
    ptx::setmaxnreg_dec<Layout::kRegisters.producer>();
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / kWarpSize, 0);
    if (threadIdx.x == 0) BwdPairProducer<Layout>(p, launch, smem_base, rank).run(tile);
    if (warp == 1) {
      auto q = Layout::StreamPipeline::producer(smem_base + Layout::kQBarriers);
      BwdStatistics<Layout>{p, launch, smem_base, lane}.bring(tile, q);
    }
    if (threadIdx.x == 2 * kWarpSize) send_dscores<Layout>(tile, smem_base, 1 - rank);
    __syncwarp();
  } else if (warpgroup == 1) {
    ptx::setmaxnreg_dec<Layout::kRegisters.dq>();
    BwdPairDq<T, Layout>(p, smem_base, rank).run(tile);
  } else if (warpgroup == 2) {
    ptx::setmaxnreg_inc<Layout::kRegisters.consumer>();
    BwdPairProbs<T, kHeadDim, kScoreMod>(p, launch, smem_base, rank, 1).run(tile);
  } else {
    ptx::setmaxnreg_inc<Layout::kRegisters.consumer>();
    BwdPairDscores<T, kHeadDim, kScoreMod>(p, launch, smem_base, rank, 2).run(tile);
  }
  ptx::cluster_sync();  // nobody arrives at this CTA's barriers or writes its memory any more
}

template <class T, int kHeadDim, bool kScoreMod>
int launch_bwd_pair_kernel(const BwdParams& p, const BwdLaunch& launch, cudaStream_t stream) {
  using Layout = BwdPairLayout<T, kHeadDim, kScoreMod>;
  constexpr auto kKernel = bwd_pair_kernel<T, kHeadDim, kScoreMod>;
  const cudaError_t error = allow_dynamic_smem<kKernel>(Layout::kSmemBytes);
  if (error != cudaSuccess) return error;
  kKernel<<<launch.num_tiles * Layout::kCtas, Layout::kThreads, Layout::kSmemBytes, stream>>>(
      p, launch);
  return cudaGetLastError();
}

}  // namespace fa
