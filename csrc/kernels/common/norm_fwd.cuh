// LayerNorm and RMSNorm forward, with row scale, dropout and residual before them.
//
//   sum = dropout(x * rowscale) + residual
//   out = (sum - mean) * rstd * weight + bias        RMSNorm, arXiv:1910.07467: mean = 0
//
// A group of lanes keeps a row in registers (core/norm.h): one read, mean and then variance as the
// mean square of what is left, one write. Bytes bound: x and residual are read once, out and sum
// written once.
#pragma once
#include <cuda_runtime.h>

#include "core/params.h"
#include "kernels/common/norm_row.h"

namespace fa {

template <class T, class Sum, bool kAligned>
__global__ void __launch_bounds__(kMaxNormThreads)
    norm_fwd_kernel(const __grid_constant__ NormFwdParams p, int lanes) {
  using Columns = NormColumns<kNormFwdColumns, kAligned>;
  __shared__ float scratch[2][kWarpSize];
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
  float mean = 0.f;
  if (p.mean != nullptr) {
    float total[1] = {};
    FA_UNROLL
    for (int v = 0; v < Columns::kVectors; ++v) {
      FA_UNROLL
      for (int i = 0; i < kNormVec; ++i) total[0] += columns.is_inside(v, i) ? sum[v][i] : 0.f;
    }
    sum_over_row(total, lanes, group, scratch[0]);
    mean = total[0] * inverse_size;
  }
  float squares[1] = {};
  FA_UNROLL
  for (int v = 0; v < Columns::kVectors; ++v) {
    FA_UNROLL
    for (int i = 0; i < kNormVec; ++i) {
      sum[v][i] -= mean;
      squares[0] += columns.is_inside(v, i) ? sum[v][i] * sum[v][i] : 0.f;
    }
  }
  sum_over_row(squares, lanes, group, scratch[1]);
  const float rstd = rsqrtf(squares[0] * inverse_size + p.eps);
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
      sum[v][i] = sum[v][i] * rstd * (weight[i] + p.weight_offset) + bias[i];
    columns.store(out, v, sum[v]);
  }
}

template <class T, class Sum>
int launch_norm_fwd_of(const NormFwdParams& p, cudaStream_t stream) {
  const NormShare share = norm_share(p.hidden_size, kNormFwdColumns);
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
