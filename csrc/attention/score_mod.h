// What changes scores beyond scale and mask: softcap, ALiBi, dropout. docs/numerics.md has the
// formulas.
//
// Kernels without any of them fold the scale into the exponential; these work in log2 units, so
// that the weight of a score is 2^(score - row_max), whatever the sign of softmax_scale.
#pragma once
#include "attention/apply_mask.h"
#include "core/online_softmax.h"
#include "core/params.h"
#include "core/philox.h"
#include "ptx/math.h"

namespace fa {

// Whether a problem needs a kernel with these steps. A scale that is not positive does, because the
// plain softmax compares unscaled scores.
FA_HD constexpr bool has_score_mod(const ScoreParams& p) {
  return p.softcap != 0.f || p.alibi_slopes != nullptr || p.keep_threshold < 256 ||
         !(p.softmax_scale > 0.f);
}

// Which of them a problem has, known when it runs, or when the code is compiled: code for one of
// them alone has no branches, behind which nothing would overlap.
struct ModKinds {
  bool softcap, alibi, dropout;
  FA_HD bool is_softcap() const { return softcap && !alibi && !dropout; }
  FA_HD bool is_bias() const { return !softcap && !dropout; }
  FA_HD bool is_dropout() const { return dropout && !softcap && !alibi; }
};
struct OnlySoftcap {
  static constexpr bool softcap = true, alibi = false, dropout = false;
};
struct OnlyAlibi {  // also with slopes of 0
  static constexpr bool softcap = false, alibi = true, dropout = false;
};
struct OnlyDropout {
  static constexpr bool softcap = false, alibi = false, dropout = true;
};
struct NoMods {
  static constexpr bool softcap = false, alibi = false, dropout = false;
};

FA_HD ModKinds mod_kinds(const ScoreParams& p) {
  return {p.softcap != 0.f, p.alibi_slopes != nullptr, p.keep_threshold < 256};
}

// loop(kinds), where kinds are constants if there is one alone.
template <bool kScoreMod, class Loop>
FA_DEVICE void with_mod_kinds(ModKinds kinds, Loop loop) {
  if (!kScoreMod) {
    loop(NoMods{});
  } else if (kinds.is_softcap()) {
    loop(OnlySoftcap{});
  } else if (kinds.is_bias()) {
    loop(OnlyAlibi{});
  } else if (kinds.is_dropout()) {
    loop(OnlyDropout{});
  } else {
    loop(kinds);
  }
}

// The constants of one head. A CTA keeps them in shared memory.
struct ScoreMod {
  float inner_scale;  // of q k^T; with softcap, the argument of tanh
  float outer_scale;  // of tanh, log2 units; 0: no softcap
  float slope;        // log2 units for a distance of one key
  int diag_shift;     // key on the diagonal of query 0: seqlen_k - seqlen_q
  int keep_threshold;
  uint32_t batch_head;
  uint64_t seed, offset;

  static FA_DEVICE ScoreMod of(const ScoreParams& p, MaskSpec mask, int batch, int head,
                               int num_heads) {
    const bool capped = p.softcap != 0.f, drops = p.keep_threshold < 256;
    ScoreMod mod;
    mod.inner_scale = capped ? p.softmax_scale / p.softcap : p.softmax_scale * kLog2e;
    mod.outer_scale = p.softcap * kLog2e;
    mod.slope = p.alibi_slopes == nullptr
                    ? 0.f
                    : p.alibi_slopes[batch * p.alibi_batch_stride + head] * kLog2e;
    mod.diag_shift = mask.seqlen_k - mask.seqlen_q;
    mod.keep_threshold = p.keep_threshold;
    mod.batch_head = static_cast<uint32_t>(batch) * num_heads + head;
    mod.seed = drops ? static_cast<uint64_t>(p.rng_state[0]) : 0;
    mod.offset = drops ? static_cast<uint64_t>(p.rng_state[1]) : 0;
    return mod;
  }

  FA_DEVICE ModKinds kinds() const {
    return {outer_scale != 0.f, slope != 0.f, keep_threshold < 256};
  }

  // Raw q k^T becomes scores in log2 units.
  template <int kM, int kN>
  FA_DEVICE void score(AccumTile<kM, kN>& acc_s, ScoreOrigin origin, int lane) const {
    score(acc_s, origin, lane, kinds());
  }
  template <int kM, int kN, class Kinds>
  FA_DEVICE void score(AccumTile<kM, kN>& acc_s, ScoreOrigin origin, int lane, Kinds kinds) const {
    FA_UNROLL
    for (auto& band : acc_s.x) {
      FA_UNROLL
      for (auto& column : band) {
        FA_UNROLL
        for (float& x : column) x *= inner_scale;
      }
    }
    if (kinds.softcap) {
      FA_UNROLL
      for (auto& band : acc_s.x) {
        FA_UNROLL
        for (auto& column : band) {
          FA_UNROLL
          for (float& x : column) x = outer_scale * ptx::tanh_approx(x);
        }
      }
    }
    if (kinds.alibi) add_alibi(acc_s, origin, lane);
  }

  // Whether byte `byte` of a word is below keep_threshold. With that byte on top, the bytes below
  // it do not decide: no need to take it out.
  FA_DEVICE bool keeps(uint32_t word, int byte) const {
    const uint32_t highest = (static_cast<uint32_t>(keep_threshold) << 24) - 1;  // 256: all ones
    return word << (24 - 8 * byte) <= highest;
  }

  // Calls visit(m, n, reg, kept) for every element; first_row, first_col of origin are multiples of
  // 16 and 32.
  template <int kM, int kN, class Visit>
  FA_DEVICE void for_each_kept(ScoreOrigin origin, int lane, Visit visit) const {
    static_assert(kN % 4 == 0, "32 columns share one call of Philox");
    FA_UNROLL
    for (int m = 0; m < kM; ++m) {
      FA_UNROLL
      for (int n = 0; n < kN; n += 4) {
        const Philox4 bytes =
            dropout_bytes(seed, offset, batch_head,
                          static_cast<uint32_t>(origin.first_row / kDropoutTileRows + m),
                          static_cast<uint32_t>(origin.first_col / kDropoutTileCols + n / 4), lane);
        FA_UNROLL
        for (int reg = 0; reg < 16; ++reg)
          visit(m, n + reg / 4, reg % 4, keeps(bytes.word[reg / 4], reg % 4));
      }
    }
  }

 private:
  template <int kM, int kN>
  FA_DEVICE void add_alibi(AccumTile<kM, kN>& acc_s, ScoreOrigin origin, int lane) const {
    FA_UNROLL
    for (int r = 0; r < 2 * kM; ++r) {
      const int diag = origin.first_row + r * 8 + lane / 4 + diag_shift;
      // Distance of this lane's first column; an exact float, as positions are below 2^24 apart
      // wherever the bias does not vanish.
      const float first = static_cast<float>(origin.first_col + lane % 4 * 2 - diag);
      FA_UNROLL
      for (int n = 0; n < kN; ++n) {
        FA_UNROLL
        for (int i = 0; i < 2; ++i)
          acc_s.x[r / 2][n][r % 2 * 2 + i] -= slope * fabsf(first + static_cast<float>(n * 8 + i));
      }
    }
  }
};

}  // namespace fa
