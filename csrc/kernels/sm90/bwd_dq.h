// The warpgroup of the SM90 backward that computes dQ = dS K, and the warps that add dQ up.
//
// The sums of a tile pass through shared memory in the order of the registers, and TMA adds them to
// dq_accum in L2: [column / 8][thread][4] floats a tile of queries. bwd_postprocess.cuh rounds
// them. Order of the additions: core/bwd_order.h.
// BwdKind::kCompleteDq: in that order the first tile of keys writes the sums, others add to them,
// and for the last TMA brings them back, so that the warpgroup adds its own and writes dQ. Nobody
// zeroes dq_accum or reads it later, and where one tile has all keys it is not used.
#pragma once
#include "kernels/common/bwd_rows.h"
#include "kernels/sm90/bwd_layout.h"
#include "ptx/barrier.h"
#include "ptx/opaque.h"
#include "ptx/reduction.h"
#include "ptx/shared_memory.h"
#include "ptx/tma.h"
#include "tile/store_sm90.h"

namespace fa {

template <class T, class Layout, BwdKind kKind>
struct BwdDq {
  using Scores = typename Layout::ScoresPipeline;
  static constexpr int kCols = Layout::kDqCols, kParts = Layout::kDqParts;
  using Accum = AccumTile<1, kCols / 8>;

  const BwdParams& p;
  uint32_t smem;
  int thread, lane;

  FA_DEVICE BwdDq(const BwdParams& params, uint32_t smem_base)
      : p(params),
        smem(smem_base),
        thread(threadIdx.x % kWarpgroupSize),
        lane(threadIdx.x % kWarpSize) {}

  FA_DEVICE void run(int num_steps) const {
    auto scores = Scores::consumer(smem + Layout::kScoresBarriers);
    uint32_t sums_parity = 0;
    if (num_steps > 0) Layout::KeptPipeline::consumer(smem + Layout::kKBarriers).wait_full();
#pragma unroll 1
    for (int n = 0; n < num_steps; ++n) {
      const int adder = n % Layout::kDqAdders;
      [[maybe_unused]] bool had_sums = false;
      FA_UNROLL
      for (int part = 0; part < kParts; ++part) {
        Accum acc;
        multiply(acc, scores, part);
        ptx::bar_sync(Layout::kDqEmpty + part, Layout::kDqThreads);  // its last sums have been read
        if constexpr (kKind == BwdKind::kCompleteDq) {
          const auto to = BwdDqTarget::load(Layout::dq_target(smem, adder));
          had_sums = to.has_sums;
          if (to.has_sums) add_sums(acc, part, sums_parity);
          if (to.rows == 0) write_sums(acc, part);
          ptx::bar_arrive(Layout::kDqFull + adder * kParts + part, Layout::kDqThreads);
          if (to.rows != 0) store(acc, part, to);
        } else {
          write_sums(acc, part);
          ptx::bar_arrive(Layout::kDqFull + adder * kParts + part, Layout::kDqThreads);
        }
      }
      if (had_sums) sums_parity ^= 1;
      scores.advance();
    }
  }

  // dS K of all keys, columns [kCols part, kCols part + kCols).
  FA_DEVICE void multiply(Accum& acc, Scores scores, int part) const {
    ptx::wgmma_pin(acc.x[0]);
    FA_UNROLL
    for (int i = 0; i < Layout::kConsumers; ++i) {
      scores.barriers = Layout::scores_barriers(smem, i);
      if (part == 0) scores.wait_full();
      ptx::wgmma_fence();
      const uint32_t k_part =
          Layout::smem_k(smem, i).base + part * (kCols / 64) * Layout::TileKept::kSlabBytes;
      warpgroup_gemm_atb<T>(acc, Layout::smem_scores(smem, i, scores.stage),
                            SwizzledTile<Layout::kKeys, kCols>{k_part}, i > 0);
    }
    ptx::wgmma_commit_group();
    ptx::wgmma_wait_group<0>();
    ptx::wgmma_pin(acc.x[0]);
    if (part != kParts - 1) return;
    __syncwarp();
    if (lane < Layout::kConsumers) {
      scores.barriers = Layout::scores_barriers(smem, lane);
      scores.release();
    }
  }

  // Sums to shared memory, for the warp that adds them.
  FA_DEVICE void write_sums(const Accum& acc, int part) const {
    FA_UNROLL
    for (int n = 0; n < kCols / 8; ++n) {
      const float (&x)[4] = acc.x[0][n];
      ptx::st_shared_v4(Layout::smem_dq(smem, part) + (n * kWarpgroupSize + thread) * 16,
                        uint4{__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]),
                              __float_as_uint(x[3])});
    }
    ptx::fence_proxy_async();
  }
  // Adds the sums of the other tiles of keys, once they are in shared memory.
  FA_DEVICE void add_sums(Accum& acc, int part, uint32_t parity) const {
    ptx::mbarrier_wait(smem + Layout::kDqSumsBarriers + 8 * part, parity);
    FA_UNROLL
    for (int n = 0; n < kCols / 8; ++n) {
      const uint4 sums =
          ptx::ld_shared_v4(Layout::smem_dq(smem, part) + (n * kWarpgroupSize + thread) * 16);
      acc.x[0][n][0] += __uint_as_float(sums.x);
      acc.x[0][n][1] += __uint_as_float(sums.y);
      acc.x[0][n][2] += __uint_as_float(sums.z);
      acc.x[0][n][3] += __uint_as_float(sums.w);
    }
  }
  // Rounds dQ and writes it. Rows that exist and do not attend become 0.
  FA_DEVICE void store(const Accum& acc, int part, const BwdDqTarget& to) const {
    const int first_row = ptx::opaque(thread) / kWarpSize * 16 + lane / 4;  // held, it would spill
    FA_UNROLL
    for (int r = 0; r < 2; ++r) {
      const int row = first_row + r * 8;
      T* out = reinterpret_cast<T*>(to.rows) + row * p.dq_strides.token + part * kCols;
      store_row_by_quad(out, acc.x[0], r, p.score.softmax_scale, row >= to.num_rows,
                        row < to.num_stored, p.head_dim - part * kCols, lane);
    }
  }
};

// The warps that add dQ's sums up in global memory, every other step each: in order, the additions
// of one are not complete before the next begin. Lane 0 waits for turns, so that nobody else does.
template <class T, class Layout, BwdKind kKind>
struct BwdDqAdder {
  static constexpr bool kCompletes = kKind == BwdKind::kCompleteDq;
  static constexpr int kParts = Layout::kDqParts;
  static constexpr int kPartElements = Layout::kTileM * Layout::kDqCols;

  const BwdParams& p;
  const BwdLaunch& launch;
  uint32_t smem;
  int adder, lane;

  FA_DEVICE void run(const BwdTile& tile) const {
    if (tile.num_steps == 0) return;
    BwdStep step = BwdStep::first(launch, tile);
    if (adder == 1) {  // the buffers are free
      const Turns turns{{}, turn_at(tile, step)};
      FA_UNROLL
      for (int part = 0; part < kParts; ++part) pass_on(part, turns);
      step.advance(tile.blocks);
    }
#pragma unroll 1
    for (int steps_left = tile.num_steps - adder; steps_left > 0; steps_left -= 2) {
      BwdStep next = step;
      next.advance(tile.blocks);
      const Turns turns{turn_at(tile, step), turn_at(tile, next)};
      if (kCompletes && turns.own.is_last()) {
        complete(tile, step, turns);
      } else {
        add(tile, step, turns);
      }
      step = next;
      step.advance(tile.blocks);
    }
    if (lane == 0) ptx::cp_async_bulk_wait_group<0>();
  }

  struct Turns {
    BwdTurn own, next;  // of a step of this warp, and of the one behind it
  };
  FA_DEVICE BwdTurn turn_at(const BwdTile& tile, BwdStep step) const {
    return launch.in_order ? bwd_order(launch, tile).turn(tile.n_block, step.m_block)
                           : BwdTurn{0, 1};
  }

  FA_DEVICE void add(const BwdTile& tile, BwdStep step, const Turns& turns) const {
    const int index = tile_index(tile, step);
    if (lane == 0) wait_for(index, turns.own.before);
    __syncwarp();
    FA_UNROLL
    for (int part = 0; part < kParts; ++part) {
      wait_full(part);
      if (lane == 0) {
        if (kCompletes && turns.own.is_first()) {
          ptx::cp_async_bulk_store(sums(index, part), Layout::smem_dq(smem, part),
                                   Layout::kDqPartBytes);
        } else {
          ptx::cp_reduce_async_bulk_add_f32(sums(index, part), Layout::smem_dq(smem, part),
                                            Layout::kDqPartBytes);
        }
        ptx::cp_async_bulk_commit_group();
      }
      __syncwarp();
    }
    pass_on_when_read<0>(turns);
    if constexpr (kParts > 1) pass_on_when_read<1>(turns);
    if (launch.in_order && lane == 0) {
      ptx::cp_async_bulk_wait_group<0>();
      ptx::red_release_gpu_add_s32(p.dq_semaphore + index, 1);
    }
  }

  // The last turn: brings the sums back into the buffers, for the dQ warpgroup to write dQ.
  FA_DEVICE void complete(const BwdTile& tile, BwdStep step, const Turns& turns) const {
    const int index = tile_index(tile, step);
    const bool has_sums = !turns.own.is_first();
    if (lane == 0) {
      target(tile, step, has_sums).store(Layout::dq_target(smem, adder));
      wait_for(index, turns.own.before);
    }
    __syncwarp();
    FA_UNROLL
    for (int part = 0; part < kParts; ++part) {
      ptx::bar_sync(barrier_of(Layout::kDqFree, adder, part), 2 * kWarpSize);
      if (has_sums && lane == 0) {
        const uint32_t barrier = smem + Layout::kDqSumsBarriers + 8 * part;
        ptx::mbarrier_arrive_expect_tx(barrier, Layout::kDqPartBytes);
        ptx::cp_async_bulk_load(Layout::smem_dq(smem, part), sums(index, part),
                                Layout::kDqPartBytes, barrier);
      }
      __syncwarp();
      ptx::bar_arrive(Layout::kDqEmpty + part, Layout::kDqThreads);
    }
    FA_UNROLL
    for (int part = 0; part < kParts; ++part) {
      wait_full(part);
      pass_on(part, turns);
    }
  }

  FA_DEVICE BwdDqTarget target(const BwdTile& tile, BwdStep step, bool has_sums) const {
    const int first = step.m_block * kBwdTileM;
    return {reinterpret_cast<uint64_t>(dq_row<T>(p, tile, step.head, first)),
            static_cast<uint32_t>(min(tile.q_seq.seqlen - first, kBwdTileM)),
            static_cast<uint32_t>(min(tile.q_seq.stored - first, kBwdTileM)), has_sums};
  }

  // At most 2^31 tiles of queries, says the plan.
  FA_DEVICE int tile_index(const BwdTile& tile, BwdStep step) const {
    return static_cast<int>(
        bwd_dq_tile_index(p, kBwdTileM, tile.batch, tile.q_seq.first_row, step.m_block, step.head));
  }
  FA_DEVICE float* sums(int index, int part) const {
    return p.dq_accum + (int64_t{index} * kParts + part) * kPartElements;
  }
  // One lane: waits until `before` tiles of keys have added to a tile of queries.
  FA_DEVICE void wait_for(int index, int before) const {
    if (before == 0) return;
    while (ptx::ld_acquire_gpu_s32(p.dq_semaphore + index) < before) {
    }
    ptx::fence_proxy_async_global();  // what they added is read and added to by TMA
  }
  FA_DEVICE void wait_full(int part) const {
    ptx::bar_sync(barrier_of(Layout::kDqFull, adder, part), Layout::kDqThreads);
  }
  // Found anew each time: held, these numbers would spill.
  static FA_DEVICE int barrier_of(int first, int adder, int part) {
    return first + ptx::opaque(adder) * kParts + part;
  }

  // Passes a free buffer on to the next step: to the dQ warpgroup, or, if dQ is completed there, to
  // the warp that fills it with the sums.
  FA_DEVICE void pass_on(int part, const Turns& turns) const {
    if (kCompletes && turns.next.is_last())
      return ptx::bar_arrive(barrier_of(Layout::kDqFree, adder ^ 1, part), 2 * kWarpSize);
    if (kCompletes && part == 0) {
      if (lane == 0) BwdDqTarget{}.store(Layout::dq_target(smem, adder ^ 1));
      __syncwarp();
    }
    ptx::bar_arrive(Layout::kDqEmpty + part, Layout::kDqThreads);
  }
  template <int kPart>
  FA_DEVICE void pass_on_when_read(const Turns& turns) const {
    if (lane == 0) ptx::cp_async_bulk_wait_group_read<kParts - 1 - kPart>();
    __syncwarp();
    pass_on(kPart, turns);
  }
};

}  // namespace fa
