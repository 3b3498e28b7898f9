// FlashAttention backward for Hopper, head_dim 192 and 256: two CTAs, a cluster, keep 128 keys.
//
// Each CTA keeps 64 keys of one KV head, both walk the same tiles of 64 queries. dK and dV of 64
// keys are more than one warpgroup holds beside a tile of scores, so two share their columns, and
// the work on the scores:
//   producer  one thread starts the copies, a warp brings LSE and delta, one thread
//             sends dS to the other CTA                              bwd_pair_producer.h
//   probs     S^T = K Q^T;    P = exp(S - lse) -> smem
//   dscores   dP^T = V dO^T;  dS = P (dP - delta) -> smem
//   both      dV += P^T dO, dK += dS^T Q: probs the low columns, dscores the high ones
//   dQ        dQ = dS K of the 128 keys, half of the columns, added up in fp32 in
//             global memory from registers                           bwd_pair_dq.h
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
#include "ptx/opaque.h"
#include "ptx/shared_memory.h"
#include "ptx/stmatrix.h"
#include "ptx/warpgroup.h"

namespace fa {

// What both consumer warpgroups have.
template <class T, int kHeadDim, BwdPairKind kKind>
struct BwdPairConsumer {
  using Layout = BwdPairLayout<T, kHeadDim, kKind>;
  static constexpr bool kScoreMod = Layout::kScoreMod;
  static constexpr int kTileM = Layout::kTileM;
  using Scores = AccumTile<1, kTileM / 8>;     // S^T or dP^T
  using Operand = AFragments<1, kTileM / 16>;  // P^T or dS^T
  using Low = AccumTile<1, Layout::kLow / 8>;  // of dV or dK
  using High = AccumTile<1, Layout::kHigh / 8>;

  const BwdParams& p;
  const BwdLaunch& launch;
  uint32_t smem;
  int rank, lane, warp_row;
  int barrier;  // named barrier of the warpgroup
  typename Layout::DoutPipeline dout;

  FA_DEVICE BwdPairConsumer(const BwdParams& params, const BwdLaunch& bwd_launch,
                            uint32_t smem_base, int cluster_rank, int named_barrier)
      : p(params),
        launch(bwd_launch),
        smem(smem_base),
        rank(cluster_rank),
        lane(threadIdx.x % kWarpSize),
        warp_row(threadIdx.x / kWarpSize % 4 * 16),
        barrier(named_barrier),
        dout(Layout::DoutPipeline::consumer(smem_base + Layout::kDoutBarriers)) {}

  // The rings at step n.
  FA_DEVICE typename Layout::StreamPipeline q_at(uint32_t n) const {
    return Layout::StreamPipeline::consumer_at(smem + Layout::kQBarriers, n);
  }
  FA_DEVICE typename Layout::ScoresPipeline probs_at(uint32_t n) const {
    return Layout::ScoresPipeline::consumer_at(smem + Layout::kProbsBarriers, n);
  }
  FA_DEVICE typename Layout::ScoresPipeline scores_at(uint32_t n) const {
    return Layout::ScoresPipeline::consumer_at(smem + Layout::kScoresBarriers, n);
  }

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
    release_by_warp(dout, lane);
    dout.advance();
  }
  // The gradients of a warp. The tile is found anew: its numbers would fill registers throughout.
  template <class Store>
  FA_DEVICE void store(int index, Store store_gradients) const {
    const BwdTile tile = bwd_tile(p, launch, ptx::opaque(index));
    constexpr int kWarps = 2 * Layout::kCtas * 4;  // of both roles
    in_order_of_splits<kWarps>(p, tile, lane, [&] { store_gradients(tile); });
  }
  // Columns from `column` on.
  template <class Gradient>
  FA_DEVICE void store_dv(const Gradient& acc, const BwdTile& tile, int column) const {
    store_gradient<T>(p, acc, tile, first_key(tile), dv_rows(p), column,
                      kScoreMod ? 256.f / p.score.keep_threshold : 1.f, lane);
  }
  template <class Gradient>
  FA_DEVICE void store_dk(const Gradient& acc, const BwdTile& tile, int column) const {
    store_gradient<T>(p, acc, tile, first_key(tile), dk_rows(p), column, p.score.softmax_scale,
                      lane);
  }
  template <int kN, class A, class Rows>
  FA_DEVICE void accumulate(AccumTile<1, kN>& acc, const A& operand, Rows rows) const {
    ptx::wgmma_pin(acc.x[0]);
    ptx::wgmma_fence();
    warpgroup_gemm_ab<T>(acc, operand, rows);
    ptx::wgmma_commit_group();
  }
  // Where this thread's operand passes to its like in the other warpgroup, kPartBytes for 16
  // queries: among the warp's rows of dS, or in the buffer of what passed.
  static constexpr int kPartBytes = kWarpSize * 16;
  FA_DEVICE uint32_t handover(uint32_t buffer) const {
    return buffer + warp_row * Layout::TileScores::kSlabRowBytes + lane * 16;
  }
};

// S and P; columns [0, kLow) of dV, [0, kHigh) of dK.
template <class T, int kHeadDim, BwdPairKind kKind>
struct BwdPairProbs : BwdPairConsumer<T, kHeadDim, kKind> {
  using Base = BwdPairConsumer<T, kHeadDim, kKind>;
  using Layout = typename Base::Layout;
  using Base::Base, Base::p, Base::launch, Base::smem, Base::lane, Base::dout, Base::kTileM,
      Base::kScoreMod;
  using TileHighQ = SwizzledTile<kTileM, Layout::kHigh>;

  FA_DEVICE void run(const BwdTile& tile, int index) {
    typename Base::Low acc_dv;
    typename Base::High acc_dk;
    acc_dv.clear();
    acc_dk.clear();
    ptx::wgmma_pin(acc_dv.x[0]);
    ptx::wgmma_pin(acc_dk.x[0]);
    typename Base::Scores acc_s;
    BwdStep step = BwdStep::first(launch, tile);
    this->wait_for_kept(tile, Layout::smem_k(smem), Layout::kKBarriers);
    wait_for_q(this->q_at(0), tile, step);
    issue_scores(acc_s, 0);
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_pin(acc_s.x[0]);
#pragma unroll 1
    for (int n = 0; n < tile.num_steps; ++n) {
      // S of this step is complete.
      typename Base::Operand operand;
      wait_empty_in_pair(Layout::ScoresPipeline::producer_at(smem + Layout::kScoresBarriers, n));
      to_probs(acc_s, tile, step, n, operand);
      __syncwarp();
      if (lane == 0) ptx::mbarrier_arrive(this->probs_at(n).full());

      const typename Layout::TileLow dout_low{Layout::smem_dout(smem, dout.stage)};
      this->wait_for_dout(dout, tile, step, dout_low);
      this->accumulate(acc_dv, operand, dout_low);
      // Behind the last step, S is that of some old tile, which nobody reads: products of a group
      // are not to be skipped by a branch.
      if (n + 1 < tile.num_steps) {
        step.advance(tile.blocks);
        wait_for_q(this->q_at(n + 1), tile, step);
      }
      issue_scores(acc_s, this->q_at(n + 1).stage);
      ptx::wgmma_wait_group<1>();  // dV is complete
      ptx::wgmma_pin(acc_dv.x[0]);
      this->release_dout();
      this->scores_at(n).wait_full();
      this->accumulate(acc_dk, Layout::smem_scores(smem, this->scores_at(n).stage),
                       TileHighQ{Layout::smem_q(smem, this->q_at(n).stage).base});
      if constexpr (Layout::kHasHighV) {
        dout.wait_full();  // the high part, not for this warpgroup
        this->release_dout();
      }
      ptx::wgmma_wait_group<0>();
      ptx::wgmma_pin(acc_s.x[0]);
      ptx::wgmma_pin(acc_dk.x[0]);
      release_by_warp(this->scores_at(n), lane);
      release_by_warp(this->q_at(n), lane);
    }
    this->store(index, [&](const BwdTile& stored) {
      this->store_dv(acc_dv, stored, 0);
      this->store_dk(acc_dk, stored, 0);
    });
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
  FA_DEVICE void to_probs(typename Base::Scores& acc, const BwdTile& tile, BwdStep step, int n,
                          typename Base::Operand& operand) const {
    const uint32_t statistics = Layout::statistics(smem, this->q_at(n).stage);
    const uint32_t handover =
        this->handover(Layout::smem_scores(smem, this->probs_at(n).stage).base);
    const TransposedOrigin origin{this->first_key(tile), step.m_block * kTileM};
    const bool border =
        step.m_block < tile.blocks.full_begin || step.m_block >= tile.blocks.full_end;
    TransposedScoreMod mod;
    if constexpr (kScoreMod) {
      mod.mod = ScoreMod::of(p.score, tile.mask, tile.batch, step.head, p.num_heads_q);
      mod.score(acc, origin, lane);
    }
    if (border) apply_mask(acc, tile.mask, origin, lane);
    FA_UNROLL
    for (int k = 0; k < kTileM / 16; ++k) {
      const BwdStatistic<2> minus_lse =
          load_statistic<2>(statistics + k * 16 * sizeof(float), lane);
      AccumTile<1, 2> part = score_part(acc, k);
      uint32_t (&probs)[4] = operand.x[0][k];
      if constexpr (kScoreMod) {
        uint32_t passed[4];
        modify_weights<T>(part, mod, mod.kinds(), {origin.first_key, origin.first_query + 16 * k},
                          minus_lse, lane, probs, passed);
        store_operand(this->handover(smem + Layout::kPassed) + k * kPartBytes, passed);
      } else {
        to_weights(part, launch.scale_log2, minus_lse);
        const AFragments<1, 1> rounded = as_a_operand<T>(part);
        FA_UNROLL
        for (int i = 0; i < 4; ++i) probs[i] = rounded.x[0][0][i];
      }
      store_operand(handover + k * kPartBytes, probs);
    }
  }
  static constexpr int kPartBytes = Base::kPartBytes;
  FA_DEVICE void store_operand(uint32_t to, const uint32_t (&x)[4]) const {
    ptx::st_shared_v4(to, uint4{x[0], x[1], x[2], x[3]});
  }
};

// dP and dS; columns [kLow, kHeadDim) of dV if there are any, [kHigh, kHeadDim) of dK.
template <class T, int kHeadDim, BwdPairKind kKind>
struct BwdPairDscores : BwdPairConsumer<T, kHeadDim, kKind> {
  using Base = BwdPairConsumer<T, kHeadDim, kKind>;
  using Layout = typename Base::Layout;
  using Base::Base, Base::p, Base::launch, Base::smem, Base::lane, Base::dout, Base::kTileM,
      Base::kScoreMod;

  using TileLowQ = typename Layout::TileLow;
  static constexpr int kFirstQ = Layout::kHigh / 64 * Layout::TileStream::kSlabBytes;
  static constexpr bool kHasHighV = Layout::kHasHighV;

  FA_DEVICE void run(const BwdTile& tile, int index) {
    typename Base::High acc_dv;
    typename Base::Low acc_dk;
    acc_dv.clear();
    acc_dk.clear();
    ptx::wgmma_pin(acc_dv.x[0]);
    ptx::wgmma_pin(acc_dk.x[0]);
    typename Base::Scores acc_dp;
    BwdStep step = BwdStep::first(launch, tile);
    this->wait_for_kept(tile, Layout::smem_v(smem), Layout::kVBarriers);
    issue_dp_low(acc_dp, tile, step, true);
    if constexpr (kHasHighV) issue_dp_high(acc_dp, tile, step, true);
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_pin(acc_dp.x[0]);
#pragma unroll 1
    for (int n = 0; n < tile.num_steps; ++n) {
      // dP of this step is complete.
      this->release_dout();  // the low part
      this->q_at(n).wait_full();
      this->probs_at(n).wait_full();
      const typename Base::Operand operand = load_probs(n);
      if constexpr (kHasHighV)
        this->accumulate(acc_dv, operand,
                         typename Layout::TileHigh{Layout::smem_dout(smem, dout.stage)});
      to_dscores_of_step(operand, acc_dp, n);
      this->scores_at(n).wait_full();  // all warps of the warpgroup have stored
      this->accumulate(acc_dk, Layout::smem_scores(smem, this->scores_at(n).stage),
                       TileLowQ{Layout::smem_q(smem, this->q_at(n).stage).base + kFirstQ});
      if constexpr (kHasHighV) {
        ptx::wgmma_wait_group<1>();  // dV is complete
        ptx::wgmma_pin(acc_dv.x[0]);
        this->release_dout();  // the high part
      }
      // Behind the last step, dP is of some old tile, which nobody reads.
      const bool is_new = n + 1 < tile.num_steps;
      if (is_new) step.advance(tile.blocks);
      issue_dp_low(acc_dp, tile, step, is_new);
      ptx::wgmma_wait_group<1>();  // dK is complete
      ptx::wgmma_pin(acc_dk.x[0]);
      release_by_warp(this->scores_at(n), lane);
      release_by_warp(this->q_at(n), lane);
      if constexpr (kHasHighV) issue_dp_high(acc_dp, tile, step, is_new);
      ptx::wgmma_wait_group<0>();
      ptx::wgmma_pin(acc_dp.x[0]);
    }
    this->store(index, [&](const BwdTile& stored) {
      if constexpr (kHasHighV) this->store_dv(acc_dv, stored, Layout::kLow);
      this->store_dk(acc_dk, stored, Layout::kHigh);
    });
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

  FA_DEVICE typename Base::Operand load_probs(int n) const {
    const uint32_t from = this->handover(Layout::smem_scores(smem, this->probs_at(n).stage).base);
    typename Base::Operand operand;
    FA_UNROLL
    for (int k = 0; k < kTileM / 16; ++k)
      load_operand(operand.x[0][k], from + k * Base::kPartBytes);
    return operand;
  }
  FA_DEVICE void load_operand(uint32_t (&operand)[4], uint32_t from) const {
    const uint4 x = ptx::ld_shared_v4(from);
    operand[0] = x.x, operand[1] = x.y, operand[2] = x.z, operand[3] = x.w;
  }

  // dS takes the place of P in shared memory: this warp has read its rows.
  FA_DEVICE void to_dscores_of_step(const typename Base::Operand& operand,
                                    const typename Base::Scores& acc_dp, int n) const {
    const uint32_t deltas = Layout::statistics(smem, this->q_at(n).stage) + Layout::kStatisticBytes;
    const uint32_t to = Layout::smem_scores(smem, this->scores_at(n).stage)
                            .chunk_address(this->warp_row + lane % 16, lane / 16);
    __syncwarp();
    FA_UNROLL
    for (int k = 0; k < kTileM / 16; ++k) {
      uint32_t x[4];
      if constexpr (kScoreMod) {
        load_operand(x, this->handover(smem + Layout::kPassed) + k * Base::kPartBytes);
      } else {
        FA_UNROLL
        for (int i = 0; i < 4; ++i) x[i] = operand.x[0][k][i];
      }
      to_dscores<T>(x, score_part(acc_dp, k),
                    load_statistic<2>(deltas + k * 16 * sizeof(float), lane),
                    kScoreMod ? mod_kinds(p.score) : ModKinds{}, drop_factor(p.score));
      ptx::stmatrix_x4(to ^ (k * 32), x);
    }
    ptx::fence_proxy_async();
    __syncwarp();
    if (lane == 0) ptx::mbarrier_arrive(this->scores_at(n).full());
  }
};

template <class T, int kHeadDim, BwdPairKind kKind>
__global__ void __cluster_dims__(2, 1, 1)
    __launch_bounds__(BwdPairLayout<T, kHeadDim, kKind>::kThreads, 1)
        bwd_pair_kernel(const __grid_constant__ BwdParams p,
                        const __grid_constant__ BwdLaunch launch) {
  using Layout = BwdPairLayout<T, kHeadDim, kKind>;
  extern __shared__ __align__(1024) char smem[];
  const uint32_t smem_base = ptx::cvta_to_shared(smem);
  if (threadIdx.x == 0) {
    ptx::prefetch_tensormap(&launch.q);
    ptx::prefetch_tensormap(&launch.k);
    ptx::prefetch_tensormap(&launch.v);
    ptx::prefetch_tensormap(&launch.dout);
    Layout::init_barriers(smem_base);
  }
  __shared__ int tile_index;
  const bool deals = launch.next_tile != nullptr && threadIdx.x == 0 && ptx::cluster_rank() == 0;
  const int next = deals ? atomicAdd(launch.next_tile, 1) : 0;
  ptx::cluster_sync();  // both CTAs run, and their barriers are initialised
  if (launch.next_tile != nullptr) {
    for (int i = 0; deals && i < Layout::kCtas; ++i)
      ptx::st_cluster_s32(ptx::cluster_address(ptx::cvta_to_shared(&tile_index), i), next);
    ptx::cluster_sync();  // both know their tile
  }
  const int warpgroup = ptx::warpgroup_index(), rank = ptx::cluster_rank();
  const int lane = threadIdx.x % kWarpSize;
  const int index = launch.next_tile != nullptr ? tile_index : blockIdx.x / Layout::kCtas;
  if (warpgroup == 0) {
    ptx::setmaxnreg_dec<Layout::kRegisters.producer>();
    const BwdTile tile = bwd_tile(p, launch, index);
    const int warp = __shfl_sync(0xffffffffu, threadIdx.x / kWarpSize, 0);
    if (threadIdx.x == 0) BwdPairProducer<Layout>(p, launch, smem_base, rank).run(tile);
    if (warp == 1) BwdStatistics<Layout>{p, launch, smem_base, lane}.run(tile);
    if (threadIdx.x == 2 * kWarpSize) send_dscores<Layout>(tile, smem_base, 1 - rank);
    __syncwarp();
  } else if (warpgroup == 1) {
    ptx::setmaxnreg_dec<Layout::kRegisters.dq>();
    const BwdTile tile = bwd_tile(p, launch, index);
    if (tile.num_steps > 0) BwdPairDq<T, Layout>(p, launch, smem_base, rank).run(tile);
  } else {
    ptx::setmaxnreg_inc<Layout::kRegisters.consumer>();
    const BwdTile tile = bwd_tile(p, launch, index);
    if (tile.num_steps == 0) {
      constexpr int kThreads = 2 * Layout::kCtas * kWarpgroupSize;
      const int thread = threadIdx.x - 2 * kWarpgroupSize + rank * 2 * kWarpgroupSize;
      clear_gradients<T, kThreads>(p, launch, tile, thread);
    } else if (warpgroup == 2) {
      BwdPairProbs<T, kHeadDim, kKind>(p, launch, smem_base, rank, 1).run(tile, index);
    } else {
      BwdPairDscores<T, kHeadDim, kKind>(p, launch, smem_base, rank, 2).run(tile, index);
    }
  }
  ptx::cluster_sync();  // nobody arrives at this CTA's barriers or writes its memory any more
}

template <class T, int kHeadDim, BwdPairKind kKind>
int launch_bwd_pair_kernel(const BwdParams& p, const BwdLaunch& launch, cudaStream_t stream) {
  using Layout = BwdPairLayout<T, kHeadDim, kKind>;
  constexpr auto kKernel = bwd_pair_kernel<T, kHeadDim, kKind>;
  const cudaError_t error = allow_dynamic_smem<kKernel>(Layout::kSmemBytes);
  if (error != cudaSuccess) return error;
  kKernel<<<launch.num_tiles * Layout::kCtas, Layout::kThreads, Layout::kSmemBytes, stream>>>(
      p, launch);
  return cudaGetLastError();
}

}  // namespace fa
