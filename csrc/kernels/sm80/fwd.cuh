// FlashAttention forward with mma.sync and cp.async, for compute capability 8.0 and newer.
//
// One CTA computes tile_m rows of O for one (head, batch):
//   for n_block = last ... first:  S = Q K^T;  mask(S);  P = softmax weights of S;  O += P V
// Memory: smem_q [tile_m, head_dim], num_stages of smem_k and smem_v [tile_n, head_dim], rows
// swizzled (core/swizzle.h); O leaves through smem_q. Where Q stays in registers it arrives through
// the K and V buffers. A warp owns warp_rows rows and all columns; or, where O is too wide for
// that, a pair of warps owns warp_rows rows, each warp half of the keys of S and half of the
// columns of O, and P goes through smem_p [tile_m, tile_n]: half the shared memory traffic of two
// warps with half the rows each. Barriers: with two stages one a step, which says that the step's
// keys and values have arrived and that the buffers of the step before are free. With one stage
// two: V loads while S is computed, the next K while O is. Tiles: core/tile_config.h. Numbers:
// docs/performance/sm80_forward.md. Algorithm: FlashAttention-2, arXiv:2307.08691, algorithm 1.
#pragma once
#include <cuda_runtime.h>

#include <type_traits>

#include "attention/apply_mask.h"
#include "attention/score_mod.h"
#include "attention/softmax.h"
#include "core/lse_rows.h"
#include "core/mask.h"
#include "core/params.h"
#include "core/tile_config.h"
#include "core/tile_scheduler.h"
#include "kernels/launch.h"
#include "ptx/global_memory.h"
#include "ptx/shared_memory.h"
#include "tile/copy_sm80.h"

namespace fa {

// The tile that a CTA computes; tile.m_block < 0: none. It lies in shared memory: most of it is
// needed before and behind the loop only, in which every register counts.
struct FwdWork {
  TileCoord tile;
  SeqlenInfo q_seq, k_seq;
  MaskSpec mask;
  BlockRange blocks;
  const void* k;  // row 0 of this tile's sequence and head
  const void* v;
};

// What the launcher adds to the parameters.
struct FwdLaunch {
  TileGrid tiles;       // fixed length
  int heads_per_group;  // (head, batch) pairs whose keys stay in L2 together
  bool longest_first;
  float scale_log2;  // of the softmax: softmax_scale * log2(e); 1 behind a ScoreMod
};

template <class T>
FA_DEVICE const T* row_of(const void* tensor, const Strides& strides, int batch, int64_t row,
                          int head) {
  return static_cast<const T*>(tensor) +
         element_offset(strides.batch, strides.token, strides.head, batch, row, head);
}

template <class T, int kTileM, int kTileN>
FA_DEVICE FwdWork fwd_work(const FwdParams& p, const FwdLaunch& launch) {
  FwdWork work;
  work.tile = p.seqlens_q.cu_seqlens != nullptr
                  ? varlen_tile_coord(p.seqlens_q.cu_seqlens, p.batch_size, kTileM, p.num_heads_q,
                                      blockIdx.x)
                  : tile_coord_grouped(launch.tiles, blockIdx.x, launch.longest_first,
                                       launch.heads_per_group);
  if (work.tile.m_block < 0) return work;
  work.q_seq = seqlen_info(p.seqlens_q, work.tile.batch);
  work.k_seq = seqlen_info(p.seqlens_k, work.tile.batch);
  work.mask =
      mask_spec(work.q_seq.seqlen, work.k_seq.seqlen, p.score.window_left, p.score.window_right);
  work.blocks = n_block_range(work.mask, work.tile.m_block, kTileM, kTileN);
  const int head_kv = work.tile.head / (p.num_heads_q / p.num_heads_kv);
  work.k = row_of<T>(p.k, p.k_strides, work.tile.batch, work.k_seq.first_row, head_kv);
  work.v = row_of<T>(p.v, p.v_strides, work.tile.batch, work.k_seq.first_row, head_kv);
  return work;
}

// Varlen: a CTA without a tile writes out = 0, lse = -inf for its share of the rows behind the last
// sequence. The launch has at least one such CTA for each head.
template <class T, int kTileM>
FA_DEVICE void clear_rows_behind(const FwdParams& p) {
  const int* cu_seqlens = p.seqlens_q.cu_seqlens;
  const int last = p.batch_size - 1, end = cu_seqlens[p.batch_size];
  const int first_free = last < 0 ? 0
                                  : varlen_first_slot(cu_seqlens[last], kTileM, last) +
                                        ceil_div(end - cu_seqlens[last], kTileM);
  const int slot = blockIdx.x / p.num_heads_q, head = blockIdx.x % p.num_heads_q;
  if (slot < first_free) return;
  const int num_free = gridDim.x / p.num_heads_q - first_free;
  const int chunks = p.head_dim_v / 8;
  for (int begin = end + (slot - first_free) * kTileM; begin < p.total_q;
       begin += num_free * kTileM) {
    const int rows = min(kTileM, p.total_q - begin);
    for (int i = threadIdx.x; i < rows * chunks; i += blockDim.x) {
      T* row = static_cast<T*>(p.out) + (begin + i / chunks) * p.out_strides.token +
               head * p.out_strides.head;
      ptx::st_global_v4(row + i % chunks * 8, uint4{0, 0, 0, 0});
    }
    for (int i = threadIdx.x; i < rows; i += blockDim.x) lse_rows(p, 0, head, begin)[i] = -INFINITY;
  }
}

// One CTA's computation: the stages of the loop as functions, and what they share.
template <class T, int kHeadDim, Arch kTiles, bool kScoreMod>
struct FwdCta {
  static constexpr FwdTileConfig kTile = sm80_fwd_tile_config(kTiles, kHeadDim);
  static constexpr int kThreads = fwd_compute_threads(kTile);
  static constexpr int kParts = kTile.warps_per_row;
  static constexpr int kWarpRows = kTile.tile_m * kParts / kTile.num_warps;
  static constexpr int kM = kWarpRows / 16;             // bands of a warp
  static constexpr int kN = kTile.tile_n / kParts / 8;  // accumulator columns of S
  static constexpr int kD = kHeadDim / kParts / 8;      // of O
  static constexpr int kSteps = kHeadDim / 16;          // k-steps of Q K^T
  using TileQ = SmemTile<kTile.tile_m, kHeadDim>;
  using TileKv = SmemTile<kTile.tile_n, kHeadDim>;
  static constexpr int kQBytes = kTile.q_in_regs ? 0 : TileQ::kBytes;
  static constexpr int kSmemBytes = fwd_smem_bytes(kTile, kHeadDim, kHeadDim);
  using TileP = SmemTile<kTile.tile_m, kTile.tile_n>;  // exists if kParts == 2
  using Rows = std::conditional_t<kParts == 1, RowsOfWarp, RowsOfPair>;
  static constexpr int kPairBufferFloats = kParts == 1 ? 1 : 2 * kTile.tile_m;
  static_assert(kParts == 1 || kParts == 2);
  static_assert(kWarpRows % 16 == 0 && kTile.tile_n / kParts % 32 == 0);
  static_assert(kParts == 1 || kD * 8 % 64 == 0,
                "the swizzle of V has to look alike in both halves");

  const FwdParams& p;
  const FwdWork& work;      // in shared memory
  const ScoreMod& mod;      // in shared memory; set iff kScoreMod
  const float& scale_log2;  // of the softmax, a kernel parameter
  float* pair_buffer;       // [kPairBufferFloats], in shared memory
  uint32_t smem;
  int warp_row, part, lane;  // first row of this warp in the tile; which half of the columns it has
  BlockAddress<TileQ::kRowBytes> by_rows, by_columns;
  AFragments<kM, kTile.q_in_regs ? kSteps : 1> q;

  FA_DEVICE FwdCta(const FwdParams& params, const FwdWork& cta_work, const ScoreMod& score_mod,
                   const float& softmax_scale_log2, float* buffer, uint32_t smem_base)
      : p(params),
        work(cta_work),
        mod(score_mod),
        scale_log2(softmax_scale_log2),
        pair_buffer(buffer),
        smem(smem_base),
        warp_row(threadIdx.x / (kWarpSize * kParts) * kWarpRows),
        part(threadIdx.x / kWarpSize % kParts),
        lane(threadIdx.x % kWarpSize),
        by_rows(BlockAddress<TileQ::kRowBytes>::by_rows(lane)),
        by_columns(BlockAddress<TileQ::kRowBytes>::by_columns(lane)) {}

  FA_DEVICE uint32_t smem_k(int stage) const { return smem + kQBytes + stage * 2 * TileKv::kBytes; }
  FA_DEVICE uint32_t smem_v(int stage) const { return smem_k(stage) + TileKv::kBytes; }
  FA_DEVICE uint32_t smem_q() const { return smem; }
  FA_DEVICE int first_row() const { return work.tile.m_block * kTile.tile_m; }
  FA_DEVICE ScoreOrigin origin(int n_block) const {
    return {first_row() + warp_row, n_block * kTile.tile_n + part * (kN * 8)};
  }
  FA_DEVICE TileP smem_p() const { return {smem_k(kTile.num_stages)}; }
  FA_DEVICE Rows rows() const {
    if constexpr (kParts == 1) {
      return {};
    } else {
      const int pair = warp_row / kWarpRows;
      return {1 + pair, part, pair_buffer + pair * 2 * kWarpRows};
    }
  }

  FA_DEVICE void load_q() const {
    const T* first = row_of<T>(p.q, p.q_strides, work.tile.batch,
                               work.q_seq.first_row + first_row(), work.tile.head);
    load_tile_async<kThreads>(
        TileQ{smem_q()},
        GmemRows<const T>{first, p.q_strides.token, work.q_seq.seqlen - first_row(), p.head_dim},
        threadIdx.x);
  }
  FA_DEVICE GmemRows<const T> rows_of_block(const void* first, int64_t row_stride, int n_block,
                                            int num_cols) const {
    const int row = n_block * kTile.tile_n;
    return {static_cast<const T*>(first) + row * row_stride, row_stride, work.k_seq.seqlen - row,
            num_cols};
  }
  FA_DEVICE void load_k(int n_block, int stage) const {
    load_tile_async<kThreads>(TileKv{smem_k(stage)},
                              rows_of_block(work.k, p.k_strides.token, n_block, p.head_dim),
                              threadIdx.x);
  }
  FA_DEVICE void load_v(int n_block, int stage) const {
    load_tile_async<kThreads>(TileKv{smem_v(stage)},
                              rows_of_block(work.v, p.v_strides.token, n_block, p.head_dim_v),
                              threadIdx.x);
  }

  FA_DEVICE void load_q_operand(int m, int k, uint32_t (&a)[4]) const {
    ptx::ldmatrix_x4(a, smem_q() + by_rows.offset(warp_row + 16 * m, k));
  }
  FA_DEVICE void keep_q_in_registers() {
    FA_UNROLL
    for (int m = 0; m < kM; ++m) {
      FA_UNROLL
      for (int k = 0; k < kSteps; ++k) load_q_operand(m, k, q.x[m][k]);
    }
  }

  // S = Q K^T.
  FA_DEVICE void multiply_qk(AccumTile<kM, kN>& acc_s, int stage) const {
    acc_s.clear();
    const uint32_t k_base = smem_k(stage) + part * (kN * 8 * TileKv::kRowBytes);
    warp_gemm<T, kSteps>(
        acc_s,
        [&](int m, int k, uint32_t (&a)[4]) {
          if constexpr (kTile.q_in_regs) {
            FA_UNROLL
            for (int i = 0; i < 4; ++i) a[i] = q.x[m][k][i];
          } else {
            load_q_operand(m, k, a);
          }
        },
        [&](int n, int k, uint32_t (&b)[4]) {
          ptx::ldmatrix_x4(b, k_base + by_columns.offset(16 * n, k));
        });
  }

  // O += P V.
  FA_DEVICE void multiply_pv(AccumTile<kM, kD>& acc_o, const AccumTile<kM, kN>& acc_p,
                             int stage) const {
    const uint32_t v_base = smem_v(stage) + part * (kD * 8 * 2);
    const auto load_v_operand = [&](int n, int k, uint32_t (&b)[4]) {
      ptx::ldmatrix_x4_trans(b, v_base + by_rows.offset(16 * k, n));
    };
    if constexpr (kParts == 1) {
      const AFragments<kM, kN / 2> weights = as_a_operand<T>(acc_p);
      warp_gemm<T, kN / 2>(
          acc_o,
          [&](int m, int k, uint32_t (&a)[4]) {
            FA_UNROLL
            for (int i = 0; i < 4; ++i) a[i] = weights.x[m][k][i];
          },
          load_v_operand);
    } else {
      share_weights(acc_p);
      const auto p_rows = BlockAddress<TileP::kRowBytes>::by_rows(lane);
      warp_gemm<T, kTile.tile_n / 16>(
          acc_o,
          [&](int m, int k, uint32_t (&a)[4]) {
            ptx::ldmatrix_x4(a, smem_p().base + p_rows.offset(warp_row + 16 * m, k));
          },
          load_v_operand);
    }
  }

  // This warp's half of P for both warps of the pair. The P before is read by then: both have met
  // in the softmax since.
  FA_DEVICE void share_weights(const AccumTile<kM, kN>& acc_p) const {
    FA_UNROLL
    for (int r = 0; r < 2 * kM; ++r) {
      FA_UNROLL
      for (int n = 0; n < kN; ++n) {
        const float* x = &acc_p.x[r / 2][n][r % 2 * 2];
        ptx::st_shared_u32(
            smem_p().chunk_address(warp_row + r * 8 + lane / 4, part * kN + n) + lane % 4 * 4,
            pack<T>(x[0], x[1]));
      }
    }
    ptx::bar_sync(rows().barrier, 2 * kWarpSize);  // both halves of P are written
  }

  // Raw scores become masked scores, in the units of the softmax.
  FA_DEVICE void modify_scores(AccumTile<kM, kN>& acc_s, int n_block) const {
    if constexpr (kScoreMod) mod.score(acc_s, origin(n_block), lane);
    if (n_block >= work.blocks.full_end || n_block < work.blocks.full_begin)
      apply_mask(acc_s, work.mask, origin(n_block), lane);
  }
  FA_DEVICE void drop(AccumTile<kM, kN>& acc_p, int n_block) const {
    if (mod.keep_threshold == 256) return;
    mod.template for_each_kept<kM, kN>(origin(n_block), lane,
                                       [&](int m, int n, int reg, bool kept) {
                                         if (!kept) acc_p.x[m][n][reg] = 0.f;
                                       });
  }

  // Everything: O and the softmax statistics of this warp's rows.
  FA_DEVICE void run(AccumTile<kM, kD>& acc_o, OnlineSoftmax<T, kM>& softmax) {
    int n_block = work.blocks.end - 1, stage = 0;
    load_q();
    if constexpr (kTile.q_in_regs) {
      ptx::cp_async_commit_group();
      ptx::cp_async_wait_group<0>();
      __syncthreads();  // Q is complete
      keep_q_in_registers();
      __syncthreads();  // and read by all: its place becomes K's and V's
    }
    load_k(n_block, stage);
    if constexpr (kTile.num_stages == 2) load_v(n_block, stage);
    ptx::cp_async_commit_group();

    for (; n_block >= work.blocks.begin; --n_block) {
      ptx::cp_async_wait_group<0>();
      // K of this step (two stages: and V) is complete, and nobody reads the other buffer any more.
      __syncthreads();
      if constexpr (kTile.num_stages == 1) load_v(n_block, stage);
      if constexpr (kTile.num_stages == 2) {
        if (n_block > work.blocks.begin) {
          load_k(n_block - 1, stage ^ 1);
          load_v(n_block - 1, stage ^ 1);
        }
      }
      ptx::cp_async_commit_group();

      AccumTile<kM, kN> acc_s;
      multiply_qk(acc_s, stage);
      if constexpr (kTile.num_stages == 1) {
        ptx::cp_async_wait_group<0>();
        __syncthreads();  // V of this step is complete, and nobody reads its K any more
        if (n_block > work.blocks.begin) load_k(n_block - 1, stage);
        ptx::cp_async_commit_group();
      }
      modify_scores(acc_s, n_block);
      softmax.step(acc_s, acc_o, scale_log2, rows());
      if constexpr (kScoreMod) drop(acc_s, n_block);
      multiply_pv(acc_o, acc_s, stage);
      if constexpr (kTile.num_stages == 2) stage ^= 1;
    }
    softmax.finish(rows());
  }

  // Probabilities before dropout, negative where dropped. Recomputes S block by block.
  FA_DEVICE void write_dmask(const OnlineSoftmax<T, kM>& softmax) {
    T* dmask = static_cast<T*>(p.dmask) +
               (static_cast<int64_t>(work.tile.batch) * p.num_heads_q + work.tile.head) *
                   p.dmask_rows * p.dmask_cols;
    for (int n_block = work.blocks.begin; n_block < work.blocks.end; ++n_block) {
      __syncthreads();  // nobody reads the K before any more
      load_k(n_block, 0);
      ptx::cp_async_commit_group();
      ptx::cp_async_wait_group<0>();
      __syncthreads();  // K is complete
      AccumTile<kM, kN> acc_s;
      multiply_qk(acc_s, 0);
      modify_scores(acc_s, n_block);
      const ScoreOrigin at = origin(n_block);
      mod.template for_each_kept<kM, kN>(at, lane, [&](int m, int n, int reg, bool kept) {
        const RowCol in_warp = accum_coord(lane, 4 * n + reg);
        const int row = at.first_row + 16 * m + in_warp.row, col = at.first_col + in_warp.col;
        if (row >= work.q_seq.seqlen || col >= work.k_seq.seqlen) return;
        const float lse_log2 = softmax.lse(2 * m + reg / 2, scale_log2) * kLog2e;
        const float x = acc_s.x[m][n][reg];
        const float weight = x == -INFINITY ? 0.f : ptx::ex2_approx_ftz(x - lse_log2);
        dmask[static_cast<int64_t>(row) * p.dmask_cols + col] = T(kept ? weight : -weight);
      });
    }
    __syncthreads();  // the epilogue may write where K was
  }

  // lse, and O through this warp's own rows of shared memory as whole 16-byte chunks.
  FA_DEVICE void store(const AccumTile<kM, kD>& acc_o, const OnlineSoftmax<T, kM>& softmax) const {
    const TileQ smem_o{smem_q()};
    const float dropout_scale = kScoreMod ? 256.f / p.score.keep_threshold : 1.f;
    float* lse = lse_rows(p, work.tile.batch, work.tile.head, work.q_seq.first_row) + first_row();
    __syncwarp();  // every lane has read its Q (the pair of warps: they met in the last step)
    FA_UNROLL
    for (int r = 0; r < 2 * kM; ++r) {
      const int row = warp_row + r * 8 + lane / 4, in_seq = first_row() + row;
      const bool exists = in_seq < work.q_seq.seqlen;
      if (part == 0 && lane % 4 == 0 && in_seq < work.q_seq.stored)
        lse[row] = exists ? softmax.lse(r, scale_log2) : -INFINITY;
      const float scale = output_scale(softmax.row_sum[r]) * dropout_scale;
      FA_UNROLL
      for (int d = 0; d < kD; ++d) {
        const float* x = &acc_o.x[r / 2][d][r % 2 * 2];
        ptx::st_shared_u32(smem_o.chunk_address(row, part * kD + d) + lane % 4 * 4,
                           exists ? pack<T>(x[0] * scale, x[1] * scale) : 0u);
      }
    }
    __syncwarp();  // the warp's rows (its columns of them) are complete
    constexpr int kLanes = TileCopy<TileQ, kThreads>::kLanes;
    T* out = static_cast<T*>(p.out) +
             element_offset(p.out_strides.batch, p.out_strides.token, p.out_strides.head,
                            work.tile.batch, work.q_seq.first_row + first_row(), work.tile.head);
    FA_UNROLL
    for (int pass = 0; pass < kWarpRows * kLanes / kWarpSize; ++pass) {
      const int row = warp_row + pass * (kWarpSize / kLanes) + lane / kLanes;
      if (first_row() + row >= work.q_seq.stored) continue;
      const int end_chunk = min(p.head_dim_v / 8, (part + 1) * kD);
      for (int chunk = part * kD + lane % kLanes; chunk < end_chunk; chunk += kLanes) {
        ptx::st_global_v4(out + row * p.out_strides.token + chunk * 8,
                          ptx::ld_shared_v4(smem_o.chunk_address(row, chunk)));
      }
    }
  }
};

template <class T, int kHeadDim, Arch kTiles, bool kScoreMod>
__global__ void __launch_bounds__(FwdCta<T, kHeadDim, kTiles, kScoreMod>::kThreads,
                                  256 / FwdCta<T, kHeadDim, kTiles, kScoreMod>::kThreads)
    fwd_kernel(const __grid_constant__ FwdParams p, const __grid_constant__ FwdLaunch launch) {
  using Cta = FwdCta<T, kHeadDim, kTiles, kScoreMod>;
  extern __shared__ __align__(128) char smem[];
  __shared__ FwdWork work;
  __shared__ ScoreMod mod;
  __shared__ float pair_buffer[Cta::kPairBufferFloats];
  if (threadIdx.x == 0) {
    work = fwd_work<T, Cta::kTile.tile_m, Cta::kTile.tile_n>(p, launch);
    if (kScoreMod && work.tile.m_block >= 0)
      mod = ScoreMod::of(p.score, work.mask, work.tile.batch, work.tile.head, p.num_heads_q);
  }
  __syncthreads();  // work and mod are complete
  if (work.tile.m_block < 0) return clear_rows_behind<T, Cta::kTile.tile_m>(p);

  Cta cta(p, work, mod, launch.scale_log2, pair_buffer, ptx::cvta_to_shared(smem));
  AccumTile<Cta::kM, Cta::kD> acc_o;
  acc_o.clear();
  OnlineSoftmax<T, Cta::kM> softmax;
  if (work.blocks.size() > 0) {
    cta.run(acc_o, softmax);
    if constexpr (kScoreMod) {
      if (p.dmask != nullptr) cta.write_dmask(softmax);
    }
  }
  if constexpr (Cta::kTile.q_in_regs) __syncthreads();  // O goes where K and V were
  cta.store(acc_o, softmax);
}

// Heads whose keys and values fill a share of the L2 cache that leaves room for Q and O.
constexpr int64_t kL2GroupBytes = 16 << 20;

template <class T, int kHeadDim, Arch kTiles, bool kScoreMod>
int launch_fwd_kernel(const FwdParams& p, cudaStream_t stream) {
  using Cta = FwdCta<T, kHeadDim, kTiles, kScoreMod>;
  constexpr auto kKernel = fwd_kernel<T, kHeadDim, kTiles, kScoreMod>;
  const bool varlen = p.seqlens_q.cu_seqlens != nullptr;
  const int64_t kv_bytes = int64_t{2} * p.seqlens_k.max_seqlen * (p.head_dim + p.head_dim_v);
  FwdLaunch launch;
  launch.tiles = {ceil_div(p.seqlens_q.max_seqlen, Cta::kTile.tile_m), p.num_heads_q, p.batch_size};
  launch.heads_per_group = l2_group_size(kv_bytes, p.num_heads_q / p.num_heads_kv, kL2GroupBytes);
  launch.longest_first = p.score.window_right >= 0;
  launch.scale_log2 = kScoreMod ? 1.f : p.score.softmax_scale * kLog2e;
  const int64_t ctas =
      varlen ? varlen_num_tiles(p.total_q, p.batch_size, Cta::kTile.tile_m, p.num_heads_q) +
                   p.num_heads_q  // one slot more: see clear_rows_behind
             : launch.tiles.size();
  const cudaError_t error = allow_dynamic_smem<kKernel>(Cta::kSmemBytes);
  if (error != cudaSuccess || ctas == 0) return error;
  kKernel<<<static_cast<unsigned>(ctas), Cta::kThreads, Cta::kSmemBytes, stream>>>(p, launch);
  return cudaGetLastError();
}

template <class T, int kHeadDim, Arch kTiles>
int launch_fwd_tiles(const FwdParams& p, cudaStream_t stream) {
  return has_score_mod(p.score) || p.dmask != nullptr
             ? launch_fwd_kernel<T, kHeadDim, kTiles, true>(p, stream)
             : launch_fwd_kernel<T, kHeadDim, kTiles, false>(p, stream);
}

template <class T, int kHeadDim>
int launch_fwd(const FwdParams& p, cudaStream_t stream) {
  switch (p.tiles) {
    case Arch::kSm89: return launch_fwd_tiles<T, kHeadDim, Arch::kSm89>(p, stream);
    case Arch::kSm90:  // one size has tiles of its own there
      if constexpr (kHeadDim == 256) return launch_fwd_tiles<T, 256, Arch::kSm90>(p, stream);
      return cudaErrorInvalidValue;
    case Arch::kSm80: return launch_fwd_tiles<T, kHeadDim, Arch::kSm80>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace fa
