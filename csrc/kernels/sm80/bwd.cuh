// FlashAttention backward with mma.sync and cp.async, for compute capability 8.0 and newer.
//
// One CTA keeps tile_n rows of K and V of one KV head and streams tiles of tile_m rows of Q and dO
// of the query heads that read it. Half of its warps own dV, the others dK:
//   dV warps:  S^T = K Q^T;    P = exp(S - lse) -> smem;                dV += P^T dO
//   dK warps:  dP^T = V dO^T;  dS = P (dP - delta) -> smem, over P;     dK += dS^T Q
//   all:       dQ += dS K, one step late, added up in fp32 in global memory; if the tile has all
//              keys of its sequence, it is written at once
// Both roles run the same two products on other operands, with the keys along the rows, so that P
// and dS stay in registers as A operands, and a warp reads the other operand once for all its keys.
// With few KV heads several CTAs share the query heads of one (head_splits) and add dK and dV up in
// global memory too.
// dK warps take their part of dQ before their scores, dV warps behind dV: the roles stay apart, and
// one computes exponentials while the other multiplies.
// Barriers: one a step for the CTA; one for each pair of warps with the same keys, when P is there.
// Memory, division among warps: bwd_shape.h. Tiles: core/tile_config.h. Numbers:
// docs/performance/sm80_backward.md. Algorithm: FlashAttention-2, arXiv:2307.08691, algorithm 2.
// delta comes from bwd_preprocess, bwd_postprocess rounds what was added up. Instances:
// instances/sm80_bwd_*.cu.
#pragma once
#include <cuda_runtime.h>

#include "attention/bwd_scores.h"
#include "core/bwd_workspace.h"
#include "kernels/common/shared_gradients.cuh"
#include "kernels/launch.h"
#include "kernels/sm80/bwd_postprocess.cuh"
#include "kernels/sm80/bwd_shape.h"
#include "kernels/sm80/bwd_stream.h"
#include "ptx/barrier.h"
#include "ptx/opaque.h"
#include "ptx/reduction.h"
#include "tile/copy_sm80.h"

namespace fa {

template <class T>
FA_DEVICE T* dq_of_head(const BwdParams& p, const BwdTile& tile, int head) {
  return static_cast<T*>(p.dq) + element_offset(p.dq_strides.batch, p.dq_strides.token,
                                                p.dq_strides.head, tile.batch, tile.seq_q.first_row,
                                                head);
}

template <class T, int kHeadDim, Arch kTiles, BwdKind kKind>
struct BwdCta {
  using Shape = BwdShape<kHeadDim, kTiles>;
  static constexpr bool kScoreMod = kKind == BwdKind::kScoreMod;
  using KeptTile = typename Shape::KeptTile;
  using StreamTile = typename Shape::StreamTile;
  using ScoreTile = typename Shape::ScoreTile;
  static constexpr bool kKeptInRegs = Shape::kKeptInRegs && !kScoreMod;
  using Kept = AFragments<Shape::kBands, kKeptInRegs ? kHeadDim / 16 : 1>;  // K or V
  using Scores = AccumTile<Shape::kBands, Shape::kChunk / 8>;               // S^T or dP^T
  using Operand = AFragments<Shape::kBands, Shape::kChunk / 16>;            // P^T or dS^T
  using Gradient = AccumTile<Shape::kBands, kHeadDim / 8>;                  // dV or dK
  using HeadRows = BlockAddress<KeptTile::kRowBytes>;
  using ScoreRows = BlockAddress<ScoreTile::kRowBytes>;

  const BwdParams& p;
  const BwdTile& tile;
  uint32_t smem;
  int warp, lane;
  bool owns_dv;  // else dK
  int warp_key;  // first key of this warp in the CTA's tile

  // Addresses derived from it are computed where they are used: they would fill registers that
  // operands in flight need. At head_dim 192 and 256 registers are free.
  static FA_DEVICE int opaque(int x) { return kHeadDim < 192 ? ptx::opaque(x) : x; }

  // Where a buffer of Q or dO lies. There are two stages of everything else.
  static FA_DEVICE uint32_t stream_offset(bool q, int stage) {
    return (q ? Shape::kQ : Shape::kDout) + (Shape::kStages == 2 ? stage * StreamTile::kBytes : 0);
  }

  // ---- global -> shared ----

  FA_DEVICE void load_kept() const {
    const int row = tile.n_block * Shape::kTileN;
    const auto load = [&](int offset, const void* tensor, const Strides& strides, int num_cols) {
      const T* first = static_cast<const T*>(tensor) +
                       element_offset(strides.batch, strides.token, strides.head, tile.batch,
                                      tile.seq_k.first_row + row, tile.head_kv);
      load_tile_async<Shape::kThreads>(
          KeptTile{smem + offset},
          GmemRows<const T>{first, strides.token, tile.seq_k.seqlen - row, num_cols}, threadIdx.x);
    };
    load(Shape::kK, p.k, p.k_strides, p.head_dim);
    load(Shape::kV, p.v, p.v_strides, p.head_dim_v);
  }

  FA_DEVICE void load_step(const BwdStream<T>& next, int stage) const {
    const int num_rows = tile.seq_q.seqlen - next.step.m_block * Shape::kTileM;
    const int thread = opaque(threadIdx.x);
    load_tile_async<Shape::kThreads>(
        StreamTile{smem + stream_offset(true, stage)},
        GmemRows<const T>{next.q, p.q_strides.token, num_rows, p.head_dim}, thread);
    load_tile_async<Shape::kThreads>(
        StreamTile{smem + stream_offset(false, stage)},
        GmemRows<const T>{next.dout, p.dout_strides.token, num_rows, p.head_dim_v}, thread);
    ptx::cp_async_commit_group();
  }

  // LSE (the first tile_m threads) or delta of a query; a query past the sequence has that of the
  // last one, as its scores are masked.
  FA_DEVICE float load_statistic(const BwdStream<T>& next) const {
    const float* statistics = threadIdx.x < Shape::kTileM ? p.lse : p.delta;
    const int row =
        min(next.step.m_block * Shape::kTileM + static_cast<int>(threadIdx.x) % Shape::kTileM,
            tile.seq_q.seqlen - 1);
    return statistics[next.statistics_row + row];
  }
  // LSE goes to shared memory as -lse in log2 units, -inf for a query without keys: its P is 0.
  FA_DEVICE void store_statistic(float x, int stage) const {
    if (threadIdx.x < Shape::kTileM) x = x == -INFINITY ? x : -x * kLog2e;
    if (threadIdx.x < 2 * Shape::kTileM)
      ptx::st_shared_f32(statistics(stage, 0) + threadIdx.x * sizeof(float), x);
  }
  // Where LSE of a query stands; delta of the same query kStatisticBytes further on.
  FA_DEVICE uint32_t statistics(int stage, int query) const {
    return smem + Shape::kStatistics + stage * 2 * Shape::kStatisticBytes + query * sizeof(float);
  }
  // Those of the two queries in column n of a lane's scores.
  FA_DEVICE float2 statistic_pair(uint32_t of_chunk, int n) const {
    return ptx::ld_shared_v2_f32(of_chunk + (n * 8 + lane % 4 * 2) * sizeof(float));
  }

  // ---- scores ----

  FA_DEVICE uint32_t kept_rows() const {
    return smem + (owns_dv ? Shape::kK : Shape::kV) + warp_key * KeptTile::kRowBytes;
  }
  // This warp's rows of K or V as operands, where registers hold them throughout.
  FA_DEVICE Kept load_kept_operand() const {
    Kept kept;
    if constexpr (kKeptInRegs) {
      const HeadRows a_rows = HeadRows::by_rows(lane);
      FA_UNROLL
      for (int m = 0; m < Shape::kBands; ++m) {
        FA_UNROLL
        for (int k = 0; k < kHeadDim / 16; ++k)
          ptx::ldmatrix_x4(kept.x[m][k], kept_rows() + a_rows.offset(16 * m, k));
      }
    }
    return kept;
  }

  // S^T = K Q^T or dP^T = V dO^T for queries [chunk, chunk + kChunk).
  FA_DEVICE void multiply_scores(Scores& acc, const Kept& kept, int stage, int chunk) const {
    const int at = opaque(lane);
    const uint32_t rows = kept_rows();
    const uint32_t stream = smem + stream_offset(owns_dv, stage) + chunk * StreamTile::kRowBytes;
    const HeadRows a_rows = HeadRows::by_rows(at), b_rows = HeadRows::by_columns(at);
    acc.clear();
    warp_gemm<T, kHeadDim / 16>(
        acc,
        [&](int m, int k, uint32_t (&a)[4]) {
          if constexpr (kKeptInRegs) {
            FA_UNROLL
            for (int r = 0; r < 4; ++r) a[r] = kept.x[m][k][r];
          } else {
            ptx::ldmatrix_x4(a, rows + a_rows.offset(16 * m, k));
          }
        },
        [&](int n, int k, uint32_t (&b)[4]) {
          ptx::ldmatrix_x4(b, stream + b_rows.offset(16 * n, k));
        });
  }

  // Where the pairs of an operand stand in the score tile: two queries of one key.
  struct PairAddress {
    static constexpr int kPeriod = ScoreTile::kRowBytes % 128 == 0 ? 8 : 4;  // see BlockAddress
    uint32_t base, at;
    FA_DEVICE uint32_t operator()(int m, int column, int h) const {
      return base + (16 * m + 8 * h) * ScoreTile::kRowBytes + (at ^ (column % kPeriod * 16)) +
             column / kPeriod * kPeriod * 16;
    }
  };
  FA_DEVICE PairAddress pair_address(int stage) const {
    const int at = opaque(lane);
    return {smem + Shape::kScores + stage * ScoreTile::kBytes + warp_key * ScoreTile::kRowBytes,
            static_cast<uint32_t>(swizzle_row<ScoreTile::kRowBytes>(at / 4, at % 4 * 4))};
  }
  // Calls visit(address, pair) for k-steps [first, last) of an operand for queries from `chunk` on.
  template <class Visit>
  FA_DEVICE void for_each_pair(Operand& operand, int stage, int chunk, Range steps,
                               Visit visit) const {
    const PairAddress address = pair_address(stage);
    FA_UNROLL
    for (int m = 0; m < Shape::kBands; ++m) {
      FA_UNROLL
      for (int k = steps.begin; k < steps.end; ++k) {
        FA_UNROLL
        for (int r = 0; r < 4; ++r)
          visit(address(m, chunk / 8 + 2 * k + r / 2, r % 2), operand.x[m][k][r]);
      }
    }
  }
  static constexpr Range kAllSteps{0, Shape::kChunk / 16};
  FA_DEVICE void store_operand(Operand& operand, int stage, int chunk, Range steps) const {
    for_each_pair(operand, stage, chunk, steps,
                  [](uint32_t address, uint32_t pair) { ptx::st_shared_u32(address, pair); });
  }

  // dV warps: scores become P, as an operand and in shared memory.
  FA_DEVICE Operand to_probs(Scores& acc, BwdStep step, int stage, int chunk) const {
    const TransposedOrigin origin{tile.n_block * Shape::kTileN + warp_key,
                                  step.m_block * Shape::kTileM + chunk};
    const bool border =
        step.m_block < tile.blocks.full_begin || step.m_block >= tile.blocks.full_end;
    if constexpr (kScoreMod) {
      return to_modified_probs(acc, step, origin, border, stage, chunk);
    } else {
      if (border) apply_mask(acc, tile.mask, origin, lane);
      to_weights(acc, p.score.softmax_scale * kLog2e, statistics(stage, chunk));
      Operand probs = as_a_operand<T>(acc);
      store_operand(probs, stage, chunk, kAllSteps);
      return probs;
    }
  }
  // Scores become exp(score - lse). lse: where that of the first query stands.
  template <int kM, int kN>
  FA_DEVICE void to_weights(AccumTile<kM, kN>& acc, float scale_log2, uint32_t lse) const {
    FA_UNROLL
    for (int n = 0; n < kN; ++n) {
      const float2 minus_lse = statistic_pair(lse, n);
      FA_UNROLL
      for (int m = 0; m < kM; ++m) {
        FA_UNROLL
        for (int i = 0; i < 4; ++i) {
          float& x = acc.x[m][n][i];
          x = ptx::ex2_approx_ftz(fmaf(x, scale_log2, i % 2 == 0 ? minus_lse.x : minus_lse.y));
        }
      }
    }
  }

  // The same with softcap, ALiBi and dropout. What dK warps find in shared memory is `others` of
  // TransposedScoreMod::apply().
  FA_DEVICE Operand to_modified_probs(Scores& acc, BwdStep step, TransposedOrigin origin,
                                      bool border, int stage, int chunk) const {
    const TransposedScoreMod mod{
        ScoreMod::of(p.score, tile.mask, tile.batch, step.head, p.num_heads_q)};
    mod.score(acc, origin, lane);
    if (border) apply_mask(acc, tile.mask, origin, lane);
    Operand probs, passed;
    const auto modify = [&](auto kinds) {
      FA_UNROLL
      for (int k = 0; k < Shape::kChunk / 16; ++k) {
        FA_UNROLL
        for (int m = 0; m < Shape::kBands; m += kModBands)
          modify_part(acc, mod, kinds, origin, {m, k}, statistics(stage, chunk), probs, passed);
        store_operand(passed, stage, chunk, {k, k + 1});
      }
    };
    const ModKinds kinds = mod.kinds();
    if (kinds.is_softcap()) {
      modify(OnlySoftcap{});
    } else if (kinds.is_bias()) {
      modify(OnlyBias{kinds.alibi});
    } else {
      modify(kinds);
    }
    return probs;
  }

  // Up to 32 keys of 16 queries of it, bands from part.m on in k-step part.k: both results of all
  // scores at once would not fit into the registers.
  static constexpr int kModBands = min(Shape::kBands, 2);
  struct ModPart {
    int m, k;
  };
  template <class Kinds>
  FA_DEVICE void modify_part(const Scores& acc, const TransposedScoreMod& mod, Kinds kinds,
                             TransposedOrigin origin, ModPart part, uint32_t lse, Operand& probs,
                             Operand& passed) const {
    origin.first_key += 16 * part.m;
    origin.first_query += 16 * part.k;
    AccumTile<kModBands, 2> scores;
    FA_UNROLL
    for (int j = 0; j < kModBands * 2; ++j) {
      FA_UNROLL
      for (int i = 0; i < 4; ++i)
        scores.x[j / 2][j % 2][i] = acc.x[part.m + j / 2][2 * part.k + j % 2][i];
    }
    AccumTile<kModBands, 2> weights = scores;
    to_weights(weights, mod.unit(kinds), lse + 16 * part.k * sizeof(float));
    const AccumTile<kModBands, 2> others = mod.apply(weights, scores, kinds, origin, lane);
    const AFragments<kModBands, 1> w = as_a_operand<T>(weights), o = as_a_operand<T>(others);
    FA_UNROLL
    for (int j = 0; j < kModBands * 4; ++j) {
      probs.x[part.m + j / 4][part.k][j % 4] = w.x[j / 4][0][j % 4];
      passed.x[part.m + j / 4][part.k][j % 4] = o.x[j / 4][0][j % 4];
    }
  }

  // dK warps: dP becomes dS, as an operand and in shared memory in place of P.
  FA_DEVICE Operand to_dscores(Scores& acc, int stage, int chunk) const {
    Operand ds;
    for_each_pair(ds, stage, chunk, kAllSteps,
                  [](uint32_t address, uint32_t& pair) { pair = ptx::ld_shared_u32(address); });
    if (kScoreMod && p.score.keep_threshold < 256)
      drop_gradient(acc, ds, 256.f / p.score.keep_threshold);
    FA_UNROLL
    for (int n = 0; n < Shape::kChunk / 8; ++n) {
      const float2 delta = statistic_pair(statistics(stage, chunk) + Shape::kStatisticBytes, n);
      FA_UNROLL
      for (int m = 0; m < Shape::kBands; ++m) {
        FA_UNROLL
        for (int h = 0; h < 2; ++h) {
          uint32_t& pair = ds.x[m][n / 2][n % 2 * 2 + h];
          const float2 prob = unpack<T>(pair);
          pair = pack<T>(prob.x * (acc.x[m][n][2 * h] - delta.x),
                         prob.y * (acc.x[m][n][2 * h + 1] - delta.y));
        }
      }
    }
    store_operand(ds, stage, chunk, kAllSteps);
    return ds;
  }

  // dV += P^T dO or dK += dS^T Q.
  FA_DEVICE void accumulate(Gradient& acc, const Operand& operand, int stage, int chunk) const {
    const uint32_t stream = smem + stream_offset(!owns_dv, stage) + chunk * StreamTile::kRowBytes;
    const HeadRows b_rows = HeadRows::by_rows(opaque(lane));
    warp_gemm<T, Shape::kChunk / 16>(
        acc,
        [&](int m, int k, uint32_t (&a)[4]) {
          FA_UNROLL
          for (int r = 0; r < 4; ++r) a[r] = operand.x[m][k][r];
        },
        [&](int n, int k, uint32_t (&b)[4]) {
          ptx::ldmatrix_x4_trans(b, stream + b_rows.offset(16 * k, n));
        });
  }

  // One step of this warp but for dQ. prefetch() starts the loads of the next one: behind the first
  // product, so that the step begins with that at once.
  template <class Prefetch>
  FA_DEVICE void accumulate_step(Gradient& acc, const Kept& kept, BwdStep step, int stage,
                                 Prefetch prefetch) const {
    FA_UNROLL
    for (int c = 0; c < Shape::kChunks; ++c) {
      const int chunk = c * Shape::kChunk;
      // Says to the dK warp with the same keys that P is in shared memory. The next use of the
      // barrier, and of P's place, is behind a barrier of the CTA.
      const int probs_ready = 1 + warp % Shape::kRoleWarps * Shape::kChunks + c;
      Scores scores;
      multiply_scores(scores, kept, stage, chunk);
      if (c == 0) prefetch();
      Operand operand;
      if (owns_dv) {
        operand = to_probs(scores, step, stage, chunk);
        ptx::bar_arrive(probs_ready, 2 * kWarpSize);
      } else {
        ptx::bar_sync(probs_ready, 2 * kWarpSize);
        operand = to_dscores(scores, stage, chunk);
      }
      accumulate(acc, operand, stage, chunk);
    }
  }

  // ---- dQ ----

  // This warp's part of dS K.
  FA_DEVICE void multiply_dq(typename Shape::DqAccum& acc, int stage) const {
    const RowCol part = Shape::dq_part(warp);
    const int at = opaque(lane);
    const HeadRows b_rows = HeadRows::by_rows(at);
    const ScoreRows a_rows = ScoreRows::by_columns(at);
    uint32_t a_block[Shape::kDqRows / 16], b_block[Shape::kDqCols / 16];
    FA_UNROLL
    for (int m = 0; m < Shape::kDqRows / 16; ++m)
      a_block[m] =
          smem + Shape::kScores + stage * ScoreTile::kBytes + a_rows.offset(0, part.row / 16 + m);
    FA_UNROLL
    for (int n = 0; n < Shape::kDqCols / 16; ++n)
      b_block[n] = smem + Shape::kK + b_rows.offset(0, part.col / 16 + n);
    acc.clear();
    warp_gemm<T, Shape::kTileN / 16>(
        acc,
        [&](int m, int k, uint32_t (&a)[4]) {
          ptx::ldmatrix_x4_trans(a, a_block[m] + 16 * k * ScoreTile::kRowBytes);
        },
        [&](int n, int k, uint32_t (&b)[4]) {
          ptx::ldmatrix_x4_trans(b, b_block[n] + 16 * k * KeptTile::kRowBytes);
        });
  }

  // Adds this warp's part of dS K for `step` to dq_accum; writes it, if this tile has all keys.
  FA_DEVICE void add_dq(BwdStep step, int stage) const {
    typename Shape::DqAccum acc;
    multiply_dq(acc, stage);
    if constexpr (kKind == BwdKind::kCompleteDq) return store_dq(acc, step);
    const int64_t index = bwd_dq_tile_index(p, Shape::kTileM, tile.batch, tile.seq_q.first_row,
                                            step.m_block, step.head);
    int* turn = p.dq_semaphore == nullptr ? nullptr : p.dq_semaphore + index;
    if (turn != nullptr)
      wait_for_warps(turn, tiles_before(step.m_block) * Shape::kTile.num_warps, lane);
    float* out =
        p.dq_accum + index * Shape::kDqTileElements + warp * Shape::kDqRegs * kWarpSize + lane;
    int reg = 0;
    FA_UNROLL
    for (const auto& band : acc.x) {
      FA_UNROLL
      for (const auto& column : band) {
        FA_UNROLL
        for (float x : column) ptx::red_global_add_f32(out + kWarpSize * reg++, x);
      }
    }
    if (turn != nullptr) say_warp_is_done(turn, lane);
  }

  // Rounds this warp's part of dQ and writes it: pairs of columns, as the accumulators hold them.
  FA_DEVICE void store_dq(const typename Shape::DqAccum& acc, BwdStep step) const {
    const RowCol part = Shape::dq_part(warp);
    const int row = step.m_block * Shape::kTileM + part.row + lane / 4;
    const int col = part.col + lane % 4 * 2;
    const int num_rows = tile.seq_q.seqlen - row, num_cols = p.head_dim - col;
    T* out = dq_of_head<T>(p, tile, step.head) + row * p.dq_strides.token + col;
    FA_UNROLL
    for (int r = 0; r < Shape::kDqRows / 8; ++r) {
      FA_UNROLL
      for (int n = 0; n < Shape::kDqCols / 8; ++n) {
        const float* x = &acc.x[r / 2][n][r % 2 * 2];
        if (8 * r < num_rows && 8 * n < num_cols)
          ptx::st_global_u32(out + 8 * n,
                             pack<T>(x[0] * p.score.softmax_scale, x[1] * p.score.softmax_scale));
      }
      out += 8 * p.dq_strides.token;
    }
  }

  // Deterministic: tiles of keys add to a tile of queries in ascending order, each warp its part.
  // CTAs start in the order of n_block, so whoever is waited for already runs.
  FA_DEVICE int tiles_before(int m_block) const {
    return tile.n_block - n_block_range(tile.mask, m_block, Shape::kTileM, Shape::kTileN).begin;
  }
  // ---- dK, dV ----

  // What a gradient is multiplied by in the end.
  FA_DEVICE float gradient_scale() const {
    const float keep_factor = kScoreMod ? 256.f / p.score.keep_threshold : 1.f;
    return owns_dv ? keep_factor : p.score.softmax_scale;
  }

  // Adds this warp's rows to dk_accum or dv_accum.
  FA_DEVICE void add_gradient(const Gradient& acc) const {
    const auto shared = SharedGradient::of(
        p, owns_dv ? p.dv_accum : p.dk_accum, owns_dv ? p.head_dim_v : p.head_dim, tile.batch,
        tile.seq_k.first_row, tile.head_kv, tile.n_block, Shape::kTileN);
    if (shared.counter != nullptr)
      wait_for_warps(shared.counter, tile.split * Shape::kTile.num_warps, lane);
    FA_UNROLL
    for (int m = 0; m < Shape::kBands; ++m)
      shared.add(acc.x[m], tile.n_block * Shape::kTileN + warp_key + 16 * m, tile.seq_k.seqlen,
                 gradient_scale(), lane);
    if (shared.counter != nullptr) say_warp_is_done(shared.counter, lane);
  }

  // Rounds this warp's rows and writes them through shared memory, whose first bytes it overwrites.
  // Rows past the sequence become 0.
  FA_DEVICE void store_gradient(const Gradient& acc) const {
    const SmemTile<Shape::kWarpKeys, kHeadDim> rows{smem +
                                                    warp * Shape::kWarpKeys * KeptTile::kRowBytes};
    const float scale = gradient_scale();
    FA_UNROLL
    for (int m = 0; m < Shape::kBands; ++m) {
      FA_UNROLL
      for (int n = 0; n < kHeadDim / 8; ++n) {
        FA_UNROLL
        for (int h = 0; h < 2; ++h)
          ptx::st_shared_u32(rows.chunk_address(16 * m + 8 * h + lane / 4, n) + lane % 4 * 4,
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
    FA_UNROLL
    for (int i = lane; i < Shape::kWarpKeys * KeptTile::kChunksPerRow; i += kWarpSize) {
      const int row = i / KeptTile::kChunksPerRow, chunk = i % KeptTile::kChunksPerRow;
      const uint4 v = ptx::ld_shared_v4(rows.chunk_address(row, chunk));
      if (first_key + row >= tile.seq_k.stored || chunk * 8 >= num_cols) continue;
      const bool attends = first_key + row < tile.seq_k.seqlen;
      ptx::st_global_v4(out + row * strides.token + chunk * 8, attends ? v : uint4{});
    }
  }
};

// dK = dV = 0 for keys that no query sees. The rest behind the last sequence may have more tiles
// than the grid, so a CTA takes every num_n_blocks-th.
template <class T, class Shape>
FA_DEVICE void clear_kept_gradients(const BwdParams& p, const BwdTile& tile, int num_n_blocks) {
  const auto clear = [&](void* tensor, const Strides& strides, int num_cols) {
    T* head =
        static_cast<T*>(tensor) + element_offset(strides.batch, strides.token, strides.head,
                                                 tile.batch, tile.seq_k.first_row, tile.head_kv);
    for (int first = tile.n_block * Shape::kTileN; first < tile.seq_k.stored;
         first += num_n_blocks * Shape::kTileN)
      clear_rows<Shape::kThreads>(head, strides.token,
                                  {first, min(first + Shape::kTileN, tile.seq_k.stored)}, num_cols,
                                  threadIdx.x);
  };
  clear(p.dk, p.dk_strides, p.head_dim);
  clear(p.dv, p.dv_strides, p.head_dim_v);
}

// dQ = 0 for rows that store_dq() does not reach: of queries that see no key, and behind the
// sequence.
template <class T, class Shape>
FA_DEVICE void clear_unseen_dq(const BwdParams& p, const BwdTile& tile) {
  const int heads = p.num_heads_q / (p.num_heads_kv * p.head_splits);
  const bool none = tile.blocks.size() == 0;
  const int begin = none ? 0 : min(tile.blocks.begin * Shape::kTileM, tile.seq_q.seqlen);
  const int end = none ? 0 : min(tile.blocks.end * Shape::kTileM, tile.seq_q.seqlen);
  for (int i = 0; i < heads; ++i) {
    T* head = dq_of_head<T>(p, tile, (tile.head_kv * p.head_splits + tile.split) * heads + i);
    const auto clear = [&](Range rows) {
      clear_rows<Shape::kThreads>(head, p.dq_strides.token, rows, p.head_dim, threadIdx.x);
    };
    clear({0, begin});
    clear({end, tile.seq_q.stored});
  }
}

template <class T, int kHeadDim, Arch kTiles, BwdKind kKind>
__global__ void __launch_bounds__(BwdShape<kHeadDim, kTiles>::kThreads,
                                  BwdShape<kHeadDim, kTiles>::kCtasPerSm)
    bwd_kernel(const __grid_constant__ BwdParams p, TileGrid grid, int heads_per_group) {
  using Cta = BwdCta<T, kHeadDim, kTiles, kKind>;
  using Shape = typename Cta::Shape;
  extern __shared__ __align__(1024) unsigned char smem[];

  const BwdTile tile = bwd_tile<Shape>(p, grid, heads_per_group);
  if constexpr (kKind == BwdKind::kCompleteDq) clear_unseen_dq<T, Shape>(p, tile);
  const int num_steps = tile.blocks.size() * (p.num_heads_q / (p.num_heads_kv * p.head_splits));
  if (num_steps == 0) {
    // Every split of the tile comes here, so nobody waits for a turn; dk_accum is zero.
    if (p.head_splits == 1) clear_kept_gradients<T, Shape>(p, tile, grid.num_m_blocks);
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
  BwdStream<T> next = BwdStream<T>::first(p, tile, Shape::kTileM);
  BwdStep step = next.step, last = step;
  cta.load_kept();
  cta.load_step(next, 0);
  cta.store_statistic(cta.load_statistic(next), 0);
  typename Cta::Kept kept;
  if constexpr (Cta::kKeptInRegs) {
    ptx::cp_async_wait_group<0>();
    __syncthreads();  // K and V are there
    kept = cta.load_kept_operand();
  }
  for (int i = 0; i < num_steps; ++i) {
    const int stage = i % 2;
    const bool has_next = i + 1 < num_steps;
    // Q, dO and statistics of this step are there, and dS of the last one; everybody has left the
    // buffers of the last step.
    ptx::cp_async_wait_group<0>();
    __syncthreads();
    next.advance(p, tile.blocks, Shape::kTileM);
    float statistic;
    if (!cta.owns_dv && i > 0) cta.add_dq(last, stage ^ 1);
    cta.accumulate_step(acc, kept, step, stage, [&] {
      if (!has_next) return;
      if (Shape::kStages == 2) cta.load_step(next, stage ^ 1);
      statistic = cta.load_statistic(next);
    });
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
  if (p.head_splits > 1) return cta.add_gradient(acc);
  __syncthreads();  // K is no longer read: the gradients pass through its place
  cta.store_gradient(acc);
}

// KV heads whose Q, dO and dQ fill a share of the L2 cache run at the same time: without it, every
// tile of keys fetches them from DRAM once more (d 128, 2k: 249 instead of 308 TFLOP/s on an H100;
// 8, 16 and 32 MB are equal).
constexpr int64_t kBwdL2GroupBytes = 16 << 20;

template <class T, int kHeadDim, Arch kTiles, BwdKind kKind>
int launch_bwd_kernel(const BwdParams& p, int num_sequences, cudaStream_t stream) {
  using Shape = BwdShape<kHeadDim, kTiles>;
  constexpr auto kKernel = bwd_kernel<T, kHeadDim, kTiles, kKind>;
  const TileGrid grid{max(1, ceil_div(p.seqlens_k.max_seqlen, Shape::kTileN)),
                      p.num_heads_kv * p.head_splits, num_sequences};
  const int heads_per_cta = p.num_heads_q / (p.num_heads_kv * p.head_splits);
  const int64_t stream_bytes = int64_t{heads_per_cta} * p.seqlens_q.max_seqlen *
                               (2 * (p.head_dim + p.head_dim_v) + 4 * kHeadDim);
  const int heads_per_group = l2_group_size(stream_bytes, 1, kBwdL2GroupBytes);
  const cudaError_t error = allow_dynamic_smem<kKernel>(Shape::kSmemBytes);
  if (error != cudaSuccess || grid.size() == 0) return error;
  kKernel<<<static_cast<unsigned>(grid.size()), Shape::kThreads, Shape::kSmemBytes, stream>>>(
      p, grid, heads_per_group);
  return cudaGetLastError();
}

template <class T, int kHeadDim, Arch kTiles>
int launch_bwd_tiles(const BwdParams& p, cudaStream_t stream) {
  // Varlen tensors have the rest behind the last sequence as well.
  const int num_sequences =
      p.batch_size + (p.seqlens_q.cu_seqlens || p.seqlens_k.cu_seqlens ? 1 : 0);
  int error = cudaErrorInvalidValue;
  if (p.complete_dq) {
    if constexpr (sm80_bwd_completes_dq(kTiles, kHeadDim))
      error =
          launch_bwd_kernel<T, kHeadDim, kTiles, BwdKind::kCompleteDq>(p, num_sequences, stream);
  } else if (has_score_mod(p.score)) {
    error = launch_bwd_kernel<T, kHeadDim, kTiles, BwdKind::kScoreMod>(p, num_sequences, stream);
  } else {
    error = launch_bwd_kernel<T, kHeadDim, kTiles, BwdKind::kPlain>(p, num_sequences, stream);
  }
  if (error != cudaSuccess) return error;
  const int rounded = launch_round_gradients<T>(p, stream);
  return rounded != cudaSuccess || p.complete_dq
             ? rounded
             : launch_bwd_postprocess<T, kHeadDim, kTiles>(p, num_sequences, stream);
}

template <class T, int kHeadDim>
int launch_bwd(const BwdParams& p, cudaStream_t stream) {
  switch (p.tiles) {
    case Arch::kSm89: return launch_bwd_tiles<T, kHeadDim, Arch::kSm89>(p, stream);
    case Arch::kSm90:  // two sizes have tiles of their own there
      if constexpr (kHeadDim < 128) return launch_bwd_tiles<T, kHeadDim, Arch::kSm90>(p, stream);
      return cudaErrorInvalidValue;
    case Arch::kSm80: return launch_bwd_tiles<T, kHeadDim, Arch::kSm80>(p, stream);
  }
  return cudaErrorInvalidValue;
}

}  // namespace fa
