// The mask of core/mask.h on the scores that a warp holds.
#pragma once
#include "core/mask.h"
#include "tile/mma_sm80.h"

namespace fa {

// Element (row, col) of a warp's scores is query first_row + row and key first_col + col.
struct ScoreOrigin {
  int first_row, first_col;
};

// Sets the scores of row `row` of a lane to -inf, but for `size` columns from `begin` on, which
// counts from column 0 of the accumulators.
template <int kM, int kN>
FA_DEVICE void keep_columns(AccumTile<kM, kN>& acc_s, int row, int begin, int size, int lane) {
  begin -= lane % 4 * 2;  // from this lane's first column; one unsigned comparison tests both ends
  FA_UNROLL
  for (int n = 0; n < kN; ++n) {
    FA_UNROLL
    for (int i = 0; i < 2; ++i) {
      const bool kept = static_cast<unsigned>(n * 8 + i - begin) < static_cast<unsigned>(size);
      float& score = acc_s.x[row / 2][n][row % 2 * 2 + i];
      score = kept ? score : -INFINITY;
    }
  }
}

// Sets the scores of keys that are not kept to -inf.
template <int kM, int kN>
FA_DEVICE void apply_mask(AccumTile<kM, kN>& acc_s, MaskSpec mask, ScoreOrigin origin, int lane) {
  FA_UNROLL
  for (int r = 0; r < 2 * kM; ++r) {
    const Range keys = key_range(mask, origin.first_row + r * 8 + lane / 4);
    keep_columns(acc_s, r, keys.begin - origin.first_col, keys.size(), lane);
  }
}

}  // namespace fa
