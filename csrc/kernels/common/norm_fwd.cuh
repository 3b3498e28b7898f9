// LayerNorm and RMSNorm forward, with row scale, dropout and residual before them.
//
//   sum = dropout(x * rowscale) + residual
//   out = (sum - mean) * rstd * weight + bias        RMSNorm, arXiv:1910.07467: mean = 0
//
// A group of lanes keeps a row in registers (core/norm.h): one read, mean and variance behind one
// barrier, one write. Bytes bound: x and residual are read once, out and sum written once.
//
// norm_fwd_ring_kernel: the next row comes into shared memory while this one is computed, and
// weight and bias stay in registers for all rows of a CTA. Memory: smem [of x, of residual][stages]
// [vectors][threads] of 16 bytes. norm_fwd_kernel: rows that are not aligned or do not fit.
#pragma once
#include <cuda_runtime.h>

#include "core/params.h"
#include "kernels/common/norm_row.h"

namespace fa {

// Mean of a row and the sum of the squares of what is left; with_mean false: 0 and of the row
// itself.
struct RowMoments {
  float mean, squares;
};
// Each warp takes the moments of its own columns first, and they are merged behind one barrier:
//
//   squares = sum over warps of squares_w + columns_w * (mean_w - mean)^2
//
// x: the thread's columns. All threads of the CTA take part. scratch: [2][kWarpSize].
template <class Columns>
FA_DEVICE RowMoments row_moments(const float (&x)[Columns::kVectors][kNormVec], Columns columns,
                                 int group, bool with_mean, float* scratch) {
  const int lanes = columns.lanes, warp_lanes = min(lanes, kWarpSize);
  const auto columns_of_warp = [&](int warp) {
    int count = 0;
    FA_UNROLL
    for (int v = 0; v < Columns::kVectors; ++v)
      count +=
          clamp(columns.size - (v * lanes + warp * kWarpSize) * kNormVec, 0, warp_lanes * kNormVec);
    return static_cast<float>(count);
  };
  const int warp = columns.lane / kWarpSize;
  float total[1] = {}, squares[1] = {}, mean = 0.f;
  if (with_mean) {
    FA_UNROLL
    for (int v = 0; v < Columns::kVectors; ++v) {
      if (columns.count(v) <= 0) continue;
      FA_UNROLL
      for (int i = 0; i < kNormVec; ++i) total[0] += columns.is_inside(v, i) ? x[v][i] : 0.f;
    }
    add_row_lanes(total, lanes);
    mean = total[0] / max(columns_of_warp(warp), 1.f);
  }
  FA_UNROLL
  for (int v = 0; v < Columns::kVectors; ++v) {
    if (columns.count(v) <= 0) continue;
    FA_UNROLL
    for (int i = 0; i < kNormVec; ++i) {
      const float left = columns.is_inside(v, i) ? x[v][i] - mean : 0.f;
      squares[0] += left * left;
    }
  }
  add_row_lanes(squares, lanes);
  if (lanes <= kWarpSize) return {mean, squares[0]};

  const RowWarps warps(lanes, group);
  if (threadIdx.x % kWarpSize == 0) {
    scratch[warps.first + warp] = total[0];
    scratch[kWarpSize + warps.first + warp] = squares[0];
  }
  __syncthreads();  // the warps of a row see each other's moments
  const int other = warps.other();
  const bool is_warp = other < warps.count;
  const float other_total = is_warp ? scratch[warps.first + other] : 0.f;
  squares[0] = is_warp ? scratch[kWarpSize + warps.first + other] : 0.f;
  if (with_mean) {
    const float other_columns = is_warp ? columns_of_warp(other) : 0.f;
    total[0] = other_total;
    warps.add(total);
    mean = total[0] / static_cast<float>(columns.size);
    const float between = other_total / max(other_columns, 1.f) - mean;
    squares[0] += other_columns * between * between;
  }
  warps.add(squares);
  return {mean, squares[0]};
}

// From x to the sum that is normalised, which is stored if that is asked for.
// residual(v, r): vector v of the residual, if there is one. has_row: else nothing is stored.
template <class Sum, class Columns, class Residual>
FA_DEVICE void make_sum(const NormFwdParams& p, int64_t row, bool has_row, Columns columns,
                        float (&sum)[Columns::kVectors][kNormVec], const Residual& residual) {
  if (p.rowscale != nullptr) {
    const float scale = p.rowscale[row];
    FA_UNROLL
    for (int v = 0; v < Columns::kVectors; ++v) {
      FA_UNROLL
      for (float& s : sum[v]) s *= scale;
    }
  }
  if (p.keep_threshold < kNormKeepAll) {
    const NormDropout dropout(p.rng_state, p.keep_threshold);
    FA_UNROLL
    for (int v = 0; v < Columns::kVectors; ++v) dropout.apply(row, columns.column(v), sum[v]);
  }
  if (p.residual != nullptr) {
    FA_UNROLL
    for (int v = 0; v < Columns::kVectors; ++v) {
      float r[kNormVec];
      residual(v, r);
      FA_UNROLL
      for (int i = 0; i < kNormVec; ++i) sum[v][i] += r[i];
    }
  }
  if (p.sum != nullptr && has_row) {
    Sum* out = static_cast<Sum*>(p.sum) + row * p.hidden_size;
    FA_UNROLL
    for (int v = 0; v < Columns::kVectors; ++v) columns.store(out, v, sum[v]);
  }
}

// Stores out and the statistics. weights(v, w, b): vector v of weight + weight_offset and of bias.
template <class T, class Columns, class Weights>
FA_DEVICE void normalise(const NormFwdParams& p, int64_t row, Columns columns, RowMoments moments,
                         float (&sum)[Columns::kVectors][kNormVec], const Weights& weights) {
  const float inverse_size = 1.f / static_cast<float>(p.hidden_size);
  const float rstd = rsqrtf(moments.squares * inverse_size + p.eps), shift = -moments.mean * rstd;
  if (columns.lane == 0) {
    if (p.mean != nullptr) p.mean[row] = moments.mean;
    p.rstd[row] = rstd;
  }
  T* out = static_cast<T*>(p.out) + row * p.hidden_size;
  FA_UNROLL
  for (int v = 0; v < Columns::kVectors; ++v) {
    float w[kNormVec], b[kNormVec];
    weights(v, w, b);
    FA_UNROLL
    for (int i = 0; i < kNormVec; ++i) sum[v][i] = (sum[v][i] * rstd + shift) * w[i] + b[i];
    columns.store(out, v, sum[v]);
  }
}

template <class T, class Columns>
FA_DEVICE void load_weight_and_bias(const NormFwdParams& p, Columns columns, int v,
                                    float (&w)[kNormVec], float (&b)[kNormVec]) {
  columns.template load_weights<T>(p.weight, p.weight_is_fp32, v, w);
  FA_UNROLL
  for (int i = 0; i < kNormVec; ++i) {
    w[i] += p.weight_offset;
    b[i] = 0.f;
  }
  if (p.bias != nullptr) columns.template load_weights<T>(p.bias, p.weight_is_fp32, v, b);
}

template <class T, class Sum, bool kAligned>
__global__ void __launch_bounds__(kMaxNormFwdThreads)
    norm_fwd_kernel(const __grid_constant__ NormFwdParams p, int lanes) {
  using Columns = NormColumns<kNormFwdColumns, kAligned>;
  __shared__ float scratch[2 * kWarpSize];
  const int thread = static_cast<int>(threadIdx.x), group = thread / lanes;
  const Columns columns{thread % lanes, lanes, p.hidden_size};
  const int64_t row = int64_t{blockIdx.x} * (static_cast<int>(blockDim.x) / lanes) + group;
  const int64_t read_row = min(row, p.rows - 1);  // groups past the end join in the barriers

  NormVectors<T, Columns> x;
  x.load(p.x, p.x_stride, read_row, columns);
  NormVectors<Sum, Columns> residual;
  if (kAligned && p.residual != nullptr)
    residual.load(p.residual, p.residual_stride, read_row, columns);
  float sum[Columns::kVectors][kNormVec];
  FA_UNROLL
  for (int v = 0; v < Columns::kVectors; ++v) to_float(x.v[v], sum[v]);
  make_sum<Sum>(p, read_row, row < p.rows, columns, sum, [&](int v, float (&r)[kNormVec]) {
    if (!kAligned)  // not before dropout: elements one by one take a register each, dropout many
      residual.v[v] =
          columns.load(static_cast<const Sum*>(p.residual) + read_row * p.residual_stride, v);
    to_float(residual.v[v], r);
  });
  const RowMoments moments = row_moments(sum, columns, group, p.mean != nullptr, scratch);
  if (row >= p.rows) return;
  normalise<T>(p, row, columns, moments, sum,
               [&](int v, float (&w)[kNormVec], float (&b)[kNormVec]) {
                 load_weight_and_bias<T>(p, columns, v, w, b);
               });
}

// Rows are aligned, T has 16 bits, and so has the residual.
template <class T>
__global__ void __launch_bounds__(kMaxNormRingThreads)
    norm_fwd_ring_kernel(const __grid_constant__ NormFwdParams p, int lanes) {
  using Columns = NormColumns<kNormFwdRingColumns, true>;
  constexpr int kVectors = Columns::kVectors;
  extern __shared__ uint4 smem[];
  __shared__ float scratch[2][2 * kWarpSize];
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  const int group = thread / lanes, groups = threads / lanes;
  const Columns columns{thread % lanes, lanes, p.hidden_size};
  const int64_t step = int64_t{gridDim.x} * groups;

  const RingRows<T, Columns> xs{static_cast<const T*>(p.x), p.x_stride, smem + thread, threads};
  const RingRows<T, Columns> residuals{static_cast<const T*>(p.residual), p.residual_stride,
                                       xs.end(), threads};
  const auto fetch = [&](int64_t row, int stage) {
    if (row < p.rows) {
      xs.fetch(row, columns, stage);
      if (p.residual != nullptr) residuals.fetch(row, columns, stage);
    }
    ptx::cp_async_commit_group();
  };
  int64_t begin = int64_t{blockIdx.x} * groups;
  fetch(begin + group, 0);
  float weight[kVectors][kNormVec], bias[kVectors][kNormVec];
  FA_UNROLL
  for (int v = 0; v < kVectors; ++v) load_weight_and_bias<T>(p, columns, v, weight[v], bias[v]);

  int stage = 0;
  // All groups take as many steps, because they meet at the barriers.
  for (; begin < p.rows; begin += step, stage ^= 1) {
    const int64_t row = begin + group;
    const bool has_row = row < p.rows;
    ptx::cp_async_wait_group<0>();
    float sum[kVectors][kNormVec];
    FA_UNROLL
    for (int v = 0; v < kVectors; ++v) xs.read(stage, v, sum[v]);
    make_sum<T>(p, has_row ? row : 0, has_row, columns, sum,
                [&](int v, float (&r)[kNormVec]) { residuals.read(stage, v, r); });
    fetch(row + step, stage ^ 1);  // where the row before was
    const RowMoments moments = row_moments(sum, columns, group, p.mean != nullptr, scratch[stage]);
    if (!has_row) continue;
    normalise<T>(p, row, columns, moments, sum,
                 [&](int v, float (&w)[kNormVec], float (&b)[kNormVec]) {
                   FA_UNROLL
                   for (int i = 0; i < kNormVec; ++i) {
                     w[i] = weight[v][i];
                     b[i] = bias[v][i];
                   }
                 });
  }
}

template <class T, class Sum>
int launch_norm_fwd_of(const NormFwdParams& p, cudaStream_t stream) {
  if constexpr (kHasNormRing<T, Sum>) {
    const NormShare share = norm_fwd_ring_share(p.hidden_size);
    const int ring_bytes =
        norm_ring_smem_bytes(share, kNormFwdRingColumns, p.residual == nullptr ? 2 : 2 + 2);
    if (p.vectorized && ring_bytes + kNormScratchBytes <= p.max_smem_bytes) {
      constexpr auto kKernel = norm_fwd_ring_kernel<T>;
      int ctas = 0;
      cudaError_t error = resident_norm_ctas(share, p.rows, kMaxNormRingThreads, ctas);
      if (error == cudaSuccess) error = allow_norm_ring<kKernel>();
      if (error != cudaSuccess) return error;
      kKernel<<<ctas, share.num_threads(), ring_bytes, stream>>>(p, share.lanes);
      return cudaGetLastError();
    }
  }
  const NormShare share = norm_fwd_share(p.hidden_size);
  const int64_t ctas = ceil_div<int64_t>(p.rows, share.rows);
  const auto kernel = p.vectorized ? norm_fwd_kernel<T, Sum, true> : norm_fwd_kernel<T, Sum, false>;
  kernel<<<static_cast<unsigned>(ctas), share.num_threads(), 0, stream>>>(p, share.lanes);
  return cudaGetLastError();
}

template <class T>
int launch_norm_fwd(const NormFwdParams& p, cudaStream_t stream) {
  return p.sum_dtype == p.dtype ? launch_norm_fwd_of<T, T>(p, stream)
                                : launch_norm_fwd_of<T, float>(p, stream);
}

}  // namespace fa
