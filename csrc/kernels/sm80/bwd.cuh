// FlashAttention backward for SM80/SM89 (cp.async + mma.sync).
//
// One CTA keeps tile_n rows of K and V of one KV head and streams tiles of tile_m rows of Q and dO
// of the query heads that read it, the last tile first. Half of its warps own dV, the others dK:
//   dV warps:  S^T = K Q^T;  P = exp(S - lse) -> smem;                 dV += P^T dO
//   dK warps:  dP^T = V dO^T;  dS = P (dP - delta) -> smem, over P;    dK += dS^T Q
//   all:       dQ += dS K, one step late, added up in fp32 in global memory
// Both roles run the same two products on other operands, with the keys along the rows, so that P
// and dS stay in registers as A operands; a warp reads the other operand once for all its keys.
// dK warps take their part of dQ before their scores, dV warps behind dV: so one role computes
// exponentials while the other multiplies.
// Memory: K, V, num_q_stages x (Q, dO), two score tiles, LSE and delta; see BwdShape.
// Algorithm: FlashAttention-2, arXiv:2307.08691, alg. 2. delta comes from bwd_preprocess, dQ is
// rounded by bwd_postprocess. Instances: instances/sm80_bwd_*.cu.
// Numbers: docs/performance/sm80_backward.md.
#pragma once
#ifndef OPQ
#define OPQ (kHeadDim <= 128)
#endif
#include "attention/bwd_scores.h"
#include "core/bwd_workspace.h"
#include "core/params.h"
#include "kernels/launch.h"
#include "kernels/sm80/bwd_postprocess.cuh"
#include "kernels/sm80/bwd_shape.h"
#include "ptx/barrier.h"
#include "ptx/reduction.h"
#include "tile/copy_sm80.h"
#include "tile/vec.h"

namespace fa {

// A tile of queries of one head.
struct BwdStep {
  int head, m_block;
};

// Where the tiles of queries lie that a CTA walks: for each head of the group the blocks from the
// last one down.
template <class T>
struct BwdStream {
  BwdStep step;
  const T *q, *dout;       // of the step's first query
  int64_t statistics_row;  // of the head's first query, in lse and delta

  // num_blocks: of each head; tile_m: rows of a block.
  FA_DEVICE void advance(const BwdParams& p, int num_blocks, int begin, int tile_m) {
    if (step.m_block > begin) {
      --step.m_block;
      q -= tile_m * p.q_strides.token;
      dout -= tile_m * p.dout_strides.token;
    } else {
      ++step.head;
      step.m_block += num_blocks - 1;
      const int64_t back = static_cast<int64_t>(num_blocks - 1) * tile_m;
      q += p.q_strides.head + back * p.q_strides.token;
      dout += p.dout_strides.head + back * p.dout_strides.token;
      statistics_row += p.seqlens_q.cu_seqlens ? p.total_q : p.seqlens_q.max_seqlen;
    }
  }
};

// What a CTA works on.
struct BwdTile {
  int n_block, head_kv, batch;
  SeqlenInfo seq_q, seq_k;
  MaskSpec mask;
  BlockRange blocks;  // of queries
};

template <class T, int kHeadDim, Arch kTiles, bool kScoreMod>
struct BwdCta {
  using Shape = BwdShape<kHeadDim, kTiles>;
  using KeptTile = typename Shape::KeptTile;
  using StreamTile = typename Shape::StreamTile;
  using ScoreTile = typename Shape::ScoreTile;
  using Scores = AccumTile<Shape::kBands, Shape::kChunk / 8>;       // transposed
  using Operand = AFragments<Shape::kBands, Shape::kChunk / 16>;    // P^T or dS^T
  using Gradient = AccumTile<Shape::kBands, kHeadDim / 8>;          // dV or dK
  using Kept = AFragments<Shape::kBands, Shape::kKeptInRegs ? kHeadDim / 16 : 1>;  // K or V
  using HeadRows = BlockAddress<KeptTile::kRowBytes>;
  using ScoreRows = BlockAddress<ScoreTile::kRowBytes>;

  const BwdParams& p;
  const BwdTile& tile;
  uint32_t smem;
  int warp, lane;
  bool owns_dv;   // else dK
  int warp_key;   // first key of this warp, in the CTA's tile
  static FA_DEVICE int opaque(int x) {
    if constexpr (OPQ) asm volatile("" : "+r"(x));
    return x;
  }
  // Where Q or dO of a step lies; statistics and scores always have two stages.
  static FA_DEVICE uint32_t stream_offset(int tensor, int stage) {
    return tensor + (Shape::kStages == 2 ? stage * StreamTile::kBytes : 0);
  }

  // ---- global -> shared ----

  FA_DEVICE GmemRows<const T> rows_of(const void* tensor, Strides strides, const SeqlenInfo& seq,
                                      int head, int first_row, int num_cols) const {
    return {static_cast<const T*>(tensor) +
                element_offset(strides.batch, strides.token, strides.head, tile.batch,
                               seq.first_row + first_row, head),
            strides.token, seq.seqlen - first_row, num_cols};
  }

  FA_DEVICE BwdStream<T> first_step(int group_size) const {
    const int head = tile.head_kv * group_size, m_block = tile.blocks.end - 1;
    const int row = m_block * Shape::kTileM;
    return {{head, m_block},
            rows_of(p.q, p.q_strides, tile.seq_q, head, row, 0).first,
            rows_of(p.dout, p.dout_strides, tile.seq_q, head, row, 0).first,
            p.seqlens_q.cu_seqlens
                ? static_cast<int64_t>(head) * p.total_q + tile.seq_q.first_row
                : (static_cast<int64_t>(tile.batch) * p.num_heads_q + head) *
                      p.seqlens_q.max_seqlen};
  }

  FA_DEVICE void load_kept() const {
    const int row = tile.n_block * Shape::kTileN;
    load_tile_async<Shape::kThreads>(
        KeptTile{smem + Shape::kK},
        rows_of(p.k, p.k_strides, tile.seq_k, tile.head_kv, row, p.head_dim), threadIdx.x);
    load_tile_async<Shape::kThreads>(
        KeptTile{smem + Shape::kV},
        rows_of(p.v, p.v_strides, tile.seq_k, tile.head_kv, row, p.head_dim_v), threadIdx.x);
  }

  FA_DEVICE void load_step(const BwdStream<T>& next, int stage) const {
    const int num_rows = tile.seq_q.seqlen - next.step.m_block * Shape::kTileM;
    const int thread = opaque(threadIdx.x);
    load_tile_async<Shape::kThreads>(
        StreamTile{smem + stream_offset(Shape::kQ, stage)},
        GmemRows<const T>{next.q, p.q_strides.token, num_rows, p.head_dim}, thread);
    load_tile_async<Shape::kThreads>(
        StreamTile{smem + stream_offset(Shape::kDout, stage)},
        GmemRows<const T>{next.dout, p.dout_strides.token, num_rows, p.head_dim_v}, thread);
    ptx::cp_async_commit_group();
  }

  // LSE (the first tile_m threads) or delta of a query; a query past the sequence has that of the
  // last one.
  FA_DEVICE float load_statistic(const BwdStream<T>& next) const {
    const float* statistics = threadIdx.x < Shape::kTileM ? p.lse : p.delta;
    const int row = min(next.step.m_block * Shape::kTileM +
                            static_cast<int>(threadIdx.x) % Shape::kTileM,
                        tile.seq_q.seqlen - 1);
    return statistics[next.statistics_row + row];
  }
  // LSE goes to shared memory as -lse in log2 units, -inf for a query without keys, so that its P
  // is 0. What a query past the sequence has does not matter: its dO and Q are 0.
  FA_DEVICE void store_statistic(float x, int stage) const {
    if (threadIdx.x < Shape::kTileM) x = x == -INFINITY ? x : -x * kLog2e;
    if (threadIdx.x < 2 * Shape::kTileM)
      ptx::st_shared_f32(smem + Shape::kStatistics + stage * 2 * Shape::kStatisticBytes +
                             threadIdx.x * sizeof(float),
                         x);
  }

  // ---- scores ----

  FA_DEVICE TransposedOrigin origin(BwdStep step, int chunk) const {
    return {tile.n_block * Shape::kTileN + warp_key, step.m_block * Shape::kTileM + chunk};
  }

  // This warp's rows of K or V as operands, where registers hold them throughout.
  FA_DEVICE Kept load_kept_operand() const {
    Kept kept;
    if constexpr (Shape::kKeptInRegs) {
      const uint32_t rows = kept_rows();
      const HeadRows a_rows = HeadRows::by_rows(lane);
      FA_UNROLL
      for (int m = 0; m < Shape::kBands; ++m) {
        FA_UNROLL
        for (int k = 0; k < kHeadDim / 16; ++k)
          ptx::ldmatrix_x4(kept.x[m][k], rows + a_rows.offset(16 * m, k));
      }
    }
    return kept;
  }
  FA_DEVICE uint32_t kept_rows() const {
    return smem + (owns_dv ? Shape::kK : Shape::kV) + warp_key * KeptTile::kRowBytes;
  }

  // S^T = K Q^T or dP^T = V dO^T for queries [chunk, chunk + kChunk).
  FA_DEVICE void multiply_scores(Scores& acc, const Kept& kept, int stage, int chunk) const {
    const int at = opaque(lane);
    const uint32_t rows = kept_rows();
    const uint32_t stream = smem + stream_offset(owns_dv ? Shape::kQ : Shape::kDout, stage) +
                            chunk * StreamTile::kRowBytes;
    const HeadRows a_rows = HeadRows::by_rows(at), b_rows = HeadRows::by_columns(at);
    acc.clear();
    warp_gemm<T, kHeadDim / 16>(
        acc,
        [&](int m, int k, uint32_t(&a)[4]) {
          if constexpr (Shape::kKeptInRegs) {
            FA_UNROLL
            for (int r = 0; r < 4; ++r) a[r] = kept.x[m][k][r];
          } else {
            ptx::ldmatrix_x4(a, rows + a_rows.offset(16 * m, k));
          }
        },
        [&](int n, int k, uint32_t(&b)[4]) {
          ptx::ldmatrix_x4(b, stream + b_rows.offset(16 * n, k));
        });
  }

  // Calls visit(address, m, k, i) for the pairs of an operand: two queries of one key in the score
  // tile.
  template <class Visit>
  FA_DEVICE void for_each_pair(int stage, int chunk, Visit visit) const {
    constexpr int kPeriod = ScoreTile::kRowBytes % 128 == 0 ? 8 : 4;
    const uint32_t base =
        smem + Shape::kScores + stage * ScoreTile::kBytes + warp_key * ScoreTile::kRowBytes;
    const int hidden = opaque(lane);
    const uint32_t at = swizzle_row<ScoreTile::kRowBytes>(hidden / 4, hidden % 4 * 4);
    FA_UNROLL
    for (int m = 0; m < Shape::kBands; ++m) {
      FA_UNROLL
      for (int n = 0; n < Shape::kChunk / 8; ++n) {
        const int column = chunk / 8 + n;
        FA_UNROLL
        for (int h = 0; h < 2; ++h)
          visit(base + (16 * m + 8 * h) * ScoreTile::kRowBytes + (at ^ (column % kPeriod * 16)) +
                    column / kPeriod * kPeriod * 16,
                m, n / 2, n % 2 * 2 + h);
      }
    }
  }

  // dV warps: scores become P, as an operand and in shared memory.
  FA_DEVICE Operand to_probs(Scores& acc, BwdStep step, int stage, int chunk) const {
    const bool border = step.m_block < tile.blocks.full_begin || step.m_block >= tile.blocks.full_end;
    const uint32_t lse = smem + Shape::kStatistics + stage * 2 * Shape::kStatisticBytes + chunk * 4;
    if constexpr (kScoreMod) return to_modified_probs(acc, step, border, lse, stage, chunk);
    if (border) apply_mask(acc, tile.mask, origin(step, chunk), lane);
    const float scale_log2 = p.score.softmax_scale * kLog2e;
    for_each_with_statistic(acc, lse, lane, [&](float& x, float minus_lse) {
      x = ptx::ex2_approx_ftz(fmaf(x, scale_log2, minus_lse));
    });
    const Operand probs = as_a_operand<T>(acc);
    for_each_pair(stage, chunk, [&](uint32_t address, int m, int k, int i) {
      ptx::st_shared_u32(address, probs.x[m][k][i]);
    });
    return probs;
  }

  // The same with softcap, ALiBi and dropout. Shared memory gets what dS needs: P (1 - tanh^2),
  // negative where dropped.
  FA_DEVICE Operand to_modified_probs(Scores& acc, BwdStep step, bool border, uint32_t lse,
                                      int stage, int chunk) const {
    const TransposedOrigin at = origin(step, chunk);
    const TransposedScoreMod mod{
        ScoreMod::of(p.score, tile.mask, tile.batch, step.head, p.num_heads_q)};
    mod.score(acc, at, lane);
    if (border) apply_mask(acc, tile.mask, at, lane);
    Scores slope = acc;
    FA_UNROLL
    for (int m = 0; m < Shape::kBands; ++m) {
      FA_UNROLL
      for (int n = 0; n < Shape::kChunk / 8; ++n) {
        FA_UNROLL
        for (int i = 0; i < 4; ++i)
          slope.x[m][n][i] = mod.derivative(acc.x[m][n][i], at, lane, m, n, i);
      }
    }
    for_each_with_statistic(acc, lse, lane, [&](float& x, float minus_lse) {
      x = ptx::ex2_approx_ftz(x + minus_lse);
    });
    FA_UNROLL
    for (int m = 0; m < Shape::kBands; ++m) {
      FA_UNROLL
      for (int n = 0; n < Shape::kChunk / 8; ++n) {
        FA_UNROLL
        for (int i = 0; i < 4; ++i) slope.x[m][n][i] *= acc.x[m][n][i];
      }
    }
    if (p.score.keep_threshold < 256) {
      FA_UNROLL
      for (int n = 0; n < Shape::kChunk / 8; n += 2) {
        mod.template for_each_kept<Shape::kBands>(at, lane, n, [&](int m, int i, bool kept) {
          float& passed = slope.x[m][n + i / 4][i % 4];
          passed = kept ? passed : -passed;
          acc.x[m][n + i / 4][i % 4] = kept ? acc.x[m][n + i / 4][i % 4] : 0.f;
        });
      }
    }
    const Operand passed = as_a_operand<T>(slope);
    for_each_pair(stage, chunk, [&](uint32_t address, int m, int k, int i) {
      ptx::st_shared_u32(address, passed.x[m][k][i]);
    });
    return as_a_operand<T>(acc);
  }

  // dK warps: dP becomes dS, as an operand and in shared memory in place of P.
  FA_DEVICE Operand to_dscores(Scores& acc, int stage, int chunk) const {
    Operand ds;
    for_each_pair(stage, chunk, [&](uint32_t address, int m, int k, int i) {
      ds.x[m][k][i] = ptx::ld_shared_u32(address);
    });
    const uint32_t delta = smem + Shape::kStatistics + (stage * 2 + 1) * Shape::kStatisticBytes +
                           chunk * 4;
    const float factor = kScoreMod ? 256.f / p.score.keep_threshold : 1.f;
    FA_UNROLL
    for (int n = 0; n < Shape::kChunk / 8; ++n) {
      const float2 d = ptx::ld_shared_v2_f32(delta + (n * 8 + lane % 4 * 2) * sizeof(float));
      FA_UNROLL
      for (int m = 0; m < Shape::kBands; ++m) {
        FA_UNROLL
        for (int h = 0; h < 2; ++h) {
          uint32_t& pair = ds.x[m][n / 2][n % 2 * 2 + h];
          const float2 prob = unpack<T>(pair);
          float* dp = &acc.x[m][n][2 * h];
          if constexpr (kScoreMod) {
            // The sign bit, not "< 0": a dropped P may be -0.
            dp[0] = __float_as_int(prob.x) < 0 ? 0.f : dp[0] * factor;
            dp[1] = __float_as_int(prob.y) < 0 ? 0.f : dp[1] * factor;
            pair = pack<T>(fabsf(prob.x) * (dp[0] - d.x), fabsf(prob.y) * (dp[1] - d.y));
          } else {
            if constexpr (!std::is_same_v<T, __half>) {
              const uint32_t t = pack<T>(dp[0] - d.x, dp[1] - d.y);
              const __nv_bfloat162 r = __hmul2(*reinterpret_cast<const __nv_bfloat162*>(&pair), *reinterpret_cast<const __nv_bfloat162*>(&t));
              pair = *reinterpret_cast<const uint32_t*>(&r);
            } else
            pair = pack<T>(prob.x * (dp[0] - d.x), prob.y * (dp[1] - d.y));
          }
        }
      }
    }
    for_each_pair(stage, chunk, [&](uint32_t address, int m, int k, int i) {
      ptx::st_shared_u32(address, ds.x[m][k][i]);
    });
    return ds;
  }

  // dV += P^T dO or dK += dS^T Q.
  FA_DEVICE void accumulate(Gradient& acc, const Operand& operand, int stage, int chunk) const {
    const uint32_t stream = smem + stream_offset(owns_dv ? Shape::kDout : Shape::kQ, stage) + chunk * StreamTile::kRowBytes;
    const HeadRows b_rows = HeadRows::by_rows(opaque(lane));
    warp_gemm<T, Shape::kChunk / 16>(
        acc,
        [&](int m, int k, uint32_t(&a)[4]) {
          FA_UNROLL
          for (int i = 0; i < 4; ++i) a[i] = operand.x[m][k][i];
        },
        [&](int n, int k, uint32_t(&b)[4]) {
          ptx::ldmatrix_x4_trans(b, stream + b_rows.offset(16 * k, n));
        });
  }

  // One step of this warp but for dQ. prefetch() starts the loads of the next one: behind the first
  // product, so that the step begins with it at once.
  template <class Prefetch>
  FA_DEVICE void accumulate_step(Gradient& acc, const Kept& kept, BwdStep step, int stage,
                                 Prefetch prefetch) const {
    FA_UNROLL
    for (int c = 0; c < Shape::kChunks; ++c) {
      const int chunk = c * Shape::kChunk;
      // dV warp w and dK warp w hold the same keys: one barrier for each pair and chunk says that P
      // is in shared memory. It is free again at the CTA's next barrier.
      const int barrier = 1 + warp % Shape::kRoleWarps * Shape::kChunks + c;
      Scores scores;
      multiply_scores(scores, kept, stage, chunk);
      if (c == 0) prefetch();
      Operand operand;
      if (owns_dv) {
        operand = to_probs(scores, step, stage, chunk);
        ptx::bar_arrive(barrier, 2 * kWarpSize);
      } else {
        ptx::bar_sync(barrier, 2 * kWarpSize);
        operand = to_dscores(scores, stage, chunk);
      }
      accumulate(acc, operand, stage, chunk);
    }
  }

  // ---- dQ ----

  // Adds this warp's part of dS K for `step` to dq_accum.
  FA_DEVICE void add_dq(BwdStep step, int stage) const {
    typename Shape::DqAccum acc;
    acc.clear();
    const RowCol part = Shape::dq_part(warp);
    const int at = opaque(lane);
    const HeadRows b_rows = HeadRows::by_rows(at);
    const ScoreRows a_rows = ScoreRows::by_columns(at);
    uint32_t a_block[Shape::kDqRows / 16], b_block[Shape::kDqCols / 16];
    FA_UNROLL
    for (int m = 0; m < Shape::kDqRows / 16; ++m)
      a_block[m] = smem + Shape::kScores + stage * ScoreTile::kBytes +
                   a_rows.offset(0, part.row / 16 + m);
    FA_UNROLL
    for (int n = 0; n < Shape::kDqCols / 16; ++n)
      b_block[n] = smem + Shape::kK + b_rows.offset(0, part.col / 16 + n);
    warp_gemm<T, Shape::kTileN / 16>(
        acc,
        [&](int m, int k, uint32_t(&a)[4]) {
          ptx::ldmatrix_x4_trans(a, a_block[m] + 16 * k * ScoreTile::kRowBytes);
        },
        [&](int n, int k, uint32_t(&b)[4]) {
          ptx::ldmatrix_x4_trans(b, b_block[n] + 16 * k * KeptTile::kRowBytes);
        });

    const bool varlen = p.seqlens_q.cu_seqlens != nullptr;
    const int64_t first_row = bwd_dq_accum_first_row(varlen, tile.batch, p.seqlens_q.max_seqlen,
                                                     static_cast<int>(tile.seq_q.first_row),
                                                     Shape::kTileM);
    const int64_t index =
        (first_row / Shape::kTileM + step.m_block) * p.num_heads_q + step.head;
    int* turn = p.dq_semaphore == nullptr ? nullptr : p.dq_semaphore + index;
    if (turn != nullptr) wait_for_turn(turn, step.m_block);
    float* out = p.dq_accum + index * Shape::kDqTileElements +
                 warp * Shape::kDqRegs * kWarpSize + lane;
    int reg = 0;
    FA_UNROLL
    for (auto& band : acc.x) {
      FA_UNROLL
      for (auto& column : band) {
        FA_UNROLL
        for (float x : column) ptx::red_global_add_f32(out + kWarpSize * reg++, x);
      }
    }
    if (turn != nullptr) end_turn(turn);
  }

  // Deterministic: tiles of keys add to a tile of queries in ascending order, each warp its part.
  // The counter says how many warps are done. CTAs start in the order of n_block, so whoever is
  // waited for already runs.
  FA_DEVICE void wait_for_turn(const int* counter, int m_block) const {
    const int first =
        n_block_range(tile.mask, m_block, Shape::kTileM, Shape::kTileN).begin;
    const int done = (tile.n_block - first) * Shape::kTile.num_warps;
    while (lane == 0 && ptx::ld_acquire_gpu_s32(counter) < done) {
    }
    __syncwarp();
  }
  FA_DEVICE void end_turn(int* counter) const {
    __threadfence();  // the additions of every lane, before lane 0 says so
    __syncwarp();
    if (lane == 0) ptx::red_release_gpu_add_s32(counter, 1);
  }

  // ---- dK, dV ----

  // Rounds this warp's rows and writes them through shared memory, whose first bytes it overwrites.
  // Rows past the sequence become 0.
  FA_DEVICE void store_gradient(const Gradient& acc) const {
    const uint32_t rows = smem + warp * Shape::kWarpKeys * KeptTile::kRowBytes;
    const float scale = owns_dv ? (kScoreMod ? 256.f / p.score.keep_threshold : 1.f)
                                : p.score.softmax_scale;
    FA_UNROLL
    for (int m = 0; m < Shape::kBands; ++m) {
      FA_UNROLL
      for (int n = 0; n < kHeadDim / 8; ++n) {
        FA_UNROLL
        for (int h = 0; h < 2; ++h)
          ptx::st_shared_u32(
              rows + swizzle_row<KeptTile::kRowBytes>(16 * m + 8 * h + lane / 4,
                                                      n * 16 + lane % 4 * 4),
              pack<T>(acc.x[m][n][2 * h] * scale, acc.x[m][n][2 * h + 1] * scale));
      }
    }
    __syncwarp();
    const int first_key = tile.n_block * Shape::kTileN + warp_key;
    const int num_cols = owns_dv ? p.head_dim_v : p.head_dim;
    const Strides& strides = owns_dv ? p.dv_strides : p.dk_strides;
    T* out = static_cast<T*>(owns_dv ? p.dv : p.dk) +
             element_offset(strides.batch, strides.token, strides.head, tile.batch,
                            tile.seq_k.first_row + first_key, tile.head_kv);
    constexpr int kChunksPerRow = KeptTile::kChunksPerRow;
    FA_UNROLL
    for (int i = lane; i < Shape::kWarpKeys * kChunksPerRow; i += kWarpSize) {
      const int row = i / kChunksPerRow, chunk = i % kChunksPerRow;
      const uint4 v =
          ptx::ld_shared_v4(rows + swizzle_row<KeptTile::kRowBytes>(row, chunk * 16));
      if (first_key + row >= tile.seq_k.stored || chunk * 8 >= num_cols) continue;
      const bool attends = first_key + row < tile.seq_k.seqlen;
      ptx::st_global_v4(out + row * strides.token + chunk * 8, attends ? v : uint4{});
    }
  }
};

// dK and dV of keys that no query sees. The rest behind the last sequence may have more tiles than
// the grid, so a CTA takes every num_n_blocks-th.
template <class T, class Shape>
FA_DEVICE void zero_kept_gradients(const BwdParams& p, const BwdTile& tile, int num_n_blocks) {
  for (int first = tile.n_block * Shape::kTileN; first < tile.seq_k.stored;
       first += num_n_blocks * Shape::kTileN) {
    const Range rows{first, min(first + Shape::kTileN, tile.seq_k.stored)};
    zero_rows<Shape::kThreads>(
        static_cast<T*>(p.dk) + element_offset(p.dk_strides.batch, p.dk_strides.token,
                                               p.dk_strides.head, tile.batch,
                                               tile.seq_k.first_row, tile.head_kv),
        p.dk_strides.token, rows, p.head_dim);
    zero_rows<Shape::kThreads>(
        static_cast<T*>(p.dv) + element_offset(p.dv_strides.batch, p.dv_strides.token,
                                               p.dv_strides.head, tile.batch,
                                               tile.seq_k.first_row, tile.head_kv),
        p.dv_strides.token, rows, p.head_dim_v);
  }
}

template <class T, int kHeadDim, Arch kTiles, bool kScoreMod>
__global__ void __launch_bounds__(BwdShape<kHeadDim, kTiles>::kThreads,
                                  BwdShape<kHeadDim, kTiles>::kCtasPerSm)
    bwd_kernel(const __grid_constant__ BwdParams p, TileGrid grid, int heads_per_group) {
  using Cta = BwdCta<T, kHeadDim, kTiles, kScoreMod>;
  using Shape = typename Cta::Shape;
  extern __shared__ __align__(1024) unsigned char smem[];

  BwdTile tile;
  // n_block 0 first: under a causal mask it has most queries, and dq's turns follow that order.
  const TileCoord coord = tile_coord_grouped(grid, blockIdx.x, false, heads_per_group);
  tile.n_block = coord.m_block, tile.head_kv = coord.head, tile.batch = coord.batch;
  tile.seq_q = seqlen_info_or_rest(p.seqlens_q, tile.batch, p.batch_size, p.total_q);
  tile.seq_k = seqlen_info_or_rest(p.seqlens_k, tile.batch, p.batch_size, p.total_k);
  tile.mask = mask_spec(tile.seq_q.seqlen, tile.seq_k.seqlen, p.score.window_left,
                        p.score.window_right);
  tile.blocks = m_block_range(tile.mask, tile.n_block, Shape::kTileM, Shape::kTileN);

  const int group_size = p.num_heads_q / p.num_heads_kv;
  const int num_steps = tile.blocks.size() * group_size;
  if (num_steps == 0) {
    zero_kept_gradients<T, Shape>(p, tile, grid.num_m_blocks);
    return;
  }

  const int warp = threadIdx.x / kWarpSize;
  const Cta cta{p,
                tile,
                ptx::cvta_to_shared(smem),
                warp,
                static_cast<int>(threadIdx.x % kWarpSize),
                warp < Shape::kRoleWarps,
                warp % Shape::kRoleWarps * Shape::kWarpKeys};
  typename Cta::Gradient acc;
  acc.clear();
  cta.load_kept();
  BwdStream<T> next = cta.first_step(group_size);
  BwdStep step = next.step, last;
  cta.load_step(next, 0);
  cta.store_statistic(cta.load_statistic(next), 0);
  ptx::cp_async_wait_group<0>();
  __syncthreads();  // K and V are there
  const typename Cta::Kept kept = cta.load_kept_operand();
  for (int i = 0; i < num_steps; ++i) {
    const int stage = i % 2;
    const bool has_next = i + 1 < num_steps;
    // Q, dO and statistics of this step are there, and dS of the last one; everybody has left the
    // buffers of the last step.
    ptx::cp_async_wait_group<0>();
    __syncthreads();
    next.advance(p, tile.blocks.size(), tile.blocks.begin, Shape::kTileM);
    float statistic;
    const auto prefetch = [&] {
      if (!has_next) return;
      if (Shape::kStages == 2) cta.load_step(next, stage ^ 1);
      statistic = cta.load_statistic(next);
    };
    if (!cta.owns_dv && i > 0) cta.add_dq(last, stage ^ 1);
    cta.accumulate_step(acc, kept, step, stage, prefetch);
    if (cta.owns_dv && i > 0) cta.add_dq(last, stage ^ 1);
    last = step;
    step = next.step;
    if (!has_next) break;
    cta.store_statistic(statistic, stage ^ 1);
    if (Shape::kStages == 1) {
      __syncthreads();  // everybody has left Q and dO
      cta.load_step(next, 0);
    }
  }
  __syncthreads();  // dS of the last step is there
  cta.add_dq(last, (num_steps - 1) % 2);
  __syncthreads();  // K is no longer read: its space passes the gradients
  cta.store_gradient(acc);
}

// KV heads whose queries fill a share of the L2 cache run at the same time.
constexpr int64_t kBwdL2GroupBytes = 16 << 20;

// Sequences of a launch: varlen tensors have the rest behind the last one as well.
inline int bwd_num_sequences(const BwdParams& p) {
  return p.batch_size + (p.seqlens_q.cu_seqlens || p.seqlens_k.cu_seqlens ? 1 : 0);
}

template <class T, int kHeadDim, Arch kTiles, bool kScoreMod>
int launch_bwd_kernel(const BwdParams& p, cudaStream_t stream) {
  using Shape = BwdShape<kHeadDim, kTiles>;
  constexpr auto kKernel = bwd_kernel<T, kHeadDim, kTiles, kScoreMod>;
  if (cudaError_t error = allow_dynamic_smem<kKernel>(Shape::kSmemBytes); error != cudaSuccess)
    return error;
  const TileGrid grid{max(1, ceil_div(p.seqlens_k.max_seqlen, Shape::kTileN)), p.num_heads_kv,
                      bwd_num_sequences(p)};
  if (grid.size() == 0) return cudaSuccess;
  // What the CTAs of one KV head stream: Q and dO, and dQ in fp32.
  const int64_t stream_bytes = int64_t{p.num_heads_q / p.num_heads_kv} * p.seqlens_q.max_seqlen *
                               (2 * (p.head_dim + p.head_dim_v) + 4 * kHeadDim);
  const int heads_per_group = l2_group_size(stream_bytes, 1, kBwdL2GroupBytes);
  kKernel<<<static_cast<unsigned>(grid.size()), Shape::kThreads, Shape::kSmemBytes, stream>>>(
      p, grid, heads_per_group);
  return cudaGetLastError();
}

template <class T, int kHeadDim, Arch kTiles>
int launch_bwd_with_tiles(const BwdParams& p, cudaStream_t stream) {
  const int error = has_score_mod(p.score)
                                ? launch_bwd_kernel<T, kHeadDim, kTiles, true>(p, stream)
                                : launch_bwd_kernel<T, kHeadDim, kTiles, false>(p, stream);
  return error != cudaSuccess
             ? error
             : launch_bwd_postprocess<T, kHeadDim, kTiles>(p, bwd_num_sequences(p), stream);
}

template <class T, int kHeadDim>
int launch_bwd(const BwdParams& p, cudaStream_t stream) {
  return p.tiles == Arch::kSm89 ? launch_bwd_with_tiles<T, kHeadDim, Arch::kSm89>(p, stream)
                                : launch_bwd_with_tiles<T, kHeadDim, Arch::kSm80>(p, stream);
}

}  // namespace fa
