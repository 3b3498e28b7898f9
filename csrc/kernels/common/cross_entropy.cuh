// Cross-entropy of rows of logits with label smoothing and z-loss, and its gradient.
//
//   s = logits * logit_scale        lse = log sum exp(s)
//   loss = lse - (1 - smoothing) s[label] - smoothing mean(s) + lse_square_scale lse^2
//   dlogits = dloss logit_scale ((1 + 2 lse_square_scale lse) exp(s - lse)
//                                - (1 - smoothing) [label] - smoothing / vocabulary)
//
// A CTA takes a row. The forward walks it once as online softmax walks keys; the backward once
// more, with the saved lse. Bytes bound: the forward reads the logits, the backward reads them and
// writes as many. Rows need not be aligned (core/cross_entropy.h).
#pragma once
#include <cuda_runtime.h>

#include "core/cross_entropy.h"
#include "core/online_softmax.h"
#include "core/params.h"
#include "ptx/math.h"
#include "tile/vec.h"

namespace fa {

FA_DEVICE int64_t label_of(const CrossEntropyParams& p, int64_t row) {
  const int64_t at = row * p.labels_stride;
  return p.labels_are_int64 ? static_cast<const int64_t*>(p.labels)[at]
                            : static_cast<const int*>(p.labels)[at];
}
FA_DEVICE bool is_label(const CrossEntropyParams& p, int64_t label) {
  return 0 <= label && label < p.vocabulary;
}

// The sum of exp over some logits relative to their maximum, and their plain sum. In base 2: the
// logits come multiplied by logit_scale log2(e).
struct LogitSums {
  float max = -INFINITY;
  float exps = 0.f;   // sum of 2^(x - max)
  float plain = 0.f;  // sum of x

  // 2^(x - max), 0 where both are -inf.
  static FA_DEVICE float relative(float x, float max) {
    return ptx::ex2_approx_ftz(x - (max == -INFINITY ? 0.f : max));
  }
  template <int kN>
  FA_DEVICE void add(const float (&x)[kN]) {
    float new_max = max;
    FA_UNROLL
    for (int i = 0; i < kN; ++i) new_max = fmaxf(new_max, x[i]);
    const float base = new_max == -INFINITY ? 0.f : new_max;
    exps *= ptx::ex2_approx_ftz(max - base);
    FA_UNROLL
    for (int i = 0; i < kN; ++i) {
      exps += ptx::ex2_approx_ftz(x[i] - base);
      plain += x[i];
    }
    max = new_max;
  }
  FA_DEVICE void add(const LogitSums& other) {
    const float new_max = fmaxf(max, other.max);
    exps = exps * relative(max, new_max) + other.exps * relative(other.max, new_max);
    plain += other.plain;
    max = new_max;
  }
  FA_DEVICE void add_lanes(int lanes) {
    for (int step = lanes / 2; step > 0; step /= 2) {
      LogitSums other;
      other.max = __shfl_xor_sync(0xffffffffu, max, step);
      other.exps = __shfl_xor_sync(0xffffffffu, exps, step);
      other.plain = __shfl_xor_sync(0xffffffffu, plain, step);
      add(other);
    }
  }
};

// Calls vectors(column of each, how many of them count) for whole vectors and single(column) for
// elements beside them, each column once over the threads of the CTA.
template <int kVec, class Vectors, class Single>
FA_DEVICE void walk_row(RowPieces pieces, int size, Vectors vectors, Single single) {
  const int thread = static_cast<int>(threadIdx.x);
  constexpr int kStep = kCrossEntropyThreads * kCrossEntropyUnroll;
  for (int begin = thread; begin < pieces.vectors; begin += kStep) {
    int column[kCrossEntropyUnroll], count = 0;
    FA_UNROLL
    for (int u = 0; u < kCrossEntropyUnroll; ++u) {
      const int vector = begin + u * kCrossEntropyThreads;
      if (vector < pieces.vectors) ++count;
      // Past the end: the last vector once more, so that no load waits for a branch.
      column[u] = pieces.head + min(vector, pieces.vectors - 1) * kVec;
    }
    vectors(column, count);
  }
  for (int column = thread; column < pieces.head; column += kCrossEntropyThreads) single(column);
  for (int column = pieces.tail + thread; column < size; column += kCrossEntropyThreads)
    single(column);
}

template <class T>
__global__ void __launch_bounds__(kCrossEntropyThreads)
    cross_entropy_fwd_kernel(const __grid_constant__ CrossEntropyParams p) {
  constexpr int kVec = kVecSize<T>;
  __shared__ LogitSums of_warp[kCrossEntropyThreads / kWarpSize];
  const int64_t row = blockIdx.x;
  const int thread = static_cast<int>(threadIdx.x);
  const int64_t label = label_of(p, row);
  if (label == p.ignore_index) {
    if (thread == 0) p.loss[row] = p.z_loss[row] = p.lse[row] = 0.f;
    return;
  }
  const T* logits = static_cast<const T*>(p.logits) + row * p.logits_stride;
  const float scale = p.logit_scale * kLog2e;

  LogitSums sums;
  // A given lse leaves the plain sum alone to be computed, and that only if it counts.
  if (p.given_lse == nullptr || p.smoothing != 0.f) {
    const RowPieces pieces =
        row_pieces(reinterpret_cast<uint64_t>(logits), sizeof(T), p.vocabulary);
    walk_row<kVec>(
        pieces, p.vocabulary,
        [&](const int (&column)[kCrossEntropyUnroll], int count) {
          Vec<T, kVec> x[kCrossEntropyUnroll];
          FA_UNROLL
          for (int u = 0; u < kCrossEntropyUnroll; ++u) x[u] = load_vec<kVec>(logits + column[u]);
          FA_UNROLL
          for (int u = 0; u < kCrossEntropyUnroll; ++u) {
            if (u >= count) continue;
            float values[kVec];
            to_float(x[u], values);
            for (float& value : values) value *= scale;
            sums.add(values);
          }
        },
        [&](int column) {
          const float value[1] = {static_cast<float>(logits[column]) * scale};
          sums.add(value);
        });
    sums.add_lanes(kWarpSize);
    if (thread % kWarpSize == 0) of_warp[thread / kWarpSize] = sums;
    __syncthreads();  // the sums of all warps are there
    if (thread >= kWarpSize) return;
    constexpr int kWarps = kCrossEntropyThreads / kWarpSize;
    sums = of_warp[thread % kWarps];
    sums.add_lanes(kWarps);
  }
  if (thread != 0) return;
  float lse = (sums.max + ptx::lg2_approx_ftz(sums.exps)) * kLn2;
  if (p.given_lse != nullptr) lse = p.given_lse[row];
  const float picked = is_label(p, label) ? static_cast<float>(logits[label]) * p.logit_scale : NAN;
  float loss = lse - (1.f - p.smoothing) * picked;
  if (p.smoothing != 0.f)
    loss -= p.smoothing * (sums.plain * kLn2 / static_cast<float>(p.vocabulary));
  const float z_loss = p.lse_square_scale * lse * lse;
  p.loss[row] = loss + z_loss;
  p.z_loss[row] = z_loss;
  p.lse[row] = lse;
}

template <class T>
__global__ void __launch_bounds__(kCrossEntropyThreads)
    cross_entropy_bwd_kernel(const __grid_constant__ CrossEntropyParams p) {
  constexpr int kVec = kVecSize<T>;
  const int64_t row = blockIdx.x;
  const T* logits = static_cast<const T*>(p.logits) + row * p.logits_stride;
  T* dlogits = static_cast<T*>(p.dlogits) + row * p.dlogits_stride;
  const int64_t label = label_of(p, row);
  const bool is_ignored = label == p.ignore_index;
  const float lse = p.lse[row];
  const float dloss = is_ignored ? 0.f : p.dloss[row * p.dloss_stride] * p.logit_scale;
  const float scale = p.logit_scale * kLog2e, shift = -lse * kLog2e;
  const float per_exp = dloss * (1.f + 2.f * p.lse_square_scale * lse);
  const float same = is_ignored || is_label(p, label)
                         ? -dloss * p.smoothing / static_cast<float>(p.vocabulary)
                         : NAN;
  const float picked = -dloss * (1.f - p.smoothing);
  const auto gradient = [&](float logit, int column) {
    const float g = per_exp * ptx::ex2_approx_ftz(logit * scale + shift) + same;
    return column == label ? g + picked : g;
  };

  RowPieces pieces = row_pieces(reinterpret_cast<uint64_t>(logits), sizeof(T), p.vocabulary);
  // Vectors where both tensors have them at the same columns.
  if ((reinterpret_cast<uint64_t>(logits) - reinterpret_cast<uint64_t>(dlogits)) % 16 != 0)
    pieces = {p.vocabulary, 0, p.vocabulary};
  walk_row<kVec>(
      pieces, p.vocabulary,
      [&](const int (&column)[kCrossEntropyUnroll], int count) {
        Vec<T, kVec> x[kCrossEntropyUnroll];
        FA_UNROLL
        for (int u = 0; u < kCrossEntropyUnroll; ++u)
          if (!is_ignored) x[u] = load_vec<kVec>(logits + column[u]);
        FA_UNROLL
        for (int u = 0; u < kCrossEntropyUnroll; ++u) {
          if (u >= count) continue;
          float values[kVec] = {};
          if (!is_ignored) {
            to_float(x[u], values);
            FA_UNROLL
            for (int i = 0; i < kVec; ++i) values[i] = gradient(values[i], column[u] + i);
          }
          Vec<T, kVec> rounded;
          from_float(values, rounded);
          store_vec(dlogits + column[u], rounded);
        }
      },
      [&](int column) {
        const float value[1] = {is_ignored ? 0.f
                                           : gradient(static_cast<float>(logits[column]), column)};
        Vec<T, 1> rounded;
        from_float(value, rounded);
        dlogits[column] = rounded.x[0];
      });
}

template <class T>
int launch_cross_entropy_fwd(const CrossEntropyParams& p, cudaStream_t stream) {
  cross_entropy_fwd_kernel<T>
      <<<static_cast<unsigned>(p.rows), kCrossEntropyThreads, 0, stream>>>(p);
  return cudaGetLastError();
}
template <class T>
int launch_cross_entropy_bwd(const CrossEntropyParams& p, cudaStream_t stream) {
  cross_entropy_bwd_kernel<T>
      <<<static_cast<unsigned>(p.rows), kCrossEntropyThreads, 0, stream>>>(p);
  return cudaGetLastError();
}

}  // namespace fa
