// What a consumer warpgroup of the SM90 backward does with elements: scores in registers become P
// and dS, rows past a sequence become 0, dK and dV are stored.
//
// A warpgroup has 64 keys along the rows of S^T, a warp 16 of them, and kBwdTileM queries.
#pragma once
#include "attention/bwd_scores.h"
#include "kernels/common/bwd_rows.h"
#include "kernels/common/shared_gradients.cuh"
#include "kernels/sm90/bwd_tile.h"
#include "ptx/barrier.h"
#include "ptx/shared_memory.h"
#include "ptx/tma.h"
#include "tile/store_sm90.h"

namespace fa {

// -LSE or delta of this lane's queries.
template <int kN>
struct BwdStatistic {
  float2 pair[kN];  // of column n of the scores

  // Of queries [16 k, 16 k + 16).
  FA_DEVICE BwdStatistic<2> part(int k) const { return {{pair[2 * k], pair[2 * k + 1]}}; }
};
template <int kN>
FA_DEVICE BwdStatistic<kN> load_statistic(uint32_t from, int lane) {
  BwdStatistic<kN> s;
  FA_UNROLL
  for (int n = 0; n < kN; ++n)
    s.pair[n] = ptx::ld_shared_v2_f32(from + (n * 8 + lane % 4 * 2) * sizeof(float));
  return s;
}
// Scores of queries [16 k, 16 k + 16).
template <int kN>
FA_DEVICE AccumTile<1, 2> score_part(const AccumTile<1, kN>& acc, int k) {
  AccumTile<1, 2> part;
  FA_UNROLL
  for (int i = 0; i < 8; ++i) part.x[0][i / 4][i % 4] = acc.x[0][2 * k + i / 4][i % 4];
  return part;
}

// Scores become exp(score - lse).
template <int kN>
FA_DEVICE void to_weights(AccumTile<1, kN>& acc, float scale_log2,
                          const BwdStatistic<kN>& minus_lse) {
  FA_UNROLL
  for (int n = 0; n < kN; ++n) {
    FA_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float minus = i % 2 == 0 ? minus_lse.pair[n].x : minus_lse.pair[n].y;
      acc.x[0][n][i] = ptx::ex2_approx_ftz(fmaf(acc.x[0][n][i], scale_log2, minus));
    }
  }
}

// P of 16 queries with softcap, ALiBi and dropout. passed, which dS is computed from, is
// P (1 - tanh^2), with the sign of minus where dropped: it is never negative otherwise.
template <class T, class Kinds>
FA_DEVICE void modify_weights(const AccumTile<1, 2>& scores, const TransposedScoreMod& mod,
                              Kinds kinds, TransposedOrigin origin,
                              const BwdStatistic<2>& minus_lse, int lane, uint32_t (&probs)[4],
                              uint32_t (&passed)[4]) {
  AccumTile<1, 2> weights = scores;
  to_weights(weights, mod.unit(kinds), minus_lse);
  const AccumTile<1, 2> others = mod.apply(weights, scores, kinds, origin, lane);
  const AFragments<1, 1> w = as_a_operand<T>(weights), o = as_a_operand<T>(others);
  FA_UNROLL
  for (int i = 0; i < 4; ++i) {
    probs[i] = w.x[0][0][i];
    passed[i] = o.x[0][0][i];
  }
}

// dS = P (dP - delta) of 16 queries, in the place of P, or of what modify_weights() passed.
// drop_factor: of what dropout keeps.
template <class T, class Kinds>
FA_DEVICE void to_dscores(uint32_t (&passed)[4], AccumTile<1, 2> dp, const BwdStatistic<2>& deltas,
                          Kinds kinds, float drop_factor) {
  AFragments<1, 1> probs;
  FA_UNROLL
  for (int i = 0; i < 4; ++i) probs.x[0][0][i] = passed[i];
  if (kinds.dropout) drop_gradient(dp, probs, drop_factor);
  FA_UNROLL
  for (int i = 0; i < 4; ++i) {
    const float2 delta = deltas.pair[i / 2], prob = unpack<T>(probs.x[0][0][i]);
    const float* x = &dp.x[0][i / 2][i % 2 * 2];
    passed[i] = pack<T>(prob.x * (x[0] - delta.x), prob.y * (x[1] - delta.y));
  }
}
FA_DEVICE float drop_factor(const ScoreParams& score) {
  return 256.f / score.keep_threshold;
}

// Weights of 16 queries times the gradients of these weights.
template <class T>
FA_DEVICE void multiply_by_gradients(uint32_t (&weights)[4], const AccumTile<1, 2>& gradients) {
  FA_UNROLL
  for (int i = 0; i < 4; ++i) {
    const float2 weight = unpack<T>(weights[i]);
    const float* x = &gradients.x[0][i / 2][i % 2 * 2];
    weights[i] = pack<T>(weight.x * x[0], weight.y * x[1]);
  }
}

// Rows of a tile past the sequence become 0, as their weights are: 0 * NaN would be NaN. Without
// lengths on the device they lie outside the tensor, and TMA has written zeros. Every warpgroup
// clears what it reads; `barrier` is its named barrier.
FA_DEVICE bool has_lengths(const SeqlenArgs& seqlens) {
  return seqlens.cu_seqlens != nullptr || seqlens.seqused != nullptr;
}
template <class Tile>
FA_DEVICE void clear_rows_behind(Tile rows, int num_rows, const SeqlenArgs& seqlens, int barrier) {
  if (num_rows >= Tile::kRows || !has_lengths(seqlens)) return;
  constexpr int kChunks = Tile::kCols / 8;
#pragma unroll 1
  for (int i = max(num_rows, 0) * kChunks + static_cast<int>(threadIdx.x % kWarpgroupSize);
       i < Tile::kRows * kChunks; i += kWarpgroupSize)
    ptx::st_shared_v4(rows.chunk_address(i / kChunks, i % kChunks), uint4{0, 0, 0, 0});
  ptx::fence_proxy_async();
  ptx::bar_sync(barrier, kWarpgroupSize);
}

// Where the row of a key is written: dK or dV.
struct BwdGradientRows {
  void* tensor;
  const Strides& strides;
  int num_cols;
  float* sums;  // instead: what CTAs add to that share the query heads; nullptr: they do not
};
FA_DEVICE BwdGradientRows dk_rows(const BwdParams& p) {
  return {p.dk, p.dk_strides, p.head_dim, p.dk_accum};
}
FA_DEVICE BwdGradientRows dv_rows(const BwdParams& p) {
  return {p.dv, p.dv_strides, p.head_dim_v, p.dv_accum};
}
FA_DEVICE SharedGradient shared_gradient(const BwdParams& p, const BwdTile& tile,
                                         const BwdGradientRows& to) {
  return SharedGradient::of(p, to.sums, to.num_cols, tile.batch, tile.k_seq.first_row, tile.head_kv,
                            tile.n_block, kBwdTileN);
}

// Around the gradients of a tile, by all kWarps that add some: deterministic, those of one split
// behind those of the splits before it.
template <int kWarps, class Add>
FA_DEVICE void in_order_of_splits(const BwdParams& p, const BwdTile& tile, int lane, Add add) {
  if (p.dkv_semaphore == nullptr) return add();
  int* counter = shared_gradient(p, tile, dk_rows(p)).counter;
  wait_for_warps(counter, tile.split * kWarps, lane);
  add();
  say_warp_is_done(counter, lane);
}

// Columns [first_col, first_col + 8 kN) of this warp's 16 keys from first_key on.
template <class T, int kN>
FA_DEVICE void store_gradient(const BwdParams& p, const AccumTile<1, kN>& acc, const BwdTile& tile,
                              int first_key, const BwdGradientRows& to, int first_col, float scale,
                              int lane) {
  if (to.sums != nullptr) {
    SharedGradient shared = shared_gradient(p, tile, to);
    shared.sums += first_col;
    shared.num_cols -= first_col;
    return shared.add(acc.x[0], first_key, tile.k_seq.seqlen, scale, lane);
  }
  FA_UNROLL
  for (int r = 0; r < 2; ++r) {
    const int key = first_key + r * 8 + lane / 4;
    const bool exists = key < tile.k_seq.seqlen, stored = key < tile.k_seq.stored;
    T* out = static_cast<T*>(to.tensor) + element_offset(to.strides.batch, to.strides.token,
                                                         to.strides.head, tile.batch,
                                                         tile.k_seq.first_row + key, tile.head_kv);
    store_row_by_quad(out + first_col, acc.x[0], r, scale, !exists, stored, to.num_cols - first_col,
                      lane);
  }
}

// dK = dV = 0 for keys that no query sees, where they are no sums, which begin as zeros. The rest
// behind the last sequence may have more tiles than the grid, so a tile stands for every
// num_n_blocks-th. `thread` of kThreads.
template <class T, int kThreads>
FA_DEVICE void clear_gradients(const BwdParams& p, const BwdLaunch& launch, const BwdTile& tile,
                               int thread) {
  if (p.dk_accum != nullptr) return;
  for (int first = tile.n_block * kBwdTileN; first < tile.k_seq.stored;
       first += launch.order.grid.num_m_blocks * kBwdTileN) {
    const Range rows{first, min(first + kBwdTileN, tile.k_seq.stored)};
    const auto at = [&](void* tensor, const Strides& strides) {
      return static_cast<T*>(tensor) + element_offset(strides.batch, strides.token, strides.head,
                                                      tile.batch, tile.k_seq.first_row,
                                                      tile.head_kv);
    };
    clear_rows<kThreads>(at(p.dk, p.dk_strides), p.dk_strides.token, rows, p.head_dim, thread);
    clear_rows<kThreads>(at(p.dv, p.dv_strides), p.dv_strides.token, rows, p.head_dim_v, thread);
  }
}

// kCompleteDq: dQ = 0 for whole tiles of queries that see no key, and behind the sequence. A tile
// of keys takes every num_n_blocks-th. `thread` of kThreads.
template <class T, int kThreads>
FA_DEVICE void clear_unseen_dq(const BwdParams& p, const BwdLaunch& launch, const BwdTile& tile,
                               int thread) {
  const Range seen = seen_queries(tile.mask);
  for (int first = tile.n_block * kBwdTileM; first < tile.q_seq.stored;
       first += launch.order.grid.num_m_blocks * kBwdTileM) {
    if (first + kBwdTileM > seen.begin && first < seen.end) continue;
    const Range rows{first, min(first + kBwdTileM, tile.q_seq.stored)};
    for (int i = 0; i < launch.heads_per_cta; ++i)
      clear_rows<kThreads>(dq_row<T>(p, tile, tile.first_head + i, 0), p.dq_strides.token, rows,
                           p.head_dim, thread);
  }
}

}  // namespace fa
