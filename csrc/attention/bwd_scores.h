// Scores of the backward, held transposed: rows of the accumulator are keys, columns queries.
//
// Then P^T and dS^T are A operands of dV += P^T dO and dK += dS^T Q by conversion alone, and the
// statistics of a query belong to a column. Element (row, col) of a warp's scores is key
// first_key + row and query first_query + col.
#pragma once
#include "attention/score_mod.h"
#include "ptx/shared_memory.h"

namespace fa {

struct TransposedOrigin {
  int first_key, first_query;
};

// Sets the scores of pairs that are not kept to -inf, also those of queries and keys past the
// sequence.
template <int kM, int kN>
FA_DEVICE void apply_mask(AccumTile<kM, kN>& acc_s, MaskSpec mask, TransposedOrigin origin,
                          int lane) {
  FA_UNROLL
  for (int r = 0; r < 2 * kM; ++r) {
    const int key = origin.first_key + r * 8 + lane / 4;
    const Range queries = query_range(mask, key);
    const int begin = queries.begin - origin.first_query - lane % 4 * 2;
    const unsigned size = key < mask.seqlen_k ? static_cast<unsigned>(queries.size()) : 0;
    FA_UNROLL
    for (int n = 0; n < kN; ++n) {
      FA_UNROLL
      for (int i = 0; i < 2; ++i) {
        const bool kept = static_cast<unsigned>(n * 8 + i - begin) < size;
        float& score = acc_s.x[r / 2][n][r % 2 * 2 + i];
        score = kept ? score : -INFINITY;
      }
    }
  }
}

// Calls visit(x, column, lse_or_delta) for every element with the statistic of its query. smem:
// fp32, of the first query.
template <int kM, int kN, class Visit>
FA_DEVICE void for_each_with_statistic(AccumTile<kM, kN>& acc, uint32_t smem, int lane,
                                       Visit visit) {
  FA_UNROLL
  for (int n = 0; n < kN; ++n) {
    const float2 pair = ptx::ld_shared_v2_f32(smem + (n * 8 + lane % 4 * 2) * sizeof(float));
    FA_UNROLL
    for (int m = 0; m < kM; ++m) {
      FA_UNROLL
      for (int i = 0; i < 4; ++i) visit(acc.x[m][n][i], i % 2 == 0 ? pair.x : pair.y);
    }
  }
}

// The elements of a pair that pack() made.
template <class T>
FA_DEVICE float2 unpack(uint32_t pair) {
  if constexpr (std::is_same_v<T, __half>) {
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
  } else {
    // A bf16 is the upper half of the float of the same value.
    return {__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u)};
  }
}

// Softcap, ALiBi and dropout on transposed scores, and what of them the gradient needs.
//
// dS = P (keep factor dP - delta) (1 - tanh^2). P (1 - tanh^2) is never negative, so its sign tells
// those who compute dS which scores were dropped.
struct TransposedScoreMod {
  ScoreMod mod;

  // Raw q k^T becomes scores in log2 units.
  template <int kM, int kN>
  FA_DEVICE void score(AccumTile<kM, kN>& acc_s, TransposedOrigin origin, int lane) const {
    FA_UNROLL
    for (int m = 0; m < kM; ++m) {
      FA_UNROLL
      for (int n = 0; n < kN; ++n) {
        FA_UNROLL
        for (int i = 0; i < 4; ++i) {
          float& x = acc_s.x[m][n][i];
          x *= mod.inner_scale;
          if (mod.outer_scale != 0.f) x = mod.outer_scale * ptx::tanh_approx(x);
          x -= bias(origin, lane, m, n, i);
        }
      }
    }
  }

  // 1 - tanh^2 of a score that score() made; finite also for a masked one.
  FA_DEVICE float derivative(float score, TransposedOrigin origin, int lane, int m, int n,
                             int i) const {
    if (mod.outer_scale == 0.f) return 1.f;
    const float tanh = (score + bias(origin, lane, m, n, i)) * ptx::rcp_approx_ftz(mod.outer_scale);
    return 1.f - fminf(tanh * tanh, 1.f);
  }

  // Calls visit(m, i, kept) for the elements of all bands in columns n and n + 1; i in [0, 8) is
  // register i % 4 of column n + i / 4. first_key and first_query are multiples of 16, of 32 keys
  // if kM > 1; n is even.
  //
  // The bytes of one call of Philox lie in two registers each of eight rows here, so a lane needs
  // halves of two calls, of which the lane 4 beside it needs the other halves: each makes one.
  template <int kM, class Visit>
  FA_DEVICE void for_each_kept(TransposedOrigin origin, int lane, int n, Visit visit) const {
    const int odd_key = lane / 4 % 2;
    const int source_lane = (lane % 4 * 2 + odd_key) * 4 + lane / 8;
    FA_UNROLL
    for (int m = 0; m < kM; m += 2) {
      const int first_key = origin.first_key + m * 16;
      const Philox4 bytes = dropout_bytes(
          mod.seed, mod.offset, mod.batch_head,
          static_cast<uint32_t>((origin.first_query + n * 8) / kDropoutTileRows),
          static_cast<uint32_t>(first_key / kDropoutTileCols), static_cast<uint32_t>(source_lane));
      FA_UNROLL
      for (int band = 0; band < min(kM, 2); ++band) {
        // A word has 8 keys: bytes 0, 2 the even one of this lane's pair, 1, 3 the odd one.
        const bool upper = kM > 1 ? band == 1 : first_key % kDropoutTileCols != 0;
        const uint32_t low_keys = upper ? bytes.word[2] : bytes.word[0];
        const uint32_t high_keys = upper ? bytes.word[3] : bytes.word[1];
        const uint32_t even = __byte_perm(low_keys, high_keys, 0x6420);
        const uint32_t odd = __byte_perm(low_keys, high_keys, 0x7531);
        const uint32_t mine = odd_key ? odd : even;
        const uint32_t other = __shfl_xor_sync(0xffffffffu, odd_key ? even : odd, 4);
        const uint32_t by_query[] = {odd_key ? other : mine, odd_key ? mine : other};
        FA_UNROLL
        for (int i = 0; i < 8; ++i) {
          const uint32_t byte = by_query[i % 2] >> ((i % 4 / 2 * 2 + i / 4) * 8) & 0xFF;
          visit(m + band, i, byte < static_cast<uint32_t>(mod.keep_threshold));
        }
      }
    }
  }

 private:
  FA_DEVICE float bias(TransposedOrigin origin, int lane, int m, int n, int i) const {
    const int key = origin.first_key + m * 16 + i / 2 * 8 + lane / 4;
    const int diag = origin.first_query + n * 8 + lane % 4 * 2 + i % 2 + mod.diag_shift;
    return mod.slope * fabsf(static_cast<float>(key - diag));
  }
};

}  // namespace fa
