// LayerNorm and RMSNorm forward, with row scale, dropout and residual before them.
//
//   sum = dropout(x * rowscale) + residual
//   out = (sum - mean) * rstd * weight + bias        RMSNorm, arXiv:1910.07467: mean = 0
//
// A group of lanes keeps a row in registers (core/norm.h): one read, mean and variance behind one
// barrier, one write. Bytes bound: x and residual are read once, out and sum
// written once.
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
      FA_UNROLL
      for (int i = 0; i < kNormVec; ++i) total[0] += columns.is_inside(v, i) ? x[v][i] : 0.f;
    }
    add_row_lanes(total, lanes);
    mean = total[0] / max(columns_of_warp(warp), 1.f);
  }
  FA_UNROLL
  for (int v = 0; v < Columns::kVectors; ++v) {
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

template <class T, class Sum, bool kAligned>
__global__ void __launch_bounds__(kMaxNormThreads)
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
  const auto load_residual = [&] {
    if (p.residual != nullptr) residual.load(p.residual, p.residual_stride, read_row, columns);
  };
  if (kAligned) load_residual();

  float sum[Columns::kVectors][kNormVec];
  const float scale = p.rowscale == nullptr ? 1.f : p.rowscale[read_row];
  FA_UNROLL
  for (int v = 0; v < Columns::kVectors; ++v) {
    to_float(x.v[v], sum[v]);
    FA_UNROLL
    for (float& s : sum[v]) s *= scale;
  }
  if (p.keep_threshold < kNormKeepAll) {
    const NormDropout dropout(p.rng_state, p.keep_threshold);
    FA_UNROLL
    for (int v = 0; v < Columns::kVectors; ++v) dropout.apply(read_row, columns.column(v), sum[v]);
  }
  if (!kAligned) load_residual();  // elements one by one take a register each, dropout many
  if (p.residual != nullptr) {
    FA_UNROLL
    for (int v = 0; v < Columns::kVectors; ++v) {
      float r[kNormVec];
      to_float(residual.v[v], r);
      FA_UNROLL
      for (int i = 0; i < kNormVec; ++i) sum[v][i] += r[i];
    }
  }
  if (p.sum != nullptr && row < p.rows) {
    Sum* out = static_cast<Sum*>(p.sum) + row * p.hidden_size;
    FA_UNROLL
    for (int v = 0; v < Columns::kVectors; ++v) columns.store(out, v, sum[v]);
  }

  const float inverse_size = 1.f / static_cast<float>(p.hidden_size);
  const RowMoments moments = row_moments(sum, columns, group, p.mean != nullptr, scratch);
  const float mean = moments.mean;
  const float rstd = rsqrtf(moments.squares * inverse_size + p.eps);
  if (row >= p.rows) return;
  if (columns.lane == 0) {
    if (p.mean != nullptr) p.mean[row] = mean;
    p.rstd[row] = rstd;
  }

  T* out = static_cast<T*>(p.out) + row * p.hidden_size;
  FA_UNROLL
  for (int v = 0; v < Columns::kVectors; ++v) {
    float weight[kNormVec], bias[kNormVec] = {};
    columns.template load_weights<T>(p.weight, p.weight_is_fp32, v, weight);
    if (p.bias != nullptr) columns.template load_weights<T>(p.bias, p.weight_is_fp32, v, bias);
    FA_UNROLL
    for (int i = 0; i < kNormVec; ++i)
      sum[v][i] = (sum[v][i] - mean) * rstd * (weight[i] + p.weight_offset) + bias[i];
    columns.store(out, v, sum[v]);
  }
}

template <class T, class Sum>
int launch_norm_fwd_of(const NormFwdParams& p, cudaStream_t stream) {
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
