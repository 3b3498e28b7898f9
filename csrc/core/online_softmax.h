// One row of online softmax and the merge of partial results: the scalar rules that every kernel
// applies to each accumulator row. FlashAttention-2, arXiv:2307.08691, algorithm 1.
//
// Scores are raw q.k; scale_log2 = softmax_scale * log2(e), so that weights are powers of two.
// Invariants: row_max is the maximum of the raw scores seen so far, -inf if no key was kept;
// row_sum and acc_o are sums of weights relative to row_max; LSE is the natural logarithm.
#pragma once
#include <cmath>

#include "core/host_device.h"

namespace fa {

constexpr float kLog2e = 1.4426950408889634f;  // log2(e)
constexpr float kLn2 = 0.6931471805599453f;    // ln(2)

// The reference point of the weights. A fully masked row has row_max == -inf; (-inf) - (-inf)
// would be NaN, so 0 stands in: every weight of such a row is 2^-inf = 0 then.
FA_HD float finite_max(float row_max) {
  return row_max == -INFINITY ? 0.f : row_max;
}

// Factor for row_sum and acc_o gathered under old_max, once new_max >= old_max is known.
FA_HD float rescale_factor(float old_max, float new_max, float scale_log2) {
  return exp2f((old_max - finite_max(new_max)) * scale_log2);
}

// Weight of one key; score == -inf marks a masked key.
FA_HD float softmax_weight(float score, float row_max, float scale_log2) {
  return exp2f(score * scale_log2 - finite_max(row_max) * scale_log2);
}

// LSE of a finished row; -inf if no key was kept. A NaN in row_sum stays NaN.
FA_HD float row_lse(float row_max, float row_sum, float softmax_scale) {
  return row_sum == 0.f ? -INFINITY : finite_max(row_max) * softmax_scale + logf(row_sum);
}

// Factor that normalises acc_o; 0 for a row without a key, whose output is 0.
FA_HD float output_scale(float row_sum) {
  return row_sum == 0.f ? 0.f : 1.f / row_sum;
}

// LSE of two disjoint sets of keys. Symmetric; -inf is neutral.
FA_HD float merge_lse(float a, float b) {
  const float high = a > b ? a : b, low = a > b ? b : a;
  return low == -INFINITY ? high : high + log1pf(expf(low - high));
}

// Weight of a partial output with LSE `lse` in a row whose LSE over all parts is `total`:
// out = sum over parts of merge_weight * out_part. 0 for a part without a key.
FA_HD float merge_weight(float lse, float total) {
  return lse == -INFINITY ? 0.f : expf(lse - total);
}

}  // namespace fa
