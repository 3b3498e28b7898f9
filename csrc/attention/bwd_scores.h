// Scores of the backward, held transposed: rows of the accumulator are keys, columns queries.
//
// Then P^T and dS^T are A operands of dV += P^T dO and dK += dS^T Q by conversion alone, and the
// statistics of a query (LSE, delta) belong to a column. Element (row, col) of a warp's scores is
// key first_key + row and query first_query + col.
#pragma once
#include "attention/score_mod.h"

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
    keep_columns(acc_s, r, queries.begin - origin.first_query,
                 key < mask.seqlen_k ? queries.size() : 0, lane);
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

// Neither softcap nor dropout: P is all that the gradient needs.
struct OnlyBias {
  static constexpr bool softcap = false, dropout = false;
  bool alibi;
};

// Softcap, ALiBi and dropout on transposed scores, and what of them the gradient needs:
//   dS = P (keep factor dP - delta) (1 - tanh^2)
struct TransposedScoreMod {
  ScoreMod mod;

  FA_DEVICE ModKinds kinds() const { return mod.kinds(); }

  // What a score of score() is worth in log2 units. Positive: a masked score stays -inf.
  template <class Kinds>
  FA_DEVICE float unit(Kinds kinds) const {
    if (kinds.alibi) return 1.f;
    if (kinds.softcap) return mod.outer_scale;
    return mod.inner_scale > 0.f ? mod.inner_scale : 1.f;
  }

  // Raw q k^T becomes scores in unit(): raw ones, tanh, or log2 units.
  template <int kM, int kN>
  FA_DEVICE void score(AccumTile<kM, kN>& acc_s, TransposedOrigin origin, int lane) const {
    score(acc_s, origin, lane, kinds());
  }
  template <int kM, int kN, class Kinds>
  FA_DEVICE void score(AccumTile<kM, kN>& acc_s, TransposedOrigin origin, int lane,
                       Kinds kinds) const {
    if (kinds.softcap)
      for_each(acc_s, [&](float& x, int, int, int) { x = ptx::tanh_approx(x * mod.inner_scale); });
    if (kinds.alibi) {
      const float scale = kinds.softcap ? mod.outer_scale : mod.inner_scale;
      for_each(acc_s, [&](float& x, int m, int n, int i) {
        x = fmaf(x, scale, -bias(origin, lane, m, n, i));
      });
    } else if (!kinds.softcap && !(mod.inner_scale > 0.f)) {
      for_each(acc_s, [&](float& x, int, int, int) { x *= mod.inner_scale; });
    }
  }

  // Multiplies `probs`, the weights of `scores`, by 1 - tanh^2, the derivative of softcap. Never
  // negative, and 0 for a score of -inf.
  template <int kM, int kN, class Kinds>
  FA_DEVICE void multiply_by_derivative(AccumTile<kM, kN>& probs, const AccumTile<kM, kN>& scores,
                                        Kinds kinds, TransposedOrigin origin, int lane) const {
    const auto multiply = [](float& x, float tanh) { x *= ptx::fma_saturate(-tanh, tanh, 1.f); };
    if (!kinds.alibi) {
      for_each(probs, [&](float& x, int m, int n, int i) { multiply(x, scores.x[m][n][i]); });
    } else {
      const float inverse = ptx::rcp_approx_ftz(mod.outer_scale);
      for_each(probs, [&](float& x, int m, int n, int i) {
        multiply(x, (scores.x[m][n][i] + bias(origin, lane, m, n, i)) * inverse);
      });
    }
  }

  // `weights` of `scores` become P of 16 queries. Returns what dS is computed from: P (1 - tanh^2),
  // with the sign of minus where dropped; it is never negative otherwise.
  template <int kM, class Kinds>
  FA_DEVICE AccumTile<kM, 2> apply(AccumTile<kM, 2>& weights, const AccumTile<kM, 2>& scores,
                                   Kinds kinds, TransposedOrigin origin, int lane) const {
    AccumTile<kM, 2> others = weights;
    if (kinds.softcap) multiply_by_derivative(others, scores, kinds, origin, lane);
    if (kinds.dropout) {
      for_each_kept(weights, origin, lane, [&](int m, int n, int i, bool kept) {
        weights.x[m][n][i] = kept ? weights.x[m][n][i] : 0.f;
        others.x[m][n][i] = kept ? others.x[m][n][i] : -others.x[m][n][i];
      });
    }
    return others;
  }

 private:
  // Calls visit(m, n, i, kept) for the elements of kM bands and 16 queries. first_query is a
  // multiple of 16, first_key of 16, of 32 if there are two bands.
  //
  // The 16 bytes of one call of Philox lie in two registers each of eight rows here, so a lane
  // needs halves of two calls, of which the lane 4 beside it needs the other halves: each makes
  // one.
  template <int kM, class Visit>
  FA_DEVICE void for_each_kept(const AccumTile<kM, 2>&, TransposedOrigin origin, int lane,
                               Visit visit) const {
    static_assert(kM <= 2);
    const int odd_key = lane / 4 % 2;
    const int source_lane = (lane % 4 * 2 + odd_key) * 4 + lane / 8;
    const Philox4 bytes =
        dropout_bytes(mod.seed, mod.offset, mod.batch_head,
                      static_cast<uint32_t>(origin.first_query / kDropoutTileRows),
                      static_cast<uint32_t>(origin.first_key / kDropoutTileCols),
                      static_cast<uint32_t>(source_lane));
    FA_UNROLL
    for (int m = 0; m < kM; ++m) {
      // A word has 8 keys: bytes 0, 2 the even one of this lane's pair, 1, 3 the odd one.
      const bool upper = kM > 1 ? m == 1 : origin.first_key % kDropoutTileCols != 0;
      const uint32_t low_keys = upper ? bytes.word[2] : bytes.word[0];
      const uint32_t high_keys = upper ? bytes.word[3] : bytes.word[1];
      const uint32_t even = __byte_perm(low_keys, high_keys, 0x6420);
      const uint32_t odd = __byte_perm(low_keys, high_keys, 0x7531);
      const uint32_t mine = odd_key ? odd : even;
      const uint32_t other = __shfl_xor_sync(0xffffffffu, odd_key ? even : odd, 4);
      const uint32_t by_query[] = {odd_key ? other : mine, odd_key ? mine : other};
      FA_UNROLL
      for (int i = 0; i < 8; ++i) {
        visit(m, i / 4, i % 4, mod.keeps(by_query[i % 2], i % 4 / 2 * 2 + i / 4));
      }
    }
  }

  template <int kM, int kN, class Visit>
  static FA_DEVICE void for_each(AccumTile<kM, kN>& acc, Visit visit) {
    FA_UNROLL
    for (int m = 0; m < kM; ++m) {
      FA_UNROLL
      for (int n = 0; n < kN; ++n) {
        FA_UNROLL
        for (int i = 0; i < 4; ++i) visit(acc.x[m][n][i], m, n, i);
      }
    }
  }

  FA_DEVICE float bias(TransposedOrigin origin, int lane, int m, int n, int i) const {
    // Of this lane's first element; an exact float wherever the bias does not vanish.
    const float first = static_cast<float>(origin.first_key + lane / 4 - mod.diag_shift -
                                           origin.first_query - lane % 4 * 2);
    return mod.slope * fabsf(first + static_cast<float>(m * 16 + i / 2 * 8 - n * 8 - i % 2));
  }
};

// dP of what dropout keeps times `factor`, of what it drops 0. The sign of P says which, and leaves
// it: even a dropped P of 0 has one.
template <int kM, int kN>
FA_DEVICE void drop_gradient(AccumTile<kM, kN>& dp, AFragments<kM, kN / 2>& probs, float factor) {
  FA_UNROLL
  for (int m = 0; m < kM; ++m) {
    FA_UNROLL
    for (int n = 0; n < kN; ++n) {
      FA_UNROLL
      for (int h = 0; h < 2; ++h) {
        uint32_t& pair = probs.x[m][n / 2][n % 2 * 2 + h];
        float& low = dp.x[m][n][2 * h];
        float& high = dp.x[m][n][2 * h + 1];
        low = pair & 0x8000u ? 0.f : low * factor;
        high = pair & 0x80000000u ? 0.f : high * factor;
        pair &= 0x7FFF7FFFu;
      }
    }
  }
}

}  // namespace fa
